"""Windows around lysines, in which to see how much a published split leaks."""

from __future__ import annotations

from typing import Any, Literal, get_args

from common import artifacts
from common.errors import unknown
from common.splits import Split, stable_hash
from domains.protein.data._prepared import Listing, read_set
from domains.protein.data._reading import parse_fasta
from domains.protein.data._records import Contents, Record
from domains.protein.data.base import ProteinData

ROW = "sumo-sites"
FOLDER = "esm_sumo/data/datasets/21-mer Matched Dataset"
CLASSES = ("other", "sumoylated")
SumoSplit = Literal["protein", "published"]
_FILES = {"neg": CLASSES[0], "pos": CLASSES[1]}
_VALIDATION = 0.1  # of the proteins of the published training windows


class SumoWindows(ProteinData):
    """Windows of 21 residues in human proteins, whose middle lysine is sumoylated or not known to be (esm-sumo).

    For measuring a leak only: the data's licence is not stated. In the `published` split 2,121 of the 2,125 test
    windows come from proteins that also have training windows, and 59 % overlap one of these by position. In the
    `protein` split all windows of a protein stay on one side, and so do windows whose 3-mers overlap (Jaccard index
    of at least 0.2).

    What to know when reading a result: 76 % of the windows are of the class `other`, lysines of the same proteins that
    nobody has reported.

    Args:
        split: `protein`, or the `published` one, whose validation is a tenth of the training proteins.
        **kwargs: See `ProteinData`.

    Raises:
        GraftError: There is no such split.
    """

    def __init__(self, split: SumoSplit = "protein", **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(**kwargs)
        if split not in get_args(SumoSplit):
            raise unknown("split", split, get_args(SumoSplit))
        self.split = split

    def prepare_data(self) -> None:
        """Fetch the archive and split the windows, once."""
        self._read()

    def _read(self) -> Contents:
        stated = _published if self.split == "published" else None
        return read_set(f"sumo-windows-{self.split}-1", ROW, _listed, CLASSES, stated=stated)


def _listed() -> Listing:
    records = []
    for published in ("Train", "Test"):
        for side, label in _FILES.items():
            member = f"{FOLDER}/Sumoylation_{side}_{published}.fasta"
            for entry in parse_fasta(artifacts.read_member(ROW, member).decode().splitlines(), member):
                protein = entry.id.rpartition("_")[0]  # behind it stands the lysine's position
                records.append(Record(f"{published.lower()}/{entry.id}", entry.sequence, label, group=protein))
    return records, {}


def _published(record: Record) -> Split:
    """Return the published side; validation is split off by protein."""
    if record.id.startswith("test/"):
        return "test"
    return "val" if stable_hash(record.group, "validation") / 2**64 < _VALIDATION else "train"
