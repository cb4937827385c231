"""A comparison given on the command line: recipes, methods, rates, seeds and shots become the studies of a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common._yaml import load_yaml
from common.compare.budget import at_budgets, percentage
from common.compare.rates import rates_of, takers_of
from common.compare.study import Method, Study, label_recipes, method_of
from common.errors import GraftError

ALL = "all"


@dataclass(frozen=True, kw_only=True)
class Shots:
    """How a datamodule is given less training data.

    Attributes:
        counts: Its option that takes a number; "" where it has none.
        shares: Its option that takes a share, above 0 and up to 1; "" where it has none.
        whole: Whether `counts` may be null, which means all there is.
    """

    counts: str = ""
    shares: str = ""
    whole: bool = False


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for.

    Attributes:
        recipes: Paths of recipes.
        methods: Names of methods.
        seeds: How many seeds, from 0.
        tune_seeds: With how many of these settings are chosen, from 0.
        rates: Learning rates by method; the key "" holds those of all methods that are not named.
        shots: Amounts of training data: numbers, percentages and `all`; none for the recipe's own.
        overrides: Further options of `graft fit`, for all runs.
        out: The folder of runs, tables and the report.
        weight_decays: Weight decays of all methods, each tried with each rate; none for the recipes' own.
        budgets: Shares of the backbone's parameters, by method, at each of which the method is compared.
    """

    recipes: Sequence[str]
    methods: Sequence[str]
    seeds: int
    rates: Mapping[str, tuple[float, ...]]
    shots: Sequence[str]
    overrides: Mapping[str, Any]
    out: Path
    weight_decays: tuple[float, ...] = ()
    tune_seeds: int = 1
    budgets: Mapping[str, tuple[float, ...]] = field(default_factory=dict[str, tuple[float, ...]])


def expand(request: Request, shots_of: Callable[[str], Shots]) -> list[Study]:
    """Make one study for each recipe and amount of training data.

    A method takes its arguments from the recipe where the recipe is written for it, else its own defaults.

    Args:
        request: What was asked for.
        shots_of: Tells from a datamodule's name how it is given less training data.

    Returns:
        The studies; they share the output folder and differ in their labels.

    Raises:
        GraftError: If methods have unequal numbers of rates to choose from, or the data cannot be made fewer as asked.
    """
    if request.seeds < 1:
        raise GraftError(f"--seeds {request.seeds} is not possible. Give 1 or more.")
    if request.tune_seeds < 1:
        raise GraftError(f"--tune-seeds {request.tune_seeds} is not possible. Give 1 or more.")
    missing = [recipe for recipe in request.recipes if not Path(recipe).is_file()]
    if missing:
        raise GraftError(f"No such recipe: {', '.join(missing)}. `graft list recipes` names them.")
    rates = _rates(request)
    studies: list[Study] = []
    for recipe, label in label_recipes(request.recipes).items():
        content = load_yaml(Path(recipe))
        if not isinstance(content, dict) or "model" not in content:
            raise GraftError(f"'{recipe}' is no recipe: it has no model. Give recipes, or one study file alone.")
        for amount in request.shots or ("",):
            options = _fewer(content, recipe, amount, shots_of) if amount else {}
            studies.append(_study(request, recipe, content, _named(label, amount), rates, options))
    return studies


