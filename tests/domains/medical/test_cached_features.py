"""Features of images out of the cache: the same run, the backbone run once on each image."""

from __future__ import annotations

import lightning as L
import pytest

from common._row_store import stores
from common.errors import GraftError
from common.methods import LinearProbe, LoRA
from common.run import build_trainer
from domains.medical.tasks import Segmentation, VolumeClassification
from tests.domains.medical.conftest import Balls, Presence, options

WHOLE = {"shape": (16, 12), "patch_size": (16, 12), "patches_per_epoch": 4}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))


class Watch(L.Callback):
    """Note every loss, and how many images the backbone was given."""

    def __init__(self):
        self.losses, self.images = [], 0

    def on_fit_start(self, trainer, module):
        def count(network, inputs):
            self.images += len(inputs[0])

        module.backbone.register_forward_pre_hook(count)

    def on_train_batch_end(self, trainer, module, outputs, *args):
        self.losses.append(float(outputs["loss"]))

    def on_validation_end(self, trainer, module):
        self.losses.append(float(trainer.callback_metrics["val/loss"]))


def losses(folder, data, *, cls=Segmentation, peft=None, **changes):
    watch = Watch()
    task = cls(peft=peft or LinearProbe(), **options(2, **changes))
    trainer = build_trainer(folder, watch, max_epochs=3, accelerator="cpu")
    trainer.fit(task, datamodule=data)
    return watch


@pytest.mark.parametrize(("cls", "kind"), [(Segmentation, Balls), (VolumeClassification, Presence)])
def test_losses_are_those_without_a_cache_and_each_image_is_seen_once(tmp_path, cls, kind):
    cold = losses(tmp_path / "a", kind(**WHOLE), cls=cls, cache_features=True)
    warm = losses(tmp_path / "b", kind(**WHOLE), cls=cls, cache_features=True)
    plain = losses(tmp_path / "c", kind(**WHOLE), cls=cls)
    assert cold.losses == warm.losses
    assert cold.losses == pytest.approx(plain.losses, rel=1e-4)
    assert cold.images == 4 + 2 + 2  # to train, to validate, and one of either read again to prove the rows
    assert warm.images == 2
    assert plain.images == 3 * (4 + 2)


def test_a_window_that_is_padded_is_cached_as_it_is_seen(tmp_path):
    """Sides of 14 and 10 are padded to what the network takes."""
    data = {"shape": (14, 10), "patch_size": (14, 10), "patches_per_epoch": 4}
    cached = losses(tmp_path / "a", Balls(**data), cache_features=True)
    assert cached.losses == pytest.approx(losses(tmp_path / "b", Balls(**data)).losses, rel=1e-4)


@pytest.mark.parametrize(
    ("data", "peft", "message"),
    [
        ({"augment": True}, LinearProbe(), "Set the data's augment to false"),
        ({"shape": (20, 12)}, LinearProbe(), r"patches of \(16, 12\) are cut at random out of \(20, 12\)"),
        ({}, LoRA(rank=2, on=["conv"]), "'backbone' cannot be cached: it has adapters"),
    ],
)
def test_what_changes_from_epoch_to_epoch_is_refused(tmp_path, data, peft, message):
    with pytest.raises(GraftError, match=message):
        losses(tmp_path, Balls(**WHOLE | data), peft=peft, cache_features=True)
    assert stores() == []
