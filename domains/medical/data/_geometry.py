"""Arrays with affines: bringing one onto another's grid. World coordinates are RAS+ in mm, as in nibabel."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def spacing_of(affine: np.ndarray) -> tuple[float, ...]:
    """Return the size of a voxel along each axis, in mm; `affine` is (4, 4)."""
    return tuple(float(side) for side in np.sqrt((affine[:3, :3] ** 2).sum(axis=0)))


def respaced(shape: Sequence[int], affine: np.ndarray, spacing: Sequence[float]) -> tuple[tuple[int, ...], np.ndarray]:
    """Choose the grid of another spacing over the same field of view, the axes' directions and the middle kept.

    Args:
        shape: (D, H, W) of the array.
        affine: Its (4, 4) affine.
        spacing: Wanted size of a voxel along each axis, in mm.

    Returns:
        The new shape and affine.
    """
    scale = np.array([new / old for new, old in zip(spacing, spacing_of(affine), strict=True)])
    size = tuple(max(1, round(side / factor)) for side, factor in zip(shape, scale, strict=True))
    changed = affine.copy()
    changed[:3, :3] = affine[:3, :3] * scale
    middle_old = (np.array(shape) - 1) / 2
    middle_new = (np.array(size) - 1) / 2
    changed[:3, 3] = affine[:3, :3] @ middle_old + affine[:3, 3] - changed[:3, :3] @ middle_new
    return size, changed


def voxel_points(shape: Sequence[int], mapping: np.ndarray) -> Tensor:
    """Map the voxels of a grid to voxel coordinates of another.

    Args:
        shape: (D, H, W) of the grid.
        mapping: (4, 4), voxel coordinates of the grid to those of the other array.

    Returns:
        float64 (D, H, W, 3).
    """
    axes = [torch.arange(side, dtype=torch.float64) for side in shape]
    steps = torch.from_numpy(np.ascontiguousarray(mapping, dtype=np.float64))
    one, two, three = (axis[:, None] * steps[:3, column] for column, axis in enumerate(axes))
    return one[:, None, None] + two[None, :, None] + three[None, None] + steps[:3, 3]


def sample_linear(volume: Tensor, points: Tensor) -> Tensor:
    """Sample with linear interpolation, zero outside.

    Args:
        volume: Floating point (C, D, H, W), or (C, H, W).
        points: (*out, 3) voxel coordinates, or (*out, 2).

    Returns:
        (C, *out), of `volume`'s type.
    """
    sides = torch.tensor(volume.shape[1:], dtype=points.dtype)
    # grid_sample wants the last axis first, and -1 and 1 at the outer edges of the first and last voxel.
    grid = ((points * 2 + 1) / sides - 1).flip(-1).to(volume.dtype)
    return F.grid_sample(volume[None], grid[None], mode="bilinear", padding_mode="zeros", align_corners=False)[0]


def sample_nearest(label: Tensor, points: Tensor, outside: int) -> Tensor:
    """Sample the nearest voxel.

    Args:
        label: (D, H, W) of any integer type, or (H, W).
        points: (*out, 3) voxel coordinates, or (*out, 2).
        outside: Value outside the array.

    Returns:
        (*out), of `label`'s type.
    """
    flat = torch.zeros(points.shape[:-1], dtype=torch.int32 if label.numel() < 2**31 else torch.int64)
    outer = torch.zeros(points.shape[:-1], dtype=torch.bool)
    for axis, side in enumerate(label.shape):
        position = points[..., axis].add(0.5).floor_()
        inner = position.clamp(0, side - 1)
        outer |= position != inner
        flat = flat.mul_(side).add_(inner.to(flat.dtype))
    found = label.reshape(-1).index_select(0, flat.view(-1)).view(flat.shape)
    return found.masked_fill_(outer, outside)


def smooth(volume: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Blur (C, *spatial) with a Gaussian, its sigma given for each axis in voxels; edges are repeated."""
    for axis, sigma in enumerate(sigmas, start=1):
        radius = math.ceil(3 * sigma)
        if radius == 0 or volume.shape[axis] == 1:
            continue
        weights = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(-radius, radius + 1)]
        side = volume.shape[axis]
        index = torch.arange(-radius, side + radius).clamp(0, side - 1)
        padded = volume.index_select(axis, index)
        # A sum of shifted copies: for the few taps of these kernels several times faster than a convolution.
        volume = torch.zeros_like(volume)
        for start, weight in enumerate(weights):
            volume.add_(padded.narrow(axis, start, side), alpha=weight / sum(weights))
    return volume


def antialias_sigmas(old: Sequence[float], new: Sequence[float]) -> tuple[float, ...]:
    """Choose the blur, in old voxels, before an array of spacing `old` is sampled at spacing `new` (0 if finer)."""
    factors = (coarse / fine for fine, coarse in zip(old, new, strict=True))
    # A Gaussian whose full width at half maximum grows from the old voxel to the new one.
    return tuple(math.sqrt(max(factor**2 - 1, 0.0)) / 2.3548 for factor in factors)
