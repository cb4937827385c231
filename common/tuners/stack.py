"""A second tuner above a trained first one, as one PEFT adapter that holds both (arXiv 2307.03042)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

from peft import PeftConfig, mapping
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _filter_state_dict_by_key_prefixes,
    _get_tuner_state_dict_key_prefixes,
)
from torch import Tensor, nn

from common.errors import GraftError
from common.tuners.mixture import MixtureConfig, MixtureModel

STACK = "STACK"

_FIRST, _THEN, _FOLDED = 0, 1, 2  # a first one that is merged stands outermost, where it hands on what it reads


@dataclass
class StackConfig(MixtureConfig):
    """Configuration of the tuner.

    Args:
        first_stays: Whether the first of the two parts is `frozen`, `trainable`, or `merged` into the frozen weights.

    Attributes:
        start: Reads the first one's trained tensors, as its own file names them; None where a file of both follows.
    """

    own_type: ClassVar[str] = STACK
    start: ClassVar[Callable[[], Mapping[str, Tensor]] | None] = None  # no field: a file does not hold it

    first_stays: Literal["frozen", "trainable", "merged"] = "trainable"


class FoldedLayer(BaseTunerLayer):
    """A layer of a tuner whose adapter lies in the frozen weights for as long as it is active and enabled.

    The weights' own values are kept and put back bit for bit. It is mixed into a tuner's layer class by `fold`.
    """

    hands_on: ClassVar[bool] = True  # what it reads, to the layer below

    folds: set[str]  # the adapters that lie in the weights while they are active
    kept: dict[str, Tensor]  # the frozen layer's own values while an adapter lies in them

    def fold_in(self) -> None:
        """Put the active adapter into the weights."""
        active = [name for name in self.active_adapters if name in self.folds]
        if self.merged or self.disable_adapters or not active:
            return
        base = self.get_base_layer()
        self.kept = {name: tensor.detach().clone() for name, tensor in _tensors(base).items()}
        super().merge(safe_merge=True, adapter_names=active)
        if self.get_base_layer() is not base:
            raise NotImplementedError("it takes the layer's place instead of changing its weights")

    def fold_out(self) -> None:
        """Put the weights' own values back."""
        if not self.merged:
            return
        super().unmerge()
        tensors = _tensors(self.get_base_layer())
        for name, value in self.kept.items():
            tensors[name].data = value.to(tensors[name])
        self.kept = {}

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Do nothing: it lies in the weights."""

    def unmerge(self) -> None:
        """Do nothing: it lies in the weights as long as it is active."""

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Choose the active adapter; see the base class."""
        self.fold_out()
        super().set_adapter(adapter_names, inference_mode)
        self.set_requires_grad(sorted(self.folds), requires_grad=False)
        self.fold_in()

    def enable_adapters(self, enabled: bool) -> None:
        """Take the adapter out of the weights, or put it in again; see the base class."""
        self.fold_out()
        super().enable_adapters(enabled)
        self.fold_in()


def _tensors(base: nn.Module) -> dict[str, Tensor]:
    """Return a layer's own parameters and buffers."""
    return {**dict(base.named_parameters(recurse=False)), **dict(base.named_buffers(recurse=False))}


def fold(layer: BaseTunerLayer, adapter_name: str) -> FoldedLayer:
    """Return a tuner's layer as one that holds an adapter in the frozen weights; it shares all that the given one has.

    Who knew the given layer still reaches the same parameters by it.
    """
    if not isinstance(layer, FoldedLayer):
        kind = type(layer)
        mixed = type(f"Folded{kind.__name__}", (FoldedLayer, kind), {})
        folded = mixed.__new__(mixed)
        object.__setattr__(folded, "__dict__", layer.__dict__)
        folded.folds, folded.kept = set(), {}
        cast("nn.Module", folded).register_load_state_dict_post_hook(_fold_again)
        layer = folded
    layer.folds.add(adapter_name)
    return layer


