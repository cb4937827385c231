"""Every shipped recipe parses through the real command line, and its method fits its backbone."""

from __future__ import annotations

import shlex
from pathlib import Path
from unittest import mock

import pytest
import timm
import yaml

from common import run as runs
from common._yaml import load_yaml
from common.attach import probe
from common.methods import METHODS
from domains.vision.data import ImageData, ImageFacts
from domains.vision.tasks import ImageClassification
from tests.domains.vision.conftest import write_recipe

ROOT = Path(__file__).parents[3]
RECIPES = sorted((ROOT / "configs" / "vision").glob("*.yaml"))


class Captured(Exception):
    """What a fit would have been given."""


@pytest.fixture
def fit(graft, monkeypatch):
    """Run `graft fit` up to the moment that training would start."""

    def capture(task, data, run, **options):
        raise Captured(task, data, run, options)

    monkeypatch.setattr(runs, "fit", capture)
    monkeypatch.chdir(ROOT)

    def call(*argv):
        with pytest.raises(Captured) as caught:
            graft("fit", *argv)
        return caught.value.args

    return call


def test_there_are_recipes():
    assert {path.stem for path in RECIPES} >= {"openclipart", "openclipart_cnn", "stars", "stars_cnn", "tuxpaint"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_what_it_is_for_and_its_command_runs(path, fit):
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# Purpose: ")
    commands = [line.removeprefix("# Command:").strip() for line in lines if line.startswith("# Command:")]
    assert len(commands) == 1
    program, verb, *argv = shlex.split(commands[0])
    assert (program, verb) == ("graft", "fit")
    assert argv[argv.index("--config") + 1] == str(path.relative_to(ROOT))
    task, data, run, options = fit(*argv)
    content = load_yaml(path)
    assert isinstance(task, ImageClassification)
    assert isinstance(data, ImageData)
    assert task.settings["backbone"] == content["model"]["init_args"]["backbone"]
    assert type(task.peft) is METHODS[content["peft"]["class_path"]]
    assert type(data).__name__ == content["data"]["class_path"]
    assert run == Path(argv[argv.index("--run") + 1])
    assert options["recipe"] == str(path.relative_to(ROOT))
    assert options["max_epochs"] == content["trainer"]["max_epochs"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_complete_configuration_parses_to_the_same_run(path, fit, tmp_path):
    task, data, _, options = fit("--config", path)
    saved = write_recipe(tmp_path / "config.yaml", yaml.safe_load(options["config"]))
    again, same, _, more = fit("--config", saved)
    assert again.settings == task.settings
    assert again.peft == task.peft
    assert again.optim == task.optim
    assert type(same) is type(data)
    assert more["config"] == options["config"]
    assert {k: v for k, v in more.items() if k != "recipe"} == {k: v for k, v in options.items() if k != "recipe"}


def test_one_seed_goes_to_task_and_data(fit):
    task, data, _, _ = fit("--config", RECIPES[0], "--seed_everything", "7")
    assert (task.seed, data.seed) == (7, 7)


def test_the_folder_is_named_after_the_recipe_where_none_is_given(fit):
    assert fit("--config", RECIPES[0])[2] == Path("runs") / RECIPES[0].stem


def test_settings_on_the_command_line_win(fit):
    task, data, _, options = fit(
        *("--config", RECIPES[0], "--peft.rank", "3", "--model.optim.lr", "3e-4"),
        *("--data.batch_size", "5", "--trainer.max_epochs", "2", "--save_every", "4"),
    )
    assert (task.peft.rank, task.optim.lr, data.batch_size) == (3, 3e-4, 5)
    assert (options["max_epochs"], options["save_every"]) == (2, 4)


@pytest.mark.parametrize("method", list(METHODS))
def test_another_method_takes_the_place_of_the_recipes(fit, method):
    task, *_ = fit("--config", ROOT / "configs/vision/openclipart.yaml", "--peft", method)
    assert type(task.peft) is METHODS[method]


def test_roles_are_narrowed_down_in_a_recipe_and_on_the_command_line(fit, tmp_path):
    wanted = ["attention@last:2", "ffn@first:1@last:1"]
    line = f"[{', '.join(wanted)}]"
    recipe = tmp_path / "narrowed.yaml"
    recipe.write_text((ROOT / "configs/vision/openclipart.yaml").read_text().replace("on: [all]", f"on: {line}"))
    assert fit("--config", recipe)[0].peft.on == wanted
    assert fit("--config", RECIPES[0], "--peft", "Houlsby", "--peft.on", line)[0].peft.on == wanted


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipes_method_lives_on_its_backbone(path, fit):
    """The real architecture, cut to two blocks where it has blocks of one kind, with random weights."""
    task, *_ = fit("--config", path, "--model.pretrained", "false")
    create = timm.create_model

    def shallow(name, **options):
        return create(name, **options, **({"depth": 2} if "vit" in name else {}))

    task.facts = ImageFacts(image_size=112, class_names=("a", "b"), name="", digest="", counts={})
    with mock.patch.object(timm, "create_model", shallow):
        task.assemble()
    probe(task.attached, lambda: task.features(task.example_batch()))
    assert 0 < sum(p.numel() for p in task.backbone.parameters() if p.requires_grad) < task.attached.base_params


BLOCK = {"class_path": "LoRA", "init_args": {"on": ["all"], "rank": 4}}


@pytest.mark.parametrize(("backbone", "roles"), [("test_vit", {"attention_qkv", "ffn_in"}), ("test_resnet", {"conv"})])
def test_the_same_block_runs_on_a_transformer_and_on_a_cnn(graft, settings, tmp_path, backbone, roles):
    settings["peft"] = BLOCK
    settings["model"]["init_args"]["backbone"] = backbone
    settings["trainer"]["max_steps"] = 1
    run = tmp_path / "run"
    graft.done("fit", "--config", write_recipe(tmp_path / "r.yaml", settings), "--run", run)
    by_role = runs.read_record(run)["cost"]["params_by_role"]
    trained = {role for role, counts in by_role.items() if counts["trainable"]}
    assert trained >= roles
    assert not trained & {"stem", "norm", "head", "other"}
