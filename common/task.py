"""The Lightning module that every domain's tasks subclass once: named slots, optimizer groups, exact resume."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torchmetrics import MetricCollection

from common import checkpoint as ckpt
from common._optim import OptimSpec
from common.attach import Attached, attach, probe
from common.calibration import calibrate
from common.errors import GraftError
from common.frozen import FrozenPrefix, FrozenRows
from common.loading import StatefulLoader, mix_seed
from common.methods import MethodSpec
from common.roles import Family


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """What a domain builds: the bare pretrained module, its name and its family of roles."""

    name: str
    model: nn.Module
    family: Family | None


class AdaptedTask(L.LightningModule):
    """A backbone with a PEFT method, a head, a loss and metrics.

    A domain fills the slots `build_backbone`, `build_head`, `build_loss`, `build_metrics`, `features`, `targets` and
    `example_batch`. All of them run in `setup`, when the data is known, each under the task's seed.

    Args:
        peft: The method.
        optim: Optimizer and schedule.
        settings: The subclass's other arguments, as plain values; they identify a run and rebuild the task.
        seed: Seed of the head, the adapter and every training step.
        gradient_checkpointing: Recompute the backbone's blocks in the backward pass, to keep fewer activations.
    """

    domain: ClassVar[str] = ""
    primary: ClassVar[tuple[str, str]] = ("loss", "min")

    def __init__(
        self,
        *,
        peft: MethodSpec,
        optim: OptimSpec,
        settings: Mapping[str, Any],
        seed: int = 0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        optim.check()
        self.peft, self.optim, self.seed = peft, optim, seed
        self.settings = dict(settings)
        self.gradient_checkpointing = gradient_checkpointing
        self.strict_loading = False  # our own check is stricter: see on_load_checkpoint
        self.resumed = False  # whether this fit goes on from a checkpoint, which holds what calibration would find
        self.facts: Any = None
        self.attached: Attached
        self._expected_state: set[str] = set()
        self.backbone_name = ""
        self.method_memory: dict[str, Tensor] = {}  # what the method keeps from step to step
        self.steps = 0  # of the whole fit
        self.frozen_rows: FrozenRows | None = None  # in a trainer's hands, where `frozen_prefix` names something

    # ---- slots --------------------------------------------------------------------------------------------------

    def build_backbone(self) -> Backbone:
        """Build the bare pretrained backbone."""
        raise NotImplementedError

    def build_head(self) -> nn.Module:
        """Build the head that reads `features`."""
        raise NotImplementedError

    def build_loss(self) -> nn.Module:
        """Build the loss of (head output, targets)."""
        raise NotImplementedError

    def build_metrics(self) -> MetricCollection:
        """Build the metrics of (head output, targets)."""
        raise NotImplementedError

    def features(self, batch: Any) -> Tensor:  # noqa: ANN401
        """Run the attached backbone on a batch."""
        raise NotImplementedError

    def targets(self, batch: Any) -> Tensor:  # noqa: ANN401
        """Return a batch's targets."""
        raise NotImplementedError

    def example_batch(self) -> Any:  # noqa: ANN401
        """Make a small random batch, the same at every call: for the liveness probe and an export's certificate."""
        raise NotImplementedError

    def describe_facts(self) -> dict[str, Any]:
        """Return `facts` as plain values, as `load_facts` takes them."""
        raise NotImplementedError

    def load_facts(self, facts: Mapping[str, Any]) -> None:
        """Set `facts` from plain values, where there is no datamodule (export, predict)."""
        raise NotImplementedError

    def describe_data(self, data: Any) -> dict[str, Any]:  # noqa: ANN401
        """Return the data's name, split digest and sizes (`train`, `val`, `test`), for the run's record."""
        raise NotImplementedError

    def predictions(self, outputs: Sequence[Tensor], data: Any, folder: Path) -> list[dict[str, Any]]:  # noqa: ANN401
        """Return one plain row per test example, for `predictions.jsonl`.

        Args:
            outputs: What `keep` returned for each test batch, in order.
            data: The datamodule.
            folder: The run's folder; pictures and other files belong into `folder / "predictions"`, and a row names
                them relative to `folder`.
        """
        raise NotImplementedError

    def infer(self, batch: Any) -> Tensor:  # noqa: ANN401
        """Return the outputs for an evaluation batch, as loss and metrics take them; `forward`, unless overridden."""
        return self(batch)

    def keep(self, outputs: Tensor) -> Tensor:
        """Return what is to be kept of a test batch's outputs for `predictions`; all, unless overridden."""
        return outputs

    def frozen_prefix(self) -> FrozenPrefix | None:
        """Return what never changes while a run lasts, for `features` to read its outputs off `frozen_rows`."""
        return None

    def usage(self) -> str:
        """Return Python lines that load this task's export with plain libraries, for the model card."""
        raise NotImplementedError

    # ---- building -----------------------------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        """Build everything, once the datamodule is set up and its facts are known."""
        if hasattr(self, "backbone"):
            return
        self.facts = self._datamodule().facts
        self.assemble()
        probe(self.attached, lambda: self.features(self.example_batch()))
        self.prepare(stage)
        if stage == "fit" and not self.resumed:
            self._calibrate()
        self._expected_state = self._state_keys()
        prefix = self.frozen_prefix()
        self.frozen_rows = FrozenRows(prefix, self) if prefix else None

    def prepare(self, stage: str | None) -> None:
        """Check the data against what was built, and make what the loss needs beside a batch; nothing by default.

        Runs once, while the adapter is still without effect and before a method sees training batches.
        """

    def _calibrate(self) -> None:
        """Show a fresh adapter the first training batches, where its method wants to see some."""
        if self.attached.plan.looks:
            strategy = self.trainer.strategy
            self.to(strategy.root_device).eval()
            loader, seed = self._datamodule().train_dataloader(), mix_seed(self.seed, 4)
            calibrate(
                self.attached, loader, lambda batch: self.compute_loss(strategy.batch_to_device(batch)), seed=seed
            )

    def _datamodule(self) -> Any:  # noqa: ANN401
        """Return the trainer's datamodule, whose `facts` a task is built from."""
        data = getattr(self.trainer, "datamodule", None)
        if data is None:
            raise GraftError("The trainer has no datamodule. Fit a task with a datamodule, not with bare loaders.")
        return data

    def assemble(self, attach_with: Callable[[Backbone], Attached] | None = None) -> None:
        """Build backbone, method, head, loss and metrics out of `facts`.

        Args:
            attach_with: Puts the method onto the backbone; by default this task's spec does, with a fresh start.
        """
        with torch.random.fork_rng(devices=[]):  # a backbone with random weights is drawn from the task's seed
            torch.manual_seed(mix_seed(self.seed, 0))
            built = self.build_backbone()
        self.backbone_name = built.name
        if self.gradient_checkpointing:
            self._refuse_recomputing()
            self._switch_checkpointing(built.model)
        if attach_with is None:
            self.attached = attach(built.model, self.peft, built.family, seed=mix_seed(self.seed, 1), name=built.name)
        else:
            self.attached = attach_with(built)
        if self.gradient_checkpointing:
            self._refuse_double_statistics()
        self.backbone = self.attached.model
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix_seed(self.seed, 2))
            self.head = self.build_head()
        self.loss = self.build_loss()
        metrics = self.build_metrics()
        self.val_metrics, self.test_metrics = metrics.clone(), metrics.clone()

    def _refuse_recomputing(self) -> None:
        if not self.peft.recomputable:
            raise GraftError(
                f"{type(self.peft).__name__} keeps no activations of the blocks, and its steps cannot be computed one "
                "at a time. Set gradient_checkpointing to false."
            )

    @staticmethod
    def _switch_checkpointing(model: nn.Module) -> None:
        switch = getattr(model, "set_grad_checkpointing", None) or getattr(model, "gradient_checkpointing_enable", None)
        if switch is None:
            raise GraftError(
                f"{type(model).__name__} has no gradient checkpointing; set gradient_checkpointing to false."
            )
        switch()

    def _refuse_double_statistics(self) -> None:
        """Refuse to recompute batch norms that train: each step would update their running statistics twice."""
        modules = self.attached.model.modules()
        counted = any(isinstance(m, _NormBase) and m.track_running_stats for m in modules)
        method = self.attached.spec
        if counted and (self.attached.plan.mode == "full" or getattr(method, "statistics", "frozen") == "saved"):
            raise GraftError(
                f"gradient_checkpointing with {type(method).__name__} would update this backbone's batch norm "
                "statistics twice a step. Set gradient_checkpointing to false, or choose a method that freezes them."
            )

    def train(self, mode: bool = True) -> AdaptedTask:
        """Set train or eval mode, the backbone by its method's policy."""
        super().train(mode)
        if hasattr(self, "attached"):
            self.attached.train(mode)
        return self

    # ---- steps --------------------------------------------------------------------------------------------------

    def forward(self, batch: Any) -> Tensor:  # noqa: ANN401
        """Return the head's output for a batch."""
        with self.attached.grad_mode():
            features = self.features(batch)
        return self.head(features)

    def compute_loss(self, batch: Any) -> Tensor:  # noqa: ANN401
        """Return the scalar training loss of a batch."""
        return self.loss(self(batch), self.targets(batch))

    def on_fit_start(self) -> None:
        """Set the modes: since Lightning 2.2 a module trains in whatever mode it arrives."""
        self.train()

    def on_train_epoch_start(self) -> None:
        """Announce the epoch again: resumed at an epoch's end with `max_steps`, Lightning announces one too many."""
        loader = self.trainer.train_dataloader
        if isinstance(loader, StatefulLoader):
            loader.epochs.set_epoch(self.trainer.current_epoch)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:  # noqa: ANN401
        """Seed the step, so that a resumed run draws what the uninterrupted one would have drawn."""
        step = self.trainer.fit_loop.epoch_loop.total_batch_idx
        torch.manual_seed(mix_seed(self.seed, 3, self.trainer.global_rank, step))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # noqa: ANN401
        """Compute the loss of one batch."""
        loss = self.compute_loss(batch)
        penalty = self.peft.penalty(self.backbone)
        loss = loss if penalty is None else loss + penalty
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch[0]))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:  # noqa: ANN401
        """Update the validation metrics."""
        self._evaluate(batch, "val", self.val_metrics)

    def test_step(self, batch: Any, batch_idx: int) -> Tensor:  # noqa: ANN401
        """Update the test metrics and return what the run's predictions need."""
        return self.keep(self._evaluate(batch, "test", self.test_metrics))

    def _evaluate(self, batch: Any, stage: str, metrics: MetricCollection) -> Tensor:  # noqa: ANN401
        output, targets = self.infer(batch).float(), self.targets(batch)
        metrics.update(output, targets)
        size = len(batch[0])
        self.log(f"{stage}/loss", self.loss(output, targets), on_step=False, on_epoch=True, batch_size=size)
        named = {f"{stage}/{name}": metric for name, metric in metrics.items()}
        self.log_dict(named, prog_bar=True, on_step=False, on_epoch=True, batch_size=size)
        return output

    # ---- optimizer ----------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:  # noqa: ANN401
        """Build AdamW over the groups and its schedule."""
        optimizer = torch.optim.AdamW(self.parameter_groups(), lr=self.optim.lr)
        total = self.steps = self._total_steps()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.optim.factor(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Take the step, then let the method act while the gradients stand."""
        super().optimizer_step(*args, **kwargs)
        self.peft.after_step(self.backbone, self.method_memory, self.trainer.global_step + 1, self.steps)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Group the trainable parameters by learning rate and weight decay.

        The head has its own rate, depth lowers the backbone's and the method may raise some of its own. Vectors are not
        decayed, nor are the backbone's matrices of one row or column (scales of additive methods, whose neutral value
        is one; class tokens).
        """
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        head_lr = self.optim.head_lr if self.optim.head_lr is not None else self.optim.lr
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            own = self.optim.lr * self._depth_factor(name) * self.peft.rate_factor(name)
            rate = own if name.startswith("backbone.") else head_lr
            axes = parameter.squeeze().ndim if name.startswith("backbone.") else parameter.ndim
            decay = self.optim.weight_decay if axes > 1 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
        return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]

    def _depth_factor(self, name: str) -> float:
        roles = self.attached.roles
        blocks = roles.blocks if roles else ()
        if self.optim.layer_decay == 1.0 or roles is None or not blocks:
            return 1.0
        inner = name.removeprefix("backbone.").removeprefix("base_model.model.")
        for depth, block in enumerate(blocks):
            if inner.startswith(f"{block}."):
                return self.optim.layer_decay ** (len(blocks) - depth)
        owner = inner.rpartition(".")[0]
        first = not owner
        while owner and not first:  # an adapter's parameters lie below the module that carries the role
            first = roles.role_of.get(owner) in ("stem", "embed")
            owner = owner.rpartition(".")[0]
        return self.optim.layer_decay ** (len(blocks) + 1) if first else 1.0

    def _total_steps(self) -> int:
        """Count the optimizer steps of the whole fit.

        Reading Lightning's own estimate would build the loaders early and drop a resumed loader's position.

        Raises:
            GraftError: The fit has no end that a schedule could aim at.
        """
        trainer = self.trainer
        steps, epochs = trainer.max_steps, trainer.max_epochs
        if epochs is None or epochs < 0:
            if steps > 0:
                return steps
            raise GraftError("The learning rate's schedule needs an end. Give trainer.max_epochs or trainer.max_steps.")
        batches = len(self._datamodule().train_dataloader())
        limit = trainer.limit_train_batches
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        total = max(1, math.ceil(batches / trainer.accumulate_grad_batches) * epochs)
        return min(total, steps) if steps > 0 else total

    # ---- checkpoint ---------------------------------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """Return what a checkpoint must agree with to be loaded into this task."""
        return {
            "task": type(self).__name__,
            "settings": self.settings,
            "facts": self.describe_facts(),
            "base_digest": self.attached.base_digest,
            "peft": self.peft.describe(),
            "optim": asdict(self.optim),
            "seed": self.seed,
        }

    def _state_keys(self) -> set[str]:
        was_training = self.training
        self.train()
        keys = ckpt.state_keys(self)
        self.train(was_training)
        return keys

    def load_trained(self, state: Mapping[str, Tensor]) -> None:
        """Put a checkpoint's trained tensors into this task, all of them or none.

        Raises:
            GraftError: The tensors are not exactly this task's.
        """
        ckpt.make_room(self, state)
        ckpt.check_state(state, self, self._state_keys())
        self.load_state_dict(state, strict=False)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the trained state only, and say what it belongs to."""
        keys = self._expected_state
        checkpoint["state_dict"] = {name: t for name, t in checkpoint["state_dict"].items() if name in keys}
        checkpoint["graft"] = {**self.identity(), "data": self._data_identity()}
        if self.method_memory:
            checkpoint["method_memory"] = self.method_memory

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another backbone, method or configuration.

        Raises:
            GraftError: What differs, by name.
        """
        mine = {**self.identity(), "data": self._data_identity()}
        wrong = ckpt.differences(mine, checkpoint["graft"])
        if wrong:
            raise GraftError(
                f"This checkpoint belongs to another run: {'; '.join(wrong)}. Use that run's configuration."
            )
        ckpt.make_room(self, checkpoint["state_dict"])
        ckpt.check_state(checkpoint["state_dict"], self, self._expected_state)
        self.method_memory = checkpoint.get("method_memory", {})
        if self.trainer.state.fn == TrainerFn.FITTING:
            self._check_loader(checkpoint["loops"]["fit_loop"]["state_dict"])

    def _data_identity(self) -> dict[str, Any]:
        """Return the data's name and split digest: a run goes on with the images it began with."""
        described = self.describe_data(self._datamodule())
        return {key: described.get(key) for key in ("name", "digest")}

    def _check_loader(self, fit_loop: Mapping[str, Any]) -> None:
        """Refuse to go on with other data or batches; Lightning restores the loader within an epoch only."""
        loader = self._datamodule().train_dataloader()
        if isinstance(loader, StatefulLoader):
            for state in fit_loop.get("combined_loader", []):
                loader.check(state)
