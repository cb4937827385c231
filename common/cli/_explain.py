"""Turn the many-line errors of jsonargparse into one line: what was given, what is allowed, what to do."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L

from common._yaml import load_yaml
from common.errors import GraftError, suggest, unknown
from common.methods import METHODS
from common.task import AdaptedTask

_SECTIONS = {"peft": "method", "model": "task", "data": "datamodule"}
_TOP = ("seed_everything", "model", "peft", "data", "trainer", "run", "resume", "save_every", "config")
# The recipe gives these in one place for all (`peft:`, `seed_everything:`).
_SHARED = ("self", "peft", "seed")
_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "dict": "a mapping"}
_KINDS |= dict.fromkeys(("list", "tuple", "Sequence"), "a list, like [a, b]")
# More names than this are no help on one line, once the nearest is named.
_MANY = 20


def check_recipe(path: Path) -> None:
    """Refuse a recipe file that is not a mapping, or whose sections are not made of `class_path` and `init_args`.

    Raises:
        GraftError: The file cannot be read, is not YAML, or has another shape; the message names the file.
    """
    content = load_yaml(path)
    if not isinstance(content, dict):
        raise GraftError(f"'{path}' is no recipe: it must map {', '.join(_TOP[:5])} to their settings.")
    for section in _SECTIONS:
        given = content.get(section)
        extra = sorted(set(given) - {"class_path", "init_args"}) if isinstance(given, dict) else []
        if extra and "class_path" in given:
            raise GraftError(
                f"'{path}': {section} has '{extra[0]}' beside class_path. Its settings stand under {section}.init_args."
            )


def own_error(error: BaseException | None) -> GraftError | None:
    """Return the `GraftError` that an error was raised from, since jsonargparse wraps what a class raises."""
    while error is not None and not isinstance(error, GraftError):
        error = error.__cause__ or error.__context__
    return error


def explain(message: str) -> GraftError:
    """Turn a message of jsonargparse into one line, with the nearest name where a name is wrong."""
    keys = [key for key in re.findall(r'[Pp]arser key "([\w.]+)"', message) if key]
    path = ".".join(dict.fromkeys(keys))
    owners = re.findall(r"Problem with given class_path '([\w.]+)'", message)
    readings = (_setting(message, keys, owners), _class(message, keys), _missing(message, path), _value(message, path))
    return next(
        (reading for reading in readings if reading), GraftError(f"{_one_line(message)} (see `graft fit --help`)")
    )


def _setting(message: str, keys: Sequence[str], owners: Sequence[str]) -> GraftError | None:
    """Explain a setting that does not exist."""
    grouped = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
    single = re.search(r"(?:Option|Key) '([\w.]+)' is not (?:accepted|expected)", message)
    single = single or re.search(r"unrecognized arguments: (?:--)?([\w.]+)", message)
    if not grouped and not single:
        return None
    given = ".".join(grouped.groups()) if grouped else single.group(1) if single else ""
    group, _, leaf = given.rpartition(".")
    owner: Any = _find(owners[-1]) if owners else None
    if owner is None and group.partition(".")[0] == "trainer":
        owner, group = L.Trainer, ""
        names = ["precision", *_settings(owner)]
    elif owner is None:
        return GraftError(f"A recipe has no '{given}'.{suggest(given.partition('.')[0], _TOP)}")
    else:
        for part in filter(None, group.split(".")):
            owner = _hints(owner).get(part) if owner is not None else None
        names = _settings(owner) if owner is not None else []
    hint = suggest(leaf, names) if names else ""
    if len(names) > _MANY and "Did you mean" in hint:
        hint = f"{hint.split(' Allowed:')[0]} `graft fit --help` lists all."
    return GraftError(f"'{leaf}' is no setting of {group or getattr(owner, '__name__', 'the recipe')}.{hint}")


def _class(message: str, keys: Sequence[str]) -> GraftError | None:
    """Explain an unknown method, task or datamodule."""
    wrong = re.search(r"Expected a dot import path string: ([\w.]+)", message)
    if re.search(r"does not correspond to a subclass|No module named|module '[\w.]+' has no attribute", message):
        wrong = re.search(r"Given value: (?:\{'class_path': ')?([\w.]+)", message)
    if not wrong or not keys or keys[0] not in _SECTIONS:
        return None
    offers = {"peft": list(METHODS), "model": _names(AdaptedTask), "data": _names(L.LightningDataModule)}
    error = str(unknown(_SECTIONS[keys[0]], wrong.group(1), offers[keys[0]]))
    if len(offers[keys[0]]) > _MANY and "Did you mean" in error:
        where = "graft list methods" if keys[0] == "peft" else "graft fit --help"
        error = f"{error.split(' Allowed:')[0]} `{where}` lists all."
    return GraftError(error)


def _missing(message: str, path: str) -> GraftError | None:
    """Explain what a recipe does not say."""
    missing = re.search(r'arguments are required: ([\w., ]+)|Key "([\w.]+)" is required', message)
    if not missing:
        return None
    names = ", ".join(f"'{name}'" for name in re.split(r", *", next(g for g in missing.groups() if g)))
    if path:
        return GraftError(f"{path} says nothing about {names}. Add it to the recipe, under {path}.init_args.")
    return GraftError(f"The recipe says nothing about {names}. Give a recipe with --config, or add it.")


def _value(message: str, path: str) -> GraftError | None:
    """Explain a value of the wrong type, or outside a set of words."""
    given = re.search(r"Got value: (.*)", message) or re.search(r"Given value: (.*)", message)
    if not given or not path:
        return None
    value = given.group(1).strip()
    words = re.search(r"typing\.Literal\[(.*?)\]", message)
    if words:
        return unknown(path, value, re.findall(r"'([^']*)'", words.group(1)))
    types = [name.rpartition(".")[2] for name in re.findall(r"Expected an? <class '([\w.]+)'>", message)]
    kinds = [_KINDS.get(name, name) for name in types if name != "NoneType"]
    if not kinds or len(value) > 80:
        return None
    return GraftError(f"{path} is '{value}', but it takes {' or '.join(dict.fromkeys(kinds))}. Correct the value.")


def _one_line(message: str) -> str:
    """Squeeze a message that none of the readings fits."""
    text = " ".join(re.sub(r"Given value(?: type)?: .*", "", message).split())
    text = re.sub(r"Does not validate against any of the Union subtypes Subtypes: \[.*?\] Errors: ", "", text)
    text = text.replace(" - Expected a <class 'NoneType'>", "").strip()
    return text if len(text) <= 300 else f"{text[:300]}..."


def _names(base: type[Any]) -> list[str]:
    """Return the public classes below a base; those in private modules, `base.py` and the core are to build on."""
    found: list[str] = []
    for child in base.__subclasses__():
        if child.__module__.startswith("lightning"):
            continue
        found += _names(child)
        package, _, module = child.__module__.rpartition(".")
        private = child.__name__.startswith("_") or module.startswith("_")
        if not private and module != "base" and package != "common":
            found.append(child.__name__)
    return sorted(set(found))


def _settings(cls: type[Any]) -> list[str]:
    """Return the settings that a class takes, those it hands on to its bases included."""
    found: list[str] = []
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(base.__init__).parameters.values()
        named = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        found += [name for name in named if name not in _SHARED]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return sorted(set(found))


def _hints(cls: type[Any]) -> dict[str, Any]:
    return typing.get_type_hints(cls.__init__)


def _find(path: str) -> type[Any] | None:
    name = path.rpartition(".")[2]
    if name in METHODS:
        return METHODS[name]
    pool: list[type[Any]] = [AdaptedTask, L.LightningDataModule]
    while pool:
        cls = pool.pop()
        if cls.__name__ == name:
            return cls
        pool.extend(cls.__subclasses__())
    return None
