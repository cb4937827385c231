"""Conv-Adapter as a PEFT tuner: a bottleneck of convolutions beside a frozen one (arXiv 2208.07463)."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from common.tuners._base import OwnConfig, OwnTuner, UnmergedLayer, like, per_output

CONV_ADAPTER = "CONV_ADAPTER"


@dataclass
class ConvAdapterConfig(OwnConfig):
    """Configuration of the tuner.

    Args:
        reduction: The bottleneck has the layer's input channels divided by this, and one at least.
    """

    own_type: ClassVar[str] = CONV_ADAPTER

    reduction: int = 4


class ConvAdapterLayer(UnmergedLayer):
    """y = f(x) + a * up(gelu(down(x))): f is any convolution, transposed ones too.

    `down` has f's own kernel, stride, padding and dilation, and as many groups as the bottleneck is wide (as far as
    that divides the input channels); `up` is pointwise and starts at zero; a is one number an output channel.
    """

    adapter_layer_names: tuple[str, ...] = ("cadapter_down", "cadapter_up", "cadapter_scale")

    def build(self) -> None:
        """Make the containers."""
        self.cadapter_down, self.cadapter_up = nn.ModuleDict(), nn.ModuleDict()
        self.cadapter_scale = nn.ParameterDict()

    def start(self, adapter_name: str, config: ConvAdapterConfig, key: str) -> None:
        """Add the bottleneck."""
        base = self.get_base_layer()
        if not isinstance(base, _ConvNd) or set(base._parameters) != {"weight", "bias"}:
            raise TypeError(f"'{key}' ({type(base).__name__}) is no plain convolution, which a ConvAdapter needs.")
        down = _narrow(base, max(1, base.in_channels // config.reduction))
        pointwise = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[base.weight.ndim - 3]
        up = pointwise(down.out_channels, base.out_channels, 1, bias=False, **like(base.weight))
        nn.init.zeros_(up.weight)
        self.cadapter_down[adapter_name], self.cadapter_up[adapter_name] = down, up
        self.cadapter_scale[adapter_name] = nn.Parameter(torch.ones(base.out_channels, **like(base.weight)))

    def adapted(self, adapter_name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """Add the bottleneck's output to the layer's."""
        result = self.base_layer(x, *args, **kwargs)
        down, up = self.cadapter_down[adapter_name], self.cadapter_up[adapter_name]
        scale = self.cadapter_scale[adapter_name]
        narrow = functional.gelu(down(self._cast_input_dtype(x, scale.dtype), *args, **kwargs))
        # Scaling the pointwise weight is scaling the output, and keeps no further output for the backward pass.
        weight = up.get_parameter("weight") * per_output(scale, up.get_parameter("weight"))
        return result + functional_call(up, {"weight": weight}, (narrow,)).to(result.dtype)


def _narrow(base: _ConvNd, width: int) -> _ConvNd:
    """Return a convolution of the class and geometry of `base`, with `width` outputs, grouped, without a bias."""
    down = copy.deepcopy(base)
    down.out_channels = width
    down.groups = math.gcd(base.in_channels, width)
    shape = (base.in_channels, width // down.groups) if base.transposed else (width, base.in_channels // down.groups)
    down.weight = nn.Parameter(torch.empty(*shape, *base.kernel_size, **like(base.weight)))
    down.bias = None
    down.reset_parameters()
    return down


class ConvAdapterModel(OwnTuner):
    """The tuner that PEFT builds from a `ConvAdapterConfig`."""

    prefix: str = "cadapter_"
    tuner_layer_cls = ConvAdapterLayer
