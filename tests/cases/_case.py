"""One method with settings that fit the toy (`tests/toy.py`) and the zoo of convolutions (`tests/zoo.py`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from common.methods import MethodSpec
from tests.toy import spec_of
from tests.zoo import zoo_spec


@dataclass(frozen=True, kw_only=True)
class Case:
    """A method with settings, and what is true of it.

    Attributes:
        toy: The spec on the toy; None leaves it out there.
        zoo: The spec on the zoo; None leaves it out there.
        per_layer: Formula of the trainable parameters, (spec, layer, role) for each target.
        total: Formula for the whole model instead, (spec, model, targets).
        mergeable: Whether it merges into the weights.
        random_start: Whether the seed decides anything.
        exact_start: Whether a fresh method changes no output bit; else up to rounding.
        starts_elsewhere: Whether a fresh method changes the outputs by design (the paper's start is not zero).
        reason: What a refusal to merge says, a pattern.
        moves_weight: Whether part of the frozen weight moves into the adapter.
        statistics: Whether it trains running statistics of norms.
        without_family: What it says of a network without a family, where it cannot do without; empty where it can.
    """

    toy: MethodSpec | None
    zoo: MethodSpec | None
    per_layer: Callable[[Any, Any, str], int] | None = None
    total: Callable[[Any, nn.Module, dict[str, str]], int] | None = None
    mergeable: bool = True
    random_start: bool = False
    exact_start: bool = True
    starts_elsewhere: bool = False
    reason: str = "no change of their weights"
    moves_weight: bool = False
    statistics: bool = False
    without_family: str = ""

    def check_start(self, output: torch.Tensor, bare: torch.Tensor) -> None:
        """Compare a fresh method's output with the bare network's, up to rounding."""
        if self.starts_elsewhere:
            assert not torch.equal(output, bare)
        else:
            torch.testing.assert_close(output, bare, atol=1e-5, rtol=1e-5)

    def count(self, spec: MethodSpec, model: nn.Module, targets: dict[str, str]) -> int:
        """Return the number of trainable parameters that the method documents, on the bare model."""
        if self.total is not None:
            return self.total(spec, model, targets)
        return sum(self.per_layer(spec, model.get_submodule(name), role) for name, role in targets.items())


def toy(method, **settings):
    """The method as it fits the toy."""
    return spec_of(method, **settings)


def zoo(method, **settings):
    """The method as it fits the zoo."""
    return zoo_spec(method, **settings)


def both(method, **facts):
    """A case of a method with the small settings of both networks."""
    return Case(toy=spec_of(method), zoo=zoo_spec(method), **facts)


def matrix(layer):
    """Outputs, and inputs a group times kernel positions."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    if isinstance(layer, nn.Embedding):
        return layer.embedding_dim, layer.num_embeddings
    return layer.out_channels, layer.in_channels // layer.groups * math.prod(layer.kernel_size)


def whole(module):
    """All parameters of a module."""
    return sum(p.numel() for p in module.parameters())
