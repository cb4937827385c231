"""Read tables (CSV, TSV, JSON lines) and say in which line something is wrong."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from common.errors import GraftError, suggest

Table = list[tuple[str, dict[str, str]]]
"""For each row where it stands ("FILE, line N") and its texts by column, without white space around them."""


def read_table(path: Path, needed: Sequence[str], *, quoted: bool = True) -> Table:
    """Read a table: JSON lines if it is named so, else with a header line and commas, or tabs.

    Tabs part the columns where the header has tabs and no comma.

    Args:
        path: The file, UTF-8.
        needed: Columns that it must have.
        quoted: Whether quotation marks around a cell belong to the format, or are text.

    Raises:
        GraftError: The file cannot be read, is empty, or lacks a column.
    """
    text = read_text(path)
    rows = _json_lines(path, text) if path.suffix.lower() in (".jsonl", ".json", ".ndjson") else None
    rows = _delimited(path, text, quoted) if rows is None else rows
    if not rows:
        raise GraftError(f"{path} lists no clips: add a line for each.")
    for where, row in rows:
        for column in needed:
            if column not in row:
                raise GraftError(f"{where} has no '{column}'.{suggest(column, row).replace('Allowed:', 'It has:')}")
    return rows


def read_text(path: Path) -> str:
    """Read a text file in UTF-8.

    Raises:
        GraftError: It is missing or cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise GraftError(f"There is no file '{path}': correct the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise GraftError(f"Cannot read {path} ({error}): give a text file in UTF-8.") from error


def lines_of(text: str) -> list[str]:
    """Split a text at line feeds alone: transcripts may hold the other signs that `str.splitlines` splits at."""
    return text.removesuffix("\n").split("\n")


def _delimited(path: Path, text: str, quoted: bool) -> Table:
    first = text.partition("\n")[0]
    delimiter = "\t" if "\t" in first and "," not in first else ","
    reader = csv.DictReader(
        io.StringIO(text), delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    )
    try:
        columns = [name.strip() for name in reader.fieldnames or ()]
        reader.fieldnames = columns
        return [(f"{path}, line {reader.line_num}", {c: (row[c] or "").strip() for c in columns}) for row in reader]
    except csv.Error as error:
        raise GraftError(f"Cannot read {path} as a table: {error}. Give a UTF-8 file with commas or tabs.") from error


def _json_lines(path: Path, text: str) -> Table:
    rows: Table = []
    for number, line in enumerate(lines_of(text), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise GraftError(f"{path}, line {number} is no JSON ({error}): write one object a line.") from error
        if not isinstance(row, dict):
            raise GraftError(f"{path}, line {number} is no JSON object: write {{...}} in each line.")
        texts = {str(name): "" if value is None else str(value).strip() for name, value in row.items()}
        rows.append((f"{path}, line {number}", texts))
    return rows
