"""LoRA whose change each example scales by gates of its own, as a PEFT tuner (in UniPELT, arXiv 2110.07577)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from common.tuners._base import OwnConfig, OwnLayer, OwnTuner, like
from common.tuners._gate import TokenGate
from common.tuners._shared import Passage

GATED_LORA = "GATED_LORA"


@dataclass
class GatedLoraConfig(OwnConfig):
    """Configuration of the tuner.

    Args:
        r: Rank; a layer whose matrix has a smaller side takes that.
        thirds: Full names of layers of whose outputs only some thirds are changed, each by an A, a B and a gate of its
            own, to these thirds: 0, 1, 2.
    """

    own_type: ClassVar[str] = GATED_LORA

    r: int = 8
    thirds: dict[str, list[int]] = field(default_factory=dict)


class GatedLoraLayer(OwnLayer):
    """y = W x + g(x) B A x, with A (rank, in) and B (out, rank) and g one number an example (see `TokenGate`).

    Where only p thirds of the outputs are changed, A is (p rank, in) and B (p out / 3, rank), each third's below the
    one before, and g has p numbers. `passages` may say which tokens are padding.
    """

    adapter_layer_names: tuple[str, ...] = ("gatelora_A", "gatelora_B", "gatelora_gate")
    other_param_names: tuple[str, ...] = ("thirds", "passages")

    def build(self) -> None:
        """Make the containers."""
        self.gatelora_A, self.gatelora_B = nn.ParameterDict(), nn.ParameterDict()
        self.gatelora_gate = nn.ModuleDict()
        self.thirds: dict[str, tuple[int, ...]] = {}
        self.passages: dict[str, Passage] = {}

    def start(self, adapter_name: str, config: GatedLoraConfig, key: str) -> None:
        """Add A, B = 0 and the gates."""
        base = self.get_base_layer()
        if not isinstance(base, nn.Linear):
            raise TypeError(
                f"'{key}' ({type(base).__name__}) is no linear layer; a gate averages over tokens, which others have "
                "not."
            )
        thirds = tuple(config.thirds.get(key, ()))
        parts = len(thirds) or 1
        rows = base.out_features // 3 if thirds else base.out_features
        rank = min(config.r, rows, base.in_features)
        kind = like(base.weight)
        down = torch.empty(parts * rank, base.in_features, **kind)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        self.gatelora_A[adapter_name] = nn.Parameter(down)
        self.gatelora_B[adapter_name] = nn.Parameter(torch.zeros(parts * rows, rank, **kind))
        self.gatelora_gate[adapter_name] = TokenGate(base.in_features, parts, base.weight)
        self.thirds[adapter_name] = thirds

    def adapted(self, adapter_name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """Add the gated change to the layer's output."""
        result = self.base_layer(x, *args, **kwargs)
        down, up = self.gatelora_A[adapter_name], self.gatelora_B[adapter_name]
        passage = self.passages.get(adapter_name)
        tokens = self._cast_input_dtype(x, down.dtype)
        gates: Tensor = self.gatelora_gate[adapter_name](tokens, None if passage is None else passage.look())
        parts = gates.shape[-1]
        narrow = nn.functional.linear(tokens, down).unflatten(-1, (parts, -1))  # (B, ..., parts, rank)
        added = torch.einsum("...pr,por->...po", narrow, up.unflatten(0, (parts, -1)))
        added = (gates.unsqueeze(-1) * added).to(result.dtype)
        thirds = self.thirds[adapter_name]
        if not thirds:
            return result + added.flatten(-2)
        places = torch.tensor(thirds, device=result.device)
        return result.unflatten(-1, (3, -1)).index_add(-2, places, added).flatten(-2)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Refuse: what an example's gates scale is another change for each."""
        raise NotImplementedError(
            "its gates scale the change of each layer by the example that it reads, so that it is no change of their "
            "weights; use the adapter as it is"
        )

    def unmerge(self) -> None:
        """Do nothing: it is never merged."""


class GatedLoraModel(OwnTuner):
    """The tuner that PEFT builds from a `GatedLoraConfig`."""

    prefix: str = "gatelora_"
    tuner_layer_cls = GatedLoraLayer
