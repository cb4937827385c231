"""`graft doctor`: what is installed, what is cached, what is missing and how to get it."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, requires, version

from rich.console import Console
from rich.table import Table

from common.domain import Domain


def add_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this file's verbs."""
    parser = verbs.add_parser("doctor", help="check versions, devices, cache, and say what is missing")
    parser.set_defaults(handler=_doctor)


def _doctor(args: argparse.Namespace, domains: Mapping[str, Domain]) -> int:
    problems: list[str] = []
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, value in (*_packages(problems), *_machine(), *_cache(problems)):
        table.add_row(name, value)
    console = Console(highlight=False)
    console.print(table)
    for problem in problems:
        console.print(f"[yellow]missing[/] {problem}")
    console.print("All is in place." if not problems else f"{len(problems)} things are missing; see above.")
    return 0


def _packages(problems: list[str]) -> list[tuple[str, str]]:
    from packaging.requirements import Requirement

    rows = [("python", platform.python_version())]
    try:
        wanted = requires("graft") or []
    except PackageNotFoundError:
        problems.append("package graft, of which this is the source: run `make install`")
        wanted = []
    for line in wanted:
        requirement = Requirement(line)
        if requirement.marker is not None:
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            rows.append((requirement.name, "not installed"))
            problems.append(f"package {requirement.name}: run `make install`")
            continue
        fits = requirement.specifier.contains(installed, prereleases=True)
        rows.append((requirement.name, installed if fits else f"{installed} (wanted {requirement.specifier})"))
        if not fits:
            problems.append(f"{requirement.name} {requirement.specifier} (found {installed}): run `make install`")
    return rows


def _machine() -> list[tuple[str, str]]:
    import torch

    cuda = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    from common.run import fast_precision

    return [
        ("cores", f"{os.cpu_count()} ({torch.get_num_threads()} threads)"),
        ("gpu", ", ".join(cuda) or "none; everything runs on the CPU"),
        ("precision auto", fast_precision()),
        ("program", sys.executable),
    ]


def _cache(problems: list[str]) -> list[tuple[str, str]]:
    from common.artifacts import cache_dir, catalog, is_cached

    folder = cache_dir()
    place = folder if folder.exists() else folder.parent if folder.parent.exists() else folder.anchor
    rows = [("cache", f"{folder} ({shutil.disk_usage(place).free / 1e9:.0f} GB free)")]
    for name, row in catalog().items():
        cached = is_cached(name)
        rows.append((f"  {name}", "cached" if cached else f"not cached ({row.size / 1e6:.0f} MB)"))
        if not cached:
            problems.append(f"{row.kind} {name}: run `graft fetch {name}`, or it is fetched when first used")
    return rows
