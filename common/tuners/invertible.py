"""Invertible adapters behind embeddings, as a PEFT tuner (MAD-X, arXiv 2005.00052)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from common.tuners._base import OwnConfig, OwnTuner, UnmergedLayer
from common.tuners._shared import pointwise, zero

INVERTIBLE_ADAPTER = "INVERTIBLE_ADAPTER"


@dataclass
class InvertibleConfig(OwnConfig):
    """Configuration of the tuner.

    Args:
        reduction: By how much the bottlenecks are narrower than half of the layer's outputs.
    """

    own_type: ClassVar[str] = INVERTIBLE_ADAPTER

    reduction: int = 2


class InvertibleLayer(UnmergedLayer):
    """(o1, o2) = (h1 + F(h2), h2 + G(o1)), with h1 and h2 the two halves of h = f(x) along its channels.

    F and G are bottlenecks up(relu(down(.))) at each position, with biases; `up` starts at zero.
    """

    where: ClassVar[str] = "behind"
    adapter_layer_names: tuple[str, ...] = (
        "invertible_f_down",
        "invertible_f_up",
        "invertible_g_down",
        "invertible_g_up",
    )

    def build(self) -> None:
        """Make the containers."""
        # PEFT takes an adapter's name off a key's end, or the part before it: no deeper.
        self.invertible_f_down, self.invertible_f_up = nn.ModuleDict(), nn.ModuleDict()
        self.invertible_g_down, self.invertible_g_up = nn.ModuleDict(), nn.ModuleDict()

    def start(self, adapter_name: str, config: InvertibleConfig, key: str) -> None:
        """Add the two bottlenecks."""
        base = self.get_base_layer()
        if not isinstance(base, (nn.Linear, nn.Embedding, _ConvNd)):
            raise TypeError(f"'{key}' ({type(base).__name__}) is no embedding, no linear layer and no convolution.")
        first, second = halves(base)
        if not first:
            raise ValueError(f"'{key}' has one output, which cannot be halved.")
        ways = (
            (self.invertible_f_down, self.invertible_f_up, second, first),
            (self.invertible_g_down, self.invertible_g_up, first, second),
        )
        for down, up, inputs, outputs in ways:
            width = max(1, inputs // config.reduction)
            down[adapter_name], up[adapter_name] = pointwise(base, inputs, width), pointwise(base, width, outputs)
            zero(up[adapter_name])

    def adapted(self, adapter_name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """Couple the halves of the layer's output."""
        result = self.base_layer(x, *args, **kwargs)
        first, second = self._split(adapter_name, result)
        first = first + self.f(adapter_name, second)
        second = second + self.g(adapter_name, first)
        return torch.cat((first, second), dim=self._axis()).to(result.dtype)

    def inverse(self, adapter_name: str, output: Tensor) -> Tensor:
        """Compute the layer's own output from the adapted one."""
        first, second = self._split(adapter_name, output)
        second = second - self.g(adapter_name, first)
        first = first - self.f(adapter_name, second)
        return torch.cat((first, second), dim=self._axis()).to(output.dtype)

    def f(self, adapter_name: str, half: Tensor) -> Tensor:
        """Compute F of the second half."""
        return self.invertible_f_up[adapter_name](functional.relu(self.invertible_f_down[adapter_name](half)))

    def g(self, adapter_name: str, half: Tensor) -> Tensor:
        """Compute G of the first half."""
        return self.invertible_g_up[adapter_name](functional.relu(self.invertible_g_down[adapter_name](half)))

    def _split(self, adapter_name: str, hidden: Tensor) -> tuple[Tensor, ...]:
        dtype = next(self.invertible_f_down[adapter_name].parameters()).dtype
        return self._cast_input_dtype(hidden, dtype).split(halves(self.get_base_layer()), dim=self._axis())

    def _axis(self) -> int:
        base = self.get_base_layer()
        return 1 - base.weight.ndim if isinstance(base, _ConvNd) else -1


def halves(base: nn.Module) -> tuple[int, int]:
    """Return the sizes of the two halves of a layer's outputs."""
    names = {nn.Embedding: "embedding_dim", nn.Linear: "out_features", _ConvNd: "out_channels"}
    outputs = int(getattr(base, next(name for kind, name in names.items() if isinstance(base, kind))))
    return outputs // 2, outputs - outputs // 2


class InvertibleModel(OwnTuner):
    """The tuner that PEFT builds from an `InvertibleConfig`."""

    prefix: str = "invertible_"
    tuner_layer_cls = InvertibleLayer
