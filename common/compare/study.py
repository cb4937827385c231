"""The study file: which methods, learning rates, seeds and recipes are compared, and the trials that follow from it.

A trial is one run of `graft fit`: a recipe, a method, a learning rate and a seed; or one of `graft baseline`: a recipe,
a predictor that is not trained and a seed. It is described by its command line and its run folder,
`RUNS/<recipe>/<method>/lr-<lr>-seed-<seed>` or `RUNS/<recipe>/<baseline>/seed-<seed>`, and by nothing else. RUNS is the
study's output folder, unless the file says `runs`: two studies with the same `runs` share what they have in common.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from common._yaml import load_yaml
from common.errors import GraftError, suggest

_STUDY_KEYS = ("title", "question", "recipe", "recipes", "out", "overrides", "methods", "baselines", "seeds")
_STUDY_KEYS += ("tune_seed", "seed_options", "runs")
_METHOD_KEYS = ("peft", "lr", "lr_options", "overrides")
_PEFT_KEYS = ("class_path", "init_args")
# What the study decides itself, so that an override can never contradict the folder's name.
_RESERVED = ("config", "run", "resume", "peft", "seed_everything")
_LR_OPTION = "model.optim.lr"
_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to fine-tune: a `peft:` block and the learning rates to choose from.

    Attributes:
        name: The name in tables, plots and folders.
        peft: The block, `{class_path: ..., init_args: {...}}`.
        lrs: The learning rates, chosen from on the validation split.
        lr_options: The options of `graft fit` that take the learning rate.
        overrides: Further options of `graft fit`, those of the study included.
    """

    name: str
    peft: Mapping[str, Any]
    lrs: tuple[float, ...]
    lr_options: tuple[str, ...]
    overrides: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run: what is fitted, with which command, into which folder.

    Attributes:
        recipe: The path of the recipe.
        method: The name of the method or baseline.
        lr: The learning rate; None for a baseline, which is not trained.
        seed: The seed.
        folder: The run folder.
        options: The command line of the fit or baseline, without the run folder.
    """

    recipe: str
    method: str
    lr: float | None
    seed: int
    folder: Path
    options: tuple[str, ...]

    @property
    def baseline(self) -> bool:
        """Whether nothing is trained."""
        return self.lr is None

    @property
    def fit(self) -> tuple[str, ...]:
        """The arguments of the command that fits this trial; a baseline's is all there is to do."""
        return (*self.options, "--run", str(self.folder))

    @property
    def test(self) -> tuple[str, ...]:
        """The arguments of the command that tests this trial, which a baseline needs not."""
        return ("test", "--run", str(self.folder))


