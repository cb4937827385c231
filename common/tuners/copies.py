"""Training copies of named parameters of any layer, as a PEFT tuner: biases, norms, slopes of activations.

Beside them, scales of a layer's output (arXiv 2304.06648) and the running statistics of batch norms.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from common.tuners._base import ExchangedLayer, Kept, OwnConfig, OwnTuner, by_output, like, per_output

COPIES = "COPIES"


@dataclass
class CopiesConfig(OwnConfig):
    """Configuration of the tuner.

    Args:
        weight_of: Pattern (matched in full) of the target modules whose `weight` is trained.
        bias_of: Pattern of the target modules whose `bias` is trained.
        scale_of: Pattern of the linear layers and convolutions whose output gets a trained scale.
        statistics_of: Pattern of the batch norms whose running statistics the adapter has to itself.
    """

    own_type: ClassVar[str] = COPIES

    weight_of: str | None = field(default=None)
    bias_of: str | None = field(default=None)
    scale_of: str | None = field(default=None)
    statistics_of: str | None = field(default=None)


class CopiesLayer(ExchangedLayer):
    """Any layer: y = g f(x; θ') with a trained copy θ' of some of its parameters, which starts at the frozen one.

    g is one number an output channel, one at the start. Statistics start at the frozen ones and follow the batches in
    train mode; the frozen norm stays in eval mode, so that its own never move.
    """

    adapter_layer_names: tuple[str, ...] = ("copied_weight", "copied_bias", "copied_scale")
    other_param_names: tuple[str, ...] = ("copied_mean", "copied_variance", "copied_count")

    def build(self) -> None:
        """Make the containers."""
        super().build()
        self.copied_weight, self.copied_bias, self.copied_scale = (nn.ParameterDict() for _ in range(3))
        self.copied_mean, self.copied_variance, self.copied_count = (Kept() for _ in range(3))

    def start(self, adapter_name: str, config: CopiesConfig, key: str) -> None:
        """Add the copies that the configuration names for this layer."""

        def wanted(pattern: str | None) -> bool:
            return pattern is not None and re.fullmatch(pattern, key) is not None

        patterns = {"weight": config.weight_of, "bias": config.bias_of}
        copied = [name for name, pattern in patterns.items() if wanted(pattern)]
        for name in copied:
            own = self.base_parameter(name).detach()
            self._copies[name][adapter_name] = nn.Parameter(own.to(**like(own), copy=True))
        if wanted(config.scale_of):
            self._start_scale(adapter_name, key)
        if wanted(config.statistics_of):
            for name, container in self._statistics.items():
                container[adapter_name] = self.base_parameter(name).detach().clone()
        if not copied and not wanted(config.scale_of):
            raise ValueError(f"'{key}' is a target, but neither 'weight_of' nor 'bias_of' nor 'scale_of' matches it.")

    def _start_scale(self, adapter_name: str, key: str) -> None:
        base = self.get_base_layer()
        if not isinstance(base, (nn.Linear, _ConvNd)):
            raise TypeError(f"'{key}' ({type(base).__name__}) is no linear layer and no convolution.")
        weight = self.base_parameter("weight").detach()
        self.copied_scale[adapter_name] = nn.Parameter(torch.ones(len(by_output(base, weight)), **like(weight)))

    def exchanged(self, adapter_name: str) -> dict[str, Tensor]:
        """Return the copies, scaled where there is a scale."""
        own = {name: copies[adapter_name] for name, copies in self._copies.items() if adapter_name in copies}
        if adapter_name in self.copied_scale:
            base, scale = self.get_base_layer(), self.copied_scale[adapter_name]
            weight = own.get("weight", self.base_parameter("weight").to(scale.dtype))
            rows = by_output(base, weight)
            own["weight"] = by_output(base, rows * per_output(scale, rows))
            bias = own.get("bias", base._parameters.get("bias"))
            if bias is not None:
                own["bias"] = bias.to(scale.dtype) * scale
        return own | {
            name: container[adapter_name] for name, container in self._statistics.items() if adapter_name in container
        }

    def adapted(self, adapter_name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """Run the layer with the copies; statistics of the adapter's own follow the batch in train mode."""
        base = self.get_base_layer()
        if adapter_name not in self.copied_mean or not self.training:
            return super().adapted(adapter_name, x, *args, **kwargs)
        own = self._in_place(adapter_name)
        frozen, base.training = base.training, True
        try:
            result = torch.func.functional_call(base, own, (x, *args), kwargs)
        finally:
            base.training = frozen
        with torch.no_grad():  # where a type was cast, the norm has moved another tensor
            for name, container in self._statistics.items():
                if own[name] is not container[adapter_name]:
                    container[adapter_name].copy_(own[name])
        return result

    @property
    def _copies(self) -> dict[str, nn.ParameterDict]:
        return {"weight": self.copied_weight, "bias": self.copied_bias}

    @property
    def _statistics(self) -> dict[str, Kept]:
        if not isinstance(self.get_base_layer(), _NormBase):
            return {}
        return {
            "running_mean": self.copied_mean,
            "running_var": self.copied_variance,
            "num_batches_tracked": self.copied_count,
        }


class CopiesModel(OwnTuner):
    """The tuner that PEFT builds from a `CopiesConfig`."""

    prefix: str = "copied_"
    tuner_layer_cls = CopiesLayer
