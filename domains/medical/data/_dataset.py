"""Cases in memory, and the two ways of taking them: random patches for training, whole volumes for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from common.loading import item_rng
from domains.medical.data._augment import NO_DEFORMATION, Deformation, random_points
from domains.medical.data._geometry import sample_linear, sample_nearest
from domains.medical.data._records import IGNORE, VolumeBatch

# Voxels remembered for each class of a case, to choose patch centres from.
_CENTRES = 10_000


@dataclass(frozen=True, eq=False)
class Loaded:
    """A preprocessed case.

    Attributes:
        image: float32 (C, *spatial).
        label: uint8 (*spatial) with `IGNORE`; int64 () for classification.
        affine: (4, 4) of the array, voxels to RAS in mm; for slices and pictures, the identity.
    """

    image: Tensor
    label: Tensor
    affine: np.ndarray


class Painter(Protocol):
    """Makes the image of a training patch."""

    def __call__(self, case: Loaded, points: Tensor) -> Tensor:
        """Return float32 (C, *patch) for the voxel coordinates `points`, (*patch, n)."""


class Wholes(Dataset[VolumeBatch]):
    """Whole cases, as they are.

    Args:
        load: Position to case.
        count: Number of cases.
    """

    def __init__(self, load: Callable[[int], Loaded], count: int) -> None:
        self._load, self._count = load, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> VolumeBatch:
        case = self._load(index)
        return VolumeBatch(case.image, case.label.long(), torch.tensor(index))


class Patches(Dataset[VolumeBatch]):
    """Random patches, a pure function of (seed, epoch, index).

    The middle of a patch lies near a labelled voxel of a class that is drawn first, so that every class present is
    seen equally often. Where a case has one label as a whole, the patch is the whole case.

    Args:
        load: Position to case.
        count: Number of cases; they take turns.
        length: Patches in an epoch.
        patch_size: Sides of a patch, in voxels.
        spacing: Sides of a voxel, in mm.
        seed: Seed of all that is drawn.
        deformation: How far patches are turned, scaled and bent; None takes them as they are.
        mirror: Axis that is mirrored half of the time.
        paint: Makes the image; by default it is sampled with linear interpolation.
        finish: Changes the intensities of the image; nothing by default.
    """

    def __init__(
        self,
        load: Callable[[int], Loaded],
        count: int,
        length: int,
        patch_size: Sequence[int],
        spacing: Sequence[float],
        seed: int,
        deformation: Deformation | None = None,
        mirror: int | None = None,
        paint: Painter | None = None,
        finish: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._load, self._count, self._length = load, count, length
        self._size, self._spacing, self._seed = tuple(patch_size), tuple(spacing), seed
        self._deformation, self._mirror = deformation or NO_DEFORMATION, mirror
        self._paint, self._finish = paint or sampled, finish
        self._centres: dict[int, list[Tensor]] = {}
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose patches the next items are."""
        self._epoch = epoch

    def find_centres(self) -> None:
        """Look for the labelled voxels of all cases now, so that worker processes need not do it in every epoch."""
        for position in range(self._count):
            self._centres_of(position, self._load(position))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> VolumeBatch:
        position = index % self._count
        case = self._load(position)
        with item_rng(self._seed, self._epoch, index):
            points = self._points(position, case)
            label = sample_nearest(case.label, points, outside=IGNORE) if case.label.ndim else case.label
            image = self._paint(case, points)
            if self._finish is not None:
                image = self._finish(image)
        return VolumeBatch(image, label.long(), torch.tensor(position))

    def _points(self, position: int, case: Loaded) -> Tensor:
        if not case.label.ndim:
            middle = [(side - 1) / 2 for side in case.image.shape[1:]]
            return random_points(self._size, middle, self._spacing, self._deformation, self._mirror)
        by_class = self._centres_of(position, case)
        voxels = by_class[int(torch.randint(len(by_class), ()))]
        voxel = voxels[int(torch.randint(len(voxels), ()))]
        centre: list[float] = []
        for place, side, whole in zip(voxel.tolist(), self._size, case.label.shape, strict=True):
            shifted = place + (float(torch.rand(())) - 0.5) * side / 2
            # A patch stays inside where it fits; the drawn voxel stays in it either way.
            low, high = (side - 1) / 2, whole - 1 - (side - 1) / 2
            centre.append(min(max(shifted, low), high) if low <= high else (whole - 1) / 2)
        if self._deformation == NO_DEFORMATION:
            # Whole voxels, so that nothing is interpolated.
            centre = [
                round(middle - (side - 1) / 2) + (side - 1) / 2 for middle, side in zip(centre, self._size, strict=True)
            ]
        return random_points(self._size, centre, self._spacing, self._deformation, self._mirror)

    def _centres_of(self, position: int, case: Loaded) -> list[Tensor]:
        if position not in self._centres:
            self._centres[position] = class_voxels(case.label) if case.label.ndim else []
        return self._centres[position]


def sampled(case: Loaded, points: Tensor) -> Tensor:
    """Sample the case's own image."""
    return sample_linear(case.image, points)


def class_voxels(label: Tensor) -> list[Tensor]:
    """List voxels (N, n) of each class present, evenly thinned out where there are very many."""
    flat = label.reshape(-1)
    found: list[Tensor] = []
    for value in torch.unique(flat).tolist():
        if value == IGNORE:
            continue
        places = torch.nonzero(flat == value)[:, 0]
        if len(places) > _CENTRES:
            places = places[torch.arange(_CENTRES) * len(places) // _CENTRES]
        found.append(torch.stack(torch.unravel_index(places, label.shape), dim=1))
    return found
