"""Files of all kinds reach the net where they belong, and label maps find their way back."""

from __future__ import annotations

import gzip
import itertools

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data.image_reader import PydicomReader
from monai.networks.layers import GaussianFilter
from nibabel.processing import resample_from_to
from PIL import Image

from common.errors import GraftError
from domains.medical.data import prepare, restore
from domains.medical.data._geometry import respaced, sample_linear, sample_nearest, smooth, voxel_points
from domains.medical.data._reading import read
from domains.medical.data.prepare import prepare_label

PLAIN = {"spatial_dims": 3, "channels": 1, "spacing": None, "intensity": "window", "window": [0.0, 1.0]}
BLOB = np.array([6.0, -9.0, 14.0])  # RAS, mm
SHAPE = (22, 26, 20)


def rotated(degrees: float, axis: int) -> np.ndarray:
    turn = np.eye(4)
    one, two = (other for other in range(3) if other != axis)
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn[one, one], turn[two, two], turn[one, two], turn[two, one] = cos, cos, -sin, sin
    return turn


def centred(matrix: np.ndarray) -> np.ndarray:
    """An affine of these directions whose field of view has the blob 3 mm from its middle."""
    affine = np.eye(4)
    affine[:3, :3] = matrix[:3, :3]
    affine[:3, 3] = BLOB - [3, -2, 1] - matrix[:3, :3] @ ((np.array(SHAPE) - 1) / 2)
    return affine


AFFINES = {
    "ras": centred(np.diag([1.0, 1.0, 1.0, 1.0])),
    "las": centred(np.diag([-1.0, 1.0, 1.0, 1.0])),
    "lps": centred(np.diag([-1.0, -1.0, 1.0, 1.0])),
    "permuted": centred(np.array([[0, 0, -1.2, 0], [0.9, 0, 0, 0], [0, 1.1, 0, 0], [0, 0, 0, 1.0]])),
    "anisotropic": centred(np.diag([0.8, 1.3, 2.0, 1.0])),
    "oblique": centred(rotated(20, 2) @ rotated(-12, 0) @ np.diag([-1.0, 1.2, 1.4, 1.0])),
}


