"""Recipes and methods of a command line become the studies that a file would have described."""

from __future__ import annotations

import csv
import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from common.compare import load_studies, run_studies
from common.compare.expand import Request, Shots, expand, parse_decays, parse_rates
from common.compare.rates import RATES, rates_of
from common.errors import GraftError
from common.methods import METHODS

FAKE = Path(__file__).with_name("fake_graft.py")
RECIPE = """
model: {class_path: ImageClassification}
peft: {class_path: LoRA, init_args: {on: [all], rank: 2}}
data: {class_path: OpenClipart}
"""
BOTH = Shots(counts="shots", shares="share", whole=True)


@pytest.fixture
def request_of(world):
    for name in ("one", "two"):
        Path(f"{name}.yaml").write_text(RECIPE)
    return Request(
        recipes=["one.yaml", "two.yaml"],
        methods=["LoRA", "FullFineTune"],
        seeds=2,
        rates={"": (1e-3, 3e-4)},
        shots=(),
        overrides={"trainer.max_epochs": "2"},
        out=Path("out"),
    )


def options(trial):
    words = trial.options
    return {key.removeprefix("--"): value for key, value in zip(words[1::2], words[2::2], strict=True)}


def test_a_command_line_says_what_a_file_would(request_of):
    Path("study.yaml").write_text("""
title: t
question: q
recipe: one.yaml
overrides: {trainer.max_epochs: 2}
methods:
  LoRA: {peft: {class_path: LoRA, init_args: {on: [all], rank: 2}}, lr: [1.0e-3, 3.0e-4]}
  FullFineTune: {peft: {class_path: FullFineTune}, lr: [1.0e-3, 3.0e-4]}
seeds: [0, 1]
""")
    written, (first, second) = load_studies(Path("study.yaml"), out=Path("out"))[0], expand(request_of, lambda _: BOTH)
    assert first.possible() == written.possible()
    assert second.labels == {"two.yaml": "two"}


def test_rates_are_tried_with_as_many_seeds_as_asked(request_of):
    study = expand(replace(request_of, tune_seeds=2), lambda _: BOTH)[0]
    tried = {(trial.method, trial.lr, trial.seed) for trial in study.tuning()}
    assert tried == {
        (name, rate, seed) for name in ("LoRA", "FullFineTune") for rate in (1e-3, 3e-4) for seed in (0, 1)
    }
    with pytest.raises(GraftError, match=r"--tune-seeds 0 is not possible\. Give 1 or more\."):
        expand(replace(request_of, tune_seeds=0), lambda _: BOTH)


def test_a_method_takes_the_recipes_arguments_or_its_own_defaults(request_of):
    study, _ = expand(replace(request_of, methods=["LoRA", "LinearProbe"]), lambda _: BOTH)
    lora, probe = study.tuning()[0], study.tuning()[-1]
    assert json.loads(options(lora)["peft"])["init_args"] == {"on": ["all"], "rank": 2}
    assert json.loads(options(probe)["peft"]) == {"class_path": "LinearProbe"}
    assert "model.optim.head_lr" in options(probe)
    assert "model.optim.lr" not in options(probe)


def test_shots_multiply_the_studies_through_the_datas_own_options(request_of):
    studies = expand(replace(request_of, shots=["5", "50%", "all"]), lambda _: BOTH)
    assert [next(iter(study.labels.values())) for study in studies] == [
        f"{name}-{amount}" for name in ("one", "two") for amount in ("5", "50percent", "all")
    ]
    given = [options(study.tuning()[0]) for study in studies[:3]]
    assert [(one.get("data.shots"), one.get("data.share")) for one in given] == [
        ("5", None),
        (None, "0.5"),
        ("null", None),
    ]
    folders = {trial.folder for study in studies for trial in study.possible()}
    assert len(folders) == 6 * 2 * 2 * 2


def test_a_budget_sizes_the_methods_that_it_names(request_of):
    study, _ = expand(replace(request_of, budgets={"LoRA": (0.003, 0.01)}), lambda _: BOTH)
    assert [method.name for method in study.methods] == ["LoRA-0.3percent", "LoRA-1percent", "FullFineTune"]
    assert json.loads(options(study.tuning()[0])["peft"]) == {
        "class_path": "AtBudget",
        "init_args": {"method": {"class_path": "LoRA", "init_args": {"on": ["all"], "rank": 2}}, "share": 0.003},
    }
    assert study.methods[1].lrs == (1e-3, 3e-4)


