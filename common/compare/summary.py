"""The results in plain words: no sentence says more than the numbers carry.

Two methods are called apart only where a paired test over seeds (and test examples, where the runs left their scores)
says so after Holm's correction; see `statistics`. With a single seed and no scores nothing is known about the spread,
and the summary says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from common.compare.evidence import COSTS, Comparison, Standing, weigh
from common.compare.results import Row, Run, Spread
from common.compare.tables import amount, duration, judged, percent, quality, ranked, share

_LEAST_ECE = 0.01  # smaller differences of calibration are not worth a sentence
_CHEAP: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("params_trainable", "trains the fewest parameters", amount),
    ("memory_total", "needs the least training memory", lambda value: amount(value, "B")),
    ("step_seconds", "has the shortest measured step", duration),
)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What one recipe's results say: the main sentence, the findings and what to be careful about."""

    headline: str
    findings: tuple[str, ...]
    cautions: tuple[str, ...]


def summarise(rows: Sequence[Row], runs: Sequence[Run], comparison: Comparison | None = None) -> Summary:
    """Word the results of one recipe.

    Args:
        rows: Its rows.
        runs: Its runs.
        comparison: What the tests say of them; made from the rows where it is not given.

    Returns:
        The summary.
    """
    compared = comparison or weigh(rows)
    results = [(row, row.quality) for row in rows if row.quality is not None]
    known = [(row, spread) for row, spread in results if not row.baseline]
    untrained = [(row, spread) for row, spread in results if row.baseline]
    if not known or compared is None:
        headline = "No method gave a result." if untrained else "No run gave a result."
        told = tuple(f"{row.method}, which is not trained, reaches {quality(spread)}." for row, spread in untrained)
        return Summary(headline=headline, findings=told, cautions=tuple(_failures(rows, runs)))
    sign = 1.0 if known[0][0].mode == "max" else -1.0
    ranked_rows = sorted(known, key=lambda pair: -sign * pair[1].mean)
    trained = [row for row in rows if not row.baseline]
    return Summary(
        headline=_headline(ranked_rows, untrained, compared, sign),
        findings=(
            *_untrained(untrained, ranked_rows[0], compared, sign),
            *_distances(known, compared, sign),
            *_fronts([row for row, _ in known], compared),
            *_cheapest([row for row, _ in known]),
            *_calibration(known, compared),
            *_worst(ranked_rows),
        ),
        cautions=(
            *_failures(rows, runs),
            *_tuning(trained),
            *_chance(ranked_rows, compared, runs),
            *_sameness(runs),
        ),
    )


def overview(standing: Standing) -> list[str]:
    """Word what several recipes say together."""
    lines: list[str] = []
    ranking = standing.ranking
    if ranking:
        first, *rest = ranking.ranks.items()
        lines.append(
            f"{first[0]} has the best average rank over {ranking.sets} sets ({first[1]:.2f}), before "
            f"{_listed([f'{name} ({rank:.2f})' for name, rank in rest])}."
        )
        lines += [told for told in (ranked(standing),) if told]
    for name, own in standing.gaps.items():
        low, high = min(own.values()), max(own.values())
        between = share(low) if low == high else f"between {share(low)} and {share(high)}"
        lines.append(f"{name} lies {between} from full fine-tuning (relative, above 0 is better).")
    if standing.left_out:
        lines.append(f"Without a rank, since a set lacks their result: {_listed(standing.left_out)}.")
    return lines


def _headline(
    ranked_rows: Sequence[tuple[Row, Spread]],
    untrained: Sequence[tuple[Row, Spread]],
    compared: Comparison,
    sign: float,
) -> str:
    (best, top), rest = ranked_rows[0], ranked_rows[1:]
    word = "highest" if best.mode == "max" else "lowest"
    seeds = f"mean of {top.n} seeds" if top.n > 1 else "one seed"
    among = "Of the trained methods, " if untrained else ""
    line = f"{among}{best.method} has the {word} test {best.primary.replace('_', ' ')}: {quality(top)} ({seeds})."
    near = {method for method, tested in compared.to_best.items() if not tested.apart}
    ahead = [row.method for row, spread in untrained if sign * (spread.mean - top.mean) >= 0]
    close = [row.method for row, _ in untrained if row.method not in ahead and row.method in near]
    for words, names in (("does not beat", ahead), ("does not clearly beat", close)):
        line += f" It {words} {_listed(names)}, where nothing is trained." if names else ""
    level = [f"{row.method} ({spread.mean:.3f})" for row, spread in rest if row.method in near]
    if not level:
        return line
    verb = "is" if len(level) == 1 else "are"
    return f"{line} {_listed(level)} {verb} not told apart from it."


