"""A vision run from the recipe to the merged weights through the real command line, and every mistake on the way."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file

from domains.__main__ import main
from domains.vision.tasks import ImageClassification
from tests.domains.vision.conftest import CLASSES, SIZE, write_recipe

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


# ---- mistakes in names and values


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--peft Lora", "Unknown method 'Lora'. Did you mean 'LoRA'? Allowed: "),
        ("--peft.rnk 4", "'rnk' is no setting of LoRA. Did you mean 'rank'? Allowed: "),
        ("--peft LoRA --peft.rnk 4", "'rnk' is no setting of LoRA. Did you mean 'rank'? Allowed: "),
        ("--peft.rank x", "peft.rank is 'x', but it takes a whole number. "),
        ("--peft.rank 1.5", "peft.rank is '1.5', but it takes a whole number. "),
        ("--peft.rank 0", "LoRA rank is 0; "),
        ("--peft.on attention", "peft.on is 'attention', but it takes a list, like [a, b]. "),
        ("--peft.on [atention]", "Unknown role 'atention'. Did you mean 'attention'? Allowed: "),
        ("--peft.on [conv]", "Role 'conv' matches no module of this vit backbone. Roles it has: "),
        ("--peft.on []", "'on' is empty; give at least one of: "),
        ("--peft.init pisa", "Unknown peft.init 'pisa'. Did you mean 'pissa'? Allowed: "),
        ("--model Classification", "Unknown task 'Classification'. Did you mean 'ImageClassification'? Allowed: "),
        ("--model.bakbone x", "'bakbone' is no setting of ImageClassification. Did you mean 'backbone'? Allowed: "),
        ("--model.backbone test_vitt", "Unknown vision backbone 'test_vitt'. Did you mean 'test_vit'? "),
        ("--model.backbone test_resnet", "Role 'attention' matches no module of this resnet backbone. Roles it has: "),
        ("--model.optim.lrr 1", "'lrr' is no setting of optim. Did you mean 'lr'? Allowed: "),
        ("--model.optim.lr x", "model.optim.lr is 'x', but it takes a number. "),
        ("--model.optim.lr -1", "optim: lr is -1.0; "),
        ("--model.depth x", "model.depth is 'x', but it takes a whole number. "),
        ("--model.depth 9", "depth=9: 'test_vit' has 6 blocks; give 1 to 6."),
        ("--model.pooling first", "Unknown model.pooling 'first'. Allowed: "),
        ("--model.pretrained perhaps", "model.pretrained is 'perhaps', but it takes true or false. "),
        ("--model.weights /nowhere.pth", "There is no weights file /nowhere.pth. "),
        ("--data ImageFolders", "Unknown datamodule 'ImageFolders'. Did you mean 'ImageFolder'? Allowed: "),
        ("--data.rot x", "'rot' is no setting of ImageFolder. Did you mean 'root'? Allowed: "),
        ("--data.bach_size 3", "'bach_size' is no setting of ImageFolder. Did you mean 'batch_size'? Allowed: "),
        ("--data.batch_size 0", "ImageFolder: batch_size is 0 (at least 1)."),
        ("--data.root /nowhere", "There is no folder '/nowhere': "),
        ("--trainer.max_epoch 3", "'max_epoch' is no setting of Trainer. Did you mean 'max_epochs'? "),
        ("--trainer.max_epochs x", "trainer.max_epochs is 'x', but it takes a whole number. "),
        ("--trainer.precision half", "Unknown trainer.precision 'half'. "),
        ("--foo 1", "A recipe has no 'foo'. Allowed: "),
        ("--trainr.max_epochs 1", "A recipe has no 'trainr.max_epochs'. Did you mean 'trainer'? Allowed: "),
        ("stray", "A recipe has no 'stray'. "),
        ("--seed_everything x", "seed_everything is 'x', but it takes "),
        ("--seed_everything -1", "seed_everything is -1; "),
        ("--save_every often", "save_every is 'often', but it takes a whole number. "),
        ("--resum", "A recipe has no 'resum'. Did you mean 'resume'? "),
    ],
)
def test_a_wrong_word_is_one_line_with_the_right_one(graft, recipe, tmp_path, argv, message):
    line = graft.refused("fit", "--config", recipe, "--run", tmp_path / "run", *argv.split())
    assert line.startswith(message), line
    assert len(line) < 500
    assert not (tmp_path / "run" / "last.ckpt").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused(graft, recipe, tmp_path):
    line = graft.refused("fit", "--config", recipe, "--run", tmp_path / "run", "--trainer.accelerator", "gpu")
    assert line.startswith("The trainer refuses this recipe: ")


def change(settings, where, value):
    """Set a key, given with dots, in a recipe's values; None takes it out."""
    *path, last = where.split(".")
    for key in path:
        settings = settings[key]
    if value is None:
        del settings[last]
    else:
        settings[last] = value


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("peft", None, "The recipe says nothing about 'peft'. "),
        ("data", None, "The recipe says nothing about 'data'. "),
        ("model.init_args.backbone", None, "model says nothing about 'backbone'. "),
        ("data.init_args.root", None, "data says nothing about 'root'. "),
        ("peft.class_path", "Lora", "Unknown method 'Lora'. Did you mean 'LoRA'? "),
        ("peft.init_args.rnk", 4, "'rnk' is no setting of LoRA. Did you mean 'rank'? "),
        ("peft.init_args.rank", "four", "peft.rank is 'four', but it takes a whole number. "),
        ("peft.rank", 4, "'{file}': peft has 'rank' beside class_path. Its settings stand under peft.init_args."),
        ("model.init_args.optim.hed_lr", 1, "'hed_lr' is no setting of optim. Did you mean 'head_lr'? "),
        ("trainer.max_epoch", 1, "'max_epoch' is no setting of Trainer. Did you mean 'max_epochs'? "),
        ("trainr", {"max_epochs": 1}, "A recipe has no 'trainr.max_epochs'. Did you mean 'trainer'? "),
        ("foo", 1, "A recipe has no 'foo'. "),
    ],
)
def test_a_wrong_recipe_is_one_line(graft, settings, tmp_path, where, value, message):
    change(settings, where, value)
    path = write_recipe(tmp_path / "wrong.yaml", settings)
    line = graft.refused("fit", "--config", path, "--run", tmp_path / "run")
    assert line.startswith(message.format(file=path)), line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1,\nb: 2", ", line 2 is not valid YAML: "),
        ("model:\n\tx: 1", ", line 2 is not valid YAML: "),
        (
            "seed_everything: 1\nseed_everything: 2",
            ", line 2 is not valid YAML: the key 'seed_everything' is given twice",
        ),
        ("", " is no recipe: "),
        ("- 1", " is no recipe: "),
        ("hello", " is no recipe: "),
    ],
)
def test_a_file_that_is_no_recipe_is_named(graft, tmp_path, text, message):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    for argv in (("--config", path), (f"--config={path}",)):
        assert graft.refused("fit", *argv).startswith(f"'{path}'{message}")


