"""The console script `graft`: the core's command line over the built-in domains and those of installed packages."""

from __future__ import annotations

import sys

from common.cli import run
from domains import DOMAINS


def main() -> None:
    """Run the command line and exit with its code."""
    sys.exit(run(sys.argv[1:], DOMAINS))


if __name__ == "__main__":
    main()
