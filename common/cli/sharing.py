"""`graft fetch`, `export`, `merge`, `combine`, `predict` and `embed`: what goes in and out of a run."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from common.domain import Domain


def add_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this file's verbs."""
    parser = verbs.add_parser("fetch", help="download and verify a dataset or checkpoint of the catalog")
    parser.add_argument("names", nargs="+", metavar="NAME", help="as `graft list data` and `list checkpoints` print it")
    parser.add_argument("--from", dest="from_file", type=Path, help="take this local file instead of downloading")
    parser.set_defaults(handler=_fetch)
    parser = verbs.add_parser("export", help="write a run's adapter folder, loadable with plain peft")
    parser.add_argument("run", type=Path, help="a finished run's folder")
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.set_defaults(handler=_export)
    parser = verbs.add_parser("merge", help="merge an adapter folder into plain weights")
    parser.add_argument("adapter", type=Path, help="a folder that `graft export` wrote")
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.set_defaults(handler=_merge)
    parser = verbs.add_parser("combine", help="combine adapter folders of one backbone into one")
    parser.add_argument(
        "adapters", nargs="+", type=Path, help="folders that `graft export` wrote; the first gives the head"
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder to make")
    parser.add_argument("--weights", type=float, nargs="+", help="a factor for each (default: all equal, 1 in sum)")
    parser.add_argument("--how", default="linear", help="linear, ties or dare (default: linear)")
    parser.add_argument("--density", type=float, default=0.2, help="share of a change that ties and dare keep")
    parser.set_defaults(handler=_combine)
    parser = verbs.add_parser("predict", help="run an exported adapter on your own files")
    parser.add_argument("--adapter", type=Path, required=True, help="a folder that `graft export` wrote")
    parser.add_argument(
        "--out",
        type=Path,
        help="the CSV to write, or the folder for label maps (default: predictions.csv, predictions)",
    )
    parser.add_argument("--skip-bad", action="store_true", help="count and leave out files that cannot be read")
    parser.add_argument("files", nargs="+", type=Path, help="files or folders")
    parser.set_defaults(handler=_predict)
    parser = verbs.add_parser("embed", help="write a backbone's features of your own files")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--adapter", type=Path, help="a folder that `graft export` wrote")
    source.add_argument("--backbone", help="a bare pretrained backbone of the domain")
    parser.add_argument("--domain", help="the backbone's domain (default: the only one that embeds)")
    parser.add_argument("--out", type=Path, help="the file to write (default: embeddings.safetensors)")
    parser.add_argument("--residues", action="store_true", help="one vector a residue, instead of their mean")
    parser.add_argument("--skip-bad", action="store_true", help="count and leave out what cannot be read")
    parser.add_argument("files", nargs="+", type=Path, help="files or folders")
    parser.set_defaults(handler=_embed)


def _fetch(args: argparse.Namespace, domains: Mapping[str, Domain]) -> int:
    from common.artifacts import fetch
    from common.errors import GraftError

    if args.from_file is not None and len(args.names) > 1:
        raise GraftError(f"--from gives one file, but {len(args.names)} names were given. Fetch them one by one.")
    for name in args.names:
        path = fetch(name, from_file=args.from_file)
        Console(highlight=False, soft_wrap=True).print(f"{name}: verified, {path}")
    return 0


def _export(args: argparse.Namespace, domains: Mapping[str, Domain]) -> int:
    from common.exchange import export
    from common.run import read_trained

    certificate = export(args.run, args.out, read_trained(args.run), domains)
    merged = certificate["merge_max_abs_error"]
    merging = f"merges within {merged:.1e}" if merged is not None else f"not mergeable: {certificate['not_mergeable']}"
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{args.out}: reloads within {certificate['reload_max_abs_error']:.1e}, {merging}")
    return 0


def _merge(args: argparse.Namespace, domains: Mapping[str, Domain]) -> int:
    from common.exchange import merge

    error = merge(args.adapter, args.out, domains)
    Console(highlight=False, soft_wrap=True).print(f"{args.out}: plain weights, outputs within {error:.1e}")
    return 0


def _combine(args: argparse.Namespace, domains: Mapping[str, Domain]) -> int:
    from common.combine import Rule, combine

    weights = args.weights or [1 / len(args.adapters)] * len(args.adapters)
    combine(args.adapters, args.out, domains, Rule(weights=tuple(weights), how=args.how, density=args.density))
    Console(highlight=False, soft_wrap=True).print(f"{args.out}: {len(args.adapters)} adapters combined ({args.how})")
    return 0


def _predict(args: argparse.Namespace, domains: Mapping[str, Domain]) -> int:
    from common.exchange import load

    task = load(args.adapter, domains)
    out = {} if args.out is None else {"out": args.out}
    summary = domains[task.domain].load_predict()(task, args.files, **out, skip_bad=args.skip_bad)
    Console(highlight=False, soft_wrap=True).print(summary)
    return 0


def _embed(args: argparse.Namespace, domains: Mapping[str, Domain]) -> int:
    from common.errors import GraftError, unknown
    from common.exchange import load

    able = sorted(name for name, domain in domains.items() if domain.embed)
    if args.adapter is not None:
        if args.domain is not None:
            raise GraftError("An adapter knows its domain. Leave --domain out.")
        source = load(args.adapter, domains)
        domain = source.domain
    else:
        if args.domain is None and len(able) != 1:
            raise GraftError(
                f"Say which domain '{args.backbone}' is of with --domain: {', '.join(able) or 'none embeds'}."
            )
        source, domain = args.backbone, args.domain or able[0]
        if domain not in domains:
            raise unknown("domain", domain, able)
    function = domains[domain].load_embed()
    out = {} if args.out is None else {"out": args.out}
    summary = function(source, args.files, **out, residues=args.residues, skip_bad=args.skip_bad)
    Console(highlight=False, soft_wrap=True).print(summary)
    return 0
