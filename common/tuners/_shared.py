"""Small pieces that several tuners are made of: layers at one position, activations, notes from layer to layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from common.tuners._base import like

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"gelu": functional.gelu, "relu": functional.relu}


def check_activation(name: str) -> None:
    """Refuse an activation that there is not."""
    if name not in ACTIVATIONS:
        raise ValueError(f"The activation is '{name}'; give one of {', '.join(ACTIVATIONS)}.")


def pointwise(base: nn.Module, inputs: int, outputs: int) -> nn.Linear | _ConvNd:
    """Return a layer over the channels of what another layer reads or puts out, at each position alone.

    Args:
        base: A linear layer, an embedding or a convolution, which gets a convolution.
        inputs: Channels that the new layer reads.
        outputs: Channels that it puts out.
    """
    if not isinstance(base, (nn.Linear, nn.Embedding, _ConvNd)):
        raise TypeError(f"{type(base).__name__} is no linear layer, no embedding and no convolution.")
    if not isinstance(base, _ConvNd):
        return nn.Linear(inputs, outputs, **like(base.weight))
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[base.weight.ndim - 3]
    return kind(inputs, outputs, 1, **like(base.weight))


def zero(layer: nn.Module) -> None:
    """Let a layer start with zeros."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def split_grid(tokens: Tensor, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Part tokens into those before the grid and a map of the others.

    Args:
        tokens: (B, N, C), or (B, *sides, C) where the grid's sides are zeros.
        grid: Number of prefix tokens, then positions along each axis.

    Returns:
        Prefix tokens (B, P, C) and the map (B, C, *sides).

    Raises:
        ValueError: The tokens do not fill the grid.
    """
    prefix, *sides = grid
    if not any(sides):
        return tokens.flatten(1, -2)[:, :0], tokens.movedim(-1, 1)
    if tokens.shape[1] != prefix + math.prod(sides):
        raise ValueError(
            f"A layer reads {tokens.shape[1]} tokens, and its grid has {prefix} + {' x '.join(map(str, sides))}; "
            "give images of the size that the backbone was built for."
        )
    return tokens[:, :prefix], tokens[:, prefix:].mT.unflatten(2, sides)


def join_grid(first: Tensor, maps: Tensor, grid: Sequence[int]) -> Tensor:
    """Put the tokens that `split_grid` parted together again."""
    if not any(grid[1:]):
        return maps.movedim(1, -1)
    tokens = maps.flatten(2).mT
    return torch.cat((first, tokens), dim=1) if grid[0] else tokens


def centre_identity(kernel: Tensor, axes: int) -> None:
    """Fill a kernel (..., C, C, 3, ...) over so many axes with what hands each channel on as it is."""
    with torch.no_grad():
        kernel.zero_()
        kernel[(..., *(1,) * axes)] = torch.eye(kernel.shape[-1 - axes], dtype=kernel.dtype, device=kernel.device)


class Passage:
    """A place where one layer leaves a tensor for a later layer of the same forward pass; copies of it are empty."""

    def __init__(self) -> None:
        self._left: Tensor | None = None

    def leave(self, tensor: Tensor) -> None:
        """Leave a tensor; one that nobody took is forgotten."""
        self._left = tensor

    def look(self) -> Tensor:
        """Return what was left, and leave it for others to look at.

        Raises:
            RuntimeError: Nothing was left.
        """
        if self._left is None:
            raise RuntimeError("A layer ran without the one that leaves a tensor for it.")
        return self._left

    def take(self) -> Tensor | None:
        """Return what was left and empty the place; None where nothing was."""
        left, self._left = self._left, None
        return left

    def __deepcopy__(self, memo: dict[int, Any]) -> Passage:
        return Passage()

    def __reduce__(self) -> tuple[type[Passage], tuple[()]]:
        return Passage, ()
