"""What a claim asks for before it can be decided: its studies, and how many of their runs are there already."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common.compare.claims import Card, Scale, ScaleName
from common.compare.expand import Request, Shots, expand
from common.compare.results import read_metrics
from common.compare.study import Study
from common.compare.study_file import load_studies
from common.errors import GraftError

_SEEDS = 3


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Studies that a claim asks for.

    Attributes:
        key: What they are known by, for all cards that ask for the same.
        name: The stem of their file; "" where a card's recipes make them.
        load: Reads them.
    """

    key: str
    name: str
    load: Callable[[], Sequence[Study]]


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """How far a claim is from being decided.

    Attributes:
        runs: Each run that it rests on, and whether it is there.
        reason: Why it cannot be decided here; "" where it can.
    """

    runs: dict[str, bool]
    reason: str = ""

    @property
    def lacking(self) -> int:
        """How many runs are still to be made."""
        return sum(not there for there in self.runs.values())


def asked_of(scale: Scale, out: Path) -> list[Asked]:
    """List what a scale asks for: of a study file the methods and baselines that its tests speak of, and no others.

    Args:
        scale: The scale.
        out: The folder of the card, which takes the runs of its own recipes, and the tables and reports of its studies.
    """
    if scale.recipes:
        request = Request(
            recipes=scale.recipes,
            methods=scale.methods,
            seeds=_SEEDS,
            rates=scale.rates,
            shots=(),
            overrides=scale.overrides,
            out=out,
        )
        return [Asked(key=str(out), name="", load=lambda: expand(request, lambda _: Shots()))]
    found: list[Asked] = []
    for path in map(Path, scale.studies):
        tests = [test for test in scale.tests if test.looks_into(path.stem)]
        names = tuple(dict.fromkeys(name for test in tests for name in test.methods))
        load = functools.partial(_load_part, path, names, out)
        found.append(Asked(key=" ".join((str(path), *names)), name=path.stem, load=load))
    return found


def _load_part(path: Path, names: Sequence[str], out: Path) -> list[Study]:
    """Read a study file and keep some of its methods and baselines; the runs stay where the file says."""
    parts: list[Study] = []
    for study in load_studies(path):
        methods = tuple(method for method in study.methods if method.name in names)
        baselines = tuple(name for name in study.baselines if name in names)
        if not methods:
            known = ", ".join(method.name for method in study.methods)
            raise GraftError(
                f"Study '{path}' has none of {', '.join(names)}, which the claim speaks of. It has {known}."
            )
        parts.append(replace(study, methods=methods, baselines=baselines, out=out / path.stem))
    return parts


def outlook(card: Card, scale: ScaleName, out: Path) -> Outlook:
    """Count the runs that a claim rests on.

    Args:
        card: The claim.
        scale: The size at which it is asked.
        out: The folder of the verdicts.
    """
    own, runs = card.scales[scale], dict[str, bool]()
    reason = own.not_runnable or lacking(own.needs)
    if reason:
        return Outlook(runs={}, reason=reason)
    try:
        for asked in asked_of(own, own_folder(card, scale, out)):
            for study in asked.load():
                runs |= dict(_runs(study))
    except GraftError as error:
        return Outlook(runs={}, reason=" ".join(str(error).split()))
    return Outlook(runs=runs)


def own_folder(card: Card, scale: ScaleName, out: Path) -> Path:
    """Return the folder of a card: of the tables and reports of its studies, and of the runs of its own recipes."""
    return out / scale / card.id


def lacking(needs: Sequence[str]) -> str:
    """Say what is not there of what a scale needs."""
    found = [f"file '{need}'" for need in needs if need != "gpu" and not Path(need).exists()]
    if "gpu" in needs:
        import torch

        found += [] if torch.cuda.is_available() else ["GPU"]
    return f"needs {' and '.join(found)}" if found else ""


def _runs(study: Study) -> Iterator[tuple[str, bool]]:
    """Name each run of a study, and say whether it is there; further seeds are of the setting yet to be chosen."""
    for one in study.needed():
        yield str(one.folder), one.adapter.is_dir()
    for trial in (*study.untrained(), *study.tuning()):
        yield str(trial.folder), _there(trial.folder)
    for recipe in study.recipes:
        for method in study.methods:
            for seed in study.seeds:
                if seed not in study.tune_seeds:
                    folders = [study.trial(recipe, method, setting, seed).folder for setting in method.settings]
                    yield f"{folders[0].parent} seed {seed}", any(map(_there, folders))


def _there(folder: Path) -> bool:
    found = read_metrics(folder)
    return found is not None and found.fitted
