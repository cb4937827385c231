"""Numbers of a study file: what is read, and what is noted where they are wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, cast


def show(value: object) -> str:
    """Word a value of a file as people wrote it."""
    return json.dumps(value, default=str, ensure_ascii=False)


def as_list(value: object) -> list[Any]:
    """Read a list, or one value as a list of its own."""
    return cast(list[Any], value) if isinstance(value, list) else [value]


def read_rates(value: object, where: str, problems: list[str]) -> tuple[float, ...]:
    """Read learning rates."""
    return _distinct(value, lambda n: n > 0, f"lr of {where}", "one or more numbers above 0, as in [1.0e-3]", problems)


def read_decays(value: object, where: str, problems: list[str]) -> tuple[float, ...]:
    """Read weight decays."""
    asked = "one or more numbers, 0 or above, as in [0, 0.05]"
    return _distinct(value, lambda n: n >= 0, f"weight_decay of {where}", asked, problems)


def read_budgets(value: object, where: str, problems: list[str]) -> tuple[float, ...]:
    """Read shares of a backbone's parameters; an empty list is none."""
    if value == []:
        return ()
    asked = (
        "shares of the backbone's parameters, above 0 and below 1, as in [0.003, 0.01]; [] leaves methods as they are"
    )
    return _distinct(value, lambda n: 0 < n < 1, where, asked, problems)


def read_integers(value: object, where: str, problems: list[str]) -> tuple[int, ...]:
    """Read whole numbers of 0 or above."""
    numbers = as_list(value)
    if not numbers or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
        problems.append(f"{where} is {show(value)}: give whole numbers, 0 or more")
        return ()
    if len(set(numbers)) < len(numbers):
        problems.append(f"{where} is {show(value)}: give each number once")
    return tuple(numbers)


def _distinct(
    value: object, allowed: Callable[[float], bool], where: str, asked: str, problems: list[str]
) -> tuple[float, ...]:
    """Read finite numbers, each allowed and given once; note a problem and return none otherwise."""
    values = as_list(value)
    good = [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)]
    if not values or len(good) < len(values) or not all(map(allowed, good)):
        problems.append(f"{where} is {show(value)}: give {asked}")
        return ()
    if len(set(good)) < len(good):
        problems.append(f"{where} is {show(value)}: give each number once")
        return ()
    return tuple(good)
