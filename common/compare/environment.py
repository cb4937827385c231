"""What runs ran on: versions, device, precision, and how many ran side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from common.compare.results import Run


def environment_of(runs: Sequence[Run]) -> dict[str, str]:
    """Return what finished runs ran on; a value that differs between them lists all that occurred."""
    records: list[Mapping[str, Any]] = []
    for run in runs:
        stored = run.trial.folder / "trial.json"
        if run.metrics and stored.exists():
            beside = json.loads(stored.read_text(encoding="utf-8")).get("side_by_side", "unknown")
            records.append({**run.metrics.environment, "runs side by side": beside})
    names = dict.fromkeys(name for record in records for name in record)
    return {name: ", ".join(dict.fromkeys(str(r.get(name, "unknown")) for r in records)) for name in names}