@dataclass(frozen=True, kw_only=True)
class Study:
    """A comparison to run.

    Attributes:
        title: The title of the report.
        question: What the study asks, in one sentence.
        recipes: The paths of the recipes.
        labels: A short name for each recipe, unique within the study.
        out: The folder of tables and the report.
        runs: The folder of all run folders; `out` as a rule.
        methods: The methods, in the order of the file.
        baselines: The names of the predictors that are not trained.
        overrides: Options of all trials; those of the methods hold them already.
        seeds: The seeds of the final runs.
        tune_seed: The seed with which learning rates are chosen.
        seed_options: Further options that take the seed, in every trial.
    """

    title: str
    question: str
    recipes: tuple[str, ...]
    labels: Mapping[str, str]
    out: Path
    runs: Path
    methods: tuple[Method, ...]
    baselines: tuple[str, ...]
    overrides: Mapping[str, Any]
    seeds: tuple[int, ...]
    tune_seed: int
    seed_options: tuple[str, ...]

    def trial(self, recipe: str, method: Method, lr: float, seed: int) -> Trial:
        """Describe one run of this study."""
        options = ["fit", "--config", recipe, "--peft", json.dumps(method.peft), *self._seeded(seed)]
        for key in method.lr_options:
            options += [f"--{key}", repr(lr)]
        options += _options(method.overrides)
        folder = self.runs / self.labels[recipe] / method.name / f"lr-{lr!r}-seed-{seed}"
        return Trial(recipe=recipe, method=method.name, lr=lr, seed=seed, folder=folder, options=tuple(options))

    def untrained(self) -> list[Trial]:
        """The runs of the baselines: every recipe, baseline and seed."""
        return [
            Trial(
                recipe=recipe,
                method=name,
                lr=None,
                seed=seed,
                folder=self.runs / self.labels[recipe] / name / f"seed-{seed}",
                options=("baseline", name, "--config", recipe, *self._seeded(seed), *_options(self.overrides)),
            )
            for recipe in self.recipes
            for name in self.baselines
            for seed in self.seeds
        ]

    def _seeded(self, seed: int) -> list[str]:
        return [word for key in ("seed_everything", *self.seed_options) for word in (f"--{key}", str(seed))]

    def tuning(self) -> list[Trial]:
        """The runs that choose the learning rates: every recipe, method and rate, at `tune_seed`."""
        return [
            self.trial(recipe, method, lr, self.tune_seed)
            for recipe in self.recipes
            for method in self.methods
            for lr in method.lrs
        ]

    def possible(self) -> list[Trial]:
        """Every run that this study may come to need, whichever learning rates are chosen."""
        trained = [
            self.trial(recipe, method, lr, seed)
            for recipe in self.recipes
            for method in self.methods
            for lr in method.lrs
            for seed in dict.fromkeys((self.tune_seed, *self.seeds))
        ]
        return [*self.untrained(), *trained]


def load_study(path: Path, out: Path | None = None) -> Study:
    """Read and check a study file.

    Args:
        path: The YAML file. Paths inside it are seen from the current folder, as on a command line.
        out: The folder to write to, in place of the file's own `out` and `runs`.

    Returns:
        The study.

    Raises:
        GraftError: If anything in the file is wrong. The message lists all problems at once.
    """
    problems: list[str] = []
    top = _fields(load_yaml(path), "the study", _STUDY_KEYS, problems)
    recipes = _recipes(top, problems)
    shared = _overrides(top.get("overrides"), "overrides", problems)
    methods = _methods(top.get("methods"), shared, problems)
    seed_options = _seed_options(top.get("seed_options", []), methods, problems)
    seeds = _integers(top.get("seeds", [0]), "seeds", problems)
    tune_seed = _integers(top.get("tune_seed", seeds[0] if seeds else 0), "tune_seed", problems)
    if len(tune_seed) > 1:
        problems.append(f"tune_seed is {_show(list(tune_seed))}: give one whole number")
    folder = top.get("out", Path("runs", path.stem).as_posix())
    target = out if out is not None else Path(str(folder))
    shared_runs = top.get("runs")
    study = Study(
        title=_text(top, "title", problems),
        question=_text(top, "question", problems),
        recipes=recipes,
        labels=label_recipes(recipes),
        out=target,
        # With another --out everything goes there, the runs too.
        runs=Path(shared_runs) if isinstance(shared_runs, str) and out is None else target,
        methods=methods,
        baselines=_baselines(top.get("baselines", []), methods, problems),
        overrides=shared,
        seeds=seeds,
        tune_seed=tune_seed[0] if tune_seed else 0,
        seed_options=seed_options,
    )
    if len(set(study.labels.values())) < len(study.labels):
        problems.append(f"recipes share the folder names {_show(sorted(study.labels.values()))}: rename a recipe")
    if not isinstance(folder, str) or not folder:
        problems.append(f"out is {_show(folder)}: give a folder")
    if "runs" in top and (not isinstance(shared_runs, str) or not shared_runs):
        problems.append(f"runs is {_show(shared_runs)}: give a folder")
    if problems:
        raise GraftError(f"Study '{path}' cannot be used:" + "".join(f"\n- {problem}." for problem in problems))
    return study


