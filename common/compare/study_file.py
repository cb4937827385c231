"""The study file: YAML in, studies out, and every problem of a file named at once.

    title: ...
    question: ...
    recipe: configs/vision/stars.yaml     # or recipes: [...]
    methods: {LoRA: {peft: {class_path: LoRA}, lr: [1e-3, 3e-3]}, ...}
    seeds: [0, 1, 2]

Settings are chosen with the first of the seeds; `tune_seeds: [0, 1]` chooses them by the mean over several.

A method may say `weight_decay: [0, 0.05]` beside its `lr`: each decay is tried with each rate, and a pair is chosen.

`budget: [0.003, 0.01]` makes of each method one for each share of the backbone's parameters, sized to meet it; a method
that says `budget: []` is as its `peft` says.

`prepare` names adapters to train before the trials, from which methods start; see `prepared`.

One report on sets that differ in more than the recipe has parts. A part says of these keys what is its own; what it
does not say it has from the file, and its overrides add to the file's:

    title: ...
    question: ...
    seeds: [0]                            # of both parts
    parts:
      stars: {title: Stars on paper, recipe: ..., methods: ...}
      brain: {title: A macaque's brain, recipe: ..., overrides: ..., baselines: ..., methods: ...}
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from common._yaml import load_yaml
from common.compare._numbers import as_list, read_budgets, read_decays, read_integers, read_rates, show
from common.compare.budget import at_budgets
from common.compare.prepared import FOLDER, PREFIX, Preparation, option_words, references
from common.compare.study import DECAY_OPTION, Method, Part, Study, label_recipes, method_of
from common.errors import GraftError, suggest

_PART_KEYS = ("title", "question", "recipe", "recipes", "overrides", "methods", "baselines", "seeds")
_PART_KEYS += ("tune_seeds", "seed_options", "metric", "budget")
_STUDY_KEYS = (*_PART_KEYS, "out", "runs", "prepare", "parts")
_PREPARE_KEYS = ("recipe", "peft", "lr", "overrides", "seed")
_METHOD_KEYS = ("peft", "lr", "lr_options", "weight_decay", "overrides", "budget")
_PEFT_KEYS = ("class_path", "init_args")
# What the study decides itself, so that an override can never contradict the folder's name.
_RESERVED = ("config", "run", "resume", "peft", "seed_everything")
_LR_OPTION = "model.optim.lr"
_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")


def load_studies(path: Path, out: Path | None = None) -> list[Study]:
    """Read and check a study file.

    Args:
        path: The YAML file. Paths inside it are seen from the current folder, as on a command line.
        out: The folder to write to, in place of the file's own `out` and `runs`.

    Returns:
        One study for each part; a single one where the file has no parts. They share title, question and folders.

    Raises:
        GraftError: If anything in the file is wrong. The message lists all problems at once.
    """
    problems: list[str] = []
    top = _fields(load_yaml(path), "the study", _STUDY_KEYS, problems)
    title, question = _text(top, "title", problems), _text(top, "question", problems)
    folder, shared_runs = top.get("out", Path("runs", path.stem).as_posix()), top.get("runs")
    if not isinstance(folder, str) or not folder:
        problems.append(f"out is {show(folder)}: give a folder")
    if "runs" in top and (not isinstance(shared_runs, str) or not shared_runs):
        problems.append(f"runs is {show(shared_runs)}: give a folder")
    target = out if out is not None else Path(str(folder))
    # With another --out everything goes there, the runs too.
    runs = Path(shared_runs) if isinstance(shared_runs, str) and out is None else target
    preparations = _preparations(top["prepare"], runs / FOLDER, problems) if "prepare" in top else {}
    studies: list[Study] = []
    for part, fields, where in _parts(top, problems):
        found: list[str] = []
        own = _contents(fields, part, preparations, found)
        studies.append(Study(title=title, question=question, out=target, runs=runs, part=part, **own))
        problems += [f"{where}{problem}" for problem in found]
    labels = [label for study in studies for label in study.labels.values()] + [FOLDER] * bool(preparations)
    if len(set(labels)) < len(labels):
        problems.append(f"recipes share the folder names {show(sorted(labels))}: rename a recipe or a part")
    if problems:
        raise GraftError(f"Study '{path}' cannot be used:" + "".join(f"\n- {problem}." for problem in problems))
    return studies


def _parts(top: dict[str, Any], problems: list[str]) -> list[tuple[Part | None, dict[str, Any], str]]:
    """Split a file into its parts: each one's name and words, its fields, and what stands before its problems."""
    if "parts" not in top:
        return [(None, top, "")]
    blocks = _mapping(top["parts"])
    if not blocks:
        problems.append(f"parts is {show(top['parts'])}: give a mapping from a name to what is that part's own")
        return []
    shared = {key: value for key, value in top.items() if key in _PART_KEYS and key not in ("title", "question")}
    parts: list[tuple[Part | None, dict[str, Any], str]] = []
    for name, block in blocks.items():
        where = f"part '{name}'"
        _check_name(name, where, problems)
        own = _fields(block, where, _PART_KEYS, problems)
        words = {key: _text(own, key, problems, where) if key in own else "" for key in ("title", "question")}
        part = Part(name=str(name), title=words["title"] or str(name), question=words["question"])
        left = () if not {"recipe", "recipes"} & own.keys() else ("recipe", "recipes")
        fields = {key: value for key, value in shared.items() if key not in left} | own
        both = [one["overrides"] for one in (shared, own) if one.get("overrides") is not None]
        wrong = [one for one in both if _mapping(one) is None]  # is named where overrides are read
        fields["overrides"] = wrong[0] if wrong else {key: value for one in both for key, value in one.items()}
        parts.append((part, fields, f"{where}: "))
    return parts


