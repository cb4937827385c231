"""Trials as tasks of Ray give what processes of this machine give, and are refused where Ray is missing."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.compare.stages import Options
from common.errors import GraftError

REPO = Path(__file__).parents[3]
FAKE = Path(__file__).with_name("fake_graft.py")
here = importlib.util.find_spec("ray") is not None
SCRIPT = """
import importlib, json, signal, sys
from pathlib import Path
from common.compare import compare
from common.compare.stages import Options
signal.signal(signal.SIGINT, signal.default_int_handler)
import ray
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
code = compare(Path("study.yaml"), jobs=2, command=(sys.executable, "-S", {fake!r}), options=Options(runner="ray"))
sys.exit(code)
"""


def command():
    return [sys.executable, "-c", SCRIPT.format(fake=str(FAKE))]


def environment():
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])}


@pytest.mark.skipif(not here, reason="needs Ray")
@pytest.mark.slow
def test_ray_gives_the_results_of_this_machine_and_reports_failures(world):
    assert world.run() == 0
    local = (world.out / "results.csv").read_bytes()
    calls = {(call["verb"], call["method"], call["lr"], call["seed"]) for call in world.calls()}
    world.out.rename(world.folder / "local")
    world.forget()
    world.measure(fail=[["fit", "LoRA", "0.003", "0"]])
    first = subprocess.run(command(), env=environment(), capture_output=True, text=True, check=False, timeout=120)
    assert first.returncode == 1, first.stdout + first.stderr
    assert "FAILED  recipe LoRA lr 0.003 seed 0  exit code 3" in first.stdout
    world.measure()
    again = subprocess.run(command(), env=environment(), capture_output=True, text=True, check=False, timeout=120)
    assert again.returncode == 0, again.stdout + again.stderr
    assert {(call["verb"], call["method"], call["lr"], call["seed"]) for call in world.calls()} == calls
    assert (world.out / "results.csv").read_bytes() == local
    trial = json.loads((world.out / "recipe/LoRA/lr-0.001-seed-0/trial.json").read_text())
    assert trial == json.loads((world.folder / "local/recipe/LoRA/lr-0.001-seed-0/trial.json").read_text()) | {
        "side_by_side": 2
    }


@pytest.mark.skipif(not here or not hasattr(os, "killpg"), reason="needs Ray and process groups")
@pytest.mark.slow
def test_a_stopped_study_leaves_no_process_on_ray(world):
    world.measure(sleep=60)
    process = subprocess.Popen(command(), env=environment(), stdout=subprocess.PIPE, text=True)
    for _ in range(600):
        time.sleep(0.1)
        if len(world.calls()) == 2:
            break
    children = [call["process"] for call in world.calls()]
    assert len(children) == 2
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "goes on from here" in output
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)


def test_without_ray_it_is_refused_before_anything_runs(world, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "ray" else find(name, *rest))
    with pytest.raises(GraftError, match=r"--runner ray needs Ray.*graft\[ray\]"):
        world.run(options=Options(runner="ray"))
    assert world.calls() == []


def test_an_unknown_runner_is_refused(world):
    with pytest.raises(GraftError, match=r"Unknown runner 'rays'\. Did you mean 'ray'\?"):
        world.run(options=Options(runner="rays"))
