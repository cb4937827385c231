"""Claims of the literature as cards: what was said, by whom, what was published, and which studies and tests decide it.

A card is a YAML file in `configs/claims/`:

    id: lora-within-a-point            # the file's name
    statement: what is claimed, in a sentence
    source: {paper: ..., table: ..., read: page | repository | measured}
    published: {figure: ..., protocol: ...}
    tests: [within_points: {method: LoRA, reference: FullFineTune, points: 1}]   # see `verdicts`
    embedded: {studies: [STUDY.yaml, ...], differs: how this is not the published protocol}
    full: {recipes: [RECIPE.yaml, ...], methods: [LoRA, FullFineTune], needs: [gpu, FILE, ...]}

`read` tells how the published figure is known: from the opening of a published page, from files of a public repository,
or because this project measured it. A scale has `studies` (files of `graft compare`), or `recipes` and `methods` (as on
its command line), or `not_runnable`: why not; its own `tests` go before the card's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common._yaml import load_yaml
from common.compare.verdicts import ClaimTest, read_test
from common.errors import GraftError, unknown

ScaleName = Literal["embedded", "full"]
SCALES: tuple[ScaleName, ...] = ("embedded", "full")
READ = ("page", "repository", "measured")
_CARD = ("id", "statement", "source", "published", "tests", *SCALES)
_SCALE = ("studies", "recipes", "methods", "rates", "set", "needs", "differs", "tests", "not_runnable")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How a claim is decided at one size.

    Attributes:
        studies: Paths of study files.
        recipes: Paths of recipes, compared as on the command line.
        methods: The methods on them.
        rates: Learning rates by method; "" for all others.
        overrides: Options of `graft fit` for these runs.
        needs: What must be there: `gpu`, or files.
        differs: How the protocol differs from the published one.
        tests: What decides.
        not_runnable: Why it cannot be run; "" where it can.
    """

    studies: tuple[str, ...]
    recipes: tuple[str, ...]
    methods: tuple[str, ...]
    rates: Mapping[str, tuple[float, ...]]
    overrides: Mapping[str, Any]
    needs: tuple[str, ...]
    differs: str
    tests: tuple[ClaimTest, ...]
    not_runnable: str


@dataclass(frozen=True, kw_only=True)
class Card:
    """A claim.

    Attributes:
        id: Its name, which is its file's.
        statement: What is claimed.
        paper: Who claims it.
        table: Where in the paper or repository.
        read: How the figure is known; one of `READ`.
        figure: What was published, in words.
        protocol: How it was measured there.
        scales: How it is decided at each size.
    """

    id: str
    statement: str
    paper: str
    table: str
    read: str
    figure: str
    protocol: str
    scales: Mapping[ScaleName, Scale]


def load_card(path: Path) -> Card:
    """Read and check a card.

    Raises:
        GraftError: If anything in it is wrong.
    """
    where = f"Card '{path}'"
    top = _fields(load_yaml(path), where, _CARD, required=_CARD[:4])
    source = _fields(top["source"], f"{where}, source", ("paper", "table", "read"), required=("paper", "table", "read"))
    published = _fields(
        top["published"], f"{where}, published", ("figure", "protocol"), required=("figure", "protocol")
    )
    if top["id"] != path.stem:
        raise GraftError(f"{where} has the id '{top['id']}'. Name card and file alike.")
    if source["read"] not in READ:
        raise unknown("way that a figure is known (read)", str(source["read"]), READ)
    scales = {name: _scale(top.get(name), top.get("tests"), f"{where}, {name}") for name in SCALES}
    return Card(
        id=path.stem,
        statement=_text(top["statement"]),
        paper=_text(source["paper"]),
        table=_text(source["table"]),
        read=str(source["read"]),
        figure=_text(published["figure"]),
        protocol=_text(published["protocol"]),
        scales=scales,
    )


def load_cards(folder: Path, names: Sequence[str] = ()) -> list[Card]:
    """Read the cards of a folder, or some of them.

    Args:
        folder: The folder.
        names: Ids of cards, or paths; all where there are none.

    Raises:
        GraftError: If there is no such card, or one is wrong.
    """
    known = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    paths: list[Path] = []
    for name in names or known:
        path = Path(name) if name.endswith(".yaml") else known.get(name)
        if path is None or not path.is_file():
            raise unknown("card", name, known)
        paths.append(path)
    return [load_card(path) for path in dict.fromkeys(paths)]


def _scale(value: object, shared: object, where: str) -> Scale:
    fields = _fields(value, where, _SCALE)
    tests = fields.get("tests", shared)
    runs = bool(fields.get("studies")) != bool(fields.get("recipes"))
    if not fields.get("not_runnable") and not (runs and isinstance(tests, list) and tests):
        raise GraftError(f"{where} needs either studies or recipes, and tests; or not_runnable with the reason.")
    if fields.get("recipes") and not fields.get("methods"):
        raise GraftError(f"{where} has recipes without methods. Name the methods to compare on them.")
    rates = fields.get("rates") or {}
    studies = _names(fields.get("studies"), where)
    asked = tuple(read_test(test, where) for test in tests) if isinstance(tests, list) else ()
    for study in studies:
        if not any(test.looks_into(Path(study).stem) for test in asked):
            raise GraftError(
                f"{where}: no test looks into the study '{study}'. Name it in a test's `on`, or leave it out."
            )
    return Scale(
        studies=studies,
        recipes=_names(fields.get("recipes"), where),
        methods=_names(fields.get("methods"), where),
        rates={str(name): tuple(map(float, own)) for name, own in dict(rates).items()},
        overrides=dict(fields.get("set") or {}),
        needs=_names(fields.get("needs"), where),
        differs=_text(fields.get("differs", "")),
        tests=asked,
        not_runnable=_text(fields.get("not_runnable", "")),
    )


def _fields(value: object, where: str, allowed: Sequence[str], required: Sequence[str] = ()) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise GraftError(f"{where} is {value!r}. Give a mapping with {', '.join(allowed)}.")
    for key in value:
        if key not in allowed:
            raise GraftError(f"{where} has an unknown key '{key}'. Allowed: {', '.join(allowed)}.")
    missing = [key for key in required if not value.get(key)]
    if missing:
        raise GraftError(f"{where} lacks {', '.join(missing)}.")
    return value


def _names(value: object, where: str) -> tuple[str, ...]:
    names = [] if value is None else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise GraftError(f"{where}: {value!r} is no list of names.")
    return tuple(names)


def _text(value: object) -> str:
    return " ".join(str(value).split())
