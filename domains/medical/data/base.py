"""The datamodule all volume sets share: cases in memory, patches for training, whole cases for evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from common.errors import GraftError, unknown
from common.loading import StatefulLoader, eval_loader, train_loader
from common.split_data import SplitData
from common.splits import SPLITS, Split
from domains.medical.data._augment import Deformation, random_intensity
from domains.medical.data._dataset import Loaded, Painter, Patches, Wholes
from domains.medical.data._records import Case, VolumeBatch, VolumeFacts, digest_of

_LEAST_PATCHES = 32


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a subclass found; see `VolumeFacts` and `Case` for the fields."""

    splits: Mapping[Split, Sequence[Case]]
    class_names: tuple[str, ...]
    channels: int
    spacing: tuple[float, ...]
    patch_size: tuple[int, ...]
    preprocessing: Mapping[str, Any]
    counts: Mapping[str, int] = field(default_factory=dict)
    digest: Sequence[Sequence[str]] | None = None
    skipped: int = 0


class VolumeData(SplitData[Case, VolumeFacts]):
    """Labelled images or volumes in three splits. Subclasses say where they come from (`_read`, `_load`).

    Preprocessed cases stay in memory up to `cache_bytes`. Training takes random patches, centred near labelled voxels
    of a class that is drawn first, so that rare classes are seen as often as frequent ones. Augmentation turns, scales
    and bends a patch and changes its intensities; it is a pure function of (seed, epoch, index), with and without
    workers. Evaluation takes whole cases, one at a time.

    Args:
        batch_size: Patches in a training batch.
        patches_per_epoch: Training patches in an epoch; None takes as many as there are cases, at least 32.
        augment: Augment the training patches.
        flip: Let augmentation mirror: volumes left to right (first axis), images along their width (last axis). Off
            where left and right matter.
        seed: Order of the training patches and their augmentation.
        num_workers: Processes that make patches; 0 makes them in the main process.
        cache_bytes: How much memory preprocessed cases may take, per process.

    Raises:
        GraftError: An argument is out of range; all such arguments are named.
    """

    _deformation: ClassVar[Deformation] = Deformation()
    # Classification sets have images of one size, which batches of more than one can hold.
    _eval_batch: ClassVar[bool] = False

    def __init__(
        self,
        batch_size: int = 2,
        patches_per_epoch: int | None = None,
        augment: bool = True,
        flip: bool = False,
        seed: int = 0,
        num_workers: int = 0,
        cache_bytes: int = 4 << 30,
    ) -> None:
        super().__init__()
        refuse_small(
            type(self).__name__,
            batch_size=(batch_size, 1),
            patches_per_epoch=(patches_per_epoch, 1),
            num_workers=(num_workers, 0),
            cache_bytes=(cache_bytes, 0),
        )
        self.batch_size, self.patches_per_epoch, self.num_workers = batch_size, patches_per_epoch, num_workers
        self.augment, self.flip, self.seed, self.cache_bytes = augment, flip, seed, cache_bytes
        self._kept: dict[tuple[Split, int], Loaded] = {}
        self._bytes = 0

    # ---- what a subclass provides

    def _name(self) -> str:
        """Name of the set in `facts` and in reports."""
        return type(self).__name__

    def _read(self) -> Contents:
        """Find the cases of all splits; fetch or prepare first where that was not done."""
        raise NotImplementedError

    def _load(self, split: Split, index: int) -> Loaded:
        """Preprocess one case."""
        raise NotImplementedError

    def _painter(self) -> Painter | None:
        """Return what makes the image of a training patch; None samples the case's own."""
        return None

    def _finisher(self) -> Callable[[Tensor], Tensor] | None:
        """Return what changes the intensities of a training patch."""
        return random_intensity if self.augment else None

    # ---- the datamodule

    def setup(self, stage: str | None = None) -> None:
        """Find and check the cases; all splits, whatever the stage. A second call does nothing.

        Raises:
            GraftError: The data cannot be used as asked; the message says what to do.
        """
        if self._facts is not None:
            return
        found = self._read()
        for split in SPLITS:
            if not found.splits[split]:
                raise GraftError(f"{self._name()} has no cases in its {split} split: add some.")
        self._records = {split: tuple(found.splits[split]) for split in SPLITS}
        rows = found.digest
        if rows is None:
            rows = [(case.id, split, case.target) for split, cases in self._records.items() for case in cases]
        self._facts = VolumeFacts(
            spatial_dims=len(found.patch_size),
            channels=found.channels,
            class_names=found.class_names,
            spacing=found.spacing,
            patch_size=found.patch_size,
            preprocessing=found.preprocessing,
            name=self._name(),
            digest=digest_of(rows),
            counts={**{split: len(cases) for split, cases in self._records.items()}, **found.counts},
            skipped=found.skipped,
        )

    def case(self, split: str, index: int) -> dict[str, Any]:
        """Return a whole preprocessed case.

        Args:
            split: "train", "val" or "test".
            index: Position in `records(split)`.

        Returns:
            `image` float32 (C, *spatial), `label` int64 (*spatial) with `IGNORE` (classification: ()), `affine` (4, 4)
            of that array, `id`, and `path` of the first image file (None where there is no file).

        Raises:
            GraftError: There is no such split, or a file cannot be read.
        """
        record = self.records(split)[index]
        found = self._loaded(_split(split), index)
        return {
            "image": found.image,
            "label": found.label.long(),
            "affine": found.affine,
            "id": record.id,
            "path": record.image[0] if record.image else None,
        }

    def train_dataloader(self) -> StatefulLoader:
        """Return the shuffled, resumable loader of patches."""
        facts, count = self.facts, len(self.records("train"))
        last = facts.spatial_dims - 1
        dataset = Patches(
            lambda index: self._loaded("train", index),
            count,
            self.patches_per_epoch or max(count, _LEAST_PATCHES),
            facts.patch_size,
            facts.spacing,
            self.seed,
            deformation=self._deformation if self.augment else None,
            mirror=(0 if last == 2 else last) if self.augment and self.flip else None,
            paint=self._painter(),
            finish=self._finisher(),
        )
        if self.num_workers:
            dataset.find_centres()
        return train_loader(dataset, self.batch_size, seed=self.seed, num_workers=self.num_workers, **_pin())

    def _content(self, record: Case) -> Path | None:
        # Where labels are computed, one volume may stand in all splits with slices of its own.
        return record.image[0] if record.image and (record.label or record.target) else None

    def _eval_loader(self, split: Split) -> DataLoader[VolumeBatch]:
        dataset = Wholes(lambda index: self._loaded(split, index), len(self.records(split)))
        batch_size = self.batch_size if self._eval_batch else 1
        return eval_loader(dataset, batch_size, num_workers=self.num_workers, **_pin())

    def _loaded(self, split: Split, index: int) -> Loaded:
        """Return a case from memory, or preprocess it and keep it while there is room."""
        kept = self._kept.get((split, index))
        if kept is not None:
            return kept
        found = self._load(split, index)
        size = found.image.nbytes + found.label.nbytes
        if self._bytes + size <= self.cache_bytes:
            self._kept[split, index] = found
            self._bytes += size
        return found


