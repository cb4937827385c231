"""The results as tables: for a terminal, a README (Markdown) and a spreadsheet (CSV). Quality never without cost."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from common.compare.results import MEMORY_PARTS, Row, Spread
from common.compare.study import Study

NOTHING = "–"  # noqa: RUF001 (an en dash, as tables print it)
_PLAIN_WIDTH = 170
_COSTS = (
    *("params_trainable", "trainable_percent", "params_total"),
    *(f"memory_{part}" for part in ("total", *MEMORY_PARTS)),
    *("flops_per_step", "step_seconds", "batch_size", "steps", "fit_seconds"),
    *("adapter_bytes", "head_bytes", "backbone_bytes", "peak_cuda_bytes"),
)


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of a table for people.

    Attributes:
        title: The heading.
        text: What a cell says.
        value: What a cell is sorted by; None stands last.
        words: Whether the cells are words, set to the left.
    """

    title: str
    text: Callable[[Row], str]
    value: Callable[[Row], float | str | None]
    words: bool = False


def quality(spread: Spread | None) -> str:
    """Write a metric with its spread, as `0.712 ± 0.011`."""
    if spread is None:
        return NOTHING
    return f"{spread.mean:.3f}" if spread.std is None else f"{spread.mean:.3f} ± {spread.std:.3f}"


def amount(value: float | None, unit: str = "") -> str:
    """Write a count or a size in thousands, millions and so on, as `22.1 M` or `88.2 MB`."""
    if value is None:
        return NOTHING
    steps = ["", "k", "M", "G", "T", "P"]
    while abs(value) >= 999.5 and len(steps) > 1:
        value, steps = value / 1000, steps[1:]
    digits = 0 if abs(value) >= 99.95 or value == int(value) else 1
    return f"{value:.{digits}f} {steps[0]}{unit}".rstrip()


def duration(seconds: float | None) -> str:
    """Write a time, as `0.41 s`, `61 s` or `1 h 05 min`."""
    if seconds is None:
        return NOTHING
    if seconds < 600:
        return f"{seconds:.3g} s" if seconds < 99.5 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def percent(value: float | None) -> str:
    """Write a percentage with two significant digits, as `0.68 %`."""
    return NOTHING if value is None else f"{value:.0f} %" if value >= 9.95 else f"{value:.2g} %"


def columns(rows: Sequence[Row], *, every_metric: bool) -> list[Column]:
    """The columns for people: method, test quality, cost.

    Args:
        rows: The rows of one recipe, or of recipes that share their metrics.
        every_metric: Whether test metrics beside the primary one have columns too (the loss never has).

    Returns:
        The columns, in order.
    """
    primary = next((row.primary for row in rows if row.primary), "")
    others = dict.fromkeys(name for row in rows for name in row.test if name not in (primary, "loss"))
    metrics = [name for name in (primary, *(others if every_metric else ())) if name]
    return [
        Column(title="Method", text=lambda row: row.method, value=lambda row: row.method, words=True),
        *(_metric(name) for name in metrics),
        Column(title="Seeds", text=lambda row: str(len(row.seeds)), value=lambda row: len(row.seeds)),
        Column(title="Val", text=lambda row: quality(row.val), value=lambda row: row.val.mean if row.val else None),
        Column(title="lr", text=lambda row: f"{row.lr:g}" if row.lr else NOTHING, value=lambda row: row.lr),
        _cost("Trainable", "params_trainable", amount),
        _cost("%", "trainable_percent", percent),
        _cost("Train memory", "memory_total", lambda value: amount(value, "B")),
        _cost("FLOPs/step", "flops_per_step", amount),
        _cost("Step", "step_seconds", duration),
        _cost("Fit", "fit_seconds", duration),
        _cost("Adapter", "adapter_bytes", lambda value: amount(value, "B")),
        *([_failures()] if any(row.failed for row in rows) else []),
    ]


def print_table(study: Study, rows: Sequence[Row], console: Console) -> None:
    """Print one table for each recipe."""
    if not console.is_terminal:  # a log file has no width of its own; 80 columns would cut the table
        console = Console(file=console.file, width=_PLAIN_WIDTH)
    for recipe in study.recipes:
        own = [row for row in rows if row.recipe == study.labels[recipe]]
        shown = columns(own, every_metric=False)
        table = Table(title=escape(f"{study.title} ({recipe})"), title_justify="left", title_style="bold")
        for column in shown:
            table.add_column(column.title, justify="left" if column.words else "right")
        for row in own:
            table.add_row(*(column.text(row) for column in shown))
        console.print(table)


def write_markdown(study: Study, rows: Sequence[Row], path: Path) -> None:
    """Write one Markdown table for each recipe, fit for a README."""
    blocks: list[str] = []
    for recipe in study.recipes:
        own = [row for row in rows if row.recipe == study.labels[recipe]]
        shown = columns(own, every_metric=True)
        lines = [
            f"**{study.title}** (`{recipe}`)",
            "",
            _line(column.title for column in shown),
            _line("---" if column.words else "---:" for column in shown),
            *(_line(column.text(row) for column in shown) for row in own),
        ]
        blocks.append("\n".join(lines))
    note = (
        "Test metrics: mean ± sample standard deviation over the seeds (none for a single seed); learning rates were "
        "chosen on the validation split. Val is the primary metric there. Memory: weights, gradients, optimizer "
        "state and saved activations of a training step."
    )
    untrained = list(dict.fromkeys(row.method for row in rows if row.baseline))
    if untrained:
        note += f" Not trained, and so without costs of training: {', '.join(untrained)}; their Fit is all their time."
    path.write_text("\n\n".join([*blocks, note]) + "\n", encoding="utf-8")


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write one line for each recipe and method, in plain units (bytes, seconds).

    What is unknown is left empty, as is what does not apply to a baseline.
    """
    metrics = list(dict.fromkeys(name for row in rows for name in row.test))
    records = [_record(row, metrics) for row in rows]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(records[0]))
        writer.writeheader()
        writer.writerows(records)


def _record(row: Row, metrics: Sequence[str]) -> Mapping[str, object]:
    record: dict[str, object] = {
        "recipe": row.recipe,
        "method": row.method,
        "lr": row.lr,
        "seeds": " ".join(map(str, row.seeds)),
        "n": len(row.seeds),
        "failed_runs": row.failed,
        "primary": row.primary,
        "mode": row.mode,
        "val_primary_mean": row.val.mean if row.val else None,
        "val_primary_std": row.val.std if row.val else None,
    }
    for name in metrics:
        spread = row.test.get(name)
        record[f"test_{name}_mean"] = spread.mean if spread else None
        record[f"test_{name}_std"] = spread.std if spread else None
    return record | {name: row.cost.get(name) for name in _COSTS}


def _metric(name: str) -> Column:
    def value(row: Row) -> float | None:
        return row.test[name].mean if name in row.test else None

    return Column(title=name.replace("_", " "), text=lambda row: quality(row.test.get(name)), value=value)


def _cost(title: str, key: str, write: Callable[[float | None], str]) -> Column:
    return Column(title=title, text=lambda row: write(row.cost.get(key)), value=lambda row: row.cost.get(key))


def _failures() -> Column:
    return Column(title="Failed", text=lambda row: str(row.failed), value=lambda row: row.failed)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
