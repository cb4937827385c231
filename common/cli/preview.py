"""`graft preview`: what a recipe would adapt and cost, without training."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from common.cli._forecast import Forecast, RoleRow, forecasts, megabytes, roles_of, shapes, verdict
from common.cli.training import _parse as parse_recipe
from common.errors import GraftError


def run(argv: Sequence[str]) -> int:
    """Run `graft preview RECIPE [settings as for fit]`.

    Raises:
        GraftError: The recipe, its data or its method cannot be used as asked.
    """
    if argv and argv[0] in ("--help", "-h"):
        sys.stdout.write("usage: graft preview RECIPE [--peft.rank 4 ...]   (settings as for graft fit)\n")
        return 0
    if not argv or argv[0].startswith("-"):
        raise GraftError("Say which recipe: graft preview RECIPE. `graft list recipes` names them.")
    cli = parse_recipe("preview", ["--config", argv[0], *argv[1:]])
    task, data = cli.model, cli.datamodule
    data.prepare_data()
    data.setup("fit")
    task.facts = data.facts
    batch = next(iter(data.train_dataloader()), None)
    if batch is None:
        raise GraftError("The recipe's data has no training batch. Lower its batch_size, or give more data.")
    own, found = forecasts(task, batch, cli.trainer_options.get("precision"))
    console = Console(highlight=False)
    name = type(task.peft).__name__
    said = [f"{name} on {own.backbone_name}, one batch: {shapes(batch)}", *own.attached.plan.notes]
    console.print("\n".join(said), markup=False, soft_wrap=True)
    if rows := roles_of(own.attached):
        console.print(_modules(rows))
    console.print(_costs(found))
    console.print(verdict(found), markup=False, soft_wrap=True)
    return 0


def _modules(rows: Sequence[RoleRow]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("role", "modules", "what they are", "blocks", "trainable", "first"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(row.role, str(row.modules), row.kinds, row.depth, f"{row.trainable:,}", row.example)
    return table


def _costs(found: Sequence[Forecast]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("trained", "parameters", "memory of a step", "weights", "gradients", "optimizer", "activations"):
        table.add_column(column, overflow="fold")
    for forecast in found:
        if forecast.memory is None:
            table.add_row(forecast.name, "refused", forecast.refusal)
            continue
        parts = {key: megabytes(size) for key, size in forecast.memory.as_dict().items()}
        sizes = [parts[key] for key in ("total", "weights", "gradients", "optimizer", "activations")]
        table.add_row(forecast.name, f"{forecast.trainable:,}", *sizes)
    return table
