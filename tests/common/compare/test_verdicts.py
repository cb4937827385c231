"""Fabricated results of studies, and what the tests of claims say of them."""

from __future__ import annotations

import numpy as np
import pytest

from common.compare.verdicts import TESTS, decide, read_test
from common.errors import GraftError

FULL = [0.70, 0.71, 0.72]
ABOVE, LEVEL, BELOW = [0.80, 0.812, 0.82], [0.7, 0.712, 0.72], [0.60, 0.612, 0.62]
WIDE = [0.60, 0.72, 0.85]


@pytest.fixture
def ask(fabric):
    """Ask one test of one set, made of one number for each seed."""

    def asked(test, results, **options):
        block = fabric.block(f"set{len(list(fabric.folder.iterdir()))}", {"FullFineTune": FULL, **results}, **options)
        return decide([read_test(test, "here")], [block])

    return asked


LORA = {"method": "LoRA", "reference": "FullFineTune"}


@pytest.mark.parametrize(
    ("test", "values", "answer"),
    [
        ({"within_points": {**LORA, "points": 1}}, LEVEL, "holds"),
        ({"within_points": {**LORA, "points": 1}}, ABOVE, "holds"),
        ({"within_points": {**LORA, "points": 1}}, BELOW, "does not hold"),
        ({"within_points": {**LORA, "points": 1}}, WIDE, "inconclusive"),
        ({"ahead_of": LORA}, ABOVE, "holds"),
        ({"ahead_of": LORA}, BELOW, "does not hold"),
        ({"ahead_of": LORA}, LEVEL, "inconclusive"),
        ({"ahead_of": {**LORA, "points": 15}}, ABOVE, "does not hold"),
        ({"improves": {**LORA, "share": 0.1}}, ABOVE, "holds"),
        ({"improves": {**LORA, "share": 0.2}}, ABOVE, "does not hold"),
        ({"spread_within": {"methods": ["LoRA", "FullFineTune"], "points": 2}}, LEVEL, "holds"),
        ({"spread_within": {"methods": ["LoRA", "FullFineTune"], "points": 2}}, ABOVE, "does not hold"),
        ({"spread_within": {"methods": ["LoRA", "FullFineTune"], "points": 2}}, WIDE, "inconclusive"),
        ({"ranks": {"order": ["LoRA", "FullFineTune"]}}, ABOVE, "holds"),
        ({"ranks": {"order": ["LoRA", "FullFineTune"]}}, BELOW, "does not hold"),
        ({"ranks": {"order": ["LoRA", "FullFineTune"]}}, LEVEL, "inconclusive"),
    ],
)
def test_an_interval_decides(ask, test, values, answer):
    outcome = ask(test, {"LoRA": values})
    assert outcome.answer == answer
    assert "LoRA" in outcome.figures


def test_less_errors_are_better(ask):
    errors = {"mode": "min", "metric": "wer_lower"}
    assert ask({"ahead_of": LORA}, {"LoRA": BELOW}, **errors).answer == "holds"
    outcome = ask({"improves": {**LORA, "share": 0.1}}, {"LoRA": BELOW}, **errors)
    assert outcome.answer == "holds"
    assert "LoRA is 0.099 better than FullFineTune" in outcome.figures
    assert "+14 % of its result" in outcome.figures


def test_another_metric_has_its_own_direction(ask):
    extra = {"ece": {"LoRA": ABOVE, "FullFineTune": FULL}}
    worse = {"method": "FullFineTune", "reference": "LoRA", "metric": "ece"}
    assert ask({"ahead_of": worse}, {"LoRA": ABOVE}, extra=extra).answer == "holds"


def test_more_parameters_than_the_claim_speaks_of_prove_nothing(ask):
    test = {"within_points": {**LORA, "points": 1, "max_percent": 1}}
    for share, answer in ((0.5, "holds"), (6.7, "inconclusive")):
        assert ask(test, {"LoRA": LEVEL}, costs={"LoRA": {"trainable_percent": share}}).answer == answer
    # A new head is no part of what the claim counts.
    counts = {"params_trainable_backbone": 9.0, "params_trainable_head": 1000.0, "params_total": 2000.0}
    assert ask(test, {"LoRA": LEVEL}, costs={"LoRA": {"trainable_percent": 50.0, **counts}}).answer == "holds"


