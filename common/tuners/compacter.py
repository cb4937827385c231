"""Compacter: bottlenecks of Kronecker products that share one factor, as a PEFT tuner (arXiv 2106.04647)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from common.tuners._base import OwnConfig, OwnTuner, UnmergedLayer, like

COMPACTER = "COMPACTER"


@dataclass
class CompacterConfig(OwnConfig):
    """Configuration of the tuner.

    Args:
        width: Width w of the bottleneck, a multiple of `division`.
        division: Number n of Kronecker products in a sum, which divides the layers' outputs and the width.
        rank: Rank r of the factors that each layer has for itself.
        scale: The factor s of what the bottleneck adds.
    """

    own_type: ClassVar[str] = COMPACTER

    width: int = 24
    division: int = 4
    rank: int = 1
    scale: float = 1.0


class CompacterLayer(UnmergedLayer):
    """y = h + s * up(gelu(down(h))) with h = f(x), each weight a sum of Kronecker products A_i and S_i T_i.

    The A_i, (n, n, n), are one parameter for all layers, which the first of them holds. S_i and T_i are the layer's
    own, (rows / n, r) and (r, columns / n); the T_i of `up` start at zero.
    """

    where: ClassVar[str] = "behind"
    adapter_layer_names: tuple[str, ...] = ("compacter_rule", "compacter_left", "compacter_right", "compacter_bias")
    other_param_names: tuple[str, ...] = ("scaling", "owners")

    def build(self) -> None:
        """Make the containers."""
        self.compacter_rule = nn.ParameterDict()
        self.compacter_left, self.compacter_right = nn.ModuleDict(), nn.ModuleDict()
        self.compacter_bias = nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        # The layer that holds the shared factor, in a tuple, so that it is not registered below this one too.
        self.owners: dict[str, tuple[CompacterLayer]] = {}

    def start(self, adapter_name: str, config: CompacterConfig, key: str) -> None:
        """Add the layer's own factors; `share` gives it the common one."""
        base = self.get_base_layer()
        if not isinstance(base, (nn.Linear, _ConvNd)):
            raise TypeError(f"'{key}' ({type(base).__name__}) is no linear layer and no convolution.")
        outputs = base.out_features if isinstance(base, nn.Linear) else base.out_channels
        width, n = config.width, config.division
        if width % n or outputs % n:
            raise ValueError(f"'{key}' has {outputs} outputs and the bottleneck {width}; {n} does not divide both.")
        options = like(base.weight)
        shapes = {"down": (width, outputs), "up": (outputs, width)}
        left = {name: torch.empty(n, rows // n, config.rank, **options) for name, (rows, _) in shapes.items()}
        right = {name: torch.zeros(n, config.rank, columns // n, **options) for name, (_, columns) in shapes.items()}
        for factor in (*left.values(), right["down"]):
            nn.init.normal_(factor, std=math.sqrt(1 / factor.shape[-1]))
        bias = {name: torch.zeros(rows, **options) for name, (rows, _) in shapes.items()}
        self.compacter_left[adapter_name] = nn.ParameterDict(left)
        self.compacter_right[adapter_name] = nn.ParameterDict(right)
        self.compacter_bias[adapter_name] = nn.ParameterDict(bias)
        self.scaling[adapter_name] = config.scale

    def share(self, adapter_name: str, config: CompacterConfig, owner: CompacterLayer) -> None:
        """Take the common factor from its owner, or make it where this layer is the owner."""
        self.owners[adapter_name] = (owner,)
        if owner is self:
            n = config.division
            rule = torch.empty(n, n, n, **like(next(self.get_base_layer().parameters())))
            nn.init.normal_(rule, std=1 / n)
            self.compacter_rule[adapter_name] = nn.Parameter(rule)
            self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def adapted(self, adapter_name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """Add the bottleneck's output to the layer's."""
        result = self.base_layer(x, *args, **kwargs)
        base = self.get_base_layer()
        axis = 1 - base.weight.ndim if isinstance(base, _ConvNd) else -1
        bias: Any = self.compacter_bias[adapter_name]
        hidden = self._cast_input_dtype(result, bias["up"].dtype).movedim(axis, -1)
        narrow = functional.gelu(functional.linear(hidden, self.weight_of(adapter_name, "down"), bias["down"]))
        added = functional.linear(narrow, self.weight_of(adapter_name, "up"), bias["up"]).movedim(-1, axis)
        return result + (self.scaling[adapter_name] * added).to(result.dtype)

    def weight_of(self, adapter_name: str, name: str) -> Tensor:
        """Compute a weight of the bottleneck, `down` (width, outputs) or `up` (outputs, width)."""
        rule = self.owners[adapter_name][0].compacter_rule[adapter_name]
        left: Any = self.compacter_left[adapter_name]
        right: Any = self.compacter_right[adapter_name]
        with torch.autocast(rule.device.type, enabled=False):
            products = torch.einsum("iab,icr,ird->acbd", rule, left[name], right[name])
        return products.flatten(2).flatten(0, 1)


class CompacterModel(OwnTuner):
    """The tuner that PEFT builds from a `CompacterConfig`."""

    prefix: str = "compacter_"
    tuner_layer_cls = CompacterLayer

    def join(self, layer: CompacterLayer, adapter_name: str, config: CompacterConfig, key: str) -> None:
        """Let the first layer hold the shared factor for all."""
        layers = (m for m in self.model.modules() if isinstance(m, CompacterLayer))
        owner = next((other for other in layers if adapter_name in other.compacter_rule), layer)
        layer.share(adapter_name, config, owner)
