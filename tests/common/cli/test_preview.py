"""A preview forecasts what a run then measures, and says in a sentence when a method saves nothing."""

from __future__ import annotations

import json

import pytest
import yaml

from common.cli import run
from common.cli._forecast import Forecast, _depth, _ranges, forecasts, roles_of, shapes, verdict
from common.cost import TrainMemory
from common.errors import GraftError
from tests.toy import DOMAINS, Batch, Facts, ToyTask, spec_of

RECIPE = {
    "model": {"class_path": "tests.toy.ToyTask"},
    "data": {"class_path": "tests.toy.ToyData"},
    "peft": {"class_path": "LoRA", "init_args": {"rank": 2, "on": ["attention", "ffn@last:1"]}},
    "trainer": {"max_epochs": 1, "accelerator": "cpu", "precision": "32-true"},
}


@pytest.fixture
def call(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "300")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))

    def run_it(verb, *argv):
        code = run([verb, *(str(recipe) if value == "RECIPE" else str(value) for value in argv)], DOMAINS)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_it


def test_modules_by_role_and_depth_and_the_three_costs_are_shown(call):
    code, out, err = call("preview", "RECIPE")
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert lines[0][:3] == ["LoRA", "on", "toy,"]
    found = {line[0]: line for line in lines}
    assert found["attention_qkv"] == ["attention_qkv", "2", "2", "Linear", "1-2", "of", "2", "128", "blocks.0.qkv"]
    assert found["ffn_in"] == ["ffn_in", "1", "1", "Linear", "2", "of", "2", "48", "blocks.1.fc1"]
    assert {"LoRA", "full", "head"} <= found.keys()
    assert "of full fine-tuning" in lines[-1][0] or "LoRA" in lines[-1]


@pytest.mark.parametrize("method", ["LoRA", "BitFit"])
def test_the_forecast_is_what_a_run_measures(call, tmp_path, method):
    folder = tmp_path / "run"
    assert call("fit", "--config", "RECIPE", "--run", folder, "--peft", method)[0] == 0
    measured = json.loads((folder / "metrics.json").read_text())["cost"]
    code, out, _ = call("preview", "RECIPE", "--peft", method)
    assert code == 0
    line = next(line for line in reversed(out.splitlines()) if line.startswith(f"{method}  "))
    assert f"{measured['params_trainable']:,}" in line
    task = ToyTask(spec_of(method))
    task.facts = Facts()
    assert f"{measured['train_memory']['total'] / 1e6:,.1f} MB" in line


def test_every_byte_of_the_forecast_is_the_runs(call, tmp_path):
    from tests.toy import ToyData

    folder = tmp_path / "run"
    call("fit", "--config", "RECIPE", "--run", folder)
    measured = json.loads((folder / "metrics.json").read_text())["cost"]["train_memory"]
    task, data = ToyTask(spec_of("LoRA", on=["attention", "ffn@last:1"])), ToyData()
    task.facts = data.facts
    _, found = forecasts(task, next(iter(data.train_dataloader())), "32-true")
    assert found[0].memory.as_dict() == measured
    assert [forecast.name for forecast in found] == ["LoRA", "full fine-tuning", "head only"]
    head = found[2].memory
    assert head.gradients == 4 * (8 * 2 + 2)
    assert head.optimizer == 2 * head.gradients + 2 * 4


def test_full_fine_tuning_is_not_compared_with_itself(call):
    out = call("preview", "RECIPE", "--peft", "FullFineTune")[1]
    assert "full fine-tuning" not in out
    assert "FullFineTune" in out


def forecast(name, activations, gradients=10):
    memory = TrainMemory(weights=100_000_000, gradients=gradients, optimizer=0, activations=activations)
    return Forecast(name=name, memory=memory)


def test_the_sentence_says_what_is_saved():
    full = forecast("full fine-tuning", 300_000_000)
    said = verdict([forecast("LoRA", 100_000_000), full])
    assert said == "LoRA saves 50 % of the training memory: 200.0 MB against 400.0 MB of full fine-tuning."
    said = verdict([forecast("LoRA", 290_000_000), full])
    assert said.startswith("LoRA saves no memory on this network at this input size: 390.0 MB against 400.0 MB")
    assert "keeps no less of them" in said
    assert "keeps more of them" in verdict([forecast("LoRA", 390_000_000), full])
    assert verdict([forecast("LoRA", 1), Forecast(name="full fine-tuning", refusal="no")]) == ""


def test_a_refused_comparison_is_told_and_a_refused_method_is_an_error(call):
    code, _, err = call("preview", "RECIPE", "--peft", "ConvAdapter")
    assert code == 2
    assert "Role 'conv' matches no module of this toy backbone" in err
    code, _, err = call("preview")
    assert (code, err) == (2, "graft: Say which recipe: graft preview RECIPE. `graft list recipes` names them.\n")
    assert call("preview", "--help")[:1] == (0,)


def test_depth_is_worded_in_ranges():
    blocks = [f"blocks.{number}" for number in range(12)]
    assert _ranges([1, 2, 3, 6, 8, 9]) == "1-3, 6, 8-9"
    names = ["blocks.0.qkv", "blocks.1.qkv", "blocks.11.qkv", "blocks.110.qkv"]
    assert _depth(names[:3], blocks) == "1-2, 12 of 12"
    assert _depth(names, blocks) == "1-2, 12 of 12, outside of the blocks"
    assert _depth(["blocks.3"], blocks) == "4 of 12"


def test_shapes_are_worded_with_their_names():
    batch = ToyTask(spec_of("LoRA")).example_batch()
    assert shapes(batch) == "x 3 x 3 x 4, y 3"
    assert shapes(tuple(batch)) == "0 3 x 3 x 4, 1 3"
    assert isinstance(batch, Batch)


def test_modules_by_hand_have_the_role_custom():
    task = ToyTask(spec_of("LoRA", target_modules=["mix", "blocks.0.fc1"]))
    task.facts = Facts()
    task.assemble()
    rows = {row.role: row for row in roles_of(task.attached)}
    assert rows["stem"].kinds == "1 Conv1d"
    assert rows["ffn_in"].depth == "1 of 2"
    assert sum(row.trainable for row in rows.values()) == sum(
        p.numel() for p in task.backbone.parameters() if p.requires_grad
    )
    with pytest.raises(GraftError, match="belongs to no family"):
        spec_of("LoRA").plan(task.backbone, None)
