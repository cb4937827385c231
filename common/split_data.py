"""What the datamodules of all domains share: facts and records of three splits, and loaders to evaluate on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from lightning import LightningDataModule
from torch.utils.data import DataLoader

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
