"""Conv-LoRA: convolutions at several scales within LoRA's bottleneck, as a PEFT tuner (arXiv 2401.17868)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.tuners._base import OwnConfig, OwnTuner, UnmergedLayer, like
from common.tuners._shared import centre_identity, join_grid, split_grid

CONV_LORA = "CONV_LORA"

_CONVOLVE = (functional.conv1d, functional.conv2d, functional.conv3d)
_MODES = ("linear", "bilinear", "trilinear")


@dataclass
class ConvLoraConfig(OwnConfig):
    """Configuration of the tuner.

    Args:
        r: Rank of the bottleneck.
        scale: The factor s.
        experts: Number n of convolutions; the i-th sees the map i times as large.
        grids: Name of the layer to [prefix tokens, positions along each axis ...]; zeros where tokens keep these axes.
    """

    own_type: ClassVar[str] = CONV_LORA

    r: int = 3
    scale: float = 1.0
    experts: int = 8
    grids: dict[str, list[int]] = field(default_factory=dict)


class ConvLoraLayer(UnmergedLayer):
    """y = f(x) + s B sum_i g_i E_i(A x): E_i enlarges the map of tokens i times, convolves it and makes it small again.

    The gates g = softmax(G mean(A x)) weigh the experts for each image. B starts at zero, each convolution as the
    identity. Prefix tokens, which lie in no map, go past the experts.
    """

    adapter_layer_names: tuple[str, ...] = (
        "convlora_A",
        "convlora_B",
        "convlora_gate",
        "convlora_kernel",
        "convlora_bias",
    )
    other_param_names: tuple[str, ...] = ("scaling", "grids")

    def build(self) -> None:
        """Make the containers."""
        self.convlora_A, self.convlora_B, self.convlora_gate = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.convlora_kernel, self.convlora_bias = nn.ParameterDict(), nn.ParameterDict()
        self.scaling: dict[str, float] = {}
        self.grids: dict[str, list[int]] = {}

    def start(self, adapter_name: str, config: ConvLoraConfig, key: str) -> None:
        """Add the bottleneck and its experts."""
        base = self.get_base_layer()
        if not isinstance(base, nn.Linear):
            raise TypeError(f"'{key}' ({type(base).__name__}) is no linear layer.")
        options, rank, axes = like(base.weight), config.r, len(config.grids[key]) - 1
        up = nn.Linear(rank, base.out_features, bias=False, **options)
        nn.init.zeros_(up.weight)
        kernel = torch.empty(config.experts, rank, rank, *(3,) * axes, **options)
        centre_identity(kernel, axes)
        self.convlora_A[adapter_name] = nn.Linear(base.in_features, rank, bias=False, **options)
        self.convlora_B[adapter_name] = up
        self.convlora_gate[adapter_name] = nn.Linear(rank, config.experts, **options)
        self.convlora_kernel[adapter_name] = nn.Parameter(kernel)
        self.convlora_bias[adapter_name] = nn.Parameter(torch.zeros(config.experts, rank, **options))
        self.scaling[adapter_name], self.grids[adapter_name] = config.scale, config.grids[key]

    def adapted(self, adapter_name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """Add the bottleneck's output to the layer's."""
        result = self.base_layer(x, *args, **kwargs)
        down: Any = self.convlora_A[adapter_name]
        narrow = down(self._cast_input_dtype(x, down.weight.dtype))
        first, maps = split_grid(narrow, self.grids[adapter_name])
        mixed = join_grid(first, self._experts(adapter_name, maps).to(first.dtype), self.grids[adapter_name])
        return result + (self.scaling[adapter_name] * self.convlora_B[adapter_name](mixed)).to(result.dtype)

    def _experts(self, adapter_name: str, maps: Tensor) -> Tensor:
        """Mix what the experts make of the maps (B, r, *sides), in full precision under autocast too."""
        kernels, biases = self.convlora_kernel[adapter_name], self.convlora_bias[adapter_name]
        axes = maps.ndim - 2
        with torch.autocast(maps.device.type, enabled=False):
            maps = maps.to(kernels.dtype)
            gates = self.convlora_gate[adapter_name](maps.flatten(2).mean(dim=2)).softmax(dim=1)  # (B, n)
            mixed = torch.zeros_like(maps)
            for i, (kernel, bias) in enumerate(zip(kernels, biases, strict=True)):
                seen = _resize(maps, [(i + 1) * side for side in maps.shape[2:]])
                seen = _resize(_CONVOLVE[axes - 1](seen, kernel, bias, padding=1), maps.shape[2:])
                mixed = mixed + gates[:, i].view(-1, *(1,) * (axes + 1)) * seen
        return mixed


def _resize(maps: Tensor, sides: Any) -> Tensor:  # noqa: ANN401
    if list(sides) == list(maps.shape[2:]):
        return maps
    return functional.interpolate(maps, size=list(sides), mode=_MODES[maps.ndim - 3])


class ConvLoraModel(OwnTuner):
    """The tuner that PEFT builds from a `ConvLoraConfig`."""

    prefix: str = "convlora_"
    tuner_layer_cls = ConvLoraLayer
