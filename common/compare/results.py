"""What the runs of a study came to: metrics read, learning rates chosen, one row for each recipe and method."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from common.compare.examples import read_rows
from common.compare.prepared import Preparation
from common.compare.study import Method, Setting, Study, Trial
from common.compare.worst import Worst, worst_class, worst_group
from common.errors import GraftError, unknown

SCHEMA = 1
TIMES = ("step_seconds", "fit_seconds")  # which other work on the machine disturbs; what else a run costs is counted
MEMORY_PARTS = ("weights", "gradients", "optimizer", "activations")
FULL_FINE_TUNING = "FullFineTune"


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """The part of a run's metrics.json that is compared.

    Attributes:
        fitted: Whether the fit ended well.
        primary: The name of the metric that decides.
        mode: Whether more of it is better, or less.
        val: Metrics on the validation split.
        test: Metrics on the test split; None before `graft test`.
        cost: What the run cost, as written.
        data: Name, digest and sizes of the data.
        environment: Versions and device.
        backbone: The name of the backbone.
        domain: The name of the domain; "" where the run does not say.
    """

    fitted: bool
    primary: str
    mode: Literal["max", "min"]
    val: Mapping[str, float]
    test: Mapping[str, float] | None
    cost: Mapping[str, Any]
    data: Mapping[str, Any]
    environment: Mapping[str, Any]
    backbone: str
    domain: str = ""

    @property
    def score(self) -> float | None:
        """The primary metric on the validation split; None where it is missing or not finite."""
        value = self.val.get(self.primary)
        return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a run has no result: the command (`fit`, `test`, `baseline`), its exit code and the last lines of its log."""

    verb: str
    code: int
    tail: str


@dataclass(frozen=True, kw_only=True)
class Run:
    """A trial and what came of it.

    Attributes:
        trial: The trial.
        metrics: What it wrote; None where the fit failed.
        chosen: Whether it counts in the results (as against a setting that was not chosen).
        failure: Why it failed, if it did.
    """

    trial: Trial
    metrics: Metrics | None
    chosen: bool
    failure: Failure | None


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A mean over seeds.

    Attributes:
        mean: The mean.
        std: The sample standard deviation; None for a single seed, which has none.
        n: How many seeds.
        values: Each seed's value.
    """

    mean: float
    std: float | None
    n: int
    values: tuple[float, ...] = ()

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Take mean and sample standard deviation of one or more values; both are nan where a value is not finite."""
        numbers = list(values)
        if not all(map(math.isfinite, numbers)):
            return cls(mean=math.nan, std=math.nan if len(numbers) > 1 else None, n=len(numbers), values=(*numbers,))
        std = statistics.stdev(numbers) if len(numbers) > 1 else None
        return cls(mean=statistics.fmean(numbers), std=std, n=len(numbers), values=(*numbers,))


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a method starts from, and what it cost.

    Attributes:
        preparation: How it was made.
        metrics: What its fit measured; None where it failed.
    """

    preparation: Preparation
    metrics: Metrics | None

    def cost(self, name: str) -> float | None:
        """A number of its costs; None where it is unknown."""
        value = self.metrics.cost.get(name) if self.metrics else None
        return float(value) if isinstance(value, int | float) else None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method or baseline on one recipe.

    Attributes:
        recipe: The label of the recipe.
        method: The name of the method or baseline.
        baseline: Whether it is a baseline, which is not trained and costs nothing but time.
        full: Whether it is full fine-tuning, the reference.
        grid: The learning rates it could choose from; none for a baseline.
        lr: The chosen learning rate; None for a baseline, or where no run succeeded.
        seeds: The seeds that were tested.
        primary: The metric that decides; "" where no run succeeded.
        mode: Whether more of it is better, or less.
        val: The primary metric on the validation split, over the tested runs.
        test: Each metric on the test split.
        cost: Numbers by their name in metrics.json; times are medians over the seeds, memory parts are `memory_<part>`.
        failed: How many of its runs failed.
        decays: The weight decays it could choose from; none where it has the recipe's.
        weight_decay: The chosen weight decay; None where it has the recipe's.
        worst: Its worst class on the test split, over the seeds; None where there are no numbers by class.
        worst_group: Its worst group on the test split, over the seeds; None where rows name no large groups.
        starts: What it starts from, which was trained before and is in no other cost.
        times: Each seed's time in s, by its name in metrics.json; only those that every seed has.
    """

    recipe: str
    method: str
    baseline: bool
    full: bool
    grid: tuple[float, ...]
    lr: float | None
    seeds: tuple[int, ...]
    primary: str
    mode: Literal["max", "min"]
    val: Spread | None
    test: Mapping[str, Spread]
    cost: Mapping[str, float]
    failed: int
    decays: tuple[float, ...] = ()
    weight_decay: float | None = None
    worst: Worst | None = None
    worst_group: Worst | None = None
    starts: tuple[Start, ...] = ()
    times: Mapping[str, tuple[float, ...]] = field(default_factory=dict[str, tuple[float, ...]])

    @property
    def settings(self) -> int:
        """How many settings it could choose from."""
        return len(self.grid) * max(1, len(self.decays))

    @property
    def at_an_end(self) -> bool:
        """Whether its rate is the lowest or highest of several, so that a better one may lie beyond."""
        return self.lr is not None and len(self.grid) > 1 and self.lr in (min(self.grid), max(self.grid))

    def prepared_cost(self, name: str) -> float | None:
        """The sum of a cost of what it starts from; None where it starts from nothing, or one is unknown."""
        known = [value for start in self.starts if (value := start.cost(name)) is not None]
        return sum(known) if self.starts and len(known) == len(self.starts) else None

    @property
    def quality(self) -> Spread | None:
        """The primary metric on the test split; None where there is none that is finite."""
        spread = self.test.get(self.primary)
        return spread if spread is not None and math.isfinite(spread.mean) else None


