"""FASTA files and tables as they come: gzipped, from Windows, in small letters, and broken."""

from __future__ import annotations

import gzip
import random

import pytest

from common.errors import GraftError
from domains.protein.data._reading import read_fasta, read_table, warn_of_dna

TEXT = ">p1 first protein\nMKVL\nAAG*\n\n; a comment\n>p2\nmk v\n"


@pytest.mark.parametrize(
    "data",
    [
        TEXT.encode(),
        TEXT.replace("\n", "\r\n").encode(),
        TEXT.replace("\n", "\r").encode(),
        b"\xef\xbb\xbf" + TEXT.encode(),
        gzip.compress(TEXT.replace("\n", "\r\n").encode()),
    ],
    ids=["plain", "crlf", "cr", "bom", "gzip"],
)
def test_fasta_files_are_read_whatever_their_form(tmp_path, data):
    path = tmp_path / "any.name"
    path.write_bytes(data)
    entries = read_fasta(path)
    assert [(e.id, e.header, e.sequence, e.line) for e in entries] == [
        ("p1", "p1 first protein", "MKVLAAG", 1),
        ("p2", "p2", "MKV", 6),
    ]


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"", "has no entries"),
        (b"MKV\n>p1\nMKV\n", r"line 1: there is no header '>ID'"),
        (b">\nMKV\n", "line 1: the header has no id"),
        (b">p1\nMKV\n>p1\nAAA\n", "line 3: the id 'p1' stands in line 1 already"),
        (gzip.compress(b">p1\n" + bytes(random.Random(0).choices(b"ACDEFGHIKL", k=4000)))[:-900], "Cannot read"),
        (b">p1\n\xff\xfe\x00", "Cannot read .* UTF-8"),
    ],
)
def test_broken_fasta_files_are_refused_with_their_line(tmp_path, data, named):
    path = tmp_path / "broken.fasta"
    path.write_bytes(data)
    with pytest.raises(GraftError, match=named):
        read_fasta(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(GraftError, match=r"no file '.*none\.fasta'"):
        read_fasta(tmp_path / "none.fasta")


@pytest.mark.parametrize("delimiter", [",", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_tables_are_read_with_commas_or_tabs_plain_or_gzipped(tmp_path, delimiter, end):
    text = end.join(delimiter.join(row) for row in ((" sequence ", "label"), ("MKV", " x "), ("AAA", "")))
    for name, data in (("t.csv", text.encode()), ("t.csv.gz", gzip.compress(b"\xef\xbb\xbf" + text.encode()))):
        (tmp_path / name).write_bytes(data)
        rows = read_table(tmp_path / name, ("sequence", "label"))
        assert rows == [
            (f"{tmp_path / name}, line 2", {"sequence": "MKV", "label": "x"}),
            (f"{tmp_path / name}, line 3", {"sequence": "AAA", "label": ""}),
        ]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("Sequence,label\nMKV,x\n", "no column 'sequence'. Did you mean 'Sequence'. It has: Sequence, label. Correct"),
        ("", "no column 'sequence'. It is empty"),
        ("sequence,label\n", "lists no proteins"),
    ],
)
def test_wrong_headers_and_empty_tables_are_refused(tmp_path, text, named):
    path = tmp_path / "own.csv"
    path.write_text(text)
    with pytest.raises(GraftError, match=named):
        read_table(path, ("sequence", "label"))


def test_dna_is_warned_of_with_a_count():
    with pytest.warns(UserWarning, match=r"own\.csv: 2 of 3 sequences hold only the letters of DNA"):
        warn_of_dna(["ACGT" * 8, "MKVLLAAGPW" * 3, "acgu" * 8], "own.csv")
