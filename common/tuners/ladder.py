"""A ladder side network beside frozen blocks, as a PEFT tuner (LST, arXiv 2206.06522)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional

from common.tuners._base import OwnTuner
from common.tuners._shared import Passage, zero
from common.tuners.behind_block import BlockConfig, BlockLayer, hidden_state, with_hidden_state

LADDER = "LADDER"


@dataclass
class LadderConfig(BlockConfig):
    """Configuration of the tuner.

    Args:
        previous: Name of each block to the one below it on its ladder, or None for the first.
        temperature: The gates' temperature T.
    """

    own_type: ClassVar[str] = LADDER

    previous: dict[str, str | None] = field(default_factory=dict)
    temperature: float = 0.1


class LadderLayer(BlockLayer):
    """A block whose output, cut off from its graph, feeds one step of the side network; the last adds its result.

    A step mixes down(f) into the state before it, by a gate but in the first, and runs a feed-forward network of four
    times the width. In the last block `up` leads back.
    """

    where: ClassVar[str] = "beside"
    adapter_layer_names: tuple[str, ...] = (
        "ladder_down",
        "ladder_gate",
        "ladder_norm",
        "ladder_wide",
        "ladder_narrow",
        "ladder_up",
    )
    other_param_names: tuple[str, ...] = ("temperature", "before")

    def build(self) -> None:
        """Make the containers."""
        self.ladder_down, self.ladder_up, self.ladder_norm = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.ladder_wide, self.ladder_narrow = nn.ModuleDict(), nn.ModuleDict()
        self.ladder_gate = nn.ParameterDict()
        self.temperature: dict[str, float] = {}
        self.before: dict[str, Passage | None] = {}
        self.passage = Passage()

    def start(self, adapter_name: str, config: LadderConfig, key: str) -> None:
        """Add this block's step; `connect` says where the state before it is found."""
        channels, width, options = config.channels[key], config.width, self.like_block()
        down, narrow = nn.Linear(channels, width, **options), nn.Linear(4 * width, width, **options)
        # All states are zero at the start, yet each `down` gets a gradient, which a zero `up` would not let through.
        zero(down)
        zero(narrow)
        self.ladder_down[adapter_name], self.ladder_narrow[adapter_name] = down, narrow
        self.ladder_norm[adapter_name] = nn.LayerNorm(width, **options)
        self.ladder_wide[adapter_name] = nn.Linear(width, 4 * width, **options)
        if config.previous[key] is not None:
            self.ladder_gate[adapter_name] = nn.Parameter(torch.zeros((), **options))
        if key not in config.previous.values():
            up = nn.Linear(width, channels, **options)
            nn.init.zeros_(up.bias)
            self.ladder_up[adapter_name] = up
        self.temperature[adapter_name] = config.temperature

    def connect(self, adapter_name: str, below: LadderLayer | None) -> None:
        """Find the state of the step before."""
        self.before[adapter_name] = None if below is None else below.passage

    def adapted(self, adapter_name: str, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Run the block, then its step beside it."""
        output = self.base_layer(*args, **kwargs)
        hidden, before = hidden_state(output), self.before[adapter_name]
        side = self.ladder_down[adapter_name](hidden.detach().to(self.dtype_of(adapter_name)))
        if before is not None:
            state = before.take()
            if state is None:
                raise RuntimeError("A block ran without the one before it; a ladder needs every block, in order.")
            share = torch.sigmoid(self.ladder_gate[adapter_name] / self.temperature[adapter_name])
            side = share * side + (1 - share) * state
        wide = functional.gelu(self.ladder_wide[adapter_name](self.ladder_norm[adapter_name](side)))
        side = side + self.ladder_narrow[adapter_name](wide)
        if adapter_name in self.ladder_up:
            return with_hidden_state(output, hidden + self.ladder_up[adapter_name](side).to(hidden.dtype))
        self.passage.leave(side)
        return output


class LadderModel(OwnTuner):
    """The tuner that PEFT builds from a `LadderConfig`."""

    prefix: str = "ladder_"
    tuner_layer_cls = LadderLayer

    def join(self, layer: LadderLayer, adapter_name: str, config: LadderConfig, key: str) -> None:
        """Let a block's side step read that of the block before it."""
        below = config.previous[key]
        found = None if below is None else self.model.get_submodule(below)
        if not isinstance(found, LadderLayer | None):
            raise TypeError(f"'{below}' is no block before '{key}'.")
        layer.connect(adapter_name, found)
