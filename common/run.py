"""One run in one folder: fit, resume, test or a baseline, and the record that all leave behind."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import ProgressBar
from torch import Tensor, nn
from torchmetrics import MetricCollection

from common._record import (
    METRICS,
    NO_COST,
    cost_of,
    holds_run,
    make_folder,
    metrics_of,
    read_record,
    read_trained,
    record_of,
    trainer_settings,
    write_config,
    write_json,
    write_predictions,
)
from common.checkpoint import LAST, AtomicCheckpointIO, LastCheckpoint, differences, read_checkpoint, read_finished
from common.cost import CostMeter
from common.errors import GraftError
from common.progress import progress_callbacks
from common.task import AdaptedTask


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
        GraftError: The folder holds a run already and `resume` is false, or a baseline, or another trainer's run; or
            it cannot be written.
    """
    folder = Path(run)
    start = _begin(folder, resume)
    begun = read_checkpoint(start)["global_step"] if start else -1  # a damaged file is refused before anything is built
    if config is not None and start is None:
        write_config(folder, config)
    meter, validation = CostMeter(), _LastValidation()
    callbacks = (LastCheckpoint(folder, save_every), _SameTrainer(), meter, validation)
    trainer = build_trainer(folder, *callbacks, **trainer_options)
    task.resumed = start is not None
    trainer.fit(task, datamodule=data, ckpt_path=str(start) if start else None, weights_only=True)
    if trainer.interrupted:
        raise KeyboardInterrupt
    if config is not None and start is not None:
        write_config(folder, config)  # only now is it known to be this run's
    if trainer.global_step == begun and (folder / METRICS).exists():
        record = read_record(folder)
        if record["cost"]["steps"] == begun:  # the run was finished already
            return record
    if trainer.enable_validation and validation.step != trainer.global_step:
        trainer.validate(task, datamodule=data, verbose=False)
    record = record_of(task, data, trainer, recipe, cost_of(task, trainer, meter))
    record["val"] = metrics_of(trainer, "val")
    write_json(folder / METRICS, record)
    return record


def _begin(folder: Path, resume: bool) -> Path | None:
    """Make a run's folder, or refuse one that is another's; return the checkpoint to go on from, if any."""
    if not resume and holds_run(folder):
        raise GraftError(
            f"{folder} already holds a run. Add --resume to go on with it, or choose another --run folder."
        )
    if (folder / METRICS).exists():
        read_trained(folder)
    make_folder(folder)
    return folder / LAST if resume and (folder / LAST).exists() else None


