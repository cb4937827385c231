"""`graft compare` on recipes: what the options become, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.cli import comparing, run
from common.compare.expand import Shots
from common.domain import Domain

FEWER = """
class Base:
    def __init__(self, shots=None, seed=0): ...
class Toys(Base):
    def __init__(self, size=3, **kwargs): ...
class Slices:
    def __init__(self, labelled=4): ...
class Whole:
    pass
"""
DOMAINS = {"toy": Domain(name="toy", summary="", data={name: "fewer" for name in ("Toys", "Slices", "Whole")})}


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Notes the studies that would have run."""
    found = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("fewer.py").write_text(FEWER)
    Path("a.yaml").write_text("model: {class_path: M}\ndata: {class_path: Toys}\n")
    monkeypatch.setattr(
        "common.compare.run_studies", lambda studies, jobs, options: (found.extend(studies), (0, []))[1]
    )
    return found


def test_options_become_studies(started):
    words = (
        "compare a.yaml --methods LoRA,BitFit --seeds 2 --rates 1e-3 --shots 1,all --set trainer.max_epochs=2 --out o"
        " --weight-decays 0,0.1"
    )
    assert run(words.split(), DOMAINS) == 0
    first, second = started
    assert [method.name for method in first.methods] == ["LoRA", "BitFit"]
    assert [setting.weight_decay for setting in first.methods[1].settings] == [0, 0.1]
    assert (first.seeds, first.methods[0].lrs, first.out) == ((0, 1), (1e-3,), Path("o"))
    assert first.overrides == {"trainer.max_epochs": "2", "data.shots": 1}
    assert second.overrides["data.shots"] is None


def test_methods_with_a_size_meet_the_budget_and_the_others_run_as_they_are(started, capsys):
    assert run("compare a.yaml --methods LoRA,FishMask,FullFineTune --rates 1e-3 --budget 0.3%".split(), DOMAINS) == 0
    (study,) = started
    assert [method.name for method in study.methods] == ["LoRA-0.3percent", "FishMask-0.3percent", "FullFineTune"]
    assert "FullFineTune: without a size" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "expected"),
    [("Toys", Shots(counts="shots", whole=True)), ("Slices", Shots(counts="labelled")), ("fewer.Whole", Shots())],
)
def test_the_datas_own_option_is_found_in_its_class_or_its_bases(started, name, expected):
    assert comparing._shots_of(name, DOMAINS) == expected


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("a.yaml b.yaml", "Several files without --methods"),
        ("a.yaml --seeds 2 --shots 1", "--seeds, --shots without --methods"),
        ("a.yaml --weight-decays 0", "--weight-decays without --methods"),
        ("a.yaml --budget 1%", "--budget without --methods"),
        ("a.yaml --methods LoRA --budget 0.01", "--budget 0.01 is not understood"),
        ("a.yaml --methods BitFit,NormTuning --budget 1%", "none of BitFit, NormTuning has a size. Give one that has"),
        ("a.yaml --methods Lora", "Unknown method 'Lora'. Did you mean 'LoRA'?"),
        ("a.yaml --methods LoRA,LoRA", "names a method twice or none"),
        ("a.yaml --methods LoRA --set epochs", "--set epochs is not understood"),
        ("b.yaml --methods LoRA", "No such recipe: b.yaml"),
    ],
)
def test_what_does_not_fit_together_is_refused(started, capsys, words, told):
    assert run(["compare", *words.split()], DOMAINS) == 2
    assert told in capsys.readouterr().err
    assert not started


def test_claims_are_listed_or_decided(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(
        "common.compare.reproduce.reproduce", lambda *words, imports: asked.append((*words, imports)) or 0
    )
    assert run(["reproduce"], {}) == 0
    assert "lora-within-a-point: LoRA comes within a point" in capsys.readouterr().out
    assert not asked
    assert run(["reproduce", "lora-within-a-point", "--jobs", "2", "--out", "o"], {}) == 0
    assert [(words[0][0].id, *words[1:]) for words in asked] == [("lora-within-a-point", "embedded", Path("o"), 2, ())]
    assert run(["reproduce", "--all", "--scale", "full"], DOMAINS) == 0
    assert len(asked[1][0]) == len(list(comparing.CLAIMS.glob("*.yaml")))
    assert asked[1][-1] == ("fewer",)


def test_runner_and_parquet_are_asked_for_by_options(started, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "common.compare.run_studies", lambda studies, jobs, options: (asked.append(options), (0, []))[1]
    )
    assert run("compare a.yaml --methods LoRA".split(), DOMAINS) == 0
    assert run("compare a.yaml --methods LoRA --runner ray --parquet".split(), DOMAINS) == 0
    assert [(one.runner, one.parquet) for one in asked] == [("local", False), ("ray", True)]
    assert asked[0].imports == ("fewer",)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("nothing", "Unknown card 'nothing'"),
        ("--all --scale big", "Unknown scale 'big'. Allowed: embedded, full."),
        ("--all lora-within-a-point", "Claims and --all"),
    ],
)
def test_claims_that_cannot_be_asked_are_refused(capsys, words, told):
    assert run(["reproduce", *words.split()], {}) == 2
    assert told in capsys.readouterr().err
