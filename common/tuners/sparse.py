"""A trained change of a few single weights of a layer, as a PEFT tuner (arXiv 2111.09839, 2312.10136, 2406.13175).

An adapter holds the positions of the chosen weights and what is added to them, so its file is as small as their number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from common.tuners._base import ExchangedLayer, Kept, OwnConfig, OwnTuner, by_output, like

SPARSE_DELTA = "SPARSE_DELTA"


@dataclass
class SparseConfig(OwnConfig):
    """Configuration of the tuner.

    Args:
        rule: How many weights of a layer with `rows` outputs and `columns` weights to each are chosen: `share` of all,
            `rank` (rows + columns), or some to each `output`. At least one, at most all.
        amount: The share, the rank, or the number to each output.
        mask: Which are chosen before any data is seen: at `random`, or the `largest` or `smallest` by magnitude.
    """

    own_type: ClassVar[str] = SPARSE_DELTA

    rule: Literal["share", "rank", "output"] = "share"
    amount: float = 0.005
    mask: Literal["random", "largest", "smallest"] = "random"


class SparseLayer(ExchangedLayer):
    """y = f(x; W + D): D holds trained values, zero at the start, at chosen positions, and zeros elsewhere."""

    few_weights: ClassVar[bool] = True  # tells the liveness probe
    adapter_layer_names: tuple[str, ...] = ("sparse_values",)
    other_param_names: tuple[str, ...] = ("sparse_indices", "rule")

    def build(self) -> None:
        """Make the containers."""
        super().build()
        self.sparse_values, self.sparse_indices = nn.ParameterDict(), Kept()
        self.rule: dict[str, tuple[str, float]] = {}

    def start(self, adapter_name: str, config: SparseConfig, key: str) -> None:
        """Choose positions and add zeros."""
        base = self.get_base_layer()
        if not isinstance(base, (nn.Linear, _ConvNd)):
            raise TypeError(f"'{key}' ({type(base).__name__}) is no linear layer and no convolution.")
        weight = self.base_parameter("weight").detach()
        self.rule[adapter_name] = (config.rule, config.amount)
        if config.mask == "random":
            scores = torch.rand(weight.shape).to(weight.device)  # drawn on the CPU, whatever the device
        else:
            scores = weight.abs() if config.mask == "largest" else -weight.abs()
        self.choose(adapter_name, scores)

    def count(self, adapter_name: str) -> int:
        """Return how many weights the adapter's rule asks for."""
        rule, amount = self.rule[adapter_name]
        rows = by_output(self.get_base_layer(), self.base_parameter("weight")).flatten(1)
        wanted = {
            "share": amount * rows.numel(),
            "rank": amount * sum(rows.shape),
            "output": len(rows) * min(amount, rows.shape[1]),
        }
        return min(max(1, round(wanted[rule])), rows.numel())

    def choose(self, adapter_name: str, scores: Tensor, count: int | None = None) -> None:
        """Choose the weights with the highest scores, and start again at zero.

        Args:
            adapter_name: The adapter.
            scores: In the weight's shape.
            count: How many of all, instead of what the adapter's rule asks for.
        """
        base = self.get_base_layer()
        if count is None and self.rule[adapter_name][0] == "output":
            positions = torch.arange(scores.numel(), device=scores.device).view(scores.shape)
            rows = by_output(base, scores).flatten(1)
            best = rows.topk(self.count(adapter_name) // len(rows), dim=1).indices
            chosen = by_output(base, positions).flatten(1).gather(1, best).flatten()
        else:
            chosen = scores.flatten().topk(count if count is not None else self.count(adapter_name)).indices
        self._place(adapter_name, chosen.sort().values)

    def _place(self, adapter_name: str, indices: Tensor) -> None:
        """Set the positions, with zeros at them; an optimizer that knows the values keeps knowing them."""
        weight = self.base_parameter("weight").detach()
        self.sparse_indices[adapter_name] = indices.to(weight.device, torch.int32)
        zeros = torch.zeros(len(indices), **like(weight))
        if adapter_name in self.sparse_values:
            self.sparse_values[adapter_name].data = zeros
        else:
            self.sparse_values[adapter_name] = nn.Parameter(zeros)

    def make_room(self, prefix: str, state: Mapping[str, Tensor]) -> None:
        """Hold as many weights as a stored adapter does: how many can depend on the data that it saw."""
        for name in self.sparse_values:
            stored = state.get(f"{prefix}sparse_indices.{name}")
            if stored is not None and stored.ndim == 1 and len(stored) != len(self.sparse_indices[name]):
                self._place(name, stored)

    def _load_from_state_dict(  # ty: ignore[incompatible-method-override]
        self,
        state_dict: Any,  # noqa: ANN401
        prefix: str,
        *args: Any,  # noqa: ANN401
    ) -> None:
        """Make room for what is stored, and refuse positions that the weight has not."""
        self.make_room(prefix, state_dict)
        numel = self.base_parameter("weight").numel()
        for name in self.sparse_values:
            stored = state_dict.get(f"{prefix}sparse_indices.{name}")
            if stored is not None and stored.numel() and not 0 <= int(stored.min()) <= int(stored.max()) < numel:
                args[-1].append(f"{prefix}sparse_indices names weights beyond the {numel} of the layer.")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def exchanged(self, adapter_name: str) -> dict[str, Tensor]:
        """Compute the changed weight."""
        values = self.sparse_values[adapter_name]
        weight = self.base_parameter("weight").to(values.dtype)
        return {"weight": weight.flatten().index_add(0, self.sparse_indices[adapter_name], values).view(weight.shape)}


class SparseModel(OwnTuner):
    """The tuner that PEFT builds from a `SparseConfig`."""

    prefix: str = "sparse_"
    tuner_layer_cls = SparseLayer
