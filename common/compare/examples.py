"""Scores of single test examples, read off `predictions.jsonl`: a metric as a function of how often each one counts.

A run's rows do not say which metric they are the parts of, so every way to compute it that fits its name is tried, and
one is believed when it gives the number that the run recorded. Segmentation that pools its voxels over the split, for
one, cannot be put together from rows; then only seeds are resampled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from common.compare.statistics import Floats, Weighted

Rows = Sequence[Mapping[str, Any]]
FEWEST = 10  # examples; resampling less says little
_EXACT = 2e-5  # rows are rounded to six digits, metrics are single precision
_RANKED = 5e-3  # rounding makes ties, which change ranks a little


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A metric put together from examples.

    Attributes:
        ids: The examples' names, in the order of the weights.
        metric: The metric as a function of weights (R, n).
        scores: Each example's own score where the metric is their mean, else None.
    """

    ids: tuple[str, ...]
    metric: Weighted
    scores: Floats | None


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Read the rows of a run's predictions; none where it left none."""
    path = folder / "predictions.jsonl"
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def scored(rows: Rows, name: str, recorded: float) -> Scored | None:
    """Find how a metric is put together from a run's rows.

    Args:
        rows: The rows.
        name: The metric.
        recorded: What the run says it is.

    Returns:
        The metric; None where no way leads to the recorded value, or where there are too few rows.
    """
    ids = tuple(str(row.get("id")) for row in rows)
    if len(ids) < FEWEST or len(set(ids)) < len(ids):
        return None
    everyone = np.ones((1, len(ids)))
    for made, tolerance in _ways(rows, name):
        if abs(float(made.metric(everyone)[0]) - recorded) <= tolerance:
            return Scored(ids=ids, metric=made.metric, scores=made.scores)
    return None


def contradicts(rows: Rows, name: str, recorded: float) -> float | None:
    """Recompute a metric that single answers decide, and compare it with what the run recorded.

    Args:
        rows: The run's rows.
        name: The metric.
        recorded: What the run says it is.

    Returns:
        The value that the rows give where it is another one; None where they agree or decide nothing (accuracy and
        word errors are decided by the rows, nothing else is).
    """
    if not rows or not (name == "accuracy" or name.startswith("wer_")):
        return None
    everyone = np.ones((1, len(rows)))
    values = [float(made.metric(everyone)[0]) for made, _ in _ways(rows, name) if made.decisive]
    if not values or any(abs(value - recorded) <= _EXACT for value in values):
        return None
    return values[0]


@dataclass(frozen=True, kw_only=True)
class _Way:
    metric: Weighted
    scores: Floats | None = None
    decisive: bool = False  # it is what the metric is, whatever else the rows may hold


def _ways(rows: Rows, name: str) -> Iterator[tuple[_Way, float]]:
    """Yield the ways to put a metric together that fit its name and the rows, with their tolerance."""
    answers = _answers(rows)
    if answers is not None and name == "accuracy":
        right = (answers[0] == answers[1]).astype(np.float64)
        yield replace(_mean(right), decisive=True), _EXACT
    if answers is not None and name in _OF_CLASSES:
        yield _Way(metric=_OF_CLASSES[name](*answers)), _EXACT
    letters = _letters(rows) if name == "accuracy" else None
    if letters is not None:
        yield _Way(metric=_ratio(*letters), decisive=True), _EXACT
    counts = (_column(rows, "errors"), _column(rows, "words"))
    if name.startswith("wer_") and counts[0] is not None and counts[1] is not None:
        yield _Way(metric=_ratio(counts[0], counts[1]), decisive=True), _EXACT
    own = _column(rows, name)
    if own is not None:
        yield _mean(own), _EXACT
    two = _two_classes(rows) if name == "auroc" else None
    if two is not None:
        yield _Way(metric=_auroc(*two)), _RANKED
    pair = (_column(rows, "label"), _column(rows, "prediction"))
    if name == "spearman" and pair[0] is not None and pair[1] is not None:
        yield _Way(metric=_spearman(pair[0], pair[1])), _RANKED


def _column(rows: Rows, key: str) -> Floats | None:
    values = [row.get(key) for row in rows]
    if not values or not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return None
    return np.array(values, dtype=np.float64)


def _answers(rows: Rows) -> tuple[np.ndarray, np.ndarray] | None:
    """Number the true and the predicted class of each row; None where rows have none."""
    pairs = [(row.get("label"), row.get("prediction")) for row in rows]
    if not pairs or not all(isinstance(label, str) and isinstance(found, str) for label, found in pairs):
        return None
    _, places = np.unique(np.array([str(one) for pair in pairs for one in pair]), return_inverse=True)
    return places[::2], places[1::2]


