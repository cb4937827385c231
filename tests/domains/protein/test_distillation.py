"""Distillation: the loss is its formula, the teacher stays out of the student, and a run becomes a starter."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn import functional as F

from common.cli._explain import _names
from common.errors import GraftError
from common.exchange import export
from common.methods import FullFineTune
from common.run import fit, read_record
from common.task import AdaptedTask, OptimSpec
from domains.protein import distillation
from domains.protein._alphabet import STANDARD
from domains.protein.backbones import build, lm_logits, residue_features
from domains.protein.distillation import Distillation
from domains.protein.starters import starter_from_export
from tests.domains.protein.conftest import DOMAINS, ESM, UNIREP, Toy, data_of, task_of
from tests.domains.protein.nets import proteins


@pytest.fixture(autouse=True)
def teacher(tiny, monkeypatch):
    """A tiny UniRep, the same at every call."""

    @functools.cache
    def random_teacher(name):
        torch.manual_seed(5)
        return build(name, pretrained=False)

    monkeypatch.setattr(distillation, "build", random_teacher)
    return random_teacher(UNIREP)


def made(**options):
    return task_of(FullFineTune(), data_of("unlabelled"), Distillation, teacher=UNIREP, **options)


def test_without_letters_and_changes_the_loss_is_the_distance_of_states_and_means(teacher):
    task = made(lm_weight=0.0, changed=0.0, share=1e-9)
    task.train()
    batch = next(iter(data_of("unlabelled").test_dataloader()))
    spread = task._teacher[1]
    by_residue, by_mean, count = 0.0, 0.0, 0
    with torch.no_grad():
        # A hidden residue changes the features, so the formula is taken where none is hidden.
        loss = task._state_loss(task.features(batch), batch)
        for residues, mask in zip(batch.residues, batch.mask, strict=True):
            one, whole = residues[mask][None], mask[mask][None]
            wanted = residue_features(teacher, teacher.model, one, whole)[0] / spread
            guess = task.head.states(residue_features(task._built, task.backbone, one, whole)[0])
            by_residue += float((guess - wanted).square().mean(dim=1).sum())
            by_mean += float((guess.mean(dim=0) - wanted.mean(dim=0)).square().mean())
            count += len(wanted)
    expected = by_residue / count + 4 * by_mean / len(batch.residues)
    assert float(loss) == pytest.approx(expected, rel=1e-4)


def test_letters_are_asked_for_in_about_half_of_the_proteins(monkeypatch):
    task = made(lm_weight=1.0, share=0.5, changed=0.0)
    monkeypatch.setattr(task, "_state_loss", lambda features, batch: torch.zeros(()))
    asked = []
    task.loss.register_forward_pre_hook(lambda module, given: asked.append(given[1]))
    batch = next(iter(data_of("unlabelled").test_dataloader()))
    for seed in range(40):
        torch.manual_seed(seed)
        task.compute_loss(batch)
    shares = torch.cat([(wanted != -100).any(dim=1).float() for wanted in asked])
    assert float(shares.mean()) == pytest.approx(0.5, abs=0.1)


def test_a_changed_protein_keeps_its_length_and_has_few_kinds_of_residues():
    task = made(changed=1.0)
    residues, mask = proteins((300,) * 8)
    torch.manual_seed(0)
    drawn = task._change(residues, mask)
    assert drawn.shape == residues.shape
    assert int(drawn.max()) < len(STANDARD)
    replaced = (drawn != residues).float().mean(dim=1)
    assert float(replaced.min()) < 0.4 < float(replaced.max())
    assert torch.equal(made(changed=0.0)._change(residues, mask), residues)


def test_the_teacher_is_no_part_of_what_is_trained_or_kept():
    task = made()
    before = [parameter.clone() for parameter in task._teacher[0].model.parameters()]
    assert not any("teacher" in name for name in task.state_dict())
    task.compute_loss(next(iter(data_of("unlabelled").test_dataloader()))).backward()
    assert all(parameter.grad is None for parameter in task._teacher[0].model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, task._teacher[0].model.parameters(), strict=True))


def test_a_fit_lowers_the_loss_and_becomes_a_starter(tmp_path):
    task = Distillation(ESM, FullFineTune(), teacher=UNIREP, optim=OptimSpec(lr=1e-2), pretrained=False)
    data = Toy("unlabelled")
    fit(task, data, tmp_path / "run", accelerator="cpu", max_epochs=4)
    losses = []
    for other in (made(seed=0), task):
        with torch.no_grad():
            losses.append(sum(float(other.eval()._state_loss(other.features(b), b)) for b in data.val_dataloader()))
    assert losses[1] < 0.7 * losses[0]
    export(tmp_path / "run", tmp_path / "export", read_record(tmp_path / "run"), DOMAINS)
    starter_from_export(tmp_path / "export", tmp_path / "s.safetensors")
    loaded = build(ESM, weights=str(tmp_path / "s.safetensors"))
    residues, mask = proteins((9, 5))
    with torch.no_grad():
        found = lm_logits(loaded, loaded.model, residues, mask)
        expected = task.head(residue_features(task._built, task.backbone.eval(), residues, mask))
    torch.testing.assert_close(found[mask], expected[mask], atol=2e-2, rtol=1e-2)  # half precision
    assert F.softmax(found[mask], dim=-1).sum(dim=-1).allclose(torch.ones(int(mask.sum())))


def test_shares_and_weights_out_of_range_are_refused():
    with pytest.raises(GraftError, match=r"changed is 2\.0 and lm_weight 0\.5"):
        Distillation(ESM, FullFineTune(), changed=2.0)


def test_a_task_that_another_one_builds_on_is_still_offered():
    assert {"MaskedLM", "Distillation", "SequenceClassification"} <= set(_names(AdaptedTask))
    assert not {"ProteinTask", "_PooledTask"} & set(_names(AdaptedTask))
