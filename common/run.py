"""One run in one folder: fit, resume, test, and the record that both leave behind."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ProgressBar
from torch import Tensor

from common import __version__
from common.checkpoint import LAST, AtomicCheckpointIO, LastCheckpoint, read_checkpoint, read_finished, write_atomically
from common.cost import CostMeter
from common.errors import GraftError
from common.exchange import adapter_bytes
from common.progress import progress_callbacks
from common.task import AdaptedTask

METRICS = "metrics.json"
CONFIG = "config.yaml"
PREDICTIONS = "predictions.jsonl"


def fast_precision() -> str:
    """Return `bf16-mixed` where this machine computes bfloat16 in hardware, else `32-true`."""
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
    capable = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return "bf16-mixed" if capable else "32-true"


def build_trainer(folder: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:  # noqa: ANN401
    """Build a Lightning trainer with Graft's defaults, progress display and checkpoint format.

    Args:
        folder: The run's folder.
        *callbacks: Callbacks of this run, beside those in `options`.
        **options: Arguments of `lightning.Trainer`; `precision="auto"` takes `fast_precision()`.
    """
    if options.get("precision") == "auto":
        options["precision"] = fast_precision()
    progress = progress_callbacks()
    given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    given["callbacks"] = [*given.get("callbacks", []), *callbacks, *progress]
    given["plugins"] = [*given.get("plugins", []), AtomicCheckpointIO()]
    defaults: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,  # LastCheckpoint does it
        "enable_model_summary": False,
        "enable_progress_bar": any(isinstance(callback, ProgressBar) for callback in progress),
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
    }
    fixed: dict[str, Any] = {"use_distributed_sampler": False}  # our loaders split the data over ranks themselves
    return L.Trainer(**(defaults | given | fixed))


def fit(
    task: AdaptedTask,
    data: L.LightningDataModule,
    run: str | Path,
    *,
    resume: bool = False,
    save_every: int = 0,
    config: str | None = None,
    recipe: str = "",
    **trainer_options: Any,  # noqa: ANN401
) -> dict[str, Any]:
    """Train a task and leave `last.ckpt`, `metrics.json` and (from a recipe) `config.yaml` in the run's folder.

    Args:
        task: The task.
        data: Its datamodule.
        run: The run's folder.
        resume: Go on from the folder's `last.ckpt`; without one, start.
        save_every: Steps between checkpoints within an epoch; 0 saves at the end of epochs only.
        config: The complete configuration as YAML, kept beside the results.
        recipe: Path of the recipe, for the record.
        **trainer_options: Arguments of `lightning.Trainer` (`max_epochs`, `precision`, ...).

    Returns:
        The content of `metrics.json`.

    Raises:
        GraftError: The folder holds a run already and `resume` is false, or it cannot be written.
    """
    folder = Path(run)
    last = folder / LAST
    if not resume and (last.exists() or (folder / METRICS).exists()):
        raise GraftError(
            f"{folder} already holds a run. Add --resume to go on with it, or choose another --run folder."
        )
    make_folder(folder)
    start = last if resume and last.exists() else None
    begun = read_checkpoint(start)["global_step"] if start else -1  # a damaged file is refused before anything is built
    if config is not None and start is None:
        _write_config(folder, config)
    meter, validation = CostMeter(), _LastValidation()
    trainer = build_trainer(folder, LastCheckpoint(folder, save_every), meter, validation, **trainer_options)
    trainer.fit(task, datamodule=data, ckpt_path=str(start) if start else None, weights_only=True)
    if trainer.interrupted:
        raise KeyboardInterrupt
    if config is not None and start is not None:
        _write_config(folder, config)  # only now is it known to be this run's
    if trainer.global_step == begun and (folder / METRICS).exists():
        record = read_record(folder)
        if record["cost"]["steps"] == begun:  # the run was finished already
            return record
    if trainer.enable_validation and validation.step != trainer.global_step:
        trainer.validate(task, datamodule=data, verbose=False)
    values = trainer.callback_metrics
    record = _record(task, data, trainer, meter, recipe)
    record["val"] = {key.removeprefix("val/"): _number(v) for key, v in values.items() if key.startswith("val/")}
    write_json(folder / METRICS, record)
    return record


def test(task: AdaptedTask, data: L.LightningDataModule, run: str | Path, **trainer_options: Any) -> dict[str, Any]:  # noqa: ANN401
    """Evaluate a finished run on its test split; adds `test` to `metrics.json` and writes `predictions.jsonl`.

    Args:
        task: A fresh task of the run's configuration; its trained state is read from `last.ckpt`.
        data: Its datamodule.
        run: The run's folder.
        **trainer_options: Arguments of `lightning.Trainer`.

    Raises:
        GraftError: The run has not finished, or its checkpoint is of another configuration.
    """
    folder = Path(run)
    record = read_record(folder)
    read_finished(folder, record["cost"]["steps"])
    collect = _Outputs()
    trainer = build_trainer(folder, collect, **trainer_options)
    trainer.test(task, datamodule=data, ckpt_path=str(folder / LAST), weights_only=True, verbose=False)
    values = trainer.callback_metrics
    record["test"] = {key.removeprefix("test/"): _number(v) for key, v in values.items() if key.startswith("test/")}
    rows = task.predictions(collect.outputs, data, folder)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(folder / PREDICTIONS, lambda file: file.write(lines.encode()))
    write_json(folder / METRICS, record)
    return record


def validate(task: AdaptedTask, data: L.LightningDataModule, run: str | Path, **trainer_options: Any) -> dict[str, Any]:  # noqa: ANN401
    """Evaluate a finished run's `last.ckpt` on its validation split; writes nothing.

    Raises:
        GraftError: The run has not finished, or its checkpoint is of another configuration.
    """
    folder = Path(run)
    record = read_record(folder)
    read_finished(folder, record["cost"]["steps"])
    trainer = build_trainer(folder, **trainer_options)
    trainer.validate(task, datamodule=data, ckpt_path=str(folder / LAST), weights_only=True, verbose=False)
    values = trainer.callback_metrics
    record["val"] = {key.removeprefix("val/"): _number(v) for key, v in values.items() if key.startswith("val/")}
    return record


class _LastValidation(L.Callback):
    """Note the step of the last validation: a fit may end behind it, and the record is of the last weights."""

    def __init__(self) -> None:
        self.step = -1

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the step."""
        self.step = trainer.global_step