def _options(overrides: Mapping[str, Any]) -> list[str]:
    words: list[str] = []
    for key, value in overrides.items():
        text = value if isinstance(value, str) else json.dumps(value)
        # A value that starts with a dash would be read as an option of its own.
        words += [f"--{key}={text}"] if text.startswith("-") else [f"--{key}", text]
    return words


def _show(value: object) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)


def _mapping(value: object) -> dict[Any, Any] | None:
    return cast(dict[Any, Any], value) if isinstance(value, dict) else None


def _list(value: object) -> list[Any]:
    """Read a list, or one value as a list of its own."""
    return cast(list[Any], value) if isinstance(value, list) else [value]


def _fields(value: object, where: str, allowed: Sequence[str], problems: list[str]) -> dict[str, Any]:
    """Read a mapping whose keys are known; note every key that is not."""
    fields = _mapping(value)
    if fields is None:
        problems.append(f"{where} is {_show(value)}: give a mapping with {', '.join(allowed)}")
        return {}
    for key in fields:
        if key not in allowed:
            problems.append(f"{where} has an unknown key '{key}'.{suggest(str(key), allowed)}".rstrip("."))
    return fields


def _text(top: Mapping[str, Any], key: str, problems: list[str]) -> str:
    value = top.get(key)
    if not isinstance(value, str) or not value.strip():
        problems.append(f"{key} is {_show(value)}: give a line of text")
        return ""
    return " ".join(value.split())


def _recipes(top: Mapping[str, Any], problems: list[str]) -> tuple[str, ...]:
    if ("recipe" in top) == ("recipes" in top):
        problems.append("give either recipe (one path) or recipes (a list of paths)")
        return ()
    recipes = _list(top["recipe"] if "recipe" in top else top["recipes"])
    if not recipes or not all(isinstance(recipe, str) for recipe in recipes):
        problems.append(f"recipes is {_show(recipes)}: give paths of recipes")
        return ()
    problems.extend(f"recipe '{recipe}' is listed twice" for recipe, n in Counter(recipes).items() if n > 1)
    problems.extend(
        f"recipe '{recipe}' is not a file; paths are seen from the current folder, '{Path.cwd()}'"
        for recipe in recipes
        if not Path(recipe).is_file()
    )
    return tuple(recipes)


def label_recipes(recipes: Sequence[str]) -> dict[str, str]:
    """Name each recipe by its file, with its folders where two files share a name."""
    stems = Counter(Path(recipe).stem for recipe in recipes)

    def label(recipe: str) -> str:
        path = Path(recipe).with_suffix("")
        return path.name if stems[path.name] == 1 else "-".join(p for p in path.parts if p not in ("..", path.anchor))

    return {recipe: label(recipe) for recipe in recipes}


def _methods(value: object, shared: Mapping[str, Any], problems: list[str]) -> tuple[Method, ...]:
    blocks = _mapping(value)
    if not blocks:
        problems.append(f"methods is {_show(value)}: give a mapping from a name to its peft block and lr")
        return ()
    methods: list[Method] = []
    for name, block in blocks.items():
        where = f"method '{name}'"
        _check_name(name, where, problems)
        fields = _fields(block, where, _METHOD_KEYS, problems)
        if not fields:
            continue
        peft = _fields(fields.get("peft"), f"peft of {where}", _PEFT_KEYS, problems)
        if peft and not isinstance(peft.get("class_path"), str):
            problems.append(f"peft of {where} has no class_path: name a method, as in 'class_path: LoRA'")
        if _mapping(peft.get("init_args", {})) is None:
            problems.append(f"init_args of {where} is {_show(peft['init_args'])}: give a mapping")
        overrides = {**shared, **_overrides(fields.get("overrides"), f"overrides of {where}", problems)}
        takers = _list(fields.get("lr_options", _LR_OPTION))
        if not takers or not _are_options(takers):
            problems.append(f"lr_options of {where} is {_show(takers)}: give options without dashes, as {_LR_OPTION}")
        problems.extend(f"overrides of {where} set '{key}', which takes lr" for key in takers if str(key) in overrides)
        rates = _rates(fields.get("lr"), where, problems)
        methods.append(
            Method(name=str(name), peft=peft, lrs=rates, lr_options=tuple(map(str, takers)), overrides=overrides)
        )
    return tuple(methods)


