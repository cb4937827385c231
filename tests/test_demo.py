"""The demonstration: one comparison over all domains, of recipes, methods and baselines that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from common.compare import load_studies
from common.methods import METHODS
from domains import DOMAINS

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def studies(monkeypatch):
    monkeypatch.chdir(ROOT)
    return load_studies(Path("configs/demo.yaml"))


def test_it_is_one_comparison_over_all_domains(studies):
    target = re.search(r"^demo:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), flags=re.M)[1]
    assert target.split()[1:] == ["compare", "configs/demo.yaml"]
    assert {Path(study.recipes[0]).parent.name for study in studies} == set(DOMAINS)


def test_each_part_names_what_there_is_and_compares_with_full_fine_tuning(studies):
    for study in studies:
        domain = DOMAINS[Path(study.recipes[0]).parent.name]
        assert set(study.baselines) <= set(domain.baselines)
        classes = [method.peft["class_path"] for method in study.methods]
        assert set(classes) <= set(METHODS)
        assert {"LoRA", "FullFineTune"} <= set(classes)
