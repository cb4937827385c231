"""A study: which methods, learning rates, seeds and recipes are compared, and the trials that follow from it.

A trial is one run of `graft fit`: a recipe, a method, a learning rate (and a weight decay, where one is chosen too) and
a seed; or one of `graft baseline`: a recipe, a predictor that is not trained and a seed. It is described by its command
line and its run folder, and by nothing else. Run folders are `RUNS/<recipe>/<method>/lr-<lr>-seed-<seed>`,
`.../lr-<lr>-decay-<decay>-seed-<seed>` and `RUNS/<recipe>/<baseline>/seed-<seed>`. RUNS is the study's output folder,
unless the file says `runs`: two studies with the same `runs` share what they have in common. What a study prepares
before its trials lies in `RUNS/prepared/<name>`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from common.compare.prepared import Preparation, option_words, placed

DECAY_OPTION = "model.optim.weight_decay"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a method is tuned by: a learning rate, and a weight decay where the method has any to choose from."""

    lr: float
    weight_decay: float | None = None

    @property
    def words(self) -> str:
        """The setting as people read it."""
        return f"{self.lr:g}" if self.weight_decay is None else f"{self.lr:g}, decay {self.weight_decay:g}"

    @property
    def folder(self) -> str:
        """The setting in the name of a run folder."""
        return f"lr-{self.lr!r}" if self.weight_decay is None else f"lr-{self.lr!r}-decay-{self.weight_decay!r}"


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to fine-tune: a `peft:` block and the settings to choose from.

    Attributes:
        name: The name in tables, plots and folders.
        peft: The block, `{class_path: ..., init_args: {...}}`.
        lrs: The learning rates, chosen from on the validation split.
        lr_options: The options of `graft fit` that take the learning rate.
        overrides: Further options of `graft fit`, those of the study included.
        weight_decays: The weight decays, each tried with each learning rate; none for the recipe's own.
        starts: The names of what is prepared that its `peft` and `overrides` refer to.
    """

    name: str
    peft: Mapping[str, Any]
    lrs: tuple[float, ...]
    lr_options: tuple[str, ...]
    overrides: Mapping[str, Any]
    weight_decays: tuple[float, ...] = ()
    starts: tuple[str, ...] = ()

    @property
    def settings(self) -> tuple[Setting, ...]:
        """What is chosen from on the validation split: every learning rate with every weight decay."""
        return tuple(Setting(lr=lr, weight_decay=decay) for lr in self.lrs for decay in self.weight_decays or (None,))


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
        weight_decay: The weight decay; None for the recipe's own.
        prepared: What it starts from.
        written: Its options as the study file writes them, where it starts from something; else none.
    """

    recipe: str
    method: str
    lr: float | None
    seed: int
    folder: Path
    options: tuple[str, ...]
    weight_decay: float | None = None
    prepared: tuple[Preparation, ...] = ()
    written: tuple[str, ...] = ()

    @property
    def setting(self) -> Setting | None:
        """What its method was tuned by; None for a baseline."""
        return None if self.lr is None else Setting(lr=self.lr, weight_decay=self.weight_decay)

    @property
    def stated(self) -> tuple[str, ...]:
        """What it is told by: its options, without the folders of what it starts from, which may move."""
        return self.written or self.options

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
class Part:
    """A part of a report that asks something of its own: its name in folders, its title, its question ("" for none)."""

    name: str
    title: str
    question: str


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
        tune_seeds: The seeds with which settings are chosen, by the mean over them.
        seed_options: Further options that take the seed, in every trial.
        part: The part of the report that the study is; None where the report has no parts.
        metric: The validation metric that chooses settings, and the test metric that decides; "" for the task's own.
        preparations: What its methods may start from, by name.
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
    tune_seeds: tuple[int, ...]
    seed_options: tuple[str, ...]
    part: Part | None = None
    metric: str = ""
    preparations: Mapping[str, Preparation] = field(default_factory=dict[str, Preparation])

    def trial(self, recipe: str, method: Method, setting: Setting, seed: int) -> Trial:
        """Describe one run of this study."""
        written = self._words(recipe, method, setting, seed)
        options = written
        if method.starts:
            found = {name: placed(getattr(method, name), self.preparations) for name in ("peft", "overrides")}
            options = self._words(recipe, replace(method, **found), setting, seed)
        folder = self.runs / self.labels[recipe] / method.name / f"{setting.folder}-seed-{seed}"
        return Trial(
            recipe=recipe,
            method=method.name,
            lr=setting.lr,
            seed=seed,
            folder=folder,
            options=options,
            weight_decay=setting.weight_decay,
            prepared=tuple(self.preparations[name] for name in method.starts),
            written=written if method.starts else (),
        )

    def _words(self, recipe: str, method: Method, setting: Setting, seed: int) -> tuple[str, ...]:
        words = ["fit", "--config", recipe, "--peft", json.dumps(method.peft), *self._seeded(seed)]
        for key in method.lr_options:
            words += [f"--{key}", repr(setting.lr)]
        if setting.weight_decay is not None:
            words += [f"--{DECAY_OPTION}", repr(setting.weight_decay)]
        return (*words, *option_words(method.overrides))

    def needed(self) -> list[Preparation]:
        """What is to be prepared: that from which a method starts."""
        names = dict.fromkeys(name for method in self.methods for name in method.starts)
        return [self.preparations[name] for name in names]

    def untrained(self) -> list[Trial]:
        """The runs of the baselines: every recipe, baseline and seed."""
        return [
            Trial(
                recipe=recipe,
                method=name,
                lr=None,
                seed=seed,
                folder=self.runs / self.labels[recipe] / name / f"seed-{seed}",
                options=("baseline", name, "--config", recipe, *self._seeded(seed), *option_words(self.overrides)),
            )
            for recipe in self.recipes
            for name in self.baselines
            for seed in self.seeds
        ]

    def _seeded(self, seed: int) -> list[str]:
        return [word for key in ("seed_everything", *self.seed_options) for word in (f"--{key}", str(seed))]

    def tuning(self) -> list[Trial]:
        """The runs that choose the settings: every recipe, method and setting, with each of `tune_seeds`."""
        return [
            self.trial(recipe, method, setting, seed)
            for recipe in self.recipes
            for method in self.methods
            for setting in method.settings
            for seed in self.tune_seeds
        ]

    def possible(self) -> list[Trial]:
        """Every run that this study may come to need, whichever settings are chosen."""
        trained = [
            self.trial(recipe, method, setting, seed)
            for recipe in self.recipes
            for method in self.methods
            for setting in method.settings
            for seed in dict.fromkeys((*self.tune_seeds, *self.seeds))
        ]
        return [*self.untrained(), *trained]


def method_of(peft: Mapping[str, Any]) -> str:
    """Name the method of a `peft:` block, whose class may be given with its module."""
    return str(peft.get("class_path", "")).rsplit(".", 1)[-1]


def label_recipes(recipes: Sequence[str]) -> dict[str, str]:
    """Name each recipe by its file, with its folders where two files share a name."""
    stems = Counter(Path(recipe).stem for recipe in recipes)

    def label(recipe: str) -> str:
        path = Path(recipe).with_suffix("")
        return path.name if stems[path.name] == 1 else "-".join(p for p in path.parts if p not in ("..", path.anchor))

    return {recipe: label(recipe) for recipe in recipes}
