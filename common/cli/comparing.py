"""`graft compare`: run a study of methods and report it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from common.domain import Domain


def add_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this file's verbs."""
    parser = verbs.add_parser("compare", help="run a study of methods, and write its table and report")
    parser.add_argument("study", type=Path, help="a study file, such as configs/demo.yaml")
    parser.add_argument("--out", type=Path, help="folder for runs, table and report (default: the study's own)")
    parser.add_argument("--jobs", type=int, help="trials at a time (default: half the cores)")
    parser.set_defaults(handler=_compare)


def _compare(args: argparse.Namespace, domains: Mapping[str, Domain]) -> int:
    from common.compare import compare

    return compare(args.study, args.out, args.jobs)