def _contents(
    fields: Mapping[str, Any], part: Part | None, preparations: Mapping[str, Preparation], problems: list[str]
) -> dict[str, Any]:
    """Read what one part, or a file without parts, compares."""
    recipes = _recipes(fields, problems)
    labels = label_recipes(recipes)
    if part is not None:
        labels = {recipe: part.name if len(recipes) == 1 else f"{part.name}-{own}" for recipe, own in labels.items()}
    shared = _overrides(fields.get("overrides"), "overrides", problems)
    if references(shared):
        problems.append(f"overrides has ${{{references(shared)[0]}}}: give it to the methods that start from it")
    budgets = read_budgets(fields.get("budget", []), "budget", problems)
    methods = _methods(fields.get("methods"), shared, budgets, preparations, problems)
    seeds = read_integers(fields.get("seeds", [0]), "seeds", problems)
    tune_seeds = read_integers(fields["tune_seeds"], "tune_seeds", problems) if "tune_seeds" in fields else seeds[:1]
    metric = fields.get("metric", "")
    if not isinstance(metric, str):
        problems.append(f"metric is {show(metric)}: give the name of one metric")
    return {
        "metric": metric,
        "recipes": recipes,
        "labels": labels,
        "methods": methods,
        "baselines": _baselines(fields.get("baselines", []), methods, problems),
        "overrides": shared,
        "seeds": seeds,
        "tune_seeds": tune_seeds,
        "seed_options": _seed_options(fields.get("seed_options", []), methods, problems),
        "preparations": preparations,
    }


