"""Error rates against edit distances written here, and class metrics against their formulas."""

from __future__ import annotations

import random

import pytest
import torch
from torchmetrics.functional.classification import multiclass_f1_score, multiclass_recall

from domains.speech.metrics import Alignment, align, class_metrics, codes_of, text_metrics, texts_of

TEXTS = ["", "a", "the cat sat", "Ångström 語 \U0001f600 déjà", "una ñ"]


def distance(one, two):
    """Levenshtein's distance of two sequences."""
    row = list(range(len(two) + 1))
    for place, left in enumerate(one, start=1):
        last, row[0] = row[0], place
        for other, right in enumerate(two, start=1):
            last, row[other] = row[other], min(row[other] + 1, row[other - 1] + 1, last + (left != right))
    return row[-1]


def sentences(count, seed):
    draw = random.Random(seed)
    return [" ".join(draw.choice("ab bc cd de".split()) for _ in range(draw.randint(1, 6))) for _ in range(count)]


def test_texts_survive_as_numbers():
    for given in (TEXTS, [""], []):
        codes = codes_of(given)
        assert codes.shape == (len(given), max(map(len, given), default=0))
        assert texts_of(codes.float()) == given


@pytest.mark.parametrize("parts", [1, 3])
def test_error_rates_are_edit_distances_over_all_texts(parts):
    references, hypotheses = sentences(9, 1), ["", *sentences(8, 2)]
    metrics = text_metrics("lower")
    size = 9 // parts
    for start in range(0, 9, size):
        chosen = slice(start, start + size)
        metrics.update(codes_of(hypotheses[chosen]).float(), codes_of(references[chosen]))
    found = {name: float(value) for name, value in metrics.compute().items()}
    pairs = list(zip(references, hypotheses, strict=True))
    words = sum(len(reference.split()) for reference in references)
    assert found["wer_lower"] == pytest.approx(sum(distance(r.split(), h.split()) for r, h in pairs) / words)
    assert found["cer_lower"] == pytest.approx(sum(distance(r, h) for r, h in pairs) / sum(map(len, references)))
    counts = [found[f"words_{kind}"] for kind in ("substitutions", "deletions", "insertions")]
    assert sum(counts) == sum(distance(r.split(), h.split()) for r, h in pairs)
    assert found["words_reference"] == words


def test_the_normaliser_and_the_context_stand_in_the_names():
    names = set(text_metrics("english", "_full_context"))
    assert {"wer_english_full_context", "cer_english_full_context"} <= names
    assert all(name.endswith("_full_context") for name in names)


def test_an_alignment_has_the_fewest_edits_and_both_texts():
    found = align("the cat sat down", "a the cat sit")
    assert found.steps == (
        ("I", "", "a"),
        ("=", "the", "the"),
        ("=", "cat", "cat"),
        ("S", "sat", "sit"),
        ("D", "down", ""),
    )
    assert (found.errors, found.words, found.rate) == (3, 4, 0.75)
    assert align("", "so long").rate == 2
    assert align("", "") == Alignment(steps=())
    for reference, hypothesis in zip(sentences(20, 3), sentences(20, 4), strict=True):
        found = align(reference, hypothesis)
        assert found.errors == distance(reference.split(), hypothesis.split())
        assert " ".join(word for _, word, _ in found.steps if word) == reference
        assert " ".join(word for _, _, word in found.steps if word) == hypothesis


def test_class_metrics_are_those_of_torchmetrics_where_every_class_occurs():
    torch.manual_seed(0)
    logits, classes = torch.randn(60, 4), torch.arange(60) % 4
    metrics = class_metrics(4)
    for part in range(3):
        metrics.update(logits[part::3], classes[part::3])
    found = metrics.compute()
    torch.testing.assert_close(found["uar"], multiclass_recall(logits, classes, 4, average="macro"))
    torch.testing.assert_close(found["macro_f1"], multiclass_f1_score(logits, classes, 4, average="macro"))
    torch.testing.assert_close(found["accuracy"], (logits.argmax(dim=1) == classes).float().mean())


def test_a_class_that_does_not_occur_counts_only_where_it_is_predicted():
    metrics = class_metrics(3)
    metrics.update(torch.eye(3)[[0, 0, 1, 2]], torch.tensor([0, 0, 1, 1]))
    found = {name: float(value) for name, value in metrics.compute().items()}
    assert found["uar"] == pytest.approx((1 + 0.5) / 2)
    assert found["macro_f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)