def parse_rates(texts: Sequence[str], methods: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Read `1e-4,1e-3` (all methods) and `LoRA=1e-4,1e-3` (one).

    Raises:
        GraftError: If a rate is no number above 0, or a method is not compared.
    """
    found: dict[str, tuple[float, ...]] = {}
    for text in texts:
        name, _, numbers = text.rpartition("=")
        if name and name not in methods:
            raise GraftError(f"--rates {text} is for a method that is not compared. Compared: {', '.join(methods)}.")
        try:
            rates = tuple(float(number) for number in numbers.split(","))
        except ValueError:
            rates = ()
        if not rates or min(rates) <= 0 or len(set(rates)) < len(rates):
            raise GraftError(f"--rates {text} is not understood. Give different numbers above 0, as in LoRA=1e-4,1e-3.")
        found[name] = rates
    return found


def parse_decays(text: str) -> tuple[float, ...]:
    """Read `0,0.05`.

    Raises:
        GraftError: If one is no finite number of 0 or above, or stands twice.
    """
    try:
        decays = tuple(float(number) for number in text.split(","))
    except ValueError:
        decays = ()
    if not decays or not all(0 <= decay < math.inf for decay in decays) or len(set(decays)) < len(decays):
        raise GraftError(f"--weight-decays {text} is not understood. Give different numbers, 0 or above, as in 0,0.05.")
    return decays


def _rates(request: Request) -> dict[str, tuple[float, ...]]:
    """Give every method its rates, the same number to all."""
    general = request.rates.get("")
    rates = {name: request.rates.get(name) or general or rates_of(name) for name in request.methods}
    if len({len(own) for own in rates.values()}) > 1:
        told = ", ".join(f"{name} {len(own)}" for name, own in rates.items())
        raise GraftError(
            f"Methods must have the same number of learning rates to choose from, or the comparison is not fair: "
            f"{told}. Give --rates for all of them, or for each as many as the others have."
        )
    return rates


def _study(
    request: Request,
    recipe: str,
    content: Mapping[str, Any],
    label: str,
    rates: Mapping[str, tuple[float, ...]],
    options: Mapping[str, Any],
) -> Study:
    overrides = {**request.overrides, **options}
    methods: list[Method] = []
    for name in request.methods:
        method = Method(
            name=name,
            peft=_peft(content, name),
            lrs=rates[name],
            lr_options=takers_of(name),
            overrides=overrides,
            weight_decays=request.weight_decays,
        )
        methods += at_budgets(method, request.budgets.get(name, ()))
    return Study(
        title=f"{', '.join(request.methods)}",
        question="How do the methods compare, and what does each cost?",
        recipes=(recipe,),
        labels={recipe: label},
        out=request.out,
        runs=request.out,
        methods=tuple(methods),
        baselines=(),
        overrides=overrides,
        seeds=tuple(range(request.seeds)),
        tune_seeds=tuple(range(request.tune_seeds)),
        seed_options=(),
    )


def _peft(content: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Take the recipe's own block where it is this method's."""
    own = content.get("peft")
    if isinstance(own, dict) and method_of(own) == method:
        return dict(own)
    return {"class_path": method}


def _named(label: str, amount: str) -> str:
    return label if not amount else f"{label}-{amount.replace('%', 'percent').replace(' ', '')}"


def _fewer(
    content: Mapping[str, Any], recipe: str, amount: str, shots_of: Callable[[str], Shots]
) -> dict[str, float | int | None]:
    """Word an amount of training data as an option of the recipe's datamodule."""
    data = content.get("data")
    name = str(data.get("class_path", "")) if isinstance(data, dict) else ""
    offered, part = shots_of(name), percentage(amount)
    told = [f"data.{option}" for option in (offered.counts, offered.shares) if option]
    can = f"it takes {' and '.join(told)}" if told else "it has no option for that"
    if part is not None:
        if not 0 < part <= 1:
            raise GraftError(f"--shots {amount} is not possible. Give more than 0 % and at most 100 %.")
        if offered.shares:
            own = data.get("init_args") if isinstance(data, dict) else None
            counted = isinstance(own, dict) and own.get(offered.counts) is not None
            return {f"data.{offered.shares}": part, **({f"data.{offered.counts}": None} if counted else {})}
        raise GraftError(f"--shots {amount}: the data of '{recipe}', {name}, cannot be cut to a share; {can}.")
    if amount == ALL:
        if offered.counts and offered.whole:
            return {f"data.{offered.counts}": None}
        raise GraftError(f"--shots all: the data of '{recipe}', {name}, has no word for all of it; {can}.")
    if not amount.isdigit() or int(amount) < 1:
        raise GraftError(f"--shots {amount} is not understood. Give numbers, percentages and all, as in 1,5,50%,all.")
    if not offered.counts:
        raise GraftError(f"--shots {amount}: the data of '{recipe}', {name}, cannot be cut to a number; {can}.")
    return {f"data.{offered.counts}": int(amount)}
