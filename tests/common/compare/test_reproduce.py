"""Cards from file to verdict, with the fake doing the runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from common._yaml import load_yaml
from common.compare import load_studies
from common.compare.claims import READ, load_card, load_cards
from common.compare.reproduce import reproduce
from common.compare.verdicts import TESTS
from common.errors import GraftError
from tests.common.compare.conftest import BASELINES, CARD, STUDY

REPO = Path(__file__).parents[3]
FAKE = Path(__file__).with_name("fake_graft.py")
# LoRA is ahead by the same 10 points at every seed, or level.
AHEAD = {"LoRA": {"0": 0.80, "1": 0.81, "2": 0.83}, "FullFineTune": {"0": 0.70, "1": 0.71, "2": 0.72}}


@pytest.fixture
def cards(world):
    """Writes cards; returns a function that decides them."""
    world.measure(test=AHEAD)
    Path("cards").mkdir()
    Path("cards/ahead.yaml").write_text(CARD)
    turned = CARD.replace("method: LoRA, reference: FullFineTune", "method: FullFineTune, reference: LoRA")
    Path("cards/behind.yaml").write_text(turned.replace("id: ahead", "id: behind"))
    unbuilt = CARD.replace("{studies: [study.yaml], differs: small}", "{not_runnable: not built yet}")
    Path("cards/later.yaml").write_text(unbuilt.replace("id: ahead", "id: later"))

    def asked(*names, scale="embedded"):
        console, command = Console(width=100), (sys.executable, "-S", str(FAKE))
        code = reproduce(load_cards(Path("cards"), names), scale, Path("out"), 4, command=command, console=console)
        found = json.loads(Path("out/verdicts.json").read_text())
        return code, {one["card"]: one for one in found}

    return asked


def test_a_study_runs_once_for_all_cards_and_never_again(cards, world):
    code, found = cards()
    assert code == 0
    assert {card: one["verdict"] for card, one in found.items()} == {
        "ahead": "holds",
        "behind": "does not hold",
        "later": "not runnable here",
    }
    assert len([call for call in world.calls() if call["verb"] == "test"]) == 6
    one = found["ahead"]
    assert "study: LoRA is 0.103 better than FullFineTune" in one["figures"]
    assert "runs/small/recipe/LoRA/lr-0.001-seed-2" in one["runs"]
    assert len(one["runs"]) == 6
    assert one["at_an_end"] == ["study: FullFineTune (5e-05)"]  # of two; LoRA's is in the middle of three
    assert (one["environment"]["precision"], one["environment"]["runs side by side"]) == ("32-true", "4")
    assert one["commit"]
    assert one["date"].startswith("20")
    text = Path("out/verdicts.md").read_text()
    assert "**3 claims**: 1 holds, 1 does not hold, 1 not runnable here." in text
    assert "| LoRA is ahead. (`later`) | not runnable here | not built yet |" in text
    assert "- `graft 0.1.0, device cpu, precision 32-true, runs side by side 4`: ahead, behind\n" in text
    assert "- `ahead`: small" in text
    assert "a better one may lie beyond:\n\n- `ahead`: study: FullFineTune (5e-05)\n" in text
    world.forget()
    cards()
    assert world.calls() == []


def test_of_a_study_only_what_the_claim_speaks_of_is_run(cards, world):
    third = "  BitFit: {peft: {class_path: BitFit}, lr: [1.0e-3]}\nseeds:"
    world.write(STUDY.replace("seeds:", third) + BASELINES)
    _, found = cards("ahead")
    assert found["ahead"]["verdict"] == "holds"
    assert {call["method"] for call in world.calls() if "method" in call} == {"LoRA", "FullFineTune"}
    assert "BitFit" not in Path("out/embedded/ahead/study/results.csv").read_text()
    assert not (world.out / "results.csv").exists()  # the report of the whole study is its own


def test_a_study_with_none_of_the_claims_methods_is_named(cards):
    Path("cards/ahead.yaml").write_text(
        CARD.replace("method: LoRA, reference: FullFineTune", "method: SSF, reference: IA3")
    )
    _, found = cards("ahead")
    assert found["ahead"]["verdict"] == "not runnable here"
    assert (
        "Study 'study.yaml' has none of SSF, IA3, which the claim speaks of. It has LoRA, FullFineTune"
        in found["ahead"]["figures"]
    )


@pytest.mark.parametrize("where", ["stages.make_blocks", "reproduce.decide"])  # amid a study, and behind it
def test_a_reproduction_that_is_stopped_says_so_once_and_keeps_its_verdicts(cards, monkeypatch, capsys, where):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"common.compare.{where}", stopped)
    code, found = cards("later", "ahead")
    assert code == 130
    assert capsys.readouterr().out.count("Stopped. The same command goes on from here.") == 1
    assert {card: one["verdict"] for card, one in found.items()} == {"later": "not runnable here"}


def test_what_is_needed_and_not_there_is_named(cards, world):
    code, found = cards("ahead", scale="full")
    assert (code, found["ahead"]["verdict"]) == (0, "not runnable here")
    assert found["ahead"]["figures"] == "needs file 'weights.bin'"
    assert world.calls() == []
    Path("weights.bin").write_text("")
    Path("recipe.yaml").write_text("model: {class_path: M}\n")
    rates = {"LoRA": ("0.0003", "0.001", "0.003"), "FullFineTune": ("1e-05", "0.0001", "0.001")}
    world.measure(val={name: dict.fromkeys(own, 0.7) for name, own in rates.items()}, test=AHEAD)
    _, found = cards("ahead", scale="full")
    assert found["ahead"]["verdict"] == "holds"
    assert all(run.startswith("out/full/ahead/recipe/") for run in found["ahead"]["runs"])


def test_where_every_run_fails_the_first_reason_is_given(cards, world):
    rates = [("LoRA", lr) for lr in ("0.0003", "0.001", "0.003")] + [("FullFineTune", lr) for lr in ("1e-05", "5e-05")]
    world.measure(fail=[["fit", method, lr, "0"] for method, lr in rates])
    _, found = cards("ahead")
    assert found["ahead"]["verdict"] == "not runnable here"
    told = "every run failed, the first with: Traceback: the loss is <not> a number"
    assert found["ahead"]["figures"] == told


def test_a_method_without_result_leaves_it_open(cards, world):
    world.measure(test=AHEAD, fail=[["fit", "LoRA", lr, "0"] for lr in ("0.0003", "0.001", "0.003")])
    _, found = cards("ahead")
    assert (found["ahead"]["verdict"], found["ahead"]["figures"]) == ("inconclusive", "study: no result of LoRA")


def test_a_study_that_cannot_be_read_does_not_end_the_others(cards):
    Path("cards/broken.yaml").write_text(
        CARD.replace("id: ahead", "id: broken").replace("studies: [study.yaml]", "studies: [gone.yaml]")
    )
    code, found = cards("broken", "ahead")
    assert code == 0
    assert found["broken"]["verdict"] == "not runnable here"
    assert "gone.yaml" in found["broken"]["figures"]
    assert found["ahead"]["verdict"] == "holds"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("id: ahead", "id: other", "Name card and file alike"),
        ("read: page", "read: memory", "Unknown way that a figure is known (read) 'memory'"),
        ("figure: 1.0 against 0.5, ", "", "lacks figure"),
        ("statement: LoRA is ahead.", "", "lacks statement"),
        ("studies: [study.yaml], ", "", "needs either studies or recipes"),
        ("methods: [LoRA, FullFineTune], ", "", "recipes without methods"),
        ("ahead_of:", "before:", "unknown test 'before'"),
        ("tests: [", "test: [", "unknown key 'test'"),
    ],
)
def test_one_wrong_thing_in_a_card_is_named(tmp_path, old, new, words):
    assert old in CARD
    (tmp_path / "ahead.yaml").write_text(CARD.replace(old, new))
    with pytest.raises(GraftError) as error:
        load_card(tmp_path / "ahead.yaml")
    assert words in str(error.value)


def test_a_study_that_no_test_looks_into_is_named(tmp_path):
    card = CARD.replace("reference: FullFineTune}", "reference: FullFineTune, on: [study]}", 1)
    (tmp_path / "ahead.yaml").write_text(card)
    assert load_card(tmp_path / "ahead.yaml").scales["embedded"].studies == ("study.yaml",)
    (tmp_path / "ahead.yaml").write_text(card.replace("[study.yaml]", "[study.yaml, more.yaml]"))
    with pytest.raises(GraftError, match=r"no test looks into the study 'more\.yaml'"):
        load_card(tmp_path / "ahead.yaml")


def test_an_unknown_card_is_named(tmp_path):
    (tmp_path / "ahead.yaml").write_text(CARD)
    with pytest.raises(GraftError, match=r"Unknown card 'ahed'\. Did you mean 'ahead'"):
        load_cards(tmp_path, ["ahed"])


def test_the_folders_page_explains_every_test():
    page = (REPO / "configs" / "claims" / "README.md").read_text()
    for name, known in TESTS.items():
        assert f"| `{name}: {{" in page
        assert all(word in page for word in (*known.must, *known.may))


SHIPPED = sorted((REPO / "configs" / "claims").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_cards_are_whole(path, monkeypatch):
    """Their studies and recipes are there, with the methods, baselines and sets that the tests name."""
    monkeypatch.chdir(REPO)
    card = load_card(path)
    assert card.read in READ
    for scale in (one for one in card.scales.values() if not one.not_runnable):
        assert all(Path(recipe).is_file() for recipe in scale.recipes)
        studies = {Path(study).stem: load_studies(Path(study))[0] for study in scale.studies}
        for test in scale.tests:
            assert set(test.on) <= set(studies)
            if scale.recipes:
                assert set(test.methods) <= set(scale.methods)
            for label in test.on or studies:
                known = {method.name for method in studies[label].methods} | set(studies[label].baselines)
                assert set(test.methods) <= known


@pytest.mark.parametrize(
    "path", sorted((REPO / "configs" / "claims" / "studies").glob("*.yaml")), ids=lambda path: path.stem
)
def test_studies_of_claims_share_runs_with_the_studies_that_they_extend(path, monkeypatch):
    """A method of the same name in both has the same commands, so that nothing is run twice."""
    monkeypatch.chdir(REPO)
    own = load_studies(path)[0]
    assert f"graft compare {path.relative_to(REPO).as_posix()}" in path.read_text()
    if own.runs == own.out:
        return
    folders = (path.parent, REPO / "configs" / "studies")
    base = load_studies(next(file for one in folders if (file := one / f"{own.runs.name}.yaml").is_file()))[0]
    assert base.runs == own.runs
    theirs = {trial.folder: trial.options for trial in base.possible()}
    shared = [trial for trial in own.possible() if trial.folder in theirs]
    assert shared
    assert all(trial.options == theirs[trial.folder] for trial in shared)
    assert load_yaml(path)["runs"] == base.out.as_posix()
