"""A vision run from the recipe to the merged weights, through the real command line."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from common.methods import SSF
from domains.__main__ import main
from domains.vision.tasks import ImageClassification
from tests.domains.vision.conftest import CLASSES, SIZE

ROOT = Path(__file__).parents[3]


# ---- the whole way


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_goes_from_fit_to_merged_weights(graft, recipe, pictures, tmp_path):
    run, adapter, merged, table = (tmp_path / name for name in ("run", "adapter", "merged", "table.csv"))

    said = graft.done("fit", "--config", recipe, "--run", run, "--trainer.max_epochs", "8").out
    record = json.loads((run / "metrics.json").read_text())
    assert said.startswith(f"{run}: val  ")
    assert f"accuracy {record['val']['accuracy']:.4f}" in said
    assert record["test"] is None
    assert record["val"]["accuracy"] >= 0.9, "colours are easy: something does not learn"

    validated = graft.done("validate", "--run", run).out
    assert validated.splitlines()[0] == said.splitlines()[0]

    tested = graft.done("test", "--run", run).out
    record = json.loads((run / "metrics.json").read_text())
    assert tested.startswith(f"{run}: test  ")
    rows = lines(run / "predictions.jsonl")
    assert len(rows) == record["data"]["test"]
    assert all(Path(row["path"]).is_file() and row["id"].startswith(f"{row['label']}/") for row in rows)
    right = sum(row["label"] == row["prediction"] for row in rows)
    assert record["test"]["accuracy"] == pytest.approx(right / len(rows))

    assert "reloads within" in graft.done("export", run, adapter).out
    graft.done("predict", "--adapter", adapter, "--out", table, pictures)
    with table.open(newline="") as file:
        predicted = {row["path"]: row for row in csv.DictReader(file)}
    assert len(predicted) == 30
    for row in rows:
        assert predicted[row["path"]]["prediction"] == row["prediction"]
        assert float(predicted[row["path"]]["probability"]) == pytest.approx(row["probability"], abs=1e-4)

    assert "plain weights" in graft.done("merge", adapter, merged).out
    model = timm.create_model("test_vit", num_classes=0, img_size=SIZE)
    model.load_state_dict(load_file(merged / "model.safetensors"), strict=True)


def test_the_record_says_what_was_run_and_what_it_cost(trained, finished, settings):
    record = json.loads((finished / "metrics.json").read_text())
    assert {key: record[key] for key in ("schema", "domain", "task", "backbone", "seed", "status")} == {
        "schema": 1,
        "domain": "vision",
        "task": "ImageClassification",
        "backbone": "test_vit",
        "seed": 0,
        "status": "fitted",
    }
    assert record["recipe"] == str(trained.parent / "recipe.yaml")
    assert record["method"]["class_path"] == "LoRA"
    assert record["method"]["init_args"]["rank"] == 4
    assert record["optim"]["head_lr"] == settings["model"]["init_args"]["optim"]["head_lr"]
    assert record["primary"] == {"name": "accuracy", "mode": "max"}
    assert set(record["val"]) == {"loss", "accuracy", "macro_f1", "ece"}
    data = record["data"]
    assert sum(data[split] for split in ("train", "val", "test")) == 30
    assert data["classes"] == list(CLASSES)
    assert len(data["digest"]) == 64
    assert data["skipped"] == 0
    assert {"graft", "torch", "device", "threads", "precision"} <= set(record["environment"])
    assert record["environment"]["precision"] == "32-true"

    cost = record["cost"]
    width, blocks, rank = 64, 6, 4
    adapter = blocks * (rank * (width + 3 * width) + rank * (width + width))
    head = len(CLASSES) * (width + 1)
    assert cost["params_trainable_backbone"] == adapter
    assert cost["params_trainable_head"] == head
    assert cost["params_trainable"] == adapter + head
    bare = timm.create_model("test_vit", num_classes=0, img_size=SIZE)
    assert cost["params_total"] == sum(p.numel() for p in bare.parameters()) + head
    assert cost["trainable_percent"] == pytest.approx(100 * cost["params_trainable"] / cost["params_total"])
    assert sum(counts["trainable"] for counts in cost["params_by_role"].values()) == adapter
    memory = cost["train_memory"]
    assert memory["gradients"] == 4 * cost["params_trainable"]
    assert memory["optimizer"] >= 8 * cost["params_trainable"]
    assert memory["weights"] >= 4 * (cost["params_total"] + adapter)
    assert memory["total"] == sum(memory[part] for part in ("weights", "gradients", "optimizer", "activations"))
    assert cost["batch_size"] == 8
    assert cost["steps"] == 2 * -(-data["train"] // 8)
    assert cost["flops_per_step"] > 0
    assert 0 < cost["step_seconds"] < cost["fit_seconds"]
    assert cost["adapter_bytes"] > 4 * adapter
    assert cost["head_bytes"] > 4 * head
    assert cost["peak_cuda_bytes"] is None or torch.cuda.is_available()


def test_the_saved_configuration_repeats_the_run(graft, finished, tmp_path):
    graft.done("fit", "--config", finished / "config.yaml", "--run", tmp_path / "again")
    first, second = (json.loads((run / "metrics.json").read_text()) for run in (finished, tmp_path / "again"))
    assert first["val"] == second["val"]
    for key in ("method", "optim", "settings", "base_digest", "data"):
        assert first[key] == second[key], key


def test_another_seed_is_another_run(graft, recipe, finished, tmp_path):
    graft.done(
        *("fit", "--config", recipe, "--run", tmp_path / "other", "--trainer.max_epochs", "2", "--seed_everything", "5")
    )
    first, second = (json.loads((run / "metrics.json").read_text()) for run in (finished, tmp_path / "other"))
    assert second["seed"] == 5
    assert first["val"] != second["val"]
    assert first["data"]["digest"] == second["data"]["digest"]


# ---- interruption


def interrupt_at(monkeypatch, step):
    original = ImageClassification.training_step

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == step:
            raise KeyboardInterrupt
        return original(self, batch, batch_idx)

    monkeypatch.setattr(ImageClassification, "training_step", training_step)


@pytest.fixture
def interruptible():
    """Lightning leaves SIGINT ignored behind; give it back."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize("advice", ["recipe", "folder"])