def _fold_again(layer: Any, keys: object) -> None:  # noqa: ANN401  (torch's hook)
    """Put what was loaded into the weights instead of what lay there."""
    layer.fold_out()
    layer.fold_in()


class StackModel(MixtureModel):
    """The tuner that PEFT builds from a `StackConfig`."""

    prefix: str = "stack_"

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Wrap the layers of both parts; see the base class."""
        _fold_out(model)
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)

    def numbers(self, config: MixtureConfig) -> list[int]:
        """Number the parts by where they stand, from the inside out."""
        merged = cast("StackConfig", config).first_stays == "merged"
        return [_FOLDED if merged else _FIRST, _THEN]

    def stands(self, model: nn.Module, adapter_name: str, number: int, part: PeftConfig) -> None:
        """Give the first one its trained tensors, and fold it where that is wanted, before the second is put on."""
        config = cast("StackConfig", self.peft_config[adapter_name])
        if number == _THEN:
            return
        if config.start is not None:
            load_part(model, part, adapter_name, config.start())
        if number == _FOLDED:
            self._fold(model, adapter_name)

    def _fold(self, model: nn.Module, adapter_name: str) -> None:
        layers = {name: module for name, module in model.named_modules() if _holds(module, adapter_name)}
        try:
            for name, layer in layers.items():
                parent, _, child = name.rpartition(".")
                folded = fold(cast("BaseTunerLayer", layer), adapter_name)
                setattr(model.get_submodule(parent), child, folded)
                folded.set_adapter([adapter_name])
        except (NotImplementedError, ValueError, RuntimeError, AttributeError) as error:
            raise GraftError(
                f"Stack cannot merge the first adapter into the weights: {error}. Choose first_stays frozen or "
                "trainable."
            ) from error

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapter; a first part that is not to train stays frozen."""
        _fold_out(self.model)  # PEFT complains of what is merged
        super().set_adapter(adapter_name, inference_mode)
        self._freeze()

    def enable_adapter_layers(self) -> None:
        """Enable the adapters; a first part that is not to train stays frozen."""
        super().enable_adapter_layers()
        self._freeze()

    def _freeze(self) -> None:
        frozen = [name for name, config in self.peft_config.items() if _stays(config) != "trainable"]
        for layer in self.model.modules():
            if isinstance(layer, BaseTunerLayer) and getattr(layer, "mixture_path", (_THEN,))[0] != _THEN:
                layer.set_requires_grad(frozen, requires_grad=False)


def _fold_out(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, FoldedLayer):
            layer.fold_out()


def _stays(config: object) -> str:
    return getattr(config, "first_stays", "trainable")


def _holds(module: nn.Module, adapter_name: str) -> bool:
    return isinstance(module, BaseTunerLayer) and adapter_name in module._get_available_adapters()


def load_part(model: nn.Module, part: PeftConfig, adapter_name: str, stored: Mapping[str, Tensor]) -> None:
    """Load the tensors of an adapter's file into its layers, which stand alone on a bare network.

    Raises:
        GraftError: Missing or unexpected tensors, or other shapes.
    """
    kind = mapping.PEFT_TYPE_TO_TUNER_MAPPING[part.peft_type]  # ty: ignore[invalid-argument-type]
    named = kind._remap_adapter_state_dict_for_load(
        model=model, config=part, adapter_name=adapter_name, state_dict=dict(stored)
    )
    prefixes = _get_tuner_state_dict_key_prefixes(model, adapter_name=adapter_name)
    wanted = _filter_state_dict_by_key_prefixes(model.state_dict(), prefixes).keys()
    if wrong := sorted(wanted ^ named.keys()):
        raise GraftError(
            f"The first adapter does not fit: {len(wrong)} tensors are missing or unexpected ({', '.join(wrong[:3])}). "
            "Export it again."
        )
    try:
        model.load_state_dict(named, strict=False)
    except RuntimeError as error:
        raise GraftError(f"The first adapter does not fit: {' '.join(str(error).split())} Export it again.") from error
