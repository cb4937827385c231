"""Predictors without training: the labels that they carry over, against their formulas."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from common.errors import GraftError
from common.methods import LinearProbe, LoRA
from common.run import baseline
from common.starters import save_starter
from domains.medical.backbones import build
from domains.medical.baselines import mirror_copy, nearest_slice, signed_distance, zero_shot
from domains.medical.data._dataset import Loaded
from domains.medical.data._records import IGNORE, Case, VolumeBatch
from domains.medical.starters import stated
from domains.medical.tasks import Segmentation
from tests.domains.medical.conftest import CLASSES, NETS, SPACING, Balls, SlicedBalls, options


class Planes(SlicedBalls):
    """As its parent, with training planes of one's choice across an axis of one's choice."""

    def __init__(self, axis, train, **kwargs):
        super().__init__(**kwargs)
        self.axis, self.train = axis, train

    def slices(self, split):
        return self.train if split == "train" else (0, 2)


@pytest.fixture
def whole():
    """The labels of the volume of which `SlicedBalls` labels planes."""
    data = Balls()
    data.setup()
    return data.case("train", 0)["label"]


def planes(axis, train):
    data = Planes(axis, train)
    data.setup()
    case = data.case("test", 0)
    return data, VolumeBatch(case["image"][None], case["label"][None], torch.tensor([0]))


@pytest.mark.parametrize(("axis", "train"), [(0, (2, 6, 11)), (1, (8, 3)), (2, (4,))])
def test_a_plane_takes_the_nearest_ones_labels(whole, axis, train):
    data, batch = planes(axis, train)
    logits = nearest_slice(None, data)(batch)
    assert logits.shape == (1, 3, *whole.shape)
    found = logits.argmax(1)[0]
    for plane in range(whole.shape[axis]):
        nearest = min(sorted(train), key=lambda number: abs(number - plane))  # the first of equals: the lower
        assert torch.equal(found.select(axis, plane), whole.select(axis, nearest))


def signed(mask, spacing):
    """Signed distance by definition: to the nearest pixel on the other side."""
    points = np.argwhere(np.ones_like(mask)) * spacing
    inside = mask.ravel()
    if inside.all() or not inside.any():
        size = np.linalg.norm(np.array(mask.shape) * spacing)
        return np.full(mask.shape, size if inside.all() else -size)
    distances = cdist(points, points)
    to_other = np.where(inside, distances[:, ~inside].min(1), -distances[:, inside].min(1))
    return to_other.reshape(mask.shape)


@pytest.mark.parametrize(("axis", "train"), [(0, (2, 6, 11)), (1, (8, 3)), (2, (4,))])
def test_signed_distances_are_interpolated_between_planes(whole, axis, train):
    data, batch = planes(axis, train)
    logits = signed_distance(None, data)(batch)
    spacing = np.array([mm for other, mm in enumerate(SPACING) if other != axis])
    known = {p: np.stack([signed(whole.select(axis, p).numpy() == k, spacing) for k in range(3)]) for p in train}
    ordered = sorted(train)
    for plane in range(whole.shape[axis]):
        low = max((p for p in ordered if p <= plane), default=ordered[0])
        high = min((p for p in ordered if p >= plane), default=ordered[-1])
        t = (plane - low) / (high - low) if high > low else 0.0
        found = logits[0].select(axis + 1, plane).numpy()
        for k in range(3):
            below, above = known[low][k], known[high][k]
            if t and below.max() <= 0 < above.max():  # it grows from halfway on
                below = above - 2 * above.max()
            elif t and above.max() <= 0 < below.max():
                above = below - 2 * below.max()
            np.testing.assert_allclose(found[k], (1 - t) * below + t * above, atol=1e-4)
        if plane in train:
            assert torch.equal(logits[0].argmax(0).select(axis, plane), whole.select(axis, plane))


def test_only_volumes_with_labelled_planes_can_be_completed():
    data = Balls()
    for make, name in ((nearest_slice, "NearestSlice"), (signed_distance, "SignedDistance")):
        with pytest.raises(
            GraftError, match=f"{name} needs one volume of which some planes are labelled.*Balls has none"
        ):
            make(None, data)
    with pytest.raises(GraftError, match="MirrorCopy needs the data ColinHemisphere, not Balls"):
        mirror_copy(None, data)


@pytest.fixture
def starter(tmp_path):
    """A file of weights whose output layer knows the balls."""
    torch.manual_seed(0)
    built = build("UNet", spatial_dims=3, channels=1, classes=3, patch_size=(8, 8, 8), pretrained=False, net=NETS[3])
    path = tmp_path / "starter.safetensors"
    save_starter(path, built.model.state_dict(), built.output.state_dict(), stated(CLASSES, SPACING, "none"))
    return path


def test_zero_shot_is_the_network_as_it_came(starter):
    data = SlicedBalls()
    data.setup()
    case = data.case("test", 0)
    batch = VolumeBatch(case["image"][None], case["label"][None], torch.tensor([0]))
    task = Segmentation(peft=LoRA(on=["conv"], rank=2), **options(pretrained=True, weights=str(starter)))
    task.facts = data.facts
    found = zero_shot(task, data)(batch)
    bare = Segmentation(peft=LinearProbe(), **options(pretrained=True, weights=str(starter)))
    bare.facts = data.facts
    bare.assemble()
    assert bare.eval().head.from_checkpoint
    with torch.no_grad():
        torch.testing.assert_close(found, bare.infer(batch))
    assert not found.requires_grad


def test_zero_shot_needs_a_head_that_knows_the_classes(starter):
    data = SlicedBalls()
    data.setup()
    for changes in ({}, {"pretrained": True, "weights": str(starter), "head_init": "fresh"}):
        task = Segmentation(peft=LinearProbe(), **options(**changes))
        task.facts = data.facts
        with pytest.raises(GraftError, match=r"ZeroShot needs a backbone .* \(background, bright, dark ball\)"):
            zero_shot(task, data)


class Halves(Balls):
    """Two halves of slices: the right one is tested, the left one's labels are known."""

    def slices(self, split):
        return {"train": (0, 4, 9, 14), "val": (3, 13), "test": (2, 6)}[split]

    def opposite(self, index):
        return torch.full(self.shape, index)

    def _load(self, split, index):
        found = super()._load(split, index)
        return Loaded(found.image, torch.full(self.shape, index % 3, dtype=torch.uint8), found.affine)