@pytest.mark.parametrize(
    ("limits", "answer"),
    [({"at_least": 0.25}, "holds"), ({"at_least": 0.35}, "does not hold"), ({"at_most": 0.1}, "does not hold")],
)
def test_savings_are_shares_of_the_references_cost(ask, limits, answer):
    costs = {"LoRA": {"fit_seconds": 70.0}, "FullFineTune": {"fit_seconds": 100.0}}
    outcome = ask({"saves": {**LORA, "cost": "fit_seconds", **limits}}, {"LoRA": LEVEL}, costs=costs)
    assert outcome.answer == answer
    assert "LoRA saves 30 % of FullFineTune's fit seconds" in outcome.figures
    slower = {"LoRA": {"fit_seconds": 120.0}, "FullFineTune": {"fit_seconds": 100.0}}
    outcome = ask({"saves": {**LORA, "cost": "fit_seconds", "at_most": 0.0}}, {"LoRA": LEVEL}, costs=slower)
    assert outcome.answer == "holds"
    assert "LoRA takes 20 % more than FullFineTune's fit seconds" in outcome.figures
    assert ask({"saves": {**LORA, "at_least": 0.1}}, {"LoRA": LEVEL}).answer == "inconclusive"


def test_times_that_vary_over_the_seeds_decide_by_their_interval(ask):
    """The interval is SciPy's for the paired logarithms; 6 % less by the medians proves nothing where seeds vary so."""
    from scipy.stats import ttest_rel

    noisy = {"LoRA": {"step_seconds": [0.22, 0.21, 0.26]}, "FullFineTune": {"step_seconds": [0.23, 0.25, 0.22]}}
    no_faster = {"saves": {**LORA, "cost": "step_seconds", "at_most": 0.0}}
    outcome = ask(no_faster, {"LoRA": LEVEL}, costs=noisy)
    logs = [np.log(noisy[name]["step_seconds"]) for name in ("LoRA", "FullFineTune")]
    low, high = 1 - np.exp(ttest_rel(*logs).confidence_interval()[::-1])
    assert outcome.answer == "inconclusive"
    assert f"{100 * (1 - np.exp(np.mean(logs[0] - logs[1]))):.0f} % of FullFineTune's step seconds" in outcome.figures
    assert f"(saving {100 * low:+.0f} to {100 * high:+.0f} % over seeds)" in outcome.figures
    faster = {"LoRA": {"step_seconds": [0.11, 0.12, 0.11]}, "FullFineTune": {"step_seconds": [0.23, 0.25, 0.22]}}
    assert ask(no_faster, {"LoRA": LEVEL}, costs=faster).answer == "does not hold"
    assert (
        ask({"saves": {**LORA, "cost": "step_seconds", "at_least": 0.4}}, {"LoRA": LEVEL}, costs=faster).answer
        == "holds"
    )


def test_one_time_proves_no_saving(ask):
    once = {"LoRA": {"step_seconds": 0.1}, "FullFineTune": {"step_seconds": 0.2}}
    costs = {"saves": {**LORA, "cost": "step_seconds", "at_least": 0.1}}
    outcome = ask(costs, {"LoRA": LEVEL[:1], "FullFineTune": FULL[:1]}, costs=once)
    assert (outcome.answer, outcome.figures) == ("inconclusive", "set0: spread of step_seconds unknown (one seed)")


def test_what_is_counted_needs_no_interval(ask):
    sizes = {"LoRA": {"flops_per_step": 90.0}, "FullFineTune": {"flops_per_step": 100.0}}
    counted = {"saves": {**LORA, "cost": "flops_per_step", "at_most": 0.11}}
    outcome = ask(counted, {"LoRA": LEVEL[:1], "FullFineTune": FULL[:1]}, costs=sizes)
    assert (outcome.answer, outcome.figures) == ("holds", "set0: LoRA saves 10 % of FullFineTune's flops per step")


