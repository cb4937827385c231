"""What is known of every method at toy size, one file a family of `common/methods`: the tests over all methods read it.

A new method is one entry in its family's file; `test_every_method_has_a_case` fails without.
"""

from __future__ import annotations

from tests.cases import additive, hybrid, reparameterised, selective
from tests.cases._case import Case

CASES: dict[str, Case] = {**selective.CASES, **additive.CASES, **reparameterised.CASES, **hybrid.CASES}

__all__ = ["CASES", "Case"]
