"""Baselines of proteins against formulas and scipy's optimum, and through `common.run`."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from common.errors import GraftError
from common.methods import LinearProbe
from common.run import baseline
from domains.protein.baselines import composition, fit_logistic, fit_ridge, kmer_nearest, majority_class
from domains.protein.data._records import IGNORE, ProteinBatch
from domains.protein.residue_tasks import MaskedLM, ResidueClassification
from domains.protein.tasks import MultiLabel, PairClassification, SequenceClassification, SequenceRegression
from tests.domains.protein.conftest import DOMAINS, ESM, NAMES, Toy, data_of

pytestmark = pytest.mark.usefixtures("tiny")

TASKS = {
    "classes": SequenceClassification,
    "labels": MultiLabel,
    "value": SequenceRegression,
    "pairs": PairClassification,
    "residues": ResidueClassification,
    "unlabelled": MaskedLM,
}
FUNCTIONS = {"MajorityClass": majority_class, "Composition": composition, "KmerNearest": kmer_nearest}


def bare(kind, data):
    made = TASKS[kind](ESM, LinearProbe(), pretrained=False)
    made.facts = data.facts
    return made


def outputs_of(name, kind):
    """The baseline's output for each test record, in their order, with data and batches."""
    data = data_of(kind)
    predict = FUNCTIONS[name](bare(kind, data), data)
    batches = list(data.test_dataloader())
    index = torch.cat([batch.index for batch in batches])
    return torch.cat([predict(batch) for batch in batches])[index.argsort()], data


def kmers(sequence):
    return {sequence[at : at + 3] for at in range(len(sequence) - 2)}


def jaccard(a, b):
    both = kmers(a) | kmers(b)
    return len(kmers(a) & kmers(b)) / len(both) if both else 0.0


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("kind", TASKS)
def test_a_baseline_runs_on_what_it_can_and_refuses_the_rest(name, kind, tmp_path):
    data, run = Toy(kind), tmp_path / "run"
    task = TASKS[kind](ESM, LinearProbe(), pretrained=False)
    if kind == "unlabelled" or (kind == "residues" and name != "MajorityClass"):
        with pytest.raises(GraftError, match=rf"{name} needs .*\. Leave it out, or take another baseline\."):
            baseline(task, data, run, name, FUNCTIONS[name], accelerator="cpu")
        return
    assert DOMAINS["protein"].load_baseline(name) is FUNCTIONS[name]
    record = baseline(task, data, run, name, FUNCTIONS[name], accelerator="cpu")
    assert record["test"].keys() == set(task.build_metrics())
    assert len((run / "predictions.jsonl").read_text().splitlines()) == 10
    assert json.loads((run / "metrics.json").read_text())["primary"]["name"] == task.primary[0]


def test_the_majority_class_has_its_share():
    logits, data = outputs_of("MajorityClass", "classes")
    labels = [record.label for record in data.records("train")]
    shares = torch.tensor([labels.count(name) / len(labels) for name in NAMES["classes"]])
    torch.testing.assert_close(logits.softmax(dim=1), shares.expand(10, 3))


def test_the_majority_of_labels_residues_and_values():
    logits, data = outputs_of("MajorityClass", "labels")
    labels = [record.label.split(";") for record in data.records("train")]
    shares = torch.tensor([sum(name in found for found in labels) / len(labels) for name in NAMES["labels"]])
    torch.testing.assert_close(logits.sigmoid(), shares.expand(10, 2))
    values, data = outputs_of("MajorityClass", "value")
    torch.testing.assert_close(values, torch.tensor(data.facts.mean).expand(10))
    data = data_of("residues")
    batch = next(iter(data.test_dataloader()))
    found = majority_class(bare("residues", data), data)(batch)
    text = "".join(record.label for record in data.records("train"))
    shares = torch.tensor([text.count(name) for name in "HEC"]) / sum(text.count(name) for name in "HEC")
    assert found.shape == (len(batch.residues), 3, batch.residues.shape[1])
    torch.testing.assert_close(found.softmax(dim=1), shares[None, :, None].expand_as(found))
    assert (batch.target != IGNORE).any()


