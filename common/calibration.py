"""What a method sees of the training data before the first step: gradients or activations of the bare backbone.

The backbone runs without its adapters, in eval mode and full precision. Processes of a distributed run each see batches
of their own and share the mean, so that all set their adapters alike.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed import is_available
from torch.utils.data import DataLoader

from common.attach import Attached, recount, tuner_layers
from common.loading import first_batches
from common.methods import Calibration

Loss = Callable[[], Tensor]


def calibrate(attached: Attached, loader: DataLoader[Any], loss: Callable[[Any], Tensor], *, seed: int) -> None:
    """Show a fresh adapter what its method wants to see.

    Args:
        attached: The backbone with its method, in eval mode.
        loader: A fresh loader of training batches.
        loss: Runs the model on a batch and returns the loss.
        seed: Seed of whatever a loss draws.
    """
    prefix = "base_model.model."
    adapted = {name.removeprefix(prefix): layer for name, layer in tuner_layers(attached.model).items()}
    for spec, names in attached.plan.looks:
        wanted = spec.calibration
        if wanted is None:
            continue
        layers = {name: adapted[name] for name in names}
        bare = {name: layer.get_base_layer() for name, layer in layers.items()}
        gather = _gradients if wanted.of in ("gradient", "fisher") else _activations
        batches = first_batches(loader, wanted.batches, singly=wanted.of == "fisher")
        with torch.random.fork_rng(devices=[]), _bare(attached.model):
            torch.manual_seed(seed)
            seen = gather(bare, wanted, (functools.partial(loss, batch) for batch in batches))
        spec.calibrate(layers, {name: _shared(value) for name, value in seen.items()})
    recount(attached)


@contextlib.contextmanager
def _bare(model: nn.Module) -> Generator[None]:
    """Disable the adapters inside the block; PEFT enables them again with all their parameters trainable."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        with cast("Any", model).disable_adapter():
            yield
    finally:
        for parameter, trains in before.items():
            parameter.requires_grad_(trains)


def _gradients(layers: Mapping[str, nn.Module], wanted: Calibration, losses: Iterable[Loss]) -> dict[str, Tensor]:
    """Average the gradient of each layer's weight, or its square, over the batches."""
    weights = {name: cast("Tensor", layer.weight) for name, layer in layers.items()}
    sums = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    before = {name: weight.requires_grad for name, weight in weights.items()}
    count = 0
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        for loss in losses:
            with torch.enable_grad():
                gradients = torch.autograd.grad(loss(), list(weights.values()), allow_unused=True)
            for own, gradient in zip(sums.values(), gradients, strict=True):
                if gradient is not None:
                    own += gradient.float().square() if wanted.of == "fisher" else gradient.float()
            count += 1
    finally:
        for name, weight in weights.items():
            weight.requires_grad_(before[name])
    return {name: own / max(1, count) for name, own in sums.items()}


def _activations(layers: Mapping[str, nn.Module], wanted: Calibration, losses: Iterable[Loss]) -> dict[str, Tensor]:
    """Average the squares of each layer's output channels, or the products of its inputs, over all positions."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def note(name: str, inputs: tuple[Any, ...], output: Tensor) -> None:
        layer = layers[name]
        if wanted.of == "input_moment":
            rows = inputs[0].detach().float().flatten(0, -2)
            value = rows.T @ rows
        else:
            channels = output.detach().float()
            rows = (channels if isinstance(layer, nn.Linear) else channels.movedim(1, -1)).flatten(0, -2)
            value = rows.square().sum(dim=0)
        sums[name] = sums[name] + value if name in sums else value
        counts[name] = counts.get(name, 0) + len(rows)

    with contextlib.ExitStack() as stack:
        for name, layer in layers.items():
            hook = layer.register_forward_hook(lambda _, inputs, output, name=name: note(name, inputs, output))
            stack.callback(hook.remove)
        with torch.no_grad():
            for loss in losses:
                loss()
    return {name: sums[name] / counts[name] for name in layers}


def _shared(value: Tensor) -> Tensor:
    """Return the mean over the processes of a distributed run."""
    if is_available():
        from torch.distributed import all_reduce, get_world_size, is_initialized

        if is_initialized():
            all_reduce(value)
            value = value / get_world_size()
    return value
