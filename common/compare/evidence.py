"""What the runs of a recipe prove: intervals, and what is told apart from the best and from full fine-tuning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from common.compare.examples import Scored, read_rows, scored
from common.compare.results import Row, Run, direction, make_rows
from common.compare.statistics import (
    Difference,
    Floats,
    Interval,
    Ranking,
    Sample,
    Weighted,
    average_ranks,
    difference,
    holm,
    interval,
    pareto_front,
    permutation_p,
    relative_gap,
)
from common.compare.study import Study

ALPHA = 0.05
# What quality is weighed against: the name in metrics.json, in words, its unit.
COSTS: tuple[tuple[str, str, str], ...] = (
    ("params_trainable", "trainable parameters", ""),
    ("adapter_bytes", "adapter file", "B"),
    ("memory_total", "training memory", "B"),
    ("flops_per_step", "FLOPs of a step", ""),
    ("fit_seconds", "time of a fit", "s"),
)


@dataclass(frozen=True, kw_only=True)
class Tested:
    """A method against another, among several such tests.

    Attributes:
        difference: The difference of the means and its own p.
        p: The p, adjusted by Holm for all methods that were compared with the same one.
        permutation: p by flipping signs of the examples' differences, which speaks of these trained models alone; None
            where the metric is no mean over examples.
    """

    difference: Difference
    p: float
    permutation: float | None

    @property
    def apart(self) -> bool:
        """Whether the two are told apart."""
        return self.p < ALPHA


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The methods and baselines of one recipe on the test split, by the metric that decides.

    Attributes:
        metric: The metric.
        mode: Whether more of it is better, or less.
        means: Every method's mean over its seeds; methods that diverged are not in it.
        samples: Every method's results.
        intervals: Where each method's mean may lie; methods without spread are not in it.
        best: The trained method of the best mean; "" where there is none.
        to_best: Each other method against the best one.
        full: Full fine-tuning; "" where it is not among the methods.
        to_full: Each other method against full fine-tuning.
        gaps: Each method's relative gap to full fine-tuning; above 0 is better.
        fronts: For each cost the methods on its Pareto front.
    """

    metric: str
    mode: Literal["max", "min"]
    means: Mapping[str, float]
    samples: Mapping[str, Sample]
    intervals: Mapping[str, Interval]
    best: str
    to_best: Mapping[str, Tested]
    full: str
    to_full: Mapping[str, Tested]
    gaps: Mapping[str, float]
    fronts: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Block:
    """One recipe of a study, with all that came of it.

    Attributes:
        study: The study.
        recipe: The path of the recipe.
        label: Its short name, unique within a report.
        rows: One for each baseline and method.
        runs: All runs, those that failed or were not chosen included.
        comparison: What the tests say; None where no run has a result.
    """

    study: Study
    recipe: str
    label: str
    rows: tuple[Row, ...]
    runs: tuple[Run, ...]
    comparison: Comparison | None

    @property
    def title(self) -> str:
        """What a heading calls it: its part's title, or its label."""
        part = self.study.part
        if part is None:
            return self.label
        return part.title if len(self.study.recipes) == 1 else f"{part.title}: {self.label}"

    @property
    def source(self) -> tuple[str, str]:
        """Where its examples come from: blocks that share it have more or less training data of one set."""
        return (self.study.part.name if self.study.part else "", self.recipe)

    @property
    def domain(self) -> str:
        """The domain of its runs; "" where none says."""
        return next((run.metrics.domain for run in self.runs if run.metrics and run.metrics.domain), "")


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Methods over several recipes.

    Attributes:
        ranking: Average ranks of the methods that have a result on all recipes.
        gaps: Relative gap to full fine-tuning by method and recipe, where both are known.
        left_out: Methods that lack a result somewhere, and so have no rank.
    """

    ranking: Ranking | None
    gaps: Mapping[str, Mapping[str, float]]
    left_out: tuple[str, ...]


def make_blocks(study: Study, runs: Sequence[Run]) -> list[Block]:
    """Bring the runs of each recipe of a study together and compare its methods."""
    rows, blocks = make_rows(study, runs), list[Block]()
    for recipe in study.recipes:
        label = study.labels[recipe]
        own_rows = [row for row in rows if row.recipe == label]
        own_runs = [run for run in runs if run.trial.recipe == recipe]
        compared = weigh(own_rows, own_runs)
        made = {"rows": tuple(own_rows), "runs": tuple(own_runs), "comparison": compared}
        blocks.append(Block(study=study, recipe=recipe, label=label, **made))
    return blocks


def weigh(rows: Sequence[Row], runs: Sequence[Run] = (), metric: str | None = None) -> Comparison | None:
    """Compare the methods and baselines of one recipe.

    Args:
        rows: Its rows.
        runs: Its runs, for the scores of single examples.
        metric: A test metric in place of the one that decides; less of `loss`, `ece` and error rates is better, more
            of any other.

    Returns:
        The comparison; None where no row has a finite result.
    """
    known = [row for row in rows if row.quality is not None]
    if not known:
        return None
    name, mode = metric or known[0].primary, known[0].mode
    if metric not in (None, known[0].primary):
        mode = direction(name)
    parts = {row.method: _scored_runs(row, runs, name) for row in rows}
    samples = _samples(rows, parts, name)
    means = {m: float(sample.values.mean()) for m, sample in samples.items() if np.isfinite(sample.values).all()}
    found = [row for row in rows if row.method in means]
    if not found:
        return None
    sign = 1.0 if mode == "max" else -1.0
    trained = [row.method for row in found if not row.baseline]
    best = max(trained, key=lambda method: sign * means[method], default="")
    full = next((row.method for row in found if row.full), "")
    gaps = {method: relative_gap(means[method], means[full], mode) for method in means if full and method != full}
    intervals = {method: interval(samples[method]) for method in means}
    return Comparison(
        metric=name,
        mode=mode,
        means=means,
        samples=samples,
        intervals={method: one for method, one in intervals.items() if one is not None},
        best=best,
        to_best=_against(best, means, samples, parts),
        full=full,
        to_full=_against(full, means, samples, parts),
        gaps={method: gap for method, gap in gaps.items() if gap is not None},
        fronts={key: _front(key, found, means, mode) for key, _, _ in COSTS},
    )


def stand(blocks: Sequence[Block]) -> Standing | None:
    """Rank methods over several recipes.

    Returns:
        The standing; None for fewer than two recipes with results.
    """
    known = [(block, block.comparison) for block in blocks if block.comparison is not None]
    if len(known) < 2:
        return None
    trained = [[row.method for row in block.rows if not row.baseline] for block, _ in known]
    table = [
        {method: compared.means[method] for method in names if method in compared.means}
        for (_, compared), names in zip(known, trained, strict=True)
    ]
    ranking = average_ranks(table, [compared.mode for _, compared in known])
    if ranking and len({block.recipe for block, _ in known}) < len(known):
        ranking = replace(ranking, p=None, critical=None)  # several amounts of one set's data are no sample of sets
    everyone = list(dict.fromkeys(method for row in table for method in row))
    gaps = {
        method: {block.label: compared.gaps[method] for block, compared in known if method in compared.gaps}
        for method in everyone
    }
    ranked = ranking.ranks if ranking else {}
    return Standing(
        ranking=ranking,
        gaps={method: own for method, own in gaps.items() if own},
        left_out=tuple(method for method in everyone if method not in ranked),
    )


def _samples(rows: Iterable[Row], parts: Mapping[str, Mapping[int, Scored]], metric: str) -> dict[str, Sample]:
    """Take a test metric of every method, with the scores of single examples where the runs left them."""
    orders = _orders(list(parts.values()))
    return {
        row.method: _sample(row.seeds, np.array(spread.values, dtype=np.float64), parts[row.method], orders)
        for row in rows
        if (spread := row.test.get(metric)) is not None and len(spread.values) == len(row.seeds)
    }


def _scored_runs(row: Row, runs: Sequence[Run], metric: str) -> dict[int, Scored]:
    """Put a metric together from each tested run's rows, by seed."""
    found: dict[int, Scored] = {}
    for run in runs:
        tested = run.chosen and not run.failure and run.metrics is not None and run.metrics.test
        if run.trial.method != row.method or not tested or metric not in tested:
            continue
        made = scored(read_rows(run.trial.folder), metric, tested[metric])
        if made is not None:
            found[run.trial.seed] = made
    return found