def _untrained(
    untrained: Sequence[tuple[Row, Spread]], best: tuple[Row, Spread], compared: Comparison, sign: float
) -> list[str]:
    """Say of each baseline how far the best method is from it."""
    row, top = best
    return [
        f"{baseline.method}, which is not trained, reaches {quality(spread)}: "
        f"{row.method} {_gap(sign * (top.mean - spread.mean))} it ({judged(compared.to_best.get(baseline.method))})."
        for baseline, spread in untrained
    ]


def _gap(gain: float) -> str:
    return f"is {abs(gain):.3f} {'better' if gain > 0 else 'worse'} than" if round(abs(gain), 3) else "is level with"


def _distances(known: Sequence[tuple[Row, Spread]], compared: Comparison, sign: float) -> list[str]:
    lines: list[str] = []
    full = next(((row, spread) for row, spread in known if row.method == compared.full), None)
    if full is None:
        return lines
    reference, goal = full
    for row, spread in known:
        if row is reference:
            continue
        far = _gap(sign * (spread.mean - goal.mean))
        line = f"{row.method} {far} {reference.method} ({judged(compared.to_full.get(row.method))})"
        shares = [
            f"{percent(100 * row.cost[key] / reference.cost[key])} of its {words}"
            for key, words in (("params_trainable", "trainable parameters"), ("memory_total", "training memory"))
            if key in row.cost and reference.cost.get(key)
        ]
        lines.append(f"{line}, with {_listed(shares)}." if shares else f"{line}.")
    return lines


def _fronts(rows: Sequence[Row], compared: Comparison) -> list[str]:
    """Name the methods that are beaten by another at every cost that was measured."""
    measured = [names for key, _, _ in COSTS if (names := compared.fronts[key])]
    if len(rows) < 3 or not measured:
        return []
    everywhere = [row.method for row in rows if all(row.method in names for names in measured)]
    nowhere = [row.method for row in rows if not any(row.method in names for names in measured)]
    lines: list[str] = []
    if everywhere:
        lines.append(f"On the Pareto front whatever the cost: {_listed(everywhere)}.")
    if nowhere:
        lines.append(f"On no Pareto front, by the means: {_listed(nowhere)}.")
    return lines


def _calibration(known: Sequence[tuple[Row, Spread]], compared: Comparison) -> list[str]:
    """Compare calibration errors with full fine-tuning's, where runs recorded them."""
    errors = {row.method: row.test["ece"].mean for row, _ in known if "ece" in row.test}
    if compared.full not in errors:
        return []
    base = errors[compared.full]
    worse = [f"{m} ({error:.3f})" for m, error in errors.items() if error - base > _LEAST_ECE]
    better = [f"{m} ({error:.3f})" for m, error in errors.items() if base - error > _LEAST_ECE]
    lines = [(f"Worse calibrated than {compared.full}", worse), (f"Better calibrated than {compared.full}", better)]
    return [f"{words} (expected error {base:.3f}): {_listed(names)}." for words, names in lines if names]


def _worst(ranked_rows: Sequence[tuple[Row, Spread]]) -> list[str]:
    """Name the method that is best by its worst class or group, where it is not the best one."""
    rows = [row for row, _ in ranked_rows]
    by_kind = {"class": {row.method: row.worst for row in rows}, "group": {row.method: row.worst_group for row in rows}}
    lines: list[str] = []
    for kind, found in by_kind.items():
        own = found[rows[0].method]
        if own is None:
            continue
        sign = 1.0 if own.mode == "max" else -1.0
        known = {name: (fmean(worst.values), worst) for name, worst in found.items() if worst}
        method, (value, worst) = max(known.items(), key=lambda one: sign * one[1][0])
        mine = known[rows[0].method][0]
        if sign * value > sign * mine:
            lines.append(
                f"By its worst {kind} {method} is ahead, by the means: {worst.measure.replace('_', ' ')} {value:.3f} "
                f"({worst.name}), against {mine:.3f} ({own.name}) of {rows[0].method}."
            )
    return lines


