"""Features of proteins out of the cache: the same run, each protein computed once and without padding."""

from __future__ import annotations

import lightning as L
import pytest

from common._row_store import stores
from common.errors import GraftError
from common.methods import BitFit, LinearProbe
from common.run import build_trainer
from domains.protein import _task as module
from domains.protein.residue_tasks import ResidueClassification
from domains.protein.tasks import PairClassification, SequenceClassification
from tests.domains.protein.conftest import ESM, UNIREP, Toy

pytestmark = pytest.mark.usefixtures("tiny")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))


class Watch(L.Callback):
    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, task, outputs, *args):
        self.losses.append(float(outputs["loss"]))

    def on_validation_end(self, trainer, task):
        self.losses.append(float(trainer.callback_metrics["val/loss"]))


@pytest.fixture
def seen(monkeypatch):
    """The shapes that the backbone was given."""
    shapes = []
    inner = module.residue_features

    def noting(built, model, residues, mask, **options):
        shapes.append((tuple(residues.shape), bool(mask.all())))
        return inner(built, model, residues, mask, **options)

    monkeypatch.setattr(module, "residue_features", noting)
    return shapes


def losses(kind, task, folder, peft=None, *, data=None, epochs=2, **options):
    watch = Watch()
    made = task(peft=peft or LinearProbe(), **({"backbone": ESM, "pretrained": False} | options))
    trainer = build_trainer(folder, watch, max_epochs=epochs, accelerator="cpu")
    trainer.fit(made, datamodule=data or Toy(kind))
    return watch.losses


@pytest.mark.parametrize(
    ("kind", "task", "options"),
    [
        ("classes", SequenceClassification, {}),
        ("classes", SequenceClassification, {"pooling": "cls"}),
        ("classes", SequenceClassification, {"pooling": "attention", "backbone": UNIREP}),
        ("pairs", PairClassification, {}),
        ("residues", ResidueClassification, {}),
    ],
)
def test_a_cached_run_is_the_run(kind, task, options, tmp_path, seen):
    plain = losses(kind, task, tmp_path / "a", **options)
    seen.clear()
    cold = losses(kind, task, tmp_path / "b", cache_features=True, **options)
    assert all(shape[0] == 1 and whole for shape, whole in seen)  # alone, and without padding
    computed = len(seen)
    seen.clear()
    warm = losses(kind, task, tmp_path / "c", cache_features=True, **options)
    assert cold == warm
    assert cold == pytest.approx(plain, rel=1e-4)
    assert len(seen) == 2 < computed  # to prove the rows that were found


def test_random_stretches_and_adapters_are_refused(tmp_path):
    data = Toy("classes", max_length=6, long="window")
    with pytest.raises(GraftError, match=r"cache_features needs the same residues.*set long to truncate"):
        losses("classes", SequenceClassification, tmp_path / "a", data=data, cache_features=True)
    with pytest.raises(GraftError, match="'backbone' cannot be cached: it has"):
        losses("classes", SequenceClassification, tmp_path / "b", BitFit(), cache_features=True)
    assert stores() == []


def test_stretches_that_do_not_change_are_cached(tmp_path):
    for name, kind, task, data in (
        ("a", "classes", SequenceClassification, Toy("classes", max_length=6)),
        ("b", "residues", ResidueClassification, Toy("residues", max_length=4, long="window")),
    ):
        assert losses(kind, task, tmp_path / name, data=data, epochs=1, cache_features=True)
