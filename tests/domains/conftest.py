"""What the tests of all domains' recipes share."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from common import run as runs
from common._yaml import load_yaml
from common.cli import run as graft
from common.methods import METHODS
from domains import DOMAINS

ROOT = Path(__file__).parents[2]


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
    monkeypatch.chdir(ROOT)

    def call(*argv):
        with pytest.raises(Captured):
            graft(["fit", *map(str, argv)], DOMAINS)
        return caught.pop()

    return call


@pytest.fixture
def run_command(fit):
    """Run the command in a recipe's header; return task and data, which are what the recipe says."""

    def call(path):
        lines = path.read_text().splitlines()
        assert lines[0].startswith("# Purpose: ")
        (command,) = [line.removeprefix("# Command:").strip() for line in lines if line.startswith("# Command:")]
        program, verb, *argv = shlex.split(command)
        assert (program, verb) == ("graft", "fit")
        assert argv[argv.index("--config") + 1] == str(path.relative_to(ROOT))
        task, data, run, options = fit(*argv)
        content = load_yaml(path)
        assert type(task).__name__ == content["model"]["class_path"]
        assert task.settings["backbone"] == content["model"]["init_args"]["backbone"]
        assert type(task.peft) is METHODS[content["peft"]["class_path"]]
        assert type(data).__name__ == content["data"]["class_path"]
        assert run == Path(argv[argv.index("--run") + 1])
        assert options["max_epochs"] == content["trainer"]["max_epochs"]
        return task, data

    return call
