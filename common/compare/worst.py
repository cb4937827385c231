"""The class and the group that fare worst: a mean over examples or classes may hide one that a method fails.

A class of a classification is measured by its recall, counted in the rows of `predictions.jsonl`; of a segmentation by
the Dice that its runs record (`dice_<class>` beside `dice`). A group is what rows call `group` (a speaker, a subject, a
site, a family), and is measured by the metric that decides, put together from its rows alone as `examples` does from
all; only groups of at least `FEWEST` test examples count, since a share of fewer says little: that of 10 has a standard
error of up to 0.16.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from common.compare.examples import FEWEST, scored


@dataclass(frozen=True, kw_only=True)
class Worst:
    """The worst class or group of a method.

    Attributes:
        measure: What it is measured by: `recall`, `dice`, or for groups the metric that decides.
        values: Each seed's worst number, whichever class or group has it.
        name: The class or group of the worst mean over the seeds.
        examples: Its test examples at the first seed; None where they are not counted.
        mode: Whether more of the measure is better, or less.
    """

    measure: str
    values: tuple[float, ...]
    name: str
    examples: int | None
    mode: Literal["max", "min"] = "max"


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
    return _worst(by_class, measure, "max", examples)


def worst_group(
    rows: Sequence[Sequence[Mapping[str, Any]]],
    tests: Sequence[Mapping[str, float]],
    metric: str,
    mode: Literal["max", "min"],
) -> Worst | None:
    """Find the worst group of one method.

    Args:
        rows: The rows of each seed's predictions.
        tests: The test metrics of each seed.
        metric: The metric that decides.
        mode: Whether more of it is better, or less.

    Returns:
        The worst group; None where a seed has fewer than two groups with enough examples, or where the metric cannot be
        put together from rows.
    """
    by_group = [_of_groups(own, metric, test) for own, test in zip(rows, tests, strict=True)]
    examples = Counter(str(row.get("group")) for row in rows[0]) if rows else Counter[str]()
    return _worst(by_group, metric, mode, examples)


def _worst(
    found: Sequence[Mapping[str, float]], measure: str, mode: Literal["max", "min"], examples: Mapping[str, int]
) -> Worst | None:
    """Take the worst of each seed's numbers by name."""
    if not found or any(len(own) < 2 for own in found):
        return None
    sign = 1.0 if mode == "max" else -1.0
    names = dict.fromkeys(name for own in found for name in own)
    means = {name: statistics.fmean(own[name] for own in found if name in own) for name in names}
    name = min(means, key=lambda one: sign * means[one])
    values = tuple(sign * min(sign * value for value in own.values()) for own in found)
    return Worst(measure=measure, values=values, name=name, examples=examples.get(name), mode=mode)


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


def _of_groups(rows: Sequence[Mapping[str, Any]], metric: str, test: Mapping[str, float]) -> dict[str, float]:
    """The metric on each group's rows; a group that has none, such as an AUROC of one class, is left out."""
    groups = [row.get("group") for row in rows]
    names = [name for name, count in Counter(groups).items() if name and count >= FEWEST]
    made = scored(rows, metric, test[metric]) if names and metric in test else None
    if made is None:
        return {}
    values = made.metric(np.array([[group == name for group in groups] for name in names], dtype=np.float64))
    return {str(name): float(value) for name, value in zip(names, values, strict=True) if math.isfinite(value)}