def world_of(weights: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """The centre of mass of an array, in RAS."""
    places = np.stack(np.meshgrid(*map(np.arange, weights.shape), indexing="ij"), axis=-1).reshape(-1, 3)
    middle = (places * weights.reshape(-1, 1)).sum(axis=0) / weights.sum()
    return affine[:3, :3] @ middle + affine[:3, 3]


def ball(affine: np.ndarray, shape=SHAPE, radius=4.0) -> np.ndarray:
    places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    distance = np.sqrt(((places @ affine[:3, :3].T + affine[:3, 3] - BLOB) ** 2).sum(axis=-1))
    return (distance < radius).astype(np.float32)


@pytest.mark.parametrize("name", AFFINES)
@pytest.mark.parametrize("changes", [{}, {"spacing": [1.6, 1.2, 0.9]}, {"crop_foreground": True}, {"size": [24] * 3}])
def test_a_ball_stays_where_it_is_in_the_world(tmp_path, name, changes):
    affine = AFFINES[name]
    values = ball(affine)
    nib.save(nib.Nifti1Image(values, affine), tmp_path / "ball.nii.gz")
    image, placed, meta = prepare(tmp_path / "ball.nii.gz", PLAIN | changes)
    assert image.dtype == torch.float32
    assert nib.aff2axcodes(placed) == ("R", "A", "S")
    assert np.abs(world_of(image[0].numpy(), placed) - world_of(values, affine)).max() < 0.15
    if "spacing" in changes:
        assert np.sqrt((placed[:3, :3] ** 2).sum(axis=0)) == pytest.approx(changes["spacing"])
    if "size" in changes:
        assert tuple(image.shape[1:]) == (24, 24, 24)
    back = restore((image[0] > 0.5).to(torch.uint8), meta)
    assert back.shape == SHAPE
    assert np.allclose(back.affine, affine)
    found = np.asarray(back.dataobj)
    overlap = 2 * (found * values).sum() / (found.sum() + values.sum())
    assert overlap == 1 if not {"spacing", "size"} & {*changes} else overlap > 0.85


@pytest.mark.parametrize("name", AFFINES)
def test_labels_lie_on_the_prepared_image(tmp_path, name):
    affine = AFFINES[name]
    values = ball(affine)
    nib.save(nib.Nifti1Image(values, affine), tmp_path / "ball.nii.gz")
    nib.save(nib.Nifti1Image(values.astype(np.uint8), affine), tmp_path / "label.nii.gz")
    image, _, meta = prepare(tmp_path / "ball.nii.gz", PLAIN | {"crop_foreground": True})
    label = prepare_label(tmp_path / "label.nii.gz", meta, "ball.nii.gz")
    assert label.dtype == torch.int64
    assert torch.equal(label, image[0].long())


def test_resampling_agrees_with_nibabel(tmp_path):
    affine = AFFINES["oblique"]
    values = np.random.default_rng(0).uniform(0, 1, SHAPE).astype(np.float32)
    source = nib.Nifti1Image(values, affine)
    shape, finer = respaced(SHAPE, affine, (0.7, 0.9, 1.4))
    wanted = resample_from_to(source, (shape, finer), order=1).get_fdata()
    points = voxel_points(shape, np.linalg.inv(affine) @ finer)
    got = sample_linear(torch.from_numpy(values)[None], points)[0].numpy()
    inside = np.zeros(shape, bool)
    inside[1:-1, 1:-1, 1:-1] = True
    assert got[inside] == pytest.approx(wanted[inside], abs=1e-4)
    nearest = sample_nearest(torch.from_numpy(values > 0.5).byte(), points, outside=0).numpy()
    assert (
        nearest[inside]
        == resample_from_to(
            nib.Nifti1Image((values > 0.5).astype(np.uint8), affine), (shape, finer), order=0
        ).get_fdata()[inside]
    ).mean() > 0.99


def test_smoothing_agrees_with_monai():
    volume = torch.rand(2, 11, 12, 13)
    wanted = GaussianFilter(3, [0.9, 1.2, 0.6], truncated=8.0, approx="sampled")(volume[None])[0]
    inner = (slice(None), slice(4, 7), slice(4, 8), slice(4, 9))
    assert smooth(volume, [0.9, 1.2, 0.6])[inner] == pytest.approx(wanted[inner], abs=2e-3)
    assert smooth(torch.ones(1, 5, 5), [1.0, 2.0]) == pytest.approx(torch.ones(1, 5, 5))


def test_downsampling_does_not_alias(tmp_path):
    stripes = np.ones((40, 12, 12), np.float32)
    stripes[::2] = 3
    nib.save(nib.Nifti1Image(stripes, np.eye(4)), tmp_path / "s.nii.gz")
    image, _, _ = prepare(tmp_path / "s.nii.gz", PLAIN | {"spacing": [3.0, 1.0, 1.0], "window": [0, 4]})
    inner = image[0, 2:-2] * 4
    assert inner.mean() == pytest.approx(2, abs=0.02)
    assert inner.std() < 0.15


@pytest.mark.parametrize("kind", ["zscore", "percentiles"])
def test_intensities_by_formula(tmp_path, kind):
    rng = np.random.default_rng(1)
    values = rng.normal(300, 40, (12, 12, 12)).astype(np.float32)
    values[:3] = 0
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "v.nii.gz")
    image, _, _ = prepare(tmp_path / "v.nii.gz", {"spatial_dims": 3, "channels": 1, "intensity": kind})
    inside = values[values != 0]
    if kind == "zscore":
        wanted = (values - inside.mean()) / inside.std()
    else:
        low, high = np.percentile(inside, [0.5, 99.5])
        wanted = ((values - low) / (high - low)).clip(0, 1)
    assert image[0].numpy() == pytest.approx(np.where(values == 0, 0, wanted), abs=1e-4)


def test_channels_from_several_files_and_from_one(tmp_path):
    values = np.random.default_rng(2).uniform(0, 1, (8, 9, 10, 2)).astype(np.float32)
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "both.nii.gz")
    for channel in (0, 1):
        nib.save(nib.Nifti1Image(values[..., channel], np.eye(4)), tmp_path / f"{channel}.nii.gz")
    asked = PLAIN | {"channels": 2}
    together, _, _ = prepare(tmp_path / "both.nii.gz", asked)
    apart, _, _ = prepare([tmp_path / "0.nii.gz", tmp_path / "1.nii.gz"], asked)
    assert torch.equal(together, apart)
    assert together.numpy() == pytest.approx(np.moveaxis(values, -1, 0))


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("RGB", 1), ("L", 3), ("P", 1), ("I;16", 1)])
def test_pictures(tmp_path, mode, channels):
    grey = np.arange(12 * 10, dtype=np.uint8).reshape(12, 10)
    image = Image.fromarray(grey.astype(np.uint16) if mode == "I;16" else grey)
    (image if mode == "I;16" else image.convert(mode)).save(tmp_path / "a.png")
    asked = {"spatial_dims": 2, "channels": channels, "intensity": "window", "window": [0, 255]}
    found, _, meta = prepare(tmp_path / "a.png", asked)
    assert found.shape == (channels, 12, 10)
    if mode != "P":
        assert found[0].numpy() * 255 == pytest.approx(grey, abs=0.01)
    back = restore(torch.ones(12, 10, dtype=torch.int64), meta)
    assert back.shape == (12, 10, 1)


