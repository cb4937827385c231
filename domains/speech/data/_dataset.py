"""One split of a speech set, ready to be batched; clips that cannot be read are marked and left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from common.errors import GraftError
from common.loading import EpochSampler, StatefulLoader, item_rng
from domains.speech._audio import RATE, Channel, read_audio, resample
from domains.speech.data._records import Record, SpeechBatch

Watch = Callable[[], None]


class Clips(Dataset[SpeechBatch | int]):
    """Clips of a split; items are `SpeechBatch`es without their first dimension, or the position of an unreadable clip.

    Args:
        records: The clips, their texts normalised.
        targets: Class of each; None for transcripts.
        channel: Which channel is taken; see `read_audio`.
        bad: uint8 (N,) in shared memory: set to 1 for a clip that could not be read, by whichever process met it.
        max_seconds: A speed that makes a clip longer is not drawn for it.
        speed: Speeds to draw from in training; empty for none.
        seed: Seed of the speeds.
        train: Draw speeds, and never return an empty batch.

    Attributes:
        lengths: Most samples that each item can have.
    """

    def __init__(
        self,
        records: Sequence[Record],
        targets: Sequence[int] | None,
        channel: Channel,
        bad: Tensor,
        max_seconds: float,
        *,
        speed: Sequence[float] = (),
        seed: int = 0,
        train: bool = False,
    ) -> None:
        self._records, self._targets, self._channel, self._bad = records, targets, channel, bad
        self._speed, self._seed, self._train, self._epoch = tuple(speed) if train else (), seed, train, 0
        self._max_seconds = max_seconds
        self.lengths = [
            max(1, round(record.seconds / min(self._speeds(record), default=1.0) * RATE)) for record in records
        ]

    def _speeds(self, record: Record) -> list[float]:
        return [speed for speed in self._speed if speed >= 1 or record.seconds / speed <= self._max_seconds]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose random speeds the next items have."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> SpeechBatch | int:
        record = self._records[index]
        try:
            audio = load(record, self._channel)
        except GraftError:
            # The main process words the reason when it sees the mark: see `SpeechData.watch`.
            self._bad[index] = 1
            return index
        speeds = self._speeds(record)
        if speeds:
            with item_rng(self._seed, self._epoch, index):
                audio = at_speed(audio, speeds[int(torch.randint(len(speeds), ()))])
        target = torch.tensor(self._targets[index]) if self._targets is not None else torch.zeros(0, dtype=torch.int64)
        return SpeechBatch(audio, torch.tensor(len(audio)), (record.text,), target, torch.tensor(index))

    def collate(self, items: Sequence[SpeechBatch | int]) -> SpeechBatch:
        """Pad the readable items to the longest and stack them.

        A training batch in which nothing is readable takes the next readable clip, so that each process of a
        distributed run has a batch; an evaluation batch is then empty, and the loader passes over it.
        """
        read = [item for item in items if isinstance(item, SpeechBatch)]
        first = items[0]
        if not read and self._train and isinstance(first, int):
            others = (self[(first + step) % len(self)] for step in range(1, len(self)))
            read = [item for item in others if isinstance(item, SpeechBatch)][:1]
        return collate(read)


def load(record: Record, channel: Channel) -> Tensor:
    """Read the audio of a record: float32 (T,).

    Raises:
        GraftError: It cannot be read.
    """
    return read_audio(Path(record.path), RATE, channel=channel, start=record.start, end=record.end)


def at_speed(audio: Tensor, speed: float) -> Tensor:
    """Play float32 (T,) faster or slower, pitch included: (T / speed,), by resampling (Ko et al. 2015)."""
    if speed == 1:
        return audio
    # Whole percents keep the resampler's kernel small.
    return resample(audio, round(100 * speed), 100).clamp(-1.0, 1.0)


def collate(items: Sequence[SpeechBatch]) -> SpeechBatch:
    """Pad items to the longest and stack them; no items make an empty batch."""
    if not items:
        nothing = torch.zeros(0, dtype=torch.int64)
        return SpeechBatch(torch.zeros(0, 0), nothing, (), nothing, nothing)
    return SpeechBatch(
        pad_sequence([item.audio for item in items], batch_first=True),
        torch.stack([item.lengths for item in items]),
        tuple(text for item in items for text in item.text),
        torch.stack([item.target for item in items]),
        torch.stack([item.index for item in items]),
    )


class TrainClips(StatefulLoader):
    """The shuffled, resumable loader, which looks for unreadable clips after every batch."""

    def __init__(self, dataset: Clips, sampler: EpochSampler, watch: Watch, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(dataset, sampler, **kwargs)
        self._watch = watch

    def __iter__(self) -> Iterator[SpeechBatch]:
        for batch in super().__iter__():
            self._watch()
            yield batch


class EvalClips(DataLoader[Any]):
    """A loader in a fixed order, which looks for unreadable clips and passes over batches without a readable one."""

    def __init__(self, dataset: Clips, watch: Watch, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(dataset, **kwargs)
        self._watch = watch

    def __iter__(self) -> Iterator[SpeechBatch]:  # ty: ignore[invalid-method-override]
        for batch in super().__iter__():
            self._watch()
            if len(batch.text):
                yield batch
