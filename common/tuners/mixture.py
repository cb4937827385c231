"""Several tuners on one model as one PEFT adapter: each on layers of its own, saved, loaded and disabled together."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn, cast

from peft import PeftConfig, mapping
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from common.tuners._base import OwnConfig

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


class MixtureModel(BaseTuner):
    """The tuner that PEFT builds from a `MixtureConfig`: it lets each part's own tuner wrap its layers.

    PEFT finds adapter tensors, disables and merges layer by layer, whatever the layers' types, so the parts need no
    further care once they stand. No layer may be in two parts.
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
        targeted: set[str] = set()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            for part in config.built():
                kind = mapping.PEFT_TYPE_TO_TUNER_MAPPING[part.peft_type]  # ty: ignore[invalid-argument-type]
                tuner = kind(model, part, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
                model.__dict__.pop("peft_config", None)  # else the next part's tuner would take it for its own
                names = set(tuner.targeted_module_names)
                if twice := sorted(targeted & names):
                    raise ValueError(f"Two parts of the mixture act on '{twice[0]}'.")
                targeted |= names
        if known is not None:
            model.__dict__["peft_config"] = known
        self.targeted_module_names = sorted({*self.targeted_module_names, *targeted})
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

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
