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
from typing import IO, Any, Protocol

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from common._lifeline import LIFELINE

_POLL_SECONDS = 0.1
GRACE_SECONDS = 10.0
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


class Running(Protocol):
    """A process on its way."""

    @property
    def job(self) -> Job:
        """The job."""
        ...

    def finished(self) -> Finished | None:
        """Return how it ended; None while it runs."""
        ...

    def ask(self) -> None:
        """Ask it to end."""
        ...

    def force(self) -> None:
        """End it."""
        ...


class Runner(Protocol):
    """Where processes run."""

    def start(self, job: Job, environment: Mapping[str, str]) -> Running:
        """Start a process with these environment variables, in the current folder."""
        ...


@dataclass(frozen=True, kw_only=True)
class LocalRunning:
    """A process on this machine."""

    job: Job
    process: subprocess.Popen[bytes]
    started: float
    lifeline: IO[bytes] | None  # which closes when this process ends, however it does

    def finished(self) -> Finished | None:
        """Return how it ended; None while it runs."""
        found = ended(self.job, self.process.poll(), self.started)
        if found is not None and self.lifeline is not None:
            self.lifeline.close()
        return found

    def ask(self) -> None:
        """Ask it and its children to end."""
        _send(self.process, "SIGTERM")

    def force(self) -> None:
        """End it and its children."""
        _send(self.process, "SIGKILL")
        self.process.wait()
        self.finished()


class LocalRunner:
    """Processes of this machine."""

    def start(self, job: Job, environment: Mapping[str, str]) -> LocalRunning:
        """Start a process with these environment variables, in the current folder."""
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("ab" if job.append else "wb") as log:
            given, kept = os.pipe() if os.name == "posix" else (None, None)
            environment = environment if given is None else {**environment, LIFELINE: str(given)}
            # A session of its own keeps a Ctrl-C of the terminal from reaching the child before we end it in order.
            process = subprocess.Popen(
                job.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
                pass_fds=() if given is None else (given,),
            )
            if given is not None:
                os.close(given)
        lifeline = None if kept is None else os.fdopen(kept, "wb")
        return LocalRunning(job=job, process=process, started=time.monotonic(), lifeline=lifeline)


def ended(job: Job, code: int | None, started: float) -> Finished | None:
    """Return how a job ended that writes its log on this machine, by its exit code; None where it has none yet."""
    if code is None:
        return None
    return Finished(job=job, code=code, seconds=time.monotonic() - started, tail=tail(job.log))


def cpu_count() -> int:
    """The number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_jobs(
    possible: Callable[[], Sequence[Job]],
    *,
    width: int,
    threads: int,
    console: Console,
    describe: Callable[[Finished], str],
    runner: Runner | None = None,
) -> None:
    """Run processes, at most `width` at a time, and what becomes possible by them, until nothing is left.

    A process that fails is noted and does not stop the others. On Ctrl-C (or a signal that ends this process) the
    children are asked to stop, ended if they do not within ten seconds, and `KeyboardInterrupt` goes on.

    Args:
        possible: Returns what can start now and was not returned before, in the order of starting; asked at the
            beginning and whenever processes have ended.
        width: How many run side by side.
        threads: What each process gets as `OMP_NUM_THREADS`.
        console: Where progress goes: live on a terminal, else one line for each event.
        describe: Words the line that tells how a process ended; called before `possible` is asked again.
        runner: Where they run; by default on this machine.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    runner = runner or LocalRunner()
    running = dict[TaskID, Running]()
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    board = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with _signals_as_interrupts(), board as progress:
        try:
            waiting = list(possible())
            while waiting or running:
                while waiting and len(running) < width:
                    job = waiting.pop(0)
                    if progress.disable:
                        _say(console, f"start   {job.title}")
                    running[progress.add_task(job.title, total=None)] = runner.start(job, environment)
                time.sleep(_POLL_SECONDS)
                ends = [(task, end) for task, item in running.items() if (end := item.finished()) is not None]
                for task, end in ends:
                    del running[task]
                    progress.remove_task(task)
                    _say(console, describe(end))
                if ends:
                    waiting += possible()
        except KeyboardInterrupt:
            _say(console, f"stopping {len(running)} running process(es)")
            raise
        finally:
            stop(list(running.values()))


def stop(running: Sequence[Running], grace: float = GRACE_SECONDS) -> None:
    """End processes: asked first, forced after a grace period (in seconds) or on a second Ctrl-C."""
    for item in running:
        item.ask()
    deadline = time.monotonic() + grace
    try:
        while time.monotonic() < deadline and any(item.finished() is None for item in running):
            time.sleep(_POLL_SECONDS)
    finally:
        for item in running:
            if item.finished() is None:
                item.force()


def tail(log: Path, lines: int = _TAIL_LINES) -> str:
    """The last lines of a log as a person would see them: no colour codes, progress bars at their last state."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        text = file.read().decode("utf-8", errors="replace")
    shown = (_TERMINAL_CODES.sub("", line).rstrip("\r").rsplit("\r", 1)[-1].rstrip() for line in text.split("\n"))
    return "\n".join([line for line in shown if line][-lines:])


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


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
