"""Read FASTA files and tables (CSV, TSV), plain or gzipped, and say in which line something is wrong."""

from __future__ import annotations

import csv
import gzip
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import GraftError, suggest
from domains.protein._alphabet import encode, looks_like_dna

_GZIP = b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a FASTA file.

    Attributes:
        id: The first word of its header.
        header: The whole header without ">".
        sequence: Its residues in capitals, without spaces and without a "*" at the end; not checked yet.
        line: Line of its header, from 1.
    """

    id: str
    header: str
    sequence: str
    line: int


def read_fasta(path: Path) -> list[Entry]:
    """Read a FASTA file, plain or gzipped, with any line ends.

    Raises:
        GraftError: The file cannot be read or is no FASTA file, an entry has no id, or two have the same.
    """
    entries = list(parse_fasta(_text(path).splitlines(), str(path)))
    if not entries:
        raise GraftError(f"{path} has no entries: give a FASTA file, with a line '>ID' before each sequence.")
    seen: dict[str, int] = {}
    for entry in entries:
        if entry.id in seen:
            raise GraftError(
                f"{path}, line {entry.line}: the id '{entry.id}' stands in line {seen[entry.id]} already; give every "
                "protein an id of its own."
            )
        seen[entry.id] = entry.line
    return entries


def parse_fasta(lines: Iterable[str], name: str) -> Iterator[Entry]:
    """Read the entries out of the lines of a FASTA file; `name` is the file's name for messages.

    Raises:
        GraftError: There is text before the first header, or a header without an id.
    """
    header, start = "", 0
    parts: list[str] = []
    for number, raw in enumerate(lines, start=1):
        line = raw.strip()
        if line.startswith(">"):
            if start:
                yield _entry(header, parts, start)
            header, start, parts = line[1:].strip(), number, []
            if not header:
                raise GraftError(f"{name}, line {number}: the header has no id; write one behind the '>'.")
        elif line and not line.startswith(";"):
            if not start:
                raise GraftError(f"{name}, line {number}: there is no header '>ID' before the first sequence; add one.")
            parts.append(line)
    if start:
        yield _entry(header, parts, start)


def _entry(header: str, parts: Sequence[str], line: int) -> Entry:
    return Entry(header.split()[0], header, clean("".join(parts)), line)


def clean(sequence: str) -> str:
    """Write a sequence in capitals, without white space and without a "*" (stop) at its end."""
    return "".join(sequence.split()).upper().removesuffix("*")


def read_table(path: Path, needed: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """Read a table with a header line: commas, or tabs where the header has tabs and no comma.

    Args:
        path: The file, plain or gzipped, UTF-8.
        needed: Columns that it must have.

    Returns:
        For each row where it stands ("FILE, line N") and its texts by column, without white space around them.

    Raises:
        GraftError: The file cannot be read, is empty, or lacks a column.
    """
    lines = _text(path).splitlines(keepends=True)
    first = lines[0] if lines else ""
    delimiter = "\t" if "\t" in first and "," not in first else ","
    reader = csv.DictReader(lines, delimiter=delimiter)
    try:
        columns = [name.strip() for name in reader.fieldnames or ()]
        reader.fieldnames = columns
        for column in needed:
            if column not in columns:
                hint = suggest(column, columns).replace("Allowed:", "It has:") if columns else " It is empty."
                raise GraftError(f"{path} has no column '{column}'.{hint} Correct its first line.")
        rows = [(f"{path}, line {reader.line_num}", {c: (row[c] or "").strip() for c in columns}) for row in reader]
    except csv.Error as error:
        raise GraftError(f"Cannot read {path} as a table: {error}. Give a UTF-8 file with commas or tabs.") from error
    if not rows:
        raise GraftError(f"{path} lists no proteins: add a line for each below its header.")
    return rows


def fault(sequence: str) -> str:
    """Say what is wrong with a sequence; "" if nothing is."""
    try:
        encode(sequence)
    except GraftError as error:
        return str(error)
    return ""


def warn_of_dna(sequences: Sequence[str], where: str) -> None:
    """Warn where sequences look like DNA or RNA: their letters are amino acids too, so nothing else would tell."""
    count = sum(map(looks_like_dna, sequences))
    if count:
        warnings.warn(
            f"{where}: {count} of {len(sequences)} sequences hold only the letters of DNA or RNA. Graft reads amino "
            "acids; translate genes first.",
            stacklevel=2,
        )


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        if data.startswith(_GZIP):
            data = gzip.decompress(data)
        return data.decode("utf-8-sig")
    except FileNotFoundError:
        raise GraftError(f"There is no file '{path}': correct the path.") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise GraftError(f"Cannot read {path} ({error}): give a text file in UTF-8, plain or gzipped.") from error
