"""Training copies of named parameters of any layer, as a PEFT tuner: biases, norms, slopes of activations."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from common.tuners._base import ExchangedLayer, OwnConfig, OwnTuner, like

COPIES = "COPIES"


@dataclass
class CopiesConfig(OwnConfig):
    """Configuration of the tuner.

    Args:
        weight_of: Pattern (matched in full) of the target modules whose `weight` is trained.
        bias_of: Pattern of the target modules whose `bias` is trained.
    """

    own_type: ClassVar[str] = COPIES

    weight_of: str | None = field(default=None)
    bias_of: str | None = field(default=None)


class CopiesLayer(ExchangedLayer):
    """Any layer: y = f(x; θ') with a trained copy θ' of some of its parameters, which starts at the frozen one."""

    adapter_layer_names: tuple[str, ...] = ("copied_weight", "copied_bias")

    def build(self) -> None:
        """Make the containers."""
        super().build()
        self.copied_weight, self.copied_bias = nn.ParameterDict(), nn.ParameterDict()

    def start(self, adapter_name: str, config: CopiesConfig, key: str) -> None:
        """Add the copies that the configuration names for this layer."""
        patterns = {"weight": config.weight_of, "bias": config.bias_of}
        wanted = [name for name, pattern in patterns.items() if pattern is not None and re.fullmatch(pattern, key)]
        for name in wanted:
            own = self.base_parameter(name).detach()
            self._copies[name][adapter_name] = nn.Parameter(own.to(**like(own), copy=True))
        if not wanted:
            raise ValueError(f"'{key}' is a target, but neither 'weight_of' nor 'bias_of' matches it.")

    def exchanged(self, adapter_name: str) -> dict[str, Tensor]:
        """Return the copies."""
        return {name: copies[adapter_name] for name, copies in self._copies.items() if adapter_name in copies}

    @property
    def _copies(self) -> dict[str, nn.ParameterDict]:
        return {"weight": self.copied_weight, "bias": self.copied_bias}


class CopiesModel(OwnTuner):
    """The tuner that PEFT builds from a `CopiesConfig`."""

    prefix: str = "copied_"
    tuner_layer_cls = CopiesLayer
