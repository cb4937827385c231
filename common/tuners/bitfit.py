"""BitFit as a PEFT tuner: a trained copy of each layer's bias, the frozen one kept (arXiv 2106.10199)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.func import functional_call

BITFIT = "BITFIT"


@dataclass
class BitFitConfig(PeftConfig):
    """Configuration of the tuner.

    Args:
        target_modules: Names (matched by suffix) or one pattern (matched in full) of modules that have a bias.
        exclude_modules: Modules to leave out, by the same rules.
        modules_to_save: Unused; present because PEFT reads it.
    """

    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        """Set the type by which PEFT finds the tuner."""
        super().__post_init__()
        self.peft_type = BITFIT


class BitFitLayer(nn.Module, BaseTunerLayer):
    """Any layer with a bias: y = f(x; W, b') with b' trained and starting at b.

    The layer's own forward runs with the bias exchanged, so convolutions, norms and linear layers need no code each.
    """

    adapter_layer_names: tuple[str, ...] = ("bitfit_bias",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, inference_mode: bool = False) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bitfit_bias = nn.ParameterDict()
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self._disable_adapters = False
        self.update_layer(adapter_name, inference_mode)

    def update_layer(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Add an adapter that starts at the frozen bias."""
        if self.merged:
            self.unmerge()
        self.bitfit_bias[adapter_name] = nn.Parameter(self._base_bias().detach().clone())
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _base_bias(self) -> Tensor:
        bias = self.get_base_layer().bias
        if not isinstance(bias, Tensor):
            raise TypeError(f"BitFit needs a layer with a bias, not {type(self.get_base_layer()).__name__}.")
        return bias

    def _exchange(self, adapter_name: str) -> None:
        base = self._base_bias()
        own = self.bitfit_bias[adapter_name]
        base.data, own.data = own.data.to(base.dtype), base.data.to(own.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the trained bias into the layer; the frozen one is kept in its place until `unmerge`."""
        names = check_adapters_to_merge(self, adapter_names)
        for name in names:
            if name not in self.bitfit_bias:
                continue
            if self.merged:
                raise ValueError(
                    "BitFit holds whole biases, so only one adapter can be merged; unmerge the other first."
                )
            if safe_merge and not torch.isfinite(self.bitfit_bias[name]).all():
                raise ValueError(f"The bias of adapter {name!r} has values that are not finite.")
            self._exchange(name)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Give the layer its frozen bias back."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            self._exchange(self.merged_adapters.pop())

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """Run the layer with the active adapter's bias; shapes are the layer's own."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        active = [name for name in self.active_adapters if name in self.bitfit_bias]
        if self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        if len(active) > 1:
            raise ValueError(f"BitFit holds whole biases, so one adapter can be active at a time, not {active}.")
        # PEFT keeps trained parameters in single precision even where the layer is in half.
        bias = self.bitfit_bias[active[0]].to(self._base_bias().dtype)
        return functional_call(self.base_layer, {"bias": bias}, (x, *args), kwargs)


class BitFitModel(BaseTuner):
    """The tuner that PEFT builds from a `BitFitConfig`."""

    prefix: str = "bitfit_"
    tuner_layer_cls = BitFitLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  (PEFT declares it so)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, BitFitLayer):
            target.update_layer(adapter_name, peft_config.inference_mode)
            return
        layer = BitFitLayer(target, adapter_name, peft_config.inference_mode)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)
