"""Comparing methods: a study file in, runs side by side, a table and a report out.

This room knows run folders (`metrics.json`, `predictions.jsonl`) and command lines, nothing else of Graft:
`study` reads the file, `runner` runs processes, `stages` takes a study through them, `results` reads what they left,
`summary` words it, `tables` and `report` write it down.
"""

from __future__ import annotations

from common.compare.stages import compare
from common.compare.study import Method, Study, Trial, load_study

__all__ = ["Method", "Study", "Trial", "compare", "load_study"]
