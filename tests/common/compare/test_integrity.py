"""Planted cheats and faults: each is found, and named where a reader looks."""

from __future__ import annotations

import json
import shutil

import pytest

from common.compare import load_studies
from common.compare.evidence import make_blocks
from common.compare.integrity import check
from common.compare.ledger import Ledger
from common.compare.results import Run, read_metrics

CHOSEN = {"LoRA": "lr-0.001", "FullFineTune": "lr-5e-05"}


def recheck(world, chosen=CHOSEN):
    """Check what lies in the folders now, the runs of some rates being those in the results."""
    study = load_studies(world.folder / "study.yaml")[0]
    runs = []
    for trial in study.possible():
        metrics = read_metrics(trial.folder)
        if metrics is not None:
            counts = trial.folder.name.startswith(f"{chosen[trial.method]}-seed")
            runs.append(Run(trial=trial, metrics=metrics, chosen=counts, failure=None))
    return check(make_blocks(study, runs), {study.runs: Ledger(study.runs)})


def edit(path, change):
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def set_test(value):
    return lambda record: record["test"].update(accuracy=value) if record["test"] else record.update(test=value)


def texts(findings, *, broken=True):
    return [finding.text for finding in findings if finding.broken == broken]


def test_an_honest_study_passes_then_every_cheat_is_found(world):
    """One study that ran, and each fault planted in a copy of it: a study takes its time."""
    rows = {"LoRA": [{"id": str(n), "label": "a", "prediction": "ab"[n < 3]} for n in range(10)]}
    world.measure(rows=rows, test={"LoRA": {s: 0.7 for s in "012"}, "FullFineTune": {"0": 0.8, "1": 0.7, "2": 0.75}})
    assert world.run() == 0
    assert recheck(world) == []
    assert "Nothing was found." in (world.out / "report.html").read_text()
    shutil.copytree(world.out, world.folder / "honest")
    winner, loser = "recipe/LoRA/lr-0.001-seed-1", "recipe/LoRA/lr-0.003-seed-0"

    def planted(cheat, **options):
        shutil.rmtree(world.out)
        shutil.copytree(world.folder / "honest", world.out)
        cheat(world.out)
        return recheck(world, **options)

    # The test metric chose the rate: by code that chooses so, and by validation results that were made to fit.
    found = planted(lambda out: None, chosen={**CHOSEN, "LoRA": "lr-0.003"})
    assert "recipe, LoRA: the results are of rate 0.003, the validation split chooses 0.001." in texts(found)
    found = planted(lambda out: edit(out / loser / "metrics.json", lambda record: record["val"].update(accuracy=0.99)))
    assert "recipe, LoRA, 'lr-0.003-seed-0': val changed after it was measured." in texts(found)

    # The test split was looked at for a run that lost.
    peeked = {"accuracy": 0.9}
    found = planted(lambda out: edit(out / loser / "metrics.json", lambda record: record.update(test=peeked)))
    assert any("'lr-0.003-seed-0': the test split was read" in text for text in texts(found, broken=False))

    # A result was edited: against the ledger, and against the predictions where the ledger was lost.
    def improve(out):
        edit(out / winner / "metrics.json", lambda record: record["test"].update(accuracy=0.9))

    assert "recipe, LoRA, 'lr-0.001-seed-1': test changed after it was measured." in texts(planted(improve))

    def improve_unseen(out):
        improve(out)
        (out / "ledger.jsonl").unlink()

    told = "recipe, LoRA, 'lr-0.001-seed-1': accuracy is recorded as 0.9000, its predictions give 0.7000."
    assert texts(planted(improve_unseen)) == [told]
    found = planted(lambda out: (out / winner / "predictions.jsonl").write_text(""))
    assert "recipe, LoRA, 'lr-0.001-seed-1': predictions changed after it was measured." in texts(found)

    # The ledger itself was edited.
    def rewrite(out):
        lines = (out / "ledger.jsonl").read_text().splitlines(keepends=True)
        (out / "ledger.jsonl").write_text("".join(lines[:2] + lines[3:]))

    assert any("its lines do not follow on from each other" in text for text in texts(planted(rewrite)))

    # A run of the results was taken away, and the test split was read again and again.
    found = planted(lambda out: shutil.rmtree(out / winner))
    assert "recipe, LoRA: no result of seed 1." in texts(found)
    runs = world.out.relative_to(world.folder)

    def test_again(out):
        improve(out)
        Ledger(runs).note("test", runs / winner)

    told = "recipe, LoRA, 'lr-0.001-seed-1': the test split was read 2 times, with different results."
    assert told in texts(planted(test_again))
    found = planted(lambda out: Ledger(runs).note("test", runs / winner))
    assert texts(found) == []
    assert texts(found, broken=False) == ["recipe, LoRA, 'lr-0.001-seed-1': the test split was read 2 times."]


def test_a_seed_that_failed_is_no_seed_that_was_dropped(world):
    world.measure(fail=[["fit", "LoRA", "0.001", "1"]])
    assert world.run() == 1
    assert "Note: recipe, LoRA: no result of seed 1, which failed." in world.output
    assert "NOT TO BE BELIEVED" not in world.output


