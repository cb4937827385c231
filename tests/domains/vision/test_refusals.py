"""Every mistake on the way of a vision run ends with exit code 2 and one line that says what to do."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile

import pytest
import torch
import yaml

from tests.domains.vision.conftest import write_recipe

# ---- mistakes in names and values


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--peft Lora", "Unknown method 'Lora'. Did you mean 'LoRA'? `graft list methods` lists all."),
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
        ("--model ImageClasification", "Unknown task 'ImageClasification'. Did you mean 'ImageClassification'? "),
        ("--model.bakbone x", "'bakbone' is no setting of ImageClassification. Did you mean 'backbone'? Allowed: "),
        ("--model.backbone test_vitt", "Unknown image backbone 'test_vitt'. Did you mean 'test_vit'? "),
        ("--model.backbone test_resnet", "Role 'attention' matches no module of this resnet backbone. Roles it has: "),
        ("--model.optim.lrr 1", "'lrr' is no setting of optim. Did you mean 'lr'? Allowed: "),
        ("--model.optim.lr x", "model.optim.lr is 'x', but it takes a number. "),
        ("--model.optim.lr -1", "optim: lr is -1.0; "),
        ("--model.depth x", "model.depth is 'x', but it takes a whole number. "),
        ("--model.depth 9", "depth=9: 'test_vit' has 6 blocks; give 1 to 6."),
        ("--model.pooling first", "Unknown model.pooling 'first'. Allowed: "),
        ("--model.pretrained perhaps", "model.pretrained is 'perhaps', but it takes true or false. "),
        ("--model.weights /nowhere.pth", "There is no weights file /nowhere.pth. "),
        ("--data ImageFolders", "Unknown datamodule 'ImageFolders'. Did you mean 'ImageFolder'? "),
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
