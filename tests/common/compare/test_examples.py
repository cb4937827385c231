"""Metrics put together from single examples: against scipy and torchmetrics, and on repeated rows."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torchmetrics.functional import classification

from common.compare.examples import contradicts, read_rows, scored

RNG = np.random.default_rng(0)


def rows_of(**columns):
    size = len(next(iter(columns.values())))
    return [{"id": f"e{place}", **{key: values[place] for key, values in columns.items()}} for place in range(size)]


def named(numbers):
    return [f"class{number}" for number in numbers]


def tensors(*arrays):
    return [torch.tensor(array) for array in arrays]


TRUTH, FOUND = RNG.integers(3, size=60), RNG.integers(3, size=60)
CHANCE, TWO = RNG.random(60).round(1), RNG.integers(2, size=60)
LEVELS = RNG.normal(size=60).round(1)
ERRORS, WORDS = RNG.integers(4, size=60), RNG.integers(4, 9, size=60)
CLASSES = rows_of(label=named(TRUTH), prediction=named(FOUND))
PAIRS = rows_of(
    label=named(TWO),
    prediction=named((CHANCE >= 0.5).astype(int)),
    probability=np.maximum(CHANCE, 1 - CHANCE).tolist(),
)
REFERENCE = {
    "accuracy": (CLASSES, float((TRUTH == FOUND).mean())),
    "uar": (CLASSES, float(classification.multiclass_recall(*tensors(FOUND, TRUTH), 3, average="macro"))),
    "macro_f1": (CLASSES, float(classification.multiclass_f1_score(*tensors(FOUND, TRUTH), 3, average="macro"))),
    "auroc": (PAIRS, float(classification.binary_auroc(*tensors(CHANCE, TWO)))),
    "spearman": (
        rows_of(label=TRUTH.astype(float).tolist(), prediction=LEVELS.tolist()),
        float(stats.spearmanr(TRUTH, LEVELS).statistic),
    ),
    "wer_lower": (
        rows_of(errors=ERRORS.tolist(), words=WORDS.tolist(), wer_lower=(ERRORS / WORDS).tolist()),
        ERRORS.sum() / WORDS.sum(),
    ),
    "dice": (rows_of(dice=LEVELS.tolist()), LEVELS.mean()),
}


@pytest.mark.parametrize("name", REFERENCE)
def test_a_metric_is_found_by_the_value_that_the_run_recorded(name):
    rows, recorded = REFERENCE[name]
    found = scored(rows, name, recorded)
    assert found.ids == tuple(row["id"] for row in rows)
    assert found.metric(np.ones((1, 60)))[0] == pytest.approx(recorded, abs=2e-5)
    assert (found.scores is not None) == (name in ("accuracy", "dice"))
    assert scored(rows, name, recorded + 0.01) is None


@pytest.mark.parametrize("name", REFERENCE)
def test_a_weight_is_a_number_of_repeats(name):
    rows, recorded = REFERENCE[name]
    metric = scored(rows, name, recorded).metric
    weights = RNG.integers(3, size=(4, 60))
    for row, value in zip(weights, metric(weights.astype(float)), strict=True):
        repeated = [
            {**rows[place], "id": f"{place}-{copy}"} for place, count in enumerate(row) for copy in range(count)
        ]
        again = scored(repeated, name, value)
        assert again.metric(np.ones((1, len(repeated))))[0] == pytest.approx(value)


def test_residues_are_judged_letter_by_letter():
    rows = rows_of(label=["AB.", "ABAB"] * 6, prediction=["AAA", "ABBA"] * 6)
    assert scored(rows, "accuracy", 3 / 6).metric(np.ones((1, 12)))[0] == pytest.approx(0.5)


def test_without_a_class_a_draw_says_nothing():
    rows, recorded = REFERENCE["auroc"]
    lonely = (TWO == 0).astype(float)[None]
    assert math.isnan(scored(rows, "auroc", recorded).metric(lonely)[0])


@pytest.mark.parametrize(
    "rows",
    [
        [],
        CLASSES[:5],
        [*CLASSES, CLASSES[0]],
        rows_of(accuracy=[None] * 60),
        rows_of(label=list(range(60)), prediction=["a"] * 60),
    ],
)
def test_rows_that_carry_no_scores_are_left_alone(rows):
    assert scored(rows, "accuracy", 0.5) is None


def test_rows_contradict_a_number_that_was_written_by_hand():
    rows, recorded = REFERENCE["accuracy"]
    assert contradicts(rows, "accuracy", recorded) is None
    assert contradicts(rows, "accuracy", recorded + 0.05) == pytest.approx(recorded)
    words, rate = REFERENCE["wer_lower"]
    assert contradicts(words, "wer_lower", rate) is None
    assert contradicts(words, "wer_lower", rate - 0.05) == pytest.approx(rate)
    assert contradicts([], "accuracy", 0.5) is None
    # Pooled Dice is no mean over cases, so rows decide nothing.
    assert contradicts(REFERENCE["dice"][0], "dice", 0.99) is None
    assert contradicts(rows_of(accuracy=LEVELS.tolist()), "accuracy", 0.99) is None


def test_rows_are_read_line_by_line(tmp_path):
    assert read_rows(tmp_path) == []
    (tmp_path / "predictions.jsonl").write_text("\n".join(json.dumps(row) for row in CLASSES) + "\n\n")
    assert read_rows(tmp_path) == CLASSES
