"""A 2D starter set: slices of one brain's left half train, those of its right half test."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from common.errors import GraftError, unknown
from common.splits import SPLITS, Split
from domains.medical.data._atlases import CLASSES, atlas_files
from domains.medical.data._augment import Deformation, pose_points, rotation
from domains.medical.data._dataset import Loaded
from domains.medical.data._geometry import sample_linear, sample_nearest
from domains.medical.data._records import IGNORE, Case
from domains.medical.data.atlases import load_brain
from domains.medical.data.base import Contents, VolumeData, checked_patch

Plane = Literal["axial", "coronal"]

_AXES: dict[str, int] = {"coronal": 1, "axial": 2}
# Slabs of 10 mm in turn; the last of every four validates, and 3 mm beside it serve nobody.
_SLAB, _TURN, _GAP = 10, 4, 3
# Neighbouring slices are near-copies, so that every second one is enough for the test.
_TEST_STEP = 2
# Slices with less brain than this, in mm2, show only a rim.
_LEAST_AREA = 300
# The pose of the right half: degrees, scale, shift in mm along both axes.
_POSE_DEGREES, _POSE_SCALE, _POSE_SHIFT = 12.0, 0.93, (8.0, -5.0)


@dataclass(frozen=True, eq=False)
class _Half:
    """One half of the brain, its first axis from the side to the middle."""

    image: Tensor
    label: Tensor


class ColinHemisphere(VolumeData):
    """2D slices of one human brain (Colin27, 1 mm): the left half trains, the right half tests.

    Eight classes as in `ColinCoarse`. Both halves are shown from the side (first image axis) to the middle of the head,
    so that the right half looks like a left one; the test shows it turned by 12 degrees, shrunk by 7 % and moved, so
    that copying the left half's labels over does not win. It is still one person's brain, and its halves resemble each
    other (correlation .94): the set compares methods, it does not tell how well a net works on others. Validation:
    slabs of 10 slices of the left half, with 3 slices beside them left out.

    Args:
        plane: "axial" (from the side to the middle, from back to front) or "coronal" (from the side to the middle, from
            below upwards).
        labelled: How many slices train, evenly spread; None takes all of the training slabs.
        pose: Turn, scale and move the test slices.
        patch_size: Sides of a training patch; None takes whole slices, rounded up to a multiple of 16.
        **kwargs: See `VolumeData`.

    Raises:
        GraftError: An argument is out of range.
    """

    _deformation = Deformation(degrees=15.0, scale=0.15, bend=2.0)

    def __init__(
        self,
        plane: Plane = "axial",
        labelled: int | None = None,
        pose: bool = True,
        patch_size: Sequence[int] | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(**kwargs)
        if plane not in _AXES:
            raise unknown("plane", plane, _AXES)
        name = type(self).__name__
        self.patch_size = None if patch_size is None else checked_patch(name, patch_size, 2)
        self.plane, self.labelled, self.pose = plane, labelled, pose
        self._halves: dict[str, _Half] = {}
        self._slices: dict[str, tuple[int, ...]] = {}

    def prepare_data(self) -> None:
        """Fetch the atlas, once."""
        atlas_files("colin-1mm")

    def slices(self, split: str) -> tuple[int, ...]:
        """Return the numbers of a split's slices, in the order of `records(split)`.

        Raises:
            GraftError: There is no such split.
        """
        _ = self.facts
        if split not in self._slices:
            raise unknown("split", split, SPLITS)
        return self._slices[split]

    def opposite(self, index: int) -> Tensor:
        """Return the left half's labels, int64 (H, W), at the place of a test slice, without its pose."""
        return self._slice(self._halves["left"].label, self.slices("test")[index]).long()

    def _read(self) -> Contents:
        brain = load_brain("colin-1mm")
        self._halves = _cut(brain.image[0], brain.label, brain.affine)
        left = self._halves["left"].label
        axis = _AXES[self.plane]
        areas = {name: (half.label > 0).movedim(axis, 0).sum(dim=(1, 2)) for name, half in self._halves.items()}
        full = {name: torch.nonzero(area >= _LEAST_AREA)[:, 0].tolist() for name, area in areas.items()}
        train, val = _slabs(full["left"])
        if self.labelled is not None:
            if not 1 <= self.labelled <= len(train):
                raise GraftError(f"labelled is {self.labelled}: between 1 and {len(train)} slices can be labelled.")
            train = [train[int((number + 0.5) * len(train) / self.labelled)] for number in range(self.labelled)]
        self._slices = {"train": tuple(train), "val": tuple(val), "test": tuple(full["right"][::_TEST_STEP])}
        digest = hashlib.sha256(left.numpy().tobytes()).hexdigest()
        shape = self._slice(left, 0).shape
        return Contents(
            splits={s: [Case(f"{_side(s)}-{self.plane}-{n:03d}", ()) for n in self._slices[s]] for s in SPLITS},
            class_names=CLASSES,
            channels=1,
            spacing=(1.0, 1.0),
            patch_size=self.patch_size or tuple(math.ceil(side / 16) * 16 for side in shape),
            preprocessing={**brain.preprocessing, "spatial_dims": 2, "spacing": [1.0, 1.0]},
            digest=[(digest, self.plane, str(self.pose), s, str(n)) for s in SPLITS for n in self._slices[s]],
        )

    def _slice(self, volume: Tensor, number: int) -> Tensor:
        return volume.select(_AXES[self.plane], number).contiguous()

    def _load(self, split: Split, index: int) -> Loaded:
        half, number = self._halves[_side(split)], self._slices[split][index]
        image, label = self._slice(half.image, number)[None], self._slice(half.label, number)
        if split == "test" and self.pose:
            middle = [(side - 1) / 2 + shift for side, shift in zip(label.shape, _POSE_SHIFT, strict=True)]
            matrix = rotation([math.radians(_POSE_DEGREES)]) / _POSE_SCALE
            points = pose_points(label.shape, middle, matrix, (1.0, 1.0))
            image, label = sample_linear(image, points), sample_nearest(label, points, outside=IGNORE)
        return Loaded(image, label, np.eye(4))


def _side(split: str) -> str:
    return "right" if split == "test" else "left"


def _cut(image: Tensor, label: Tensor, affine: np.ndarray) -> dict[str, _Half]:
    """Cut a brain at x = 0 into halves of equal width, each from its side to the middle."""
    middle = round(-affine[0, 3] / affine[0, 0])
    width = max(middle, label.shape[0] - 1 - middle)

    def half(volume: Tensor, part: Tensor) -> Tensor:
        return torch.cat([torch.zeros(width - len(part), *volume.shape[1:], dtype=volume.dtype), part])

    return {
        "left": _Half(half(image, image[:middle]), half(label, label[:middle])),
        "right": _Half(half(image, image[middle + 1 :].flip(0)), half(label, label[middle + 1 :].flip(0))),
    }


def _slabs(found: Sequence[int]) -> tuple[list[int], list[int]]:
    """Deal slices out to training and validation, slab by slab, with gaps between them."""
    slabs = [found[start : start + _SLAB] for start in range(0, len(found), _SLAB)]
    held = [number % _TURN == _TURN - 1 for number in range(len(slabs))]
    val = [*itertools.chain.from_iterable(slab for slab, out in zip(slabs, held, strict=True) if out)]
    train = [number for number in found if min(abs(number - other) for other in val) > _GAP]
    return train, val
