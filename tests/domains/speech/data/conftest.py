"""Tones as clips, for the tests of the speech sets."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile


def tone(pitch: float = 440.0, seconds: float = 0.5, rate: int = 16_000) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


@pytest.fixture
def clip(tmp_path):
    """Write a tone and return its name."""

    def write(name: str, pitch: float = 440.0, seconds: float = 0.5, rate: int = 16_000) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, tone(pitch, seconds, rate), rate)
        return name

    return write


@pytest.fixture
def table(tmp_path):
    """Write lines as a table and return its path."""

    def write(*lines: str, name: str = "clips.csv") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(path)

    return write


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch, request):
    """An empty cache, but for tests of the real artifacts."""
    if "artifacts" not in request.keywords:
        monkeypatch.setenv("GRAFT_CACHE", str(tmp_path_factory.mktemp("cache")))
