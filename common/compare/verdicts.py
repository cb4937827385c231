"""The tests that decide a claim: a small closed set, each a question about the results of studies.

A test looks at intervals, not at means: it `holds` where the interval lies on the claim's side of its threshold, it
does not hold where the interval lies on the other side, and is inconclusive between. Several results (sets, methods)
must all agree: one that does not hold decides.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from common.compare.evidence import Block, Comparison, weigh
from common.compare.results import TIMES, Row
from common.compare.statistics import LEVEL, Difference, Interval, Sample, difference, resampled
from common.compare.tables import percent
from common.errors import GraftError, suggest

Answer = Literal["holds", "does not hold", "inconclusive"]
HOLDS, FAILS, OPEN = "holds", "does not hold", "inconclusive"
_SPOKEN_OF = ("method", "reference", "methods", "order", "varied", "than")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a test says of some results: its answer, and the figures that it rests on in words."""

    answer: Answer
    figures: str


@dataclass(frozen=True, kw_only=True)
class ClaimTest:
    """A named test with its parameters, as a card writes it.

    Attributes:
        name: One of `TESTS`.
        parameters: Its parameters.
        on: Labels of the sets that it looks at; none for all.
    """

    name: str
    parameters: Mapping[str, Any]
    on: tuple[str, ...] = ()

    @property
    def methods(self) -> list[str]:
        """The methods and baselines that it speaks of."""
        values = [self.parameters.get(key, ()) for key in _SPOKEN_OF]
        return [name for value in values for name in ([value] if isinstance(value, str) else value)]

    def looks_at(self, label: str) -> bool:
        """Say whether it looks at the set of this label."""
        return not self.on or label in self.on

    def looks_into(self, study: str) -> bool:
        """Say whether it looks at a set of the study of this name, whose label is its name or `name:recipe`."""
        return not self.on or study in (label.partition(":")[0] for label in self.on)


@dataclass(frozen=True, kw_only=True)
class _Named:
    """A test of the closed set: its function, its parameters, and whether it looks at all sets together."""

    ask: Callable[..., list[Outcome]]
    must: tuple[str, ...]
    may: tuple[str, ...] = ()
    series: bool = False


def decide(tests: Sequence[ClaimTest], blocks: Sequence[Block]) -> Outcome:
    """Ask all tests of a card.

    Args:
        tests: The tests.
        blocks: The results, in the order of the card's studies.

    Returns:
        The common answer and all figures.
    """
    outcomes: list[Outcome] = []
    for test in tests:
        shown = [block for block in blocks if test.looks_at(block.label)]
        known = TESTS[test.name]
        for part in [shown] if known.series else [[block] for block in shown]:
            try:
                outcomes += known.ask(part, **test.parameters)
            except _Missing as error:
                outcomes.append(Outcome(answer=OPEN, figures=str(error)))
    return Outcome(answer=_common(outcomes), figures="; ".join(outcome.figures for outcome in outcomes))


def read_test(value: object, where: str) -> ClaimTest:
    """Check a test as a card writes it, `{name: {parameters}}`.

    Raises:
        GraftError: If there is no such test, or its parameters are not its own.
    """
    if not isinstance(value, dict) or len(value) != 1:
        raise GraftError(f"{where} is {value!r}: give one test, as in 'ahead_of: {{method: LoRA, reference: SSF}}'.")
    name, given = next(iter(value.items()))
    if name not in TESTS:
        raise GraftError(f"{where}: unknown test '{name}'.{suggest(str(name), TESTS)}")
    known = TESTS[name]
    parameters = dict(given) if isinstance(given, dict) else {}
    on = parameters.pop("on", ())
    wrong = [key for key in parameters if key not in (*known.must, *known.may)]
    lacking = [key for key in known.must if key not in parameters]
    if wrong or lacking:
        told = [f"unknown {', '.join(wrong)}"] * bool(wrong) + [f"lacking {', '.join(lacking)}"] * bool(lacking)
        allowed = ", ".join((*known.must, *known.may, "on"))
        raise GraftError(f"{where}: {name} has parameters that do not fit ({'; '.join(told)}). Allowed: {allowed}.")
    return ClaimTest(name=str(name), parameters=parameters, on=tuple([on] if isinstance(on, str) else on))


