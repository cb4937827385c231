"""Intervals, tests and ranks against scipy, textbook formulas and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from common.compare.statistics import (
    LEVEL,
    Sample,
    average_ranks,
    difference,
    holm,
    interval,
    pareto_front,
    permutation_p,
    relative_gap,
)


def mean_of(scores):
    return lambda weights: weights @ scores / weights.sum(axis=1)


def sample(table, **changes):
    """A method whose metric is the mean of scores (S, n)."""
    table = np.asarray(table, dtype=float)
    made = {"seeds": tuple(range(len(table))), "values": table.mean(axis=1), "sizes": (table.shape[1],) * len(table)}
    return Sample(**{**made, "weighted": tuple(mean_of(row) for row in table), **changes})


def plain(values, seeds=None):
    return Sample(seeds=tuple(seeds or range(len(values))), values=np.array(values, dtype=float))


def test_over_examples_alone_the_interval_is_the_textbooks():
    scores = np.random.default_rng(0).random(400)
    found = interval(sample([scores]))
    reach = stats.norm.ppf(0.975) * scores.std() / math.sqrt(400)
    assert found.over == "examples"
    assert (found.low, found.high) == pytest.approx((scores.mean() - reach, scores.mean() + reach), abs=0.15 * reach)


def test_over_seeds_alone_the_interval_is_as_wide_as_students():
    values = np.random.default_rng(1).normal(size=12)
    found = interval(plain(values))
    low, high = stats.t.interval(LEVEL, 11, values.mean(), stats.sem(values))
    assert found.over == "seeds"
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.15 * (high - low))


def test_both_sources_make_a_wider_interval_than_each():
    rng = np.random.default_rng(2)
    table = (rng.random((5, 300)) < 0.7) + rng.normal(scale=0.02, size=(5, 1))
    widths = [
        found.high - found.low
        for found in (interval(sample(table)), interval(sample(table, weighted=())), interval(sample(table[:1])))
    ]
    assert interval(sample(table)).over == "seeds and examples"
    assert widths[0] > max(widths[1:])


def test_one_seed_without_scores_and_what_is_not_finite_have_no_interval():
    assert interval(plain([0.5])) is None
    assert interval(plain([0.5, math.nan])) is None
    assert difference(plain([0.5]), plain([0.4])) is None
    assert difference(plain([0.5, 0.6]), plain([0.4, math.nan])) is None
    assert difference(plain([0.5, 0.6]), plain([0.4, 0.3], seeds=[8, 9])) is None


def test_over_seeds_alone_the_paired_test_is_students():
    rng = np.random.default_rng(3)
    one, two = rng.normal(size=6), rng.normal(size=6)
    expected = stats.ttest_rel(one, two)
    found = difference(plain(one), plain(two))
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(LEVEL)))
    assert (found.value, found.over) == (pytest.approx(np.mean(one - two)), "seeds")


def test_over_examples_alone_the_paired_test_is_students_nearly():
    rng = np.random.default_rng(4)
    one = rng.random(500)
    two = one + rng.normal(scale=0.2, size=500) + 0.02
    found = difference(sample([one]), sample([two]))
    assert found.over == "examples"
    assert found.p == pytest.approx(stats.ttest_rel(one, two).pvalue, rel=0.25)


def test_pairs_are_by_seed_whatever_the_order_and_only_those_of_both():
    one, two = plain([0.5, 0.7, 0.1], seeds=[1, 2, 9]), plain([0.6, 0.3, 0.41], seeds=[2, 7, 1])
    expected = stats.ttest_rel([0.5, 0.7], [0.41, 0.6])
    assert difference(one, two).p == pytest.approx(expected.pvalue)


def test_equal_runs_are_no_difference_and_constant_ones_are():
    assert difference(plain([0.5, 0.6]), plain([0.5, 0.6])).p == 1.0
    assert difference(plain([0.5, 0.6]), plain([0.4, 0.5])).p == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(("seeds", "spread", "examples"), [(3, 0.03, 0), (3, 0.03, 60), (3, 0.0, 60), (5, 0.1, 60)])
def test_the_test_seldom_cries_wolf(seeds, spread, examples):
    """Two methods that are alike: models vary with the seed, examples are easier for one or the other."""
    rng, alarms, runs = np.random.default_rng(5), 0, 300
    for _ in range(runs):
        tables = []
        tilt = rng.normal(scale=0.3, size=examples or 1)
        for sign in (1, -1):
            effect = rng.normal(scale=spread, size=(seeds, 1))
            noise = rng.normal(scale=0.1, size=(seeds, examples or 1)) if examples else 0.0
            tables.append(0.5 + effect + (sign * tilt + noise if examples else np.zeros((seeds, 1))))
        made = [sample(table) if examples else plain(table[:, 0]) for table in tables]
        alarms += difference(*made).p < 0.05
    assert alarms / runs <= 0.05 + 2.5 * math.sqrt(0.05 * 0.95 / runs)


def test_a_difference_that_is_there_is_found():
    rng = np.random.default_rng(9)
    base = rng.random((3, 1)) * 0.02 + rng.random(400)
    found = difference(sample(base + 0.05 + rng.normal(scale=0.1, size=base.shape)), sample(base))
    assert found.p < 0.01
    assert 0 < found.low < 0.05 < found.high < 0.1


def test_examples_of_their_own_are_drawn_for_each_seed():
    """Shared examples move all seeds together, own ones average out."""
    scores = np.random.default_rng(6).random(50)
    shared, own = sample([scores] * 4), sample([scores] * 4, nested=True)
    assert own.drawn.mean(axis=0).std() == pytest.approx(shared.drawn.mean(axis=0).std() / 2, rel=0.15)
    assert (shared.drawn[0] == shared.drawn[1]).all()


def test_seeds_may_have_tests_of_different_sizes():
    few, many = np.random.default_rng(10).random(20), np.random.default_rng(11).random(80)
    both = Sample(
        seeds=(0, 1),
        values=np.array([few.mean(), many.mean()]),
        weighted=(mean_of(few), mean_of(many)),
        sizes=(20, 80),
        nested=True,
    )
    expected = [scores.std() / math.sqrt(len(scores)) for scores in (few, many)]
    assert both.drawn.std(axis=1) == pytest.approx(expected, rel=0.1)
    assert both.on([1]).sizes == (80,)


def test_many_examples_are_drawn_in_blocks_like_few(monkeypatch):
    scores = np.random.default_rng(7).random(30)
    whole = sample([scores]).drawn
    monkeypatch.setattr("common.compare.statistics._BLOCK", 3000)
    parts = sample([scores]).drawn
    assert parts.shape == whole.shape
    assert parts.std() == pytest.approx(whole.std(), rel=0.2)


def test_signs_are_flipped_exhaustively_for_few_and_at_random_for_many():
    gaps = np.array([0.1, 0.4, -0.2, 0.3, 0.25])
    expected = stats.permutation_test((gaps,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert permutation_p(gaps) == pytest.approx(expected.pvalue)
    assert permutation_p([0.1, 0.1, 0.1]) == pytest.approx(2 / 2**3)
    many = np.random.default_rng(8).normal(0.1, 1.0, size=300)
    assert permutation_p(many) == pytest.approx(stats.ttest_1samp(many, 0).pvalue, abs=0.02)
    assert permutation_p([0.0, 0.0]) == permutation_p([]) == 1.0


def test_holm_is_the_textbooks_step_down():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_ranks_friedman_and_the_critical_difference():
    table = [{"a": 0.9, "b": 0.8, "c": 0.7}, {"a": 0.5, "b": 0.5, "c": 0.1}, {"a": 2.0, "b": 3.0, "c": 4.0}]
    table = [*table, {"a": 0.9, "b": 0.6, "c": 0.7, "d": 1.0}]
    better = ["max", "max", "min", "max"]
    found = average_ranks(table, better)
    assert dict(found.ranks) == {"a": (1 + 1.5 + 1 + 1) / 4, "b": (2 + 1.5 + 2 + 3) / 4, "c": (3 + 3 + 3 + 2) / 4}
    assert list(found.ranks) == ["a", "b", "c"]
    columns = [
        [-row[name] if mode == "min" else row[name] for row, mode in zip(table, better, strict=True)] for name in "abc"
    ]
    assert found.p == pytest.approx(stats.friedmanchisquare(*columns).pvalue)
    assert found.sets == 4


@pytest.mark.parametrize(("methods", "quantile"), [(3, 2.343), (5, 2.728), (10, 3.164)])
def test_the_critical_difference_uses_the_published_quantiles(methods, quantile):
    """Table 5(a) of Demsar 2006."""
    sets = 7
    table = [{f"m{place}": float(place + row) for place in range(methods)} for row in range(sets)]
    found = average_ranks(table, ["max"] * sets)
    assert found.critical == pytest.approx(quantile * math.sqrt(methods * (methods + 1) / (6 * sets)), abs=2e-3)


def test_too_little_to_rank():
    assert average_ranks([], []) is None
    assert average_ranks([{"a": 1.0}, {"a": 2.0, "b": 1.0}], ["max", "max"]) is None
    two = average_ranks([{"a": 1.0, "b": 2.0}], ["max"])
    assert (list(two.ranks), two.p, two.critical) == (["b", "a"], None, None)
    tied = average_ranks([{"a": 1.0, "b": 1.0, "c": 1.0}] * 2, ["max"] * 2)
    assert tied.p == 1.0


def test_the_front_is_of_places():
    points = [(9, 0.6), (1, 0.5), (2, 0.4), (2, 0.6)]
    assert pareto_front(points, more_is_better=True) == [1, 3]
    assert pareto_front(points, more_is_better=False) == [1, 2]


def test_the_gap_is_a_share_of_the_reference_and_knows_what_is_better():
    assert relative_gap(0.66, 0.6, "max") == pytest.approx(0.1)
    assert relative_gap(0.66, 0.6, "min") == pytest.approx(-0.1)
    assert relative_gap(-0.5, -0.4, "max") == pytest.approx(-0.25)
    assert relative_gap(0.5, 0.0, "max") is None
    assert relative_gap(math.nan, 1.0, "max") is None
