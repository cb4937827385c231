"""What the tests of all domains' recipes share."""

from __future__ import annotations

from pathlib import Path

import pytest

from common import run as runs
from common.cli import run as graft
from domains import DOMAINS


class Captured(Exception):
    """What a fit would have been given."""


@pytest.fixture
def fit(monkeypatch):
    """Run `graft fit` at the repository's root up to the moment that training would start."""
    caught = []

    def capture(task, data, run, **options):
        caught.append((task, data, run, options))
        raise Captured

    monkeypatch.setattr(runs, "fit", capture)
    monkeypatch.chdir(Path(__file__).parents[2])

    def call(*argv):
        with pytest.raises(Captured):
            graft(["fit", *map(str, argv)], DOMAINS)
        return caught.pop()

    return call
