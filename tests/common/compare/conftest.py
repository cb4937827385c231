"""A small world for studies: a folder with a recipe, a fake `graft`, and what it is to measure."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from common.compare import Method, Study, Trial, compare
from common.compare.evidence import Block, make_blocks
from common.compare.results import Metrics, Run

FAKE = Path(__file__).with_name("fake_graft.py")
# On validation 1e-3 is the best rate for LoRA and 5e-5 for full fine-tuning.
VAL = {"LoRA": {"0.0003": 0.70, "0.001": 0.74, "0.003": 0.72}, "FullFineTune": {"1e-05": 0.66, "5e-05": 0.75}}
TEST = {"LoRA": {"0": 0.70, "1": 0.73, "2": 0.76}, "FullFineTune": {"0": 0.80, "1": 0.70, "2": 0.75}}
STUDY = """
title: A small study
question: Does it work?
recipe: recipe.yaml
out: runs/small
overrides: {trainer.max_epochs: 4, data.name: tiny}
methods:
  LoRA: {peft: {class_path: LoRA, init_args: {on: [attention, ffn], rank: 8}}, lr: [3e-4, 1e-3, 3e-3]}
  FullFineTune: {peft: {class_path: FullFineTune}, lr: [1e-5, 5e-5], overrides: {trainer.max_epochs: 2}}
seeds: [0, 1, 2]
"""
BASELINES = "baselines: [Majority, Nearest]\n"
UNTRAINED = {"val": {"Majority": 0.2, "Nearest": 0.5}}
UNTRAINED["test"] = {"Majority": {"0": 0.2, "1": 0.2, "2": 0.2}, "Nearest": {"0": 0.50, "1": 0.54, "2": 0.52}}
CARD = """
id: ahead
statement: LoRA is ahead.
source: {paper: Somebody (2024), table: table 1, read: page}
published: {figure: 1.0 against 0.5, protocol: theirs}
tests: [ahead_of: {method: LoRA, reference: FullFineTune}]
embedded: {studies: [study.yaml], differs: small}
full: {recipes: [recipe.yaml], methods: [LoRA, FullFineTune], needs: [weights.bin]}
"""


class World:
    """A folder in which a study runs.

    Attributes:
        folder: The folder, which is the current one.
        out: Where the study writes.
        output: What the last call of `run` printed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out = folder / "runs" / "small"
        self.output = ""
        (folder / "recipe.yaml").write_text("task: ImageClassification\n")
        self.write(STUDY)
        self.measure()

    def write(self, study: str) -> None:
        """Write the study file."""
        (self.folder / "study.yaml").write_text(study)

    def add_baselines(self, **changes: Any) -> None:
        """Give the study two baselines, and the world what they come to."""
        self.write(STUDY + BASELINES)
        self.measure(**{part: {**own, **UNTRAINED[part]} for part, own in (("val", VAL), ("test", TEST))}, **changes)

    def measure(self, **changes: Any) -> None:
        """Say what the fake measures from now on."""
        (self.folder / "world.json").write_text(json.dumps({"val": VAL, "test": TEST, **changes}))

    def run(self, **options: Any) -> int:
        """Run the study; return its exit code."""
        stream = io.StringIO()
        code = compare(
            self.folder / "study.yaml",
            command=(sys.executable, "-S", str(FAKE)),
            **{"jobs": 4, "console": Console(file=stream, width=80), **options},
        )
        self.output = stream.getvalue()
        return code

    def calls(self) -> list[dict[str, Any]]:
        """Every call of the fake so far, in order."""
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def forget(self) -> None:
        """Forget the calls so far."""
        (self.folder / "calls.jsonl").unlink()


class Fabric:
    """Makes results of studies that never ran: run folders with rows of predictions, and what is made of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def block(
        self,
        label: str,
        results: Mapping[str, Sequence[float] | Sequence[Sequence[float]]],
        *,
        baselines: Sequence[str] = (),
        costs: Mapping[str, Mapping[str, float | Sequence[float]]] | None = None,
        extra: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
        val: Mapping[str, float] | None = None,
        metric: str = "score",
        mode: str = "max",
        domain: str = "vision",
        redrawn: bool = False,
        train: int = 0,
        recipe: str = "",
    ) -> Block:
        """Make the results of one recipe.

        Args:
            label: The recipe's label.
            results: By method one number a seed, or one list of examples' scores a seed, whose mean is the number.
            baselines: Which of them are baselines.
            costs: By method what metrics.json says under cost, one number or one a seed.
            extra: By further test metric and method one number a seed.
            val: By method the number on the validation split; the first seed's on the test split by default.
            metric: The metric that decides.
            mode: Whether more of it is better.
            domain: The domain.
            redrawn: Whether examples have other names for each seed.
            train: How many training examples there were.
            recipe: The recipe; by default named as the label.
        """
        runs = list[Run]()
        for name, values in results.items():
            for seed, value in enumerate(values):
                number = float(np.mean(value))
                test = {metric: number} | {key: own[name][seed] for key, own in (extra or {}).items() if name in own}
                spent = (costs or {}).get(name, {}).items()
                metrics = Metrics(
                    fitted=True,
                    primary=metric,
                    mode="max" if mode == "max" else "min",
                    val={metric: (val or {}).get(name, float(np.mean(values[0])))},
                    test=test,
                    cost={"fit_seconds": 1.0} | {k: v if isinstance(v, int | float) else v[seed] for k, v in spent},
                    data={"digest": f"d{seed if redrawn else 0}", "test": np.size(value), "train": train},
                    environment={},
                    backbone="b",
                    domain=domain,
                )
                folder = self.folder / label / name / f"lr-0.001-seed-{seed}"
                folder.mkdir(parents=True)
                if not isinstance(value, int | float):
                    start = seed if redrawn else 0
                    rows = [{"id": f"{start}-{place}", metric: float(one)} for place, one in enumerate(value)]
                    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
                lr = None if name in baselines else 1e-3
                trial = Trial(recipe=recipe or label, method=name, lr=lr, seed=seed, folder=folder, options=())
                runs.append(Run(trial=trial, metrics=metrics, chosen=True, failure=None))
        return make_blocks(self.study(label, results, baselines, recipe or label), runs)[0]

    def study(
        self, label: str, results: Mapping[str, Sequence[object]], baselines: Sequence[str], recipe: str
    ) -> Study:
        """Describe the study that would have made them."""
        return Study(
            title=label,
            question="?",
            recipes=(recipe,),
            labels={recipe: label},
            out=self.folder,
            runs=self.folder,
            methods=tuple(
                Method(name=name, peft={"class_path": name}, lrs=(1e-3,), lr_options=("model.optim.lr",), overrides={})
                for name in results
                if name not in baselines
            ),
            baselines=tuple(baselines),
            overrides={},
            seeds=tuple(range(max(len(values) for values in results.values()))),
            tune_seeds=(0,),
            seed_options=(),
        )


@pytest.fixture
def fabric(tmp_path: Path) -> Fabric:
    """A maker of results."""
    return Fabric(tmp_path)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """An empty world, entered."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("common.compare.runner._POLL_SECONDS", 0.01)  # the fake is done in no time
    return World(tmp_path)
