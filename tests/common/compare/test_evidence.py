"""From runs to intervals, tests, fronts and ranks: what is resampled, what is compared with what."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest
from scipy import stats

from common.compare.evidence import direction, stand, weigh
from common.compare.records import write_csv
from common.compare.statistics import difference, holm, permutation_p
from common.compare.summary import overview
from common.compare.tables import columns, write_markdown

RNG = np.random.default_rng(0)
EASE = RNG.random(200)


def scores(lift=0.0, seeds=3, noise=0.1):
    return [np.clip(EASE + lift + RNG.normal(scale=noise, size=200), 0, 2) for _ in range(seeds)]


GOOD, NEAR, POOR = scores(0.1), scores(0.1), scores(0.0)
NAMED = {"LoRA": GOOD, "BitFit": NEAR, "LinearProbe": POOR, "FullFineTune": scores(0.12)}


def cells(block, title, **options):
    shown = columns(block.rows, block.comparison, every_metric=True)
    column = next(one for one in shown if one.title == title)
    return {row.method: column.text(row) for row in block.rows}


def test_examples_and_seeds_are_resampled_and_p_is_corrected_for_all_comparisons(fabric):
    compared = fabric.block("r", NAMED).comparison
    assert {one.over for one in compared.intervals.values()} == {"seeds and examples"}
    best = max(NAMED, key=lambda name: np.mean(NAMED[name]))
    assert compared.best == best
    others = [name for name in NAMED if name != best]
    raw = [difference(compared.samples[name], compared.samples[best]).p for name in others]
    assert [compared.to_best[name].p for name in others] == pytest.approx(holm(raw))
    assert compared.to_best["LinearProbe"].apart
    assert compared.to_full["LoRA"].p > compared.to_full["LinearProbe"].p
    assert "FullFineTune" not in compared.to_full


def test_an_examples_order_in_the_file_changes_nothing(fabric):
    block = fabric.block("r", NAMED)
    for path in fabric.folder.rglob("LoRA/*/predictions.jsonl"):
        path.write_text("\n".join(reversed(path.read_text().splitlines())) + "\n")
    again = weigh(block.rows, block.runs)
    before, after = block.comparison.to_full["LoRA"], again.to_full["LoRA"]
    assert (after.difference.low, after.p) == pytest.approx((before.difference.low, before.p))
    assert after.permutation == before.permutation
    assert again.intervals["LoRA"].low == pytest.approx(block.comparison.intervals["LoRA"].low)


def test_the_permutation_is_of_examples_averaged_over_the_seeds(fabric):
    compared = fabric.block("r", {"LoRA": NEAR, "FullFineTune": GOOD}).comparison
    gaps = np.mean(NEAR, axis=0) - np.mean(GOOD, axis=0)
    assert compared.to_full["LoRA"].permutation == pytest.approx(permutation_p(gaps), abs=0.02)


def test_a_method_without_scores_is_compared_over_seeds(fabric):
    compared = fabric.block("r", {"LoRA": [0.6, 0.7, 0.65], "FullFineTune": POOR}).comparison
    assert compared.intervals["LoRA"].over == "seeds"
    assert compared.intervals["FullFineTune"].over == "seeds and examples"
    tested = compared.to_full["LoRA"]
    means = [np.mean(values) for values in POOR]
    assert tested.difference.over == "seeds"
    assert tested.difference.p == pytest.approx(stats.ttest_rel([0.6, 0.7, 0.65], means).pvalue)
    assert tested.permutation is None


def test_examples_that_differ_between_methods_are_not_paired(fabric):
    block = fabric.block("r", {"LoRA": GOOD, "FullFineTune": POOR})
    for path in fabric.folder.rglob("LoRA/*/predictions.jsonl"):
        path.write_text(path.read_text().replace('"id": "0-7"', '"id": "other"'))
    assert weigh(block.rows, block.runs).to_full["LoRA"].difference.over == "seeds"


def test_data_drawn_anew_for_each_seed_is_resampled_within_it(fabric):
    compared = fabric.block("r", {"LoRA": GOOD, "FullFineTune": POOR}, redrawn=True).comparison
    assert compared.samples["LoRA"].nested
    assert compared.to_full["LoRA"].difference.over == "seeds and examples"


def test_one_seed_without_scores_proves_nothing(fabric):
    block = fabric.block("r", {"LoRA": [0.6], "FullFineTune": [0.7]})
    assert block.comparison.intervals == {}
    assert block.comparison.to_full == {}
    assert cells(block, "Against the best") == {"LoRA": "spread unknown", "FullFineTune": "best"}
    assert cells(block, "95 % interval")["LoRA"] == "–"  # noqa: RUF001


def test_a_diverged_method_is_left_out(fabric):
    compared = fabric.block("r", {"LoRA": [0.6, math.nan], "FullFineTune": [0.7, 0.8]}).comparison
    assert set(compared.means) == {"FullFineTune"}
    assert compared.best == "FullFineTune"


def test_baselines_are_compared_and_never_the_best(fabric):
    block = fabric.block("r", {"Nearest": [0.9, 0.9], "LoRA": [0.6, 0.61]}, baselines=["Nearest"])
    assert block.comparison.best == "LoRA"
    assert block.comparison.to_best["Nearest"].difference.value == pytest.approx(0.295)
    assert all("Nearest" not in names for names in block.comparison.fronts.values())


def test_fronts_by_every_cost_that_was_measured(fabric):
    costs = {
        "LoRA": {"params_trainable": 10, "adapter_bytes": 5},
        "BitFit": {"params_trainable": 20, "adapter_bytes": 1},
        "FullFineTune": {"params_trainable": 99, "adapter_bytes": 99},
    }
    results = {"LoRA": [0.7], "BitFit": [0.6], "FullFineTune": [0.8]}
    fronts = fabric.block("r", results, costs=costs).comparison.fronts
    assert fronts["params_trainable"] == ("LoRA", "FullFineTune")
    assert fronts["adapter_bytes"] == ("BitFit", "LoRA", "FullFineTune")
    assert fronts["memory_total"] == ()


def test_another_metric_can_be_compared_with_its_own_direction(fabric):
    extra = {"ece": {"LoRA": [0.3, 0.31], "FullFineTune": [0.05, 0.06]}}
    block = fabric.block("r", {"LoRA": [0.8, 0.81], "FullFineTune": [0.6, 0.61]}, extra=extra)
    compared = weigh(block.rows, block.runs, "ece")
    assert (compared.mode, compared.best) == ("min", "FullFineTune")


def test_tables_carry_intervals_marks_and_gaps(fabric, tmp_path):
    block = fabric.block("r", {"LoRA": GOOD, "LinearProbe": POOR, "FullFineTune": NAMED["FullFineTune"]})
    gap = np.mean(POOR) / np.mean(NAMED["FullFineTune"]) - 1
    assert cells(block, "Against full")["LinearProbe"].startswith(f"{100 * gap:+.1f} %, p")
    assert cells(block, "Against full")["FullFineTune"] == "the reference"
    write_csv([block], tmp_path / "results.csv")
    with (tmp_path / "results.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    found = block.comparison.intervals["LoRA"]
    assert float(rows["LoRA"]["test_primary_low"]) == found.low
    assert float(rows["LinearProbe"]["relative_gap_to_full"]) == pytest.approx(gap)
    assert rows["LoRA"]["resampled"] == "seeds and examples"
    assert rows["FullFineTune"]["p_to_full"] == ""
    assert sum(row["best"] == "True" for row in rows.values()) == 1


def test_ranks_and_gaps_over_several_sets(fabric, tmp_path):
    blocks = [
        fabric.block("a", {"LoRA": [0.7], "SSF": [0.6], "FullFineTune": [0.8]}),
        fabric.block("b", {"LoRA": [0.30], "SSF": [0.20], "FullFineTune": [0.25]}, mode="min", metric="wer_lower"),
        fabric.block("c", {"LoRA": [0.7], "SSF": [0.9], "FullFineTune": [0.5], "Odd": [0.9]}),
    ]
    standing = stand(blocks)
    assert dict(standing.ranking.ranks) == {
        "SSF": (3 + 1 + 1) / 3,
        "FullFineTune": (1 + 2 + 3) / 3,
        "LoRA": (2 + 3 + 2) / 3,
    }
    assert standing.gaps["SSF"] == pytest.approx({"a": -0.25, "b": 0.2, "c": 0.8})
    assert standing.left_out == ("Odd",)
    lines = overview(standing)
    assert lines[0] == "SSF has the best average rank over 3 sets (1.67), before FullFineTune (2.00) and LoRA (2.33)."
    assert "SSF lies between -25.0 % and +80.0 % from full fine-tuning (relative, above 0 is better)." in lines
    assert any("Friedman" in line for line in lines)
    write_markdown("Three sets", blocks, standing, [], tmp_path / "results.md")
    text = (tmp_path / "results.md").read_text()
    assert "| SSF | 1.67 | -25.0 % | +20.0 % | +80.0 % |" in text
    assert "Nemenyi" in text


def test_one_set_has_no_ranks(fabric):
    assert stand([fabric.block("a", {"LoRA": [0.7], "FullFineTune": [0.8]})]) is None


def test_amounts_of_data_of_one_recipe_are_ranked_without_a_test(fabric):
    results = {"LoRA": [0.7], "SSF": [0.6], "FullFineTune": [0.8]}
    standing = stand([fabric.block(f"r-{size}", results, recipe="r.yaml") for size in (5, 50)])
    assert standing.ranking.ranks["FullFineTune"] == 1
    assert (standing.ranking.p, standing.ranking.critical) == (None, None)


@pytest.mark.parametrize(
    "metric",
    ["wer", "wer_lower_full_context", "hd95_mm", "duration_error", "f0_rmse", "spectrum_distance", "mcd", "state_loss"],
)
def test_of_errors_and_distances_less_is_better(metric):
    assert direction(metric) == "min"


@pytest.mark.parametrize("metric", ["dice", "surface_dice_mm", "macro_f1", "speaker_similarity", "top5", "spearman"])
def test_of_all_else_more_is_better(metric):
    assert direction(metric) == "max"
