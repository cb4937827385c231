"""`graft verify`: recompute what an adapter's certificate says."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from common.domain import Domain


def add_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this file's verb."""
    parser = verbs.add_parser("verify", help="check an adapter: its base model, its outputs and its merge, recomputed")
    parser.add_argument("adapter", type=Path, help="a folder that `graft export` wrote")
    parser.set_defaults(handler=_verify)


def _verify(args: argparse.Namespace, domains: Mapping[str, Domain]) -> int:
    from common.verify import verify

    found = verify(args.adapter, domains)
    merged = f"merges within {found.merge_error:.1e}" if found.merge_error is not None else found.not_mergeable
    written = ", ".join(f"{name} {number}" for name, number in found.versions.items())
    Console(highlight=False, soft_wrap=True).print(
        f"{args.adapter}: base {found.base_digest[:12]} fits, outputs within {found.output_error:.1e}, {merged} "
        f"(exported with {written})",
        markup=False,
    )
    return 0
