"""`graft list` and `graft show`: what there is, without importing torch."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib.util
import inspect
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from common.domain import Domain
from common.errors import unknown

KINDS = ("methods", "baselines", "data", "checkpoints", "domains", "recipes")
CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def add_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this file's verbs."""
    parser = verbs.add_parser("list", help=f"list {', '.join(KINDS)}")
    parser.add_argument("kind", nargs="?", default="domains", help=f"one of {', '.join(KINDS)}")
    parser.set_defaults(handler=_list)
    parser = verbs.add_parser("show", help="explain one method, dataset or checkpoint")
    parser.add_argument("name", help="its name, as `graft list` prints it")
    parser.set_defaults(handler=_show)


def _list(args: argparse.Namespace, domains: Mapping[str, Domain]) -> int:
    if args.kind not in KINDS:
        raise unknown("list", args.kind, KINDS)
    table = Table(box=None, pad_edge=False)
    for title, rows in (_rows(args.kind, domains),):
        for column in title:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*row)
    Console().print(table)
    return 0


def _rows(kind: str, domains: Mapping[str, Domain]) -> tuple[list[str], list[list[str]]]:
    if kind == "methods":
        from common.methods import METHODS

        rows = [[n, m.taxonomy, m.summary, m.source] for n, m in METHODS.items()]
        return ["method", "family", "what it trains", "source"], rows
    if kind == "baselines":
        return ["baseline", "domain", "what it predicts"], [
            [name, domain.name, _first_line(place)]
            for domain in domains.values()
            for name, place in domain.baselines.items()
        ]
    if kind in ("data", "checkpoints"):
        from common.artifacts import catalog, is_cached

        wanted = "dataset" if kind == "data" else "checkpoint"
        return ["name", "domain", "licence", "size", "cached", "what it is"], [
            [
                r.name,
                ", ".join(r.domains),
                r.licence,
                f"{r.size / 1e6:.0f} MB",
                "yes" if is_cached(r.name) else "no",
                r.summary,
            ]
            for r in catalog().values()
            if r.kind == wanted
        ]
    if kind == "recipes":
        root = CONFIGS.parent
        rows = [[str(p.relative_to(root)), _purpose(p)] for p in sorted(CONFIGS.rglob("*.yaml"))]
        return ["recipe", "purpose"], rows
    return ["domain", "tasks", "data", "what it is"], [
        [d.name, ", ".join(d.tasks), ", ".join(d.data), d.summary] for d in domains.values()
    ]


def _first_line(place: str) -> str:
    """Read the first line of a function's docstring out of its source; importing it would import torch."""
    module, _, name = place.partition(":")
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return ""
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    return ""


def _purpose(path: Path) -> str:
    """Read the first comment line of a recipe."""
    first = next(iter(path.read_text(encoding="utf-8").splitlines()), "")
    return first.removeprefix("#").removeprefix(" Purpose:").strip() if first.startswith("#") else ""


def _show(args: argparse.Namespace, domains: Mapping[str, Domain]) -> int:
    from common.artifacts import catalog
    from common.methods import METHODS

    console = Console(highlight=False)
    if args.name in METHODS:
        spec = METHODS[args.name]
        console.print(f"[bold]{args.name}[/] ({spec.taxonomy}{', ' + spec.source if spec.source else ''})\n")
        console.print(inspect.getdoc(spec) or "", markup=False)
        console.print("\nDefaults:", markup=False)
        for name, value in dataclasses.asdict(spec()).items():
            console.print(f"  {name}: {value}", markup=False)
        return 0
    rows = catalog()
    if args.name in rows:
        row = rows[args.name]
        for field in dataclasses.fields(row):
            value = getattr(row, field.name)
            shown = ", ".join(map(str, value)) if isinstance(value, (tuple, Mapping)) else value
            console.print(f"{field.name}: {shown}", markup=False)
        return 0
    raise unknown("name", args.name, [*METHODS, *rows])
