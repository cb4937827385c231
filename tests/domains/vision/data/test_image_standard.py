from __future__ import annotations

import urllib.error
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchvision import datasets

from common.errors import GraftError
from domains.vision.data import Cifar100, Flowers102, VTAB1k, read_image


@pytest.fixture
def vtab(tmp_path, draw):
    """The layout of VTAB-1k with 6 + 3 + 4 images of 3 classes, two of them in the test split only of class 2."""
    folder = tmp_path / "vtab-1k" / "caltech101"
    lists = {"train800": range(6), "val200": range(6, 9)}
    for name, numbers in lists.items():
        lines = [f"images/train800val200/{n:06d}.jpg {n % 2}" for n in numbers]
        (folder / f"{name}.txt").parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    both = (folder / "train800.txt").read_text() + (folder / "val200.txt").read_text()
    (folder / "train800val200.txt").write_text(both)
    (folder / "test.txt").write_text("".join(f"images/test/{n:06d}.jpg {2 - n % 2}\n" for n in range(4)))
    for n in range(9):
        draw(folder / "images" / "train800val200" / f"{n:06d}.jpg", seed=n, size=(30, 20))
    for n in range(4):
        draw(folder / "images" / "test" / f"{n:06d}.jpg", seed=50 + n, size=(30, 20))
    return folder.parent


def vtab_data(root, **options):
    data = VTAB1k(str(root), **{"task": "caltech101", "image_size": 16, **options})
    data.setup()
    return data


def test_vtab_splits(vtab):
    data = vtab_data(vtab)
    assert data.facts.counts == {"train": 6, "val": 3, "test": 4}
    assert data.names == ("0", "1", "2")
    assert [r.label for r in data.records("test")] == ["2", "1", "2", "1"]
    assert data.records("val")[0].id == "images/train800val200/000006.jpg"
    assert data.facts.name == "VTAB1k:caltech101"


def test_vtab_final_trains_on_both(vtab):
    data = vtab_data(vtab, final=True)
    assert data.facts.counts == {"train": 9, "val": 3, "test": 4}
    assert data.facts.digest != vtab_data(vtab).facts.digest


def test_vtab_images_are_squashed_and_not_augmented(vtab):
    data = vtab_data(vtab)
    batch = next(iter(data.train_dataloader()))
    expected = [read_image(data.records("train")[i].path, 16, "squash") for i in batch.index]
    assert torch.equal(batch.images, torch.stack(expected))


def test_vtab_unknown_task(vtab):
    with pytest.raises(GraftError, match="Did you mean 'caltech101'"):
        vtab_data(vtab, task="caltech")
    with pytest.raises(GraftError, match="no folder"):
        vtab_data(vtab / "nowhere")


def test_vtab_damaged_list(vtab):
    (vtab / "caltech101" / "val200.txt").write_text("images/a.jpg 1\nimages/b.jpg\n")
    with pytest.raises(GraftError, match=r"val200\.txt, line 2"):
        vtab_data(vtab)
    (vtab / "caltech101" / "val200.txt").unlink()
    with pytest.raises(GraftError, match=r"no file .*val200\.txt"):
        vtab_data(vtab)


def test_vtab_missing_image_is_named_when_it_is_read(vtab):
    data = vtab_data(vtab)
    data.records("test")[1].path.unlink()
    with pytest.raises(GraftError, match=r"000001\.jpg"):
        list(data.test_dataloader())
    assert vtab_data(vtab, skip_bad=True).facts.skipped == 1


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_cifar100(cache, monkeypatch):
    def fake(root, *, train, download):
        assert root == cache / "torchvision"
        assert download
        size = 60 if train else 6
        pixels = np.random.default_rng(train).integers(0, 256, (size, 32, 32, 3), dtype=np.uint8)
        return SimpleNamespace(data=pixels, targets=[n % 3 for n in range(size)], classes=["ant", "bee", "cat"])

    monkeypatch.setattr(datasets, "CIFAR100", fake)
    data = Cifar100(image_size=32)
    data.prepare_data()
    monkeypatch.setattr(datasets, "CIFAR100", None)  # prepared once
    data.setup()
    assert data.facts.counts == {"train": 54, "val": 6, "test": 6}
    assert Counter(r.label for r in data.records("val")) == {"ant": 2, "bee": 2, "cat": 2}
    first = data.records("test")[0]
    pixels = np.random.default_rng(False).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    number = int(first.path.stem.split("_")[1])
    assert torch.equal(read_image(first.path, 32).permute(1, 2, 0), torch.from_numpy(pixels[number]))


def test_flowers102(cache, monkeypatch, draw):
    class Fake:
        classes = ("rose", "iris")

        def __init__(self, root, *, split, download):
            seed = {"train": 0, "val": 10, "test": 20}[split]
            files = [draw(root / "jpg" / f"image_{seed + n:05d}.jpg", seed=seed + n) for n in range(4)]
            self._image_files, self._labels = files, [0, 1, 0, 1]

    monkeypatch.setattr(datasets, "Flowers102", Fake)
    data = Flowers102(image_size=16, shots=1)
    data.prepare_data()
    data.setup()
    assert data.facts.counts == {"train": 2, "val": 4, "test": 4}
    assert data.names == ("rose", "iris")


@pytest.mark.parametrize("make", [Cifar100, Flowers102])
def test_offline(cache, monkeypatch, make):
    def refuse(*args, **options):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(datasets, make.__name__.replace("Cifar", "CIFAR"), refuse)
    with pytest.raises(GraftError, match="no network") as caught:
        make().prepare_data()
    assert str(cache / "torchvision") in str(caught.value)
    assert "\n" not in str(caught.value)
