"""Protein metrics against torchmetrics, scipy and formulas written here; what saturates and what is constant."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_average_precision,
    multiclass_f1_score,
    multiclass_matthews_corrcoef,
)

from domains.protein.data._records import IGNORE
from domains.protein.metrics import (
    Auroc,
    ClassF1,
    Matthews,
    Perplexity,
    Spearman,
    class_keys,
    class_metrics,
    label_metrics,
    margins,
    ranks,
    value_metrics,
)


def random_logits(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fed(metric, *batches):
    for outputs, targets in batches:
        metric.update(outputs, targets)
    return metric.compute()


def split_in_batches(outputs, targets, size=7):
    return list(zip(outputs.split(size), targets.split(size), strict=True))


def test_margins_are_log_odds():
    logits = random_logits(5, 4)
    probability = logits.double().softmax(dim=1)
    torch.testing.assert_close(margins(logits), (probability / (1 - probability)).log())
    two = random_logits(5, 2)
    torch.testing.assert_close(margins(two)[:, 1], (two[:, 1].double() - two[:, 0].double()))


def test_ranks_are_shared_by_equal_values():
    values = torch.tensor([3.0, 1.0, 3.0, 2.0, 3.0, 2.0])
    assert ranks(values).tolist() == stats.rankdata(values.numpy()).tolist()


def test_two_classes_are_judged_by_the_second():
    logits, targets = random_logits(40, 2), torch.arange(40) % 3 % 2
    found = fed(class_metrics(["other", "peptide"]), *split_in_batches(logits, targets))
    assert set(found) == {"accuracy", "mcc", "auroc", "aupr", "f1"}
    score, guess = logits.double().softmax(dim=1)[:, 1], logits.argmax(dim=1)
    torch.testing.assert_close(found["auroc"], binary_auroc(score, targets).float())
    torch.testing.assert_close(found["aupr"], binary_average_precision(score, targets).float())
    hit, false, missed = ((guess == a) & (targets == b) for a, b in ((1, 1), (1, 0), (0, 1)))
    torch.testing.assert_close(found["f1"], 2 * hit.sum() / (2 * hit.sum() + false.sum() + missed.sum()))
    expected = np.corrcoef(guess.numpy(), targets.numpy())[0, 1]  # Matthews correlation of two binary vectors
    assert float(found["mcc"]) == pytest.approx(expected, abs=1e-6)
    assert float(found["accuracy"]) == pytest.approx(float((guess == targets).float().mean()))


def test_certain_answers_are_still_ranked_and_the_batch_does_not_matter():
    # In single precision all of these have probability 1; and the first batch's logits lie in [0, 1].
    logits = torch.tensor([[0.0, 0.5], [0.0, 0.9], [0.0, 30.0], [0.0, 40.0], [0.0, 50.0], [0.0, 60.0]])
    targets = torch.tensor([0, 0, 1, 0, 1, 1])
    pairs = [(p, n) for p in (30, 50, 60) for n in (0.5, 0.9, 40)]
    expected = sum(p > n for p, n in pairs) / len(pairs)
    assert float(fed(Auroc(2), (logits, targets))) == pytest.approx(expected)
    assert float(fed(Auroc(2), *split_in_batches(logits, targets, 2))) == pytest.approx(expected)


def test_several_classes_are_averaged_and_one_that_is_not_there_says_nothing():
    logits, targets = random_logits(60, 4), torch.arange(60) % 3  # no example of the last class
    names = ["a", "b", "c", "d"]
    found = fed(class_metrics(names), *split_in_batches(logits, targets))
    assert set(found) == {"accuracy", "mcc", "auroc", "aupr", "macro_f1", "f1_a", "f1_b", "f1_c", "f1_d"}
    scores = logits.double().softmax(dim=1)
    for key, one in (("auroc", binary_auroc), ("aupr", binary_average_precision)):
        by_class = [one(scores[:, number], (targets == number).long()) for number in range(3)]
        torch.testing.assert_close(found[key], torch.stack(by_class).mean().float())
    each = multiclass_f1_score(logits, targets, 4, average="none")
    assert [float(found[f"f1_{name}"]) for name in names] == pytest.approx(each.tolist())
    torch.testing.assert_close(found["mcc"], multiclass_matthews_corrcoef(logits, targets, 4))


def test_residues_without_a_label_are_in_no_metric():
    logits, targets = random_logits(3, 4, 9), torch.randint(0, 4, (3, 9), generator=torch.Generator().manual_seed(1))
    hidden = torch.arange(27).view(3, 9) % 4 == 0
    metrics = class_metrics(list("abcd"))
    found = fed(metrics, (logits, targets.masked_fill(hidden, IGNORE)))
    flat, shown = logits.movedim(1, -1)[~hidden], targets[~hidden]
    expected = fed(class_metrics(list("abcd")), (flat, shown))
    assert found.keys() == expected.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key])


def test_a_split_of_one_class_has_no_ranking():
    assert torch.isnan(fed(Auroc(2), (random_logits(4, 2), torch.ones(4, dtype=torch.long))))
    assert float(fed(ClassF1(1, 2), (torch.tensor([[1.0, 0.0]]), torch.tensor([0])))) == 0.0


def test_one_answer_for_all_has_no_matthews_correlation():
    logits = torch.tensor([[0.0, 1.0]]).repeat(9, 1)
    assert float(fed(Matthews(2), (logits, torch.arange(9) % 2))) == 0.0
    assert float(fed(Matthews(2), (logits, torch.ones(9, dtype=torch.long)))) == 0.0


def test_labels_that_go_together_are_judged_one_by_one():
    logits, targets = random_logits(30, 3), (random_logits(30, 3, seed=2) > 0.3).float()
    found = fed(label_metrics(["x", "y", "z"]), *split_in_batches(logits, targets))
    for key, one in (("auroc", binary_auroc), ("aupr", binary_average_precision)):
        scores = logits.double().sigmoid()
        expected = torch.stack([one(scores[:, n], targets[:, n].long()) for n in range(3)]).mean()
        torch.testing.assert_close(found[key], expected.float())


def test_correlations_are_scipys():
    found, wanted = random_logits(50), random_logits(50, seed=1).round(decimals=1)  # with ties
    got = fed(value_metrics(), *split_in_batches(found, wanted))
    assert float(got["spearman"]) == pytest.approx(stats.spearmanr(found, wanted).statistic, abs=1e-6)
    assert float(got["pearson"]) == pytest.approx(stats.pearsonr(found, wanted).statistic, abs=1e-6)
    assert float(got["rmse"]) == pytest.approx(float((found - wanted).square().mean().sqrt()))


def test_a_constant_has_no_order():
    assert float(fed(Spearman(), (torch.ones(5), torch.arange(5.0)))) == 0.0


def test_perplexity_is_over_all_judged_letters_of_the_split():
    big, small = (random_logits(2, 5, 6), random_logits(1, 5, 3, seed=1))
    targets = [torch.randint(0, 5, (b.shape[0], b.shape[2])) for b in (big, small)]
    targets[0][:, ::2] = IGNORE
    losses = []
    for logits, target in zip((big, small), targets, strict=True):
        for row, letters in zip(logits, target, strict=True):
            losses += [-float(row[:, at].log_softmax(0)[letter]) for at, letter in enumerate(letters) if letter >= 0]
    found = fed(Perplexity(), *zip((big, small), targets, strict=True))
    assert float(found) == pytest.approx(float(np.exp(np.mean(losses))), rel=1e-5)
    assert float(fed(Perplexity(), (torch.zeros(1, 20, 4), torch.zeros(1, 4, dtype=torch.long)))) == pytest.approx(20)


def test_names_of_classes_become_names_of_metrics():
    assert class_keys(["a/b", "a b", "EC 1.1", "é"]) == ["f1_a_b", "f1_a_b__2", "f1_EC_1_1", "f1_"]
