"""The branches of the surveys' taxonomy (arXiv 2403.14608, 2404.13506), and the methods on each."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from common.methods import METHODS

BRANCHES: Mapping[str, str] = MappingProxyType(
    {
        "baseline": "What PEFT is measured against: everything trains, or the head alone.",
        "selective": "A chosen part of the network's own parameters trains.",
        "reparameterised": "A change of the weights is trained in a form of few parameters, and merges into them.",
        "additive": "Small new modules beside or behind frozen ones, or learned scales of what they compute.",
        "prompts": "Trained vectors stand beside the tokens of the input or of the layers.",
        "hybrid": "Several of the above at once, or one chosen by training.",
    }
)
"""Branch to one line on it, in the order in which they are shown."""


def by_branch(names: Mapping[str, str] | None = None) -> dict[str, list[str]]:
    """Group methods by branch; branches without methods are left out, unknown ones come last.

    Args:
        names: Method to branch; None takes all of `METHODS`.
    """
    branch_of = names if names is not None else {name: spec.taxonomy for name, spec in METHODS.items()}
    order = dict.fromkeys((*BRANCHES, *branch_of.values()))
    groups = {branch: [name for name, own in branch_of.items() if own == branch] for branch in order}
    return {branch: methods for branch, methods in groups.items() if methods}
