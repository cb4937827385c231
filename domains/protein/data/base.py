"""The datamodule all protein sets share: records, checks, few-shot subsets, batches of similar lengths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from common.errors import GraftError, unknown
from common.loading import StatefulLoader, bucketed_eval_loader, bucketed_loader
from common.split_data import SplitData
from common.splits import SPLITS, Split, check_share, stable_hash, take_share
from domains.protein.data._dataset import Proteins, Target, collate, length_of, no_target, refuse_long
from domains.protein.data._records import (
    IGNORE,
    LONG,
    Contents,
    Kind,
    Long,
    ProteinBatch,
    ProteinFacts,
    Record,
    digest_of,
)

UNLABELLED_RESIDUE = "."
"""Letter of a residue without a label."""


class ProteinData(SplitData[Record, ProteinFacts]):
    """Proteins or peptides in three splits. Subclasses say where they come from (`_read`).

    Sequences stay in memory, a byte a residue. A batch holds proteins of about one length, many short ones or few long
    ones, at most `tokens_per_batch` residues with the padding; every epoch mixes them anew.

    Args:
        max_length: Most residues of a protein in a batch.
        long: What happens to longer ones: "truncate" keeps their first `max_length` residues; "window" takes a random
            stretch in every epoch and the middle in evaluation (residue labels: all stretches); "refuse" stops.
        tokens_per_batch: Most residues in a batch, padding included; of pairs the longer partner counts.
        shots: Training records per class, chosen by a hash; without classes, training records in all. None takes all.
        shots_draw: Which subset `shots` or `share` chooses: another number, other records.
        share: Share of the training records (of each class, where there are classes), in place of `shots`.
        seed: Order of the training records and their stretches. It never touches the splits.
        num_workers: Processes that make batches; 0 makes them in the main process.

    Raises:
        GraftError: An argument is out of range; all such arguments are named.
    """

    def __init__(
        self,
        max_length: int = 1022,
        long: Long = "truncate",
        tokens_per_batch: int = 2048,
        shots: int | None = None,
        shots_draw: int = 0,
        share: float | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        least = {"max_length": (max_length, 1), "tokens_per_batch": (tokens_per_batch, 1)}
        least |= {"shots": (1 if shots is None else shots, 1), "num_workers": (num_workers, 0)}
        wrong = [f"{name} is {value} (at least {bound})" for name, (value, bound) in least.items() if value < bound]
        if wrong:
            raise GraftError(f"{type(self).__name__}: {'; '.join(wrong)}.")
        if long not in LONG:
            raise unknown("rule for long proteins", long, LONG)
        self.max_length, self.long, self.tokens_per_batch = max_length, long, tokens_per_batch
        check_share(type(self).__name__, share, shots)
        self.share = share
        self.shots, self.shots_draw, self.seed, self.num_workers = shots, shots_draw, seed, num_workers

    # ---- what a subclass provides

    def _name(self) -> str:
        """Name of the set in `facts` and in reports."""
        return type(self).__name__

    def _read(self) -> Contents:
        """Find the records of all splits; download or prepare first where that was not done."""
        raise NotImplementedError

    # ---- the datamodule

    def setup(self, stage: str | None = None) -> None:
        """Find and check the records; all splits, whatever the stage. A second call does nothing.

        Raises:
            GraftError: The data cannot be used as asked; the message says what to do.
        """
        if self._facts is not None:
            return
        found = self._read()
        splits = {split: tuple(found.splits[split]) for split in SPLITS}
        everything = [record for split in SPLITS for record in splits[split]]
        self._check(found, splits)
        if self.long == "refuse":
            refuse_long(everything, self.max_length)
        if self.shots is not None:
            splits["train"] = self._few(splits["train"], found.kind, self.shots)
        if self.share is not None:
            by_class = found.kind in ("classes", "pairs")
            names = [record.id for record in splits["train"]]
            labels = [record.label if by_class else "" for record in splits["train"]]
            kept = take_share(names, labels, self.share, f"shots-{self.shots_draw}")
            splits["train"] = tuple(record for record in splits["train"] if record.id in kept)
        values = np.array([float(r.label) for r in splits["train"]] if found.kind == "value" else [0.0])
        self._records = splits
        self._facts = ProteinFacts(
            kind=found.kind,
            class_names=found.class_names,
            max_length=self.max_length,
            long=self.long,
            name=self._name(),
            digest=digest_of(splits),
            counts={
                **{split: len(records) for split, records in splits.items()},
                "long": sum(length_of(record) > self.max_length for record in everything),
            },
            mean=float(values.mean()),
            std=float(values.std()) if found.kind == "value" else 1.0,
            skipped=found.skipped,
            left_out=dict(found.left_out),
            leak=dict(found.leak),
        )

    def train_dataloader(self) -> StatefulLoader:
        """Return the shuffled, resumable loader of `ProteinBatch`es."""
        dataset = self._dataset("train")
        return bucketed_loader(dataset, dataset.lengths, self.tokens_per_batch, seed=self.seed, **self._options())

    def _content(self, record: Record) -> str:
        return f"{record.sequence}/{record.second}"

    def _eval_loader(self, split: Split) -> DataLoader[ProteinBatch]:
        dataset = self._dataset(split)
        return bucketed_eval_loader(dataset, dataset.lengths, self.tokens_per_batch, **self._options())

    def _options(self) -> dict[str, Any]:
        return {"num_workers": self.num_workers, "collate_fn": collate, "pin_memory": torch.cuda.is_available()}

    def _dataset(self, split: Split) -> Proteins:
        target = target_of(self.facts.kind, self.facts.class_names)
        return Proteins(
            self.records(split),
            self.facts.kind,
            target,
            self.max_length,
            self.long,
            seed=self.seed,
            train=split == "train",
        )

    # ---- checks

    def _check(self, found: Contents, splits: Mapping[Split, Sequence[Record]]) -> None:
        for split, records in splits.items():
            if not records:
                raise GraftError(f"{self._name()} has no proteins in its {split} split: add some.")
        if found.kind in ("classes", "labels", "residues", "pairs") and len(found.class_names) < 2:
            got = ", ".join(found.class_names) or "none"
            raise GraftError(f"{self._name()} needs at least 2 classes to tell apart and has {got}: add another class.")
        if found.kind != "value":
            trained = {name for record in splits["train"] for name in labels_of(record.label, found.kind)}
            untrained = [f"'{name}'" for name in found.class_names if name not in trained]
            if untrained:
                raise GraftError(
                    f"{self._name()} has no training protein with label {', '.join(untrained)}: add some, or leave "
                    "the label out."
                )
        elif len({float(record.label) for record in splits["train"]}) < 2:
            raise GraftError(f"{self._name()}: all training values are equal; there is nothing to learn from them.")

    def _few(self, records: Sequence[Record], kind: Kind, shots: int) -> tuple[Record, ...]:
        by_class = kind in ("classes", "pairs")
        counts = Counter(record.label if by_class else "" for record in records)
        short = [f"'{label}' ({count})" if label else str(count) for label, count in counts.items() if count < shots]
        if short:
            raise GraftError(
                f"shots is {shots}, more than the training records of {', '.join(sorted(short))}: lower it."
            )
        taken: Counter[str] = Counter()
        kept: set[str] = set()
        for record in sorted(records, key=lambda r: (stable_hash(r.id, f"shots-{self.shots_draw}"), r.id)):
            label = record.label if by_class else ""
            if taken[label] < shots:
                taken[label] += 1
                kept.add(record.id)
        return tuple(record for record in records if record.id in kept)


def labels_of(label: str, kind: Kind) -> list[str]:
    """Return the class names that a record's label holds."""
    if kind == "residues":
        return sorted(set(label) - {UNLABELLED_RESIDUE})
    return [name for name in label.split(";") if name] if kind == "labels" else [label]


def target_of(kind: Kind, class_names: Sequence[str]) -> Target:
    """Return what turns a record's label into a tensor; see `ProteinBatch.target`."""
    number = {name: position for position, name in enumerate(class_names)}

    def labels(label: str) -> Tensor:
        target = torch.zeros(len(class_names))
        target[[number[name] for name in labels_of(label, kind)]] = 1.0
        return target

    targets: dict[Kind, Target] = {
        "classes": lambda label: torch.tensor(number[label]),
        "pairs": lambda label: torch.tensor(number[label]),
        "labels": labels,
        "value": lambda label: torch.tensor(float(label)),
        "residues": lambda label: torch.tensor([number.get(letter, IGNORE) for letter in label]),
        "unlabelled": no_target,
    }
    return targets[kind]