def _preparations(value: object, folder: Path, problems: list[str]) -> dict[str, Preparation]:
    """Read what is trained before the trials."""
    blocks = _mapping(value)
    if not blocks:
        problems.append(f"prepare is {show(value)}: give a mapping from a name to its recipe, peft, lr and seed")
        return {}
    found: dict[str, Preparation] = {}
    for name, block in blocks.items():
        where = f"prepare '{name}'"
        _check_name(name, where, problems)
        fields = _fields(block, where, _PREPARE_KEYS, problems)
        recipe = str(fields.get("recipe"))
        content = _mapping(load_yaml(Path(recipe))) if Path(recipe).is_file() else None
        if content is None:
            problems.append(f"recipe of {where} is {show(fields.get('recipe'))}: give the path of a recipe")
        peft = _peft(fields["peft"], where, problems) if "peft" in fields else {}
        rates = read_rates(fields["lr"], where, problems) if "lr" in fields else ()
        seeds = read_integers(fields.get("seed", 0), f"seed of {where}", problems)
        if len(rates) > 1 or len(seeds) > 1:
            problems.append(f"{where} has several values of lr or seed: it is trained once, so give one")
        overrides = _overrides(fields.get("overrides"), f"overrides of {where}", problems)
        if references([peft, overrides]):
            problems.append(f"{where} has ${{{references([peft, overrides])[0]}}}: only methods start from something")
        if rates and _LR_OPTION in overrides:
            problems.append(f"{where} gives lr and sets '{_LR_OPTION}' too")
        seed = seeds[0] if seeds else 0
        options = ["fit", "--config", recipe, *(["--peft", json.dumps(peft)] if peft else [])]
        options += ["--seed_everything", str(seed), *(word for lr in rates for word in (f"--{_LR_OPTION}", repr(lr)))]
        found[str(name)] = Preparation(
            name=str(name),
            recipe=recipe,
            method=method_of(peft or _mapping((content or {}).get("peft")) or {}),
            seed=seed,
            folder=folder / str(name),
            options=(*options, *option_words(overrides)),
        )
    return found


def _starts(
    settings: object, where: str, preparations: Mapping[str, Preparation], problems: list[str]
) -> tuple[str, ...]:
    """Read which preparations a method refers to."""
    names: list[str] = []
    for text in references(settings):
        name = text.removeprefix(PREFIX)
        if not text.startswith(PREFIX):
            problems.append(f"{where} has ${{{text}}}, which is not understood: write ${{{PREFIX}NAME}}")
        elif name not in preparations:
            hint = suggest(name, preparations) if preparations else " The file has no such prepare."
            problems.append(f"{where} has ${{{text}}}, and '{name}' is not prepared.{hint}".rstrip("."))
        else:
            names.append(name)
    return tuple(dict.fromkeys(names))


def _mapping(value: object) -> dict[Any, Any] | None:
    return cast(dict[Any, Any], value) if isinstance(value, dict) else None


def _fields(value: object, where: str, allowed: Sequence[str], problems: list[str]) -> dict[str, Any]:
    """Read a mapping whose keys are known; note every key that is not."""
    fields = _mapping(value)
    if fields is None:
        problems.append(f"{where} is {show(value)}: give a mapping with {', '.join(allowed)}")
        return {}
    for key in fields:
        if key not in allowed:
            problems.append(f"{where} has an unknown key '{key}'.{suggest(str(key), allowed)}".rstrip("."))
    return fields


def _text(top: Mapping[str, Any], key: str, problems: list[str], where: str = "") -> str:
    value = top.get(key)
    if not isinstance(value, str) or not value.strip():
        problems.append(f"{key}{where and f' of {where}'} is {show(value)}: give a line of text")
        return ""
    return " ".join(value.split())


def _recipes(top: Mapping[str, Any], problems: list[str]) -> tuple[str, ...]:
    if ("recipe" in top) == ("recipes" in top):
        problems.append("give either recipe (one path) or recipes (a list of paths)")
        return ()
    recipes = as_list(top["recipe"] if "recipe" in top else top["recipes"])
    if not recipes or not all(isinstance(recipe, str) for recipe in recipes):
        problems.append(f"recipes is {show(recipes)}: give paths of recipes")
        return ()
    problems.extend(f"recipe '{recipe}' is listed twice" for recipe, n in Counter(recipes).items() if n > 1)
    problems.extend(
        f"recipe '{recipe}' is not a file; paths are seen from the current folder, '{Path.cwd()}'"
        for recipe in recipes
        if not Path(recipe).is_file()
    )
    return tuple(recipes)


