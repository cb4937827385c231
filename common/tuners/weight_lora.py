"""LoRA and DoRA in weight space, as a PEFT tuner: right on every convolution (arXiv 2106.09685, 2402.09353).

The layer runs once, with the weight W + s B A. PEFT's tuner runs a second, narrow convolution beside the layer
instead, which it builds without dilation and padding mode, cannot merge for some kernels and groups, and has not for
transposed convolutions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from common.tuners._base import ExchangedLayer, OwnConfig, OwnTuner, by_output, like, per_output

WEIGHT_LORA = "WEIGHT_LORA"


@dataclass
class WeightLoraConfig(OwnConfig):
    """Configuration of the tuner.

    Args:
        r: Rank; a layer whose matrix has a smaller side takes that.
        scale: The factor s of the change.
        dora: Train the magnitude of each output's weights apart from their direction.
        init: Start of A: `default` (Kaiming uniform) or `gaussian` (standard deviation 1 / rank). B starts at zero.
        thirds: Full names of layers of whose outputs only some thirds are changed, each by an A and B of its own, to
            these thirds: 0, 1, 2.
    """

    own_type: ClassVar[str] = WEIGHT_LORA

    r: int = 8
    scale: float = 1.0
    dora: bool = False
    init: str = "default"
    thirds: dict[str, list[int]] = field(default_factory=dict)


def matrix_shape(layer: nn.Module) -> tuple[int, int]:
    """Return (outputs, inputs / groups * kernel positions) of a layer's weight read as a matrix."""
    weight: Tensor = layer.weight  # ty: ignore[invalid-assignment]  (a parameter, or computed from one)
    outputs, *inputs = by_output(layer, weight.detach()).shape
    return outputs, math.prod(inputs)


class WeightLoraLayer(ExchangedLayer):
    """y = f(x; W + s B A): A (rank, columns), B (rows, rank), both of the weight read as a matrix (rows, columns).

    With `dora` the weight is m (W + s B A) / |W + s B A| with one magnitude m an output and the norm taken as a
    constant in the backward pass. Where only p thirds of the rows are changed, A is (p rank, columns) and B (p rows /
    3, rank), each third's below the one before, and m has one number a changed row.
    """

    adapter_layer_names: tuple[str, ...] = ("wlora_A", "wlora_B", "wlora_magnitude")
    other_param_names: tuple[str, ...] = ("scaling", "thirds")

    def build(self) -> None:
        """Make the containers."""
        super().build()
        self.wlora_A, self.wlora_B, self.wlora_magnitude = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        self.scaling: dict[str, float] = {}
        self.thirds: dict[str, tuple[int, ...]] = {}

    def start(self, adapter_name: str, config: WeightLoraConfig, key: str) -> None:
        """Add A, B = 0 and, with `dora`, the weight's own magnitudes."""
        base = self.get_base_layer()
        weight = self.base_parameter("weight").detach()
        rows, columns = matrix_shape(base)
        self.scaling[adapter_name], self.thirds[adapter_name] = config.scale, tuple(config.thirds.get(key, ()))
        parts = len(self.thirds[adapter_name]) or 1
        rows = rows // 3 * parts if self.thirds[adapter_name] else rows
        rank = min(config.r, rows // parts, columns)
        down = torch.empty(parts * rank, columns, **like(weight))
        if config.init == "gaussian":
            nn.init.normal_(down, std=1 / rank)
        else:
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        self.wlora_A[adapter_name] = nn.Parameter(down)
        self.wlora_B[adapter_name] = nn.Parameter(torch.zeros(rows, rank, **like(weight)))
        if config.dora:
            own = self._changed_rows(adapter_name, by_output(base, weight.to(down.dtype)).flatten(1))
            self.wlora_magnitude[adapter_name] = nn.Parameter(_norm(own))

    def exchanged(self, adapter_name: str) -> dict[str, Tensor]:
        """Compute the changed weight."""
        base = self.get_base_layer()
        down, up = self.wlora_A[adapter_name], self.wlora_B[adapter_name]
        rows = by_output(base, self.base_parameter("weight").to(down.dtype))
        parts = len(down) // up.shape[1]
        stacked = (
            part.unflatten(0, (parts, -1)) for part in (self._changed_rows(adapter_name, rows.flatten(1)), up, down)
        )
        weight = torch.baddbmm(*stacked, alpha=self.scaling[adapter_name]).flatten(0, 1)
        if adapter_name in self.wlora_magnitude:
            share = self.wlora_magnitude[adapter_name] / _norm(weight.detach())
            weight = weight * per_output(share, weight)
        if thirds := self.thirds[adapter_name]:
            places = torch.tensor(thirds, device=weight.device)
            whole = rows.flatten(1).unflatten(0, (3, -1))
            weight = whole.index_copy(0, places, weight.unflatten(0, (parts, -1)))
        return {"weight": by_output(base, weight.reshape(rows.shape))}

    def _changed_rows(self, adapter_name: str, rows: Tensor) -> Tensor:
        """Return those rows of the weight, read as a matrix, that an adapter changes."""
        thirds = self.thirds[adapter_name]
        return rows.unflatten(0, (3, -1))[list(thirds)].flatten(0, 1) if thirds else rows


def _norm(weight: Tensor) -> Tensor:
    """Return the length of each output's weights; an output of zeros gets a tiny one, so that 0 / 0 cannot arise."""
    return weight.flatten(1).norm(dim=1).clamp_min(torch.finfo(weight.dtype).tiny)


class WeightLoraModel(OwnTuner):
    """The tuner that PEFT builds from a `WeightLoraConfig`."""

    prefix: str = "wlora_"
    tuner_layer_cls = WeightLoraLayer