def test_a_share_takes_the_place_of_the_recipes_own_shots(request_of):
    Path("one.yaml").write_text(RECIPE.replace("OpenClipart}", "OpenClipart, init_args: {shots: 200}}"))
    study = expand(replace(request_of, recipes=["one.yaml"], shots=["10%"]), lambda _: BOTH)[0]
    assert study.overrides == {"trainer.max_epochs": "2", "data.share": 0.1, "data.shots": None}


@pytest.mark.parametrize(
    ("shots", "offered", "words"),
    [
        ("50%", Shots(counts="shots", whole=True), "cannot be cut to a share; it takes data.shots"),
        ("all", Shots(counts="labelled"), "has no word for all of it; it takes data.labelled"),
        ("5", Shots(), "OpenClipart, cannot be cut to a number; it has no option for that"),
        ("0", BOTH, "--shots 0 is not understood"),
        ("120%", BOTH, "at most 100 %"),
        ("few", BOTH, "numbers, percentages and all"),
    ],
)
def test_data_that_cannot_be_made_fewer_is_refused(request_of, shots, offered, words):
    with pytest.raises(GraftError) as error:
        expand(replace(request_of, shots=[shots]), lambda _: offered)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rates": {"LoRA": (1e-3,)}}, "LoRA 1, FullFineTune 3"),
        ({"seeds": 0}, "--seeds 0"),
        ({"recipes": ["nowhere.yaml"]}, "No such recipe: nowhere.yaml"),
        ({"recipes": ["study.yaml"]}, "'study.yaml' is no recipe"),
    ],
)
def test_what_cannot_be_compared_fairly_or_at_all_is_refused(request_of, changes, words):
    with pytest.raises(GraftError) as error:
        expand(replace(request_of, **changes), lambda _: BOTH)
    assert words in str(error.value)


def test_every_method_is_offered_as_many_rates_as_the_others():
    assert {len(rates_of(name)) for name in METHODS} == {3}
    assert set(RATES) <= set(METHODS)


def test_every_method_is_offered_each_weight_decay_with_each_rate(request_of):
    plain, tuned = (
        expand(one, lambda _: BOTH)[0] for one in (request_of, replace(request_of, weight_decays=(0.0, 0.1)))
    )
    assert {len(method.settings) for method in tuned.methods} == {2 * len(plain.methods[0].settings)}
    assert parse_decays("0,0.1") == (0.0, 0.1)
    for wrong in ("-1", "0,0", "inf", "much", "0,"):
        with pytest.raises(GraftError, match="--weight-decays"):
            parse_decays(wrong)


def test_rates_are_of_all_methods_or_of_one():
    assert parse_rates(["1e-4,1e-3", "LoRA=3e-3,1e-2"], ["LoRA", "SSF"]) == {"": (1e-4, 1e-3), "LoRA": (3e-3, 1e-2)}
    for wrong in ("VeRA=1e-3", "LoRA=", "0", "1e-3,1e-3", "LoRA=fast"):
        with pytest.raises(GraftError, match="--rates"):
            parse_rates([wrong], ["LoRA", "SSF"])


def test_several_recipes_make_one_report_with_ranks(request_of, world):
    world.measure(test={"LoRA": {"0": 0.8, "1": 0.81}, "FullFineTune": {"0": 0.7, "1": 0.72}})
    studies = expand(replace(request_of, rates={"LoRA": (1e-3,), "FullFineTune": (5e-5,)}), lambda _: BOTH)
    stream = io.StringIO()
    command = (sys.executable, "-S", str(FAKE))
    code, blocks = run_studies(studies, 2, command=command, console=Console(file=stream, width=80))
    assert code == 0
    assert [block.label for block in blocks] == ["one", "two"]
    with Path("out/results.csv").open() as file:
        assert [(row["recipe"], row["method"]) for row in csv.DictReader(file)] == [
            (recipe, method) for recipe in ("one", "two") for method in ("LoRA", "FullFineTune")
        ]
    report = Path("out/report.html").read_text()
    assert "LoRA has the best average rank over 2 sets (1.00), before FullFineTune (2.00)." in report
    assert "graft fit --config two.yaml" in report
    assert json.loads(Path("out/one/LoRA/lr-0.001-seed-1/metrics.json").read_text())["test"]


def test_studies_with_the_same_runs_share_what_they_have_in_common(world):
    world.run()
    world.forget()
    study = (world.folder / "study.yaml").read_text()
    world.write(
        study.replace("out: runs/small", "out: runs/other\nruns: runs/small").replace("  FullFineTune", "  Full")
    )
    assert world.run() == 0
    assert {call["lr"] for call in world.calls()} == {"1e-05", "5e-05"}
    assert (world.folder / "runs/other/results.csv").exists()
    assert not (world.folder / "runs/other/recipe").exists()
