"""Trials forked from one process that has imported the libraries, which takes each of them seconds of its own else."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from common._lifeline import end_with
from common.compare.runner import Finished, Job, LocalRunner, Runner, ended

# With torch, lightning, peft and torchmetrics, and what the runner names.
_IMPORTED = ("common.cli.training", "common.tuners", "common.compare._imports")
_THREADS = "OMP_NUM_THREADS"
IMPORTS = "GRAFT_IMPORTS"
"""The environment variable that names what the process imports that trials are forked from, spaces between."""


@dataclass(frozen=True, kw_only=True)
class ForkedRunning:
    """A forked process of this machine."""

    job: Job
    process: ForkServerProcess
    started: float

    def finished(self) -> Finished | None:
        """Return how it ended; None while it runs."""
        return ended(self.job, self.process.exitcode, self.started)

    def ask(self) -> None:
        """Ask it and its children to end."""
        self._send(signal.SIGTERM)

    def force(self) -> None:
        """End it and its children."""
        self._send(signal.SIGKILL)
        self.process.join()

    def _send(self, number: signal.Signals) -> None:
        pid = self.process.pid
        if pid is None or self.process.exitcode is not None:
            return
        try:
            os.killpg(pid, number)
        except ProcessLookupError:  # it has no group of its own yet
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


class ForkedRunner:
    """Processes of this machine that start with the libraries imported, as Python's `forkserver` makes them.

    Each is a session of its own, with its own output, environment and folder, and runs what `python -m MODULE` would.
    The process that they are forked from computes nothing. There is one for all runners, started with the first trial.

    Args:
        imports: Names of further modules that trials need, such as those of the domains.
    """

    def __init__(self, imports: Sequence[str] = ()) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(_IMPORTED))
        self._imports = " ".join(imports)

    def start(self, job: Job, environment: Mapping[str, str]) -> ForkedRunning:
        """Start a process with these environment variables, in the current folder.

        Raises:
            ValueError: The command does not begin with this Python, `-m` and the name of a module.
        """
        if not runs_module(job.command):
            raise ValueError(f"{job.command[:3]} is no module of this Python.")
        job.log.parent.mkdir(parents=True, exist_ok=True)
        job.log.open("ab" if job.append else "wb").close()  # there whenever it ends
        arguments = (job.command[2:], job.log.resolve(), dict(environment), Path.cwd())
        process = self._context.Process(target=_work, args=arguments)
        # The first process's origin keeps these.
        with _environment({_THREADS: environment[_THREADS], IMPORTS: self._imports}):
            process.start()
        return ForkedRunning(job=job, process=process, started=time.monotonic())


def runs_module(command: Sequence[str]) -> bool:
    """Whether a command line is this Python's `-m` with a module."""
    return tuple(command[:2]) == (sys.executable, "-m") and len(command) > 2


def local_runner(command: Sequence[str], imports: Sequence[str] = ()) -> Runner:
    """Return how trials whose command lines begin with `command`, and which need `imports`, run on this machine.

    They are forked on Linux where torch finds no accelerator: a driver that was started before a fork fails after it,
    and other systems' libraries cannot be forked. Elsewhere each is a process from scratch.
    """
    if sys.platform != "linux" or not runs_module(command):
        return LocalRunner()
    import torch

    return LocalRunner() if torch.accelerator.is_available() else ForkedRunner(imports)


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Generator[None]:
    """Let a process that is started here read these environment variables."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _work(line: Sequence[str], log: Path, environment: Mapping[str, str], folder: Path) -> None:
    """Become what `python -m` makes of a line: a module and its arguments."""
    os.setsid()  # a Ctrl-C of the terminal is for the process that started this one, which ends it in order
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    os.environ.update(environment)  # what the imports set stays
    os.chdir(folder)
    _use_threads(int(environment[_THREADS]))
    starter = multiprocessing.parent_process()
    if starter is not None:
        end_with(starter.sentinel)
    multiprocessing.set_start_method(None, force=True)  # loaders' workers start as they do elsewhere
    sys.path.insert(0, str(folder))
    sys.argv = list(line)
    # A study's own script imports it too, and Python imports that script here: it is to run as if nobody had.
    sys.modules.pop(f"{line[0]}.__main__", None)
    runpy.run_module(line[0], run_name="__main__", alter_sys=True)


def _use_threads(number: int) -> None:
    """Take another number of threads than the process had that this one is forked from."""
    import torch

    if torch.get_num_threads() != number:
        torch.set_num_threads(number)
