"""`graft cache`: list and remove the outputs of frozen backbones that runs have kept."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from common.domain import Domain
from common.errors import unknown


def add_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this file's verbs."""
    parser = verbs.add_parser("cache", help="list or clear the features of frozen backbones that runs have kept")
    parser.add_argument("--clear", metavar="NAME", help="remove one, by the name that is listed; or all of them")
    parser.set_defaults(handler=_cache)


def _cache(args: argparse.Namespace, domains: Mapping[str, Domain]) -> int:
    from common._row_store import limit_bytes, remove, root, stores

    found = stores()
    console = Console(highlight=False)
    if args.clear is not None:
        chosen = [s for s in found if args.clear == "all" or (args.clear and s.folder.name.startswith(args.clear))]
        if not chosen and args.clear != "all":
            raise unknown("frozen cache", args.clear, [*(stored.folder.name[:12] for stored in found), "all"])
        for stored in chosen:
            remove(stored.folder)
        freed = sum(stored.size for stored in chosen)
        console.print(f"Removed {len(chosen)} of {len(found)} caches ({freed / 1e6:.1f} MB).")
        return 0
    table = Table(box=None, pad_edge=False)
    for column in ("name", "task", "what", "size", "last used"):
        table.add_column(column, overflow="fold")
    for stored in found:
        key = stored.key
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(stored.used))
        size = f"{stored.size / 1e6:.1f} MB"
        table.add_row(stored.folder.name[:12], key.get("task", ""), key.get("transform", "unreadable"), size, used)
    console.print(table)
    total = sum(stored.size for stored in found)
    console.print(f"{root()}: {total / 1e6:.1f} MB of at most {limit_bytes() / 1e9:g} GB (GRAFT_FROZEN_GB)")
    return 0
