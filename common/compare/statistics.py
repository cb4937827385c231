"""Statistics of comparisons: intervals, paired tests, ranks over studies, Pareto fronts, distances to a reference.

What varies. A result is a metric of a trained model on test examples. Another seed would give another model, and other
examples of the same kind another number; both are accounted for. Seeds are taken as they are paired (one seed starts
and orders all methods alike), examples as they are shared by all runs of a seed.

How. The bootstrap draws seeds and, independently, test examples with replacement, the same draws for every method
(crossed; where each seed has test data of its own, examples are drawn within it). A bootstrap over a handful of seeds
is too narrow, by sqrt((S - 1) / S) and because normal quantiles stand where Student's belong; the seeds' deviations are
widened by both (the expanded percentile interval of Hesterberg 2015, arXiv 1411.5279). A paired test divides the
difference by its standard error, whose square is the sum of the seeds' part, s^2 / S, and the examples' part, from the
bootstrap, and looks it up in Student's t with Welch-Satterthwaite degrees of freedom. Both parts hold what seed and
example do together, so the test errs on the side of not telling methods apart.

This file knows numbers only; `evidence` takes them from runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Weighted = Callable[[Floats], Floats]
"""A metric as a function of how often each example counts: weights (R, n) to values (R,)."""

REPEATS = 1000
LEVEL = 0.95
_SEED = 20260
_BLOCK = 2_000_000  # weights at a time, so that memory stays small with many examples
_EXACT = 14  # all 2^n signs are tried up to this many differences


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One method's results on one set.

    Attributes:
        seeds: The S seeds.
        values: The metric of each seed's run, (S,).
        weighted: The metric of each seed's run as a function of the weights of n test examples; empty where the runs
            left no scores of examples.
        sizes: n for each seed; empty as `weighted`.
        nested: Whether each seed has test examples of its own.
    """

    seeds: tuple[int, ...]
    values: Floats
    weighted: tuple[Weighted, ...] = ()
    sizes: tuple[int, ...] = ()
    nested: bool = False

    @cached_property
    def drawn(self) -> Floats:
        """The metric of each seed's run on resampled examples, (S, `REPEATS`); the same draws for every method."""
        found = np.repeat(self.values[:, None], REPEATS, axis=1)
        if not self.weighted:
            return found
        # Generators of the same start give paired draws for all methods, and for all seeds crossed ones.
        starts = [(_SEED, seed) for seed in self.seeds] if self.nested else [(_SEED, 0)]
        for place, start in enumerate(starts):
            own = range(place, place + 1) if self.nested else range(len(self.seeds))
            for first, weights in _draws(self.sizes[place], start):
                for run in own:
                    found[run, first : first + len(weights)] = self.weighted[run](weights)
        # Where a draw lacks what the metric needs (a class), it says nothing: the run's own value stands for it.
        return np.where(np.isfinite(found), found, self.values[:, None])

    def on(self, seeds: Sequence[int]) -> Sample:
        """Keep some seeds, in the given order."""
        if tuple(seeds) == self.seeds:
            return self
        places = [self.seeds.index(seed) for seed in seeds]
        return Sample(
            seeds=tuple(seeds),
            values=self.values[places],
            weighted=tuple(self.weighted[place] for place in places) if self.weighted else (),
            sizes=tuple(self.sizes[place] for place in places) if self.weighted else (),
            nested=self.nested,
        )


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Where a mean may lie, by `LEVEL`, and what was resampled for it (`seeds`, `examples`, `seeds and examples`)."""

    low: float
    high: float
    over: str


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The difference of two methods' means.

    Attributes:
        value: First minus second, in the metric's unit.
        low: Lower end of its interval.
        high: Upper end.
        p: Two-sided p of no difference.
        over: What the standard error accounts for: `seeds`, `examples` or `seeds and examples`.
    """

    value: float
    low: float
    high: float
    p: float
    over: str


