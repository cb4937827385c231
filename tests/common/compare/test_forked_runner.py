"""Forked trials do what processes from scratch do, with the libraries imported already."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.compare import forked_runner
from common.compare.forked_runner import ForkedRunner, local_runner
from common.compare.runner import Job, LocalRunner

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forked on Linux alone")

MODULE = """
import json, multiprocessing, os, sys
early = "torch" in sys.modules
import torch
torch.manual_seed(0)
wide = torch.randn(300, 300)
print(json.dumps({
    "arguments": sys.argv[1:],
    "main": __name__,
    "folder": os.getcwd(),
    "own": os.environ.get("OWN"),
    "leads": os.getsid(0) == os.getpid(),
    "start": multiprocessing.get_start_method(),
    "threads": torch.get_num_threads(),
    "product": (wide @ wide).softmax(1).sum(0).double().sum().item().hex(),
    "early": early,
}), flush=True)
print("to the other stream", file=sys.stderr, flush=True)
if "wait" in sys.argv:
    import subprocess, time
    child = subprocess.Popen(["sleep", "60"])
    print(child.pid, flush=True)
    time.sleep(60)
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A folder with a module that says where it runs."""
    (tmp_path / "says.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def job(name, *arguments, append=False):
    return Job(
        title=name, command=(sys.executable, "-m", "says", *arguments), log=Path(f"logs/{name}.txt"), append=append
    )


def run(runner, one, threads=1, **environment):
    going = runner.start(one, {**os.environ, "OMP_NUM_THREADS": str(threads), **environment})
    for _ in range(1200):
        ended = going.finished()
        if ended is not None:
            return ended
        time.sleep(0.05)
    going.force()
    raise AssertionError(one.log.read_text())


def said(name):
    return json.loads(Path(f"logs/{name}.txt").read_text().splitlines()[0])


@pytest.mark.parametrize(("code", "threads"), [(0, 1), (3, 2)])
def test_a_forked_process_says_what_one_from_scratch_says(module, code, threads):
    for name, runner in (("scratch", LocalRunner()), ("forked", ForkedRunner())):
        ended = run(runner, job(name, str(code), "--two words"), threads, OWN="mine")
        assert ended.code == code
        assert "to the other stream" in ended.tail
    forked, scratch = said("forked"), said("scratch")
    assert (forked.pop("early"), scratch.pop("early")) == (True, False)
    assert forked == scratch
    assert forked["arguments"] == [str(code), "--two words"]
    assert (forked["own"], forked["folder"]) == ("mine", str(module))
    assert (forked["leads"], forked["threads"]) == (True, threads)
    assert forked["start"] == "fork" or sys.version_info >= (3, 14)


STARTER = """
import os, sys, time
from pathlib import Path
from tool.__main__ import main
from common.compare.forked_runner import ForkedRunner
from common.compare.runner import Job
if __name__ == "__main__":
    one = Job(title="one", command=(sys.executable, "-m", "tool"), log=Path("log.txt"))
    going = ForkedRunner().start(one, {**os.environ, "OMP_NUM_THREADS": "1"})
    while (ended := going.finished()) is None:
        time.sleep(0.05)
    sys.exit(ended.code)
"""


def test_a_script_that_imports_the_module_itself_leaves_no_trace_in_the_log(module):
    (module / "tool").mkdir()
    (module / "tool" / "__init__.py").write_text("")
    text = "def main():\n    print('ran as', __name__)\n\nif __name__ == '__main__':\n    main()\n"
    (module / "tool" / "__main__.py").write_text(text)
    (module / "starter.py").write_text(STARTER)
    subprocess.run([sys.executable, "starter.py"], check=True, timeout=120)
    assert (module / "log.txt").read_text() == "ran as __main__\n"


IMPORTER = """
import os, sys, time
from pathlib import Path
from common.compare.forked_runner import local_runner
from common.compare.runner import Job
if __name__ == "__main__":
    one = Job(title="one", command=(sys.executable, "-m", "says"), log=Path("log.txt"))
    runner = local_runner(one.command, ["nowhere", "broken", "needed"])
    going = runner.start(one, {**os.environ, "OMP_NUM_THREADS": "1"})
    while (ended := going.finished()) is None:
        time.sleep(0.05)
    sys.exit(ended.code)
