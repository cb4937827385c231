"""`graft compare` and `graft reproduce`: run studies of methods and report them; decide claims by them."""

from __future__ import annotations

import argparse
import importlib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.domain import Domain
from common.errors import GraftError, unknown

if TYPE_CHECKING:
    from rich.console import Console

    from common.compare.claims import Card, ScaleName

CLAIMS = Path(__file__).resolve().parents[2] / "configs" / "claims"
_COUNTS, _SHARES = ("shots", "labelled"), ("share",)


def add_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this file's verbs."""
    from common.compare.rates import RATES, rates_of

    grids = "; ".join(
        f"{', '.join(name for name, own in RATES.items() if own == rates)}: {_numbers(rates)}"
        for rates in dict.fromkeys(RATES.values())
    )
    parser = verbs.add_parser(
        "compare",
        help="compare methods by a study file, or on recipes, and write table and report",
        epilog=f"Learning rates on offer by default: {grids}; all others: {_numbers(rates_of(''))}.",
    )
    parser.add_argument("paths", nargs="+", metavar="FILE", help="one study file, or recipes with --methods")
    parser.add_argument("--methods", help="methods to compare on the recipes, as LoRA,BitFit,FullFineTune")
    parser.add_argument("--seeds", type=int, help="seeds of the final runs (default: 3)")
    parser.add_argument("--tune-seeds", type=int, help="seeds over whose mean settings are chosen (default: 1)")
    parser.add_argument("--rates", action="append", help="learning rates of all methods, or as LoRA=1e-4,1e-3 of one")
    parser.add_argument("--weight-decays", help="weight decays of all methods, each tried with each rate, as 0,0.05")
    parser.add_argument("--budget", help="shares of the backbone's parameters that methods are sized to, as 0.3%%,1%%")
    parser.add_argument("--shots", help="amounts of training data, as 1,5,10,50%%,all")
    parser.add_argument("--set", action="append", metavar="OPTION=VALUE", help="option of graft fit, for all runs")
    parser.add_argument("--out", type=Path, help="folder for runs, table and report (default: the study's own)")
    parser.add_argument("--jobs", type=int, help="trials at a time (default: half the cores)")
    parser.add_argument("--parquet", action="store_true", help="write results.parquet too (needs 'graft[parquet]')")
    parser.add_argument("--runner", default="local", help="local, or ray: trials as tasks of Ray (needs 'graft[ray]')")
    parser.set_defaults(handler=_compare)
    parser = verbs.add_parser("reproduce", help="decide claims of the literature by runs of your own")
    parser.add_argument("cards", nargs="*", metavar="CARD", help="ids of claims (none: list them), or files")
    parser.add_argument("--all", action="store_true", help="every claim")
    parser.add_argument("--scale", default="embedded", help="embedded (a CPU and the starters) or full")
    parser.add_argument("--jobs", type=int, help="trials at a time (default: half the cores)")
    parser.add_argument("--out", type=Path, default=Path("runs/claims"), help="folder of the verdicts")
    parser.set_defaults(handler=_reproduce)


def _reproduce(args: argparse.Namespace, domains: Mapping[str, Domain]) -> int:
    from rich.console import Console

    from common.compare.claims import SCALES, load_cards
    from common.compare.outlook import outlook
    from common.compare.reproduce import reproduce

    scale = next((name for name in SCALES if name == args.scale), None)
    if scale is None:
        raise unknown("scale", args.scale, SCALES)
    if args.cards and args.all:
        raise GraftError("Claims and --all. Name some, or ask for all.")
    cards = load_cards(CLAIMS, args.cards)
    if not args.cards and not args.all:
        _list_claims(cards, scale, args.out, Console(highlight=False))
        return 0
    if args.all:  # what is nearly there is decided first
        cards = sorted(cards, key=lambda card: outlook(card, scale, args.out).lacking)
    return reproduce(cards, scale, args.out, args.jobs, imports=_modules(domains))


def _list_claims(cards: Sequence[Card], scale: ScaleName, out: Path, console: Console) -> None:
    """Print what each claim says and what it still takes to decide it, then what all of them take together."""
    from common.compare.outlook import outlook

    together: dict[str, bool] = {}
    for card in cards:
        found = outlook(card, scale, out)
        together |= found.runs
        state = found.reason or f"{len(found.runs)} runs, {len(found.runs) - found.lacking} of them there already"
        console.print(f"{card.id}: {card.statement}\n    {state}", markup=False, soft_wrap=True)
    there = sum(together.values())
    total = f"{len(together)} runs at scale {scale}, {there} of them there already (claims share studies)"
    console.print(f"\nTogether {total}.", soft_wrap=True)
    console.print("Name some of the claims, or give --all.")


