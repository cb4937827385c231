"""A specimen: a tiny random network of one kind, on which every method is tried."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from common.roles import Family


@dataclass(frozen=True, kw_only=True)
class Specimen:
    """A bare network with random weights, and how it is run.

    A domain names functions that return one (`Domain.specimens`). Each call builds a new one with the same weights.

    Attributes:
        name: Name of the network, for messages.
        model: The bare network, in eval mode.
        family: Its family of roles.
        inputs: Example inputs, as `run` takes them.
        run: Runs a model, bare or with adapters, on `inputs` and returns floats of any shape; in eval mode it draws no
            random number.
        engine: How many of the 45 tuner types of peft 0.21.2 train, save, reload and merge exactly on a network of
            this kind without Graft; None where that was not measured.
    """

    name: str
    model: nn.Module
    family: Family
    inputs: Any
    run: Callable[[Any, Any], Tensor]
    engine: int | None = None


Build = Callable[[], Specimen]
Columns = Mapping[str, Build]
