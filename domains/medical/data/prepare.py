"""The one place where a file becomes what the net is fed, and where a label map goes back onto the file's grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from torch import Tensor

from common.errors import GraftError, unknown
from domains.medical.data._geometry import (
    antialias_sigmas,
    respaced,
    sample_linear,
    sample_nearest,
    smooth,
    spacing_of,
    voxel_points,
)
from domains.medical.data._reading import Volume, read, same_grid

INTENSITIES = ("zscore", "percentiles", "window")
# Voxels kept around the body, and points sampled at once (24 bytes each).
_MARGIN = 2
_POINTS = 1 << 21


def prepare(
    path: str | Path | Sequence[str | Path], preprocessing: Mapping[str, Any]
) -> tuple[Tensor, np.ndarray, dict[str, Any]]:
    """Read an image and bring it into the form that training uses.

    A volume is turned to RAS order (the nearest permutation and flip of its axes; nothing is interpolated for that), an
    image keeps its axes. It is then resampled where a spacing or size is asked for, its intensities are scaled, and it
    is cut to the body where asked for.

    Args:
        path: The file, the folder of a DICOM series, or one of these for each channel.
        preprocessing: `spatial_dims` (2 or 3); `channels`; `spacing` (sides of a voxel in mm, or None to keep them);
            `size` (sides in voxels: the whole image is scaled to fit and padded with zeros; or None); `intensity`:
            "zscore" (mean 0, deviation 1 of the voxels that are not 0), "percentiles" (the 0.5th to the 99.5th of the
            voxels that are not 0 become 0 to 1) or "window" (`window`, lowest and highest value, become 0 to 1), each
            channel by itself, with zeros staying 0 in the first two; `crop_foreground` (cut to the voxels that are not
            0 then).

    Returns:
        image: float32 (C, D, H, W), or (C, H, W).
        affine: (4, 4) of that array.
        meta: What `restore` needs.

    Raises:
        GraftError: A file cannot be used; the message names it.
    """
    files = [Path(path)] if isinstance(path, str | Path) else [Path(part) for part in path]
    source, channels = _read_channels(files, preprocessing)
    moved = _canonical(source, preprocessing["spatial_dims"])
    shape, affine = _grid(moved, preprocessing)
    image = torch.from_numpy(np.ascontiguousarray(np.moveaxis(moved.values, -1, 0)))
    if shape != tuple(image.shape[1:]) or not np.array_equal(affine, moved.affine):
        mapping = np.linalg.inv(moved.affine) @ affine
        blur = antialias_sigmas(spacing_of(moved.affine), spacing_of(affine))
        resampled = _resample(smooth(image, blur), mapping, shape)
        if preprocessing["intensity"] == "window":
            image = resampled
        else:
            # Zeros lie outside the body: its rim keeps its intensity and does not fade into them.
            share = _resample(smooth((image != 0).float(), blur), mapping, shape)
            image = torch.where(share >= 0.5, resampled / share.clamp_min(0.5), 0.0)
    image = torch.stack([_scaled(channel, preprocessing, files[0]) for channel in image])
    if preprocessing.get("crop_foreground"):
        image, affine = _cropped(image, affine)
    meta = {
        "shape": source.values.shape[:3],
        "affine": source.affine,
        "prepared_shape": tuple(image.shape[1:]),
        "prepared_affine": affine,
        "spatial_dims": preprocessing["spatial_dims"],
        "channels": channels,
    }
    return (image[..., 0] if preprocessing["spatial_dims"] == 2 else image), affine, meta


def restore(label: np.ndarray | Tensor, meta: Mapping[str, Any]) -> nib.Nifti1Image:
    """Put a label map back onto the grid of the file that `prepare` read; outside the array it is 0.

    Args:
        label: Integers below 256, (D, H, W) or (H, W), as `prepare` shaped the image.
        meta: What `prepare` returned.

    Returns:
        uint8, with the input's shape and affine; (H, W, 1) for pictures.
    """
    whole = torch.as_tensor(np.asarray(label)).to(torch.uint8).reshape(meta["prepared_shape"])
    mapping = np.linalg.inv(meta["prepared_affine"]) @ meta["affine"]
    return nib.Nifti1Image(_onto(whole, mapping, meta["shape"], outside=0).numpy(), meta["affine"])


def prepare_label(path: str | Path, meta: Mapping[str, Any], image: str | Path) -> Tensor:
    """Read a label map and bring it onto the grid of its prepared image, each voxel by the nearest.

    Args:
        path: The label map's file.
        meta: What `prepare` returned for the image.
        image: The image's file, for messages.

    Returns:
        int64 (D, H, W), or (H, W).

    Raises:
        GraftError: It cannot be read, lies on another grid than the image, or holds other than whole numbers.
    """
    found = _whole_numbers(read(Path(path)), Path(path))
    there = Volume(np.broadcast_to(np.uint8(0), meta["shape"]), meta["affine"])
    # In RAS order: a DICOM series and the NIfTI label map drawn on it often store their axes in another order.
    if not same_grid(*(_canonical(volume, meta["spatial_dims"]) for volume in (found, there))):
        raise GraftError(
            f"The label map '{path}' lies on another grid ({_describe(found)}) than its image '{image}' "
            f"({_describe(there)}): resample one onto the other."
        )
    mapping = np.linalg.inv(found.affine) @ meta["prepared_affine"]
    label = _onto(torch.from_numpy(found.values), mapping, meta["prepared_shape"], outside=0)
    return label[..., 0] if meta["spatial_dims"] == 2 else label


def read_labels(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a label map as it is: int64 (D, H, W) and its affine.

    Raises:
        GraftError: It cannot be read, or holds other than whole numbers.
    """
    found = _whole_numbers(read(Path(path)), Path(path))
    return found.values, found.affine


