"""The speech part of the demo is a study that can be read, of a recipe and methods that exist."""

from __future__ import annotations

from pathlib import Path

from common._yaml import load_yaml
from common.methods import METHODS
from domains import DOMAINS

ROOT = Path(__file__).parents[3]


def test_the_demo_names_what_there_is():
    study = load_yaml(ROOT / "configs" / "demo_speech.yaml")
    assert (ROOT / study["recipe"]).is_file()
    assert set(study["baselines"]) <= set(DOMAINS["speech"].baselines)
    assert {method["peft"]["class_path"] for method in study["methods"].values()} <= set(METHODS)
    assert "configs/demo_speech.yaml" in (ROOT / "Makefile").read_text()
