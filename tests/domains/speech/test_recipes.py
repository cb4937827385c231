"""Every shipped speech recipe parses through the real command line and says what it is for."""

from __future__ import annotations

from pathlib import Path

import pytest

from common._yaml import load_yaml
from domains.speech.data import SpeechData
from domains.speech.data.voices import VoiceData

ROOT = Path(__file__).parents[3]
RECIPES = sorted((ROOT / "configs" / "speech").glob("*.yaml"))


def test_there_are_recipes():
    names = {path.stem for path in RECIPES}
    assert names >= {"stamps_es", "stamps_ru", "stamps_el", "stamps_es_ctc", "own_manifest", "own_labels"}
    backbones = {load_yaml(path)["model"]["init_args"]["backbone"] for path in RECIPES}
    assert {name.rpartition("/")[2].split("-")[0] for name in backbones} == {
        "whisper",
        "wav2vec2",
        "hubert",
        "wavlm",
        "piper",
        "speecht5_tts",
        "fastspeech2_conformer",
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_what_it_is_for_and_its_command_runs(path, run_command):
    task, data = run_command(path)
    assert isinstance(data, SpeechData | VoiceData)
    assert (task.seed, data.seed) == (0, 0)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_that_was_not_run_says_so_and_names_its_source(path):
    content = load_yaml(path)
    header = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    published = "/" in content["model"]["init_args"]["backbone"]
    assert ("# Expected: not run by us" in header) == published
    assert ("arXiv " in header) == published
