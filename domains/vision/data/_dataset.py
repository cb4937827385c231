"""One split of an image set, ready to be batched."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

from common.loading import item_rng
from domains.vision.data._images import ImageStore
from domains.vision.data._records import ImageBatch


class Images(Dataset[ImageBatch]):
    """Decoded images, transformed one by one.

    Args:
        paths: The files.
        labels: The number of each file's class.
        store: Where the files are read.
        shorter: Shorter side at which they are read, in pixels.
        transform: uint8 (3, h, w) to uint8 (3, size, size).
        seed: Seed of the augmentation.
        augment: Whether `transform` draws random numbers.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        labels: Sequence[int],
        store: ImageStore,
        shorter: int,
        transform: nn.Module,
        seed: int,
        *,
        augment: bool,
    ) -> None:
        self._paths, self._labels, self._store, self._shorter = paths, labels, store, shorter
        self._transform, self._seed, self._augment = transform, seed, augment
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose augmentation the next items get."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> ImageBatch:
        image = self._store.get(self._paths[index], self._shorter)
        if self._augment:
            with item_rng(self._seed, self._epoch, index):
                image = self._transform(image)
        else:
            image = self._transform(image)
        return ImageBatch(image, torch.tensor(self._labels[index]), torch.tensor(index))
