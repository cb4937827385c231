"""Protein tasks: what a batch becomes, what is measured, a run from fit to export and resume."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math

import pytest
import torch
from torch.nn import functional as F

from common.checkpoint import LAST, read_checkpoint
from common.errors import GraftError
from common.exchange import export, load, merge
from common.loading import mix_seed
from common.methods import BitFit, FullFineTune, LinearProbe, LoRA
from common.run import fit, read_record
from common.run import test as run_test
from common.task import OptimSpec
from domains.protein._alphabet import PAD
from domains.protein.backbones import MASK, lm_logits, residue_features
from domains.protein.data._records import IGNORE
from domains.protein.data.base import ProteinData
from domains.protein.residue_tasks import JudgedCrossEntropy, MaskedLM, ResidueClassification
from domains.protein.tasks import MultiLabel, PairClassification, SequenceClassification, SequenceRegression
from tests.domains.protein.conftest import DOMAINS, ESM, NAMES, UNIREP, Toy, data_of, task_of

pytestmark = pytest.mark.usefixtures("tiny")

LORA = LoRA(on=["all"], rank=2)
QUIET = {"accelerator": "cpu", "max_epochs": 1}
TASKS = {
    "classes": SequenceClassification,
    "labels": MultiLabel,
    "value": SequenceRegression,
    "pairs": PairClassification,
    "residues": ResidueClassification,
    "unlabelled": MaskedLM,
}
SHAPES = {"classes": (3,), "labels": (2,), "value": (), "pairs": (2,), "residues": (3, None), "unlabelled": (26, None)}
kinds = pytest.mark.parametrize("kind", list(TASKS))


def batch_of(data, number=0):
    return list(data.test_dataloader())[number]


# ---- outputs and losses --------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("backbone", [ESM, UNIREP])
def test_outputs_fit_targets_and_padding_changes_nothing(kind, backbone):
    data = data_of(kind)
    made = task_of(LORA, data, TASKS[kind], backbone=backbone)
    batch = batch_of(data)
    outputs = made.infer(batch)
    length = batch.residues.shape[1]
    assert outputs.shape == (len(batch.residues), *(length if side is None else side for side in SHAPES[kind]))
    assert torch.isfinite(made.loss(outputs, made.targets(batch)))
    assert torch.isfinite(made.compute_loss(batch))
    padded = batch._replace(
        residues=F.pad(batch.residues, (0, 3), value=PAD),
        mask=F.pad(batch.mask, (0, 3)),
        target=F.pad(batch.target, (0, 3), value=IGNORE) if kind == "residues" else batch.target,
        second=F.pad(batch.second, (0, 2), value=PAD) if kind == "pairs" else batch.second,
    )
    again = made.infer(padded)[..., :length] if None in SHAPES[kind] else made.infer(padded)
    shown = batch.mask[:, None] if None in SHAPES[kind] else torch.ones(1, dtype=torch.bool)
    torch.testing.assert_close(again * shown, outputs * shown, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        made.loss(made.infer(padded), made.targets(padded)), made.loss(outputs, made.targets(batch))
    )


@pytest.mark.parametrize("pooling", ["mean", "cls", "attention"])
def test_a_protein_is_pooled_as_asked(pooling):
    data = data_of()
    made = task_of(LORA, data, pooling=pooling, head="mlp", hidden=5)
    batch = batch_of(data)
    features = residue_features(made._built, made.backbone, batch.residues, batch.mask, start=pooling == "cls")
    if pooling == "mean":
        pooled = torch.stack([row[keep].mean(dim=0) for row, keep in zip(features, batch.mask, strict=True)])
    elif pooling == "cls":
        pooled = features[:, 0]
    else:
        pooled = made.head.pool(features, batch.mask)
    assert made.head.classifier[0].out_features == 5
    torch.testing.assert_close(made(batch), made.head.classifier(pooled))


def test_the_loss_weighs_and_smooths(tmp_path):
    data = Toy()
    made = SequenceClassification(ESM, LORA, class_weights="balanced", label_smoothing=0.2, pretrained=False)
    fit(made, data, tmp_path / "run", **QUIET)
    labels = [record.label for record in data.records("train")]
    expected = torch.tensor([len(labels) / (3 * labels.count(name)) for name in NAMES["classes"]])
    torch.testing.assert_close(made.loss.weight, expected)
    assert made.loss.label_smoothing == 0.2
    assert task_of(LORA, data_of(), class_weights="balanced").loss.weight is None  # there is nothing to count in


def test_residues_are_weighed_by_their_own_counts():
    data = data_of("residues")
    made = ResidueClassification(ESM, LORA, class_weights="balanced", pretrained=False)
    counts = made._train_labels(data.records("train"))
    assert counts["H"] == sum(record.label.count("H") for record in data.records("train"))


def test_values_are_learned_in_standard_deviations_and_told_in_their_own_unit():
    data = data_of("value")
    made = task_of(LORA, data, SequenceRegression)
    values = [float(record.label) for record in data.records("train")]
    mean = sum(values) / len(values)
    std = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
    batch = batch_of(data)
    raw = made.head(made.features(batch), batch.mask)[:, 0]
    torch.testing.assert_close(made(batch), raw * std + mean)
    torch.testing.assert_close(made.compute_loss(batch), (raw - (batch.target - mean) / std).square().mean())


def test_a_pair_has_no_order_and_is_seen_in_one_pass():
    data = data_of("pairs")
    made = task_of(LORA, data, PairClassification)
    batch = batch_of(data)
    swapped = batch._replace(residues=batch.second, mask=batch.second != PAD, second=batch.residues)
    torch.testing.assert_close(made(swapped), made(batch))
    first = residue_features(made._built, made.backbone, batch.residues, batch.mask)
    other = batch.second != PAD
    second = residue_features(made._built, made.backbone, batch.second, other)
    torch.testing.assert_close(made(batch), made.head(first, batch.mask, second, other), atol=1e-5, rtol=1e-4)


def test_residues_without_a_label_are_not_learned_from():
    loss = JudgedCrossEntropy(torch.tensor([1.0, 2.0]))
    outputs, targets = torch.randn(2, 2, 4, requires_grad=True), torch.tensor([[0, 1, IGNORE, 0], [IGNORE] * 4])
    logs = outputs.log_softmax(dim=1)
    expected = -(logs[0, 0, 0] + 2 * logs[0, 1, 1] + logs[0, 0, 3]) / 4
    torch.testing.assert_close(loss(outputs, targets), expected)
    nothing = loss(outputs, torch.full((2, 4), IGNORE))
    nothing.backward()
    assert float(nothing.detach()) == 0.0
    assert float(outputs.grad.abs().max()) == 0.0


# ---- hidden residues -----------------------------------------------------------------------------------------------


def long_batch(data, made):
    """The test proteins over and over, so that shares can be counted."""
    batch = batch_of(data)
    return batch._replace(
        residues=batch.residues.repeat(400, 1),
        mask=batch.mask.repeat(400, 1),
        index=torch.arange(400 * len(batch.index)),
    )


def test_residues_are_hidden_replaced_and_left_by_their_shares():
    data = data_of("unlabelled")
    made = task_of(LORA, data, MaskedLM, share=0.4)
    batch = long_batch(data, made)
    given, wanted = made._hide_fixed(batch)
    asked = wanted != IGNORE
    assert not (asked & ~batch.mask).any()
    assert asked.any(dim=1).all()
    assert torch.equal(wanted[asked], batch.residues[asked])
    assert torch.equal(given[~asked], batch.residues[~asked])
    assert float(asked.sum() / batch.mask.sum()) == pytest.approx(0.4, abs=0.02)
    assert float((given == MASK).sum() / asked.sum()) == pytest.approx(0.8, abs=0.02)
    changed = asked & (given != MASK) & (given != batch.residues)
    assert float(changed.sum() / asked.sum()) == pytest.approx(0.1 * 19 / 20, abs=0.01)
    assert int(given[changed].max()) < 20


@pytest.mark.parametrize("backbone", [ESM, UNIREP])
def test_letters_without_a_symbol_are_never_asked_for(backbone):
    data = data_of("unlabelled")
    made = task_of(LORA, data, MaskedLM, backbone=backbone)
    batch = batch_of(data)
    odd = batch._replace(residues=torch.where(batch.mask & (batch.residues < 5), 25, batch.residues))  # J
    _, wanted = made._hide_fixed(odd)
    assert int(wanted.max()) < 20
    torch.manual_seed(0)
    assert float(made.compute_loss(odd)) < 100


def test_evaluation_asks_for_the_same_residues_in_any_batch():
    data = data_of("unlabelled")
    made = task_of(LORA, data, MaskedLM)
    batch = batch_of(data)
    given, wanted = made._hide_fixed(batch)
    turned = type(batch)(*(tensor.flip(0) for tensor in batch))
    assert torch.equal(made._hide_fixed(turned)[0], given.flip(0))
    assert torch.equal(made.targets(turned), wanted.flip(0))
    logits = lm_logits(made._built, made.backbone, given, batch.mask).movedim(-1, 1)
    torch.testing.assert_close(made.infer(batch), logits)


def test_training_asks_anew_at_every_step():
    data = data_of("unlabelled")
    made = task_of(LORA, data, MaskedLM)
    batch = batch_of(data)
    losses = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        losses.append(float(made.compute_loss(batch)))
    assert losses[0] == losses[2] != losses[1]


def test_a_model_that_reads_from_left_to_right_tells_every_residue():
    data = data_of("unlabelled")
    made = task_of(LORA, data, MaskedLM, backbone=UNIREP)
    batch = batch_of(data)
    given, wanted = made._hide_fixed(batch)
    assert torch.equal(given, batch.residues)
    assert torch.equal(wanted, batch.residues.masked_fill(~batch.mask, IGNORE))


def test_a_backbone_without_an_output_layer_cannot_go_on(monkeypatch):
    data = data_of("unlabelled")
    made = MaskedLM(ESM, LORA, pretrained=False)
    made.facts = data.facts
    made.build_backbone()
    object.__setattr__(made._built, "lm_head", None)
    with pytest.raises(GraftError, match="has no output layer of a language model to go on with"):
        made.build_head()
    with pytest.raises(GraftError, match="share is 1"):
        MaskedLM(ESM, LORA, share=1.0)


def test_the_domain_offers_what_it_names():
    domain = DOMAINS["protein"]
    for name in domain.tasks:
        assert domain.load_task(name).domain == "protein"
    for name, module in domain.data.items():
        assert issubclass(getattr(importlib.import_module(module), name), ProteinData)
    assert callable(domain.load_predict())
    assert callable(domain.load_embed())


# ---- facts and results ---------------------------------------------------------------------------------------------


@kinds
def test_data_of_another_kind_is_refused(kind):
    made = TASKS[kind](ESM, LORA, pretrained=False)
    other = "value" if kind == "classes" else "classes"
    with pytest.raises(GraftError, match=r"needs data with .*, and this has .*\. Take another task or other data"):
        made.facts = data_of(other).facts
    with pytest.raises(GraftError, match="Unknown class_weights 'balancd'"):
        task_of(LORA, data_of(), class_weights="balancd")


@kinds
def test_facts_survive_a_file(kind):
    data = data_of(kind, max_length=9, long="window")
    made = task_of(LORA, data, TASKS[kind])
    described = made.describe_facts()
    assert json.loads(json.dumps(described)) == described
    other = TASKS[kind](ESM, LinearProbe(), pretrained=False)
    other.load_facts(described)
    assert other.describe_facts() == described
    assert (other.facts.max_length, other.facts.long, other.facts.std) == (9, "window", data.facts.std)


def test_the_primary_metric_follows_from_the_classes():
    data, two = data_of(), data_of(names=("watery", "oily"))
    assert task_of(LORA, data).primary == ("accuracy", "max")
    assert task_of(LORA, two).primary == ("auroc", "max")
    for made in (task_of(LORA, data), task_of(LORA, two)):
        assert made.primary[0] in made.build_metrics()
    assert "f1_oily" in task_of(LORA, data).build_metrics()


@kinds
def test_a_run_records_tests_and_predicts(kind, tmp_path):
    run = tmp_path / "run"
    options = {"backbone": ESM, "pretrained": False, "seed": 1}
    record = fit(TASKS[kind](peft=LORA, **options), Toy(kind), run, **QUIET)
    assert (record["domain"], record["backbone"]) == ("protein", ESM)
    record = run_test(TASKS[kind](peft=LORA, **options), Toy(kind), run, accelerator="cpu")
    assert record["primary"]["name"] in record["test"]
    assert all(math.isfinite(value) for value in record["test"].values())
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    records = data_of(kind).records("test")
    assert [row["id"] for row in rows] == [found.id for found in records]
    check = {
        "classes": lambda row: row["prediction"] in NAMES["classes"] and 0 < row["probability"] <= 1,
        "pairs": lambda row: row["prediction"] in NAMES["pairs"],
        "labels": lambda row: set(row["probabilities"]) == set(NAMES["labels"]),
        "value": lambda row: isinstance(row["prediction"], float),
        "residues": lambda row: len(row["prediction"]) == len(row["label"]) and set(row["prediction"]) <= set("HEC"),
        "unlabelled": lambda row: row["asked"] > 0 and 0 <= row["accuracy"] <= 1,
    }[kind]
    assert all(check(row) for row in rows)
    if kind == "classes":  # the rows are each record's own, though batches go from short to long
        right = sum(row["prediction"] == found.label for row, found in zip(rows, records, strict=True))
        assert record["test"]["accuracy"] == pytest.approx(right / len(rows))
    if kind == "value":
        errors = [row["prediction"] - float(found.label) for row, found in zip(rows, records, strict=True)]
        assert record["test"]["rmse"] == pytest.approx(math.sqrt(sum(e * e for e in errors) / len(errors)), rel=1e-4)
    if kind == "residues":
        pairs = [(a, b) for row in rows for a, b in zip(row["label"], row["prediction"], strict=True) if a != "."]
        assert record["test"]["accuracy"] == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))


@kinds
def test_a_row_names_the_group_where_one_is_stated(kind):
    data = data_of(kind)
    stated = [dataclasses.replace(record, group="family" * (n % 2)) for n, record in enumerate(data.records("test"))]
    data._records["test"] = tuple(stated)
    made = task_of(LinearProbe(), data, TASKS[kind])
    with torch.no_grad():
        outputs = [made.keep(made.infer(batch)) for batch in data.test_dataloader()]
    rows = made.predictions(outputs, data, None)
    assert [row.get("group") for row in rows] == [record.group or None for record in stated]


def test_the_stretches_of_a_long_protein_are_put_together_again():
    data = data_of("residues", max_length=4, long="window", tokens_per_batch=8)
    made = task_of(LinearProbe(), data, ResidueClassification)
    with torch.no_grad():
        outputs = [made.keep(made.infer(batch)) for batch in data.test_dataloader()]
    names = {name: number for number, name in enumerate(NAMES["residues"])}
    truth = [batch.target.clamp(min=0).to(torch.uint8) for batch in data.test_dataloader()]
    for rows, check in ((made.predictions(outputs, data, None), None), (made.predictions(truth, data, None), 1.0)):
        for row, record in zip(rows, data.records("test"), strict=True):
            assert len(row["prediction"]) == len(record.sequence)
            if check is not None:
                shown = "".join(name if name in names else NAMES["residues"][0] for name in record.label)
                assert row["prediction"] == shown
                assert row["accuracy"] == 1.0


# ---- runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "backbone"), [*((kind, ESM) for kind in TASKS), ("unlabelled", UNIREP)])
def test_a_resumed_run_is_bit_identical(kind, backbone, tmp_path):
    options = {"backbone": backbone, "pretrained": False, "seed": 3, "optim": OptimSpec(lr=1e-2)}

    def new():
        return TASKS[kind](peft=LORA, **options), Toy(kind, max_length=8, long="window", seed=3)

    fit(*new(), tmp_path / "whole", accelerator="cpu", max_epochs=2)
    steps = len(data_of(kind, max_length=8, long="window").train_dataloader())
    assert steps > 3

    class Stop(Exception):
        pass

    task, data = new()
    original = task.on_train_batch_start

    def stop_in_the_second_epoch(batch, batch_idx):
        if task.trainer.global_step == steps + 2:
            raise Stop
        original(batch, batch_idx)

    task.on_train_batch_start = stop_in_the_second_epoch
    with pytest.raises(Stop):
        fit(task, data, tmp_path / "parts", accelerator="cpu", max_epochs=2, save_every=steps + 2)
    assert read_checkpoint(tmp_path / "parts" / LAST)["global_step"] == steps + 2
    fit(*new(), tmp_path / "parts", accelerator="cpu", max_epochs=2, resume=True)
    whole, parts = (read_checkpoint(tmp_path / name / LAST)["state_dict"] for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name
    assert read_record(tmp_path / "whole")["val"] == read_record(tmp_path / "parts")["val"]


@pytest.mark.parametrize(
    ("kind", "peft"),
    [*((kind, LORA) for kind in TASKS), ("classes", LinearProbe()), ("value", FullFineTune()), ("pairs", BitFit())],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_an_export_reloads_merges_and_does_as_its_card_says(kind, peft, tmp_path):
    options = {"backbone": ESM, "pretrained": False, "seed": 1}
    fit(TASKS[kind](peft=peft, **options), Toy(kind), tmp_path / "run", **QUIET)
    certificate = export(tmp_path / "run", tmp_path / "out", read_record(tmp_path / "run"), DOMAINS)
    assert certificate["reload_max_abs_error"] == 0.0
    task = load(tmp_path / "out", DOMAINS)
    assert merge(tmp_path / "out", tmp_path / "merged", DOMAINS) < 1e-4
    card = (tmp_path / "out" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix_seed(1, 0))  # random weights stand in for pretrained ones: draw them as the task did
        scope = {"FOLDER": str(tmp_path / "out")}
        exec(code, scope)
    residues, mask = scope["residues"], scope["mask"]
    second = scope.get("second", residues[:, :0])
    batch = task.example_batch()._replace(residues=residues, mask=mask, second=second)
    with torch.no_grad():
        expected = task(batch)
    found = scope["outputs"]
    torch.testing.assert_close(found.movedim(-1, 1) if found.ndim == 3 else found, expected, atol=1e-6, rtol=1e-5)


def test_gradient_checkpointing_changes_no_result():
    data = data_of()
    losses = []
    for switched in (False, True):
        made = task_of(LORA, data, backbone=UNIREP, gradient_checkpointing=switched)
        loss = made.compute_loss(batch_of(data))
        loss.backward()
        losses.append((loss.detach(), made.head.classifier.weight.grad.clone()))
    torch.testing.assert_close(losses[0], losses[1])
