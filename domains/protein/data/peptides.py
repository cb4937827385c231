"""Antimicrobial peptides, the set that the protein domain starts with, with and without labels."""

from __future__ import annotations

import dataclasses

from common import artifacts
from domains.protein.data._prepared import Listing, read_set
from domains.protein.data._records import Contents, Record
from domains.protein.data.base import ProteinData

ROW = "modlamp"
MEMBER = "modlamp/data/AMPvsUniProt.csv"
CLASSES = ("other", "antimicrobial")


class AntimicrobialPeptides(ProteinData):
    """Antimicrobial peptides against other peptides of UniProt (Mueller et al. 2017, modlAMP), 7 to 174 residues.

    Copies are merged and peptides that stand in both classes dropped. Peptides whose 3-mers overlap (Jaccard index of
    at least 0.2), directly or over others, stay on one side. Splits are about 50/15/35 %, by a hash of the cluster.

    What to know when reading a result: near-copies of a peptide carry its label, so under a random split the nearest
    neighbour alone would be right far more often (`facts.leak`). The other peptides are not shown to be inactive, only
    not known to be active, and the classes differ in lengths and compositions, from which a model may profit.
    """

    def prepare_data(self) -> None:
        """Fetch the archive and split the peptides, once."""
        self._read()

    def _read(self) -> Contents:
        return read_set("antimicrobial-1", ROW, _listed, CLASSES)


class UnlabelledPeptides(AntimicrobialPeptides):
    """The peptides of `AntimicrobialPeptides` in the same splits, without their labels: to adapt a language model.

    What is adapted on the training split has seen no peptide of the validation and test splits, nor one whose 3-mers
    overlap with theirs, so that an adapter may go on to `AntimicrobialPeptides`.
    """

    def _read(self) -> Contents:
        found = super()._read()
        splits = {
            side: [dataclasses.replace(record, label="") for record in records]
            for side, records in found.splits.items()
        }
        return Contents(kind="unlabelled", splits=splits, left_out=found.left_out)


def _listed() -> Listing:
    # The first line states the number of rows; each other one is "SEQUENCE, 0" or "SEQUENCE, 1".
    lines = artifacts.read_member(ROW, MEMBER).decode().splitlines()[1:]
    records = []
    for number, line in enumerate(lines, start=1):
        sequence, label = (part.strip() for part in line.split(","))
        records.append(Record(f"peptide-{number:04d}", sequence, CLASSES[int(label)]))
    return records, {}
