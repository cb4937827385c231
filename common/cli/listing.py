"""`graft list` and `graft show`: what there is, without importing torch."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from common.domain import Domain
from common.errors import GraftError, unknown

if TYPE_CHECKING:
    from common.artifacts import Row

KINDS = ("methods", "baselines", "data", "checkpoints", "domains", "recipes")
CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def add_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this file's verbs."""
    parser = verbs.add_parser("list", help=f"list {', '.join(KINDS)}")
    parser.add_argument("kind", nargs="?", default="domains", help=f"one of {', '.join(KINDS)}")
    parser.add_argument("--out", type=Path, metavar="FILE", help="methods: write all that is known of them as Markdown")
    parser.set_defaults(handler=_list)
    parser = verbs.add_parser("show", help="explain one method, dataset or checkpoint")
    parser.add_argument(
        "name", nargs="+", help="its name, as `graft list` prints it; `method` or another kind before it"
    )
    parser.set_defaults(handler=_show)


def _list(args: argparse.Namespace, domains: Mapping[str, Domain]) -> int:
    if args.kind not in KINDS:
        raise unknown("list", args.kind, KINDS)
    if args.out is not None:
        return _write(args.kind, args.out)
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
        from common.methods.taxonomy import by_branch

        names = [name for group in by_branch().values() for name in group]
        rows = [[n, METHODS[n].taxonomy, METHODS[n].summary, METHODS[n].source] for n in names]
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


def _write(kind: str, out: Path) -> int:
    """Write the page of all methods."""
    from common.cli._methods_page import page

    if kind != "methods" or out.suffix != ".md":
        raise GraftError("--out writes the page of all methods: graft list methods --out FILE.md.")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(), encoding="utf-8")
    Console(highlight=False, soft_wrap=True).print(f"{out}: all methods, their settings and sources")
    return 0


def _show(args: argparse.Namespace, domains: Mapping[str, Domain]) -> int:
    from common.artifacts import catalog
    from common.methods import METHODS

    rows = catalog()
    known = {
        "method": list(METHODS),
        "data": [row.name for row in rows.values() if row.kind == "dataset"],
        "checkpoint": [row.name for row in rows.values() if row.kind == "checkpoint"],
    }
    *kinds, name = args.name
    if len(kinds) > 1:
        raise GraftError(f"graft show takes one name, and '{' '.join(args.name)}' was given.")
    if kinds and kinds[0] not in known:
        raise unknown("kind", kinds[0], known)
    allowed = known[kinds[0]] if kinds else [*METHODS, *rows]
    if name not in allowed:
        raise unknown(kinds[0] if kinds else "name", name, allowed)
    if name in METHODS:
        _explain(name)
    else:
        _show_row(rows[name])
    return 0


def _explain(name: str) -> None:
    """Print what a method does, where it comes from and what can be set."""
    from common.cli._methods_page import explanation, settings
    from common.methods import METHODS

    spec = METHODS[name]
    console = Console(highlight=False)
    console.print(f"[bold]{name}[/] ({spec.taxonomy}{', ' + spec.source if spec.source else ''})\n")
    console.print(explanation(spec), markup=False)
    found = settings(spec)
    console.print("\nSettings and their defaults:" if found else "\nIt has no settings.", markup=False)
    for setting in found:
        console.print(f"  {setting.name}: {setting.default}", markup=False)
        if setting.meaning:
            console.print(Padding(Text(setting.meaning), (0, 0, 0, 6)))


def _show_row(row: Row) -> None:
    """Print a row of the catalog in full."""
    console = Console(highlight=False)
    for field in dataclasses.fields(row):
        value = getattr(row, field.name)
        shown = ", ".join(map(str, value)) if isinstance(value, (tuple, Mapping)) else value
        console.print(f"{field.name}: {shown}", markup=False)