@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(graft, recipe, finished, tmp_path, advice):
    run = tmp_path / "cut"
    start = ("--config", recipe, "--run", run, "--trainer.max_epochs", "2", "--save_every", "1")
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 4)
        outcome = graft("fit", *start)
    assert outcome.code == 130
    assert outcome.err.splitlines()[-1] == "graft: interrupted"
    assert (run / "last.ckpt").exists()
    assert not (run / "metrics.json").exists()

    unfinished = graft.refused("test", "--run", run)
    assert (
        unfinished == f"{run} has no metrics.json: not a finished run. Finish it with `graft fit --run {run} --resume`."
    )
    assert graft.refused("export", run, tmp_path / "out") == unfinished
    assert "already holds a run. Add --resume" in graft.refused("fit", *start)

    # Both the whole command and what the message advises.
    graft.done("fit", *(start if advice == "recipe" else ("--run", run)), "--resume")
    first, second = (json.loads((folder / "metrics.json").read_text()) for folder in (finished, run))
    assert first["val"] == second["val"]
    assert first["cost"]["steps"] == second["cost"]["steps"]
    states = [torch.load(folder / "last.ckpt", weights_only=True)["state_dict"] for folder in (finished, run)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    graft.done("test", f"--run={run}")


def test_resuming_without_a_checkpoint_starts(graft, recipe, tmp_path):
    graft.done("fit", "--config", recipe, "--run", tmp_path / "run", "--resume", "--trainer.max_steps", "1")
    assert "config.yaml is missing" in graft.refused("fit", "--run", tmp_path / "nowhere", "--resume")


def test_resuming_a_finished_run_changes_nothing(graft, finished):
    graft.done("test", "--run", finished)
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    graft.done("fit", "--run", finished, "--resume")
    assert (finished / "metrics.json").read_bytes() == before["metrics.json"]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        (["--model.backbone", "test_vit2"], "test_vit2"),
        (["--peft.rank", "2"], "rank"),
        (["--peft", "BitFit"], "BitFit"),
        (["--seed_everything", "1"], "seed is 1"),
        (["--data.image_size", "48"], "48"),
        (["--model.optim.lr", "0.1"], "0.1"),
    ],
)
def test_another_configuration_cannot_resume_or_test_a_run(graft, recipe, finished, changes, what):
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    message = graft.refused(
        "fit", "--config", recipe, "--run", finished, "--trainer.max_epochs=3", "--resume", *changes
    )
    assert "belongs to another run" in message
    assert what in message
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before
    assert "belongs to another run" in graft.refused("test", "--run", finished, *changes)
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


