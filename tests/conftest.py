"""What all tests share: which ones run, and no network."""

from __future__ import annotations

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--artifacts", action="store_true", help="also run the tests that need starter artifacts")
    parser.addoption("--slow", action="store_true", help="also run the slow tests")


def pytest_collection_modifyitems(config, items):
    skips = {
        "artifacts": not config.getoption("--artifacts"),
        "slow": not config.getoption("--slow"),
        "network": True,
        "gpu": not torch.cuda.is_available(),
    }
    for item in items:
        for marker, skip in skips.items():
            if skip and marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=f"needs {marker}"))
    items.sort(key=lambda item: "long" not in item.keywords)  # else they start last, and all but one worker wait
