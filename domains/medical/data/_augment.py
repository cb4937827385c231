"""Random poses, deformations and intensities of one patch, cheap enough for a CPU: one sampling of image and label.

Everything draws from torch's RNG, so the caller decides by `item_rng` what is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Distance between the nodes of a random field, in voxels.
_NODE_DISTANCE = 16


@dataclass(frozen=True, kw_only=True)
class Deformation:
    """How far patches are turned, scaled and bent.

    Attributes:
        degrees: Largest rotation about each axis (3D) or in the plane (2D).
        scale: Largest change of size, as a logarithm: 0.1 is 10 %; each axis gets its own.
        bend: Standard deviation of the random displacement of nodes 16 voxels apart, in voxels.
    """

    degrees: float = 10.0
    scale: float = 0.1
    bend: float = 1.0


NO_DEFORMATION = Deformation(degrees=0.0, scale=0.0, bend=0.0)


def uniform(low: float, high: float) -> float:
    """Draw one number."""
    return low + (high - low) * float(torch.rand(()))


def rotation(angles: Sequence[float]) -> Tensor:
    """Return the rotation matrix of one angle (2D) or of three about the axes in turn (3D); radians, float32."""
    if len(angles) == 1:
        cos, sin = math.cos(angles[0]), math.sin(angles[0])
        return torch.tensor([[cos, -sin], [sin, cos]])
    matrix = torch.eye(3)
    for axis, angle in enumerate(angles):
        one, two = (other for other in range(3) if other != axis)
        turn = torch.eye(3)
        turn[one, one] = turn[two, two] = math.cos(angle)
        turn[one, two], turn[two, one] = -math.sin(angle), math.sin(angle)
        matrix = turn @ matrix
    return matrix


def pose_points(
    shape: Sequence[int], centre: Sequence[float], matrix: Tensor, spacing: Sequence[float], bend: Tensor | None = None
) -> Tensor:
    """Find where the voxels of a patch lie in the volume.

    Args:
        shape: Sides of the patch, in voxels.
        centre: Voxel of the volume at the patch's middle.
        matrix: (n, n) map of directions from the patch to the volume, in mm.
        spacing: Sides of a voxel, in mm.
        bend: (*shape, n) displacement in voxels.

    Returns:
        float32 (*shape, n), voxel coordinates of the volume.
    """
    sides = torch.tensor(spacing, dtype=torch.float32)
    steps = matrix * sides[None, :] / sides[:, None]
    axes = [torch.arange(side, dtype=torch.float32) - (side - 1) / 2 for side in shape]
    points = torch.tensor(centre, dtype=torch.float32).expand(*shape, len(shape))
    for number, axis in enumerate(axes):
        along = axis.view([-1 if number == other else 1 for other in range(len(shape))])
        points = points + along[..., None] * steps[:, number]
    return points if bend is None else points + bend


def random_field(shape: Sequence[int], channels: int) -> Tensor:
    """Draw a smooth random field (channels, *shape), standard normal at nodes 16 voxels apart."""
    nodes = [max(2, round(side / _NODE_DISTANCE) + 1) for side in shape]
    coarse = torch.randn(1, channels, *nodes)
    mode = "bilinear" if len(shape) == 2 else "trilinear"
    return F.interpolate(coarse, size=list(shape), mode=mode, align_corners=True)[0]


def random_points(
    shape: Sequence[int],
    centre: Sequence[float],
    spacing: Sequence[float],
    deformation: Deformation,
    mirror: int | None,
) -> Tensor:
    """Draw a pose and a deformation around a voxel.

    Args:
        shape: Sides of the patch, in voxels.
        centre: Voxel of the volume at the patch's middle.
        spacing: Sides of a voxel, in mm.
        deformation: How far to go.
        mirror: Axis that is mirrored half of the time; None mirrors nothing.

    Returns:
        float32 (*shape, n), as `pose_points`.
    """
    dims = len(shape)
    largest = math.radians(deformation.degrees)
    angles = [uniform(-largest, largest) for _ in range(1 if dims == 2 else 3)]
    scales = torch.tensor([math.exp(uniform(-deformation.scale, deformation.scale)) for _ in range(dims)])
    matrix = rotation(angles) * scales[None, :]
    if mirror is not None and uniform(0, 1) < 0.5:
        matrix[:, mirror] = -matrix[:, mirror]
    bend = random_field(shape, dims).movedim(0, -1) * deformation.bend if deformation.bend else None
    return pose_points(shape, centre, matrix, spacing, bend)


def random_intensity(image: Tensor) -> Tensor:
    """Change contrast, brightness and noise of a patch (C, *spatial); exact zeros (outside the body) stay zero."""
    inside = image != 0
    low, high = image.amin(), image.amax()
    span = (high - low).clamp_min(1e-6)
    changed = ((image - low) / span) ** math.exp(uniform(-0.3, 0.3))
    changed = changed * uniform(0.8, 1.2) + uniform(-0.1, 0.1)
    changed = changed + torch.randn_like(image) * uniform(0.0, 0.05)
    return torch.where(inside, changed * span + low, 0.0)


def spread_levels(count: int) -> Tensor:
    """Draw levels in [0, 1] in random order, evenly spread but for a jitter, so that no two are alike."""
    levels = (torch.randperm(count) + torch.rand(count) * 0.8 - 0.4) / (count - 1)
    return levels.clamp(0, 1)


def random_contrast(image: Tensor) -> Tensor:
    """Send the intensities of a patch in [0, 1] through a random curve, which may turn dark into bright; zeros stay."""
    knots = spread_levels(5)
    position = image.clamp(0, 1) * (len(knots) - 1)
    below = position.floor().clamp(max=len(knots) - 2)
    left = below.long()
    weight = position - below
    return torch.where(image != 0, knots[left] * (1 - weight) + knots[left + 1] * weight, 0.0)
