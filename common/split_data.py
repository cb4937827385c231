"""What the datamodules of all domains share: facts and records of three splits, and loaders to evaluate on them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Generic, TypeVar

from lightning import LightningDataModule
from torch.utils.data import DataLoader

from common._digest import file_digest
from common.errors import unknown
from common.splits import SPLITS, Split

RecordT = TypeVar("RecordT")
FactsT = TypeVar("FactsT")


class SplitData(LightningDataModule, Generic[RecordT, FactsT]):
    """Records in three splits. A domain's datamodule fills `_records` and `_facts` in `setup`, and gives loaders."""

    def __init__(self) -> None:
        super().__init__()
        self._records: dict[Split, tuple[RecordT, ...]] = {}
        self._facts: FactsT | None = None

    def _eval_loader(self, split: Split) -> DataLoader[Any]:
        """Return the records of a split as they are evaluated."""
        raise NotImplementedError

    def _content(self, record: RecordT) -> str | Path | None:
        """Return what makes two records the same example: a text, or a file whose bytes do; None where unknown."""
        return None

    def describe_splits(self) -> dict[str, Any]:
        """Return a digest of each split's ids (`splits`), and how many contents two splits share (`shared`).

        Files are compared where their sizes agree, byte for byte; `shared` is empty where contents are unknown.
        """
        used = [split for split in SPLITS if self._records[split]]
        ids = {split: sorted(str(getattr(record, "id", record)) for record in self._records[split]) for split in used}
        digests = {split: hashlib.sha256("\n".join(names).encode()).hexdigest() for split, names in ids.items()}
        found = {split: _contents([self._content(record) for record in self._records[split]]) for split in used}
        by_size = {split: {content for content in found[split] if isinstance(content, Path)} for split in used}
        sizes = {split: {path: path.stat().st_size for path in paths} for split, paths in by_size.items()}
        shared: dict[str, int] = {}
        for one, two in combinations([split for split in used if found[split]], 2):
            texts = {c for c in found[one] if isinstance(c, str)} & {c for c in found[two] if isinstance(c, str)}
            alike = set(sizes[one].values()) & set(sizes[two].values())
            both = (sizes[one], sizes[two])
            hashes = [{file_digest(path) for path, size in side.items() if size in alike} for side in both]
            shared[f"{one}-{two}"] = len(texts) + len(hashes[0] & hashes[1])
        return {"splits": digests, "shared": shared}

    @property
    def facts(self) -> FactsT:
        """What is known about the set after `setup`."""
        if self._facts is None:
            raise RuntimeError("Call setup() first.")
        return self._facts

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their labels; none where there are no classes."""
        facts: Any = self.facts
        return facts.class_names

    def records(self, split: str) -> Sequence[RecordT]:
        """Return the records of a split, in the order of a batch's `index`.

        Raises:
            GraftError: There is no such split.
        """
        _ = self.facts
        for name in SPLITS:
            if name == split:
                return self._records[name]
        raise unknown("split", split, SPLITS)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the validation records as they are evaluated."""
        return self._eval_loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the test records as they are evaluated."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the test records as they are evaluated."""
        return self._eval_loader("test")


def named(name: str, group: str) -> dict[str, str]:
    """Begin a test example's row of predictions: its id, and its group where the data states one ("" where not).

    A group is what examples have in common beside their class: a speaker, a patient, a site, a protein family.
    """
    return {"id": name, **({"group": group} if group else {})}


def _contents(given: Sequence[str | Path | None]) -> set[str | Path]:
    """Keep what can be compared: texts, and files that are there."""
    return {content for content in given if isinstance(content, str) or (content is not None and content.is_file())}