class _Missing(Exception):
    """A result that a test needs is not there."""


def _common(outcomes: Sequence[Outcome]) -> Answer:
    answers = {outcome.answer for outcome in outcomes}
    if FAILS in answers:
        return FAILS
    return HOLDS if answers == {HOLDS} else OPEN


def _judge(low: float, high: float, threshold: float) -> Answer:
    """Say whether an interval lies above a threshold."""
    return HOLDS if low > threshold else FAILS if high < threshold else OPEN


def _compared(block: Block, metric: str | None) -> Comparison:
    found = weigh(block.rows, block.runs, metric) if metric else block.comparison
    if found is None:
        raise _Missing(f"{block.label}: no result")
    return found


def _row(block: Block, method: str) -> Row:
    row = next((row for row in block.rows if row.method == method), None)
    if row is None or not row.seeds:
        raise _Missing(f"{block.label}: no result of {method}")
    return row


def _trained_percent(row: Row) -> float | None:
    """Which part of the backbone is trained, in percent; a new head is none of it. Of everything, where that is all."""
    parts = [row.cost.get(f"params_{name}") for name in ("trainable_backbone", "total", "trainable_head")]
    if None in parts:
        return row.cost.get("trainable_percent")
    trained, total, head = (float(part or 0.0) for part in parts)
    return 100 * trained / (total - head) if total > head else None


def _gain(block: Block, method: str, reference: str, metric: str | None = None) -> Difference:
    """How much better a method is than another, above 0 whether more or less of the metric is better."""
    compared = _compared(block, metric)
    for name in (method, reference):
        if name not in compared.means:
            raise _Missing(f"{block.label}: no result of {name}")
    found = difference(compared.samples[method], compared.samples[reference])
    if found is None:
        value = compared.means[method] - compared.means[reference]
        raise _Missing(f"{block.label}: {method} - {reference} = {value:+.3f}, spread unknown (one seed)")
    if compared.mode == "max":
        return found
    return Difference(value=-found.value, low=-found.high, high=-found.low, p=found.p, over=found.over)


def _told(block: Block, method: str, reference: str, gain: Difference, metric: str | None = None) -> str:
    what = f" in {metric}" if metric else ""
    return (
        f"{block.label}: {method} is {abs(gain.value):.3f} {'better' if gain.value >= 0 else 'worse'} than {reference}"
        f"{what} ({gain.low:+.3f} to {gain.high:+.3f} over {gain.over})"
    )


def _best(block: Block, methods: str | Sequence[str]) -> str:
    """Choose among methods by the validation split."""
    names = [methods] if isinstance(methods, str) else list(methods)
    own = [row for row in block.rows if row.method in names and row.quality is not None]
    known = [(row, row.val.mean) for row in own if row.val and math.isfinite(row.val.mean)]
    if not known:
        raise _Missing(f"{block.label}: no result of {', '.join(names)}")
    sign = 1.0 if known[0][0].mode == "max" else -1.0
    return max(known, key=lambda pair: sign * pair[1])[0].method


def _within_points(
    blocks: Sequence[Block],
    method: str,
    reference: str,
    points: float,
    metric: str | None = None,
    max_percent: float | None = None,
) -> list[Outcome]:
    """`method` is at most `points` hundredths worse than `reference`, at `max_percent` of the backbone or less."""
    outcomes: list[Outcome] = []
    for block in blocks:
        gain, trained = _gain(block, method, reference, metric), _trained_percent(_row(block, method))
        told, answer = _told(block, method, reference, gain, metric), _judge(gain.low, gain.high, -points / 100)
        if max_percent is not None and (trained is None or trained > max_percent):
            answer, told = OPEN, f"{told}; it trains {percent(trained)}, more than the claim speaks of"
        outcomes.append(Outcome(answer=answer, figures=told))
    return outcomes


