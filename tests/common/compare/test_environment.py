"""What runs ran on, of runs that did not all run on the same."""

from __future__ import annotations

import json
from dataclasses import replace

from common.compare.environment import environment_of


def test_what_differs_between_runs_lists_all_and_what_did_not_finish_says_nothing(fabric):
    runs = []
    for run, precision, beside in zip(
        fabric.block("stars", {"LoRA": [0.1, 0.2, 0.3, 0.4]}).runs,
        ("32-true", "bf16-mixed", "32-true", ""),
        (2, 2, 4, 8),
        strict=True,
    ):
        assert run.metrics is not None
        (run.trial.folder / "trial.json").write_text(json.dumps({"side_by_side": beside}))
        found = {"device": "cpu", "precision": precision}
        runs.append(replace(run, metrics=replace(run.metrics, environment=found) if precision else None))
    expected = {"device": "cpu", "precision": "32-true, bf16-mixed", "runs side by side": "2, 4"}
    assert environment_of(runs) == expected
    assert environment_of([]) == {}