# ---- DICOM

ORIENTATIONS = {
    "axial": (1, 0, 0, 0, 1, 0),
    "coronal": (1, 0, 0, 0, 0, -1),
    "sagittal": (0, 1, 0, 0, 0, -1),
    "oblique": (np.cos(0.3), np.sin(0.3), 0, -np.sin(0.3), np.cos(0.3), 0),
}


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_a_series_lies_where_dicom_says(tmp_path, series, name):
    values = np.random.default_rng(0).integers(-500, 500, (7, 6, 5)).astype(np.int16)
    orientation = np.array(ORIENTATIONS[name], float)
    series(tmp_path / "s", values, orientation=orientation, order=[3, 0, 4, 1, 2], slope=2, intercept=-10)
    found = read(tmp_path / "s")
    normal = np.cross(orientation[:3], orientation[3:])
    mapped: dict[tuple[float, ...], float] = {}
    for column, row, layer in itertools.product(*map(range, values.shape)):
        # The equation of the standard (PS3.3 C.7.6.2.1.1), with x and y turned from LPS to RAS.
        place = np.array([-10.0, 20, -30]) + orientation[:3] * 0.7 * column + orientation[3:] * 0.8 * row
        place = (place + normal * 2.5 * layer) * [-1, -1, 1]
        mapped[tuple(np.round(place, 3) + 0.0)] = values[column, row, layer] * 2 - 10
    for voxel in itertools.product(*map(range, found.values.shape)):
        place = found.affine[:3, :3] @ np.array(voxel) + found.affine[:3, 3]
        assert found.values[voxel] == mapped[tuple(np.round(place, 3) + 0.0)]


def test_an_axial_series_agrees_with_monai(tmp_path, series):
    values = np.random.default_rng(0).integers(0, 500, (7, 6, 5)).astype(np.int16)
    series(tmp_path / "s", values)
    reader = PydicomReader(affine_lps_to_ras=True)
    wanted, meta = reader.get_data(reader.read(str(tmp_path / "s")))
    found = read(tmp_path / "s")
    assert np.array_equal(found.values.swapaxes(0, 1), wanted)
    assert found.affine[:, [1, 0, 2, 3]] == pytest.approx(meta["affine"])


def test_a_single_x_ray_needs_no_place_and_bright_is_dense(tmp_path, series):
    import pydicom

    values = np.arange(12 * 10).reshape(12, 10, 1).astype(np.int16)
    series(tmp_path / "x", values)
    file = tmp_path / "x" / "000.dcm"
    item = pydicom.dcmread(file)
    for tag in ("ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing"):
        delattr(item, tag)
    item.PhotometricInterpretation = "MONOCHROME1"
    item.save_as(file)
    image, _, _ = prepare(file, {"spatial_dims": 2, "channels": 1, "intensity": "window", "window": [0, 119]})
    assert image[0].numpy() * 119 == pytest.approx(119 - values[:, :, 0].T, abs=1e-3)


def test_a_nifti_label_on_a_dicom_series(tmp_path, series):
    values = np.random.default_rng(0).integers(1, 500, (9, 8, 8)).astype(np.int16)
    series(tmp_path / "s", values)
    source = read(tmp_path / "s")
    drawn = nib.Nifti1Image((source.values > 250).astype(np.uint8), source.affine)
    nib.save(nib.as_closest_canonical(drawn), tmp_path / "label.nii.gz")
    asked = {"spatial_dims": 3, "channels": 1, "intensity": "window", "window": [0, 500]}
    image, _, meta = prepare(tmp_path / "s", asked)
    label = prepare_label(tmp_path / "label.nii.gz", meta, tmp_path / "s")
    assert torch.equal(label, (image[0] * 500 > 250.5).long())
    assert np.array_equal(np.asarray(restore(label, meta).dataobj), source.values > 250)


