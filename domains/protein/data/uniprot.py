"""Sets out of a sample of UniProt: the reaction an enzyme speeds up, the superkingdom, and pieces without labels."""

from __future__ import annotations

import dataclasses
import gzip
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from common import artifacts
from common.errors import GraftError
from common.splits import Split, stable_hash
from domains.protein.data._prepared import Listing, read_set
from domains.protein.data._reading import parse_fasta
from domains.protein.data._records import Contents, Record
from domains.protein.data._uniprot import (
    ENZYME_CLASSES,
    SUPERKINGDOMS,
    Header,
    enzyme_class,
    parse_header,
    superkingdom,
)
from domains.protein.data.base import ProteinData

ROW = "uniprot-sample"
MEMBER = "usr/share/doc/mmseqs2/example-data/DB.fasta.gz"
_LEAST_LENGTH = 30
_FOR_TRAINING: Mapping[Split, float] = {"train": 0.96, "val": 0.02, "test": 0.02}


class EnzymeClass(ProteinData):
    """Enzymes of a UniProt sample in the first six classes of the Enzyme Commission.

    The class is read off the protein's name (`_uniprot.enzyme_class`); fragments below 30 residues are left out.
    Proteins that share at least three 6-mers and 5 % of the smaller one's 6-mers, directly or over others, stay on one
    side. Splits are about 50/15/35 %, by a hash of the cluster.

    What to know when reading a result: names of unreviewed entries were mostly given by similarity to others. A family
    that has diverged beyond shared 6-mers may stand on both sides: under clusters of MMseqs2 at 30 % identity the
    nearest neighbour is right in .34 of the test, under these in .53 (measured once, with version 14).
    """

    def prepare_data(self) -> None:
        """Fetch the archive, read the labels and split the proteins, once."""
        self._read()

    def _read(self) -> Contents:
        return read_set("enzyme-class-1", ROW, lambda: _listed(lambda h: enzyme_class(h.protein)), ENZYME_CLASSES)


class Superkingdom(ProteinData):
    """Proteins of a UniProt sample by the superkingdom of their organism: archaea, bacteria, eukaryota, viruses.

    The superkingdom is read off the organism's name (`_uniprot.superkingdom`); rare genera are left out. Splits are
    made by the rule of `EnzymeClass`.

    What to know when reading a result: composition and length alone tell much, and genes that one superkingdom got from
    another carry the label of their present owner. Genera stand on all sides.
    """

    def prepare_data(self) -> None:
        """Fetch the archive, read the labels and split the proteins, once."""
        self._read()

    def _read(self) -> Contents:
        return read_set("superkingdom-1", ROW, lambda: _listed(lambda h: superkingdom(h.organism)), SUPERKINGDOMS)


class UniProtFragments(ProteinData):
    """All proteins of a UniProt sample without labels, cut into pieces: to train or distil a language model.

    Each protein is cut from its first residue on into pieces of `shortest` to `max_length` residues, the lengths spread
    evenly on a logarithmic scale by a hash of its accession; so an epoch shows every residue once, and batches of
    pieces from the length of a peptide to that of a domain. A last piece below `shortest` is left out. Proteins are
    kept apart by the rule of `EnzymeClass`, about 96/2/2 %.

    What to know when reading a result: the labelled sets of this module are drawn from the same sample, so a model that
    was trained on this set has read their test proteins, though without labels.

    Args:
        shortest: Fewest residues of a piece.
        max_length: Most residues of a piece.
        **kwargs: See `ProteinData`.

    Raises:
        GraftError: An argument is out of range.
    """

    def __init__(self, shortest: int = 10, max_length: int = 128, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(max_length=max_length, **kwargs)
        if not 1 <= shortest <= max_length:
            raise GraftError(f"shortest is {shortest}; give 1 to max_length, which is {max_length}.")
        self.shortest = shortest

    def prepare_data(self) -> None:
        """Fetch the archive and split the proteins, once."""
        self._read()

    def _read(self) -> Contents:
        whole = read_set("uniprot-all-1", ROW, lambda: _listed(lambda _: ""), fractions=_FOR_TRAINING)
        splits = {
            split: [piece for record in records for piece in self._pieces(record)]
            for split, records in whole.splits.items()
        }
        return dataclasses.replace(whole, splits=splits)

    def _pieces(self, record: Record) -> Iterator[Record]:
        octaves = math.log2((self.max_length + 1) / self.shortest)
        start = 0
        while len(record.sequence) - start >= self.shortest:
            share = stable_hash(record.id, str(start)) / 2**64
            end = min(start + int(self.shortest * 2 ** (share * octaves)), len(record.sequence))
            yield Record(f"{record.id}/{start + 1}-{end}", record.sequence[start:end])
            start = end


def _listed(label_of: Callable[[Header], str | None]) -> Listing:
    text = gzip.decompress(artifacts.read_member(ROW, MEMBER)).decode()
    records: list[Record] = []
    dropped = {"no label in the header": 0, f"shorter than {_LEAST_LENGTH} residues": 0}
    for entry in parse_fasta(text.splitlines(), MEMBER):
        header = parse_header(entry.header)
        label = label_of(header) if header else None
        if header is None or label is None:
            dropped["no label in the header"] += 1
        elif len(entry.sequence) < _LEAST_LENGTH:
            dropped[f"shorter than {_LEAST_LENGTH} residues"] += 1
        else:
            records.append(Record(header.accession, entry.sequence, label))
    return records, dropped
