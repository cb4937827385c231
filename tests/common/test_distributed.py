"""Two processes on one machine: the gradients meet, no parameter is unused, each example is seen once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys
from common.methods import METHODS
from common.run import fit
from tests.toy import ToyData, ToyTask

if __name__ == "__main__":
    spec = METHODS[sys.argv[2]]()
    fit(ToyTask(spec), ToyData(), sys.argv[1], max_epochs=1, strategy="ddp", accelerator="cpu", devices=2)
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["LoRA", "BitFit", "FullFineTune", "FishMask"])
def test_data_parallel_fit(method, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run = tmp_path / "run"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(run), method], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((run / "metrics.json").read_text())
    assert record["cost"]["steps"] == 3  # 20 examples over 2 processes in batches of 4
    assert 0.0 <= record["val"]["accuracy"] <= 1.0
