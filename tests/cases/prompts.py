"""Cases of `common/methods/prompts.py`."""

from __future__ import annotations

from tests.cases._case import Case, toy

_WIDTH = 8  # channels of the toy's tokens


def _shallow(spec, model, targets):
    return spec.length * _WIDTH


def _deep(spec, model, targets):
    return len(targets) * spec.length * _WIDTH


def _prefix(spec, model, targets):
    return len(targets) * (2 * spec.length * _WIDTH + spec.gate)


_PROMPT = {
    "mergeable": False,
    "random_start": True,
    "starts_elsewhere": True,
    "without_family": r"belongs to no family that Graft knows. Choose another method",
}

CASES = {
    "VPTShallow": Case(toy=toy("VPTShallow"), zoo=None, total=_shallow, **_PROMPT),
    "VPTDeep": Case(toy=toy("VPTDeep"), zoo=None, total=_deep, **_PROMPT),
    "VPTDeep-first": Case(toy=toy("VPTDeep", blocks="first:2", dropout=0.0), zoo=None, total=_deep, **_PROMPT),
    "PromptTuning": Case(toy=toy("PromptTuning"), zoo=None, total=_shallow, **_PROMPT),
    "PrefixTuning": Case(toy=toy("PrefixTuning"), zoo=None, total=_prefix, **_PROMPT),
    "PrefixTuning-gate": Case(
        toy=toy("PrefixTuning", gate=True, blocks="last:2"),
        zoo=None,
        total=_prefix,
        **_PROMPT | {"starts_elsewhere": False},
    ),
}
