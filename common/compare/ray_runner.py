"""Trials as tasks of Ray: the same command lines, on the machines of a cluster or on this one.

A cluster is found by `RAY_ADDRESS`; without it Ray starts on this machine. All machines must see the study's folder and
the same Python environment at the same paths, as on a shared file system.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.compare.runner import GRACE_SECONDS, Finished, Job, LocalRunner, stop
from common.errors import GraftError

_POLL_SECONDS = 0.1
_DEVICES = "CUDA_VISIBLE_DEVICES"  # which Ray sets for each task


@dataclass(frozen=True, kw_only=True)
class RayRunning:
    """A task of Ray."""

    job: Job
    ray: Any
    task: Any

    def finished(self) -> Finished | None:
        """Return how it ended; None while it runs or waits for a machine."""
        done, _ = self.ray.wait([self.task], timeout=0)
        if not done:
            return None
        try:
            code, seconds, tail = self.ray.get(self.task)
        except (self.ray.exceptions.RayError, KeyboardInterrupt) as error:  # the machine was lost, or it was cancelled
            return Finished(job=self.job, code=1, seconds=0.0, tail=f"Ray ended the trial: {error}".strip())
        return Finished(job=self.job, code=code, seconds=seconds, tail=tail)

    def ask(self) -> None:
        """Ask it to end."""
        self.ray.cancel(self.task, force=False)

    def force(self) -> None:
        """End it."""
        self.ray.cancel(self.task, force=True)


class RayRunner:
    """Machines of a Ray cluster.

    Args:
        width: How many trials run side by side; they share the cluster's GPUs.

    Raises:
        GraftError: If Ray is not installed.
    """

    def __init__(self, width: int) -> None:
        if importlib.util.find_spec("ray") is None:
            raise GraftError("--runner ray needs Ray, which is not installed. Run: pip install 'graft[ray]'.")
        self._ray: Any = importlib.import_module("ray")
        if not self._ray.is_initialized():
            self._ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        machines = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        self._cores = max(machine.get("CPU", 1.0) for machine in machines)
        gpus = sum(machine.get("GPU", 0.0) for machine in machines)
        self._gpus = min(1.0, math.floor(1000 * gpus / width) / 1000)

    def start(self, job: Job, environment: Mapping[str, str]) -> RayRunning:
        """Start a process with these environment variables, in the current folder."""
        cores = min(float(environment["OMP_NUM_THREADS"]), self._cores)
        # A trial that failed is reported, not repeated; the study's next run repeats it.
        needs = {"num_cpus": cores, "num_gpus": self._gpus, "max_retries": 0, "name": job.title}
        task = self._ray.remote(_run).options(**needs).remote(job, dict(environment), Path.cwd())
        return RayRunning(job=job, ray=self._ray, task=task)


def _run(job: Job, environment: dict[str, str], folder: Path) -> tuple[int, float, str]:
    """Run a job where Ray put it; return exit code, seconds and the end of its log."""
    os.chdir(folder)
    devices = {_DEVICES: os.environ[_DEVICES]} if _DEVICES in os.environ else {}
    running = LocalRunner().start(job, {**environment, **devices})
    try:
        while (finished := running.finished()) is None:
            time.sleep(_POLL_SECONDS)
    except BaseException:
        stop([running], grace=GRACE_SECONDS / 2)  # before the study's own patience ends
        raise
    return finished.code, finished.seconds, finished.tail
