"""The study file: its parts, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.compare import load_studies
from common.errors import GraftError

REPO = Path(__file__).parents[3]
PARTS = """
title: Two sets
question: Which is better?
out: runs/small
seeds: [0, 1]
overrides: {trainer.max_epochs: 4, data.name: tiny}
methods:
  LoRA: {peft: {class_path: LoRA}, lr: [1e-3]}
  FullFineTune: {peft: {class_path: FullFineTune}, lr: [5e-5]}
parts:
  easy:
    recipe: recipe.yaml
  hard:
    title: A harder set
    question: And here?
    recipe: recipe.yaml
    overrides: {data.name: big}
    baselines: [Majority]
    methods:
      LoRA: {peft: {class_path: LoRA}, lr: [1e-3, 3e-3]}
    seeds: [2]
"""


def test_a_part_says_what_is_its_own_and_has_the_rest_from_the_file(world):
    world.write(PARTS)
    easy, hard = load_studies(Path("study.yaml"))
    assert [method.name for method in easy.methods] == ["LoRA", "FullFineTune"]
    assert [method.lrs for method in hard.methods] == [(1e-3, 3e-3)]
    assert (easy.seeds, hard.seeds, hard.tune_seeds) == ((0, 1), (2,), (2,))
    assert (easy.baselines, hard.baselines) == ((), ("Majority",))
    assert easy.overrides == {"trainer.max_epochs": 4, "data.name": "tiny"}
    assert hard.overrides == {"trainer.max_epochs": 4, "data.name": "big"}
    assert easy.title == hard.title == "Two sets"
    assert (easy.part.title, easy.part.question) == ("easy", "")
    assert (hard.part.title, hard.part.question) == ("A harder set", "And here?")
    assert hard.tuning()[0].folder == Path("runs/small/hard/LoRA/lr-0.001-seed-2")
    assert not {trial.folder for trial in easy.possible()} & {trial.folder for trial in hard.possible()}


def test_a_part_has_the_trials_of_the_study_that_it_would_be_alone(world):
    text = (world.folder / "study.yaml").read_text()
    (alone,) = load_studies(Path("study.yaml"))
    lines = text.strip().splitlines()
    own = [f"    {line}" for line in lines if not line.startswith("out:")]
    world.write("\n".join(["title: t", "question: q", "parts:", "  one:", *own]))
    (part,) = load_studies(Path("study.yaml"))
    assert [trial.options for trial in part.possible()] == [trial.options for trial in alone.possible()]


def test_a_part_of_several_recipes_has_a_label_for_each(world):
    Path("other.yaml").write_text("{}")
    world.write(PARTS.replace("    recipe: recipe.yaml\n  hard", "    recipes: [recipe.yaml, other.yaml]\n  hard"))
    easy, hard = load_studies(Path("study.yaml"))
    assert easy.labels == {"recipe.yaml": "easy-recipe", "other.yaml": "easy-other"}
    assert hard.labels == {"recipe.yaml": "hard"}


def test_problems_of_a_part_are_named_with_it(world):
    text = PARTS.replace("lr: [1e-3, 3e-3]", "lr: [0]").replace("baselines:", "baseline:")
    world.write(text.replace("    question: And here?", "    question: 3\n    out: x").replace("  easy:", "  e/y:"))
    with pytest.raises(GraftError) as error:
        load_studies(Path("study.yaml"))
    for words in (
        "part 'hard': lr of method 'LoRA' is [0]",
        "part 'hard' has an unknown key 'baseline'. Did you mean 'baselines'?",
        "part 'hard' has an unknown key 'out'",
        "question of part 'hard' is 3",
        "part 'e/y' cannot name a folder",
    ):
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (PARTS[PARTS.index("parts:") :], "parts: []", "parts is []"),
        ("  hard:\n", "  easy-recipe:\n", "share the folder names"),
        ("    overrides: {data.name: big}", "    overrides: [big]", "part 'hard': overrides is [\"big\"]"),
        ("overrides: {trainer.max_epochs: 4, data.name: tiny}", "overrides: 3", "part 'hard': overrides is 3"),
        ("  easy:\n    recipe: recipe.yaml", "  easy:\n    title: Easy", "part 'easy': give either recipe"),
    ],
)
def test_one_wrong_thing_in_parts_is_named(world, old, new, words):
    Path("other.yaml").write_text("{}")
    assert old in PARTS
    text = PARTS.replace(old, new)
    if "easy-recipe" in new:
        text = text.replace("    recipe: recipe.yaml\n  easy-", "    recipes: [recipe.yaml, other.yaml]\n  easy-")
    world.write(text)
    with pytest.raises(GraftError) as error:
        load_studies(Path("study.yaml"))
    assert words in str(error.value)


def test_parts_make_one_report_with_a_section_each(world):
    world.write(PARTS.replace("[1e-3, 3e-3]", "[1e-3]"))
    world.measure(
        val={"LoRA": {"0.001": 0.7}, "FullFineTune": {"5e-05": 0.6}, "Majority": 0.2},
        test={"LoRA": {"0": 0.7, "1": 0.8, "2": 0.3}, "FullFineTune": {"0": 0.5, "1": 0.6}, "Majority": {"2": 0.2}},
        digests={"0": "a", "1": "b", "2": "c"},
    )
    assert world.run() == 0
    report = (world.out / "report.html").read_text()
    short = report[report.index("In short") : report.index("Quality and cost")]
    assert "<b>easy.</b> LoRA has the highest test accuracy: 0.750" in short
    assert "<b>A harder set.</b> Of the trained methods, LoRA has the highest test accuracy: 0.300" in short
    assert report.index('<a href="#set1">A harder set</a>') < report.index('<h2 id="set1">A harder set</h2>')
    assert "And here?" in report
    assert "**A harder set** (`recipe.yaml`, hard)" in (world.out / "results.md").read_text()


def test_parts_of_one_recipe_need_not_share_their_test_examples(world):
    """Their overrides may choose other data; amounts of training data on one recipe must share them."""
    world.write(PARTS.replace("seeds: [2]", "seeds: [0]").replace("[1e-3, 3e-3]", "[1e-3]"))
    world.measure(
        val={"LoRA": {"0.001": 0.7}, "FullFineTune": {"5e-05": 0.6}, "Majority": 0.2},
        test={"LoRA": {"0": 0.7, "1": 0.8}, "FullFineTune": {"0": 0.5, "1": 0.6}, "Majority": {"0": 0.2}},
        named_splits=True,
    )
    assert world.run() == 0, world.output
    splits = {
        json.loads(path.read_text())["data"]["splits"]["test"] for path in world.out.glob("*/LoRA/*-0/metrics.json")
    }
    assert splits == {"tiny", "big"}


def test_all_problems_are_reported_at_once_with_the_nearest_name(world):
    world.write("""
