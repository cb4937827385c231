"""RepAdapter: a linear bottleneck before a layer, folded into its weight, as a PEFT tuner (arXiv 2302.08106)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from common.tuners._base import ExchangedLayer, OwnConfig, OwnTuner, by_output, like

REP_ADAPTER = "REP_ADAPTER"


@dataclass
class RepAdapterConfig(OwnConfig):
    """Configuration of the tuner.

    Args:
        width: Width w of the bottleneck.
        groups: Groups g of its second map, which divides the width and the layers' inputs.
        scale: The factor s.
    """

    own_type: ClassVar[str] = REP_ADAPTER

    width: int = 8
    groups: int = 2
    scale: float = 1.0


class RepAdapterLayer(ExchangedLayer):
    """y = f(x + s (U (D x + b) + c)), computed as f with the weight W + s (W U) D and the bias W s (U b + c) + bias.

    D is (w, C), U (C, w / g) in g groups, zero at the start. b and c are there where the layer has a bias and sees one
    position at a time: at an image's border, a wider kernel reads padding, to which they were not added.
    """

    adapter_layer_names: tuple[str, ...] = (
        "repadapter_down",
        "repadapter_up",
        "repadapter_down_bias",
        "repadapter_up_bias",
    )
    other_param_names: tuple[str, ...] = ("scaling",)

    def build(self) -> None:
        """Make the containers."""
        super().build()
        self.repadapter_down, self.repadapter_up = nn.ParameterDict(), nn.ParameterDict()
        self.repadapter_down_bias, self.repadapter_up_bias = nn.ParameterDict(), nn.ParameterDict()
        self.scaling: dict[str, float] = {}

    def start(self, adapter_name: str, config: RepAdapterConfig, key: str) -> None:
        """Add the bottleneck."""
        base = self.get_base_layer()
        if not isinstance(base, (nn.Linear, _ConvNd)) or getattr(base, "groups", 1) != 1:
            raise TypeError(f"'{key}' ({type(base).__name__}) is no linear layer and no convolution of one group.")
        weight = self.base_parameter("weight").detach()
        channels, width, groups = by_output(base, weight).shape[1], config.width, config.groups
        if channels % groups or width % groups:
            raise ValueError(f"'{key}' has {channels} inputs, the bottleneck {width}; {groups} does not divide both.")
        down = torch.empty(width, channels, **like(weight))
        nn.init.xavier_uniform_(down)
        self.scaling[adapter_name] = config.scale
        self.repadapter_down[adapter_name] = nn.Parameter(down)
        self.repadapter_up[adapter_name] = nn.Parameter(torch.zeros(channels, width // groups, **like(weight)))
        if has_biases(base):
            self.repadapter_down_bias[adapter_name] = nn.Parameter(torch.zeros(width, **like(weight)))
            self.repadapter_up_bias[adapter_name] = nn.Parameter(torch.zeros(channels, **like(weight)))

    def exchanged(self, adapter_name: str) -> dict[str, Tensor]:
        """Compute the weight and the bias with the bottleneck folded in."""
        base = self.get_base_layer()
        scale, down, up = (
            self.scaling[adapter_name],
            self.repadapter_down[adapter_name],
            self.repadapter_up[adapter_name],
        )
        rows = by_output(base, self.base_parameter("weight").to(down.dtype)).movedim(1, -1)  # (out, *kernel, C)
        groups = len(down) // up.shape[1]
        grouped = up.unflatten(0, (groups, -1))  # (g, C / g, w / g)
        narrow = torch.einsum("...gc,gcw->...gw", rows.unflatten(-1, (groups, -1)), grouped).flatten(-2)
        weight = rows + scale * (narrow @ down)
        # Strides as the layer's own: torch chooses its kernels by them too, and a kernel of 1 leaves them open.
        own = {"weight": by_output(base, weight.movedim(-1, 1)).clone(memory_format=torch.contiguous_format)}
        if adapter_name in self.repadapter_up_bias:
            before = torch.einsum("gcw,gw->gc", grouped, self.repadapter_down_bias[adapter_name].view(groups, -1))
            shift = scale * (before.flatten() + self.repadapter_up_bias[adapter_name])
            own["bias"] = self.base_parameter("bias").to(down.dtype) + rows.flatten(1) @ shift
        return own


def has_biases(layer: nn.Module) -> bool:
    """Whether a bottleneck before this layer may have biases, so that it still folds into weight and bias."""
    if getattr(layer, "bias", None) is None:
        return False
    if not isinstance(layer, _ConvNd):
        return True
    padding = (layer.padding,) if isinstance(layer.padding, str) else layer.padding
    return {*layer.kernel_size, *layer.stride} == {1} and set(padding) <= {0, "valid"} and not any(layer.output_padding)


class RepAdapterModel(OwnTuner):
    """The tuner that PEFT builds from a `RepAdapterConfig`."""

    prefix: str = "repadapter_"
    tuner_layer_cls = RepAdapterLayer
