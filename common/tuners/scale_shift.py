"""Scaling and shifting a layer's output, in its own weight and bias, as a PEFT tuner (SSF, arXiv 2210.08823).

Also IA3 (arXiv 2205.05638) on layers that PEFT's tuner refuses: scales without shifts, of outputs or inputs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from common.tuners._base import ExchangedLayer, OwnConfig, OwnTuner, by_output, like, per_output

SCALE_SHIFT = "SCALE_SHIFT"


@dataclass
class ScaleShiftConfig(OwnConfig):
    """Configuration of the tuner.

    Args:
        shift: Also shift the output of every layer that has a bias.
        inputs: Pattern (matched in full) of linear and convolution layers that are scaled at their input instead.
    """

    own_type: ClassVar[str] = SCALE_SHIFT

    shift: bool = True
    inputs: str | None = None


class ScaleShiftLayer(ExchangedLayer):
    """y = g f(x; W, b) + h, computed as f(x; g W, g b + h): g = 1 and h = 0 at the start.

    g and h have one number an output channel of a linear or convolution layer, and one a weight of a norm.
    """

    adapter_layer_names: tuple[str, ...] = ("sshift_scale", "sshift_shift")
    other_param_names: tuple[str, ...] = ("at_input",)

    def build(self) -> None:
        """Make the containers."""
        super().build()
        self.sshift_scale, self.sshift_shift = nn.ParameterDict(), nn.ParameterDict()
        self.at_input: dict[str, bool] = {}

    def start(self, adapter_name: str, config: ScaleShiftConfig, key: str) -> None:
        """Add scales of one, and shifts of zero where the layer has a bias."""
        base = self.get_base_layer()
        weight = self.base_parameter("weight").detach()
        self.at_input[adapter_name] = config.inputs is not None and re.fullmatch(config.inputs, key) is not None
        shape: tuple[int, ...] = weight.shape
        if isinstance(base, (nn.Linear, _ConvNd)):
            rows = by_output(base, weight)
            shape = (rows.shape[1] * getattr(base, "groups", 1),) if self.at_input[adapter_name] else (len(rows),)
        self.sshift_scale[adapter_name] = nn.Parameter(torch.ones(shape, **like(weight)))
        if config.shift and getattr(base, "bias", None) is not None:
            self.sshift_shift[adapter_name] = nn.Parameter(torch.zeros(shape, **like(weight)))

    def exchanged(self, adapter_name: str) -> dict[str, Tensor]:
        """Compute the scaled weight and the scaled, shifted bias."""
        base = self.get_base_layer()
        scale = self.sshift_scale[adapter_name]
        weight = self.base_parameter("weight").to(scale.dtype)
        if self.at_input[adapter_name]:
            grouped = by_output(base, weight).unflatten(0, (getattr(base, "groups", 1), -1))  # (groups, out, in, *k)
            scale = scale.view(len(grouped), 1, -1, *(1,) * (weight.ndim - 2))
            return {"weight": by_output(base, (grouped * scale).flatten(0, 1))}
        rows = by_output(base, weight)
        whole = scale.shape == weight.shape  # a norm's
        own = {"weight": by_output(base, rows * (scale if whole else per_output(scale, rows)))}
        bias = getattr(base, "bias", None)
        if bias is not None:
            own["bias"] = bias.to(scale.dtype) * scale
            if adapter_name in self.sshift_shift:
                own["bias"] = own["bias"] + self.sshift_shift[adapter_name]
        return own


class ScaleShiftModel(OwnTuner):
    """The tuner that PEFT builds from a `ScaleShiftConfig`."""

    prefix: str = "sshift_"
    tuner_layer_cls = ScaleShiftLayer