title: 3
question: q
recipe: missing.yaml
seed: [0]
overrides: {--x: 1, model.optim.lr: 2, run: here}
methods:
  LoRA: {peft: {class_path: LoRA, init: {}}, lr: [0, 1]}
  a/b: {pefts: {}, lr: yes}
tune_seeds: [1, 1]
""")
    with pytest.raises(GraftError) as error:
        load_studies(Path("study.yaml"))
    text = str(error.value)
    for words in (
        "title is 3",
        "'missing.yaml' is not a file",
        "unknown key 'seed'. Did you mean 'seeds'?",
        '"--x"',
        "overrides of method 'LoRA' set 'model.optim.lr'",
        "sets 'run'",
        "unknown key 'init'. Did you mean 'init_args'?",
        "lr of method 'LoRA' is [0, 1]",
        "method 'a/b' cannot name a folder",
        "unknown key 'pefts'. Did you mean 'peft'?",
        "lr of method 'a/b' is \"yes\"",
        "tune_seeds is [1, 1]",
    ):
        assert words in text
    assert ".." not in text


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("recipe: recipe.yaml", "", "either recipe"),
        ("recipe: recipe.yaml", "recipes: []", "recipes is []"),
        ("recipe: recipe.yaml", "recipes: [recipe.yaml, recipe.yaml]", "listed twice"),
        ("seeds: [0, 1, 2]", "seeds: [0, 0]", "give each number once"),
        ("seeds: [0, 1, 2]", "seeds: [true]", "seeds is [true]"),
        ("lr: [1e-5, 5e-5]", "lr: [1e-5, 1.0e-5]", "give each number once"),
        ("lr: [1e-5, 5e-5]", "lr: [.inf]", "numbers above 0"),
        ("lr: [1e-5, 5e-5]", "lr: 1e-5, weight_decay: [-1]", "weight_decay of method 'FullFineTune' is [-1]"),
        ("lr: [1e-5, 5e-5]", "lr: 1e-5, weight_decay: [0, 0.0]", "give each number once"),
        ("{trainer.max_epochs: 2}}", "{model.optim.weight_decay: 0}, weight_decay: 0}", "gives weight_decay and sets"),
        ("lr: [1e-5, 5e-5]", "lr: 1e-5, lr_options: [--lr]", "lr_options of method"),
        ("out: runs/small", "out: 3", "out is 3"),
        ("  FullFineTune:", "  LoRA:", "'LoRA' is given twice"),
        ("question: Does it work?", "", "question is null"),
        ("seeds:", "baselines: [LoRA]\nseeds:", "'LoRA' is a baseline and a method"),
        ("seeds:", "baselines: [A, A]\nseeds:", "baseline 'A' is listed twice"),
        ("seeds:", "baselines: [a/b]\nseeds:", "baseline 'a/b' cannot name a folder"),
        ("seeds:", "baselines: [null]\nseeds:", "baselines is [null]"),
        ("seeds:", "baseline: [A]\nseeds:", "Did you mean 'baselines'?"),
        ("seeds:", "seed_options: [--data.draw]\nseeds:", 'seed_options is ["--data.draw"]'),
        ("seeds:", "seed_options: [3]\nseeds:", "seed_options is [3]"),
        ("seeds:", "seed_options: [data.draw, data.draw]\nseeds:", "'data.draw' twice"),
        ("seeds:", "seed_options: [seed_everything]\nseeds:", "seed_options has 'seed_everything'"),
        ("seeds:", "seed_options: [peft.rank]\nseeds:", "seed_options has 'peft.rank'"),
        (
            "seeds:",
            "seed_options: [data.name]\nseeds:",
            "overrides of method 'LoRA' set 'data.name', which takes the seed",
        ),
        ("seeds:", "metric: [a, b]\nseeds:", 'metric is ["a", "b"]: give the name of one metric'),
        ("seeds:", "seed_options: [model.optim.lr]\nseeds:", "lr_options of method 'LoRA' has 'model.optim.lr'"),
    ],
)
def test_one_wrong_thing_is_named(world, old, new, words):
    text = (world.folder / "study.yaml").read_text()
    assert old in text
    world.write(text.replace(old, new))
    with pytest.raises(GraftError, match=r"(?s).*") as error:
        load_studies(Path("study.yaml"))
    assert words in str(error.value)


@pytest.mark.parametrize(
    "path", [REPO / "configs/demo.yaml", *sorted(REPO.glob("configs/studies/*.yaml"))], ids=lambda path: path.stem
)
def test_shipped_studies_are_whole(path, monkeypatch):
    monkeypatch.chdir(REPO)
    studies = load_studies(path)
    assert all(len(study.methods) > 1 for study in studies)
    assert f"graft compare {path.relative_to(REPO).as_posix()}" in path.read_text()


def test_a_budget_is_of_every_method_that_does_not_say_otherwise(world):
    text = PARTS.replace(
        "overrides: {trainer.max_epochs: 4", "budget: [0.003, 0.01]\noverrides: {trainer.max_epochs: 4"
    )
    text = text.replace("lr: [5e-5]}", "lr: [5e-5], budget: []}").replace(
        "    seeds: [2]", "    budget: 0.02\n    seeds: [2]"
    )
    world.write(text)
    easy, hard = load_studies(Path("study.yaml"))
    assert [method.name for method in easy.methods] == ["LoRA-0.3percent", "LoRA-1percent", "FullFineTune"]
    assert [method.peft["init_args"]["share"] for method in easy.methods[:2]] == [0.003, 0.01]
    assert easy.methods[2].peft == {"class_path": "FullFineTune"}
    assert [method.name for method in hard.methods] == ["LoRA-2percent"]
    assert hard.methods[0].lrs == (1e-3, 3e-3)


@pytest.mark.parametrize("budget", ["0", "1", "some", "[[0.1]]", "null", "true"])
def test_a_budget_that_is_no_share_is_named(world, budget):
    world.write(PARTS.replace("seeds: [0, 1]", f"seeds: [0, 1]\nbudget: {budget}", 1))
    with pytest.raises(GraftError, match=r"budget is .*: give shares of the backbone's parameters"):
        load_studies(Path("study.yaml"))
    world.write(PARTS.replace("lr: [5e-5]}", f"lr: [5e-5], budget: {budget}}}"))
    with pytest.raises(GraftError, match="budget of method 'FullFineTune' is"):
        load_studies(Path("study.yaml"))


def test_a_budget_that_is_given_twice_is_named(world):
    world.write(PARTS.replace("seeds: [0, 1]", "seeds: [0, 1]\nbudget: [0.1, 0.1]", 1))
    with pytest.raises(GraftError, match=r"budget is \[0\.1, 0\.1\]: give each number once"):
        load_studies(Path("study.yaml"))
    world.write(PARTS.replace("lr: [5e-5]}", "lr: [5e-5], budget: [0.1, 0.1]}"))
    with pytest.raises(GraftError, match=r"budget of method 'FullFineTune' is \[0\.1, 0\.1\]: give each number once"):
        load_studies(Path("study.yaml"))


def test_a_method_that_is_called_as_a_budget_calls_another_is_named(world):
    text = PARTS.replace("  FullFineTune:", "  LoRA-1percent:").replace("lr: [5e-5]}", "lr: [5e-5], budget: []}")
    world.write(text)
    assert len(load_studies(Path("study.yaml"))[0].methods) == 2
    world.write(text.replace("seeds: [0, 1]", "seeds: [0, 1]\nbudget: 0.01", 1))
    with pytest.raises(GraftError, match="part 'easy': 2 methods are called 'LoRA-1percent'"):
        load_studies(Path("study.yaml"))
