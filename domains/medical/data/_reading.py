"""Reading NIfTI files, DICOM series and pictures into arrays with affines. All refusals name the file."""

from __future__ import annotations

import gzip
import itertools
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
from PIL import Image
from pydicom.errors import InvalidDicomError

from common.errors import GraftError
from domains.medical.data._geometry import spacing_of

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
NIFTI = (".nii", ".nii.gz")
_UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    AttributeError,
    NotImplementedError,
    SyntaxError,
    RuntimeError,
    struct.error,
    zlib.error,
    gzip.BadGzipFile,
    nib.filebasedimages.ImageFileError,
    InvalidDicomError,
    Image.DecompressionBombError,
)
# Slices of a series may lie this much nearer or farther than the average, relative to it (rounded headers).
_UNEVEN = 0.02


@dataclass(frozen=True, eq=False)
class Volume:
    """An array as its file holds it.

    Attributes:
        values: (D, H, W), or (D, H, W, C) where the file has several channels; (H, W, 1) and (H, W, 1, C) for pictures.
        affine: (4, 4), voxels to RAS in mm; the identity for pictures.
    """

    values: np.ndarray
    affine: np.ndarray


def read(path: Path) -> Volume:
    """Read an image or a label map.

    Args:
        path: NIfTI file, folder of a DICOM series, DICOM file, or picture (png, jpg, bmp, tif).

    Raises:
        GraftError: The file is missing, of another kind, damaged, or the folder holds no single whole series.
    """
    if not path.exists():
        raise GraftError(f"There is no file '{path}': correct the path.")
    name = path.name.lower()
    try:
        if path.is_dir():
            return _read_series(path, sorted(file for file in path.iterdir() if is_dicom(file)))
        if name.endswith(NIFTI):
            return _read_nifti(path)
        if name.endswith(PICTURES):
            return _read_picture(path)
        if is_dicom(path):
            return _read_series(path, [path])
    except _UNREADABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise GraftError(f"Cannot read '{path}': {reason}. Is it cut short or damaged? Replace the file.") from error
    known = ", ".join((*NIFTI, ".dcm", *PICTURES))
    raise GraftError(f"'{path}' is no image that Graft reads: give {known}, or the folder of a DICOM series.")