def interval(sample: Sample) -> Interval | None:
    """Bootstrap the mean over the seeds: the expanded percentile interval; see the module.

    Args:
        sample: The results.

    Returns:
        The interval; None for one seed without scores of examples, and where a value is not finite.
    """
    over = _over(sample)
    if not over or not np.isfinite(sample.values).all():
        return None
    low, high = np.quantile(resampled(sample), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(low=float(low), high=float(high), over=over)


def resampled(sample: Sample) -> Floats:
    """Draw the mean over the seeds anew, (`REPEATS`,); the same draws for every method on the same sets."""
    count = len(sample.seeds)
    share = np.random.default_rng(_SEED).multinomial(count, [1 / count] * count, size=REPEATS) / count  # (R, S)
    weights = 1 / count + _widening(count) * (share - 1 / count)
    return (weights.T * sample.drawn).sum(axis=0)


def difference(first: Sample, second: Sample) -> Difference | None:
    """Test whether two methods differ, paired by seed and by example; see the module.

    Args:
        first: One method's results.
        second: The other's, on the same sets; only seeds that both have are compared.

    Returns:
        The difference; None where nothing is known about its spread, or a value is not finite.
    """
    seeds = [seed for seed in first.seeds if seed in second.seeds]
    if not seeds:
        return None
    one, two = first.on(seeds), second.on(seeds)
    gaps = one.values - two.values
    if not np.isfinite(gaps).all():
        return None
    parts: list[tuple[str, float, float]] = []  # what varies, variance of the mean, degrees of freedom
    if len(seeds) > 1:
        parts.append(("seeds", float(gaps.var(ddof=1)) / len(seeds), len(seeds) - 1.0))
    if _paired(one, two):
        drawn = (one.drawn - two.drawn).mean(axis=0)
        parts.append(("examples", float(drawn.var(ddof=1)), (sum(one.sizes) if one.nested else one.sizes[0]) - 1.0))
    if not parts:
        return None
    return _judge(float(gaps.mean()), parts)


def _judge(value: float, parts: Sequence[tuple[str, float, float]]) -> Difference:
    from scipy.stats import t

    over = " and ".join(name for name, _, _ in parts)
    variance = sum(part for _, part, _ in parts)
    if variance <= (1e-12 * max(1.0, abs(value))) ** 2:  # all alike: the difference is what it is
        return Difference(value=value, low=value, high=value, p=1.0 if abs(value) < 1e-12 else 0.0, over=over)
    freedom = variance**2 / sum(part**2 / degrees for _, part, degrees in parts)
    error = math.sqrt(variance)
    reach = float(t.ppf((1 + LEVEL) / 2, freedom)) * error
    p = 2 * float(t.sf(abs(value) / error, freedom))
    return Difference(value=value, low=value - reach, high=value + reach, p=p, over=over)


def _over(sample: Sample) -> str:
    names = (("seeds", len(sample.seeds) > 1), ("examples", bool(sample.weighted)))
    return " and ".join(name for name, known in names if known)


def _paired(one: Sample, two: Sample) -> bool:
    return bool(one.weighted and two.weighted) and (one.sizes, one.nested) == (two.sizes, two.nested)


def _widening(count: int) -> float:
    """By how much the deviations of S resampled seeds are too small for an interval."""
    from scipy.stats import norm, t

    if count < 2:
        return 1.0
    tail = (1 + LEVEL) / 2
    return math.sqrt(count / (count - 1)) * float(t.ppf(tail, count - 1) / norm.ppf(tail))


def _draws(size: int, start: tuple[int, int]) -> Iterator[tuple[int, Floats]]:
    """Draw `REPEATS` times n of n examples: the first draw's number and how often each example came, (rows, n)."""
    rng, step = np.random.default_rng(start), max(1, _BLOCK // size)
    for first in range(0, REPEATS, step):
        rows = min(step, REPEATS - first)
        places = rng.integers(size, size=(rows, size)) + size * np.arange(rows)[:, None]
        yield first, np.bincount(places.ravel(), minlength=rows * size).reshape(rows, size).astype(np.float64)


def permutation_p(differences: Sequence[float] | Floats, repeats: int = 20_000) -> float:
    """Test by flipping signs whether paired differences are about zero: two-sided p.

    Over examples it asks about these trained models; over seeds it can never be below 2^(1 - S). All signs are tried
    for few differences, else random ones, the given ones among them.

    Args:
        differences: One for each seed or example, (n,).
        repeats: Random draws of signs.
    """
    gaps = np.asarray(differences, dtype=np.float64)
    if not gaps.size or not gaps.any():
        return 1.0
    observed = abs(gaps.mean())
    if len(gaps) <= _EXACT:
        signs = 1.0 - 2.0 * ((np.arange(2 ** len(gaps))[:, None] >> np.arange(len(gaps))) & 1)
        return float((np.abs(signs @ gaps) / len(gaps) >= observed * (1 - 1e-9)).mean())
    rng, hits, done = np.random.default_rng(_SEED), 0, 0
    while done < repeats:
        rows = min(repeats - done, max(1, _BLOCK // len(gaps)))
        signs = rng.choice([-1.0, 1.0], size=(rows, len(gaps)))
        hits += int((np.abs(signs @ gaps) / len(gaps) >= observed * (1 - 1e-9)).sum())
        done += rows
    return (hits + 1) / (repeats + 1)


def holm(values: Sequence[float]) -> list[float]:
    """Adjust p values of several tests so that the chance of any false alarm is bounded (Holm 1979).

    Args:
        values: The p values.

    Returns:
        The adjusted ones, in the same order.
    """
    order = sorted(range(len(values)), key=values.__getitem__)
    adjusted, highest = [1.0] * len(values), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[place]))
        adjusted[place] = highest
    return adjusted


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Average ranks of k methods over N sets (Demsar 2006, JMLR 7).

    Attributes:
        ranks: Average rank of each method, the best first; 1 is the best, equals share.
        sets: N.
        p: Friedman's test that all methods are alike; None with fewer than three methods or two sets.
        critical: Nemenyi's critical difference at 5 %: average ranks nearer than this are not told apart; None as `p`.
    """

    ranks: Mapping[str, float]
    sets: int
    p: float | None
    critical: float | None


def average_ranks(table: Sequence[Mapping[str, float]], better: Sequence[Literal["max", "min"]]) -> Ranking | None:
    """Rank methods on each of several sets and average.

    Args:
        table: For each set the quality of every method; methods that a set lacks are left out everywhere.
        better: For each set, whether more is better.

    Returns:
        The ranking; None where fewer than two methods are on all sets.
    """
    from scipy.stats import friedmanchisquare, rankdata, studentized_range

    names = [name for name in (table[0] if table else ()) if all(name in row for row in table)]
    if len(names) < 2:
        return None
    signed = np.array(
        [
            [-row[name] if mode == "max" else row[name] for name in names]
            for row, mode in zip(table, better, strict=True)
        ]
    )
    mean = np.mean([rankdata(row) for row in signed], axis=0)
    order = np.argsort(mean, kind="stable")
    sets, count = signed.shape
    p = critical = None
    if count > 2 and sets > 1:
        tied = (signed == signed[:, :1]).all()
        p = 1.0 if tied else float(friedmanchisquare(*signed.T).pvalue)
        quantile = float(studentized_range.ppf(0.95, count, np.inf)) / math.sqrt(2)
        critical = quantile * math.sqrt(count * (count + 1) / (6 * sets))
    return Ranking(ranks={names[place]: float(mean[place]) for place in order}, sets=sets, p=p, critical=critical)


def pareto_front(points: Sequence[tuple[float, float]], *, more_is_better: bool) -> list[int]:
    """Find the points that no other beats: none is as good or better at lower or equal cost, and better in one.

    Args:
        points: Cost and quality of each.
        more_is_better: Whether higher quality is better.

    Returns:
        Their places, from cheap to dear.
    """
    sign = 1.0 if more_is_better else -1.0

    def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
        gain, saving = sign * (one[1] - other[1]), other[0] - one[0]
        return gain >= 0 and saving >= 0 and (gain > 0 or saving > 0)

    kept = [place for place, point in enumerate(points) if not any(beats(other, point) for other in points)]
    return sorted(kept, key=points.__getitem__)


def relative_gap(value: float, reference: float, mode: Literal["max", "min"]) -> float | None:
    """How much better (above 0) or worse a result is than a reference, as a share of the reference.

    Args:
        value: The result.
        reference: The reference, full fine-tuning as a rule.
        mode: Whether more is better.

    Returns:
        (value - reference) / |reference|, its sign turned where less is better; None where the reference is 0.
    """
    if reference == 0 or not math.isfinite(value - reference):
        return None
    return (value - reference) / abs(reference) * (1 if mode == "max" else -1)
