"""The words of a report claim what the numbers carry and no more."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from scipy import stats

from common.compare.results import Row, Spread
from common.compare.summary import summarise


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
NEAR, FAR = row("Near", [0.73, 0.69, 0.71]), row("Far", [0.59, 0.60, 0.63])


def test_what_a_paired_test_does_not_tell_apart_is_called_so():
    summary = summarise([NEAR, FAR, FULL], [])
    assert summary.headline == (
        "Full has the highest test accuracy: 0.720 ± 0.020 (mean of 3 seeds). Near (0.710) is not told apart from it."
    )
    assert (
        "Near is 0.010 worse than Full (not told apart), with 10 % of its trainable parameters and 25 %"
        in (summary.findings[0])
    )
    # Two comparisons with the same method: Holm doubles the smaller p.
    p = stats.ttest_rel([0.59, 0.60, 0.63], [0.70, 0.72, 0.74]).pvalue
    assert f"Far is 0.113 worse than Full (p {2 * p:.2g})" in summary.findings[1]
    assert any("The tests are over seeds alone" in line for line in summary.cautions)


def test_calibration_is_told_where_runs_recorded_it():
    def calibrated(base, ece):
        return replace(base, test={**base.test, "ece": Spread.of([ece])})

    findings = summarise([calibrated(NEAR, 0.3), calibrated(FAR, 0.01), calibrated(FULL, 0.05)], []).findings
    assert "Worse calibrated than Full (expected error 0.050): Near (0.300)." in findings
    assert "Better calibrated than Full (expected error 0.050): Far (0.010)." in findings
    assert not any("calibrated" in line for line in summarise([NEAR, FAR, FULL], []).findings)


def test_who_is_on_every_front_and_who_on_none():
    cheap, beaten = row("Cheap", [0.6, 0.6, 0.61], cost=(1, 1.0)), row("Beaten", [0.5, 0.5, 0.51], cost=(900, 39.0))
    findings = summarise([cheap, beaten, FULL], []).findings
    assert "On the Pareto front whatever the cost: Cheap and Full." in findings
    assert "On no Pareto front, by the means: Beaten." in findings


def test_less_is_better_turns_the_words():
    summary = summarise([row("A", [0.2, 0.21], mode="min"), replace(row("Full", [0.4, 0.41]), mode="min")], [])
    assert summary.headline.startswith("A has the lowest test accuracy")
    assert "A is 0.200 better than Full (p < 0.0001)" in summary.findings[0]


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
    p = stats.ttest_1samp([0.20, 0.22, 0.24], 0).pvalue  # the larger of two is not corrected
    assert summary.headline.startswith("Of the trained methods, Full has the highest test accuracy: 0.720 ± 0.020")
    assert "Nearest" not in summary.headline
    assert summary.findings == (
        f"Nearest, which is not trained, reaches 0.500 ± 0.000: Full is 0.220 better than it (p {p:.2g}).",
        "Cheap is 0.100 worse than Full (p < 0.0001), with 0.5 % of its trainable parameters and 25 % of its "
        "training memory.",
        "Cheap trains the fewest parameters (5) and needs the least training memory (10 B).",
    )
    assert len(summary.cautions) == 1  # what the tests are over


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