def test_series_that_are_refused(tmp_path, series):
    values = np.zeros((5, 6, 7), np.int16)
    series(tmp_path / "hole", values, skip=(3,))
    with pytest.raises(GraftError, match=r"not evenly spaced \(2.50 to 5.00 mm apart\)"):
        read(tmp_path / "hole")
    series(tmp_path / "mixed", values)
    series(tmp_path / "mixed", values[:, :, :2], order=[7, 8])
    with pytest.raises(GraftError, match="mixes 2 DICOM series: give each series a folder"):
        read(tmp_path / "mixed")
    series(tmp_path / "sizes", values, series="1.2.3")
    series(tmp_path / "sizes", values[:3, :, :1], series="1.2.3", order=[9], origin=(0, 0, 40.0))
    with pytest.raises(GraftError, match=r"009.dcm' differs from the other slices"):
        read(tmp_path / "sizes")
    (tmp_path / "none").mkdir()
    with pytest.raises(GraftError, match="holds no DICOM files"):
        read(tmp_path / "none")
    series(tmp_path / "cut", values)
    whole = (tmp_path / "cut" / "002.dcm").read_bytes()
    (tmp_path / "cut" / "002.dcm").write_bytes(whole[:-20])
    with pytest.raises(GraftError, match=r"Cannot read '.*cut'"):
        read(tmp_path / "cut")


# ---- refusals


def refused(path, match, **changes):
    with pytest.raises(GraftError, match=match) as caught:
        prepare(path, PLAIN | changes)
    assert "\n" not in str(caught.value)


def test_files_that_are_refused(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.uniform(0, 1, (20, 20, 20)).astype(np.float32)
    good = tmp_path / "good.nii.gz"
    nib.save(nib.Nifti1Image(values, np.eye(4)), good)
    cut = tmp_path / "cut.nii.gz"
    cut.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    refused(cut, "Cannot read '.*cut.nii.gz'.*cut short or damaged")
    short = tmp_path / "short.nii"
    short.write_bytes(gzip.decompress(good.read_bytes())[:-100])
    refused(short, "Cannot read '.*short.nii'")
    (tmp_path / "no.nii.gz").write_bytes(b"nothing")
    refused(tmp_path / "no.nii.gz", "Cannot read")
    (tmp_path / "text.txt").write_text("hello")
    refused(tmp_path / "text.txt", "is no image that Graft reads: give .nii, .nii.gz, .dcm, .png")
    refused(tmp_path / "missing.nii.gz", "There is no file '.*missing.nii.gz'")
    broken = values.copy()
    broken[3, 4, 5:8] = np.nan
    nib.save(nib.Nifti1Image(broken, np.eye(4)), tmp_path / "nan.nii.gz")
    refused(tmp_path / "nan.nii.gz", "has 3 voxels that are NaN or infinite")
    nib.save(nib.Nifti1Image(np.stack([values] * 4, axis=-1), np.eye(4)), tmp_path / "4d.nii.gz")
    refused(tmp_path / "4d.nii.gz", r"has 4 channels \(shape 20x20x20x4 .*where 1 are due")
    nib.save(nib.Nifti1Image(values[:, :, :1], np.eye(4)), tmp_path / "flat.nii.gz")
    refused(tmp_path / "flat.nii.gz", "is one slice .* where volumes are due")
    refused(good, "is a volume .* where images are due", spatial_dims=2)
    nib.save(nib.Nifti1Image(values * 0, np.eye(4)), tmp_path / "zero.nii.gz")
    refused(tmp_path / "zero.nii.gz", "is empty: all its voxels are 0", intensity="zscore")
    nib.save(nib.Nifti1Image(values, np.diag([2.0, 1, 1, 1])), tmp_path / "other.nii.gz")
    refused([good, tmp_path / "other.nii.gz"], "lie on different grids", channels=2)
    header = nib.Nifti1Header()
    header["sform_code"] = 1
    nib.save(nib.Nifti1Image(values, None, header), tmp_path / "singular.nii.gz")
    refused(tmp_path / "singular.nii.gz", "affine that cannot be inverted")
    image = Image.fromarray(np.zeros((9, 9), np.uint8))
    image.save(tmp_path / "pages.tif", save_all=True, append_images=[image])
    refused(tmp_path / "pages.tif", "has 2 pages", spatial_dims=2)


def test_label_maps_that_are_refused(tmp_path):
    values = np.random.default_rng(0).uniform(1, 2, (10, 11, 12)).astype(np.float32)
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "image.nii.gz")
    _, _, meta = prepare(tmp_path / "image.nii.gz", PLAIN)

    def check(name, array, affine, match):
        nib.save(nib.Nifti1Image(array, affine), tmp_path / name)
        with pytest.raises(GraftError, match=match):
            prepare_label(tmp_path / name, meta, "image.nii.gz")

    label = np.ones((10, 11, 12), np.uint8)
    check("shape.nii.gz", label[1:], np.eye(4), "another grid .9x11x12 .* than its image 'image.nii.gz'")
    moved = np.eye(4)
    moved[0, 3] = 0.4
    check("moved.nii.gz", label, moved, "another grid")
    check("halves.nii.gz", label * 0.5, np.eye(4), "no whole numbers")
    check("channels.nii.gz", np.stack([label] * 2, axis=-1), np.eye(4), "has 2 channels")
