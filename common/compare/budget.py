"""Equal budgets: each method of a comparison once for each number of trainable parameters, sized to meet it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from common.compare.study import Method, method_of
from common.errors import GraftError

_SIZER = "AtBudget"
_SHARE = re.compile(r"(\d+(?:\.\d+)?)\s*%")


def at_budgets(method: Method, shares: Sequence[float]) -> list[Method]:
    """Make of one method as many as there are budgets, each named after its own.

    Args:
        method: The method; one of `AtBudget` keeps its other settings.
        shares: Wanted shares of the backbone's parameters, in (0, 1); none to leave the method as it is.
    """
    if not shares:
        return [method]
    sized = method_of(method.peft) == _SIZER
    settings = dict(method.peft.get("init_args") or {}) if sized else {"method": dict(method.peft)}
    return [
        replace(
            method,
            name=f"{method.name}-{100 * share:g}percent",
            peft={"class_path": _SIZER, "init_args": {**settings, "share": share}},
        )
        for share in shares
    ]


def percentage(text: str) -> float | None:
    """Read `0.3%` or `0.3 %` as a share; None where it is no percentage."""
    found = _SHARE.fullmatch(text)
    return float(found[1]) / 100 if found else None


def parse_budgets(text: str) -> tuple[float, ...]:
    """Read `0.3%,1%`.

    Raises:
        GraftError: If one is no percentage above 0 and below 100, or stands twice.
    """
    shares = [percentage(one.strip()) or 0.0 for one in text.split(",")]
    if not all(0 < share < 1 for share in shares) or len(set(shares)) < len(shares):
        raise GraftError(
            f"--budget {text} is not understood. Give different percentages of the backbone's parameters, as 0.3%,1%."
        )
    return tuple(shares)
