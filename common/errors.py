"""Errors that are the user's to mend.

A `GraftError` reaches the command line as one line and exit code 2, never as a traceback. Its message states what
was given, what is allowed and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GraftError(Exception):
    """A mistake in what the user gave (configuration, data, checkpoint, permissions), with what to do about it."""


def suggest(given: str, allowed: Iterable[str]) -> str:
    """Word the hint that follows an unknown name.

    Args:
        given: The unknown name.
        allowed: The names that would have been accepted.

    Returns:
        `" Did you mean 'x'?"` where one is near, then the sorted list of allowed names.
    """
    names = sorted(allowed)
    folded = {name.lower(): name for name in names}
    near = [folded[given.lower()]] if given.lower() in folded else difflib.get_close_matches(given, names, 1, 0.5)
    if not near:
        near = [folded[m] for m in difflib.get_close_matches(given.lower(), list(folded), n=1, cutoff=0.5)]
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return f"{hint} Allowed: {', '.join(names)}."


def unknown(kind: str, given: str, allowed: Iterable[str]) -> GraftError:
    """Build the error for an unknown name of some kind (method, role, row, ...)."""
    return GraftError(f"Unknown {kind} '{given}'.{suggest(given, allowed)}")
