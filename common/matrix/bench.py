"""One method on one specimen: fresh copies of both, a few training steps, and what they left behind."""

from __future__ import annotations

import io
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from common.attach import Attached, attach, state_digest
from common.checkpoint import state_keys
from common.exchange import attach_folder, write_adapter
from common.matrix.specimen import Build, Specimen
from common.methods import MethodSpec
from common.task import Backbone

STEPS = 3
RATE = 1e-2
NAME = "specimen"


def difference(output: Tensor, expected: Tensor) -> float:
    """Return the largest absolute difference, relative to the largest expected value where that exceeds one."""
    scale = max(1.0, float(expected.abs().max()))
    return float((output - expected).abs().max()) / scale


@contextmanager
def quiet() -> Generator[None]:
    """Leave the global random state alone, compute in one thread, and drop what libraries warn of."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums split over threads are not the same bits from run to run
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A method after its training steps.

    Attributes:
        attached: The trained model, in eval mode. Checks that change it take one of their own.
        output: What it computes.
        before: Its state before the first step.
        after: Its state behind the last one.
        interrupted: Trained tensors and optimizer state before the last step, as a file would hold them.
        folder: Its adapter folder.
    """

    attached: Attached
    output: Tensor
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    interrupted: bytes
    folder: Path


class Bench:
    """One method on one specimen.

    Args:
        build: Builds the specimen anew.
        spec: The method.
        folder: An empty folder for adapter files.
    """

    def __init__(self, build: Build, spec: MethodSpec, folder: Path) -> None:
        self.build, self.spec, self.folder = build, spec, folder
        self.specimen = build()

    def run(self, model: nn.Module) -> Tensor:
        """Return the model's output without a graph."""
        with torch.no_grad():
            return self.specimen.run(model, self.specimen.inputs)

    def fresh(self, seed: int = 0) -> Attached:
        """Attach the method to a fresh specimen; in eval mode."""
        specimen = self.build()
        attached = attach(specimen.model, self.spec, specimen.family, seed=seed, name=NAME)
        attached.train(False)
        return attached

    @cached_property
    def bare(self) -> Tensor:
        """What the bare network computes; torch chooses its kernels by `requires_grad` too, and bits are compared."""
        full = self.trained.attached.plan.mode == "full"
        return self.run(self.build().model.requires_grad_(full).eval())

    @cached_property
    def trained(self) -> Trained:
        """The method after training from seed 0."""
        return self._train(seed=0)

    @cached_property
    def other(self) -> Trained:
        """The method after training from another start towards something else."""
        return self._train(seed=1)

    def _train(self, seed: int) -> Trained:
        attached = self.fresh(seed)
        before = snapshot(attached.model)
        optimizer = optimizer_of(attached.model)
        memory: dict[str, Tensor] = {}
        interrupted = io.BytesIO()
        for step in range(STEPS):
            if step == STEPS - 1:
                save_state(attached, optimizer, memory, interrupted)
            self.step(attached, optimizer, memory, step, seed)
        attached.train(False)
        folder = self.folder / f"adapter-{seed}"
        folder.mkdir()
        write_adapter(attached, folder, lambda: self.fresh(seed).model)
        return Trained(
            attached=attached,
            output=self.run(attached.model),
            before=before,
            after=snapshot(attached.model),
            interrupted=interrupted.getvalue(),
            folder=folder,
        )

    def step(
        self,
        attached: Attached,
        optimizer: torch.optim.Optimizer | None,
        memory: dict[str, Tensor],
        step: int,
        seed: int = 0,
    ) -> None:
        """Take one optimizer step towards fixed noise, seeded by its number alone, as a task takes it."""
        if optimizer is None:
            return
        attached.train(True)
        torch.manual_seed(1000 * seed + step)
        output = self.specimen.run(attached.model, self.specimen.inputs)
        target = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed))
        loss = (output - target).square().mean()
        penalty = self.spec.penalty(attached.model)
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        self.spec.after_step(attached.model, memory, step + 1, STEPS)
        optimizer.zero_grad()

    def reloaded(self, trained: Trained | None = None) -> Attached:
        """Load an adapter folder onto a fresh specimen, as `graft predict` does."""
        trained = trained or self.trained
        specimen = self.build()
        digest = state_digest(specimen.model)
        built = Backbone(name=NAME, model=specimen.model, family=specimen.family)
        attached = attach_folder(built, self.spec, trained.folder, digest)
        attached.train(False)
        return attached


def peft_model(attached: Attached) -> PeftModel | None:
    """Return PEFT's wrapper, or None where the method adds no tuner."""
    return attached.model if isinstance(attached.model, PeftModel) else None


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all parameters and buffers."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer | None:
    """Return an optimizer of what trains, or None where nothing does; without decay, which moves dead parameters."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0) if parameters else None


def save_state(
    attached: Attached, optimizer: torch.optim.Optimizer | None, memory: dict[str, Tensor], file: io.BytesIO
) -> None:
    """Write what a checkpoint holds: the trained tensors, the optimizer's state and what the method keeps."""
    attached.train(True)
    keys = state_keys(attached.model)
    state = {name: tensor for name, tensor in attached.model.state_dict().items() if name in keys}
    torch.save({"model": state, "optimizer": optimizer.state_dict() if optimizer else None, "memory": memory}, file)


def load_state(attached: Attached, optimizer: torch.optim.Optimizer | None, content: bytes) -> dict[str, Tensor]:
    """Read it back into a fresh model and optimizer; return what the method keeps."""
    state: dict[str, Any] = torch.load(io.BytesIO(content), weights_only=True)
    attached.model.load_state_dict(state["model"], strict=False)
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])
    return state["memory"]


__all__ = ["STEPS", "Bench", "Specimen", "Trained", "difference", "load_state", "optimizer_of", "peft_model", "quiet"]
