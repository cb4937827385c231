"""Trials do not outlive the study that started them, even where it is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common._lifeline import LIFELINE

pytestmark = pytest.mark.skipif(os.name != "posix", reason="pipes are handed on by POSIX systems alone")

STARTER = """
import os, sys, time
from pathlib import Path
from common.compare.forked_runner import ForkedRunner
from common.compare.runner import Job, LocalRunner
if __name__ == "__main__":
    one = Job(title="one", command=(sys.executable, "-m", "trial"), log=Path("log.txt"))
    runner = {"forked": ForkedRunner, "scratch": LocalRunner}[sys.argv[1]]()
    going = runner.start(one, {**os.environ, "OMP_NUM_THREADS": "1"})
    while (ended := going.finished()) is None:
        time.sleep(0.05)
    print(ended.code)
"""
# Like a fit whose data are read by a process of their own.
TRIAL = """
import os, subprocess, sys, time
from common.cli import run
run([], {})
child = subprocess.Popen(["sleep", "60"])
print("\\n" + str(os.getpid()), child.pid, flush=True)
time.sleep(float(os.environ["SECONDS"]))
child.kill()
"""


def until(check, seconds=60.0):
    end = time.monotonic() + seconds
    while not check() and time.monotonic() < end:
        time.sleep(0.05)
    return check()


def gone(pid):
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.fixture
def starter(tmp_path, monkeypatch):
    """Start a study's process with one trial; return it and the pids of the trial and the trial's child."""
    (tmp_path / "starter.py").write_text(STARTER)
    (tmp_path / "trial.py").write_text(TRIAL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2]), str(tmp_path)]))

    def start(kind, seconds):
        monkeypatch.setenv("SECONDS", str(seconds))
        study = subprocess.Popen([sys.executable, "starter.py", kind], stdout=subprocess.PIPE, text=True)
        log = Path("log.txt")

        def pids():
            lines = log.read_text().splitlines() if log.exists() else []
            return [int(word) for line in lines for word in line.split() if line.replace(" ", "").isdigit()]

        assert until(lambda: len(pids()) == 2), log.read_text()
        return study, pids()

    return start


@pytest.mark.skipif(sys.platform != "linux", reason="processes are seen in /proc")
@pytest.mark.parametrize("kind", ["forked", "scratch"])
def test_a_trial_and_what_it_started_end_when_the_study_is_killed(starter, kind):
    study, pids = starter(kind, 60)
    assert not any(map(gone, pids))
    study.send_signal(signal.SIGKILL)
    study.communicate()
    assert until(lambda: all(map(gone, pids)), 10)


@pytest.mark.parametrize("kind", ["forked", "scratch"])
def test_a_trial_goes_on_to_its_end_while_the_study_lives(starter, kind):
    study, _ = starter(kind, 2)
    assert study.communicate()[0].strip() == "0"


def test_a_lifeline_is_for_one_process_alone(tmp_path):
    script = "import os; from common.cli import run; run([], {}); print(os.environ.get('" + LIFELINE + "'))"
    given, kept = os.pipe()
    try:
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, LIFELINE: str(given)},
            pass_fds=[given],
            capture_output=True,
            text=True,
            check=True,
        )
    finally:
        os.close(given)
        os.close(kept)
    assert done.stdout.strip() == "None"
