"""Attention over the outputs of several trained bottlenecks at one layer, as a PEFT tuner (arXiv 2005.00247)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from common.errors import GraftError
from common.tuners._base import OwnConfig, OwnTuner, UnmergedLayer
from common.tuners._shared import ACTIVATIONS, check_activation, pointwise

FUSION = "ADAPTER_FUSION"

_START = 0.02  # standard deviation with which queries and keys start
_OFF = 1e-6  # that of the values' weights off the diagonal


@dataclass
class FusionConfig(OwnConfig):
    """Configuration of the tuner.

    Args:
        bottlenecks: Width, scale and activation of each trained bottleneck (see `BottleneckConfig`).

    Attributes:
        start: Reads each one's trained tensors, as its own file names them; None where a file of all follows.
    """

    own_type: ClassVar[str] = FUSION
    start: ClassVar[Callable[[], Sequence[Mapping[str, Tensor]]] | None] = None  # no field: a file does not hold it

    bottlenecks: list[dict[str, Any]] = field(default_factory=list)


class FusionLayer(UnmergedLayer):
    """y = h + sum_n s_n V z_n with s = softmax_n((Q h + a) . (K z_n + b)), h = f(x) and z_n = c_n up_n(act(down_n(h))).

    The frozen bottlenecks n and the maps Q, K and V of the output channels see one position at a time.
    """

    where: ClassVar[str] = "behind"
    adapter_layer_names: tuple[str, ...] = ("fusion_query", "fusion_key", "fusion_value", "fusion_down", "fusion_up")
    other_param_names: tuple[str, ...] = ("bottlenecks",)

    def build(self) -> None:
        """Make the containers."""
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict())
        self.bottlenecks: dict[str, list[dict[str, Any]]] = {}
        self.place = ""  # by which the bottlenecks' files know the layer
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}

    def start(self, adapter_name: str, config: FusionConfig, key: str) -> None:
        """Add the bottlenecks, whose weights follow, and the attention over them."""
        base = self.get_base_layer()
        if not isinstance(base, (nn.Linear, _ConvNd)):
            raise TypeError(f"'{key}' ({type(base).__name__}) is no linear layer and no convolution.")
        size = base.out_features if isinstance(base, nn.Linear) else base.out_channels
        downs, ups = nn.ModuleList(), nn.ModuleList()
        for one in config.bottlenecks:
            check_activation(one["activation"])
            width = min(one["width"], size)
            downs.append(pointwise(base, size, width))
            ups.append(pointwise(base, width, size))
        query, keys, value = (pointwise(base, size, size) for _ in range(3))
        value.register_parameter("bias", None)
        for layer in (query, keys):
            nn.init.normal_(layer.weight, std=_START)
            nn.init.zeros_(layer.bias)  # ty: ignore[invalid-argument-type]
        nn.init.normal_(value.weight, std=_OFF)
        with torch.no_grad():
            value.weight.flatten(1).fill_diagonal_(1.0)
        modules = (query, keys, value, downs, ups)
        for name, module in zip(self.adapter_layer_names, modules, strict=True):
            getattr(self, name)[adapter_name] = module
        self.bottlenecks[adapter_name], self.place = config.bottlenecks, key
        self.frozen_peft_weight_names[adapter_name] = ("fusion_down", "fusion_up")

    def adapted(self, adapter_name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """Add what the attention makes of the bottlenecks' outputs to the layer's."""
        result = self.base_layer(x, *args, **kwargs)
        query, keys, value, downs, ups = (getattr(self, name)[adapter_name] for name in self.adapter_layer_names)
        hidden = self._cast_input_dtype(result, query.weight.dtype)
        outputs = [
            one["scale"] * up(ACTIVATIONS[one["activation"]](down(hidden)))
            for one, down, up in zip(self.bottlenecks[adapter_name], downs, ups, strict=True)
        ]
        channels = 1 if isinstance(self.get_base_layer(), _ConvNd) else -1
        asked = query(hidden)
        scores = torch.stack([(asked * keys(output)).sum(channels, keepdim=True) for output in outputs])
        values = torch.stack([value(output) for output in outputs])
        return result + (scores.softmax(0) * values).sum(0).to(result.dtype)


class FusionModel(OwnTuner):
    """The tuner that PEFT builds from a `FusionConfig`."""

    prefix: str = "fusion_"
    tuner_layer_cls = FusionLayer

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Wrap the layers and give the bottlenecks their trained weights; see the base class."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config: Any = self.peft_config[adapter_name]
        if config.start is not None:
            _load(model, adapter_name, config.start())

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Name a tensor as a file does; PEFT takes a name out before the last part of a key only, not before two."""
        for name in ("fusion_down", "fusion_up"):
            key, inner, last = key.partition(f".{name}.{adapter_name}.")
            if inner:
                return f"{key}.{name}.{last}"
        return super()._remove_adapter_name_from_key(key, adapter_name)


def _load(model: nn.Module, adapter_name: str, files: Sequence[Mapping[str, Tensor]]) -> None:
    layers = {module.place: module for module in model.modules() if isinstance(module, FusionLayer)}
    for number, stored in enumerate(files):
        own = {}
        for place, layer in layers.items():
            for part, container in (("badapter_down", layer.fusion_down), ("badapter_up", layer.fusion_up)):
                for name, parameter in container[adapter_name][number].named_parameters():
                    own[f"base_model.model.{place}.{part}.{name}"] = parameter
        wrong = [name for name in stored.keys() & own.keys() if stored[name].shape != own[name].shape]
        wrong = sorted([*wrong, *(stored.keys() ^ own.keys())])
        if wrong:
            raise GraftError(
                f"Adapter {number + 1} does not fit: {len(wrong)} tensors are missing, unexpected or of other shapes "
                f"({', '.join(wrong[:3])}). Export it again."
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(stored[name])


def distance_from_identity(model: nn.Module) -> Tensor | None:
    """Return the sum over all fusions in use of |V - I|^2; None where there is none."""
    total: Tensor | None = None
    for layer in model.modules():
        adapter = layer.in_use() if isinstance(layer, FusionLayer) else None
        if adapter is not None:
            value = cast("Any", layer).fusion_value[adapter].weight.flatten(1)
            own = (value - torch.eye(len(value), dtype=value.dtype, device=value.device)).square().sum()
            total = own if total is None else total + own
    return total