_LESS_IS_BETTER = frozenset("cer distance ece error hd95 loss mae mcd mse perplexity rmse wer".split())


def direction(metric: str) -> Literal["max", "min"]:
    """Tell from the words of a metric's name, such as `wer_lower` or `hd95_mm`, whether more of it is better."""
    return "max" if _LESS_IS_BETTER.isdisjoint(metric.split("_")) else "min"


def read_metrics(folder: Path, metric: str = "") -> Metrics | None:
    """Read a run folder's metrics.json.

    Args:
        folder: The run folder.
        metric: The metric that decides; "" for the task's own.

    Returns:
        The metrics, or None where the file is not there.

    Raises:
        GraftError: If the file is not one that this version of Graft understands, or does not have the metric.
    """
    path = folder / "metrics.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["schema"] != SCHEMA:
            raise GraftError(
                f"'{path}' has schema {raw['schema']}, this version of Graft reads {SCHEMA}. Fit the run again."
            )
        mode = raw["primary"]["mode"]
        if mode not in ("max", "min"):
            raise GraftError(f"'{path}' gives the mode '{mode}' for its primary metric. Allowed: max, min.")
        val = _numbers(raw["val"])
        if metric and val and metric not in val:
            raise unknown("metric of the study", metric, val)
        return Metrics(
            fitted=raw["status"] == "fitted",
            primary=metric or raw["primary"]["name"],
            mode=direction(metric) if metric else mode,
            val=val,
            test=None if raw.get("test") is None else _numbers(raw["test"]),
            cost=raw["cost"],
            data=raw["data"],
            environment=raw["environment"],
            backbone=raw["backbone"],
            domain=raw.get("domain", ""),
        )
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise GraftError(
            f"'{path}' cannot be read ({type(error).__name__}: {error}). Delete the run folder to fit it again."
        ) from error


def choose(runs: Sequence[Run]) -> Setting | None:
    """Choose among settings by the primary metric on the validation split, the mean over seeds; the first of equals.

    The test split has no part in it. A setting of which a run failed or diverged (no finite metric) is never chosen.
    """
    means = {setting: mean for setting, own in by_setting(runs).items() if (mean := tuning_score(own)) is not None}
    modes = {run.metrics.mode for run in runs if run.metrics is not None and run.metrics.fitted}
    sign = 1.0 if "max" in modes else -1.0
    return max(means, key=lambda setting: sign * means[setting], default=None)


def by_setting(runs: Iterable[Run]) -> dict[Setting, list[Run]]:
    """Put runs together that differ in their seed alone."""
    groups: dict[Setting, list[Run]] = {}
    for run in runs:
        if run.trial.setting is not None:
            groups.setdefault(run.trial.setting, []).append(run)
    return groups


def tuning_score(runs: Sequence[Run]) -> float | None:
    """What a setting comes to on the validation split, over its seeds; None where a run failed or diverged."""
    scores = [run.metrics.score for run in runs if run.metrics is not None and run.metrics.fitted]
    finite = [score for score in scores if score is not None]
    return statistics.fmean(finite) if finite and len(finite) == len(runs) else None


