"""Comparing methods: a study file in, runs side by side, a table and a report out.

This room knows run folders (`metrics.json`, `predictions.jsonl`) and command lines, nothing else of Graft:
`study_file` reads the file and `expand` the command line into what `study` and `prepared` describe, `runner` runs
processes, which `forked_runner` or `ray_runner` start, `stages` takes studies through them, `results`, `examples` and
`worst` read what they left, `statistics` and `evidence` say what it proves, `ledger` and `integrity` whether it can
be believed, `summary` words it, `tables`, `records` and `report` write it down. `claims` reads cards of the
literature, `outlook` counts what they still ask for, `reproduce` runs it and `verdicts` decides.
"""

from __future__ import annotations

from common.compare.stages import compare, run_studies
from common.compare.study import Method, Part, Study, Trial
from common.compare.study_file import load_studies

__all__ = ["Method", "Part", "Study", "Trial", "compare", "load_studies", "run_studies"]
