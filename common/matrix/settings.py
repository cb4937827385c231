"""With which settings the matrix tries the methods: their defaults, but for what a tiny network cannot take."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from common.methods import METHODS, LoRA, MethodSpec, NormTuning

# Settings in place of a method's defaults, each with its reason.
TINY: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "Mixture": {"parts": [LoRA(), NormTuning()]},  # a composed method is what it is composed of
        "PerGroup": {"groups": [[NormTuning()], [LoRA()]]},
        "AtBudget": {"method": LoRA(), "share": 0.02, "tolerance": 99.0},  # one rank may be more than the share here
        "UniLoRA": {"rank": 1, "length": 512},  # else three steps of one vector hardly change a network of this size
    }
)

# Methods whose start changes the output by design, each with its reason. All others have to start as the bare network.
CHANGES_AT_START: Mapping[str, str] = MappingProxyType(
    {
        "VBLoRA": "the vector bank is not zero at the start, as in the paper",
        "UniLoRA": "the one trained vector is not zero at the start, as in the paper",
        "VPTShallow": "a prompt is seen from the start",
        "VPTDeep": "a prompt is seen from the start",
        "PromptTuning": "a prompt is seen from the start",
        "PrefixTuning": "keys and values near zero take weight off the own ones",
        "Stack": "it starts where the first adapter ended",
        "AdapterFusion": "it starts near the mean of the adapters",
        "MAM": "its prefixes take weight off the own keys",
        "UniPELT": "its prefixes take weight off the own keys",
    }
)

# Where the roles that a method takes by default are refused, these are tried in turn.
ROLES = (["all"], ["attention", "ffn"], ["conv"], ["recurrent"], ["attention"], ["ffn"], ["stem"])


def candidates(method: str) -> Iterator[tuple[MethodSpec, str]]:
    """Yield the settings to try on a network, the first that is not refused counts; with a remark on each.

    Args:
        method: A name of `METHODS`.
    """
    spec = METHODS[method](**TINY.get(method, {}))
    yield spec, ""
    if any(field.name == "on" for field in dataclasses.fields(spec)) and "on" not in TINY.get(method, {}):
        for on in ROLES:
            if on != getattr(spec, "on", None):
                yield dataclasses.replace(spec, **{"on": list(on)}), f"with `on: [{', '.join(on)}]`"