def tuning_runs(study: Study, method: Method, runs: Iterable[Run]) -> list[Run]:
    """Keep of a method's runs those by which its setting is chosen."""
    return [run for run in runs if run.trial.seed in study.tune_seeds and run.trial.setting in method.settings]


def make_rows(study: Study, runs: Sequence[Run]) -> list[Row]:
    """Bring the runs of each recipe and method together: the baselines, then the methods, in the study file's order."""
    rows: list[Row] = []
    starts = {one.name: Start(preparation=one, metrics=read_metrics(one.folder)) for one in study.needed()}
    for recipe in study.recipes:
        label, own = study.labels[recipe], [run for run in runs if run.trial.recipe == recipe]
        for one in (*study.baselines, *study.methods):
            row = _row(label, one, [run for run in own if run.trial.method == _name(one)])
            names = () if isinstance(one, str) else one.starts
            rows.append(replace(row, starts=tuple(starts[name] for name in names)))
    return rows


def _name(one: Method | str) -> str:
    return one if isinstance(one, str) else one.name


def _row(label: str, one: Method | str, runs: Sequence[Run]) -> Row:
    """Make the row of a method, or of a baseline given by its name."""
    tested = [(r.trial, r.metrics) for r in runs if r.chosen and not r.failure and r.metrics and r.metrics.test]
    seen = [metrics for _, metrics in tested]
    chosen = next((run.trial.setting for run in runs if run.chosen), None)
    cost = _cost([metrics.cost for metrics in seen])
    method = None if isinstance(one, str) else one
    rows, tests = [read_rows(trial.folder) for trial, _ in tested], [metrics.test or {} for metrics in seen]
    classes = next((known for metrics in seen if isinstance(known := metrics.data.get("classes"), list)), [])
    return Row(
        recipe=label,
        method=_name(one),
        baseline=method is None,
        full=method is not None and str(method.peft["class_path"]).rsplit(".", 1)[-1] == FULL_FINE_TUNING,
        grid=method.lrs if method else (),
        lr=chosen.lr if chosen else None,
        seeds=tuple(trial.seed for trial, _ in tested),
        primary=seen[0].primary if seen else "",
        mode=seen[0].mode if seen else "max",
        val=_spread([metrics.score for metrics in seen]),
        test=_test(seen),
        # A baseline's zeros would win every comparison of what training costs.
        cost=cost if method else {name: value for name, value in cost.items() if value > 0},
        failed=sum(run.failure is not None for run in runs),
        decays=method.weight_decays if method else (),
        weight_decay=chosen.weight_decay if chosen else None,
        worst=worst_class(rows, tests, classes),
        worst_group=worst_group(rows, tests, seen[0].primary, seen[0].mode) if seen else None,
        times=_times([metrics.cost for metrics in seen]),
    )


def _test(seen: Sequence[Metrics]) -> dict[str, Spread]:
    names = dict.fromkeys(name for metrics in seen for name in metrics.test or {})
    spreads = {name: _spread([(metrics.test or {}).get(name) for metrics in seen]) for name in names}
    return {name: spread for name, spread in spreads.items() if spread is not None}


def _spread(values: Iterable[float | None]) -> Spread | None:
    numbers = [value for value in values if value is not None]
    return Spread.of(numbers) if numbers else None


def _cost(costs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Take sizes from the first run, which seeds do not change, and medians of times, which other work may disturb."""
    if not costs:
        return {}
    numbers = _numbers(costs[0])
    for name in TIMES:
        times = [cost[name] for cost in costs if isinstance(cost.get(name), int | float)]
        if times:
            numbers[name] = statistics.median(times)
    memory = _numbers(costs[0].get("train_memory") or {})
    return numbers | {f"memory_{part}": memory[part] for part in (*MEMORY_PARTS, "total") if part in memory}


def _times(costs: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, ...]]:
    known = [_numbers(cost) for cost in costs]
    return {name: tuple(cost[name] for cost in known) for name in TIMES if all(name in cost for cost in known)}


def _numbers(raw: Mapping[str, Any]) -> dict[str, float]:
    """Keep what is a number; what a run could not measure is null and left out."""
    return {key: value for key, value in raw.items() if isinstance(value, int | float) and not isinstance(value, bool)}
