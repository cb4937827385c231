"""Several tuners on one model as one PEFT adapter, saved, loaded and disabled together.

Each wraps the bare network's layers; where several wrap one layer, or one wraps what holds another's, they are nested
behind that, the first innermost.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NoReturn, cast

from peft import PeftConfig, mapping
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from common.tuners._base import ExchangedLayer, OwnConfig, OwnLayer

MIXTURE = "MIXTURE"


@dataclass
class MixtureConfig(OwnConfig):
    """Configuration of the tuner.

    Args:
        parts: The configurations of the parts, as plain values (`PeftConfig.to_dict`), in the order of wrapping.
    """

    own_type: ClassVar[str] = MIXTURE

    parts: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Turn the parts into plain values, which JSON can hold."""
        super().__post_init__()
        self.parts = [_plain(part.to_dict() if isinstance(part, PeftConfig) else part) for part in self.parts]

    def built(self) -> list[PeftConfig]:
        """Build the parts' configurations.

        Raises:
            ValueError: A part of a type that is not registered.
        """
        configs = []
        for part in self.parts:
            kind = mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get(cast("Any", part.get("peft_type")))
            if kind is None:
                raise ValueError(f"A part of the mixture has the unknown type {part.get('peft_type')!r}.")
            config = kind.from_peft_type(**part)
            config.inference_mode = self.inference_mode
            configs.append(config)
        return configs


@dataclass(frozen=True)
class Wrapped:
    """A tuner's layer at its place in the bare network, and the numbers of the parts, outer to inner, it belongs to."""

    place: str
    layer: Any
    path: tuple[int, ...]


class MixtureModel(BaseTuner):
    """The tuner that PEFT builds from a `MixtureConfig`: it lets each part's own tuner wrap its layers.

    PEFT finds adapter tensors, disables and merges layer by layer, whatever the layers' types, so the parts need no
    further care once they stand. While a part's tuner works, the other parts' layers are put aside: it finds the names
    and types of the bare network, whatever else is on it.
    """

    prefix: str = "mixture_"  # PEFT asks for one; the parts' tensors are found by their layers
    tuner_layer_cls = BaseTunerLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  (PEFT declares it so)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Wrap the layers of every part; see the base class."""
        config = cast("MixtureConfig", self.peft_config[adapter_name])
        known = model.__dict__.pop("peft_config", None)
        wrapped = peel(model)
        targeted: set[str] = set()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            for number, part in zip(self.numbers(config), config.built(), strict=True):
                nest(model, [replace(one, path=one.path[1:]) for one in wrapped if one.path[:1] == (number,)])
                kind = mapping.PEFT_TYPE_TO_TUNER_MAPPING[part.peft_type]  # ty: ignore[invalid-argument-type]
                tuner = kind(model, part, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
                model.__dict__.pop("peft_config", None)  # else the next part's tuner would take it for its own
                targeted |= set(tuner.targeted_module_names)
                self.stands(model, adapter_name, number, part)
                mine = [replace(one, path=(number, *one.path)) for one in peel(model)]
                wrapped = [one for one in wrapped if one.path[:1] != (number,)] + mine
        check_nested(wrapped)
        nest(model, wrapped)
        if known is not None:
            model.__dict__["peft_config"] = known
        self.targeted_module_names = sorted({*self.targeted_module_names, *targeted})
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def numbers(self, config: MixtureConfig) -> list[int]:
        """Number the parts by where they stand, from the inside out."""
        return list(range(len(config.parts)))

    def stands(self, model: nn.Module, adapter_name: str, number: int, part: PeftConfig) -> None:
        """Act on a part that has just been put on; the others' layers are still aside."""

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> NoReturn:  # noqa: ANN401
        """Never called: the parts' tuners replace the layers."""
        raise NotImplementedError


def _plain(value: Any) -> Any:  # noqa: ANN401
    """Turn sets into sorted lists and enumerations into their values, at any depth."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(item) for item in value)
    return getattr(value, "value", value)


def peel(model: nn.Module) -> list[Wrapped]:
    """Take all tuners' layers off a model, so that it is the bare network again; innermost first at each place."""
    found: list[Wrapped] = []

    def walk(parent: nn.Module, inside: str) -> None:
        for name, child in list(parent.named_children()):
            layers = []
            base: nn.Module = child
            while isinstance(base, BaseTunerLayer) and hasattr(base, "base_layer"):
                layers.append(base)
                base = cast("Any", base).base_layer
            for layer in layers:
                layer.base_layer = base
            found.extend(Wrapped(f"{inside}{name}", one, getattr(one, _PATH, ())) for one in reversed(layers))
            if layers:
                setattr(parent, name, base)
            walk(base, f"{inside}{name}.")

    walk(model, "")
    return found


def nest(model: nn.Module, wrapped: Iterable[Wrapped]) -> None:
    """Put tuners' layers onto a bare network: at each place the parts in their order, the first innermost."""
    at: dict[str, list[Wrapped]] = {}
    for one in wrapped:
        at.setdefault(one.place, []).append(one)
    parents = {place: model.get_submodule(place.rpartition(".")[0]) for place in at}
    for place, ones in at.items():
        inner = getattr(parents[place], place.rpartition(".")[2])
        for one in sorted(ones, key=lambda one: one.path):
            one.layer.base_layer = inner
            setattr(one.layer, _PATH, one.path)
            inner = one.layer
        setattr(parents[place], place.rpartition(".")[2], inner)


_PATH = "mixture_path"  # of a layer: the numbers of the parts that it belongs to


def check_nested(wrapped: Iterable[Wrapped]) -> None:
    """Refuse a layer that would pass over another part's: one around it that reads weights instead of calling it.

    Raises:
        ValueError: There is one; the message names both places.
    """
    ordered = sorted(wrapped, key=lambda one: one.path)
    for outer in (one for one in ordered if not calls_its_layer(one.layer)):
        for inner in ordered:
            inside = inner.place.startswith(f"{outer.place}.")
            if inside or (inner.place == outer.place and ordered.index(inner) < ordered.index(outer)):
                raise ValueError(
                    f"One part computes '{outer.place}' from the frozen weights and would pass over what another does "
                    f"at '{inner.place}' before it. Give it first."
                )


def calls_its_layer(layer: BaseTunerLayer) -> bool:
    """Whether a tuner's layer calls the layer that it wraps, so that this may be another tuner's."""
    if getattr(layer, "hands_on", False):  # its adapter lies in the weights
        return True
    if isinstance(layer, OwnLayer):
        return not isinstance(layer, ExchangedLayer)
    return isinstance(layer, LoraLayer) and not any(layer.use_dora.values())
