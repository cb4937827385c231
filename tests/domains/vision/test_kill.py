"""`kill -9` at random moments of a real run through the real command line; the resumed run must end bit-identical."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

KILLS = int(os.environ.get("GRAFT_KILLS", "2"))
STEPS = 16


def command(folder, *more):
    return [
        *(sys.executable, "-m", "domains", "fit", "--config", "configs/vision/openclipart.yaml", "--run", str(folder)),
        *("--data.limit_per_class", "2", "--data.batch_size", "10", "--trainer.max_epochs", "4", "--save_every", "1"),
        *("--peft.dropout", "0.1", *more),
    ]


def finish(folder, *more):
    done = subprocess.run(command(folder, *more), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "last.ckpt", weights_only=True), json.loads((folder / "metrics.json").read_text())


def kill_somewhere(folder, rng):
    """Start a run, let a random number of checkpoints be written, wait a random moment more, kill it."""
    wanted, seen, last = rng.randrange(0, STEPS - 1), 0, None
    with subprocess.Popen(command(folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and seen < wanted:
            stamp = (folder / "last.ckpt").stat().st_mtime_ns if (folder / "last.ckpt").exists() else None
            seen, last = seen + (stamp != last), stamp
            time.sleep(0.002)
        time.sleep(rng.random())
        assert process.poll() is None, "the run ended before it could be killed"
        process.send_signal(signal.SIGKILL)


@pytest.mark.artifacts
@pytest.mark.slow
def test_a_killed_run_ends_bit_identical_to_one_that_was_not(tmp_path):
    reference, metrics = finish(tmp_path / "whole")
    assert reference["global_step"] == STEPS
    rng = random.Random(0)
    for kill in range(KILLS):
        folder = tmp_path / f"killed-{kill}"
        kill_somewhere(folder, rng)
        resumed, again = finish(folder, "--resume")
        assert resumed["global_step"] == STEPS
        assert set(resumed["state_dict"]) == set(reference["state_dict"])
        different = [n for n, t in reference["state_dict"].items() if not torch.equal(t, resumed["state_dict"][n])]
        assert different == []
        assert again["val"] == metrics["val"]