class _Outputs(L.Callback):
    """Keep the test outputs of every batch."""

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ANN401
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Take the outputs to the CPU."""
        self.outputs.append(outputs.detach().cpu())


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


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON atomically."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def _write_config(folder: Path, config: str) -> None:
    write_atomically(folder / CONFIG, lambda file: file.write(config.encode()))


def make_folder(folder: Path) -> None:
    """Make a folder and prove that it can be written, before an hour of training is spent.

    Raises:
        GraftError: It cannot be made or written.
    """
    write_atomically(folder / ".writable", lambda file: file.write(b""))
    (folder / ".writable").unlink()


def _number(value: Any) -> float:  # noqa: ANN401
    return float(value.item()) if isinstance(value, Tensor) else float(value)


def _record(
    task: AdaptedTask, data: L.LightningDataModule, trainer: L.Trainer, meter: CostMeter, recipe: str
) -> dict[str, Any]:
    """Gather everything that a reader of the run needs to trust and repeat it."""
    attached = task.attached
    head = sum(p.numel() for p in task.head.parameters())
    in_backbone = sum(p.numel() for p in task.backbone.parameters() if p.requires_grad)
    total = attached.base_params + head
    name, mode = task.primary
    cost = {
        "params_total": total,
        "params_trainable": in_backbone + head,
        "params_trainable_backbone": in_backbone,
        "params_trainable_head": head,
        "trainable_percent": 100.0 * (in_backbone + head) / total,
        "params_by_role": {r: {"total": t, "trainable": n} for r, (t, n) in attached.params_by_role.items()},
        **meter.report(trainer, task),
        **adapter_bytes(task),
    }
    return {
        "schema": 1,
        "recipe": recipe,
        "domain": task.domain,
        "task": type(task).__name__,
        "backbone": task.backbone_name,
        "base_digest": attached.base_digest,
        "settings": task.settings,
        "facts": task.describe_facts(),
        "method": task.peft.describe(),
        "optim": task.identity()["optim"],
        "seed": task.seed,
        "primary": {"name": name, "mode": mode},
        "status": "fitted",
        "val": {},
        "test": None,
        "cost": cost,
        "data": task.describe_data(data),
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
