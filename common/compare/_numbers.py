"""Numbers of a study file: what is read, and what is noted where they are wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, cast


def show(value: object) -> str:
    """Word a value of a file as people wrote it."""
    return json.dumps(value, default=str, ensure_ascii=False)


def as_list(value: object) -> list[Any]:
    """Read a list, or one value as a list of its own."""
    return cast(list[Any], value) if isinstance(value, list) else [value]


def read_rates(value: object, where: str, problems: list[str]) -> tuple[float, ...]:
    """Read learning rates."""
    good = _numbers(as_list(value))
    if good is None or min(good) <= 0:
        problems.append(f"lr of {where} is {show(value)}: give one or more numbers above 0, as in [1.0e-3]")
        return ()
    if len(set(good)) < len(good):
        problems.append(f"lr of {where} is {show(value)}: give each learning rate once")
    return tuple(good)


def read_decays(value: object, where: str, problems: list[str]) -> tuple[float, ...]:
    """Read weight decays."""
    good = _numbers(as_list(value))
    if good is None or min(good) < 0:
        problems.append(
            f"weight_decay of {where} is {show(value)}: give one or more numbers, 0 or above, as in [0, 0.05]"
        )
        return ()
    if len(set(good)) < len(good):
        problems.append(f"weight_decay of {where} is {show(value)}: give each weight decay once")
    return tuple(good)


def read_budgets(value: object, where: str, problems: list[str]) -> tuple[float, ...]:
    """Read shares of a backbone's parameters; an empty list is none."""
    if value == []:
        return ()
    good = _numbers(as_list(value))
    if good is None or not all(0 < share < 1 for share in good) or len(set(good)) < len(good):
        problems.append(
            f"{where} is {show(value)}: give different shares of the backbone's parameters, above 0 and below 1, "
            "as in [0.003, 0.01]; [] leaves methods as they are"
        )
        return ()
    return tuple(good)


def read_integers(value: object, where: str, problems: list[str]) -> tuple[int, ...]:
    """Read whole numbers of 0 or above."""
    numbers = as_list(value)
    if not numbers or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
        problems.append(f"{where} is {show(value)}: give whole numbers, 0 or more")
        return ()
    if len(set(numbers)) < len(numbers):
        problems.append(f"{where} is {show(value)}: give each number once")
    return tuple(numbers)


def _numbers(values: Sequence[object]) -> list[float] | None:
    """Read finite numbers; None where there is none, or one is something else."""
    good = [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)]
    return good if good and len(good) == len(values) else None
