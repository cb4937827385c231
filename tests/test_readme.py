"""Every command and every Python example of the READMEs is run, made small by further options."""

from __future__ import annotations

import contextlib
import html
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from common._yaml import load_yaml
from common.artifacts import fetch
from common.cli import run
from common.compare import stages
from common.compare.runner import Finished, tail
from domains import DOMAINS

ROOT = Path(__file__).resolve().parents[1]
READMES = [
    path
    for path in sorted(ROOT.rglob("*.md"))
    if not {".venv", "runs", "node_modules"} & set(path.relative_to(ROOT).parts) and not path.name.startswith(".")
]
SMALL = {
    "openclipart": {"data.limit_per_class": 3},
    "stars": {"data.limit_per_class": 3},
    "human_to_macaque": {"data.labelled": 8},
    "amp": {"model.backbone": "esm2-graft"},
    "stamps_es": {"data.language": "da", "model.max_tokens": 4},
    "voice_asterisk": {"data.parts": 2, "model.val_spoken": 1, "model.measures": ["acoustics"]},
}
ONE_STEP = {"trainer.max_epochs": 1, "trainer.limit_train_batches": 1}
QUICK = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1"]
FEWER = {
    "vision": ["--data.limit_per_class", "3"],
    "medical": ["--data.batch_size", "1"],
    "protein": ["--data.shots", "4"],
    "speech": ["--data.speed", "[]"],
}


def blocks(path, *languages):
    fences = re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(), flags=re.M | re.S)
    return [text for language, text in fences if language in languages]


def commands():
    found = []
    for path in READMES:
        for text in blocks(path, "bash", "console", ""):
            for line in text.replace("\\\n", " ").splitlines():
                line = line.removeprefix("$ ")
                if line.startswith(("graft ", "make ")) and (path, line) not in found:
                    found.append((path, line))
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder that looks like the repository's root, with photos, recordings and proteins."""
    root = tmp_path_factory.mktemp("readme")
    (root / "configs").symlink_to(ROOT / "configs")
    for name, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
        (root / "photos" / name).mkdir(parents=True)
        for shade in range(12):
            image = Image.new("RGB", (64, 64), tuple(channel + 3 * shade for channel in colour))
            image.save(root / "photos" / name / f"{shade}.png")
    (root / "recordings").mkdir()
    table = ["path,text,split"]
    for number, name in enumerate((*"abcdefgh", "talk")):
        noise = np.random.default_rng(number).normal(scale=0.1, size=16_000)
        soundfile.write(root / "recordings" / f"{name}.wav", noise, 16_000)
        table.append(f"recordings/{name}.wav,{name} {number},{('train', 'train', 'val', 'test')[number % 4]}")
    (root / "clips.csv").write_text("\n".join(table) + "\n")
    (root / "proteins.fasta").write_text(">a\nGIGKFLHSAKKFGKAFVGEIMNS\n>b\nMKTAYIAKQRQISFVKSHFSRQ\n")
    (root / "openclipart.deb").symlink_to(fetch("openclipart"))
    return root


def shrink(arguments, place):
    """Make a README's command cheap without changing what it does."""
    recipe = next((Path(item) for item in arguments if item.startswith("configs/")), None)
    if arguments[0] == "fit" and recipe is not None:
        return [*arguments, *FEWER[recipe.parent.name], *QUICK]
    if arguments[0] == "compare":
        study = place / "small.json"  # which is YAML as well
        content = load_yaml(ROOT / arguments[1])
        for part in content.get("parts", {"": content}).values():
            part["overrides"] = SMALL[Path(part["recipe"]).stem] | ONE_STEP
            part["seeds"] = [0]
            for method in part["methods"].values():
                method["lr"] = method["lr"][:1]
                method["overrides"] = method.get("overrides", {}) | ONE_STEP
        study.write_text(json.dumps(content))
        return ["compare", str(study), *arguments[2:]]
    return arguments


@pytest.mark.long
@pytest.mark.artifacts
def test_every_graft_command_of_the_readmes_runs(place, monkeypatch):
    monkeypatch.chdir(place)
    lines = [line for _, line in commands() if line.startswith("graft ")]
    assert any(line.startswith("graft fit") for line in lines)
    for line in lines:
        arguments = shlex.split(line, comments=True)[1:]
        assert run(shrink(arguments, place), DOMAINS) == 0, line


@pytest.mark.artifacts
def test_the_python_examples_run(place, monkeypatch):
    examples = blocks(ROOT / "README.md", "python")
    assert examples
    monkeypatch.chdir(place)
    for text in examples:
        small = text.replace("image_size=98)", "image_size=98, limit_per_class=3)")
        small = small.replace("max_epochs=5", "max_epochs=1, limit_train_batches=1")
        assert small != text
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", small], check=True, cwd=place, env=environment)


class Done:
    """A trial that has ended."""

    def __init__(self, finished):
        self.finished = lambda: finished


class InThisProcess:
    """Trials without a process of their own: starting 33 of them takes longer than what they do here."""

    def start(self, job, environment):
        with job.log.open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            code = run(list(job.command[len(stages.GRAFT) :]), DOMAINS)
        return Done(Finished(job=job, code=code, seconds=0.0, tail=tail(job.log)))


@pytest.mark.long
@pytest.mark.artifacts
def test_the_demo_runs_small(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr(stages, "local_runner", lambda command, imports: InThisProcess())
    study = "configs/demo.yaml"
    arguments = shrink(["compare", study, "--out", "demo", "--jobs", "2"], place)
    assert run(arguments, DOMAINS) == 0
    report = (place / "demo" / "report.html").read_text()
    for part in load_yaml(ROOT / study)["parts"].values():
        assert html.escape(part["title"], quote=False).replace("'", "&#39;") in report
        for name in (*part["methods"], *part.get("baselines", ())):
            assert name in report


def test_make_commands_of_the_readmes_are_targets():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    named = {line.split()[1] for _, line in commands() if line.startswith("make ")}
    assert {"demo", "test"} <= named <= targets


def test_links_between_the_readmes_lead_somewhere():
    for path in READMES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text()):
            if not target.startswith("http"):
                assert (path.parent / target).exists(), f"{path}: {target}"