def _cheapest(rows: Sequence[Row]) -> list[str]:
    """Name the cheapest method by each measure, in one sentence a method."""
    claims: dict[str, list[str]] = {}
    for key, words, write in _CHEAP:
        measured = [row for row in rows if key in row.cost]
        if len(measured) > 1:
            least, second = sorted(measured, key=lambda row: row.cost[key])[:2]
            if least.cost[key] == second.cost[key]:
                continue
            claims.setdefault(least.method, []).append(f"{words} ({write(least.cost[key])})")
    return [f"{method} {_listed(words)}." for method, words in claims.items()]


def _failures(rows: Sequence[Row], runs: Sequence[Run]) -> list[str]:
    failed = sum(run.failure is not None for run in runs)
    lines = [f"{failed} of {len(runs)} runs failed; the results are without them."] if failed else []
    lines += [f"{row.method} has no result." for row in rows if not row.seeds]
    return lines + [f"{row.method} diverged on the test split." for row in rows if row.seeds and row.quality is None]


def _tuning(rows: Sequence[Row]) -> list[str]:
    lines: list[str] = []
    if len({row.settings for row in rows}) > 1:
        counts = _listed([f"{row.method} {row.settings}" for row in rows])
        lines.append(f"Not every method had the same number of {offered(rows)} to choose from ({counts}).")
    ends = [row for row in rows if row.at_an_end]
    if ends:
        rates = _listed([f"{row.method} ({row.lr:g})" for row in ends])
        lines.append(f"At an end of the learning rates on offer, so that a better one may lie beyond: {rates}.")
    most = [row for row in rows if row.weight_decay is not None and row.weight_decay == max(row.decays, default=None)]
    heavy = [f"{row.method} ({row.weight_decay:g})" for row in most if len(row.decays) > 1]
    if heavy:
        lines.append(f"At the upper end of the weight decays on offer: {_listed(heavy)}.")
    return lines


def offered(rows: Sequence[Row]) -> str:
    """Name what methods could choose from."""
    return "settings (learning rate and weight decay)" if any(row.decays for row in rows) else "learning rates"


def _chance(ranked_rows: Sequence[tuple[Row, Spread]], compared: Comparison, runs: Sequence[Run]) -> list[str]:
    lines: list[str] = []
    single = [row.method for row, spread in ranked_rows if spread.n == 1]
    if len(single) == len(ranked_rows):
        lines.append(
            "Every method ran with one seed: the spread between seeds is unknown, so small differences mean little."
        )
    elif single:
        lines.append(f"{_listed(single)} ran with one seed only, so its spread is unknown.")
    if any(sample.weighted for sample in compared.samples.values()):
        return lines
    most = max(spread.n for _, spread in ranked_rows)
    if most > 1:
        steady = f" With {most} seeds they tell only large and steady differences." if most < 5 else ""
        lines.append(f"The tests are over seeds alone, not over test examples.{steady}")
    row, top = ranked_rows[0]
    sizes = {run.metrics.data.get("test") for run in runs if run.metrics}
    size = sizes.pop() if len(sizes) == 1 else None
    if row.primary == "accuracy" and isinstance(size, int) and size > 0 and 0 <= top.mean <= 1:
        error = math.sqrt(top.mean * (1 - top.mean) / size)
        lines.append(
            f"With {size} test examples, an accuracy near {top.mean:.2f} is itself uncertain by about "
            f"±{error:.3f} (one standard error)."
        )
    return lines


def _sameness(runs: Sequence[Run]) -> list[str]:
    """Warn where runs that stand side by side were not made alike."""
    seen = [run.metrics for run in runs if run.metrics]
    lines: list[str] = []
    if len({str(sorted(metrics.environment.items())) for metrics in seen}) > 1:
        lines.append("The runs did not all have the same environment, so their times cannot be compared.")
    return lines


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
