"""Tuner types that PEFT lacks, written as PEFT tuners and registered in one place.

Importing this package makes them loadable by `peft.PeftModel.from_pretrained` like PEFT's own. PEFT's public
registration refuses names outside its enum, so the three mappings of `peft.mapping` are extended here; a contract test
guards that against a change of PEFT.
"""

from __future__ import annotations

from typing import Any, cast

from peft import mapping

from common.tuners.bitfit import BITFIT, BitFitConfig, BitFitModel

__all__ = ["BITFIT", "BitFitConfig", "BitFitModel"]


def _register(name: str, config: type[Any], model: type[Any]) -> None:
    key = cast("Any", name)
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[key] = config
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[key] = model
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[key] = model.prefix


_register(BITFIT, BitFitConfig, BitFitModel)
