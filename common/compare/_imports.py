"""Imported by the process that trials are forked from: imports what else they need.

What fails here fails again in the trial that needs it, whose log says why.
"""

from __future__ import annotations

import contextlib
import importlib
import os

from common.compare.forked_runner import IMPORTS

for _name in os.environ.get(IMPORTS, "").split():
    with contextlib.suppress(Exception):
        importlib.import_module(_name)