def _ahead_of(
    blocks: Sequence[Block],
    method: str | Sequence[str],
    reference: str | Sequence[str],
    points: float = 0.0,
    metric: str | None = None,
) -> list[Outcome]:
    """`method` (or the best of several, by validation) beats `reference` by more than `points` hundredths."""
    outcomes: list[Outcome] = []
    for block in blocks:
        one, other = _best(block, method), _best(block, reference)
        gain = _gain(block, one, other, metric)
        answer = _judge(gain.low, gain.high, points / 100)
        outcomes.append(Outcome(answer=answer, figures=_told(block, one, other, gain, metric)))
    return outcomes


def _improves(
    blocks: Sequence[Block], method: str, reference: str, share: float, metric: str | None = None
) -> list[Outcome]:
    """`method` beats `reference` by at least a `share` of its result (of its errors, where less is better)."""
    outcomes: list[Outcome] = []
    for block in blocks:
        gain, base = _gain(block, method, reference, metric), abs(_compared(block, metric).means[reference])
        if not base:
            raise _Missing(f"{block.label}: {reference} is 0, of which nothing is a share")
        told = f"{_told(block, method, reference, gain, metric)}, {100 * gain.value / base:+.0f} % of its result"
        outcomes.append(Outcome(answer=_judge(gain.low / base, gain.high / base, share), figures=told))
    return outcomes


def _spread_within(
    blocks: Sequence[Block], methods: Sequence[str], points: float, metric: str | None = None
) -> list[Outcome]:
    """All of `methods` lie within `points` hundredths of each other."""
    outcomes: list[Outcome] = []
    for block in blocks:
        gains = [(one, two, _gain(block, one, two, metric)) for one, two in itertools.combinations(methods, 2)]
        one, two, widest = max(gains, key=lambda gain: abs(gain[2].value))
        far = [max(abs(gain.low), abs(gain.high)) for *_, gain in gains]
        near = [0.0 if gain.low <= 0 <= gain.high else min(abs(gain.low), abs(gain.high)) for *_, gain in gains]
        answer = HOLDS if max(far) <= points / 100 else FAILS if max(near) > points / 100 else OPEN
        outcomes.append(Outcome(answer=answer, figures=f"widest apart, {_told(block, one, two, widest, metric)}"))
    return outcomes


def _saves(
    blocks: Sequence[Block],
    method: str,
    reference: str,
    cost: str = "memory_total",
    at_least: float | None = None,
    at_most: float | None = None,
) -> list[Outcome]:
    """`method` saves `at_least`, or no more than `at_most`, of the `cost` of `reference`; both are shares."""
    outcomes: list[Outcome] = []
    for block in blocks:
        (saved, where), words = _saved(block, method, reference, cost), cost.replace("_", " ")
        least, most = -math.inf if at_least is None else at_least, math.inf if at_most is None else at_most
        inside, outside = least <= where.low and where.high <= most, where.high < least or where.low > most
        part = f"saves {100 * saved:.0f} % of" if saved >= 0 else f"takes {-100 * saved:.0f} % more than"
        told = f"{block.label}: {method} {part} {reference}'s {words}"
        if where.over:
            told += f" (saving {100 * where.low:+.0f} to {100 * where.high:+.0f} % over {where.over})"
        outcomes.append(Outcome(answer=HOLDS if inside else FAILS if outside else OPEN, figures=told))
    return outcomes


def _saved(block: Block, method: str, reference: str, cost: str) -> tuple[float, Interval]:
    """Which share of a cost of `reference` is saved, and where it may lie.

    What is counted is the same for all seeds. What is timed is not: the share is that of the geometric means over the
    seeds, its interval that of the difference of logarithms, paired by seed.
    """
    own, other = _row(block, method), _row(block, reference)
    if cost not in TIMES:
        spent, whole = own.cost.get(cost), other.cost.get(cost)
        if spent is None or not whole:
            raise _Missing(f"{block.label}: {cost} was not measured")
        saved = 1 - spent / whole
        return saved, Interval(low=saved, high=saved, over="")
    if not all(min(row.times.get(cost, (0.0,))) > 0 for row in (own, other)):
        raise _Missing(f"{block.label}: {cost} was not measured")
    found = difference(*(Sample(seeds=row.seeds, values=np.log(row.times[cost])) for row in (own, other)))
    if found is None:
        raise _Missing(f"{block.label}: spread of {cost} unknown (one seed)")
    return 1 - math.exp(found.value), Interval(
        low=1 - math.exp(found.high), high=1 - math.exp(found.low), over=found.over
    )


