"""The command line: one file a verb or group of verbs; only the verbs that train or predict import torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from common import __version__
from common._lifeline import hold
from common.domain import Domain, with_plugins
from common.errors import GraftError, unknown

TRAINING = {
    "fit": "train a recipe into a run folder",
    "preview": "show what a recipe would adapt and how much memory it needs, without training",
    "validate": "evaluate a run on its validation split",
    "test": "evaluate a finished run on its test split, and write its predictions",
    "baseline": "evaluate a predictor that is not trained, on a recipe's data",
}


def run(argv: Sequence[str], builtin: Mapping[str, Domain]) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program's name.
        builtin: The built-in domains by name.

    Returns:
        0 when all went well, 1 when a comparison has failed trials, 2 for a mistake in what the user gave, 130 when
        interrupted.
    """
    hold()
    try:
        domains = with_plugins(builtin)
        if argv and argv[0] in TRAINING:
            from common.cli import training

            return training.run(argv[0], argv[1:], domains)
        args = _parse(argv)
        return args.handler(args, domains)
    except GraftError as error:
        sys.stderr.write(f"graft: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("graft: interrupted\n")
        return 130


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all others of the command line."""

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong, with where to read on."""
        raise GraftError(f"{message[0].upper()}{message[1:]}. See `{self.prog} --help`.")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    from common.cli import caching, comparing, doctor, listing, matrix, sharing, verifying

    parser = _Parser(
        prog="graft",
        description="Parameter-efficient fine-tuning across vision, medical, protein and speech models.",
        epilog="graft fit --help lists everything a recipe can say.",
    )
    parser.add_argument("--version", action="version", version=f"graft {__version__}")
    verbs: Any = parser.add_subparsers(metavar="VERB")
    for verb, text in TRAINING.items():
        verbs.add_parser(verb, help=text, add_help=False)
    for module in (listing, matrix, sharing, verifying, comparing, caching, doctor):
        module.add_verbs(verbs)
    if not argv:
        raise GraftError(f"Say what to do: {', '.join(verbs.choices)}. `graft --help` explains them.")
    if not argv[0].startswith("-") and argv[0] not in verbs.choices:
        raise unknown("verb", argv[0], verbs.choices)
    return parser.parse_args(argv)
