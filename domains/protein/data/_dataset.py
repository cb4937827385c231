"""One split of a protein set, ready to be batched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from common.errors import GraftError
from common.loading import bucketed_eval_loader, mix_seed
from domains.protein._alphabet import PAD, encode
from domains.protein.data._records import IGNORE, Kind, Long, ProteinBatch, Record

Target = Callable[[str], Tensor]


class Proteins(Dataset[ProteinBatch]):
    """Encoded proteins, cut to the longest length allowed; items are `ProteinBatch`es without their first dimension.

    Args:
        records: The proteins.
        kind: What their labels are.
        target: Turns a label into a tensor.
        max_length: Most residues of an item.
        long: What happens to longer proteins; see `ProteinFacts.long`.
        seed: Seed of the random stretches.
        train: Take random stretches; else the middle.

    Attributes:
        lengths: Residues of each item; of a pair, of its longer partner.

    Raises:
        GraftError: `long` is "refuse" and a protein is longer.
    """

    def __init__(
        self,
        records: Sequence[Record],
        kind: Kind,
        target: Target,
        max_length: int,
        long: Long,
        *,
        seed: int = 0,
        train: bool = False,
    ) -> None:
        if long == "refuse":
            refuse_long(records, max_length)
        self._kind, self._max_length, self._long = kind, max_length, long
        self._seed, self._train, self._epoch = seed, train, 0
        self._first = [_small(record.sequence) for record in records]
        self._second = [_small(record.second) for record in records]
        self._targets = [target(record.label) for record in records]
        self._places = [
            (number, start)
            for number, residues in enumerate(self._first)
            for start in self._starts(len(residues), residues=kind == "residues")
        ]
        self.lengths = [
            max(min(len(self._first[number]) - start, max_length), min(len(self._second[number]), max_length))
            for number, start in self._places
        ]

    def _starts(self, length: int, *, residues: bool) -> range:
        """Return where the items of a protein begin: residue labels need every stretch of a long one."""
        return range(0, length if residues and self._long == "window" else 1, self._max_length)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose random stretches the next items are."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> ProteinBatch:
        number, start = self._places[index]
        target = self._targets[number]
        if self._kind == "residues":
            first = self._first[number][start : start + self._max_length]
            target = target[start : start + self._max_length]
        else:
            first = self._cut(self._first[number], index, 0)
        second = self._cut(self._second[number], index, 1)
        mask = torch.ones(len(first), dtype=torch.bool)
        return ProteinBatch(first.long(), mask, target, torch.tensor(number), second.long())

    def _cut(self, residues: Tensor, *place: int) -> Tensor:
        room = len(residues) - self._max_length
        if room <= 0:
            return residues
        start = 0
        if self._long == "window":
            start = mix_seed(self._seed, self._epoch, *place) % (room + 1) if self._train else room // 2
        return residues[start : start + self._max_length]


def collate(items: Sequence[ProteinBatch]) -> ProteinBatch:
    """Pad items to the longest and stack them."""
    targets = [item.target for item in items]
    residues = pad_sequence([item.residues for item in items], batch_first=True, padding_value=PAD)
    per_residue = targets[0].dim() == 1 and targets[0].dtype == torch.int64 and targets[0].numel() > 0
    return ProteinBatch(
        residues,
        pad_sequence([item.mask for item in items], batch_first=True),
        pad_sequence(targets, batch_first=True, padding_value=IGNORE) if per_residue else torch.stack(targets),
        torch.stack([item.index for item in items]),
        pad_sequence([item.second for item in items], batch_first=True, padding_value=PAD),
    )


def sequence_loader(
    sequences: Sequence[str], tokens_per_batch: int, *, max_length: int, long: Long = "truncate"
) -> DataLoader[Any]:
    """Batch proteins without labels, from short to long; `ProteinBatch.index` are positions in `sequences`.

    Args:
        sequences: The residues of each.
        tokens_per_batch: Most residues in a batch, padding included.
        max_length: Most residues of a protein in a batch.
        long: What happens to longer ones; see `ProteinFacts.long`.

    Raises:
        GraftError: A sequence has an illegal letter, or is too long and `long` is "refuse".
    """
    records = [Record(f"sequence {number}", sequence) for number, sequence in enumerate(sequences, start=1)]
    dataset = Proteins(records, "unlabelled", no_target, max_length, long)
    return bucketed_eval_loader(dataset, dataset.lengths, tokens_per_batch, collate_fn=collate)


def no_target(label: str) -> Tensor:
    """Return the target of a protein without a label: int64 (0,)."""
    return torch.zeros(0, dtype=torch.int64)


def refuse_long(records: Sequence[Record], max_length: int) -> None:
    """Refuse proteins that are too long.

    Raises:
        GraftError: It names the longest one.
    """
    longest = max(records, key=length_of, default=None)
    if longest is not None and length_of(longest) > max_length:
        count = sum(length_of(record) > max_length for record in records)
        raise GraftError(
            f"{count} protein(s) are longer than max_length {max_length}, the longest '{longest.id}' with "
            f"{length_of(longest)} residues: raise max_length, or set long to truncate or window."
        )


def length_of(record: Record) -> int:
    """Return the residues of a record; of a pair, of its longer partner."""
    return max(len(record.sequence), len(record.second))


def _small(sequence: str) -> Tensor:
    # A byte a residue while it waits: whole proteomes stay in memory.
    return torch.tensor(encode(sequence) if sequence else [], dtype=torch.uint8)
