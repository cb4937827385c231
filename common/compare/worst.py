"""The class that fares worst: a mean over examples or classes may hide one that a method fails.

Of a classification it is the recall by class, counted in the rows of `predictions.jsonl`; of a segmentation the Dice by
class that its runs record (`dice_<class>` beside `dice`).
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Worst:
    """The worst class of a method.

    Attributes:
        measure: What its classes are measured by: `recall` or `dice`.
        values: Each seed's lowest number, whichever class has it.
        name: The class of the lowest mean over the seeds.
        examples: Its test examples at the first seed; None where they are not counted.
    """

    measure: str
    values: tuple[float, ...]
    name: str
    examples: int | None


def worst_class(
    rows: Sequence[Sequence[Mapping[str, Any]]], tests: Sequence[Mapping[str, float]], classes: Sequence[str]
) -> Worst | None:
    """Find the worst class of one method.

    Args:
        rows: The rows of each seed's predictions.
        tests: The test metrics of each seed.
        classes: The names of the classes; rows whose labels are none of them are no answers of one class each.

    Returns:
        The worst class; None where a seed has no numbers by class, or numbers of fewer than two classes.
    """
    by_class = [_dice(one) for one in tests]
    measure, examples = "dice", Counter[str]()
    if not all(by_class):
        by_class, measure = [_recall(one, set(classes)) for one in rows], "recall"
        examples = Counter(str(row["label"]) for row in rows[0]) if rows and all(by_class) else examples
    if not by_class or any(len(found) < 2 for found in by_class):
        return None
    names = dict.fromkeys(name for found in by_class for name in found)
    means = {name: statistics.fmean(found[name] for found in by_class if name in found) for name in names}
    name = min(means, key=lambda one: means[one])
    lowest = tuple(min(found.values()) for found in by_class)
    return Worst(measure=measure, values=lowest, name=name, examples=examples.get(name))


def _dice(test: Mapping[str, float]) -> dict[str, float]:
    found = {name.removeprefix("dice_"): value for name, value in test.items() if name.startswith("dice_")}
    return {name: value for name, value in found.items() if math.isfinite(value)} if "dice" in test else {}


def _recall(rows: Sequence[Mapping[str, Any]], classes: set[str]) -> dict[str, float]:
    """The share of each class's examples that is found; nothing where rows are not one class each."""
    pairs = [(row.get("label"), row.get("prediction")) for row in rows]
    if not all(isinstance(label, str) and label in classes and isinstance(said, str) for label, said in pairs):
        return {}
    there = Counter(str(label) for label, _ in pairs)
    right = Counter(str(label) for label, said in pairs if label == said)
    return {name: right[name] / count for name, count in there.items()}
