"""Listing and help are quick, since nothing on their way imports torch; plain imports are as cheap."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = (
    "torch",
    "lightning",
    "peft",
    "timm",
    "transformers",
    "monai",
    "torchvision",
    "pandas",
    "matplotlib",
    "torchmetrics",
)
SECONDS = 2.0

MODULES = ("common", "common.errors", "common.domain", "common.methods", "common.cli", "common.artifacts", "domains")
COMMANDS = (
    ["--help"],
    ["--version"],
    ["list"],
    ["list", "methods"],
    ["list", "data"],
    ["list", "baselines"],
    ["list", "checkpoints"],
    ["list", "recipes"],
    ["show", "LoRA"],
    ["list", "no-such-kind"],
)
REPORT = f"import sys; heavy = [name for name in {HEAVY} if name in sys.modules]; assert not heavy, heavy"


def seconds(code):
    """Processor time of a fresh interpreter that runs some code; other work on the machine does not count."""
    before = os.times()
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    after = os.times()
    assert done.returncode == 0, done.stderr
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return min(used, time.perf_counter() - started)


@pytest.mark.parametrize("module", MODULES)
def test_importing_loads_nothing_heavy(module):
    assert seconds(f"import {module}\n{REPORT}") < SECONDS


@pytest.mark.parametrize("argv", COMMANDS, ids=" ".join)
def test_a_command_that_only_tells_loads_nothing_heavy(argv):
    code = f"""
import sys
from common.cli import run
from domains import DOMAINS
try:
    run({argv}, DOMAINS)
except SystemExit:
    pass
{REPORT}
"""
    assert seconds(code) < SECONDS
