"""How many runs a claim still takes, counted from its studies and what lies in their folders."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from common.cli import comparing, run
from common.compare.claims import load_cards
from common.compare.outlook import outlook
from tests.common.compare.conftest import CARD


@pytest.fixture
def card(world, monkeypatch):
    """A card over the fake's study, asked for anew at each call."""
    Path("cards").mkdir()
    Path("cards/ahead.yaml").write_text(CARD)
    monkeypatch.setattr(comparing, "CLAIMS", Path("cards"))
    return lambda: load_cards(Path("cards"), [])[0]


@pytest.mark.parametrize("more", ["", "tune_seeds: [0, 2]\n"])
def test_every_run_is_counted_until_it_is_there(card, world, more):
    world.write((world.folder / "study.yaml").read_text() + more)
    before = outlook(card(), "embedded", Path("out"))
    assert world.run() == 0
    made = {(call["method"], call["lr"], call["seed"]) for call in world.calls() if call["verb"] in ("fit", "baseline")}
    assert (len(before.runs), before.lacking, before.reason) == (len(made), len(made), "")
    assert outlook(card(), "embedded", Path("out")).lacking == 0


def test_a_further_seed_counts_at_whichever_setting_it_was_run(card, world):
    assert world.run() == 0
    kept = sorted((world.out / "recipe/LoRA").glob("*-seed-1"))
    assert len(kept) == 1
    shutil.rmtree(kept[0])
    found = outlook(card(), "embedded", Path("out"))
    lost = f"{kept[0].parent.relative_to(Path.cwd())} seed 1"
    assert [name for name, there in found.runs.items() if not there] == [lost]


def test_what_cannot_be_decided_says_why(card):
    assert outlook(card(), "full", Path("out")).reason == "needs file 'weights.bin'"
    Path("study.yaml").unlink()
    assert "study.yaml" in outlook(card(), "embedded", Path("out")).reason


def test_the_list_of_claims_says_how_far_each_is(card, world, capsys):
    assert run(["reproduce"], {}) == 0
    first = capsys.readouterr().out
    assert "ahead: LoRA is ahead.\n    " in first
    total = len(outlook(card(), "embedded", Path("out")).runs)
    assert f"{total} runs, 0 of them there already" in first
    assert world.run() == 0
    assert run(["reproduce"], {}) == 0
    assert f"Together {total} runs at scale embedded, {total} of them there already" in capsys.readouterr().out
    assert run(["reproduce", "--scale", "full"], {}) == 0
    assert "    needs file 'weights.bin'\n" in capsys.readouterr().out


def test_all_claims_are_asked_with_the_nearest_first(card, world, monkeypatch):
    assert world.run() == 0
    far = CARD.replace("id: ahead", "id: aaa").replace("[study.yaml]", "[other.yaml]")
    Path("cards/aaa.yaml").write_text(far)
    Path("other.yaml").write_text(Path("study.yaml").read_text() + "\nruns: elsewhere\n")
    asked = []
    monkeypatch.setattr(
        "common.compare.reproduce.reproduce", lambda cards, *_, imports: asked.extend(card.id for card in cards) or 0
    )
    assert run(["reproduce", "--all"], {}) == 0
    assert asked == ["ahead", "aaa"]