def test_a_missing_recipe_is_named(graft, tmp_path):
    assert graft.refused("fit", "--config", tmp_path / "none.yaml").startswith(
        f"Cannot read '{tmp_path}/none.yaml': No such"
    )
    assert graft.refused("fit").startswith("The recipe says nothing about 'data', 'model', 'peft'. Give a recipe with")


def test_a_run_has_to_be_named_to_be_tested(graft, tmp_path):
    assert graft.refused("test") == "Say which run: add --run runs/NAME."
    for verb in ("test", "validate"):
        assert "is not the folder of a run (config.yaml is missing)" in graft.refused(verb, "--run", tmp_path)


# ---- data, disks and folders


def test_wrong_pictures_are_refused_before_anything_is_trained(graft, recipe, pictures, tmp_path):
    root = tmp_path / "pets"
    shutil.copytree(pictures, root)
    argv = ("fit", "--config", recipe, "--run", tmp_path / "run", "--data.root", root)
    (root / "fox").mkdir()
    assert graft.refused(*argv).startswith(f"No images in the class folder {root}/fox: ")
    (root / "fox").rmdir()
    (root / "cat" / "3.png").write_bytes(b"junk")
    assert graft.refused(*argv).startswith(f"Cannot read the image '{root}/cat/3.png': ")
    graft.done(*argv, "--data.skip_bad", "true", "--trainer.max_steps", "1")
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["data"]["skipped"] == 1


def test_a_folder_in_use_or_in_the_way_is_refused(graft, recipe, finished, tmp_path):
    assert "already holds a run. Add --resume" in graft.refused("fit", "--config", recipe, "--run", finished)
    assert "is a file, not a folder" in graft.refused("fit", "--config", recipe, "--run", recipe)
    assert "is a file, not a folder" in graft.refused("fit", "--config", recipe, "--run", recipe / "deeper")
    assert "exists already" in graft.refused("export", finished, tmp_path)
    assert "is not an adapter folder" in graft.refused("merge", finished, tmp_path / "merged")
    assert "is not an adapter folder" in graft.refused("predict", "--adapter", finished, recipe)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_a_folder_that_cannot_be_written_is_refused_before_training(graft, recipe, tmp_path, monkeypatch, code):
    def refuse(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)
    line = graft.refused("fit", "--config", recipe, "--run", tmp_path / "run")
    assert line.startswith(f"No permission to write {tmp_path}/run/")


def test_a_full_disk_ends_a_run_with_one_line_and_keeps_the_last_checkpoint(graft, recipe, tmp_path, monkeypatch):
    run = tmp_path / "run"
    sync, saved = os.fsync, []

    def full(descriptor):
        if "last.ckpt" in os.readlink(f"/proc/self/fd/{descriptor}"):
            saved.append(1)
            if len(saved) > 1:
                raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        outcome = graft("fit", "--config", recipe, "--run", run, "--trainer.max_epochs", "2")
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1].startswith(f"graft: The disk is full: {run}/last.ckpt could not be written")
    assert "Traceback" not in outcome.err
    assert {path.name for path in run.iterdir()} == {"config.yaml", "last.ckpt"}
    graft.done("fit", "--config", recipe, "--run", run, "--trainer.max_epochs", "2", "--resume")


def test_a_damaged_checkpoint_is_refused(graft, recipe, finished):
    whole = (finished / "last.ckpt").read_bytes()
    (finished / "last.ckpt").write_bytes(whole[: len(whole) // 2])
    for argv in (("test", "--run", finished), ("fit", "--config", recipe, "--run", finished, "--resume")):
        assert "is damaged or not a checkpoint of Graft" in graft.refused(*argv)


@pytest.mark.parametrize("given", ["collections.OrderedDict", "domains.vision.tasks.Nope", "nowhere.Task"])
def test_a_class_that_is_no_task_is_refused(graft, finished, given):
    config = yaml.safe_load((finished / "config.yaml").read_text())
    config["model"]["class_path"] = given
    (finished / "config.yaml").write_text(yaml.safe_dump(config))
    assert graft.refused("test", "--run", finished).startswith(f"Unknown task '{given}'. ")
    assert graft.refused("test", "--run", finished, "--model", given).startswith(f"Unknown task '{given}'. ")


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
