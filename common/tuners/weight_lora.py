"""LoRA and DoRA in weight space, as a PEFT tuner: right on every convolution (arXiv 2106.09685, 2402.09353).

The layer runs once, with the weight W + s B A. PEFT's tuner runs a second, narrow convolution beside the layer
instead, which it builds without dilation and padding mode, cannot merge for some kernels and groups, and has not for
transposed convolutions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
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
    """

    own_type: ClassVar[str] = WEIGHT_LORA

    r: int = 8
    scale: float = 1.0
    dora: bool = False
    init: str = "default"


def matrix_shape(layer: nn.Module) -> tuple[int, int]:
    """Return (outputs, inputs / groups * kernel positions) of a layer's weight read as a matrix."""
    weight: Tensor = layer.weight  # ty: ignore[invalid-assignment]  (a parameter, or computed from one)
    outputs, *inputs = by_output(layer, weight.detach()).shape
    return outputs, math.prod(inputs)


class WeightLoraLayer(ExchangedLayer):
    """y = f(x; W + s B A): A (rank, columns), B (rows, rank), both of the weight read as a matrix (rows, columns).

    With `dora` the weight is m (W + s B A) / |W + s B A| with one magnitude m an output and the norm taken as a
    constant in the backward pass.
    """

    adapter_layer_names: tuple[str, ...] = ("wlora_A", "wlora_B", "wlora_magnitude")
    other_param_names: tuple[str, ...] = ("scaling",)

    def build(self) -> None:
        """Make the containers."""
        super().build()
        self.wlora_A, self.wlora_B, self.wlora_magnitude = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        self.scaling: dict[str, float] = {}

    def start(self, adapter_name: str, config: WeightLoraConfig, key: str) -> None:
        """Add A, B = 0 and, with `dora`, the weight's own magnitudes."""
        base = self.get_base_layer()
        weight = self.base_parameter("weight").detach()
        rows, columns = matrix_shape(base)
        rank = min(config.r, rows, columns)
        down = torch.empty(rank, columns, **like(weight))
        if config.init == "gaussian":
            nn.init.normal_(down, std=1 / rank)
        else:
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        self.scaling[adapter_name] = config.scale
        self.wlora_A[adapter_name] = nn.Parameter(down)
        self.wlora_B[adapter_name] = nn.Parameter(torch.zeros(rows, rank, **like(weight)))
        if config.dora:
            self.wlora_magnitude[adapter_name] = nn.Parameter(_norm(by_output(base, weight.to(down.dtype))))

    def exchanged(self, adapter_name: str) -> dict[str, Tensor]:
        """Compute the changed weight."""
        base = self.get_base_layer()
        down, up = self.wlora_A[adapter_name], self.wlora_B[adapter_name]
        rows = by_output(base, self.base_parameter("weight").to(down.dtype))
        weight = torch.addmm(rows.flatten(1), up, down, alpha=self.scaling[adapter_name]).view(rows.shape)
        if adapter_name in self.wlora_magnitude:
            share = self.wlora_magnitude[adapter_name] / _norm(weight.detach())
            weight = weight * per_output(share, weight)
        return {"weight": by_output(base, weight)}


def _norm(weight: Tensor) -> Tensor:
    """Return the length of each output's weights; an output of zeros gets a tiny one, so that 0 / 0 cannot arise."""
    return weight.flatten(1).norm(dim=1).clamp_min(torch.finfo(weight.dtype).tiny)


class WeightLoraModel(OwnTuner):
    """The tuner that PEFT builds from a `WeightLoraConfig`."""

    prefix: str = "wlora_"
    tuner_layer_cls = WeightLoraLayer
