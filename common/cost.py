"""What a run costs: parameters, training memory, FLOPs, time, bytes on disk.

Training memory is exact and independent of the device: the bytes of weights, gradients, optimizer state and the
activations that autograd keeps for the backward pass, the last read off by saved-tensor hooks on a real batch. What an
allocator adds (fragmentation, workspaces, the peak inside a kernel or a recomputed block) is not in it; on CUDA the
allocator's own peak is reported beside it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, sdpa_backward_flop_count, sdpa_flop_count


def _convolution_backward(grad: list[int], x: list[int], weight: list[int], *args: Any, **kwargs: Any) -> int:  # noqa: ANN401
    """Count each wanted gradient as a forward pass; torch's formula counts every group's channels for the weight's."""
    transposed, wanted = args[4], args[7]
    return sum(wanted[:2]) * conv_flop_count(x, weight, grad, transposed=transposed)


# At most this many step times are kept, evenly spread over the run: their median needs no more.
_TIMES = 1024

# What torch's table of formulas lacks (the attention kernel of a CPU) or gets wrong (grouped convolutions).
_FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda *args, **kwargs: sdpa_flop_count(*args[:3]),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *args, **kwargs: (
        sdpa_backward_flop_count(*args[:4])
    ),
    torch.ops.aten.convolution_backward: _convolution_backward,
}


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of distinct tensors; a storage that several tensors share counts once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@dataclass(frozen=True, kw_only=True)
class TrainMemory:
    """Bytes that a training step needs, by kind."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    def as_dict(self) -> dict[str, int]:
        """Return the parts and their total."""
        parts = asdict(self)
        return {**parts, "total": sum(parts.values())}


@contextmanager
def kept_buffers(module: nn.Module) -> Generator[None]:
    """Give every buffer its values back behind the block; caches that a forward pass makes or resizes stay."""
    before = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                if name in before and buffer.shape == before[name].shape:
                    buffer.copy_(before[name])


def measure_step(module: nn.Module, loss: Callable[[], Tensor]) -> tuple[int, int]:
    """Run one forward and backward pass and read off what it keeps and computes.

    Parameters, buffers and the random state are left as they were, and no gradients remain. Matrix products,
    convolutions and attention are counted as FLOPs (torch's flop counter: a multiply-add is two); element-wise work is
    not.

    Args:
        module: Everything whose parameters and buffers take part.
        loss: Computes the scalar loss of one batch.

    Returns:
        Bytes of saved activations (distinct storages, without the weights), and FLOPs of the step.
    """
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    flops = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    with kept_buffers(module), torch.random.fork_rng(), flops as counter:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            value = loss()
        value.backward()
    module.zero_grad(set_to_none=True)
    return sum(saved.values()), counter.get_total_flops()


def optimizer_bytes(optimizers: Iterable[torch.optim.Optimizer]) -> int:
    """Return the bytes of all tensors that the optimizers keep."""
    return nbytes(t for o in optimizers for state in o.state.values() for t in state.values() if isinstance(t, Tensor))


class CostMeter(L.Callback):
    """Measure a run's cost while it trains; the result is in `cost` after the fit, and in every checkpoint.

    The first training batch is run once more, before training, to read memory and FLOPs; its effects are undone.
    """

    def __init__(self) -> None:
        self.step: dict[str, Any] = {}
        self.fit_seconds = 0.0
        self._durations: list[float] = []  # of every `_stride`-th step
        self._timed = 0
        self._stride = 1
        self._fit_start = 0.0
        self._batch_start = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._fit_start = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_train_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Measure memory and FLOPs once, then time every step."""
        if not self.step:
            task = cast("Any", pl_module)  # an AdaptedTask, which stands a floor above
            with trainer.precision_plugin.train_step_context():
                activations, flops = measure_step(pl_module, lambda: task.compute_loss(batch))
            self.step = {"activations": activations, "flops": flops, "batch_size": len(batch[0])}
        self._batch_start = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Note the step's duration, and the optimizer's size once it has state."""
        self._note(time.perf_counter() - self._batch_start)
        if "optimizer" not in self.step and trainer.global_step > 0:
            self.step["optimizer"] = optimizer_bytes(trainer.optimizers)

    def _note(self, seconds: float) -> None:
        """Keep a step's duration; where there are too many, keep every second one from here on."""
        if self._timed % self._stride == 0:
            self._durations.append(seconds)
        self._timed += 1
        if len(self._durations) > _TIMES:
            self._durations, self._stride = self._durations[::2], 2 * self._stride

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock."""
        self.fit_seconds += time.perf_counter() - self._fit_start

    def state_dict(self) -> dict[str, Any]:
        """Return what was measured so far."""
        running = time.perf_counter() - self._fit_start if self._fit_start else 0.0
        times = {"durations": [*self._durations], "timed": self._timed, "stride": self._stride}
        return {"step": self.step, "fit_seconds": self.fit_seconds + running, **times}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what an interrupted run had measured."""
        self.step, self.fit_seconds = state_dict["step"], state_dict["fit_seconds"]
        self._durations, self._timed = state_dict["durations"], state_dict["timed"]
        self._stride = state_dict["stride"]

    def report(self, trainer: L.Trainer, module: nn.Module) -> dict[str, Any]:
        """Return the step's cost: memory parts, FLOPs, median seconds, and the CUDA peak where there is CUDA.

        Args:
            trainer: The trainer that ran.
            module: The task; its parameters and buffers are the weights.
        """
        trainable = [p for p in module.parameters() if p.requires_grad]
        memory = TrainMemory(
            weights=nbytes((*module.parameters(), *module.buffers())),
            gradients=sum(p.numel() * p.element_size() for p in trainable),
            optimizer=self.step.get("optimizer", 0),
            activations=self.step.get("activations", 0),
        )
        settled = self._durations[1:] or self._durations
        return {
            "train_memory": memory.as_dict(),
            "flops_per_step": self.step.get("flops", 0),
            "step_seconds": statistics.median(settled) if settled else None,
            "batch_size": self.step.get("batch_size"),
            "steps": trainer.global_step,
            "fit_seconds": self.fit_seconds,
            "peak_cuda_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        }
