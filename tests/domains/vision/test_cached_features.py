"""Features of images out of the cache: the same run, the backbone run once."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import nn

from common._row_store import stores
from common.errors import GraftError
from common.methods import LinearProbe, LoRA
from common.run import build_trainer
from domains.vision.data import ImageFolder
from domains.vision.tasks import ImageClassification
from tests.domains.vision.conftest import SIZE


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))


def data_of(pictures, *, augment=False, batch_size=8):
    options = {"val_fraction": 0.2, "test_fraction": 0.2, "augment": augment, "batch_size": batch_size}
    return ImageFolder(root=str(pictures), image_size=SIZE, **options)


class Watch(L.Callback):
    """Note every loss, and how many images the backbone was given."""

    def __init__(self):
        self.losses, self.images = [], []

    def on_fit_start(self, trainer, module):
        inner = module.backbone.forward_features

        def counting(images):
            self.images.append(len(images))
            return inner(images)

        module.backbone.forward_features = counting

    def on_train_batch_end(self, trainer, module, outputs, *args):
        self.losses.append(float(outputs["loss"]))

    def on_validation_end(self, trainer, module):
        self.losses.append(float(trainer.callback_metrics["val/loss"]))


def losses(pictures, folder, peft=None, *, data=None, **options):
    watch = Watch()
    task = ImageClassification("test_vit", peft or LinearProbe(), pretrained=False, **options)
    trainer = build_trainer(folder, watch, max_epochs=3, accelerator="cpu")
    trainer.fit(task, datamodule=data or data_of(pictures))
    return watch


class Alone(ImageClassification):
    """Run the backbone on each image by itself, and keep nothing."""

    def features(self, batch):
        return torch.cat([self._tokens(image.unsqueeze(0)) for image in batch[0]])


@pytest.mark.parametrize("pooling", ["cls", "mean", "attention"])
def test_losses_are_bit_equal_to_those_without_a_cache(pictures, tmp_path, pooling):
    cold = losses(pictures, tmp_path / "a", pooling=pooling, cache_features=True)
    warm = losses(pictures, tmp_path / "b", pooling=pooling, cache_features=True)
    watch = Watch()
    trainer = build_trainer(tmp_path / "c", watch, max_epochs=3, accelerator="cpu")
    alone = Alone("test_vit", LinearProbe(), pretrained=False, pooling=pooling)
    trainer.fit(alone, datamodule=data_of(pictures))
    assert cold.losses == warm.losses == watch.losses
    batched = losses(pictures, tmp_path / "d", pooling=pooling)
    assert cold.losses == pytest.approx(batched.losses, rel=1e-5)
    assert sum(cold.images) == 24 + 2  # 18 to train, 6 to validate, 2 to prove
    assert sum(warm.images) == 2
    assert sum(batched.images) == 3 * 24


def test_other_images_under_the_same_names_are_other_rows(pictures, tmp_path):
    """A set's digest knows names and labels; the cache knows what it was shown."""
    import shutil

    from PIL import Image, ImageOps

    changed = tmp_path / "pets"
    shutil.copytree(pictures, changed)
    for path in changed.rglob("*.png"):
        ImageOps.invert(Image.open(path)).save(path)
    losses(pictures, tmp_path / "a", cache_features=True)
    cached = losses(changed, tmp_path / "b", cache_features=True)
    assert sum(cached.images) == 24 + 2
    assert cached.losses == pytest.approx(losses(changed, tmp_path / "c").losses, rel=1e-5)


def test_another_backbone_depth_or_seed_has_rows_of_its_own(pictures, tmp_path):
    for number, options in enumerate(({}, {"depth": 1}, {"seed": 5})):
        watch = losses(pictures, tmp_path / str(number), cache_features=True, **options)
        assert sum(watch.images) == 24 + 2
    assert len(stores()) == 3


def test_a_class_token_takes_less_room_than_all_tokens(pictures, tmp_path):
    sizes = []
    for pooling in ("cls", "mean"):
        losses(pictures, tmp_path / pooling, pooling=pooling, cache_features=True)
        sizes.append(stores()[0].size)
    assert sizes[0] < sizes[1]


def test_augmented_images_and_adapted_backbones_are_refused(pictures, tmp_path):
    with pytest.raises(GraftError, match="Set the data's augment to false"):
        losses(pictures, tmp_path / "a", cache_features=True, data=data_of(pictures, augment=True))
    with pytest.raises(GraftError, match=r"'backbone' cannot be cached: it has adapters"):
        losses(pictures, tmp_path / "b", LoRA(rank=2), cache_features=True)
    assert stores() == []


def test_a_task_without_a_trainer_reads_no_cache(pictures, tmp_path):
    task = ImageClassification("test_vit", LinearProbe(), pretrained=False, cache_features=True)
    data = data_of(pictures)
    data.setup("fit")
    task.facts = data.facts
    task.assemble()
    assert task.frozen_rows is None
    assert isinstance(task.head, nn.Module)
    task(next(iter(data.val_dataloader())))
    assert stores() == []