def _methods(
    value: object,
    shared: Mapping[str, Any],
    budgets: Sequence[float],
    preparations: Mapping[str, Preparation],
    problems: list[str],
) -> tuple[Method, ...]:
    blocks = _mapping(value)
    if not blocks:
        problems.append(f"methods is {show(value)}: give a mapping from a name to its peft block and lr")
        return ()
    methods: list[Method] = []
    for name, block in blocks.items():
        where = f"method '{name}'"
        _check_name(name, where, problems)
        fields = _fields(block, where, _METHOD_KEYS, problems)
        if not fields:
            continue
        peft = _peft(fields.get("peft"), where, problems)
        given = _overrides(fields.get("overrides"), f"overrides of {where}", problems)
        overrides = {**shared, **given}
        takers = as_list(fields.get("lr_options", _LR_OPTION))
        if not takers or not _are_options(takers):
            problems.append(f"lr_options of {where} is {show(takers)}: give options without dashes, as {_LR_OPTION}")
        problems.extend(f"overrides of {where} set '{key}', which takes lr" for key in takers if str(key) in overrides)
        decays = read_decays(fields["weight_decay"], where, problems) if "weight_decay" in fields else ()
        if decays and DECAY_OPTION in (*overrides, *takers):
            problems.append(f"{where} gives weight_decay and sets '{DECAY_OPTION}' too")
        method = Method(
            name=str(name),
            peft=peft,
            lrs=read_rates(fields.get("lr"), where, problems),
            lr_options=tuple(map(str, takers)),
            overrides=overrides,
            weight_decays=decays,
            starts=_starts([peft, given], where, preparations, problems),
        )
        own = read_budgets(fields["budget"], f"budget of {where}", problems) if "budget" in fields else budgets
        methods += at_budgets(method, own)
    for name, count in Counter(method.name for method in methods).items():
        if count > 1:
            problems.append(f"{count} methods are called '{name}', one by a budget: rename the other")
    return tuple(methods)


def _peft(value: object, where: str, problems: list[str]) -> dict[str, Any]:
    """Read a `peft:` block."""
    peft = _fields(value, f"peft of {where}", _PEFT_KEYS, problems)
    if peft and not isinstance(peft.get("class_path"), str):
        problems.append(f"peft of {where} has no class_path: name a method, as in 'class_path: LoRA'")
    if _mapping(peft.get("init_args", {})) is None:
        problems.append(f"init_args of {where} is {show(peft['init_args'])}: give a mapping")
    return peft


def _check_name(name: object, where: str, problems: list[str]) -> None:
    if not isinstance(name, str) or not _FOLDER_NAME.fullmatch(name):
        problems.append(f"{where} cannot name a folder: use letters, digits, '_', '.', '+' and '-'")


def _baselines(value: object, methods: Sequence[Method], problems: list[str]) -> tuple[str, ...]:
    names = as_list(value)
    if not all(isinstance(name, str) for name in names):
        problems.append(f"baselines is {show(names)}: give names, as graft list baselines prints them")
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
    keys = as_list(value)
    if not _are_options(keys):
        problems.append(f"seed_options is {show(keys)}: give options of graft fit without dashes, as data.draw")
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


def _overrides(value: object, where: str, problems: list[str]) -> dict[str, Any]:
    if value is None:
        return {}
    options = _mapping(value)
    if options is None:
        problems.append(f"{where} is {show(value)}: give a mapping from an option of graft fit to its value")
        return {}
    for key in options:
        if not isinstance(key, str) or key.startswith("-"):
            problems.append(f"{where} has the key {show(key)}: write options without dashes, as trainer.max_epochs")
        elif key in _RESERVED or key.startswith("peft."):
            problems.append(f"{where} sets '{key}', which the study sets itself: use recipe, methods, lr and seeds")
    return options