def _whole_numbers(volume: Volume, path: Path) -> Volume:
    values = volume.values
    if values.ndim != 3:
        raise GraftError(f"The label map '{path}' has {values.shape[3]} channels: save one class number a voxel.")
    if values.dtype.kind == "f" and not (np.isfinite(values).all() and (values == np.rint(values)).all()):
        raise GraftError(
            f"The label map '{path}' holds values that are no whole numbers: save one class number a voxel."
        )
    return Volume(values.astype(np.int64), volume.affine)


def _read_channels(files: Sequence[Path], preprocessing: Mapping[str, Any]) -> tuple[Volume, int]:
    """Read all channels of an image as float32 (D, H, W, C)."""
    wanted, dims = preprocessing["channels"], preprocessing["spatial_dims"]
    found = [read(file) for file in files]
    for volume, file in zip(found, files, strict=True):
        _check(volume, file, dims)
        if not same_grid(volume, found[0]):
            raise GraftError(
                f"The channels '{files[0]}' ({_describe(found[0])}) and '{file}' ({_describe(volume)}) lie on "
                "different grids: resample one onto the other."
            )
    parts = [volume.values if volume.values.ndim == 4 else volume.values[..., None] for volume in found]
    values = np.concatenate([part.astype(np.float32) for part in parts], axis=-1)
    if dims == 2 and values.shape[-1] == 3 and wanted == 1:
        values = values @ np.array([[0.299], [0.587], [0.114]], dtype=np.float32)
    if dims == 2 and values.shape[-1] == 1 and wanted == 3:
        values = np.repeat(values, 3, axis=-1)
    if values.shape[-1] != wanted:
        raise GraftError(
            f"'{files[0]}' has {values.shape[-1]} channels (shape {_describe(found[0])}) where {wanted} are due: give "
            "one volume a file, or the number of channels that all images have."
        )
    return Volume(values, found[0].affine), wanted


def _check(volume: Volume, file: Path, dims: int) -> None:
    depth = volume.values.shape[2]
    if dims == 2 and depth != 1:
        raise GraftError(f"'{file}' is a volume ({_describe(volume)}) where images are due: give single slices.")
    if dims == 3 and min(volume.values.shape[:3]) == 1:
        raise GraftError(f"'{file}' is one slice ({_describe(volume)}) where volumes are due: give whole volumes.")
    if volume.values.dtype.kind == "f" and not np.isfinite(volume.values).all():
        count = int((~np.isfinite(volume.values)).sum())
        raise GraftError(f"'{file}' has {count} voxels that are NaN or infinite: replace them by a number.")


def _canonical(volume: Volume, dims: int) -> Volume:
    """Turn a volume to RAS order by permuting and flipping its axes."""
    if dims == 2:
        return volume
    turn = nib.io_orientation(volume.affine)
    affine = volume.affine @ nib.orientations.inv_ornt_aff(turn, volume.values.shape[:3])
    return Volume(nib.apply_orientation(volume.values, turn), affine)


