"""One cell: a method on a network is exact, or refused with a reason before it trains, or it fails."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common import tuners
from common.attach import attach, probe
from common.errors import GraftError
from common.matrix.bench import Bench, quiet
from common.matrix.checks import CHECKS, CheckFailed
from common.matrix.exported import specs_on
from common.matrix.specimen import Build
from common.methods import MethodSpec

Verdict = Literal["exact", "refused", "FAIL"]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What became of one method on one network.

    Attributes:
        method: Name of the method.
        column: Title of the network's column.
        verdict: `exact`, `refused`, `FAIL`.
        reason: Why it is refused, or the check that fails and what it found.
        remarks: What an exact cell's reader should know: other roles than the default, why it cannot be merged.
        own: Whether it runs in a tuner of Graft's own, which plain `peft` lacks.
        seconds: How long it took.
    """

    method: str
    column: str
    verdict: Verdict
    reason: str = ""
    remarks: tuple[str, ...] = ()
    own: bool = False
    seconds: float = 0.0


def run_cell(method: str, column: str, build: Build) -> Cell:
    """Try a method on a network.

    Args:
        method: A name of `METHODS`.
        column: Title of the network's column.
        build: Builds the specimen anew.
    """
    started = time.perf_counter()
    remarks: list[str] = []
    check, own = "attach", False
    try:
        with quiet(), tempfile.TemporaryDirectory() as folder:
            spec, remark = choose(method, build, Path(folder))
            remarks += [remark] if remark else []
            bench = Bench(build, spec, Path(folder))
            check = "alive"
            own = _is_alive(bench)
            for name, function in CHECKS.items():
                check = name
                remark = function(bench)
                remarks += [remark] if remark else []
        verdict, reason = "exact", ""
    except GraftError as error:
        # Only what is said before training is a refusal.
        verdict, reason = ("refused", str(error)) if check in ("attach", "alive") else ("FAIL", f"{check}: {error}")
    except CheckFailed as error:
        verdict, reason = "FAIL", f"{check}: {error}"
    except Exception as error:  # whatever a method raises on a network is a failure of this cell, and is told
        message = " ".join(str(error).split())
        verdict, reason = "FAIL", f"{check}: {type(error).__name__}: {message[:300]}"
    return Cell(
        method=method,
        column=column,
        verdict=verdict,
        reason=reason,
        remarks=tuple(remarks) if verdict == "exact" else (),
        own=own,
        seconds=time.perf_counter() - started,
    )


def choose(method: str, build: Build, folder: Path | None = None) -> tuple[MethodSpec, str]:
    """Return the first settings that a network does not refuse, and a remark on them.

    Args:
        method: A name of `METHODS`.
        build: Builds the network anew.
        folder: Where adapters may be written that a method is built on; by default they are gone on return.

    Raises:
        GraftError: All are refused; the message is what the first ones got.
    """
    refusal: GraftError | None = None
    with tempfile.TemporaryDirectory() as brief:
        for spec, remark in specs_on(method, build, folder or Path(brief)):
            specimen = build()
            try:
                attach(specimen.model, spec, specimen.family)
            except GraftError as error:
                refusal = refusal or error
            else:
                return spec, remark
    raise refusal or GraftError(f"{method} has no settings to try.")


def _is_alive(bench: Bench) -> bool:
    """Probe a fresh method, as a run does before it trains; tell whether its tuner is Graft's own."""
    attached = bench.fresh()
    probe(attached, lambda: bench.specimen.run(attached.model, bench.specimen.inputs))
    config = attached.plan.peft_config
    return config is not None and tuners.is_own(config.peft_type)