def _modules(domains: Mapping[str, Domain]) -> tuple[str, ...]:
    return tuple(module for domain in domains.values() for module in domain.modules)


def _numbers(rates: tuple[float, ...]) -> str:
    return ", ".join(f"{rate:g}" for rate in rates)


def _compare(args: argparse.Namespace, domains: Mapping[str, Domain]) -> int:
    from common.compare import compare, run_studies
    from common.compare.expand import expand
    from common.compare.stages import Options

    how = Options(runner=args.runner, parquet=args.parquet, imports=_modules(domains))
    if args.methods is None:
        options = ("seeds", "tune_seeds", "rates", "weight_decays", "budget", "shots", "set")
        given = [f"--{name.replace('_', '-')}" for name in options if getattr(args, name) is not None]
        if given:
            raise GraftError(f"{', '.join(given)} without --methods. A study file says these itself.")
        if len(args.paths) > 1:
            raise GraftError("Several files without --methods. Give one study file, or recipes and --methods.")
        return compare(Path(args.paths[0]), args.out, args.jobs, options=how)
    studies = expand(_request(args), lambda name: _shots_of(name, domains))
    return run_studies(studies, args.jobs, options=how)[0]


def _request(args: argparse.Namespace) -> Any:  # noqa: ANN401 (importing its type here would slow every verb)
    from common.compare.expand import Request, parse_decays, parse_rates
    from common.methods import METHODS

    methods = [name.strip() for name in args.methods.split(",") if name.strip()]
    for name in methods:
        if name not in METHODS:
            raise unknown("method", name, METHODS)
    if not methods or len(set(methods)) < len(methods):
        raise GraftError(f"--methods {args.methods} names a method twice or none. Name each once, as LoRA,BitFit.")
    overrides: dict[str, str] = {}
    for text in args.set or ():
        option, sign, value = text.partition("=")
        if not option or not sign or option.startswith("-"):
            raise GraftError(f"--set {text} is not understood. Write it as trainer.max_epochs=2.")
        overrides[option] = value
    return Request(
        recipes=args.paths,
        methods=methods,
        seeds=3 if args.seeds is None else args.seeds,
        tune_seeds=1 if args.tune_seeds is None else args.tune_seeds,
        rates=parse_rates(args.rates or (), methods),
        shots=[one.strip() for one in args.shots.split(",")] if args.shots else (),
        overrides=overrides,
        out=args.out or Path("runs") / "compare",
        weight_decays=parse_decays(args.weight_decays) if args.weight_decays else (),
        budgets=_budgets(args.budget, methods) if args.budget is not None else {},
    )


def _budgets(text: str, methods: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Give the budgets to the methods that have a size; the others run as they are, for comparison."""
    from rich.console import Console

    from common.compare.budget import parse_budgets
    from common.methods.hybrid import with_a_size

    shares, known = parse_budgets(text), with_a_size()
    sized = [name for name in methods if name in known]
    if not sized:
        raise GraftError(
            f"--budget {text}: none of {', '.join(methods)} has a size. Give one that has: {', '.join(known)}."
        )
    if len(sized) < len(methods):
        left = ", ".join(name for name in methods if name not in sized)
        Console(highlight=False).print(f"{left}: without a size, so trained as it is beside the others.")
    return dict.fromkeys(sized, shares)


def _shots_of(name: str, domains: Mapping[str, Domain]) -> Any:  # noqa: ANN401
    """Look which options a datamodule, or a class that it is derived from, has for less training data."""
    from common.compare.expand import Shots

    parameters: dict[str, inspect.Parameter] = {}
    for one in inspect.getmro(_datamodule(name, domains)):
        if "__init__" in vars(one):
            parameters = {**inspect.signature(one).parameters, **parameters}
    counts = next((option for option in _COUNTS if option in parameters), "")
    shares = next((option for option in _SHARES if option in parameters), "")
    return Shots(counts=counts, shares=shares, whole=bool(counts) and parameters[counts].default is None)


def _datamodule(name: str, domains: Mapping[str, Domain]) -> type[Any]:
    module, _, plain = name.rpartition(".")
    for domain in domains.values():
        if not module and plain in domain.data:
            module = domain.data[plain]
    if not module:
        raise unknown("datamodule", name, [known for domain in domains.values() for known in domain.data])
    return getattr(importlib.import_module(module), plain)