def _grid(volume: Volume, preprocessing: Mapping[str, Any]) -> tuple[tuple[int, ...], np.ndarray]:
    """Choose shape and affine of the prepared array, before it is cut to the body."""
    dims, now = preprocessing["spatial_dims"], spacing_of(volume.affine)
    shape = volume.values.shape[:3]
    if preprocessing.get("size"):
        sides = [*preprocessing["size"]]
        extent = [side * width for side, width in zip(shape, now, strict=True)]
        width = max(length / side for length, side in zip(extent[:dims], sides, strict=True))
        _, affine = respaced(shape, volume.affine, [*[width] * dims, *now[dims:]])
        return _centred((*sides, *shape[dims:]), affine, volume)
    if preprocessing.get("spacing"):
        asked = [*preprocessing["spacing"], *now[dims:]]
        if not np.allclose(asked, now, rtol=1e-3):
            return respaced(shape, volume.affine, asked)
    return shape, volume.affine


def _centred(shape: Sequence[int], affine: np.ndarray, volume: Volume) -> tuple[tuple[int, ...], np.ndarray]:
    """Move a grid so that its middle is the volume's."""
    placed = affine.copy()
    middle = volume.affine[:3, :3] @ ((np.array(volume.values.shape[:3]) - 1) / 2) + volume.affine[:3, 3]
    placed[:3, 3] = middle - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return tuple(shape), placed


def _slabs(shape: Sequence[int]) -> list[range]:
    """Cut a grid along its first axis into parts of bounded size."""
    rows = max(1, _POINTS // max(1, shape[1] * shape[2]))
    return [range(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows)]


def _shifted(mapping: np.ndarray, start: int) -> np.ndarray:
    moved = mapping.copy()
    moved[:3, 3] += mapping[:3, 0] * start
    return moved


def _resample(image: Tensor, mapping: np.ndarray, shape: Sequence[int]) -> Tensor:
    parts = [
        sample_linear(image, voxel_points((len(slab), *shape[1:]), _shifted(mapping, slab.start)))
        for slab in _slabs(shape)
    ]
    return torch.cat(parts, dim=1)


def _onto(label: Tensor, mapping: np.ndarray, shape: Sequence[int], outside: int) -> Tensor:
    parts = [
        sample_nearest(label, voxel_points((len(slab), *shape[1:]), _shifted(mapping, slab.start)), outside)
        for slab in _slabs(shape)
    ]
    return torch.cat(parts)


def _scaled(channel: Tensor, preprocessing: Mapping[str, Any], file: Path) -> Tensor:
    kind = preprocessing["intensity"]
    if kind == "window":
        low, high = preprocessing["window"]
        return ((channel - low) / (high - low)).clamp(0, 1)
    inside = channel != 0
    values = channel[inside]
    if not len(values):
        raise GraftError(f"'{file}' is empty: all its voxels are 0. Replace the file.")
    if kind == "zscore":
        deviation = values.std(correction=0)
        return torch.where(inside, (channel - values.mean()) / deviation.clamp_min(1e-6), 0.0)
    if kind == "percentiles":
        low, high = np.percentile(values.numpy(), (0.5, 99.5))
        return torch.where(inside, ((channel - low) / max(high - low, 1e-6)).clamp(0, 1), 0.0)
    raise unknown("intensity", kind, INTENSITIES)


def _cropped(image: Tensor, affine: np.ndarray) -> tuple[Tensor, np.ndarray]:
    inside = (image != 0).any(dim=0)
    if not inside.any():
        return image, affine
    starts: list[int] = []
    for axis in range(inside.ndim):
        others = tuple(other for other in range(inside.ndim) if other != axis)
        places = torch.nonzero(inside.any(dim=others))[:, 0]
        start = max(int(places[0]) - _MARGIN, 0)
        stop = min(int(places[-1]) + _MARGIN + 1, inside.shape[axis])
        starts.append(start)
        image = image.narrow(axis + 1, start, stop - start)
    moved = affine.copy()
    moved[:3, 3] += affine[:3, :3] @ np.array(starts)
    return image.contiguous(), moved


def _describe(volume: Volume) -> str:
    shape = "x".join(str(side) for side in volume.values.shape)
    sides = "x".join(f"{side:.3g}" for side in spacing_of(volume.affine))
    corner = ", ".join(f"{place:.4g}" for place in volume.affine[:3, 3])
    return f"{shape} voxels of {sides} mm from ({corner})"
