"""Tiny proteins, drawn for each test."""

from __future__ import annotations

import random

import pytest

from domains.protein._alphabet import STANDARD


@pytest.fixture
def draw():
    """Draw a random protein; another seed, another protein."""

    def make(seed: int, length: int = 40) -> str:
        return "".join(random.Random(seed).choices(STANDARD, k=length))

    return make


@pytest.fixture
def table(tmp_path):
    """Write a CSV file of a header and rows."""

    def write(header: str, rows: list, name: str = "own.csv"):
        path = tmp_path / name
        lines = [header, *(",".join(map(str, row)) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
        return path

    return write