def baseline(
    task: AdaptedTask,
    data: L.LightningDataModule,
    run: str | Path,
    name: str,
    function: Callable[[Any, Any], Callable[[Any], Tensor]],
    *,
    config: str | None = None,
    recipe: str = "",
    **trainer_options: Any,  # noqa: ANN401
) -> dict[str, Any]:
    """Evaluate a predictor that is not trained as a task's runs are evaluated; leave `metrics.json` and predictions.

    The record is that of a fit and its test in one: the task's metrics on both splits (without a loss, since a
    predictor need not give what the loss takes), no trained parameter, and no cost but time.

    Args:
        task: The task; of it nothing is built but what `function` builds.
        data: Its datamodule.
        run: The run's folder.
        name: The baseline's name, which stands in the record where a method's does.
        function: Makes the predictor out of the task, whose `facts` are known, and the set-up datamodule. The
            predictor returns for a batch of the evaluation loaders what `task.infer` would.
        config: The complete configuration as YAML, kept beside the results.
        recipe: Path of the recipe, for the record.
        **trainer_options: Arguments of `lightning.Trainer` (`accelerator`, `devices`, `precision`).

    Returns:
        The content of `metrics.json`, which is written last: a folder without it holds nothing yet.

    Raises:
        GraftError: The folder holds a run already, or cannot be written.
    """
    folder = Path(run)
    if holds_run(folder):
        raise GraftError(f"{folder} already holds a run. Choose another --run folder, or remove that one first.")
    make_folder(folder)
    data.prepare_data()
    data.setup("fit")
    task.facts = cast("Any", data).facts
    started = time.perf_counter()
    predictor = _Predictor(task, function(task, data))
    collect = _Outputs()
    trainer = build_trainer(folder, collect, **trainer_options)
    val: dict[str, float] = {}
    if cast("Any", data).records("val"):  # a set for testing only has none
        trainer.validate(predictor, datamodule=data, verbose=False)
        val = metrics_of(trainer, "val")
    trainer.test(predictor, datamodule=data, verbose=False)
    cost = NO_COST | {"fit_seconds": time.perf_counter() - started}
    described = {"method": {"class_path": name, "init_args": {}}, "baseline": True, "optim": None, "trainer": None}
    record = record_of(task, data, trainer, recipe, cost) | described
    record |= {"val": val, "test": metrics_of(trainer, "test")}
    write_predictions(folder, task.predictions(collect.outputs, data, folder))
    if config is not None:
        write_config(folder, config)
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
        GraftError: The run has not finished, or its checkpoint is of another configuration; or it is a baseline.
    """
    folder = Path(run)
    record = read_trained(folder)
    read_finished(folder, record["cost"]["steps"])
    collect = _Outputs()
    trainer = build_trainer(folder, collect, **trainer_options)
    trainer.test(task, datamodule=data, ckpt_path=str(folder / LAST), weights_only=True, verbose=False)
    record["test"] = metrics_of(trainer, "test")
    write_predictions(folder, task.predictions(collect.outputs, data, folder))
    write_json(folder / METRICS, record)
    return record


def validate(task: AdaptedTask, data: L.LightningDataModule, run: str | Path, **trainer_options: Any) -> dict[str, Any]:  # noqa: ANN401
    """Evaluate a finished run's `last.ckpt` on its validation split; writes nothing.

    Raises:
        GraftError: The run has not finished, or its checkpoint is of another configuration; or it is a baseline.
    """
    folder = Path(run)
    record = read_trained(folder)
    read_finished(folder, record["cost"]["steps"])
    trainer = build_trainer(folder, **trainer_options)
    trainer.validate(task, datamodule=data, ckpt_path=str(folder / LAST), weights_only=True, verbose=False)
    record["val"] = metrics_of(trainer, "val")
    return record


class _Predictor(L.LightningModule):
    """Evaluate a predictor as its task is evaluated: the same batches, targets and metrics, but no loss."""

    def __init__(self, task: AdaptedTask, predict: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.task, self.predict = task, predict  # the task moves to the device with this module
        metrics = task.build_metrics()
        self.metrics = nn.ModuleDict({stage: metrics.clone(prefix=f"{stage}/") for stage in ("val", "test")})

    def validation_step(self, batch: Any, batch_idx: int) -> None:  # noqa: ANN401
        """Update the validation metrics."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> Tensor:  # noqa: ANN401
        """Update the test metrics and return what the predictions need."""
        return self.task.keep(self._evaluate(batch, "test"))

    def _evaluate(self, batch: Any, stage: str) -> Tensor:  # noqa: ANN401
        output = self.predict(batch).to(self.device).float()
        metrics = cast("MetricCollection", self.metrics[stage])
        metrics.update(output, self.task.targets(batch))
        self.log_dict(dict(metrics.items()), on_step=False, on_epoch=True, batch_size=len(batch[0]))
        return output


class _SameTrainer(L.Callback):
    """Let a run go on only with the trainer's settings that its steps depend on."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Read the settings."""
        self._settings = trainer_settings(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the settings, for the checkpoint."""
        return self._settings

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare the settings.

        Raises:
            GraftError: What differs, by name.
        """
        wrong = differences(self._settings, state_dict)
        if wrong:
            raise GraftError(
                f"This run cannot go on with another trainer: {'; '.join(wrong)}. Use the run's own --trainer settings."
            )


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
