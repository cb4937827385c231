"""What Graft's own PEFT tuners share: one configuration, one layer, one model class to subclass."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn, TypedDict, cast

import torch
from peft import PeftConfig
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.func import functional_call

# What a convolution, a Linear layer or an embedding says about itself.
_FACTS = (
    *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"),
    *("in_features", "out_features", "num_embeddings", "embedding_dim", "padding_idx"),
)


@dataclass
class OwnConfig(PeftConfig):
    """Configuration of an own tuner; a subclass names its type.

    Args:
        target_modules: Names (matched by suffix) or one pattern (matched in full) of the modules to adapt.
        exclude_modules: Modules to leave out, by the same rules.
        modules_to_save: Unused; present because PEFT reads it.
    """

    own_type: ClassVar[str] = ""

    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        """Set the type by which PEFT finds the tuner."""
        super().__post_init__()
        self.peft_type = self.own_type


class Kept(BufferDict):
    """Buffers of adapters, by name, that a shared adapter and a run's checkpoint hold beside the trained parameters.

    Attributes:
        in_checkpoints: Tells a checkpoint so.
    """

    in_checkpoints: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__(persistent=True)


class OwnLayer(nn.Module, BaseTunerLayer):
    """A wrapped layer that holds adapters, of which one at a time is active.

    A subclass names its containers in `adapter_layer_names` and makes them in `build`; it fills them in `start` and
    computes in `adapted`.

    Args:
        base_layer: The frozen layer.
        adapter_name: Name of the first adapter.
        config: Its configuration.
        key: The layer's full name in the model.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, key: str) -> None:  # noqa: ANN401
        super().__init__()
        self.base_layer = base_layer
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self._disable_adapters = False
        self.build()
        self.update_layer(adapter_name, config, key)

    def build(self) -> None:
        """Make the empty containers."""
        raise NotImplementedError

    def start(self, adapter_name: str, config: Any, key: str) -> None:  # noqa: ANN401
        """Add an adapter's parameters, at values that change nothing."""
        raise NotImplementedError

    def adapted(self, adapter_name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """Compute the layer's output with an adapter on it."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        """Answer for the layer's own facts: some networks read a convolution's stride off it to size their input."""
        if name in _FACTS:
            return getattr(self.get_base_layer(), name)
        return super().__getattr__(name)

    def base_parameter(self, name: str) -> Tensor:
        """Return a parameter or buffer that the frozen layer holds itself.

        Raises:
            TypeError: It has none of this name, or computes it at each call, as under a weight norm.
        """
        base = self.get_base_layer()
        parameter = base._parameters.get(name)
        parameter = parameter if parameter is not None else base._buffers.get(name)
        if parameter is None:
            raise TypeError(
                f"{type(base).__name__} holds no parameter '{name}' itself (it may be computed at each call)."
            )
        return parameter

    def update_layer(self, adapter_name: str, config: Any, key: str) -> None:  # noqa: ANN401
        """Add an adapter."""
        if self.merged:
            self.unmerge()
        self.start(adapter_name, config, key)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def in_use(self) -> str | None:
        """Return the adapter that a call runs with; None where the layer itself runs, bare or merged."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        known = self._get_available_adapters()
        active = [] if self.disable_adapters else [name for name in self.active_adapters if name in known]
        if self.merged or not active:
            return None
        if len(active) > 1:
            raise ValueError(f"One adapter can be active at a time, not {active}.")
        return active[0]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """Run the layer with the active adapter; shapes are the layer's own."""
        adapter = self.in_use()
        return self.base_layer(x, *args, **kwargs) if adapter is None else self.adapted(adapter, x, *args, **kwargs)


class ExchangedLayer(OwnLayer):
    """Any layer f(x; θ) run as f(x; θ'): its own forward, with some of its parameters computed by the adapter.

    Stride, padding, dilation, groups and transposition are the layer's own, so no layer type needs code of its own,
    and the exchanged parameters are exactly what a merge writes. A subclass computes them in `exchanged`.
    """

    def build(self) -> None:
        """Make the place of the frozen parameters while an adapter is merged."""
        self._frozen: dict[str, Tensor] = {}

    def exchanged(self, adapter_name: str) -> dict[str, Tensor]:
        """Compute the parameters that take the place of the layer's own, by name."""
        raise NotImplementedError

    def adapted(self, adapter_name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """Run the layer with the exchanged parameters."""
        return functional_call(self.base_layer, self._in_place(adapter_name), (x, *args), kwargs)

    def _in_place(self, adapter_name: str) -> dict[str, Tensor]:
        """Compute in full precision under autocast too, so that a merge finds the same values; then cast."""
        device = next(self.get_base_layer().parameters()).device.type
        with torch.autocast(device, enabled=False):
            own = self.exchanged(adapter_name)
            return {name: _laid_out(tensor, self.base_parameter(name)) for name, tensor in own.items()}

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write an adapter into the layer's parameters; the frozen ones are kept aside until `unmerge`."""
        known = self._get_available_adapters()
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in known:
                continue
            if self.merged:
                raise ValueError("One adapter can be merged at a time; unmerge the other first.")
            with torch.no_grad():
                own = self._in_place(name)
            if safe_merge and not all(torch.isfinite(tensor).all() for tensor in own.values()):
                raise ValueError(f"Merging adapter {name!r} would give values that are not finite.")
            for key, tensor in own.items():
                parameter = self.base_parameter(key)
                self._frozen[key], parameter.data = parameter.data, tensor.detach().clone()
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Give the layer its frozen parameters back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        for key, tensor in self._frozen.items():
            parameter = self.base_parameter(key)
            parameter.data = tensor.to(parameter.device)
        self._frozen.clear()
        self.merged_adapters.clear()


def _laid_out(tensor: Tensor, frozen: Tensor) -> Tensor:
    """Give a computed parameter the frozen one's type and strides: torch chooses its kernels, and rounds, by both."""
    tensor = tensor.to(frozen.dtype)
    if tensor.stride() == frozen.stride() or not frozen.is_contiguous():
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)  # strides of axes of length one count too


class UnmergedLayer(OwnLayer):
    """A layer with a nonlinear bottleneck at it, which no change of its weights can stand for.

    A subclass says in `where` how the two stand to each other.
    """

    where: ClassVar[str] = "beside"

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Refuse: a bottleneck with a nonlinearity is no change of a weight."""
        raise NotImplementedError(
            f"its bottlenecks run {self.where} the layers and are no change of their weights; use the adapter as it is"
        )

    def unmerge(self) -> None:
        """Do nothing: it is never merged."""


class OwnTuner(BaseTuner):
    """The model class that PEFT builds from a configuration; a subclass names its prefix and its layer."""

    tuner_layer_cls = OwnLayer
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
        kind = cast("type[OwnLayer]", self.tuner_layer_cls)
        if isinstance(target, kind):
            target.update_layer(adapter_name, peft_config, current_key)
            self.join(target, adapter_name, peft_config, current_key)
            return
        layer = kind(target, adapter_name, peft_config, current_key)
        self._replace_module(parent, target_name, layer, target)
        self.join(layer, adapter_name, peft_config, current_key)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)

    def join(self, layer: Any, adapter_name: str, config: Any, key: str) -> None:  # noqa: ANN401
        """Tie a layer with a new adapter to the others, where they share something; nothing by default."""


class Like(TypedDict):
    """Where an adapter of some weight lives, and in which type."""

    dtype: torch.dtype
    device: torch.device


def like(weight: Tensor) -> Like:
    """Return device and type of an adapter of this weight: the weight's own, in single precision at least."""
    return {"dtype": torch.promote_types(weight.dtype, torch.float32), "device": weight.device}


def by_output(layer: nn.Module, weight: Tensor) -> Tensor:
    """Bring a weight into the shape (outputs, inputs / groups, *kernel), or such a tensor back into the layer's shape.

    Transposed convolutions hold (inputs, outputs / groups, *kernel) and embeddings (inputs, outputs); the exchange of
    the two axes within each group is its own inverse. Other layers hold the wanted shape.
    """
    if not getattr(layer, "transposed", isinstance(layer, nn.Embedding)):
        return weight
    groups = getattr(layer, "groups", 1)
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def per_output(values: Tensor, weight: Tensor) -> Tensor:
    """View one value an output, so that it multiplies a weight of shape (outputs, ...)."""
    return values.view(-1, *(1,) * (weight.ndim - 1))