@pytest.mark.parametrize("together", [False, True])
def test_logistic_regression_finds_the_optimum(together):
    rng = np.random.default_rng(0)
    x, k = rng.standard_normal((30, 4)), 3
    y = rng.integers(0, 2, (30, k)) if together else rng.integers(0, k, 30)
    weight, bias = fit_logistic(torch.as_tensor(x), torch.as_tensor(y), k)

    def loss(flat):
        w, b = flat[: 4 * k].reshape(4, k), flat[4 * k :]
        logits = x @ w + b
        if together:
            error = np.logaddexp(0, np.where(y == 1, -logits, logits)).sum()
        else:
            error = (np.logaddexp.reduce(logits, axis=1) - logits[np.arange(30), y]).sum()
        return error + 0.5 * (w**2).sum()

    best = minimize(loss, np.zeros(4 * k + k), method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-9})
    found = np.concatenate((weight.numpy().ravel(), bias.numpy()))
    assert loss(found) <= best.fun + 1e-8
    np.testing.assert_allclose(weight, best.x[: 4 * k].reshape(4, k), atol=1e-3)


def test_ridge_regression_has_no_gradient_left():
    rng = np.random.default_rng(1)
    x = torch.as_tensor(rng.standard_normal((20, 3)))
    x -= x.mean(dim=0)
    y = torch.as_tensor(rng.standard_normal(20))
    weight, bias = (value.clone().requires_grad_() for value in fit_ridge(x, y))
    ((x @ weight + bias - y).square().sum() + weight.square().sum()).backward()
    torch.testing.assert_close(weight.grad, torch.zeros(3, dtype=torch.double), atol=1e-9, rtol=0)
    torch.testing.assert_close(bias.grad, torch.zeros((), dtype=torch.double), atol=1e-9, rtol=0)


def test_composition_tells_kinds_of_residues_apart_and_knows_no_order():
    logits, data = outputs_of("Composition", "classes")
    names = NAMES["classes"]
    right = [names[int(row.argmax())] == r.label for row, r in zip(logits, data.records("test"), strict=True)]
    assert sum(right) >= 8
    predict = composition(bare("classes", data), data)
    batch = next(iter(data.test_dataloader()))
    whole = batch._replace(residues=batch.residues[:1, : int(batch.mask[0].sum())])
    turned = whole._replace(residues=whole.residues.flip(1))
    torch.testing.assert_close(predict(turned), predict(whole))
    pairs = data_of("pairs")
    predict, batch = composition(bare("pairs", pairs), pairs), next(iter(pairs.test_dataloader()))
    torch.testing.assert_close(predict(batch._replace(residues=batch.second, second=batch.residues)), predict(batch))


def test_the_nearest_neighbour_has_most_3mers_in_common():
    logits, data = outputs_of("KmerNearest", "classes")
    for row, record in zip(logits, data.records("test"), strict=True):
        for number, name in enumerate(NAMES["classes"]):
            near = [jaccard(record.sequence, other.sequence) for other in data.records("train") if other.label == name]
            assert float(row[number]) == pytest.approx(max(near))


def test_the_nearest_neighbours_value_is_taken():
    values, data = outputs_of("KmerNearest", "value")
    for value, record in zip(values, data.records("test"), strict=True):
        near = [(jaccard(record.sequence, other.sequence), float(other.label)) for other in data.records("train")]
        best = max(score for score, _ in near)
        equal = [label for score, label in near if score == best]
        assert float(value) == pytest.approx(sum(equal) / len(equal), rel=1e-5)


def test_a_pair_is_near_in_the_better_order():
    logits, data = outputs_of("KmerNearest", "pairs")
    for row, record in zip(logits, data.records("test"), strict=True):
        for number, name in enumerate(NAMES["pairs"]):
            near = [
                max(
                    jaccard(record.sequence, a) + jaccard(record.second, b),
                    jaccard(record.sequence, b) + jaccard(record.second, a),
                )
                / 2
                for a, b in ((other.sequence, other.second) for other in data.records("train") if other.label == name)
            ]
            assert float(row[number]) == pytest.approx(max(near), rel=1e-5)


def test_proteins_shorter_than_a_3mer_are_near_to_nothing():
    data = data_of("classes")
    predict = kmer_nearest(bare("classes", data), data)
    short = torch.tensor([[0, 1]])
    none = torch.zeros(1, 0, dtype=torch.long)
    found = predict(
        ProteinBatch(short, torch.ones_like(short, dtype=torch.bool), torch.tensor([0]), torch.tensor([0]), none)
    )
    assert found.tolist() == [[0.0, 0.0, 0.0]]
