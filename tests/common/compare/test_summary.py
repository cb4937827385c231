"""The words of a report claim what the numbers carry and no more."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from common.compare.results import Metrics, Row, Run, Spread
from common.compare.study import Trial
from common.compare.summary import noise, summarise


def row(method, values, cost=(100, 10.0), grid=(1e-4, 1e-3, 1e-2), mode="max"):
    return Row(
        recipe="r",
        method=method,
        baseline=False,
        full=method == "Full",
        grid=grid,
        lr=1e-3,
        seeds=tuple(range(len(values))),
        primary="accuracy",
        mode=mode,
        val=None,
        test={"accuracy": Spread.of(values)},
        cost={"params_trainable": cost[0], "memory_total": cost[1]},
        failed=0,
    )


FULL = row("Full", [0.70, 0.72, 0.74], cost=(1000, 40.0))


def test_a_gap_smaller_than_the_spread_is_called_so():
    near, far = row("Near", [0.69, 0.71, 0.73]), row("Far", [0.59, 0.60, 0.61])
    summary = summarise([near, far, FULL], [])
    assert summary.headline.startswith("Full has the highest test accuracy: 0.720 ± 0.020 (mean of 3 seeds).")
    assert "Near (0.710) is within the spread of it" in summary.headline
    assert "Far" not in summary.headline
    assert (
        "Near is 0.010 worse than Full (within the spread), with 10 % of its trainable parameters and 25 %"
        in (summary.findings[0])
    )
    assert "Far is 0.120 worse than Full (beyond the spread)" in summary.findings[1]


def test_noise_is_the_deviation_of_a_difference():
    assert noise(Spread.of([1, 3]), Spread.of([0, 4])) == pytest.approx(math.sqrt(2 + 8))
    assert noise(Spread.of([1]), Spread.of([0, 4])) is None


def test_less_is_better_turns_the_words():
    summary = summarise([row("A", [0.2, 0.21], mode="min"), replace(row("Full", [0.4, 0.41]), mode="min")], [])
    assert summary.headline.startswith("A has the lowest test accuracy")
    assert "A is 0.200 better than Full (beyond the spread)" in summary.findings[0]


def test_one_seed_claims_no_spread():
    summary = summarise([row("A", [0.7]), row("Full", [0.71])], [])
    assert "within" not in summary.headline
    assert "(spread unknown)" in summary.findings[0]
    assert any("one seed" in line for line in summary.cautions)


def test_the_cheapest_is_named_and_ties_are_not():
    cheap, same = row("Cheap", [0.5, 0.6], cost=(5, 10.0)), row("Same", [0.5, 0.6], cost=(7, 10.0))
    findings = summarise([cheap, same, FULL], []).findings
    assert findings[-1] == "Cheap trains the fewest parameters (5)."
    assert not any("memory (" in line for line in findings)


def test_ends_of_grids_and_unequal_grids_are_cautions():
    at_end = replace(row("End", [0.5, 0.6]), lr=1e-2)
    single = row("Single", [0.5, 0.6], grid=(1e-3,))
    cautions = " ".join(summarise([at_end, single, FULL], []).cautions)
    assert "a better one may lie beyond: End (0.01)." in cautions
    assert "(End 3, Single 1 and Full 3)" in cautions


def test_a_method_without_result_or_with_nan_is_said_so():
    empty = replace(row("Empty", [0.5]), seeds=(), test={}, lr=None)
    broken = row("Broken", [0.5, math.nan])
    summary = summarise([empty, broken, FULL], [])
    assert "Empty has no result." in summary.cautions
    assert "Broken diverged on the test split." in summary.cautions
    assert summarise([empty], []).headline == "No run gave a result."


def untrained(method, values, mode="max"):
    return replace(
        row(method, values, mode=mode), baseline=True, full=False, lr=None, grid=(), cost={"fit_seconds": 1.0}
    )


def test_a_baseline_is_no_method_that_trains():
    cheap = row("Cheap", [0.60, 0.62, 0.64], cost=(5, 10.0))
    summary = summarise([untrained("Nearest", [0.5, 0.5, 0.5]), cheap, FULL], [])
    assert summary.headline.startswith("Of the trained methods, Full has the highest test accuracy: 0.720 ± 0.020")
    assert "Nearest" not in summary.headline
    assert summary.findings == (
        "Nearest, which is not trained, reaches 0.500 ± 0.000: Full is 0.220 better than it (beyond the spread).",
        "Cheap is 0.100 worse than Full (beyond the spread), with 0.5 % of its trainable parameters and 25 % of its "
        "training memory.",
        "Cheap trains the fewest parameters (5) and needs the least training memory (10 B).",
    )
    assert summary.cautions == ()


@pytest.mark.parametrize(
    ("mode", "values", "words"),
    [
        ("max", [0.80, 0.80, 0.80], "It does not beat Nearest, where nothing is trained."),
        ("max", [0.71, 0.71, 0.71], "It does not clearly beat Nearest, where nothing is trained."),
        ("min", [0.60, 0.60, 0.60], "It does not beat Nearest, where nothing is trained."),
        ("max", [0.60, 0.60, 0.60], None),
    ],
)
def test_a_baseline_that_is_not_beaten_stands_in_the_main_sentence(mode, values, words):
    headline = summarise([untrained("Nearest", values, mode), replace(FULL, mode=mode)], []).headline
    assert ("Nearest" in headline) == (words is not None)
    assert (words or "") in headline


def test_baselines_alone_are_told_and_win_nothing():
    failed = replace(row("A", [0.5]), seeds=(), test={}, lr=None)
    summary = summarise([untrained("Nearest", [0.5, 0.5]), failed], [])
    assert summary.headline == "No method gave a result."
    assert summary.findings == ("Nearest, which is not trained, reaches 0.500 ± 0.000.",)
    assert summary.cautions == ("A has no result.",)


@pytest.mark.parametrize(
    ("digests", "redrawn", "warned"),
    [("aabb", False, True), ("aabb", True, False), ("aaab", True, True), ("aaaa", False, False)],
)
def test_data_may_differ_between_seeds_where_the_study_draws_them_so(digests, redrawn, warned):
    def run(method, seed, digest):
        trial = Trial(recipe="r", method=method, lr=1.0, seed=seed, folder=Path("f"), options=())
        kept = {"fitted": True, "primary": "accuracy", "mode": "max", "val": {}, "test": {}, "cost": {}}
        metrics = Metrics(**kept, data={"digest": digest}, environment={}, backbone="b")
        return Run(trial=trial, metrics=metrics, chosen=True, failure=None)

    runs = [run(method, seed, digests[2 * seed + i]) for seed in (0, 1) for i, method in enumerate("AB")]
    cautions = summarise([row("A", [0.5, 0.6])], runs, redrawn=redrawn).cautions
    assert any("did not all see the same data" in line for line in cautions) == warned