def _orders(parts: Sequence[Mapping[int, Scored]]) -> dict[int, tuple[str, ...]]:
    """Name each seed's test examples in one order, by the first method that has them."""
    orders: dict[int, tuple[str, ...]] = {}
    for own in parts:
        for seed, made in own.items():
            orders.setdefault(seed, tuple(sorted(made.ids)))
    return orders


def _sample(
    seeds: tuple[int, ...], values: Floats, parts: Mapping[int, Scored], orders: Mapping[int, tuple[str, ...]]
) -> Sample:
    """Put a method's results together; scores count only where every seed has them, of the same examples as others."""
    whole = all(seed in parts and tuple(sorted(parts[seed].ids)) == orders[seed] for seed in seeds)
    if not seeds or not whole:
        return Sample(seeds=seeds, values=values)
    return Sample(
        seeds=seeds,
        values=values,
        weighted=tuple(_reordered(parts[seed], orders[seed]) for seed in seeds),
        sizes=tuple(len(orders[seed]) for seed in seeds),
        nested=len(set(orders.values())) > 1,
    )


def _reordered(made: Scored, order: Sequence[str]) -> Weighted:
    places = {name: place for place, name in enumerate(order)}
    own = np.array([places[name] for name in made.ids])
    return lambda weights: made.metric(weights[:, own])


def _against(
    other: str,
    means: Mapping[str, float],
    samples: Mapping[str, Sample],
    parts: Mapping[str, Mapping[int, Scored]],
) -> dict[str, Tested]:
    if not other:
        return {}
    pairs = {method: difference(samples[method], samples[other]) for method in means if method != other}
    found = {method: pair for method, pair in pairs.items() if pair is not None}
    adjusted = holm([pair.p for pair in found.values()])
    return {
        method: Tested(difference=pair, p=p, permutation=_flipped(parts[method], parts[other]))
        for (method, pair), p in zip(found.items(), adjusted, strict=True)
    }


def _flipped(one: Mapping[int, Scored], two: Mapping[int, Scored]) -> float | None:
    """Flip the signs of examples' differences, averaged over the seeds; None where not all examples have scores."""
    gaps: dict[str, float] = {}
    for seed in one.keys() | two.keys():
        if seed not in one or seed not in two or set(one[seed].ids) != set(two[seed].ids):
            return None
        first, second = one[seed].scores, two[seed].scores
        if first is None or second is None:
            return None
        other = dict(zip(two[seed].ids, second.tolist(), strict=True))
        for name, score in zip(one[seed].ids, first.tolist(), strict=True):
            gaps[name] = gaps.get(name, 0.0) + score - other[name]
    return permutation_p([gaps[name] for name in sorted(gaps)]) if gaps else None


def _front(key: str, rows: Sequence[Row], means: Mapping[str, float], mode: str) -> tuple[str, ...]:
    known = [row for row in rows if not row.baseline and row.cost.get(key) is not None]
    points = [(row.cost[key], means[row.method]) for row in known]
    return tuple(known[place].method for place in pareto_front(points, more_is_better=mode == "max"))
