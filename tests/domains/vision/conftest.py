"""A set of little pictures that can be learned in seconds, recipes for it, and the command line as a function."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from common.cli import run
from domains import DOMAINS

SIZE = 32
CLASSES = ("cat", "dog", "elk")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per class with 10 pictures each, told apart by their colour. Never write into it."""
    root = tmp_path_factory.mktemp("pictures") / "pets"
    for channel, label in enumerate(CLASSES):
        (root / label).mkdir(parents=True)
        for number in range(10):
            blocks = np.random.default_rng([channel, number]).integers(0, 100, (4, 4, 3), dtype=np.uint8)
            blocks[..., channel] += 120
            image = Image.fromarray(blocks).resize((SIZE, SIZE), Image.Resampling.NEAREST)
            image.save(root / label / f"{number}.png")
    return root


def plain_recipe(pictures: Path) -> dict[str, Any]:
    """Return a complete recipe as plain values."""
    return {
        "seed_everything": 0,
        "model": {
            "class_path": "ImageClassification",
            "init_args": {
                "backbone": "test_vit",
                "pretrained": False,
                "optim": {"lr": 1e-3, "head_lr": 1e-2, "weight_decay": 0.01},
            },
        },
        "peft": {"class_path": "LoRA", "init_args": {"on": ["attention"], "rank": 4}},
        "data": {
            "class_path": "ImageFolder",
            "init_args": {
                "root": str(pictures),
                "image_size": SIZE,
                "batch_size": 8,
                "val_fraction": 0.2,
                "test_fraction": 0.2,
            },
        },
        "trainer": {"max_epochs": 1, "precision": "32-true"},
    }


@pytest.fixture
def settings(pictures: Path) -> dict[str, Any]:
    """A complete recipe as plain values, to be changed and written with `write_recipe`."""
    return plain_recipe(pictures)


def write_recipe(path: Path, content: Any) -> Path:
    """Write a recipe; `path` is its file."""
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture
def recipe(tmp_path: Path, settings: dict[str, Any]) -> Path:
    """The recipe of `settings`, written."""
    return write_recipe(tmp_path / "recipe.yaml", settings)


@dataclass(frozen=True)
class Outcome:
    """What a command returned and wrote."""

    code: int
    out: str
    err: str


class Graft:
    """The real entry point, in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *argv: object) -> Outcome:
        """Run one command and return what it did."""
        self._capsys.readouterr()
        code = run([str(argument) for argument in argv], DOMAINS)
        return Outcome(code, *self._capsys.readouterr())

    def done(self, *argv: object) -> Outcome:
        """Run a command that must succeed."""
        outcome = self(*argv)
        assert outcome.code == 0, outcome.err
        return outcome

    def refused(self, *argv: object) -> str:
        """Run a command that must end with exit code 2 and one line; return the line without `graft: `."""
        outcome = self(*argv)
        assert outcome.code == 2
        lines: Sequence[str] = outcome.err.splitlines()
        assert len(lines) == 1, outcome.err
        assert lines[0].startswith("graft: ")
        return lines[0].removeprefix("graft: ")


@pytest.fixture(scope="session")
def trained(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs, once for all tests. Never write into it."""
    root = tmp_path_factory.mktemp("trained")
    recipe = write_recipe(root / "recipe.yaml", plain_recipe(pictures))
    argv = ["fit", "--config", str(recipe), "--run", str(root / "run"), "--trainer.max_epochs", "2"]
    assert run(argv, DOMAINS) == 0
    return root / "run"


@pytest.fixture
def finished(trained: Path, tmp_path: Path) -> Path:
    """A copy of a finished run of two epochs."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def graft(capsys: pytest.CaptureFixture[str]) -> Graft:
    """Run commands of `graft`."""
    return Graft(capsys)
