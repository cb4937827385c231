"""`graft matrix`: every method on every kind of network, cell by cell, and the page that shows it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from common.domain import Domain

if TYPE_CHECKING:
    from common.matrix import Cell

PAGE = Path(__file__).resolve().parents[1] / "MATRIX.md"


def add_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this file's verb."""
    parser = verbs.add_parser("matrix", help="try every method on every kind of network, and write the table")
    parser.add_argument("--methods", default="", metavar="A,B", help="only these methods")
    parser.add_argument("--columns", default="", metavar="A,B", help="only these networks, by their column's title")
    parser.add_argument("--covering", action="store_true", help="only a subset that meets every method and network")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"a .md or .html file (whole matrix: {PAGE.name})")
    parser.set_defaults(handler=_matrix)


def _matrix(args: argparse.Namespace, domains: Mapping[str, Domain]) -> int:
    from common.errors import GraftError
    from common.matrix import chosen, columns_of, covering, whole
    from common.methods import METHODS

    if args.out is not None and args.out.suffix not in (".md", ".html"):
        raise GraftError(f"--out is '{args.out}'; give a file that ends in .md or .html.")
    known = columns_of(domains)
    methods = chosen(_names(args.methods), list(METHODS), "method")
    columns = {title: known[title] for title in chosen(_names(args.columns), list(known), "column")}
    if not columns:
        raise GraftError("No domain offers a network to try methods on (Domain.specimens).")
    complete = not (args.methods or args.columns or args.covering)
    cells = _run(covering(methods, columns) if args.covering else whole(methods, columns), columns)
    out = args.out or (PAGE if complete else None)
    command = "graft matrix" if complete else "graft matrix (a part of it)"
    _write(cells, methods, columns, out, command)
    return 1 if any(cell.verdict == "FAIL" for cell in cells) else 0


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _run(pairs: Sequence[tuple[str, str]], columns: Mapping) -> list[Cell]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from common.matrix import run_grid

    cells: list[Cell] = []
    console = Console(highlight=False, soft_wrap=True)
    parts = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*parts, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(pairs))
        for cell in run_grid(pairs, columns):
            cells.append(cell)
            progress.update(task, advance=1, description=f"{cell.method} on {cell.column}")
            if cell.verdict == "FAIL":
                console.print(f"FAIL {cell.method} on {cell.column}: {cell.reason}", markup=False)
            elif not console.is_terminal:  # a log shows how far it is
                console.print(f"{len(cells)}/{len(pairs)} {cell.method} on {cell.column}: {cell.verdict}", markup=False)
    return cells


def _write(cells: Sequence[Cell], methods: Sequence[str], columns: Mapping, out: Path | None, command: str) -> None:
    from common.matrix.page import as_html, markdown
    from common.methods import METHODS

    taxonomy = {name: METHODS[name].taxonomy for name in methods}
    engine = {title: build().engine for title, build in columns.items()}
    text = markdown(cells, taxonomy, engine, command=command)
    console = Console(highlight=False, soft_wrap=True)
    if out is None:
        console.print(text, markup=False)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(as_html(text) if out.suffix == ".html" else text, encoding="utf-8")
    verdicts = [cell.verdict for cell in cells]
    shown = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in ("exact", "refused", "FAIL"))
    console.print(f"{out}: {len(cells)} cells, {shown}")
