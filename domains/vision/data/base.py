"""The datamodule all image sets share: records, checks, few-shot subsets, uint8 batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn
from torch.utils.data import DataLoader

from common.errors import GraftError, unknown
from common.loading import StatefulLoader, eval_loader, train_loader
from common.split_data import SplitData
from common.splits import SPLITS, Split, check_share, take_share
from domains.vision.data._dataset import Images
from domains.vision.data._images import Fit, ImageStore
from domains.vision.data._records import Contents, ImageBatch, ImageFacts, Record, digest_of, first_per_class
from domains.vision.data._transforms import centre, crop_and_flip

# Training images are kept this much larger than a crop, so that a random crop is seldom enlarged.
_TRAIN_MARGIN = 1.15


class ImageData(SplitData[Record, ImageFacts]):
    """Labelled images in three splits. Subclasses say where they come from (`_read`).

    Images are decoded once, composited onto white, turned upright and resized: the shorter side to `image_size` for
    evaluation, to 1.15 times that for augmented training. They stay in memory as uint8 up to `cache_bytes`. Training
    takes a random crop of half to all of the area and mirrors it; evaluation takes the square in the middle.
    Augmentation is a pure function of (seed, epoch, index), with and without workers.

    Args:
        image_size: Height and width of the images in a batch, in pixels.
        batch_size: Images in a batch.
        shots: Training images per class, chosen by a hash; None takes all.
        shots_draw: Which subset `shots` or `share` chooses: another number, other images.
        share: Share of each class's training images, in place of `shots`.
        limit_per_class: At most this many images of each class in every split, chosen by a hash; None takes all.
        classes: Use only these classes; None takes all.
        seed: Order of the training images and their augmentation. It never touches the splits.
        augment: Augment the training images.
        flip: Let augmentation mirror images; turn it off where left and right matter.
        num_workers: Processes that load images; 0 loads in the main process.
        skip_bad: Leave unreadable images out and count them, rather than stop at the first.
        cache_bytes: How much memory decoded images may take, per process.

    Raises:
        GraftError: An argument is out of range; all such arguments are named.
    """

    # Hooks of the subclasses: how an image becomes a square; whether the files come from the user and may be damaged;
    # whether every class must have a training image.
    _fit: ClassVar[Fit] = "crop"
    _unchecked: ClassVar[bool] = False
    _every_class_trains: ClassVar[bool] = True
    _train_margin: ClassVar[float] = _TRAIN_MARGIN

    def __init__(
        self,
        image_size: int = 98,
        batch_size: int = 32,
        shots: int | None = None,
        shots_draw: int = 0,
        share: float | None = None,
        limit_per_class: int | None = None,
        classes: Sequence[str] | None = None,
        seed: int = 0,
        augment: bool = True,
        flip: bool = True,
        num_workers: int = 0,
        skip_bad: bool = False,
        cache_bytes: int = 1 << 30,
    ) -> None:
        super().__init__()
        least = {"image_size": 1, "batch_size": 1, "shots": 1, "limit_per_class": 1, "num_workers": 0, "cache_bytes": 0}
        given = {
            "image_size": image_size,
            "batch_size": batch_size,
            "shots": shots,
            "limit_per_class": limit_per_class,
            "num_workers": num_workers,
            "cache_bytes": cache_bytes,
        }
        wrong = [
            f"{name} is {value} (at least {least[name]})"
            for name, value in given.items()
            if value is not None and value < least[name]
        ]
        if wrong:
            raise GraftError(f"{type(self).__name__}: {'; '.join(wrong)}.")
        self.image_size, self.batch_size, self.num_workers = image_size, batch_size, num_workers
        check_share(type(self).__name__, share, shots)
        self.share = share
        self.shots, self.shots_draw, self.limit_per_class = shots, shots_draw, limit_per_class
        self.classes = tuple(classes) if classes is not None else None
        self.seed, self.augment, self.flip = seed, augment, flip
        self.skip_bad = skip_bad
        self._store = ImageStore(cache_bytes, self._fit)

    # ---- what a subclass provides

    def _name(self) -> str:
        """Name of the set in `facts` and in reports."""
        return type(self).__name__

    def _read(self) -> Contents:
        """Find the records of all splits; download or prepare first where that was not done."""
        raise NotImplementedError

    def _train_transform(self) -> nn.Module:
        """Build the augmentation: uint8 (3, h, w) to uint8 (3, image_size, image_size)."""
        return crop_and_flip(self.image_size, flip=self.flip)

    # ---- the datamodule

    def setup(self, stage: str | None = None) -> None:
        """Find and check the records; all splits, whatever the stage. A second call does nothing.

        Raises:
            GraftError: The data cannot be used as asked; the message says what to do.
        """
        if self._facts is not None:
            return
        found = self._select_classes(self._read())
        splits = {split: tuple(found.splits[split]) for split in SPLITS}
        before = sum(map(len, splits.values()))
        if self._unchecked or self.skip_bad:
            splits = self._without_unreadable(splits)
        skipped = before - sum(map(len, splits.values()))
        self._check(found.class_names, splits)
        if self.limit_per_class is not None:
            splits = {split: first_per_class(records, self.limit_per_class) for split, records in splits.items()}
        if self.shots is not None:
            splits["train"] = self._few(splits["train"], self.shots)
        if self.share is not None:
            names, labels = [record.id for record in splits["train"]], [record.label for record in splits["train"]]
            kept = take_share(names, labels, self.share, f"shots-{self.shots_draw}")
            splits["train"] = tuple(record for record in splits["train"] if record.id in kept)
        self._records = splits
        self._facts = ImageFacts(
            image_size=self.image_size,
            class_names=found.class_names,
            name=self._name(),
            digest=digest_of(splits),
            counts={split: len(records) for split, records in splits.items()},
            skipped=skipped,
            fit=self._fit,
            left_out=dict(found.left_out),
        )

    def train_dataloader(self) -> StatefulLoader:
        """Return the shuffled, resumable loader of `ImageBatch`es."""
        dataset = self._dataset("train", augment=self.augment)
        return train_loader(dataset, self.batch_size, seed=self.seed, num_workers=self.num_workers, **_pin())

    def _content(self, record: Record) -> Path:
        return record.path

    def _eval_loader(self, split: Split) -> DataLoader[ImageBatch]:
        dataset = self._dataset(split, augment=False)
        return eval_loader(dataset, self.batch_size, num_workers=self.num_workers, **_pin())

    def _dataset(self, split: Split, *, augment: bool) -> Images:
        records = self.records(split)
        shorter = self._shorter(split)
        self._store.fill([(record.path, shorter) for record in records], check_all=False)
        transform = self._train_transform() if augment else centre(self.image_size)
        number = {name: position for position, name in enumerate(self.facts.class_names)}
        labels = [number[record.label] for record in records]
        return Images([r.path for r in records], labels, self._store, shorter, transform, self.seed, augment=augment)

    def _shorter(self, split: Split) -> int:
        """Shorter side at which the images of a split are kept, in pixels."""
        enlarged = split == "train" and self.augment
        return round(self.image_size * self._train_margin) if enlarged else self.image_size

    # ---- checks

    def _select_classes(self, found: Contents) -> Contents:
        if self.classes is not None:
            for name in self.classes:
                if name not in found.class_names:
                    raise unknown(f"class of {self._name()}", name, found.class_names)
            kept = tuple(name for name in found.class_names if name in self.classes)
            splits = {s: [r for r in records if r.label in kept] for s, records in found.splits.items()}
            found = replace(found, splits=splits, class_names=kept)
        if len(found.class_names) < 2:
            got = ", ".join(found.class_names) or "none"
            raise GraftError(f"{self._name()} needs at least 2 classes to tell apart and has {got}: add another class.")
        return found

    def _without_unreadable(self, splits: dict[Split, tuple[Record, ...]]) -> dict[Split, tuple[Record, ...]]:
        wanted = [(record.path, self._shorter(split)) for split, records in splits.items() for record in records]
        bad = self._store.fill(wanted, check_all=True)
        if bad and not self.skip_bad:
            more = f" ({len(bad) - 1} more cannot be read either.)" if len(bad) > 1 else ""
            raise GraftError(f"{bad[min(bad)]}{more}")
        return {split: tuple(r for r in records if r.path not in bad) for split, records in splits.items()}

    def _check(self, class_names: Sequence[str], splits: Mapping[Split, Sequence[Record]]) -> None:
        for split, records in splits.items():
            if not records:
                raise GraftError(f"{self._name()} has no images in its {split} split: add some.")
        if self._every_class_trains:
            trained = {record.label for record in splits["train"]}
            untrained = [name for name in class_names if name not in trained]
            if untrained:
                raise GraftError(
                    f"{self._name()} has no training image of class {_quoted(untrained)}: "
                    "add some, or leave the class out with `classes`."
                )

    def _few(self, records: Sequence[Record], shots: int) -> tuple[Record, ...]:
        counts = Counter(record.label for record in records)
        short = [f"'{label}' ({count})" for label, count in sorted(counts.items()) if count < shots]
        if short:
            raise GraftError(
                f"shots is {shots}, more than the training images of {', '.join(short)}: "
                "lower shots, or leave the class out with `classes`."
            )
        return first_per_class(records, shots, salt=f"shots-{self.shots_draw}")


def _pin() -> dict[str, bool]:
    return {"pin_memory": torch.cuda.is_available()}


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