def _letters(rows: Rows) -> tuple[Floats, Floats] | None:
    """Count right and judged letters of rows whose labels are one letter a residue ("." for none)."""
    if not all(isinstance(row.get("label"), str) and isinstance(row.get("prediction"), str) for row in rows):
        return None
    pairs = [[(a, b) for a, b in zip(row["label"], row["prediction"], strict=False) if a != "."] for row in rows]
    right = np.array([sum(a == b for a, b in pair) for pair in pairs], dtype=np.float64)
    return right, np.array([len(pair) for pair in pairs], dtype=np.float64)


def _two_classes(rows: Rows) -> tuple[Floats, Floats] | None:
    """The probability of the second class, by the order of names, and whether it is true; None for other classes."""
    answers, probability = _answers(rows), _column(rows, "probability")
    if answers is None or probability is None or set(answers[0]) != {0, 1} or answers[1].max() > 1:
        return None
    return np.where(answers[1] == 1, probability, 1 - probability), answers[0].astype(np.float64)


def _mean(scores: Floats) -> _Way:
    return _Way(metric=_ratio(scores, np.ones_like(scores)), scores=scores)


def _ratio(above: Floats, below: Floats) -> Weighted:
    def metric(weights: Floats) -> Floats:
        with np.errstate(invalid="ignore", divide="ignore"):
            return (weights @ above) / (weights @ below)

    return metric


def _by_class(truth: np.ndarray, found: np.ndarray) -> Callable[[Floats], tuple[Floats, Floats, Floats]]:
    """Count by class (R, K) what is right, what is there and what is predicted."""
    classes = np.arange(max(truth.max(), found.max()) + 1)
    there, said = (truth[:, None] == classes).astype(np.float64), (found[:, None] == classes).astype(np.float64)
    right = there * said
    return lambda weights: (weights @ right, weights @ there, weights @ said)


def _recall(truth: np.ndarray, found: np.ndarray) -> Weighted:
    """Mean recall of the classes that are there."""
    count = _by_class(truth, found)

    def metric(weights: Floats) -> Floats:
        right, there, _ = count(weights)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.nanmean(np.where(there > 0, right / there, np.nan), axis=1)

    return metric


def _macro_f1(truth: np.ndarray, found: np.ndarray) -> Weighted:
    """Mean F1 of the classes that are there or predicted."""
    count = _by_class(truth, found)

    def metric(weights: Floats) -> Floats:
        right, there, said = count(weights)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.nanmean(np.where(there + said > 0, 2 * right / (there + said), np.nan), axis=1)

    return metric


_OF_CLASSES: Mapping[str, Callable[[np.ndarray, np.ndarray], Weighted]] = {"uar": _recall, "macro_f1": _macro_f1}


def _auroc(scores: Floats, truth: Floats) -> Weighted:
    """The chance that an example of the second class scores above one of the first, ties counting half."""
    order, starts = _tied(scores)
    positive = truth[order]

    def metric(weights: Floats) -> Floats:
        sorted_weights = weights[:, order]
        ups = np.add.reduceat(sorted_weights * positive, starts, axis=1)
        downs = np.add.reduceat(sorted_weights * (1 - positive), starts, axis=1)
        below = np.cumsum(downs, axis=1) - downs / 2
        with np.errstate(invalid="ignore", divide="ignore"):
            return (ups * below).sum(axis=1) / (ups.sum(axis=1) * downs.sum(axis=1))

    return metric


def _spearman(truth: Floats, found: Floats) -> Weighted:
    """Pearson's correlation of weighted ranks, ties sharing theirs."""
    ranks = (_ranks(truth), _ranks(found))

    def metric(weights: Floats) -> Floats:
        one, two = (rank(weights) for rank in ranks)
        total = weights.sum(axis=1, keepdims=True)
        one = one - (weights * one).sum(axis=1, keepdims=True) / total
        two = two - (weights * two).sum(axis=1, keepdims=True) / total
        with np.errstate(invalid="ignore", divide="ignore"):
            spread = np.sqrt((weights * one**2).sum(axis=1) * (weights * two**2).sum(axis=1))
            return (weights * one * two).sum(axis=1) / spread

    return metric


def _ranks(values: Floats) -> Weighted:
    """Mean rank (R, n) of each example where every one counts as often as its weight says."""
    order, starts = _tied(values)
    lengths = np.diff([*starts, len(values)])
    back = np.argsort(order)

    def rank(weights: Floats) -> Floats:
        sums = np.add.reduceat(weights[:, order], starts, axis=1)
        last = np.cumsum(sums, axis=1)
        return np.repeat(last - (sums - 1) / 2, lengths, axis=1)[:, back]

    return rank


def _tied(values: Floats) -> tuple[np.ndarray, np.ndarray]:
    """Sort values: their order, and where each group of equal ones starts."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    return order, np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