def _grows_with(
    blocks: Sequence[Block], method: str | Sequence[str], reference: str, starts_below: bool = False
) -> list[Outcome]:
    """The lead of `method` over `reference` grows from the first set to the last; it is negative first, if asked so."""
    if len(blocks) < 2:
        raise _Missing("there are fewer than two sets to grow along")
    ends = [(block, _best(block, method)) for block in (blocks[0], blocks[-1])]
    gains = [_gain(block, name, reference) for block, name in ends]
    value = gains[1].value - gains[0].value
    reach = math.hypot(*((gain.high - gain.low) / 2 for gain in gains))
    told = "; ".join(_told(block, name, reference, gain) for (block, name), gain in zip(ends, gains, strict=True))
    told = f"{told}; the lead changes by {value:+.3f} ({value - reach:+.3f} to {value + reach:+.3f})"
    outcomes = [Outcome(answer=_judge(value - reach, value + reach, 0.0), figures=told)]
    if starts_below:
        answer = _judge(-gains[0].high, -gains[0].low, 0.0)
        outcomes.append(Outcome(answer=answer, figures=f"at first the lead is {gains[0].value:+.3f}"))
    return outcomes


def _ranks(blocks: Sequence[Block], order: Sequence[str], metric: str | None = None) -> list[Outcome]:
    """The methods stand in this order, each better than the next."""
    outcomes: list[Outcome] = []
    for block in blocks:
        for one, two in itertools.pairwise(order):
            gain = _gain(block, one, two, metric)
            told = _told(block, one, two, gain, metric)
            outcomes.append(Outcome(answer=_judge(gain.low, gain.high, 0.0), figures=told))
    return outcomes


def _matters_more(blocks: Sequence[Block], varied: Sequence[str], than: Sequence[str]) -> list[Outcome]:
    """The means of the methods in `varied` lie further apart than those in `than`.

    Chance pulls both ranges apart, the more the more methods there are: give both as many.
    """
    outcomes: list[Outcome] = []
    for block in blocks:
        compared = _compared(block, None)
        missing = [name for name in (*varied, *than) if name not in compared.means]
        if missing:
            raise _Missing(f"{block.label}: no result of {', '.join(missing)}")
        ranges = [np.ptp([compared.means[name] for name in names]) for names in (varied, than)]
        drawn = [np.ptp([resampled(compared.samples[name]) for name in names], axis=0) for names in (varied, than)]
        low, high = np.quantile(drawn[0] - drawn[1], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        told = f"{block.label}: {', '.join(varied)} span {ranges[0]:.3f}, {', '.join(than)} span {ranges[1]:.3f}"
        told = f"{told} (difference {low:+.3f} to {high:+.3f})"
        outcomes.append(Outcome(answer=_judge(float(low), float(high), 0.0), figures=told))
    return outcomes


TESTS: Mapping[str, _Named] = {
    "within_points": _Named(ask=_within_points, must=("method", "reference", "points"), may=("metric", "max_percent")),
    "ahead_of": _Named(ask=_ahead_of, must=("method", "reference"), may=("points", "metric")),
    "improves": _Named(ask=_improves, must=("method", "reference", "share"), may=("metric",)),
    "spread_within": _Named(ask=_spread_within, must=("methods", "points"), may=("metric",)),
    "saves": _Named(ask=_saves, must=("method", "reference"), may=("cost", "at_least", "at_most")),
    "grows_with": _Named(ask=_grows_with, must=("method", "reference"), may=("starts_below",), series=True),
    "ranks": _Named(ask=_ranks, must=("order",), may=("metric",)),
    "matters_more": _Named(ask=_matters_more, must=("varied", "than")),
}