@pytest.mark.parametrize("traces", ["folders", "ledger"])
def test_a_seed_that_is_dropped_after_it_was_tested_is_named(world, traces):
    world.run()
    world.write((world.folder / "study.yaml").read_text().replace("seeds: [0, 1, 2]", "seeds: [1, 2]\ntune_seeds: 0"))
    if traces == "ledger":
        # The tuning seed is still needed; its test result is cut out of the record, as if it had not been tested.
        edit(world.out / "recipe/LoRA/lr-0.001-seed-0/metrics.json", lambda record: record.update(test=None))
    else:
        world.write((world.folder / "study.yaml").read_text().replace("seeds: [1, 2]\ntune_seeds: 0", "seeds: [0, 1]"))
    found = texts(recheck(world))
    if traces == "ledger":
        assert any("'lr-0.001-seed-0': test changed after it was measured" in text for text in found)
    else:
        assert "recipe, LoRA: 'lr-0.001-seed-2' was tested, and the study leaves it out." in found
        assert world.run() == 1
        assert "NOT TO BE BELIEVED: recipe, LoRA: 'lr-0.001-seed-2' was tested" in world.output
        assert "Not to be believed as it stands" in (world.out / "report.html").read_text()
        assert "Not to be believed as it stands" in (world.out / "results.md").read_text()
        shutil.rmtree(world.out / "recipe/LoRA/lr-0.001-seed-2")
        assert "recipe, LoRA: 'lr-0.001-seed-2' was tested, and the study leaves it out." in texts(recheck(world))


def test_examples_in_two_splits_are_named(world):
    world.measure(shared={"train-val": 0, "train-test": 3})
    assert world.run() == 1
    assert "recipe: 3 examples stand in two splits, train-test, with the same content." in texts(recheck(world))


def test_runs_of_one_seed_on_different_data_are_named(fabric):
    block = fabric.block("r", {"LoRA": [0.5, 0.6], "FullFineTune": [0.5, 0.6]}, redrawn=True)
    study = block.study
    assert texts(check([block], {study.runs: Ledger(study.runs)})) == []
    other = block.runs[0]
    other.metrics.data["digest"] = "another"
    found = texts(check([block], {study.runs: Ledger(study.runs)}))
    assert found == ["r: the runs of one seed did not all see the same data (their digests differ)."]


def test_less_training_data_must_not_change_what_is_tested(fabric):
    blocks = [fabric.block(label, {"LoRA": [0.5]}) for label in ("five", "ten")]
    for block, split in zip(blocks, ("a", "b"), strict=True):
        object.__setattr__(block, "recipe", "recipe.yaml")
        block.runs[0].metrics.data["splits"] = {"test": split}
    found = check(blocks, {fabric.folder: Ledger(fabric.folder)})
    assert texts(found) == ["recipe.yaml: runs of one seed were tested on different examples."]


def test_the_ledger_survives_a_process_that_died_while_writing(tmp_path):
    run = tmp_path / "r"
    run.mkdir()
    (run / "metrics.json").write_text(json.dumps({"val": {"a": 1}, "data": {}, "test": None}))
    Ledger(tmp_path).note("fit", run)
    with (tmp_path / "ledger.jsonl").open("a") as file:
        file.write('{"event": "te')
    ledger = Ledger(tmp_path)
    assert [entry.event for entry in ledger.entries] == ["fit"]
    ledger.note("test", run)
    again = Ledger(tmp_path)
    assert not again.broken
    assert [entry.event for entry in again.of(run)] == ["fit", "test"]


def test_results_from_before_the_ledger_are_taken_in_and_said_to_be(world):
    world.run()
    (world.out / "ledger.jsonl").unlink()
    assert world.run() == 0
    assert "9 results in 'runs/small' were there before the ledger" in (world.out / "results.md").read_text()
    assert {entry.event for entry in Ledger(world.out).entries} == {"found"}
    edit(world.out / "recipe/LoRA/lr-0.001-seed-1/metrics.json", set_test(0.99))
    assert texts(recheck(world)) == ["recipe, LoRA, 'lr-0.001-seed-1': test changed after it was measured."]


def test_ten_trials_side_by_side_leave_no_damaged_file(world):
    study = (world.folder / "study.yaml").read_text()
    rates = ", ".join(f"{n}.0e-4" for n in range(1, 11))
    world.write(study.replace("lr: [3e-4, 1e-3, 3e-3]", f"lr: [{rates}]"))
    val = {f"{n * 1e-4:g}": 0.5 + n / 100 for n in range(1, 11)}
    test = {"LoRA": {s: 0.7 for s in "012"}, "FullFineTune": {s: 0.7 for s in "012"}}
    world.measure(val={"LoRA": val, "FullFineTune": {"1e-05": 0.6, "5e-05": 0.7}}, test=test, sleep=0.2)
    assert world.run(jobs=10) == 0
    records = list(world.out.rglob("metrics.json"))
    assert len(records) == 12 + 4
    for path in (*records, *world.out.rglob("trial.json")):
        json.loads(path.read_text())
    assert not Ledger(world.out).broken
    assert len(Ledger(world.out).entries) == 16 + 6


def test_a_record_that_a_process_left_damaged_is_a_failure_and_not_the_end(world):
    world.measure(garbage={"FullFineTune": "{half"})
    assert world.run() == 1
    assert "left no result in metrics.json" in world.output
    assert "cannot be read" in world.output
    assert "recipe,LoRA,0.001,0 1 2,3,0," in (world.out / "results.csv").read_text()
    assert "FullFineTune has no result." in (world.out / "report.html").read_text()
