"""A trial ends with the study that started it, even where the study was killed and could not say so.

Otherwise the trial would go on, and the study's next run would start a second process in the same run folder.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading

LIFELINE = "GRAFT_LIFELINE"  # names a descriptor that this process was given: a pipe's end to read from


def hold() -> None:
    """End this process with the one that started it, where that has given it a lifeline."""
    with contextlib.suppress(KeyError):
        end_with(int(os.environ.pop(LIFELINE)))  # which is for this process alone, not for its children


def end_with(pipe: int) -> None:
    """End this process and its children, as SIGTERM does, once nobody holds a pipe's other end any more.

    Args:
        pipe: The end to read from, to which nobody writes.
    """
    threading.Thread(target=_watch, args=(pipe,), name="lifeline", daemon=True).start()


def _watch(pipe: int) -> None:
    select.select([pipe], [], [])
    leads = os.getpgid(0) == os.getpid()
    (os.killpg if leads else os.kill)(os.getpid(), signal.SIGTERM)
