"""Every shipped speech recipe parses through the real command line and says what it is for."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from common._yaml import load_yaml
from common.methods import METHODS
from domains.speech.data import SpeechData

ROOT = Path(__file__).parents[3]
RECIPES = sorted((ROOT / "configs" / "speech").glob("*.yaml"))


def test_there_are_recipes():
    names = {path.stem for path in RECIPES}
    assert names >= {"stamps_es", "stamps_ru", "stamps_el", "stamps_es_ctc", "own_manifest", "own_labels"}
    backbones = {load_yaml(path)["model"]["init_args"]["backbone"] for path in RECIPES}
    assert {name.rpartition("/")[2].split("-")[0] for name in backbones} == {"whisper", "wav2vec2", "hubert", "wavlm"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_what_it_is_for_and_its_command_runs(path, fit):
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# Purpose: ")
    (command,) = [line.removeprefix("# Command:").strip() for line in lines if line.startswith("# Command:")]
    program, verb, *argv = shlex.split(command)
    assert (program, verb) == ("graft", "fit")
    assert argv[argv.index("--config") + 1] == str(path.relative_to(ROOT))
    task, data, run, options = fit(*argv)
    content = load_yaml(path)
    assert isinstance(data, SpeechData)
    assert type(task).__name__ == content["model"]["class_path"]
    assert task.settings["backbone"] == content["model"]["init_args"]["backbone"]
    assert type(task.peft) is METHODS[content["peft"]["class_path"]]
    assert type(data).__name__ == content["data"]["class_path"]
    assert run == Path(argv[argv.index("--run") + 1])
    assert options["max_epochs"] == content["trainer"]["max_epochs"]
    assert (task.seed, data.seed) == (0, 0)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_that_was_not_run_says_so_and_names_its_source(path):
    content = load_yaml(path)
    header = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    published = "/" in content["model"]["init_args"]["backbone"]
    assert ("# Expected: not run by us" in header) == published
    assert ("arXiv " in header) == published
