"""What a run leaves in its folder: the record in `metrics.json`, and the files beside it."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch

from common import __version__
from common.checkpoint import LAST, write_atomically
from common.cost import CostMeter
from common.errors import GraftError
from common.exchange import adapter_bytes
from common.split_data import SplitData
from common.task import AdaptedTask

METRICS = "metrics.json"
CONFIG = "config.yaml"
PREDICTIONS = "predictions.jsonl"

# What a fit costs and a baseline does not; None is what does not apply to it.
NO_COST: dict[str, Any] = {
    "params_total": None,
    "params_trainable": 0,
    "params_trainable_backbone": 0,
    "params_trainable_head": 0,
    "trainable_percent": 0.0,
    "params_by_role": {},
    "train_memory": None,
    "flops_per_step": None,
    "step_seconds": None,
    "batch_size": None,
    "steps": 0,
    "fit_seconds": None,
    "peak_cuda_bytes": None,
    "adapter_bytes": None,
    "head_bytes": None,
    "backbone_bytes": None,
}


def holds_run(folder: Path) -> bool:
    """Whether a folder holds a run, begun or finished, or a baseline."""
    return (folder / LAST).exists() or (folder / METRICS).exists()


def make_folder(folder: Path) -> None:
    """Make a folder and prove that it can be written, before an hour of training is spent.

    Raises:
        GraftError: It cannot be made or written.
    """
    write_atomically(folder / ".writable", lambda file: file.write(b""))
    (folder / ".writable").unlink()


def read_record(folder: Path) -> dict[str, Any]:
    """Read a run's `metrics.json`.

    Raises:
        GraftError: There is none, so the run never finished (or the folder is no run).
    """
    path = folder / METRICS
    if not path.is_file():
        raise GraftError(
            f"{folder} has no {METRICS}: not a finished run. Finish it with `graft fit --run {folder} --resume`."
        )
    return json.loads(path.read_text())


def read_trained(folder: Path) -> dict[str, Any]:
    """Read the `metrics.json` of a run that was trained.

    Raises:
        GraftError: There is none, or it is a baseline's.
    """
    record = read_record(folder)
    if record.get("baseline"):
        raise GraftError(
            f"{folder} holds the baseline {record['method']['class_path']}: its results are complete, and it has no "
            "weights to go on with, evaluate again or export. Give the folder of a trained run, or a new one."
        )
    return record


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON atomically."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def write_predictions(folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a run's `predictions.jsonl` atomically, one row a line."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(folder / PREDICTIONS, lambda file: file.write(lines.encode()))


def write_config(folder: Path, config: str) -> None:
    """Write a run's `config.yaml` atomically."""
    write_atomically(folder / CONFIG, lambda file: file.write(config.encode()))


def metrics_of(trainer: L.Trainer, stage: str) -> dict[str, float]:
    """Return a stage's metrics by their own names."""
    values = trainer.callback_metrics
    return {key.removeprefix(f"{stage}/"): float(v) for key, v in values.items() if key.startswith(f"{stage}/")}


def trainer_settings(trainer: L.Trainer) -> dict[str, Any]:
    """Return the trainer's settings that change what a step computes."""
    return {"precision": str(trainer.precision), "accumulate_grad_batches": trainer.accumulate_grad_batches}


def cost_of(task: AdaptedTask, trainer: L.Trainer, meter: CostMeter) -> dict[str, Any]:
    """Gather what a fit cost."""
    attached = task.attached
    head = sum(p.numel() for p in task.head.parameters())
    in_backbone = sum(p.numel() for p in task.backbone.parameters() if p.requires_grad)
    total = attached.base_params + head
    return {
        "params_total": total,
        "params_trainable": in_backbone + head,
        "params_trainable_backbone": in_backbone,
        "params_trainable_head": head,
        "trainable_percent": 100.0 * (in_backbone + head) / total,
        "params_by_role": {r: {"total": t, "trainable": n} for r, (t, n) in attached.params_by_role.items()},
        **meter.report(trainer, task),
        **adapter_bytes(task),
    }


def record_of(
    task: AdaptedTask, data: L.LightningDataModule, trainer: L.Trainer, recipe: str, cost: Mapping[str, Any]
) -> dict[str, Any]:
    """Gather everything that a reader of the run needs to trust and repeat it."""
    attached = getattr(task, "attached", None)  # a baseline may have built none
    name, mode = task.primary
    return {
        "schema": 1,
        "recipe": recipe,
        "domain": task.domain,
        "task": type(task).__name__,
        "backbone": task.backbone_name,
        "base_digest": attached.base_digest if attached else "",
        "settings": task.settings,
        "facts": task.describe_facts(),
        "method": task.peft.describe(),
        "notes": list(attached.plan.notes) if attached else [],
        "optim": asdict(task.optim),
        "trainer": trainer_settings(trainer),
        "seed": task.seed,
        "primary": {"name": name, "mode": mode},
        "status": "fitted",
        "val": {},
        "test": None,
        "cost": cost,
        "data": task.describe_data(data) | (data.describe_splits() if isinstance(data, SplitData) else {}),
        "environment": {
            "graft": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": L.__version__,
            "device": str(trainer.strategy.root_device),
            "threads": torch.get_num_threads(),
            "precision": str(trainer.precision),
        },
    }