def refuse_small(name: str, **bounds: tuple[float | None, float]) -> None:
    """Refuse settings below their least value, all at once.

    Args:
        name: Class that was given them.
        **bounds: Each setting's value (None is allowed) and least value.

    Raises:
        GraftError: At least one is too small.
    """
    wrong = [
        f"{setting} is {value} (at least {least})"
        for setting, (value, least) in bounds.items()
        if value is not None and not (math.isfinite(value) and value >= least)
    ]
    if wrong:
        raise GraftError(f"{name}: {'; '.join(wrong)}.")


def checked_patch(name: str, patch_size: Sequence[int], dims: int) -> tuple[int, ...]:
    """Check the sides of a patch.

    Args:
        name: Class that was given them.
        patch_size: The sides, in voxels.
        dims: How many there must be.

    Raises:
        GraftError: Another number of sides, or a side below 8.
    """
    sides = tuple(patch_size)
    if len(sides) != dims or min(sides) < 8:
        raise GraftError(f"{name}: patch_size is {list(sides)}; give {dims} sides of at least 8 voxels.")
    return sides


def _split(name: str) -> Split:
    for split in SPLITS:
        if split == name:
            return split
    raise unknown("split", name, SPLITS)


def _pin() -> dict[str, bool]:
    return {"pin_memory": torch.cuda.is_available()}
