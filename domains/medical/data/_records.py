"""What the volume sets are made of: cases, splits, batches and facts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from common.splits import Split

SPLIT_NAMES: Mapping[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}

IGNORE = 255
"""Label of a voxel that nobody labelled: in no loss and in no metric."""


class VolumeBatch(NamedTuple):
    """A batch of labelled images or volumes (or one of them, without the first dimension).

    Attributes:
        image: float32 (B, C, *spatial), preprocessed; spatial is (H, W) or (D, H, W).
        label: int64 (B, *spatial) with `IGNORE`; for classification int64 (B,).
        index: int64 (B,), positions in `VolumeData.records(split)`.
    """

    image: Tensor
    label: Tensor
    index: Tensor


@dataclass(frozen=True, slots=True)
class Case:
    """One labelled image or volume.

    Attributes:
        id: Its name inside the dataset, the same on every machine.
        image: The image's files, one for each channel; a DICOM series is a folder.
        label: The file of the label map; None for the starter sets (labels are computed) and for classification.
        target: Name of the class, for classification; else "".
        group: Whose image it is, as the data states it; "" where it does not.
    """

    id: str
    image: tuple[Path, ...]
    label: Path | None = None
    target: str = ""
    group: str = ""


@dataclass(frozen=True, kw_only=True)
class VolumeFacts:
    """What a task, a report or a reader has to know about a set.

    Attributes:
        spatial_dims: 2 or 3.
        channels: Channels of an image.
        class_names: Names of the classes; a label is a position in this tuple. Segmentation: the first is "background".
        spacing: Size of a voxel along each spatial axis as fed to the net, in mm; 1.0 where it is unknown.
        patch_size: Sides of a training patch and of the sliding window, in voxels.
        preprocessing: Plain values with which `prepare` brings a new file into the same form.
        name: Name of the set.
        digest: sha256 over what is used, and in which split: equal digests, equal data and split.
        counts: Number of cases in `train`, `val` and `test`; with sparse labels also `labelled_slices`.
        skipped: Unreadable cases that were left out.
    """

    spatial_dims: int
    channels: int
    class_names: tuple[str, ...]
    spacing: tuple[float, ...]
    patch_size: tuple[int, ...]
    preprocessing: Mapping[str, Any]
    name: str
    digest: str
    counts: Mapping[str, int] = field(default_factory=dict)
    skipped: int = 0


def digest_of(rows: Sequence[Sequence[str]]) -> str:
    """Hash rows of texts to a sha256 that does not depend on their order."""
    return hashlib.sha256("".join("\t".join(row) + "\n" for row in sorted(rows)).encode()).hexdigest()
