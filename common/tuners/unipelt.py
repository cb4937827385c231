"""LoRA, prefixes and bottlenecks behind gates as one tuner (UniPELT, arXiv 2110.07577)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

from torch import nn

from common.tuners.bottleneck import BottleneckLayer
from common.tuners.gated_lora import GatedLoraLayer
from common.tuners.mixture import MixtureConfig, MixtureModel
from common.tuners.prefix import PrefixLayer

UNIPELT = "UNIPELT"


@dataclass
class UniPeltConfig(MixtureConfig):
    """Configuration of the tuner.

    Args:
        attention_of: Full names of the layers behind gates to that of the attention in the same block, which runs
            before them, or whose part they are, and knows which tokens are padding.
    """

    own_type: ClassVar[str] = UNIPELT

    attention_of: dict[str, str] = field(default_factory=dict)


class UniPeltModel(MixtureModel):
    """The tuner that PEFT builds from a `UniPeltConfig`: a mixture whose gates all average over the same tokens."""

    prefix: str = "unipelt_"

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Wrap the layers of every part, and tell their gates where padding is known; see the base class."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config = cast("UniPeltConfig", self.peft_config[adapter_name])
        layers = [(_place(name), layer) for name, layer in model.named_modules()]
        passages = {
            place: layer.passage
            for place, layer in layers
            if isinstance(layer, PrefixLayer) and adapter_name in layer.kvprefix_input_gate
        }
        for place, layer in layers:
            gated = isinstance(layer, GatedLoraLayer) and adapter_name in layer.gatelora_gate
            if gated or (isinstance(layer, BottleneckLayer) and adapter_name in layer.badapter_gate):
                cast("Any", layer).passages[adapter_name] = passages[config.attention_of[place]]


def _place(name: str) -> str:
    """Return the name that a module has in the bare network."""
    return ".".join(part for part in name.split(".") if part != "base_layer")