def test_the_other_half_is_copied():
    data = Halves(shape=(14, 12), patch_size=(8, 8))
    data.setup()
    predict = mirror_copy(None, data)

    def maps(split):
        cases = [data.case(split, index) for index in range(2)]
        images = torch.stack([case["image"] for case in cases])
        logits = predict(VolumeBatch(images, torch.stack([case["label"] for case in cases]), torch.arange(2)))
        assert logits.shape == (2, 3, 14, 12)
        return [int(found.unique()) for found in logits.argmax(1)]

    assert maps("test") == [0, 1]
    assert maps("val") == [1, 0]  # the nearest training slices are the second and the fourth


def test_a_baseline_is_scored_as_a_run_is(tmp_path):
    data = SlicedBalls()
    task = Segmentation(peft=LinearProbe(), **options())
    record = baseline(task, data, tmp_path, "SignedDistance", signed_distance, accelerator="cpu")
    assert {"dice", "hd95_mm", "surface_dice_mm", "ece"} <= set(record["test"])
    (row,) = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert row["dice"] == pytest.approx(record["test"]["dice"], abs=1e-5)
    assert (tmp_path / row["picture"]).is_file()
    assert record["test"]["dice"] > 0.5
    assert isinstance(data.records("test")[0], Case)
    assert IGNORE in data.case("test", 0)["label"]
