"""Comparing methods: a study file in, runs side by side, a table and a report out.

This room knows run folders (`metrics.json`, `predictions.jsonl`) and command lines, nothing else of Graft:
`study` reads the file and `expand` the command line, `runner` runs processes, `stages` takes a study through them,
`results` and `examples` read what they left, `statistics` and `evidence` say what it proves, `ledger` and
`integrity` whether it can be believed, `summary` words it, `tables` and `report` write it down.
"""

from __future__ import annotations

from common.compare.stages import compare, run_studies
from common.compare.study import Method, Study, Trial, load_study

__all__ = ["Method", "Study", "Trial", "compare", "load_study", "run_studies"]