"""


def test_what_trials_need_is_imported_once_where_they_are_forked_from(module):
    """The module notes the process that imports it; those that cannot be imported are left to the trial to miss."""
    (module / "broken.py").write_text("raise RuntimeError('broken')\n")
    (module / "needed.py").write_text("import os\nORIGIN = os.getpid()\n")
    (module / "says.py").write_text(
        "import os, sys\nearly = 'needed' in sys.modules\nimport needed\nprint(early, needed.ORIGIN == os.getppid())\n"
    )
    (module / "importer.py").write_text(IMPORTER)
    subprocess.run([sys.executable, "importer.py"], check=True, timeout=120)
    assert (module / "log.txt").read_text() == "True True\n"


def test_what_starts_it_keeps_its_own_environment(module, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    run(ForkedRunner(), job("one", "0"))
    assert "OMP_NUM_THREADS" not in os.environ
    assert Path.cwd() == module


def test_a_log_goes_on_or_begins_again(module):
    runner = ForkedRunner()
    for append, lines in ((False, 2), (True, 4), (False, 2)):
        run(runner, job("one", "0", append=append))
        assert len(Path("logs/one.txt").read_text().splitlines()) == lines


@pytest.mark.parametrize(("end", "code"), [("ask", -15), ("force", -9)])
def test_what_it_started_ends_with_it(module, end, code):
    going = ForkedRunner().start(job("one", "0", "wait"), {**os.environ, "OMP_NUM_THREADS": "1"})
    log = Path("logs/one.txt")
    for _ in range(1200):
        if log.exists() and len(log.read_text().splitlines()) == 3:
            break
        time.sleep(0.05)
    child = int(log.read_text().splitlines()[2])
    assert going.finished() is None
    getattr(going, end)()
    for _ in range(200):
        ended = going.finished()
        if ended is not None:
            break
        time.sleep(0.05)
    assert ended is not None
    assert ended.code == code
    time.sleep(0.2)
    assert not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]


@pytest.mark.parametrize("end", ["ask", "force"])
def test_one_that_has_hardly_begun_ends_too(module, end):
    going = ForkedRunner().start(job("one", "0", "wait"), {**os.environ, "OMP_NUM_THREADS": "1"})
    begun = time.monotonic()
    getattr(going, end)()
    going.process.join(30)
    assert going.finished() is not None
    assert time.monotonic() - begun < 30
    going.ask()  # of what has ended nothing is asked


def test_a_failure_leaves_its_words_in_the_log(module):
    Path("says.py").write_text("raise RuntimeError('no such luck')")
    ended = run(ForkedRunner(), job("one"))
    assert ended.code == 1
    assert "RuntimeError: no such luck" in ended.tail


def test_only_modules_of_this_python_are_forked_and_only_without_an_accelerator(monkeypatch):
    line = (sys.executable, "-m", "domains")
    assert isinstance(local_runner(line), ForkedRunner)
    assert isinstance(local_runner((sys.executable, "-S", "file.py")), LocalRunner)
    with pytest.raises(ValueError, match="no module of this Python"):
        ForkedRunner().start(Job(title="t", command=("graft", "fit"), log=Path("log.txt")), {"OMP_NUM_THREADS": "1"})
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    assert isinstance(local_runner(line), LocalRunner)
    monkeypatch.undo()
    monkeypatch.setattr(forked_runner.sys, "platform", "darwin")
    assert isinstance(local_runner(line), LocalRunner)


def test_a_forked_fit_ends_bit_identical_to_one_from_scratch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ends = ("".join(pair) for pair in zip("ACDEFGHIKLMNPQRS", "CDEFGHIKLMNPQRST", strict=True))
    rows = [f"GIGKF{end}HSAKK,a\nSTNQD{end}EGAVL,b" for end in ends]
    Path("labels.csv").write_text("\n".join(["sequence,label", *rows]) + "\n")
    recipe = {
        "model": {"class_path": "SequenceClassification", "init_args": {"backbone": "esm2-graft", "pretrained": False}},
        "peft": {"class_path": "LoRA", "init_args": {"on": ["all"], "rank": 2}},
        "data": {"class_path": "ProteinCSV", "init_args": {"csv": "labels.csv", "clusters": "none"}},
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "precision": "32-true"},
    }
    Path("recipe.yaml").write_text(json.dumps(recipe))
    found = []
    for name, runner in (("scratch", LocalRunner()), ("forked", ForkedRunner())):
        command = (sys.executable, "-m", "domains", "fit", "--config", "recipe.yaml", "--run", name)
        ended = run(runner, Job(title=name, command=command, log=Path(f"{name}.txt")))
        assert ended.code == 0, ended.tail
        record = json.loads(Path(name, "metrics.json").read_text())
        found.append((record["val"], record["method"], record["data"]))
    assert found[0] == found[1]
