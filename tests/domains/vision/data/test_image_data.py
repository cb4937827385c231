from __future__ import annotations

from collections import Counter

import pytest
import torch

from common.errors import GraftError
from domains.vision.data import ImageBatch, ImageFolder, read_image
from domains.vision.data._transforms import centre


def ready(root, **options):
    data = ImageFolder(str(root), **{"image_size": 16, "batch_size": 4, **options})
    data.prepare_data()
    data.setup()
    return data


def epoch(data, number):
    loader = data.train_dataloader()
    loader.batch_sampler.set_epoch(number)
    batches = list(loader)
    order = torch.cat([batch.index for batch in batches]).argsort()
    return torch.cat([batch.images for batch in batches])[order]


def test_batches(folder):
    data = ready(folder)
    batch = next(iter(data.train_dataloader()))
    assert isinstance(batch, ImageBatch)
    assert batch.images.shape == (4, 3, 16, 16)
    assert batch.images.dtype == torch.uint8
    assert batch.labels.dtype == batch.index.dtype == torch.int64
    for label, index in zip(batch.labels, batch.index, strict=True):
        assert data.records("train")[index].label == data.names[label]


def test_every_image_comes_once_and_in_order_when_evaluating(folder):
    data = ready(folder)
    for split, loader in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
        batches = list(loader)
        assert torch.cat([b.index for b in batches]).tolist() == list(range(data.facts.counts[split]))
        expected = torch.stack([centre(16)(read_image(r.path, 16)) for r in data.records(split)])
        assert torch.equal(torch.cat([b.images for b in batches]), expected)


def test_facts(folder):
    facts = ready(folder).facts
    assert facts.image_size == 16
    assert facts.class_names == ("cat", "dog")
    assert facts.name == "ImageFolder:pets"
    assert sum(facts.counts.values()) == 18
    assert facts.skipped == 0


def test_facts_before_setup(folder):
    with pytest.raises(RuntimeError, match="setup"):
        _ = ImageFolder(str(folder)).facts


def test_setup_twice_changes_nothing(folder):
    data = ready(folder)
    facts, train = data.facts, data.records("train")
    data.setup("test")
    assert data.facts is facts
    assert data.records("train") is train


def test_seed_leaves_splits_and_evaluation_alone(folder):
    one, two = ready(folder, seed=0), ready(folder, seed=1)
    assert one.facts.digest == two.facts.digest
    assert [one.records(s) for s in ("train", "val", "test")] == [two.records(s) for s in ("train", "val", "test")]
    assert not torch.equal(epoch(one, 0), epoch(two, 0))


def test_augmentation_depends_on_seed_epoch_and_index_only(folder):
    here = epoch(ready(folder), 0)
    torch.manual_seed(99)
    assert torch.equal(epoch(ready(folder, batch_size=3), 0), here)
    assert not torch.equal(epoch(ready(folder), 1), here)


def test_workers_change_no_pixel(folder):
    data, parallel = ready(folder), ready(folder, num_workers=2)
    for number in (0, 1):
        assert torch.equal(epoch(data, number), epoch(parallel, number))


def test_cache_changes_no_pixel(folder):
    assert torch.equal(epoch(ready(folder), 0), epoch(ready(folder, cache_bytes=0), 0))


def test_without_augmentation_training_looks_like_evaluation(folder):
    data = ready(folder, augment=False)
    expected = torch.stack([centre(16)(read_image(r.path, 16)) for r in data.records("train")])
    assert torch.equal(epoch(data, 0), expected)
    assert torch.equal(epoch(data, 1), expected)


def test_digest_follows_label_split_and_name(folder):
    before = ready(folder).facts.digest
    assert ready(folder).facts.digest == before
    (folder / "cat" / "0.png").rename(folder / "dog" / "0.png")
    after = ready(folder).facts.digest
    assert after != before
    (folder / "dog" / "0.png").rename(folder / "dog" / "00.png")
    assert ready(folder).facts.digest not in (before, after)
    (folder / "dog" / "00.png").rename(folder / "cat" / "0.png")
    assert ready(folder).facts.digest == before


def test_shots(folder):
    data = ready(folder, shots=3)
    everything = ready(folder)
    assert Counter(r.label for r in data.records("train")) == {"cat": 3, "dog": 3}
    assert set(data.records("train")) < set(everything.records("train"))
    assert data.records("test") == everything.records("test")
    assert ready(folder, shots=3, seed=5).records("train") == data.records("train")
    draws = {tuple(ready(folder, shots=2, shots_draw=n).records("train")) for n in range(4)}
    assert len(draws) > 1


def test_fewer_shots_are_a_part_of_more(folder):
    assert set(ready(folder, shots=2).records("train")) < set(ready(folder, shots=4).records("train"))


def test_a_share_is_of_each_class_and_the_test_stays(folder):
    everything, half = ready(folder), ready(folder, share=0.5)
    whole = Counter(r.label for r in everything.records("train"))
    assert Counter(r.label for r in half.records("train")) == {name: round(count / 2) for name, count in whole.items()}
    assert half.records("test") == everything.records("test")
    described = [data.describe_splits() for data in (everything, half)]
    assert described[0]["splits"]["test"] == described[1]["splits"]["test"]
    assert described[0]["shared"]["train-test"] == 0
    with pytest.raises(GraftError, match=r"share is 0\.5 and shots is 2"):
        ready(folder, share=0.5, shots=2)


def test_too_many_shots_name_class_and_count(folder):
    available = Counter(r.label for r in ready(folder).records("train"))
    with pytest.raises(GraftError, match=rf"shots is 7.*'dog' \({available['dog']}\)"):
        ready(folder, shots=7)


def test_limit_per_class(folder):
    data = ready(folder, limit_per_class=1)
    assert data.facts.counts == {"train": 2, "val": 2, "test": 2}


def test_classes(folder, draw):
    for number in range(6):
        draw(folder / "eel" / f"{number}.png", seed=200 + number)
    data = ready(folder, classes=["eel", "cat"])
    assert data.names == ("cat", "eel")
    assert {r.label for r in data.records("test")} == {"cat", "eel"}
    with pytest.raises(GraftError, match="Did you mean 'cat'"):
        ready(folder, classes=["cta", "dog"])
    with pytest.raises(GraftError, match="at least 2 classes"):
        ready(folder, classes=["cat"])


def test_unknown_split(folder):
    with pytest.raises(GraftError, match="Did you mean 'train'"):
        ready(folder).records("trian")


def test_arguments_out_of_range_are_named_together(folder):
    with pytest.raises(GraftError, match=r"image_size is 0 .*batch_size is -1 .*shots is 0 "):
        ImageFolder(str(folder), image_size=0, batch_size=-1, shots=0)


def test_recipes_can_name_every_argument(folder):
    from jsonargparse import ArgumentParser

    from domains.vision.data import ImageData

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ImageData, "data")
    given = {"root": str(folder), "image_size": 16, "shots": 2, "classes": ["cat", "dog"], "val_fraction": 0.2}
    config = parser.parse_object({"data": {"class_path": "domains.vision.data.ImageFolder", "init_args": given}})
    data = parser.instantiate(config).data
    data.setup()
    assert data.facts.counts["train"] == 4
