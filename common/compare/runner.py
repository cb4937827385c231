"""Running commands side by side: one process each, a log each, progress for a person or for a log file."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

_POLL_SECONDS = 0.1
_GRACE_SECONDS = 10.0
_TAIL_BYTES = 16_384
_TAIL_LINES = 12
_TERMINAL_CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One process to run.

    Attributes:
        title: What a person reads while it runs.
        command: The command line.
        log: The file that takes its output and its errors.
        append: Whether the log goes on after what is there already.
    """

    title: str
    command: tuple[str, ...]
    log: Path
    append: bool = False


@dataclass(frozen=True, kw_only=True)
class Finished:
    """How a process ended.

    Attributes:
        job: The job.
        code: The exit code; negative for a signal.
        seconds: How long it ran.
        tail: The last lines of its log.
    """

    job: Job
    code: int
    seconds: float
    tail: str


@dataclass(frozen=True, kw_only=True)
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    started: float
    task: TaskID


def cpu_count() -> int:
    """The number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_jobs(
    jobs: Sequence[Job], *, width: int, threads: int, console: Console, describe: Callable[[Finished], str]
) -> list[Finished]:
    """Run processes, at most `width` at a time, and wait for all of them.

    A process that fails is noted and does not stop the others. On Ctrl-C (or a signal that ends this process) the
    children are asked to stop, ended if they do not within ten seconds, and `KeyboardInterrupt` goes on.

    Args:
        jobs: What to run, in the order of starting.
        width: How many run side by side.
        threads: What each process gets as `OMP_NUM_THREADS`.
        console: Where progress goes: live on a terminal, else one line for each event.
        describe: Words the line that tells how a process ended.

    Returns:
        How each ended, in the order of `jobs`.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    waiting, running = list(jobs), list[_Running]()
    ended: dict[int, Finished] = {}
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    board = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with _signals_as_interrupts(), board as progress:
        try:
            while waiting or running:
                while waiting and len(running) < width:
                    running.append(_start(waiting.pop(0), environment, progress))
                time.sleep(_POLL_SECONDS)
                for item in [item for item in running if item.process.poll() is not None]:
                    running.remove(item)
                    progress.remove_task(item.task)
                    ended[id(item.job)] = finished = _finish(item)
                    _say(console, describe(finished))
        except KeyboardInterrupt:
            _say(console, f"stopping {len(running)} running process(es)")
            raise
        finally:
            _stop(running)
    return [ended[id(job)] for job in jobs]


def tail(log: Path, lines: int = _TAIL_LINES) -> str:
    """The last lines of a log as a person would see them: no colour codes, progress bars at their last state."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        text = file.read().decode("utf-8", errors="replace")
    shown = (_TERMINAL_CODES.sub("", line).rstrip("\r").rsplit("\r", 1)[-1].rstrip() for line in text.split("\n"))
    return "\n".join([line for line in shown if line][-lines:])


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _start(job: Job, environment: Mapping[str, str], progress: Progress) -> _Running:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    if progress.disable:
        _say(progress.console, f"start   {job.title}")
    with job.log.open("ab" if job.append else "wb") as log:
        # A session of its own keeps a Ctrl-C of the terminal from reaching the child before we end it in order.
        process = subprocess.Popen(
            job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )
    return _Running(job=job, process=process, started=time.monotonic(), task=progress.add_task(job.title, total=None))


def _finish(item: _Running) -> Finished:
    seconds = time.monotonic() - item.started
    return Finished(job=item.job, code=item.process.returncode, seconds=seconds, tail=tail(item.job.log))


def _stop(running: Sequence[_Running]) -> None:
    """End processes: asked first, forced after a grace period or on a second Ctrl-C."""
    for item in running:
        _send(item.process, "SIGTERM")
    deadline = time.monotonic() + _GRACE_SECONDS
    try:
        for item in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                item.process.wait(timeout=max(0.0, deadline - time.monotonic()))
    finally:
        for item in running:
            if item.process.poll() is None:
                _send(item.process, "SIGKILL")
                item.process.wait()


def _send(process: subprocess.Popen[bytes], name: str) -> None:
    if not hasattr(os, "killpg"):  # no process groups (Windows)
        process.terminate()
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, getattr(signal, name))


@contextlib.contextmanager
def _signals_as_interrupts() -> Generator[None]:
    """Turn the signals that would end this process, and orphan its children, into `KeyboardInterrupt`."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
        for number in (getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
                before[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