def _check_name(name: object, where: str, problems: list[str]) -> None:
    if not isinstance(name, str) or not _FOLDER_NAME.fullmatch(name):
        problems.append(f"{where} cannot name a folder: use letters, digits, '_', '.', '+' and '-'")


def _baselines(value: object, methods: Sequence[Method], problems: list[str]) -> tuple[str, ...]:
    names = _list(value)
    if not all(isinstance(name, str) for name in names):
        problems.append(f"baselines is {_show(names)}: give names, as graft list baselines prints them")
        return ()
    for name, count in Counter(names).items():
        _check_name(name, f"baseline '{name}'", problems)
        if count > 1:
            problems.append(f"baseline '{name}' is listed twice")
        if name in [method.name for method in methods]:
            problems.append(f"'{name}' is a baseline and a method: give the method another name")
    return tuple(names)


def _are_options(keys: Sequence[object]) -> bool:
    return all(isinstance(key, str) and key and not key.startswith("-") for key in keys)


def _seed_options(value: object, methods: Sequence[Method], problems: list[str]) -> tuple[str, ...]:
    keys = _list(value)
    if not _are_options(keys):
        problems.append(f"seed_options is {_show(keys)}: give options of graft fit without dashes, as data.draw")
        return ()
    for key, count in Counter(map(str, keys)).items():
        if count > 1:
            problems.append(f"seed_options gives '{key}' twice")
        if key in _RESERVED or key.startswith("peft."):
            problems.append(f"seed_options has '{key}', which the study sets itself: use recipe, methods, lr and seeds")
        for method in methods:
            if key in method.overrides:
                problems.append(f"overrides of method '{method.name}' set '{key}', which takes the seed")
            if key in method.lr_options:
                problems.append(f"lr_options of method '{method.name}' has '{key}', which takes the seed")
    return tuple(map(str, keys))


def _rates(value: object, where: str, problems: list[str]) -> tuple[float, ...]:
    rates = _list(value)
    good = [rate for rate in rates if isinstance(rate, int | float) and not isinstance(rate, bool)]
    if not rates or len(good) < len(rates) or not all(math.isfinite(rate) and rate > 0 for rate in good):
        problems.append(f"lr of {where} is {_show(value)}: give one or more numbers above 0, as in [1.0e-3]")
        return ()
    if len(set(good)) < len(good):
        problems.append(f"lr of {where} is {_show(value)}: give each learning rate once")
    return tuple(float(rate) for rate in good)


def _overrides(value: object, where: str, problems: list[str]) -> dict[str, Any]:
    if value is None:
        return {}
    options = _mapping(value)
    if options is None:
        problems.append(f"{where} is {_show(value)}: give a mapping from an option of graft fit to its value")
        return {}
    for key in options:
        if not isinstance(key, str) or key.startswith("-"):
            problems.append(f"{where} has the key {_show(key)}: write options without dashes, as trainer.max_epochs")
        elif key in _RESERVED or key.startswith("peft."):
            problems.append(f"{where} sets '{key}', which the study sets itself: use recipe, methods, lr and seeds")
    return options


def _integers(value: object, where: str, problems: list[str]) -> tuple[int, ...]:
    numbers = _list(value)
    if not numbers or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
        problems.append(f"{where} is {_show(value)}: give whole numbers, 0 or more")
        return ()
    if len(set(numbers)) < len(numbers):
        problems.append(f"{where} is {_show(value)}: give each number once")
    return tuple(numbers)
