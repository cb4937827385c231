"""A small trained map of a layer's most salient output channels onto themselves, as a PEFT tuner (arXiv 2309.08513)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from common.tuners._base import ExchangedLayer, Kept, OwnConfig, OwnTuner, by_output, like

SALIENT_CHANNELS = "SALIENT_CHANNELS"


@dataclass
class SalientConfig(OwnConfig):
    """Configuration of the tuner.

    Args:
        channels: How many channels k are chosen; a layer with fewer outputs takes them all.
        scale: The factor s of the change.
    """

    own_type: ClassVar[str] = SALIENT_CHANNELS

    channels: int = 96
    scale: float = 1.0


class SalientLayer(ExchangedLayer):
    """y[S] = z[S] + s (M z[S] + b), z = f(x), for the k chosen output channels S; the others stay.

    M (k, k) and b (k) are zero at the start; a layer without a bias has no b, and one in groups is refused, so that the
    change is one of the layer's own parameters.
    """

    adapter_layer_names: tuple[str, ...] = ("salient_map", "salient_shift")
    other_param_names: tuple[str, ...] = ("salient_channels", "scaling")

    def build(self) -> None:
        """Make the containers."""
        super().build()
        self.salient_map, self.salient_shift = nn.ParameterDict(), nn.ParameterDict()
        self.salient_channels = Kept()
        self.scaling: dict[str, float] = {}

    def start(self, adapter_name: str, config: SalientConfig, key: str) -> None:
        """Choose channels at random and add zeros."""
        base = self.get_base_layer()
        if not isinstance(base, (nn.Linear, _ConvNd)):
            raise TypeError(f"'{key}' ({type(base).__name__}) is no linear layer and no convolution.")
        if getattr(base, "groups", 1) > 1:
            raise ValueError(f"'{key}' has {base.groups} groups, and channels of two have no inputs in common.")
        weight = self.base_parameter("weight").detach()
        outputs = len(by_output(base, weight))
        count = min(config.channels, outputs)
        self.salient_map[adapter_name] = nn.Parameter(torch.zeros(count, count, **like(weight)))
        if base.bias is not None:
            self.salient_shift[adapter_name] = nn.Parameter(torch.zeros(count, **like(weight)))
        self.scaling[adapter_name] = config.scale
        self.choose(adapter_name, torch.rand(outputs))

    def choose(self, adapter_name: str, scores: Tensor) -> None:
        """Choose the channels with the highest scores, one score an output channel."""
        best = scores.topk(len(self.salient_map[adapter_name])).indices.sort().values
        self.salient_channels[adapter_name] = best.to(self.base_parameter("weight").device, torch.int32)

    def exchanged(self, adapter_name: str) -> dict[str, Tensor]:
        """Compute the changed rows of weight and bias."""
        base, mapping = self.get_base_layer(), self.salient_map[adapter_name]
        chosen, scale = self.salient_channels[adapter_name], self.scaling[adapter_name]
        rows = by_output(base, self.base_parameter("weight").to(mapping.dtype))
        change = scale * (mapping @ rows.index_select(0, chosen).flatten(1))
        own = {"weight": by_output(base, rows.index_add(0, chosen, change.view(-1, *rows.shape[1:])))}
        if adapter_name in self.salient_shift:
            bias = self.base_parameter("bias").to(mapping.dtype)
            change = scale * (mapping @ bias.index_select(0, chosen) + self.salient_shift[adapter_name])
            own["bias"] = bias.index_add(0, chosen, change)
        return own


class SalientModel(OwnTuner):
    """The tuner that PEFT builds from a `SalientConfig`."""

    prefix: str = "salient_"
    tuner_layer_cls = SalientLayer
