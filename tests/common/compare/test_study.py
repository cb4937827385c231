"""A study: the trials that it expands to."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from common.compare import load_studies

REPO = Path(__file__).parents[3]


def test_tuning_has_every_rate_at_one_seed_and_possible_has_every_seed(world):
    study = load_studies(Path("study.yaml"))[0]
    tuning = study.tuning()
    assert [(t.method, t.lr, t.seed) for t in tuning] == [
        ("LoRA", 3e-4, 0),
        ("LoRA", 1e-3, 0),
        ("LoRA", 3e-3, 0),
        ("FullFineTune", 1e-5, 0),
        ("FullFineTune", 5e-5, 0),
    ]
    assert len(study.possible()) == 5 * 3


def test_recipes_multiply_trials_and_have_folders_of_their_own(world):
    for name in ("a/x.yaml", "b/x.yaml", "b/y.yaml"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("{}")
    text = (world.folder / "study.yaml").read_text()
    world.write(text.replace("recipe: recipe.yaml", "recipes: [a/x.yaml, b/x.yaml, b/y.yaml]"))
    study = load_studies(Path("study.yaml"), out=Path("elsewhere"))[0]
    assert study.labels == {"a/x.yaml": "a-x", "b/x.yaml": "b-x", "b/y.yaml": "y"}
    folders = [trial.folder for trial in study.possible()]
    assert len(folders) == len(set(folders)) == 3 * 5 * 3
    assert Path("elsewhere/b-x/LoRA/lr-0.001-seed-2") in folders


def test_command_line_carries_the_trial(world):
    trial = load_studies(Path("study.yaml"))[0].tuning()[0]
    words = list(trial.fit)
    assert words[:3] == ["fit", "--config", "recipe.yaml"]
    options = dict(zip(words[1::2], words[2::2], strict=True))
    peft = {"class_path": "LoRA", "init_args": {"on": ["attention", "ffn"], "rank": 8}}
    assert json.loads(options["--peft"]) == peft
    assert float(options["--model.optim.lr"]) == 3e-4
    assert options["--seed_everything"] == "0"
    assert (options["--trainer.max_epochs"], options["--data.name"]) == ("4", "tiny")
    assert options["--run"] == "runs/small/recipe/LoRA/lr-0.0003-seed-0"


def test_overrides_of_a_method_win_and_values_keep_their_kind(world):
    study = """
title: t
question: q
recipe: recipe.yaml
overrides: {trainer.max_epochs: 4, model.on: true, model.list: [1, a], model.none: null, model.text: -x}
methods: {LoRA: {peft: {class_path: LoRA}, lr: 1.0e-3, overrides: {trainer.max_epochs: 2}}}
"""
    world.write(study)
    options = load_studies(Path("study.yaml"))[0].tuning()[0].options
    joined = " ".join(options)
    assert "--trainer.max_epochs 2" in joined
    assert "--trainer.max_epochs 4" not in joined
    assert "--model.on true" in joined
    assert '--model.list [1, "a"]' in joined
    assert "--model.none null" in joined
    assert "--model.text=-x" in options


def test_the_learning_rate_goes_where_the_method_says(world):
    text = (world.folder / "study.yaml").read_text()
    world.write(text.replace("lr: [1e-5, 5e-5]", "lr: [1e-5], lr_options: [model.optim.head_lr, model.optim.lr]"))
    words = load_studies(Path("study.yaml"))[0].tuning()[-1].options
    assert [words[words.index(f"--model.optim.{key}") + 1] for key in ("head_lr", "lr")] == ["1e-05", "1e-05"]


def test_each_weight_decay_is_tried_with_each_rate_and_a_method_without_keeps_its_folders(world):
    text = (world.folder / "study.yaml").read_text()
    world.write(text.replace("lr: [1e-5, 5e-5]", "lr: [1e-5, 5e-5], weight_decay: [0, 0.05]"))
    lora, full = load_studies(Path("study.yaml"))[0].methods
    assert [(setting.lr, setting.weight_decay) for setting in lora.settings] == [
        (3e-4, None),
        (1e-3, None),
        (3e-3, None),
    ]
    assert {(setting.lr, setting.weight_decay) for setting in full.settings} == {
        (lr, decay) for lr in (1e-5, 5e-5) for decay in (0.0, 0.05)
    }
    trials = load_studies(Path("study.yaml"))[0].tuning()
    assert len(trials) == len({trial.folder for trial in trials}) == 3 + 4
    words = trials[-1].options
    assert words[words.index("--model.optim.weight_decay") + 1] == "0.05"
    assert trials[-1].folder.name == "lr-5e-05-decay-0.05-seed-0"
    assert "--model.optim.weight_decay" not in trials[0].options
    assert trials[0].folder.name == "lr-0.0003-seed-0"


def test_baselines_have_a_trial_for_each_recipe_and_seed_without_rate_or_tuning(world):
    Path("other.yaml").write_text("{}")
    text = (
        (world.folder / "study.yaml").read_text().replace("recipe: recipe.yaml", "recipes: [recipe.yaml, other.yaml]")
    )
    world.write(text + "baselines: [Majority, Nearest]\ntune_seeds: 7\n")
    study = load_studies(Path("study.yaml"))[0]
    trials = study.untrained()
    assert [(t.recipe, t.method, t.seed) for t in trials] == [
        (recipe, name, seed)
        for recipe in ("recipe.yaml", "other.yaml")
        for name in ("Majority", "Nearest")
        for seed in (0, 1, 2)
    ]
    assert all(trial.baseline and trial.lr is None for trial in trials)
    assert not any(trial.baseline for trial in study.tuning())
    assert trials[1].folder == Path("runs/small/recipe/Majority/seed-1")
    words = "baseline Majority --config recipe.yaml --seed_everything 1 --trainer.max_epochs 4 --data.name tiny"
    assert trials[1].fit == (*words.split(), "--run", "runs/small/recipe/Majority/seed-1")
    assert set(trials) <= set(study.possible())


def test_one_baseline_needs_no_list(world):
    world.write((world.folder / "study.yaml").read_text() + "baselines: Majority\n")
    assert load_studies(Path("study.yaml"))[0].baselines == ("Majority",)


def test_further_options_take_the_seed_in_every_trial(world):
    world.write(
        (world.folder / "study.yaml").read_text() + "seed_options: [data.draw, data.fold]\nbaselines: [Nearest]\n"
    )
    for trial in load_studies(Path("study.yaml"))[0].possible():
        words = list(trial.options)
        given = [words[words.index(f"--{key}") + 1] for key in ("seed_everything", "data.draw", "data.fold")]
        assert given == [str(trial.seed)] * 3


def test_a_study_without_them_gives_the_commands_it_always_gave(world):
    """Runs that are there already are told by their command."""
    trial = load_studies(Path("study.yaml"))[0].tuning()[-1]
    words = "fit --config recipe.yaml --peft PEFT --seed_everything 0 --model.optim.lr 5e-05 --trainer.max_epochs 2"
    expected = [*words.replace("PEFT", '{"class_path":"FullFineTune"}').split(), "--data.name", "tiny"]
    assert [word.replace(" ", "") for word in trial.options] == expected


def test_reading_studies_needs_no_torch():
    code = "import common.compare, sys; sys.exit(any(m in sys.modules for m in ('torch', 'matplotlib', 'lightning')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, check=False).returncode == 0
