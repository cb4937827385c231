"""A study whose methods start from an adapter that it trains itself, with the commands of `graft` in this process."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from common._digest import file_digest
from common._yaml import load_yaml
from common.cli import run as graft
from common.compare import compare, load_studies, stages
from common.compare.runner import Finished
from tests.domains.protein.conftest import DOMAINS, ESM

ROOT = Path(__file__).parents[3]
MODEL = {"backbone": ESM, "pretrained": False}
PEPTIDES = [("GIGKFLHSAKKFG", "a"), ("MKTAYIAKQRQIS", "b"), ("KWKLFKKIGAVLK", "a"), ("STNQDEGAVLSTN", "b")]
STACK = {"first": "${prepared:domain}", "then": {"class_path": "LoRA", "init_args": {"on": ["all"], "rank": 2}}}


class Here:
    """Runs commands in this process: starting one costs more than what these do."""

    def __init__(self) -> None:
        self.commands: list[tuple[str, ...]] = []

    def start(self, job, environment):
        self.commands.append(job.command)
        with contextlib.redirect_stdout(io.StringIO()) as said:
            code = graft(list(job.command[1:]), DOMAINS)
        job.log.write_text(said.getvalue())
        self.job, self.code = job, code
        return self

    def finished(self):
        return Finished(job=self.job, code=self.code, seconds=0.0, tail=self.job.log.read_text())

    def ask(self):
        pass

    force = ask


@pytest.fixture
def here(tmp_path, monkeypatch, tiny):
    """A folder with a study of two steps, and what runs its commands."""
    monkeypatch.chdir(tmp_path)
    runner = Here()
    monkeypatch.setattr(stages, "_runner", lambda *_: runner)
    monkeypatch.setattr("common.compare.runner._POLL_SECONDS", 0.001)
    Path("corpus.fasta").write_text("".join(f">p{n}\n{text}\n" for n, (text, _) in enumerate(PEPTIDES)))
    rows = [f"{text[:5]}{end}{text[5:]},{label}" for end in "ACDEFGHIKL" for text, label in PEPTIDES]
    Path("labels.csv").write_text("\n".join(["sequence,label", *rows]) + "\n")
    own = {"clusters": "none", "tokens_per_batch": 256}
    trainer = {"max_epochs": 1, "accelerator": "cpu", "precision": "32-true"}
    for name, task, data in (
        ("first", "MaskedLM", {"class_path": "Unlabelled", "init_args": {"fasta": "corpus.fasta", **own}}),
        ("second", "SequenceClassification", {"class_path": "ProteinCSV", "init_args": {"csv": "labels.csv", **own}}),
    ):
        peft = {"class_path": "LoRA", "init_args": {"on": ["all"], "rank": 2}}
        recipe = {"model": {"class_path": task, "init_args": MODEL}, "peft": peft, "data": data, "trainer": trainer}
        Path(f"{name}.yaml").write_text(json.dumps(recipe))
    # Random weights are drawn from the seed, and an adapter stands on the weights that it was trained on.
    study = {"title": "t", "question": "q", "recipe": "second.yaml", "out": "out", "seeds": [0]}
    study["prepare"] = {"domain": {"recipe": "first.yaml", "lr": 0.01}}
    study["methods"] = {
        stays: {"peft": {"class_path": "Stack", "init_args": {**STACK, "first_stays": stays}}, "lr": [0.01]}
        for stays in ("trainable", "frozen")
    }
    Path("study.yaml").write_text(json.dumps(study))
    return runner


def test_an_adapter_is_trained_exported_and_built_on_by_the_study_itself(here):
    stream = io.StringIO()
    options = {"command": ("graft",), "console": Console(file=stream, width=100)}
    assert compare(Path("study.yaml"), jobs=1, **options) == 0, stream.getvalue()
    assert [command[1] for command in here.commands] == ["fit", "export", "fit", "fit", "test", "test"]
    adapter = Path("out/prepared/domain/adapter")
    records = {name: json.loads(next(Path(f"out/second/{name}").glob("*/metrics.json")).read_text()) for name in
               ("trainable", "frozen")}  # fmt: skip
    for record in records.values():
        method = record["method"]["init_args"]
        assert (method["first"], method["first_digest"]) == (
            str(adapter),
            file_digest(adapter / "adapter_model.safetensors"),
        )
    prepared = json.loads((adapter.parent / "metrics.json").read_text())
    trained = {name: record["cost"]["params_trainable_backbone"] for name, record in records.items()}
    assert trained["trainable"] == trained["frozen"] + prepared["cost"]["params_trainable_backbone"]
    text = Path("out/results.md").read_text()
    assert "Prepared 'domain': LoRA by first.yaml" in text
    assert "Not to be believed" not in text
    here.commands.clear()
    assert compare(Path("study.yaml"), jobs=1, **options) == 0
    assert here.commands == []


def test_the_shipped_study_prepares_on_training_peptides_alone(monkeypatch):
    """Its first step sees the same split as its second, and the same backbone."""
    monkeypatch.chdir(ROOT)
    (study,) = load_studies(Path("configs/claims/studies/amp_short_two_steps.yaml"))
    (one,) = study.needed()
    recipe = load_yaml(Path(one.recipe))
    assert recipe["data"]["class_path"] == "UnlabelledPeptides"
    assert load_yaml(Path(study.recipes[0]))["data"]["class_path"] == "AntimicrobialPeptides"
    assert recipe["model"]["init_args"]["backbone"] == study.overrides["model.backbone"]
    stays = [method.peft["init_args"].get("first_stays") for method in study.methods if method.starts]
    assert stays == ["trainable", "frozen", "merged"]
