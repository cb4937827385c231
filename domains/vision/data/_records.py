"""What the image sets are made of: records, splits, batches and facts."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from torch import Tensor

from common.splits import Split, stable_hash


class ImageBatch(NamedTuple):
    """A batch of labelled images (or one of them, without the first dimension).

    Attributes:
        images: uint8 (B, 3, H, W), RGB; the task normalises them for its backbone.
        labels: int64 (B,), positions in `ImageFacts.class_names`.
        index: int64 (B,), positions in `ImageData.records(split)`.
    """

    images: Tensor
    labels: Tensor
    index: Tensor


@dataclass(frozen=True, slots=True)
class Record:
    """One labelled image file.

    Attributes:
        id: Its name inside the dataset (a path relative to the data's root), the same on every machine.
        path: The file.
        label: The name of its class.
        group: What it belongs to (a patient, a site, a camera), as the data states it; "" where it does not.
    """

    id: str
    path: Path
    label: str
    group: str = ""


@dataclass(frozen=True, kw_only=True)
class ImageFacts:
    """What a task, a report or a reader has to know about a set.

    Attributes:
        image_size: Height and width of the images in a batch, in pixels.
        class_names: Names of the classes; a label is a position in this tuple.
        name: Name of the set.
        digest: sha256 over the sorted (id, split, label) of all images in use: equal digests, equal data and split.
        counts: Number of images in `train`, `val` and `test`.
        skipped: Unreadable images that `skip_bad` left out.
        fit: How an image is brought to the square, as `read_image` takes it.
        left_out: What else was left out and why, in words, with counts.
    """

    image_size: int
    class_names: tuple[str, ...]
    name: str
    digest: str
    counts: Mapping[str, int]
    skipped: int = 0
    fit: Literal["crop", "squash"] = "crop"
    left_out: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a subclass found: its records by split, and its classes in the order of their labels."""

    splits: Mapping[Split, Sequence[Record]]
    class_names: tuple[str, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)


def first_per_class(records: Sequence[Record], count: int, salt: str = "") -> tuple[Record, ...]:
    """Keep `count` records of each class, the first by a hash of their id, in their given order."""
    kept: set[str] = set()
    taken: Counter[str] = Counter()
    for record in sorted(records, key=lambda record: (stable_hash(record.id, salt), record.id)):
        if taken[record.label] < count:
            taken[record.label] += 1
            kept.add(record.id)
    return tuple(record for record in records if record.id in kept)


def digest_of(splits: Mapping[Split, Sequence[Record]]) -> str:
    rows = sorted((record.id, split, record.label) for split, records in splits.items() for record in records)
    return hashlib.sha256("".join("\t".join(row) + "\n" for row in rows).encode()).hexdigest()
