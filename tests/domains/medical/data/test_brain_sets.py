"""The starter brains: tables, slices, halves, and that no label beyond the labelled slices reaches training."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from common.errors import GraftError
from domains.medical.data import IGNORE, ColinCoarse, ColinHemisphere, HumanToMacaque, atlases, prepare
from domains.medical.data._atlases import (
    AAL_COARSE,
    ATLASES,
    CLASSES,
    INIA19_COARSE,
    OTHER,
    atlas_files,
    coarse_labels,
    numbers_of,
)
from domains.medical.data._slices import VAL_QUANTILES, choose_slices
from domains.medical.data._synthesis import TISSUES, draw_image, tissue_regions

SPLITS = ("train", "val", "test")


def ready(data):
    data.setup()
    return data


def batches(data, epoch=0):
    loader = data.train_dataloader()
    loader.batch_sampler.sampler.set_epoch(epoch)
    return [*loader]


def equal(one, other):
    return all(
        torch.equal(a, b) for first, second in zip(one, other, strict=True) for a, b in zip(first, second, strict=True)
    )


# ---- tables


def test_ranges_are_read():
    assert numbers_of("1 3-5 9") == {1, 3, 4, 5, 9}


@pytest.mark.parametrize("table", [AAL_COARSE, INIA19_COARSE], ids=["aal", "inia19"])
def test_no_region_stands_in_two_classes(table):
    assert [*table] == [*CLASSES[1:-1]]
    for one, other in itertools.combinations(table.values(), 2):
        assert not numbers_of(one) & numbers_of(other)


def test_every_aal_region_has_a_class_and_its_twin_the_same():
    assert set().union(*map(numbers_of, AAL_COARSE.values())) == set(range(1, 117))
    for found in map(numbers_of, AAL_COARSE.values()):
        # Regions 109 to 116 (the vermis) lie in the middle.
        assert all(number >= 109 or (number % 2 == 0 or number + 1 in found) for number in found)


def test_merging_by_formula():
    regions = np.array([[0, 1, 37, 71], [73, 77, 91, 116]])[None]
    brain = np.ones_like(regions, bool)
    brain[0, 0, 1] = False
    assert coarse_labels(regions, brain, ATLASES["colin"]).tolist() == [[[OTHER, 0, 2, 3], [4, 5, 6, 6]]]
    regions = np.array([[0, 1, 1001, 82], [1082, 92, 517, 600]])[None]
    found = coarse_labels(regions, np.ones_like(regions, bool), ATLASES["macaque"])
    assert found.tolist() == [[[OTHER, 1, 1, 3], [3, 5, 6, OTHER]]]


@pytest.mark.artifacts
@pytest.mark.parametrize(("name", "spacing"), [("colin", 2.0), ("macaque", 0.85), ("colin-1mm", 1.0)])
def test_the_real_brains(name, spacing):
    made = atlases.load_brain(name)
    counts = np.bincount(made.label.numpy().ravel(), minlength=len(CLASSES))
    assert (counts > 0).all()
    assert made.spacing == (spacing,) * 3
    assert made.affine[0, 0] > 0
    assert made.affine[1, 1] > 0
    assert made.affine[2, 2] > 0
    assert (made.image[0][made.label == 0] == 0).all()
    assert made.image.max() == 1
    # The cerebellum lies behind and below the caudate in every primate.
    places = {c: torch.nonzero(made.label == CLASSES.index(c)).float().mean(dim=0) for c in ("cerebellum", "caudate")}
    assert places["cerebellum"][1] < places["caudate"][1] - 5
    assert places["cerebellum"][2] < places["caudate"][2] - 5


@pytest.mark.artifacts
def test_the_raw_macaque_is_prepared_as_the_set_is(tmp_path):
    from common import artifacts

    raw = tmp_path / "raw.nii.gz"
    raw.write_bytes(artifacts.read_member("brain-atlases", ATLASES["macaque"].image))
    made = atlases.load_brain("macaque")
    image, affine, _ = prepare(raw, made.preprocessing)
    offset = np.rint((made.affine[:3, 3] - affine[:3, 3]) / 0.85).astype(int)
    assert np.abs(offset).max() <= 2
    low = np.maximum(offset, 0)
    sides = np.minimum(np.array(image.shape[1:]) - low, np.array(made.label.shape) + np.minimum(offset, 0))
    one = image[0][tuple(slice(a, a + n) for a, n in zip(low, sides, strict=True))]
    other = made.image[0][tuple(slice(a, a + n) for a, n in zip(low - offset, sides, strict=True))]
    inside = (one > 0) & (other > 0)
    assert np.corrcoef(one[inside], other[inside])[0, 1] > 0.98
    assert float(((one > 0) == (other > 0)).float().mean()) > 0.98


def test_atlas_files_are_built_once(tmp_path, monkeypatch):
    import gzip

    import nibabel as nib

    from common import artifacts

    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path))
    shape = (24, 30, 20)
    brain = np.zeros(shape, np.float32)
    brain[4:20, 5:25, 4:16] = 100
    regions = np.zeros(shape, np.int16)
    regions[4:12, 5:25, 4:16] = 82
    regions[12:20, 5:25, 4:16] = 1092
    members = {
        ATLASES["macaque"].image: nib.Nifti1Image(brain, np.diag([0.5, 0.5, 0.5, 1])),
        ATLASES["macaque"].label: nib.Nifti1Image(regions, np.diag([0.5, 0.5, 0.5, 1])),
    }
    monkeypatch.setattr(artifacts, "read_member", lambda row, name: gzip.compress(members[name].to_bytes()))
    image, label = (nib.load(path) for path in atlas_files("macaque"))
    found = np.asarray(label.dataobj)
    assert {*np.unique(found).tolist()} == {0, CLASSES.index("caudate"), CLASSES.index("thalamus")}
    assert np.asarray(image.dataobj)[found > 0] == pytest.approx(100, rel=0.02)
    assert (np.asarray(image.dataobj)[found == 0] == 0).all()
    # 16 x 20 x 12 voxels of 0.5 mm.
    assert (found > 0).sum() * 0.85**3 == pytest.approx(16 * 20 * 12 * 0.125, rel=0.15)
    half = np.argwhere(found == CLASSES.index("caudate")).mean(axis=0)
    assert label.affine[:3, :3] @ half + label.affine[:3, 3] == pytest.approx([7.5 / 2, 14.5 / 2, 9.5 / 2], abs=0.3)
    monkeypatch.setattr(artifacts, "read_member", lambda row, name: pytest.fail("built twice"))
    atlas_files("macaque")


# ---- slices


@pytest.mark.parametrize(("labelled", "draw"), itertools.product([1, 2, 4, 8, 16], range(6)))
def test_slices_keep_their_distances(labelled, draw):
    found = range(3, 95)
    slices = choose_slices(found, labelled, draw)
    assert slices["val"] == tuple(round(3 + quantile * 91) for quantile in VAL_QUANTILES)
    assert len({*slices["train"]}) == labelled
    for train in slices["train"]:
        assert min(abs(train - val) for val in slices["val"]) >= 2
    near = {other + step for other in (*slices["train"], *slices["val"]) for step in (-1, 0, 1)}
    assert slices["test"] == tuple(number for number in found if number not in near)
    if labelled > 1:
        steps = np.diff(slices["train"])
        assert steps.min() >= 0.5 * 92 / labelled - 4
        assert steps.max() <= 92 / labelled + 8


def test_another_draw_gives_other_slices():
    assert len({choose_slices(range(90), 4, draw)["train"] for draw in range(10)}) > 5


@pytest.mark.parametrize("labelled", [0, 79, 78])
def test_too_many_labelled_slices_are_refused(labelled):
    with pytest.raises(GraftError, match=f"labelled is {labelled}"):
        choose_slices(range(90), labelled, 0)


# ---- the macaque

SMALL = {"patch_size": (16, 8, 16), "patches_per_epoch": 8}


def test_splits_are_slices_of_one_volume(brain):
    data = ready(HumanToMacaque(labelled=3, seed=5, **SMALL))
    held = torch.nonzero((brain.label > 0).sum(dim=(0, 2)))[:, 0].tolist()
    assert data.facts.counts == {"train": 1, "val": 1, "test": 1, "labelled_slices": 3}
    assert data.facts.class_names == CLASSES
    assert {number for split in SPLITS for number in data.slices(split)} <= {*held}
    for split, loader in zip(SPLITS, (None, data.val_dataloader(), data.test_dataloader()), strict=True):
        label = data.case(split, 0)["label"]
        chosen = [*data.slices(split)]
        assert torch.equal(label[:, chosen], brain.label[:, chosen].long())
        label[:, chosen] = IGNORE
        assert (label == IGNORE).all()
        if loader is not None:
            (batch,) = loader
            assert batch.image.shape == (1, 1, *brain.label.shape)
            assert torch.equal(batch.label[0], data.case(split, 0)["label"])


def test_draw_chooses_the_slices_and_seed_stands_in(brain):
    assert ready(HumanToMacaque(seed=7)).slices("train") == ready(HumanToMacaque(draw=7)).slices("train")
    drawn = [ready(HumanToMacaque(labelled=2, draw=draw)) for draw in range(5)]
    assert len({data.slices("train") for data in drawn}) > 2
    assert len({data.slices("val") for data in drawn}) == 1
    assert len({data.facts.digest for data in drawn}) > 2
    assert drawn[0].facts.digest == ready(HumanToMacaque(labelled=2, draw=0, seed=9)).facts.digest


def test_no_other_label_reaches_training(brain, monkeypatch):
    data = ready(HumanToMacaque(labelled=3, **SMALL))
    expected = batches(data) + batches(data, epoch=1)
    spoiled = brain.label.clone()
    others = [n for n in range(spoiled.shape[1]) if n not in data.slices("train")]
    inside = spoiled[:, others] > 0
    spoiled[:, others] = torch.where(inside, 1 + (spoiled[:, others] + 2) % 7, spoiled[:, others]).to(torch.uint8)
    assert not torch.equal(spoiled, brain.label)
    monkeypatch.setattr(atlases, "load_brain", lambda name: dataclasses.replace(brain, label=spoiled))
    other = ready(HumanToMacaque(labelled=3, **SMALL))
    assert equal(expected, batches(other) + batches(other, epoch=1))


def test_training_labels_are_those_of_the_labelled_slices(brain):
    data = ready(HumanToMacaque(labelled=3, augment=False, **SMALL))
    for image, label, _ in (data.train_dataloader().dataset[index] for index in range(8)):
        planes = [plane for plane in range(8) if (label[:, plane] != IGNORE).any()]
        assert planes
        for plane in planes:
            assert any(
                torch.allclose(brain.image[0, x : x + 16, number, z : z + 16], image[0, :, plane], atol=1e-4)
                and torch.equal(brain.label[x : x + 16, number, z : z + 16].long(), label[:, plane])
                for number in data.slices("train")
                for x in range(brain.label.shape[0] - 15)
                for z in range(brain.label.shape[2] - 15)
            )


@pytest.mark.parametrize("make", [HumanToMacaque, ColinCoarse])
def test_epochs_differ_and_repeat(brain, make):
    first, second = (ready(make(batch_size=4, **SMALL)) for _ in range(2))
    assert equal(batches(first), batches(second))
    assert not equal(batches(first), batches(first, epoch=1))
    assert equal(batches(first, epoch=1), batches(second, epoch=1))
    assert not equal(
        batches(first),
        batches(
            ready(
                make(batch_size=4, seed=1, draw=0, **SMALL)
                if make is HumanToMacaque
                else make(batch_size=4, seed=1, **SMALL)
            )
        ),
    )


def test_workers_make_the_same_patches(brain):
    one, other = (ready(HumanToMacaque(labelled=3, num_workers=workers, **SMALL)) for workers in (0, 1))
    assert equal(batches(one), batches(other))


def test_wrong_arguments_are_refused(brain):
    with pytest.raises(GraftError, match=r"batch_size is 0 .at least 1.; num_workers is -1"):
        HumanToMacaque(batch_size=0, num_workers=-1)
    with pytest.raises(GraftError, match=r"patch_size is \[4, 32\]; give 3 sides of at least 8"):
        HumanToMacaque(patch_size=(4, 32))
    with pytest.raises(GraftError, match=r"Unknown synthesis 'label'\. Did you mean 'labels'"):
        ColinCoarse(synthesis="label")
    with pytest.raises(GraftError, match="Unknown plane 'sagittal'"):
        ColinHemisphere(plane="sagittal")
    with pytest.raises(GraftError, match="labelled is 99: between"):
        ready(HumanToMacaque(labelled=99))
    with pytest.raises(GraftError, match=r"Unknown split 'vall'\. Did you mean 'val'"):
        ready(HumanToMacaque()).slices("vall")
    with pytest.raises(GraftError, match="Unknown split 'tests'"):
        ready(ColinCoarse()).case("tests", 0)


# ---- the human


@pytest.mark.parametrize("options", [{}, {"contrast": True}, {"synthesis": "labels"}, {"synthesis": "both"}])
def test_pretraining_batches(brain, options):
    data = ready(ColinCoarse(**options, **SMALL))
    for image, label, _ in batches(data):
        assert image.shape == (2, 1, 16, 8, 16)
        assert image.dtype == torch.float32
        assert torch.isfinite(image).all()
        assert {*label.unique().tolist()} <= {*range(8), IGNORE}
        assert (image[:, 0][(label == 0) | (label == IGNORE)] == 0).float().mean() > 0.5
    assert {*torch.cat([batch.label.reshape(-1) for batch in batches(data)]).tolist()} >= {*range(1, 8)}


def test_images_drawn_from_labels_know_nothing_of_the_image(brain, monkeypatch):
    one = ready(ColinCoarse(synthesis="labels", **SMALL))
    expected = batches(one)
    regions = one._regions
    monkeypatch.setattr(atlases, "load_brain", lambda name: dataclasses.replace(brain, image=1 - brain.image))
    monkeypatch.setattr(atlases, "tissue_regions", lambda image, label: regions)
    assert equal(expected, batches(ready(ColinCoarse(synthesis="labels", **SMALL))))


def test_both_draws_about_half(brain, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        atlases, "draw_image", lambda regions, classes: drawn.append(1) or torch.ones(1, *regions.shape)
    )
    data = ready(ColinCoarse(synthesis="both", patch_size=(8, 8, 8), patches_per_epoch=100))
    batches(data)
    assert 30 < len(drawn) < 70


def test_evaluation_poses_are_fixed_and_keep_labels_on_the_image(brain):
    data = ready(ColinCoarse(**SMALL))
    posed = {split: data.case(split, 0) for split in SPLITS}
    again = ready(ColinCoarse(seed=3, synthesis="labels", **SMALL))
    for split in SPLITS:
        case = posed[split]
        assert torch.equal(case["image"], again.case(split, 0)["image"])
        assert case["image"].shape == (1, *brain.label.shape)
        assert IGNORE not in case["label"]
        means = [float(case["image"][0][case["label"] == number].mean()) for number in range(1, 8)]
        assert means == sorted(means)
    assert not torch.equal(posed["val"]["label"], posed["test"]["label"])
    assert not torch.equal(posed["val"]["label"], posed["train"]["label"])


def test_tissues_split_each_class_by_intensity(brain):
    regions = tissue_regions(brain.image[0], brain.label)
    inside = brain.label > 0
    assert torch.equal(regions == 0, ~inside)
    found = regions[inside].long() - 1
    assert torch.equal(found // TISSUES + 1, brain.label[inside].long())
    values = brain.image[0][inside]
    edges = [(float(values[found % TISSUES == t].min()), float(values[found % TISSUES == t].max())) for t in range(3)]
    assert edges[0][1] <= edges[1][0]
    assert edges[1][1] <= edges[2][0]


def test_a_drawn_image_varies_in_contrast_and_is_zero_outside(brain):
    regions = tissue_regions(brain.image[0], brain.label)
    torch.manual_seed(0)
    images = [draw_image(regions, 7) for _ in range(8)]
    dark, bright = regions == 1, regions == 7 * TISSUES
    orders = {bool(image[0][dark].mean() > image[0][bright].mean()) for image in images}
    assert orders == {True, False}
    assert all((image[0][regions == 0] == 0).all() for image in images)


# ---- the halves


@pytest.mark.parametrize("plane", ["axial", "coronal"])
def test_halves_train_and_test(brain, plane, monkeypatch):
    from domains.medical.data import hemisphere

    monkeypatch.setattr(hemisphere, "_LEAST_AREA", 20)
    monkeypatch.setattr(hemisphere, "_SLAB", 3)
    data = ready(ColinHemisphere(plane=plane, pose=False, patch_size=(16, 16)))
    train, val = data.slices("train"), data.slices("val")
    assert train
    assert val
    assert min(abs(a - b) for a in train for b in val) > 3
    axis = {"coronal": 1, "axial": 2}[plane]
    for split, part in (("train", brain.label[:20]), ("test", brain.label[21:].flip(0))):
        for index in (0, len(data.slices(split)) - 1):
            case = data.case(split, index)
            number = data.slices(split)[index]
            assert torch.equal(case["label"], part.select(axis, number).long())
            assert case["id"].startswith({"train": "left", "test": "right"}[split])
    assert torch.equal(data.opposite(1), brain.label[:20].select(axis, data.slices("test")[1]).long())
    batch = next(iter(data.train_dataloader()))
    assert batch.image.shape == (2, 1, 16, 16)
    assert data.facts.spatial_dims == 2


def test_the_test_pose_turns_image_and_label_alike(brain, monkeypatch):
    from domains.medical.data import hemisphere

    monkeypatch.setattr(hemisphere, "_LEAST_AREA", 20)
    data, plain = (ready(ColinHemisphere(pose=pose)) for pose in (True, False))
    index = len(data.slices("test")) // 2
    posed, straight = data.case("test", index), plain.case("test", index)
    assert not torch.equal(posed["label"], straight["label"])
    means = [
        float(posed["image"][0][posed["label"] == number].mean())
        for number in range(1, 8)
        if (posed["label"] == number).sum() > 15
    ]
    assert len(means) > 2
    assert means == sorted(means)
    assert torch.equal(data.case("train", 0)["label"], plain.case("train", 0)["label"])


def test_labelled_thins_out_the_training_slices(brain, monkeypatch):
    from domains.medical.data import hemisphere

    monkeypatch.setattr(hemisphere, "_LEAST_AREA", 20)
    whole = ready(ColinHemisphere())
    few = ready(ColinHemisphere(labelled=3))
    assert len(few.slices("train")) == 3
    assert {*few.slices("train")} <= {*whole.slices("train")}
    assert few.slices("val") == whole.slices("val")
    assert few.facts.digest != whole.facts.digest
    with pytest.raises(GraftError, match="labelled is 999: between 1 and"):
        ready(ColinHemisphere(labelled=999))