def _read_nifti(path: Path) -> Volume:
    image: Any = nib.load(path, mmap=False)
    values = np.asanyarray(image.dataobj)
    if np.iscomplexobj(values) or values.dtype.names:
        raise GraftError(f"'{path}' holds {values.dtype} values: save it with one number a voxel.")
    affine = np.asarray(image.affine, dtype=np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise GraftError(f"'{path}' has an affine that cannot be inverted: repair its header.")
    if values.ndim < 2 or values.ndim > 4:
        values = np.squeeze(values)
    while values.ndim < 3:
        values = values[..., None]
    if values.ndim == 4 and values.shape[3] == 1:
        values = values[..., 0]
    return Volume(values, affine)


def _read_picture(path: Path) -> Volume:
    with Image.open(path) as image:
        if getattr(image, "n_frames", 1) > 1:
            raise GraftError(f"'{path}' has {image.n_frames} pages: save each as a file of its own.")
        if image.mode in ("RGBA", "LA", "PA", "CMYK", "YCbCr", "LAB", "HSV"):
            image = image.convert("L" if image.mode == "LA" else "RGB")
        values = np.array(image)
    if values.dtype == bool:
        values = values.astype(np.uint8)
    return Volume(values[:, :, None], np.eye(4))


def picture_channels(path: Path) -> int:
    """Return 3 for a colour picture, else 1; one that cannot be opened counts as grey and is refused later."""
    try:
        with Image.open(path) as image:
            return 1 if image.mode in ("1", "L", "LA", "F") or image.mode.startswith("I") else 3
    except _UNREADABLE:
        return 1


# ---- DICOM


def is_dicom(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        # A file that cannot be opened is no slice; a series with a hole is refused by its geometry.
        return False


def _read_series(path: Path, files: list[Path]) -> Volume:
    """Stack the slices of one series by their positions; MONAI's reader goes by their numbers and mixes series."""
    if not files:
        raise GraftError(f"The folder '{path}' holds no DICOM files: give the folder of one series.")
    slices = [pydicom.dcmread(file) for file in files]
    series = {str(item.SeriesInstanceUID) for item in slices}
    if len(series) > 1:
        raise GraftError(f"'{path}' mixes {len(series)} DICOM series: give each series a folder of its own.")
    first = slices[0]
    across = _cosines(first)
    for item, file in zip(slices, files, strict=True):
        same = np.allclose(_cosines(item), across, atol=1e-4)
        if not same or (item.Rows, item.Columns) != (first.Rows, first.Columns):
            raise GraftError(
                f"'{file}' differs from the other slices in size or orientation: keep one stack of slices in '{path}'."
            )
    normal = np.cross(across[:3], across[3:])
    # A single X-ray image has no place; the slices of a stack must have one.
    nowhere = (0.0, 0.0, 0.0) if len(slices) == 1 else None
    positions = np.array([[*map(float, item.get("ImagePositionPatient", nowhere))] for item in slices])
    heights = positions @ normal
    order = np.argsort(heights, kind="stable")
    step = _step(path, heights[order], first)
    values = np.stack([_pixels(slices[number], files[number]) for number in order], axis=-1)
    sides = first.get("PixelSpacing") or first.get("ImagerPixelSpacing") or (1.0, 1.0)
    row_side, column_side = (float(value) for value in sides)
    # The first axis runs down the rows of an image, the second along its columns; DICOM's x and y are LPS.
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = across[3:] * row_side, across[:3] * column_side, normal * step
    affine[:3, 3] = positions[order[0]]
    return Volume(values, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine)


def _cosines(item: Any) -> np.ndarray:  # noqa: ANN401
    """Return the directions along the rows and down the columns; axial where none are stated."""
    return np.array([float(value) for value in item.get("ImageOrientationPatient") or (1, 0, 0, 0, 1, 0)])


def _step(path: Path, heights: np.ndarray, first: Any) -> float:  # noqa: ANN401
    """Return the distance between slices in mm; refuse a series with missing or doubled slices."""
    if len(heights) == 1:
        return float(first.get("SpacingBetweenSlices", None) or first.get("SliceThickness", None) or 1.0)
    steps = np.diff(heights)
    average = float(np.median(steps))
    if average <= 0 or (np.abs(steps - average) > _UNEVEN * average + 1e-3).any():
        raise GraftError(
            f"The slices of '{path}' are not evenly spaced ({steps.min():.2f} to {steps.max():.2f} mm apart): slices "
            "are missing or doubled."
        )
    return float(heights[-1] - heights[0]) / (len(heights) - 1)


def _pixels(item: Any, file: Path) -> np.ndarray:  # noqa: ANN401
    if int(item.get("NumberOfFrames", 1)) > 1 or int(item.get("SamplesPerPixel", 1)) > 1:
        raise GraftError(f"'{file}' has several frames or colours: convert it to NIfTI first.")
    slope, intercept = float(item.get("RescaleSlope", 1)), float(item.get("RescaleIntercept", 0))
    values = item.pixel_array.astype(np.float32)
    if item.get("PhotometricInterpretation") == "MONOCHROME1":
        # White is the lowest value: turned over, so that bright means dense in every file.
        values = values.max() + values.min() - values
    return values if (slope, intercept) == (1, 0) else values * np.float32(slope) + np.float32(intercept)


def same_grid(one: Volume, other: Volume) -> bool:
    """Tell whether two arrays have the same shape and lie in the same place, to a tenth of a voxel."""
    if one.values.shape[:3] != other.values.shape[:3]:
        return False
    corners = np.array([*itertools.product(*((0, side - 1) for side in one.values.shape[:3]))])
    apart = corners @ (one.affine[:3, :3] - other.affine[:3, :3]).T + one.affine[:3, 3] - other.affine[:3, 3]
    return bool(np.sqrt((apart**2).sum(axis=1)).max() <= 0.1 * min(spacing_of(one.affine)))
