"""Tiny image sets, drawn for each test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def draw():
    """Write an image of random blocks; another seed, another image."""

    def write(path: Path, seed: int, size: tuple[int, int] = (24, 20), mode: str = "RGB") -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        image = Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)
        image.convert(mode).save(path)
        return path

    return write


@pytest.fixture
def folder(tmp_path, draw):
    """A folder per class: 10 cats, 8 dogs."""
    root = tmp_path / "pets"
    for number in range(10):
        draw(root / "cat" / f"{number}.png", seed=number)
    for number in range(8):
        draw(root / "dog" / f"{number}.jpg", seed=100 + number)
    return root


@pytest.fixture
def truncate():
    """Cut a file to its first half, as an interrupted copy does."""

    def cut(path: Path) -> Path:
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        return path

    return cut
