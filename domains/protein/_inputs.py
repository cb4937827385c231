"""The user's own sequences, read and batched for prediction and for embeddings."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch.utils.data import DataLoader

from common.errors import GraftError
from common.loading import bucketed_eval_loader
from domains.protein.data._dataset import Proteins, collate, length_of, no_target
from domains.protein.data._reading import clean, fault, read_fasta, read_table, warn_of_dna
from domains.protein.data._records import Kind, Long, ProteinBatch, Record

FASTA = (".fasta", ".fa", ".faa", ".fas", ".fsa")
TABLES = (".csv", ".tsv")
_TOKENS = 4096  # residues that go through the network at a time


@dataclass(frozen=True, slots=True)
class Given:
    """A protein or pair of the user's.

    Attributes:
        file: Where it was read.
        record: Its id and residues.
    """

    file: Path
    record: Record


def read_given(files: Sequence[Path], *, pairs: bool, longest: int | None, skip_bad: bool) -> tuple[list[Given], int]:
    """Read proteins from FASTA files, or pairs from tables with the columns `a` and `b` (and `id`).

    Args:
        files: Files, plain or gzipped, or folders that are searched for them.
        pairs: Read tables of pairs.
        longest: Most residues of a protein; None where any number will do.
        skip_bad: Count and leave out sequences that cannot be used, instead of stopping at the first.

    Returns:
        What can be used, in the order of the files, and how much was left out.

    Raises:
        GraftError: No file, one that cannot be read, or a sequence that cannot be used.
    """
    suffixes = TABLES if pairs else FASTA
    paths = list(_paths(files, suffixes))
    if not paths:
        raise GraftError(
            f"No sequences in {', '.join(map(str, files))}. Give files or folders with {', '.join(suffixes)}."
        )
    kept: list[Given] = []
    skipped = 0
    for path in paths:
        records = _pairs(path) if pairs else [Record(entry.id, entry.sequence) for entry in read_fasta(path)]
        warn_of_dna([record.sequence for record in records], str(path))
        for record in records:
            problem = _problem(record, pairs=pairs, longest=longest)
            if not problem:
                kept.append(Given(path, record))
            elif skip_bad:
                skipped += 1
            else:
                raise GraftError(f"{path}, '{record.id}': {problem} Or add --skip-bad to leave it out.")
    return kept, skipped


def batches(records: Sequence[Record], kind: Kind, max_length: int | None, long: Long) -> DataLoader[Any]:
    """Batch proteins without labels, from short to long.

    Args:
        records: The proteins or pairs; `ProteinBatch.index` are positions in it.
        kind: `residues` takes all stretches of a long protein where `long` is "window".
        max_length: Most residues of a protein in a batch; None takes all as they are.
        long: What happens to longer ones; see `ProteinFacts.long`.
    """
    longest = max(map(length_of, records), default=1)
    dataset = Proteins(records, kind, no_target, max_length or longest, long)
    return bucketed_eval_loader(dataset, dataset.lengths, max(_TOKENS, *dataset.lengths, 1), collate_fn=collate)


def tracked(loader: DataLoader[Any], device: torch.device, what: str) -> Iterator[ProteinBatch]:
    """Yield the batches on a device, with a progress bar on a terminal."""
    quiet, console = not sys.stderr.isatty(), Console(stderr=True)
    for batch in track(loader, what, len(loader), console=console, transient=True, disable=quiet):
        yield ProteinBatch(*(tensor.to(device) for tensor in batch))


def _paths(files: Sequence[Path], suffixes: Sequence[str]) -> Iterator[Path]:
    for path in files:
        if path.is_dir():
            yield from sorted(p for p in path.rglob("*") if p.is_file() and _suffix(p) in suffixes)
        elif path.exists():
            yield path
        else:
            raise GraftError(f"There is no file or folder '{path}'.")


def _suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _pairs(path: Path) -> list[Record]:
    return [
        Record(row.get("id", "") or where.rsplit(", ", 1)[-1], clean(row["a"]), second=clean(row["b"]))
        for where, row in read_table(path, ("a", "b"))
    ]


def _problem(record: Record, *, pairs: bool, longest: int | None) -> str:
    problem = fault(record.sequence) or (fault(record.second) if pairs else "")
    if not problem and longest is not None and length_of(record) > longest:
        problem = f"{length_of(record)} residues are more than the {longest} allowed; cut it."
    return problem
