"""Tiny brains, volumes and series, written where a test can spoil them."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from domains.medical.data import atlases, hemisphere
from domains.medical.data._atlases import CLASSES

AFFINE = np.array([[-2.0, 0, 0, 30], [0, 1.5, 0, -40], [0, 0, 3, 5], [0, 0, 0, 1]])


def make_brain(shape: Sequence[int], seed: int = 0) -> atlases.Brain:
    """An ellipsoid in eight classes: blocks of 5 voxels, so that every class stands in every part."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(1, len(CLASSES), [side // 5 + 1 for side in shape])
    label = blocks
    for axis, side in enumerate(shape):
        label = np.repeat(label, 5, axis=axis).take(range(side), axis=axis)
    axes = np.meshgrid(*(np.linspace(-1.1, 1.1, side) for side in shape), indexing="ij")
    label = np.where(sum(axis**2 for axis in axes) <= 1, label, 0)
    image = np.where(label, 0.2 + label / 10 + rng.normal(0, 0.03, shape), 0)
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    affine[:3, 3] = [-(shape[0] // 2), -10, -10]
    preprocessing = {
        "spatial_dims": 3,
        "channels": 1,
        "spacing": [1.0, 1.0, 1.0],
        "intensity": "percentiles",
        "crop_foreground": True,
    }
    pixels = torch.as_tensor(image, dtype=torch.float32)[None]
    return atlases.Brain(pixels, torch.as_tensor(label, dtype=torch.uint8), affine, preprocessing)


@pytest.fixture
def brain(monkeypatch: pytest.MonkeyPatch) -> atlases.Brain:
    """A brain of 41 x 60 x 35 voxels that stands in for every atlas."""
    made = make_brain((41, 60, 35))
    for module in (atlases, hemisphere):
        monkeypatch.setattr(module, "load_brain", lambda name: made)
    return made


Writer = Callable[..., tuple[Path, Path]]


@pytest.fixture
def write_case(tmp_path: Path) -> Writer:
    """Write an image and its label map: a bright block in noise, as NIfTI."""

    def write(
        name: str,
        shape: Sequence[int] = (20, 18, 16),
        affine: np.ndarray = AFFINE,
        seed: int | None = None,
        label: np.ndarray | None = None,
    ) -> tuple[Path, Path]:
        rng = np.random.default_rng(zlib.crc32(name.encode()) if seed is None else seed)
        if label is None:
            label = np.zeros(shape[:3], np.uint8)
            label[4:9, 5:11, 6:10] = 1
            label[11:14, 5:9, 3:6] = 2
        image = rng.uniform(50, 100, shape).astype(np.float32)
        if len(shape) == 3:
            image += 100.0 * label
        paths = tmp_path / f"{name}.nii.gz", tmp_path / f"{name}_label.nii.gz"
        nib.save(nib.Nifti1Image(image, affine), paths[0])
        nib.save(nib.Nifti1Image(label, affine), paths[1])
        return paths

    return write


@pytest.fixture
def write_list(tmp_path: Path) -> Callable[..., Path]:
    """Write a datalist; cases are (image, label) or whole entries."""

    def write(training: Sequence[object], **content: object) -> Path:
        rows = [{"image": row[0].name, "label": row[1].name} if isinstance(row, tuple) else row for row in training]
        content = {"labels": {"0": "background", "1": "bright", "2": "small"}, "training": rows} | content
        path = tmp_path / "dataset.json"
        path.write_text(json.dumps(content))
        return path

    return write


def write_series(folder: Path, values: np.ndarray, **changes: object) -> None:
    """Write (columns, rows, slices) as a DICOM series.

    Args:
        folder: Where to.
        values: int16.
        **changes: `orientation` (6 cosines), `spacing` (row, column, slice), `origin`, `series`, `order` (file
            numbers), `skip` (slices left out), `slope`, `intercept`.
    """
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    options = {
        "orientation": (1, 0, 0, 0, 1, 0),
        "spacing": (0.8, 0.7, 2.5),
        "origin": (-10.0, 20.0, -30.0),
        "series": generate_uid(),
        "order": range(values.shape[2]),
        "skip": (),
        "slope": 1,
        "intercept": 0,
    } | changes
    across = np.array(options["orientation"], float)
    normal = np.cross(across[:3], across[3:])
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(values.shape[2]):
        if number in options["skip"]:
            continue
        item = Dataset()
        item.file_meta = FileMetaDataset()
        item.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        item.file_meta.MediaStorageSOPClassUID = item.SOPClassUID = CTImageStorage
        item.file_meta.MediaStorageSOPInstanceUID = item.SOPInstanceUID = generate_uid()
        item.SeriesInstanceUID, item.Modality = options["series"], "CT"
        item.InstanceNumber = options["order"][number] + 1
        item.ImageOrientationPatient = [*across]
        item.ImagePositionPatient = [*(np.array(options["origin"]) + normal * options["spacing"][2] * number)]
        item.PixelSpacing, item.SliceThickness = [*options["spacing"][:2]], options["spacing"][2]
        pixels = np.ascontiguousarray(values[:, :, number].T, dtype=np.int16)
        item.Rows, item.Columns = pixels.shape
        item.SamplesPerPixel, item.PhotometricInterpretation = 1, "MONOCHROME2"
        item.BitsAllocated = item.BitsStored = 16
        item.HighBit, item.PixelRepresentation = 15, 1
        item.RescaleSlope, item.RescaleIntercept = options["slope"], options["intercept"]
        item.PixelData = pixels.tobytes()
        item.save_as(folder / f"{options['order'][number]:03d}.dcm", enforce_file_format=True)


@pytest.fixture
def series() -> Callable[..., None]:
    """Write a DICOM series (see `write_series`)."""
    return write_series
