"""The user's own sets: what is read, how it is split, and the one line each mistake gets."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import GraftError
from domains.medical.data import IGNORE, DecathlonData, ImageMaskFolder, MedMNIST, VolumeCSV, prepare, restore

SPLITS = ("train", "val", "test")
SMALL = {"patch_size": (8, 8, 8), "patches_per_epoch": 4}
SHARES = {"val_fraction": 0.25, "test_fraction": 0.25}


def ready(data):
    data.setup()
    return data


def ids(data):
    return {split: [case.id for case in data.records(split)] for split in SPLITS}


def refusal(data):
    with pytest.raises(GraftError) as caught:
        data.setup()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- Decathlon lists


def test_a_list_is_read_split_and_batched(write_case, write_list):
    path = write_list([write_case(f"case{number}") for number in range(8)])
    data = ready(DecathlonData(str(path), intensity="percentiles", **SMALL, **SHARES))
    facts = data.facts
    assert facts.class_names == ("background", "bright", "small")
    assert (facts.spatial_dims, facts.channels, facts.patch_size) == (3, 1, (8, 8, 8))
    assert facts.spacing == (2.0, 1.5, 3.0)
    assert facts.counts == {"train": 4, "val": 2, "test": 2}
    assert sorted(name for names in ids(data).values() for name in names) == [
        f"case{number}.nii.gz" for number in range(8)
    ]
    json.dumps(dict(facts.preprocessing))
    for image, label, _ in data.train_dataloader():
        assert image.shape == (2, 1, 8, 8, 8)
        assert {*label.unique().tolist()} <= {0, 1, 2, IGNORE}
    for batch in data.test_dataloader():
        case = data.case("test", int(batch.index))
        assert torch.equal(batch.image[0], case["image"])
        assert torch.equal(batch.label[0], case["label"])
        again, _, meta = prepare(case["path"], facts.preprocessing)
        assert torch.equal(again, case["image"])
        original = nib.load(str(case["path"]).replace(".nii.gz", "_label.nii.gz"))
        back = restore(case["label"], meta)
        assert np.array_equal(np.asarray(back.dataobj), np.asarray(original.dataobj))
        assert np.allclose(back.affine, original.affine)


def test_splits_depend_on_content_not_on_order_or_seed(write_case, write_list):
    cases = [write_case(f"case{number}") for number in range(10)]
    first = ids(ready(DecathlonData(str(write_list(cases)), **SMALL)))
    again = ready(DecathlonData(str(write_list(cases[::-1])), seed=4, **SMALL))
    assert ids(again) == first
    moved = cases[0][0].with_name("renamed.nii.gz")
    cases[0][0].rename(moved)
    renamed = ids(ready(DecathlonData(str(write_list([(moved, cases[0][1]), *cases[1:]])), **SMALL)))
    swap = {"renamed.nii.gz": "case0.nii.gz"}
    assert {split: {swap.get(name, name) for name in names} for split, names in renamed.items()} == {
        split: {*names} for split, names in first.items()
    }


def test_given_splits_and_folds_are_kept(write_case, write_list):
    cases = [write_case(f"case{number}") for number in range(9)]
    rows = [{"image": image.name, "label": label.name} for image, label in cases]
    data = ready(
        DecathlonData(str(write_list(rows[:5], validation=rows[5:7], test=[*rows[7:], "more.nii.gz"])), **SMALL)
    )
    assert ids(data) == {
        "train": [f"case{n}.nii.gz" for n in range(5)],
        "val": ["case5.nii.gz", "case6.nii.gz"],
        "test": ["case7.nii.gz", "case8.nii.gz"],
    }
    folded = [{**row, "fold": number % 3} for number, row in enumerate(rows)]
    data = ready(DecathlonData(str(write_list(folded)), fold=1, **SMALL))
    assert ids(data)["val"] == ["case1.nii.gz", "case4.nii.gz", "case7.nii.gz"]
    assert len(ids(data)["test"]) == 1


def test_a_subject_stays_on_one_side(write_case, write_list):
    cases = [write_case(f"case{number}") for number in range(12)]
    rows = [{"image": a.name, "label": b.name, "subject": n % 4} for n, (a, b) in enumerate(cases)]
    data = ready(DecathlonData(str(write_list(rows)), **SMALL, **SHARES))
    found = ids(data)
    of = {a.name: str(n % 4) for n, (a, _) in enumerate(cases)}
    assert all(case.group == of[case.id] for split in found for case in data.records(split))
    sides = {}
    for split, names in found.items():
        for name in names:
            sides.setdefault(int(name.removeprefix("case").split(".")[0]) % 4, set()).add(split)
    assert len(sides) == 4
    assert all(len(found) == 1 for found in sides.values())
    leak = DecathlonData(str(write_list(rows[:5], validation=rows[5:6], test=rows[6:])), **SMALL)
    assert "'case1.nii.gz' (train) and 'case5.nii.gz' (val) are of one subject, or copies of one image" in refusal(leak)


def test_copies_of_an_image_in_two_splits_are_refused(write_case, write_list):
    cases = [write_case(f"case{number}") for number in range(4)]
    copy = cases[0][0].with_name("copy.nii.gz")
    copy.write_bytes(cases[0][0].read_bytes())
    rows = [{"image": image.name, "label": label.name} for image, label in [*cases, (copy, cases[0][1])]]
    data = DecathlonData(str(write_list(rows[:3], validation=rows[3:4], test=rows[4:])), **SMALL)
    assert "'case0.nii.gz' (train) and 'copy.nii.gz' (test)" in refusal(data)


def test_channels_spacing_and_crop(write_case, write_list, tmp_path):
    cases = [write_case(f"case{number}", shape=(20, 18, 16, 2)) for number in range(4)]
    path = write_list(cases, modality={"0": "T1", "1": "T2"})
    data = ready(DecathlonData(str(path), spacing=[4.0, 3.0, 3.0], crop_foreground=True, **SMALL))
    assert data.facts.channels == 2
    assert data.facts.spacing == (4.0, 3.0, 3.0)
    assert data.case("train", 0)["image"].shape == (2, 10, 9, 16)
    assert data.case("train", 0)["label"].shape == (10, 9, 16)
    pairs = []
    for image, label in cases:
        values = np.asarray(nib.load(image).dataobj)
        names = [f"{channel}_{image.name}" for channel in (0, 1)]
        for channel, name in enumerate(names):
            nib.save(nib.Nifti1Image(values[..., channel], nib.load(image).affine), tmp_path / name)
        pairs.append({"image": names, "label": label.name})
    apart = ready(DecathlonData(str(write_list(pairs)), spacing=[4.0, 3.0, 3.0], **SMALL))
    assert apart.facts.channels == 2


def test_a_dicom_series_with_a_nifti_label(write_case, write_list, series, tmp_path):
    from domains.medical.data._reading import read

    rows = []
    for number in range(3):
        values = np.random.default_rng(number).integers(-200, 300, (12, 11, 10)).astype(np.int16)
        series(tmp_path / f"s{number}", values)
        source = read(tmp_path / f"s{number}")
        label = nib.as_closest_canonical(nib.Nifti1Image((source.values > 100).astype(np.uint8), source.affine))
        nib.save(label, tmp_path / f"s{number}.nii.gz")
        rows.append({"image": f"s{number}", "label": f"s{number}.nii.gz"})
    path = write_list(rows, labels={"background": 0, "dense": 1})
    data = ready(DecathlonData(str(path), intensity="window", window=[-200, 300], **SMALL))
    assert data.facts.class_names == ("background", "dense")
    case = data.case("train", 0)
    assert torch.equal(case["label"], (case["image"][0] * 500 - 200 > 100.5).long())
    assert data.facts.spacing == pytest.approx((0.7, 0.8, 2.5))


def test_mistakes_in_the_files_are_named(write_case, write_list, tmp_path):
    good = [write_case(f"good{number}") for number in range(4)]

    def check(name, part, content=None, **options):
        bad = write_case(name, **options)
        if content:
            content(*bad)
        data = DecathlonData(str(write_list([*good, bad])), **SMALL)
        assert part in refusal(data)
        kept = DecathlonData(str(write_list([*good, bad])), skip_bad=True, **SMALL)
        with pytest.warns(UserWarning, match="Left out"):
            kept.setup()
        assert kept.facts.skipped == 1
        assert sum(kept.facts.counts.values()) == 4

    check("empty", "empty_label.nii.gz' is empty: it holds background only", label=np.zeros((20, 18, 16), np.uint8))
    check("none", "none_label.nii.gz' has no labelled voxel", label=np.full((20, 18, 16), IGNORE, np.uint8))
    strange = np.zeros((20, 18, 16), np.uint8)
    strange[2, 2, :3] = [1, 7, 9]
    check("strange", "strange_label.nii.gz' holds 7, 9; classes are 0 to 2 and 255 is 'not labelled'", label=strange)
    check("cut", "Cannot read", lambda image, _: image.write_bytes(image.read_bytes()[:3000]))
    check(
        "moved",
        "lies on another grid",
        lambda _, label: nib.save(nib.Nifti1Image(np.ones((20, 18, 16), np.uint8), np.eye(4)), label),
    )
    check("four", "has 3 channels", shape=(20, 18, 16, 3))
    missing = {"image": "gone.nii.gz", "label": "gone_label.nii.gz"}
    assert "lists files that do not exist: '" in refusal(DecathlonData(str(write_list([*good, missing])), **SMALL))
    assert ready(DecathlonData(str(write_list([*good, missing])), skip_bad=True, **SMALL)).facts.skipped == 1


def test_empty_label_maps_can_be_allowed_and_ignore_is_kept(write_case, write_list):
    label = np.zeros((20, 18, 16), np.uint8)
    label[:, :4] = IGNORE
    cases = [write_case(f"case{number}") for number in range(3)] + [write_case("empty", label=label)]
    data = ready(DecathlonData(str(write_list(cases)), allow_empty=True, **SMALL))
    found = [data.case(split, n)["label"] for split in SPLITS for n in range(len(data.records(split)))]
    assert sum(IGNORE in label for label in found) == 1


def test_voxels_of_other_sizes_need_a_spacing(write_case, write_list):
    cases = [write_case(f"case{number}", affine=np.diag([1.0, 1, 1 + number / 2, 1])) for number in range(4)]
    text = refusal(DecathlonData(str(write_list(cases)), **SMALL))
    assert "sides from 1x1x1 to 1x1x2.5 mm: choose one size with `spacing`, such as [1.0, 1.0, 1.75]" in text
    data = ready(DecathlonData(str(write_list(cases)), spacing=[1.0, 1.0, 2.0], **SMALL))
    assert data.facts.spacing == (1.0, 1.0, 2.0)


def test_mistakes_in_the_list_are_named(write_case, write_list, tmp_path):
    cases = [write_case(f"case{number}") for number in range(4)]

    def text(training=cases, **content):
        return refusal(DecathlonData(str(write_list(training, **content)), **SMALL))

    assert "`labels` is None" in text(labels=None)
    assert "with numbers from 0 without holes" in text(labels={"0": "background", "2": "x"})
    assert "lists no training cases" in text(training=[])
    assert "'validation' has to be a list" in text(validation={})
    assert "training[0]: it has to be {" in text(training=[{"picture": "a"}])
    assert "training[0] has no label" in text(training=["case0.nii.gz"])
    assert "'case0.nii.gz' is listed more than once" in text(training=[cases[0], *cases])
    assert "images have [1, 2] files" in text(
        training=[*cases, {"image": ["case0.nii.gz", "case1.nii.gz"], "label": "case0_label.nii.gz"}]
    )
    assert "2 different cases cannot be split into train, val, test: give at least 3" in text(training=cases[:2])
    (tmp_path / "bad.json").write_text("{")
    assert "as JSON" in refusal(DecathlonData(str(tmp_path / "bad.json")))
    assert "There is no file" in refusal(DecathlonData(str(tmp_path / "gone.json")))


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"spatial_dims": 4}, "spatial_dims is 4"),
        ({"intensity": "zscores"}, r"Unknown intensity 'zscores'\. Did you mean 'zscore'"),
        ({"intensity": "window"}, "window is None"),
        ({"intensity": "window", "window": [5, 1]}, r"window is \[5, 1\]"),
        ({"window": [0, 1]}, "and none without"),
        ({"spacing": [1, 1]}, r"spacing is \[1, 1\]; give 3 sides"),
        ({"val_fraction": 0.6, "test_fraction": 0.5}, "the sum is below 1"),
        ({"val_fraction": 0}, "val_fraction is 0"),
        ({"patch_size": (32, 4, 32)}, "patch_size is"),
    ],
)
def test_wrong_arguments_are_refused(options, part):
    with pytest.raises(GraftError, match=part):
        DecathlonData("x.json", **options)


# ---- images and masks


@pytest.fixture
def folder(tmp_path):
    """Ten grey images with masks; the first five are of one person, the others of another five."""
    root = tmp_path / "set"
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True)
    for number in range(10):
        mask = np.zeros((30, 24), np.uint8)
        mask[5 : 12 + number, 6:14] = 1
        mask[20:24, 3:9] = 2
        image = np.random.default_rng(number).integers(20, 60, (30, 24)).astype(np.uint8) + mask * 80
        name = f"{'anna' if number < 5 else f'p{number}'}_{number}.png"
        Image.fromarray(image).save(root / "images" / name)
        Image.fromarray(mask).save(root / "masks" / name)
    return root


def test_images_and_masks(folder):
    data = ready(ImageMaskFolder(str(folder), classes=["large", "small"], patch_size=(16, 16)))
    assert data.facts.class_names == ("background", "large", "small")
    assert (data.facts.spatial_dims, data.facts.channels, data.facts.spacing) == (2, 1, (1.0, 1.0))
    case = data.case("val", 0)
    assert torch.equal(
        case["label"], torch.from_numpy(np.array(Image.open(folder / "masks" / case["path"].name))).long()
    )
    assert case["image"].shape == (1, 30, 24)
    assert next(iter(data.train_dataloader())).image.shape == (2, 1, 16, 16)
    assert sum(data.facts.counts.values()) == 10


def test_masks_of_0_and_255_are_one_class(folder):
    for path in (folder / "masks").iterdir():
        Image.fromarray(((np.array(Image.open(path)) == 1) * 255).astype(np.uint8)).save(path)
    data = ready(ImageMaskFolder(str(folder)))
    assert data.facts.class_names == ("background", "class_1")
    assert {*data.case("train", 0)["label"].unique().tolist()} == {0, 1}


def test_colour_images_have_three_channels(folder):
    path = next((folder / "images").iterdir())
    Image.open(path).convert("RGB").save(path)
    data = ready(ImageMaskFolder(str(folder)))
    assert data.facts.channels == 3
    assert next(iter(data.val_dataloader())).image.shape == (1, 3, 30, 24)


def test_subjects_of_images_stay_together(folder):
    found = ids(ready(ImageMaskFolder(str(folder), subject_end="_")))
    assert sum(any(name.startswith("anna") for name in names) for names in found.values()) == 1


def test_mistakes_in_the_folder_are_named(folder, tmp_path):
    assert "There is no folder" in refusal(ImageMaskFolder(str(tmp_path / "none")))
    masks = folder / "masks"
    (masks / "anna_0.png").rename(tmp_path / "kept.png")
    assert "anna_0.png' has no mask of the same name" in refusal(ImageMaskFolder(str(folder)))
    Image.new("L", (9, 9), 1).save(masks / "anna_0.png")
    assert "lies on another grid" in refusal(ImageMaskFolder(str(folder)))
    Image.new("RGB", (24, 30), (1, 1, 1)).save(masks / "anna_0.png")
    assert "has 3 channels: save one class number a voxel" in refusal(ImageMaskFolder(str(folder)))
    (masks / "anna_0.png").write_bytes((tmp_path / "kept.png").read_bytes()[:60])
    assert "Cannot read" in refusal(ImageMaskFolder(str(folder)))
    data = ImageMaskFolder(str(folder), skip_bad=True)
    with pytest.warns(UserWarning, match="Left out"):
        data.setup()
    assert data.facts.skipped == 1
    (masks / "anna_0.png").write_bytes((tmp_path / "kept.png").read_bytes())
    assert "holds 2; classes are 0 to 1" in refusal(ImageMaskFolder(str(folder), classes=["only"]))


# ---- one label an image


@pytest.fixture
def table(tmp_path):
    """Volumes of two classes and their table, without splits."""
    rows = []
    for number in range(12):
        shape = (10 + number % 3, 12, 9)
        values = np.random.default_rng(number).uniform(1, 2, shape).astype(np.float32)
        nib.save(nib.Nifti1Image(values, np.diag([1, 1, 1.2, 1])), tmp_path / f"v{number}.nii.gz")
        rows.append([f"v{number}.nii.gz", ("ill", "well")[number % 2], "", f"s{number // 2}"])

    def write(rows=rows, header="path,label"):
        width = header.count(",") + 1
        path = tmp_path / "table.csv"
        path.write_text("\n".join([header, *(",".join(row[:width]) for row in rows)]))
        return path

    write.rows = rows
    return write


def test_a_table_of_volumes(table):
    data = ready(VolumeCSV(str(table()), patch_size=(8, 8, 8), batch_size=4))
    assert data.facts.class_names == ("ill", "well")
    assert data.facts.patch_size == (8, 8, 8)
    assert sum(data.facts.counts.values()) == 12
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        for image, label, index in loader:
            assert image.shape[1:] == (1, 8, 8, 8)
            assert label.shape == index.shape == (len(image),)
    for split in SPLITS:
        assert {case.target for case in data.records(split)} == {"ill", "well"}
        for number, case in enumerate(data.records(split)):
            assert int(data.case(split, number)["label"]) == data.names.index(case.target)


def test_a_scaled_volume_keeps_its_proportions(table):
    data = ready(VolumeCSV(str(table()), patch_size=(24, 24, 24), intensity="window", window=[0, 2]))
    image = data.case("train", 0)["image"][0]
    assert image.shape == (24, 24, 24)
    extent = [int((image > 0.3).any(dim=d1).any(dim=d2).sum()) for d1, d2 in ((2, 1), (2, 0), (1, 0))]
    sides = (np.array(nib.load(data.case("train", 0)["path"]).shape) * [1, 1, 1.2]).tolist()
    assert np.array(extent) / max(extent) == pytest.approx(np.array(sides) / max(sides), abs=0.1)


def test_given_splits_and_subjects_of_a_table(table):
    rows = [[*row[:2], ("train", "train", "val", "test")[number // 3], row[3]] for number, row in enumerate(table.rows)]
    assert ready(VolumeCSV(str(table(rows, "path,label,split")), patch_size=(8, 8, 8))).facts.counts == {
        "train": 6,
        "val": 3,
        "test": 3,
    }
    assert "are of one subject" in refusal(VolumeCSV(str(table(rows, "path,label,split,subject"))))


def test_mistakes_in_the_table_are_named(table, tmp_path):
    assert "no column 'label'" in refusal(VolumeCSV(str(table(header="path"))))
    assert "line 3: the label is missing" in refusal(VolumeCSV(str(table([["a", "x"], ["b", ""]]))))
    assert "Unknown split 'training2'" in refusal(VolumeCSV(str(table([["a", "x", "training2"]], "path,label,split"))))
    assert "needs at least 2 classes" in refusal(VolumeCSV(str(table([["a", "x"]]))))
    rows = [[*row[:2], "test" if row[1] == "ill" else "train"] for row in table.rows]
    assert "no training image of class ill" in refusal(VolumeCSV(str(table(rows, "path,label,split"))))
    assert "There is no file" in refusal(VolumeCSV(str(tmp_path / "gone.csv"))) or "Cannot read" in refusal(
        VolumeCSV(str(tmp_path / "gone.csv"))
    )


@pytest.mark.parametrize("shape", [(12, 12), (12, 12, 3), (10, 10, 10)])
def test_medmnist(tmp_path, shape):
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in zip(SPLITS, (6, 3, 3), strict=True):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(count) % 3)[:, None]
    np.savez(tmp_path / "toy.npz", **arrays)
    data = ready(MedMNIST(str(tmp_path / "toy.npz"), classes=["a", "b", "c"], batch_size=3))
    channels = 3 if shape[-1] == 3 else 1
    assert data.facts.channels == channels
    assert data.facts.counts == {"train": 6, "val": 3, "test": 3}
    image, label, _ = next(iter(data.val_dataloader()))
    wanted = arrays["val_images"] / 255
    wanted = np.moveaxis(wanted, -1, 1) if channels == 3 else wanted[:, None]
    assert image.numpy() == pytest.approx(wanted, abs=1e-6)
    assert label.tolist() == [0, 1, 2]
    assert next(iter(data.train_dataloader())).image.shape == image.shape


def test_medmnist_files_that_are_refused(tmp_path):
    def write(**changes):
        arrays = {f"{split}_images": np.zeros((3, 8, 8), np.uint8) for split in SPLITS}
        arrays |= {f"{split}_labels": np.array([[0], [1], [0]]) for split in SPLITS}
        np.savez(tmp_path / "x.npz", **{name: value for name, value in (arrays | changes).items() if value is not None})
        return MedMNIST(str(tmp_path / "x.npz"))

    assert "has no val_images" in refusal(write(val_images=None))
    assert "one class number an image is due" in refusal(write(test_labels=np.zeros((3, 14), np.int64)))
    assert "not uint8 images of one size" in refusal(write(val_images=np.zeros((3, 9, 8), np.uint8)))
    # An array of objects would have to be unpickled.
    assert "Cannot read" in refusal(write(train_labels=np.array([{}, [], 1], dtype=object)))
    (tmp_path / "x.npz").write_bytes(b"PK not a zip")
    assert "Cannot read" in refusal(MedMNIST(str(tmp_path / "x.npz")))
    assert "There is no file" in refusal(MedMNIST(str(tmp_path / "none.npz")))
    write()
    assert "classes names 1 classes; " in refusal(MedMNIST(str(tmp_path / "x.npz"), classes=["a"]))