def test_the_best_of_several_is_chosen_on_validation(ask):
    """SSF is the better one on the test split; validation says LoRA."""
    several = {"ahead_of": {"method": ["LoRA", "SSF"], "reference": "FullFineTune"}}
    outcome = ask(several, {"LoRA": BELOW, "SSF": ABOVE}, val={"LoRA": 0.9, "SSF": 0.1})
    assert outcome.answer == "does not hold"
    assert "LoRA is" in outcome.figures


def test_a_lead_that_grows_along_the_sets(fabric):
    first = fabric.block("large", {"LoRA": BELOW, "FullFineTune": FULL})
    last = fabric.block("small", {"LoRA": ABOVE, "FullFineTune": FULL})
    grows = read_test({"grows_with": {**LORA, "starts_below": True}}, "here")
    assert decide([grows], [first, last]).answer == "holds"
    assert decide([grows], [last, first]).answer == "does not hold"
    assert decide([grows], [first, first]).answer == "inconclusive"
    assert decide([grows], [first]).answer == "inconclusive"


def test_places_against_types(fabric):
    rng = np.random.default_rng(0)
    names = {"LoRA": 0.5, "Down": 0.3, "Up": 0.45, "SSF": 0.51, "Adapter": 0.49}
    results = {name: [value + rng.normal(scale=0.002) for _ in range(4)] for name, value in names.items()}
    block = fabric.block("r", results)
    places, types = ["LoRA", "Down", "Up"], ["LoRA", "SSF", "Adapter"]
    cases = ((places, types, "holds"), (types, places, "does not hold"), (types, types, "inconclusive"))
    for varied, than, answer in cases:
        test = read_test({"matters_more": {"varied": varied, "than": than}}, "here")
        assert decide([test], [block]).answer == answer


def test_all_tests_and_all_sets_must_agree_and_one_that_fails_decides(fabric):
    good, bad, open_ = (
        fabric.block(name, {"LoRA": values, "FullFineTune": FULL})
        for name, values in (("good", ABOVE), ("bad", BELOW), ("open", LEVEL))
    )
    ahead = read_test({"ahead_of": LORA}, "here")
    assert decide([ahead], [good, good]).answer == "holds"
    assert decide([ahead], [good, open_]).answer == "inconclusive"
    outcome = decide([ahead], [good, open_, bad])
    assert outcome.answer == "does not hold"
    assert all(f"{name}: " in outcome.figures for name in ("good", "bad", "open"))
    only = read_test({"ahead_of": {**LORA, "on": ["good"]}}, "here")
    assert decide([only], [good, bad]).answer == "holds"
    assert decide([only, ahead], [good, bad]).answer == "does not hold"
    assert decide([only], [bad]).answer == "inconclusive"


def test_results_that_are_not_there_leave_it_open(fabric):
    one_seed = fabric.block("one", {"LoRA": [0.9], "FullFineTune": [0.1]})
    outcome = decide([read_test({"ahead_of": LORA}, "here")], [one_seed])
    assert outcome.answer == "inconclusive"
    assert "spread unknown (one seed)" in outcome.figures
    outcome = decide([read_test({"ahead_of": {"method": "SSF", "reference": "LoRA"}}, "here")], [one_seed])
    assert (outcome.answer, outcome.figures) == ("inconclusive", "one: no result of SSF")


@pytest.mark.parametrize(
    ("test", "words"),
    [
        ({"ahead_off": LORA}, "unknown test 'ahead_off'. Did you mean 'ahead_of'?"),
        ({"ahead_of": {"method": "LoRA"}}, "lacking reference"),
        ({"ahead_of": {**LORA, "point": 1}}, "unknown point"),
        ({"ahead_of": LORA, "ranks": {}}, "give one test"),
        ("ahead_of", "give one test"),
    ],
)
def test_a_test_that_is_no_such_is_refused(test, words):
    with pytest.raises(GraftError) as error:
        read_test(test, "here")
    assert words in str(error.value)


def test_every_test_says_what_it_asks():
    assert all(known.ask.__doc__ for known in TESTS.values())
