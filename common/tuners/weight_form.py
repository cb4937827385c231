"""Structured changes of a weight, as a PEFT tuner for layers of any kind.

PEFT has most of these methods for linear layers alone, or gets them wrong on some convolutions. Here the layer runs
once, with the changed weight, so stride, dilation, padding, groups and transposition are the layer's own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from common.tuners._base import ExchangedLayer, OwnConfig, OwnTuner, by_output, like
from common.tuners._forms import FORMS

WEIGHT_FORM = "WEIGHT_FORM"


@dataclass
class WeightFormConfig(OwnConfig):
    """Configuration of the tuner.

    Args:
        form: Name of the change (see `FORMS`).
        settings: Its settings.
    """

    own_type: ClassVar[str] = WEIGHT_FORM

    form: str = ""
    settings: dict[str, Any] = field(default_factory=dict)


class WeightFormLayer(ExchangedLayer):
    """y = f(x; g(W)) with g the change, of the weight read as a matrix (outputs, inputs / groups * kernel)."""

    adapter_layer_names: tuple[str, ...] = ("wform_change",)

    def build(self) -> None:
        """Make the container."""
        super().build()
        self.wform_change = nn.ModuleDict()

    def start(self, adapter_name: str, config: WeightFormConfig, key: str) -> None:
        """Add the change."""
        if config.form not in FORMS:
            raise ValueError(f"The form is '{config.form}'; give one of {', '.join(FORMS)}.")
        weight = self.base_parameter("weight").detach()
        matrix = by_output(self.get_base_layer(), weight.to(like(weight)["dtype"])).flatten(1)
        self.wform_change[adapter_name] = FORMS[config.form](matrix, **config.settings)

    def exchanged(self, adapter_name: str) -> dict[str, Tensor]:
        """Compute the changed weight."""
        base, change = self.get_base_layer(), self.wform_change[adapter_name]
        rows = by_output(base, self.base_parameter("weight").to(next(change.parameters()).dtype))
        return {"weight": by_output(base, change(rows.flatten(1)).view(rows.shape))}


class WeightFormModel(OwnTuner):
    """The tuner that PEFT builds from a `WeightFormConfig`."""

    prefix: str = "wform_"
    tuner_layer_cls = WeightFormLayer
