"""What is known of every method at toy size, one file a family of `common/methods`: the tests over all methods read it.

A new method is one entry in its family's file; `test_every_method_has_a_case` fails without.
"""

from __future__ import annotations

import pytest

from common.methods import METHODS
from tests.cases import additive, hybrid, prompts, reparameterised, selective
from tests.cases._case import Case

_FAMILIES = (selective, additive, reparameterised, prompts, hybrid)
CASES: dict[str, Case] = {name: case for family in _FAMILIES for name, case in family.CASES.items()}

# Methods that act on the toy with some settings.
ON_TOY = [name for name in METHODS if CASES[name].toy is not None]
# Methods of linear layers alone: a network of convolutions refuses them.
LINEAR_ONLY = tuple(name for name, spec in METHODS.items() if getattr(spec, "acts_on", ()) == ("Linear",))
# Methods that differ from LoRA by their formula and act on the same layers.
ALIKE = {name for name in reparameterised.CASES if name in METHODS} - {"LoRA", "VeRA"}


# Methods that need no exported adapter to be built on, which would have to be written for each network first.
STANDALONE = [name for name, spec in METHODS.items() if not spec.needs_adapters]


def on_networks(networks, first, methods=STANDALONE):
    """Every method on every network; those alike see the first networks only, and all of them with `--slow`."""

    def cell(key, method):
        slow = method in ALIKE and key not in first
        return pytest.param(key, method, marks=[pytest.mark.slow] if slow else [], id=f"{key}-{method}")

    return [cell(key, method) for key in networks for method in methods]


__all__ = ["ALIKE", "CASES", "LINEAR_ONLY", "ON_TOY", "STANDALONE", "Case", "on_networks"]
