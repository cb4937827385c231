"""Recognisers of a few units with random weights, made once a session, and a folder of beeps."""

from __future__ import annotations

import pytest

from tests.domains.speech.nets import tiny_whisper
from tests.domains.speech.toy import Beeps, data_of, wave_folder


@pytest.fixture(scope="session")
def whisper(tmp_path_factory) -> str:
    """A folder with a tiny Whisper of English."""
    return tiny_whisper(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="session")
def many(tmp_path_factory) -> str:
    """A folder with a tiny Whisper of two languages."""
    return tiny_whisper(tmp_path_factory.mktemp("many"), languages=("en", "es"))


@pytest.fixture(scope="session")
def wave(tmp_path_factory) -> str:
    """A folder with a tiny wav2vec 2.0 without an output layer."""
    return wave_folder(tmp_path_factory.mktemp("wave"))


@pytest.fixture(scope="session")
def spelling(tmp_path_factory) -> str:
    """A folder with a tiny wav2vec 2.0 that has an output layer of letters."""
    return wave_folder(tmp_path_factory.mktemp("spelling"), vocabulary=" abcdefghijklmnopqrstuvwxyz")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Where the beeps lie."""
    return tmp_path_factory.mktemp("beeps")


@pytest.fixture(scope="session")
def texts(folder) -> Beeps:
    """Beeps with transcripts, set up."""
    return data_of(folder)


@pytest.fixture
def classes(folder, tmp_path, monkeypatch) -> Beeps:
    """Beeps with classes, set up."""
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    return data_of(folder, classes=True)