@pytest.mark.parametrize("given", ["SSF", "{class_path: common.methods.SSF}", '{"class_path": "SSF", "init_args": {}}'])
def test_a_method_of_the_command_line_takes_nothing_from_the_recipes(graft, recipe, tmp_path, given):
    """Both have `on`, which the recipe's LoRA narrows down."""
    run = tmp_path / "run"
    graft.done("fit", "--config", recipe, "--run", run, "--peft", "LoRA", "--peft.on", "[attention]", f"--peft={given}")
    assert json.loads((run / "metrics.json").read_text())["method"] == SSF().describe()
    graft.done("fit", "--config", recipe, "--run", tmp_path / "own", f"--peft={given}", "--peft.on", "[norm]")
    record = json.loads((tmp_path / "own" / "metrics.json").read_text())
    assert record["method"]["init_args"]["on"] == ["norm"]


def test_another_batch_size_cannot_resume_a_run(graft, recipe, finished):
    """The batches already taken would be others."""
    argv = ("fit", "--config", recipe, "--run", finished, "--trainer.max_epochs", "3", "--resume")
    assert "batch_size was 8 and is 4" in graft.refused(*argv, "--data.batch_size", "4")


# ---- as a program of its own


def test_the_program_writes_single_lines_and_no_warnings(recipe, tmp_path):
    """What libraries warn of stays off the terminal: a line an epoch, and the two of the report."""
    done = subprocess.run(
        [sys.executable, "-m", "domains", "fit", "--config", recipe, "--run", tmp_path / "run"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stderr.splitlines()] == ["epoch"], done.stderr
    assert len(done.stdout.splitlines()) == 2


def test_the_program_exits_with_the_commands_code(recipe, tmp_path, monkeypatch, capsys):
    argv = ["graft", "fit", "--config", recipe, "--run", tmp_path / "run", "--peft.rnk", "4"]
    monkeypatch.setattr(sys, "argv", list(map(str, argv)))
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("graft: 'rnk' is no setting of LoRA. ")


# ---- with the real starters


@pytest.mark.artifacts
@pytest.mark.slow
@pytest.mark.parametrize(("name", "on", "targets"), [("openclipart", "attention", 24), ("openclipart_cnn", "conv", 32)])
def test_three_steps_on_a_real_starter(graft, tmp_path, name, on, targets):
    recipe, run = ROOT / "configs" / "vision" / f"{name}.yaml", tmp_path / "run"
    method = ("--peft", "LoRA", "--peft.on", f"[{on}]", "--peft.rank", "4")
    limits = ("--data.limit_per_class", "2", "--data.batch_size", "8", "--trainer.max_steps", "3")
    graft.done("fit", "--config", recipe, "--run", run, *method, *limits)
    record = json.loads((run / "metrics.json").read_text())
    assert record["cost"]["steps"] == 3
    assert record["cost"]["trainable_percent"] < 10
    graft.done("test", "--run", run)
    graft.done("export", run, tmp_path / "adapter")
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(state) == 2 * targets
    certificate = json.loads((tmp_path / "adapter" / "certificate.json").read_text())
    assert certificate["reload_max_abs_error"] <= 1e-5
    assert certificate["merge_max_abs_error"] <= 1e-4
    graft.done("merge", tmp_path / "adapter", tmp_path / "merged")
