"""The course of a study, run for real against a fake `graft`."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from common.errors import GraftError
from tests.common.compare.conftest import VAL

REPO = Path(__file__).parents[3]


def measured(path):
    return json.loads(path.read_text())["test"]


def kinds(world):
    return [(call["verb"], call["method"], call["lr"], call["seed"]) for call in world.calls()]


def test_a_study_tunes_at_one_seed_repeats_the_winner_and_tests_only_that(world):
    assert world.run() == 0
    calls = kinds(world)
    fits = [call[1:] for call in calls if call[0] == "fit"]
    tests = [call[1:] for call in calls if call[0] == "test"]
    winners = {"LoRA": "0.001", "FullFineTune": "5e-05"}
    assert len(fits) == len(set(fits)) == 5 + 2 * 2
    assert sorted(tests) == sorted((method, lr, seed) for method, lr in winners.items() for seed in "012")
    tunes = [place for place, call in enumerate(calls) if call[0] == "fit" and call[3] == "0"]
    assert len(tunes) == 5
    assert all(calls.index(("fit", *test)) < calls.index(("test", *test)) > max(tunes) for test in tests)
    for name in ("results.csv", "results.md", "report.html"):
        assert (world.out / name).stat().st_size > 0


def test_a_tuned_method_goes_on_while_another_is_tuned_and_no_test_is_read_before_all_are(world):
    """A rate of full fine-tuning waits for LoRA's last seed, which cannot start before all of LoRA's rates ended."""
    slow = ["fit", "FullFineTune", "1e-05", "0"]
    world.measure(awaits=[[*slow, str(world.out / "recipe/LoRA/lr-0.001-seed-2")]])
    assert world.run(jobs=2) == 0, world.output
    lines = [line for line in world.output.splitlines() if line.startswith(("start", "done", "chosen", "testing"))]
    marks = [
        next(place for place, line in enumerate(lines) if line.startswith(beginning))
        for beginning in (
            "chosen  recipe LoRA lr 0.001; further seeds: 2 runs, 0 of them there already",
            "done    recipe FullFineTune lr 1e-05 seed 0",
            "chosen  recipe FullFineTune lr 5e-05; further seeds: 2 runs, 0 of them there already",
            "testing: 6 runs, 0 of them there already",
            "start   test ",
        )
    ]
    assert marks == sorted(marks)


def test_the_rate_is_chosen_on_validation_even_where_the_test_split_would_choose_otherwise(world):
    # Rate 3e-3 is better on test, by far; it is worse on validation, so it must lose, untested.
    test = {"LoRA": {"0": 0.1, "1": 0.1, "2": 0.1}, "FullFineTune": {"0": 0.1, "1": 0.1, "2": 0.1}}
    world.measure(test=test)
    assert world.run() == 0
    lost = json.loads((world.out / "recipe/LoRA/lr-0.003-seed-0/metrics.json").read_text())
    assert lost["test"] is None
    assert {call[2] for call in kinds(world) if call[:2] == ("test", "LoRA")} == {"0.001"}


def test_rate_and_weight_decay_are_chosen_together_and_the_report_says_from_how_many(world):
    world.write(
        (world.folder / "study.yaml")
        .read_text()
        .replace("lr: [1e-5, 5e-5]", "lr: [1e-5, 5e-5], weight_decay: [0, 0.05]")
    )
    full = {"1e-05 0.0": 0.5, "1e-05 0.05": 0.9, "5e-05 0.0": 0.7, "5e-05 0.05": 0.6}
    world.measure(val={"LoRA": {"0.0003": 0.70, "0.001": 0.74, "0.003": 0.72}, "FullFineTune": full})
    assert world.run() == 0, world.output
    tested = {path.parent.name for path in world.out.glob("recipe/FullFineTune/*/metrics.json") if measured(path)}
    assert tested == {f"lr-1e-05-decay-0.05-seed-{seed}" for seed in (0, 1, 2)}
    report = (world.out / "report.html").read_text()
    words = "different numbers of settings (learning rate and weight decay) to choose from, and more are an advantage: "
    assert f"{words}LoRA 3, FullFineTune 4." in report
    assert "1e-05, decay 0.05: 0.900, chosen" in report
    with (world.out / "results.csv").open() as file:
        rows = {row["method"]: (row["lr"], row["weight_decay"], row["settings"]) for row in csv.DictReader(file)}
    assert rows == {"LoRA": ("0.001", "", "3"), "FullFineTune": ("1e-05", "0.05", "4")}
    world.write(
        (world.folder / "study.yaml")
        .read_text()
        .replace("lr: [3e-4, 1e-3, 3e-3]", "lr: [1e-3, 3e-3], weight_decay: [0, 0.05]")
    )
    lora = {f"{lr} {decay}": 0.7 for lr in ("0.001", "0.003") for decay in ("0.0", "0.05")}
    world.measure(val={"LoRA": lora, "FullFineTune": full})
    assert world.run(out=Path("even")) == 0
    even = Path("even/report.html").read_text()
    assert "Every method had the same number of settings (learning rate and weight decay) to choose from: 4." in even


def test_less_is_better_where_the_run_says_so(world):
    world.measure(mode="min")
    assert world.run() == 0
    assert {call[1:3] for call in kinds(world) if call[0] == "test"} == {("LoRA", "0.0003"), ("FullFineTune", "1e-05")}


def test_another_metric_of_the_study_decides_and_no_run_is_made_anew_for_it(world):
    world.measure(characters=True)
    assert world.run() == 0
    world.write((world.folder / "study.yaml").read_text() + "\nmetric: cer_lower\n")
    world.forget()
    assert world.run() == 0, world.output
    fits = {call[1:] for call in kinds(world) if call[0] == "fit"}
    chosen = {"LoRA": "0.0003", "FullFineTune": "1e-05"}
    assert fits == {(method, lr, seed) for method, lr in chosen.items() for seed in "12"}
    with (world.out / "results.csv").open() as file:
        assert {row["primary"] for row in csv.DictReader(file)} == {"cer_lower"}
    world.write((world.folder / "study.yaml").read_text().replace("metric: cer_lower", "metric: cer_loewer"))
    with pytest.raises(GraftError, match=r"Unknown metric of the study 'cer_loewer'.*cer_lower"):
        world.run()


def test_a_finished_study_runs_nothing_again_and_keeps_its_results(world):
    world.run()
    before = {name: (world.out / name).read_bytes() for name in ("results.csv", "results.md", "report.html")}
    world.forget()
    assert world.run(jobs=3) == 0
    assert world.calls() == []
    for name in ("results.csv", "results.md"):
        assert (world.out / name).read_bytes() == before[name]


def test_the_same_study_seen_from_another_folder_name_is_not_rerun(world):
    world.run()
    world.out.rename(world.folder / "moved")
    world.forget()
    assert world.run(out=Path("moved")) == 0
    assert world.calls() == []


def test_a_tuning_seed_outside_the_seeds_is_not_tested(world):
    world.write((world.folder / "study.yaml").read_text() + "tune_seeds: 7\n")
    assert world.run() == 0
    assert {call[3] for call in kinds(world) if call[0] == "test"} == {"0", "1", "2"}
    assert sum(call[0] == "fit" for call in kinds(world)) == 5 + 2 * 3


def test_a_rate_that_collapses_for_another_seed_is_not_chosen_by_two(world):
    """Of LoRA the rate that is best with seed 0 alone, 1e-3, comes to .74 there and to .17 with seed 1."""
    world.measure(val={**VAL, "LoRA": {**VAL["LoRA"], "0.001": {"0": 0.74, "1": 0.17, "2": 0.74}}})
    world.write((world.folder / "study.yaml").read_text() + "tune_seeds: [0, 1]\n")
    assert world.run() == 0
    fits, tests = ([call for call in kinds(world) if call[0] == verb] for verb in ("fit", "test"))
    assert len(fits) == len(set(fits)) == 5 * 2 + 2  # a third seed of the chosen ones alone is left to fit
    assert {(call[1], call[2], call[3]) for call in tests} == {
        (method, rate, seed) for method, rate in (("LoRA", "0.003"), ("FullFineTune", "5e-05")) for seed in "012"
    }
    report = (world.out / "report.html").read_text()
    assert "0.455 (0.740, 0.170)" in report
    assert "0.720 (0.720, 0.720), chosen" in report
    assert "Each was tried with seeds 0 and 1; the best mean accuracy on the validation split was chosen." in report


def test_a_rate_that_fails_for_one_of_the_tuning_seeds_is_not_chosen(world):
    world.write((world.folder / "study.yaml").read_text() + "tune_seeds: [0, 1]\n")
    world.measure(fail=[["fit", "LoRA", "0.001", "1"]])
    assert world.run() == 1
    assert {call[2] for call in kinds(world) if call[:2] == ("test", "LoRA")} == {"0.003"}
    assert "0.740, failed, exit code 3" in (world.out / "report.html").read_text()
    assert "NOT TO BE BELIEVED" not in world.output


@pytest.mark.parametrize("what", ["arguments", "recipe", "foreign"])
def test_a_folder_of_another_command_is_refused_before_anything_runs(world, what):
    world.run()
    world.forget()
    if what == "arguments":
        world.write((world.folder / "study.yaml").read_text().replace("rank: 8", "rank: 4"))
    elif what == "recipe":
        (world.folder / "recipe.yaml").write_text("task: Segmentation\n")
    else:
        (world.out / "recipe/LoRA/lr-0.001-seed-0/trial.json").unlink()
    with pytest.raises(GraftError, match=r"LoRA/lr-0\.001-seed-0") as error:
        world.run()
    assert ("FullFineTune" in str(error.value)) == (what == "recipe")
    assert world.calls() == []


def test_baselines_run_once_a_seed_before_all_else_and_never_again(world):
    world.add_baselines()
    assert world.run() == 0
    baselines = [(name, seed) for name in ("Majority", "Nearest") for seed in "012"]
    starts = [line.removeprefix("start   ") for line in world.output.splitlines() if line.startswith("start ")]
    assert starts[:6] == [f"recipe {name} seed {seed}" for name, seed in baselines]
    own = [call for call in kinds(world) if call[1] in ("Majority", "Nearest")]
    assert sorted(own) == [("baseline", name, "-", seed) for name, seed in baselines]
    assert "baselines: 6 runs, 0 of them there already" in world.output
    assert "done    recipe Nearest seed 1  test accuracy 0.5400" in world.output
    folder = world.out / "recipe/Nearest/seed-1"
    assert {path.name for path in folder.iterdir()} >= {"metrics.json", "trial.json", "command.txt", "log.txt"}
    assert len((folder / "command.txt").read_text().splitlines()) == 1
    world.forget()
    assert world.run() == 0
    assert world.calls() == []


def test_a_baseline_is_added_to_a_finished_study(world):
    world.run()
    world.forget()
    world.add_baselines()
    assert world.run() == 0
    assert {call[0] for call in kinds(world)} == {"baseline"}


def test_a_failing_baseline_is_reported_and_tried_again_from_its_start(world):
    world.add_baselines(fail=[["baseline", "Nearest", "-", "1"]], sleep=0.01)
    assert world.run() == 1
    assert "FAILED  recipe Nearest seed 1  exit code 3" in world.output
    report = (world.out / "report.html").read_text()
    assert "recipe/Nearest/seed-1: baseline ended with exit code 3" in report
    assert "recipe,Nearest,,0 2,2,1," in (world.out / "results.csv").read_text()
    world.forget()
    world.add_baselines()
    assert world.run() == 0
    assert [(call["method"], call["seed"], call["resume"]) for call in world.calls()] == [("Nearest", "1", False)]


@pytest.mark.parametrize("what", ["arguments", "foreign"])
def test_a_baselines_folder_of_another_command_is_refused(world, what):
    world.add_baselines()
    world.run()
    world.forget()
    if what == "arguments":
        world.write((world.folder / "study.yaml").read_text() + "seed_options: [data.draw]\n")
    else:
        (world.out / "recipe/Nearest/seed-1/trial.json").unlink()
    with pytest.raises(GraftError, match=r"Nearest/seed-1'"):
        world.run()
    assert world.calls() == []


def test_a_comment_in_the_recipe_changes_nothing(world):
    world.run()
    world.forget()
    (world.folder / "recipe.yaml").write_text("# a comment\ntask: ImageClassification\n")
    assert world.run() == 0
    assert world.calls() == []


def test_a_failing_trial_is_reported_and_the_rest_goes_on(world):
    world.measure(fail=[["fit", "LoRA", "0.001", "0"], ["test", "FullFineTune", "5e-05", "1"]])
    assert world.run() == 1
    assert "FAILED  recipe LoRA lr 0.001 seed 0  exit code 3" in world.output
    assert "the loss is <not> a number" in world.output
    assert {call[2] for call in kinds(world) if call[:2] == ("test", "LoRA")} == {"0.003"}
    rows = (world.out / "results.csv").read_text().splitlines()
    assert rows[1].startswith("recipe,LoRA,0.003,0 1 2,3,1,")
    assert rows[2].startswith("recipe,FullFineTune,5e-05,0 2,2,1,")
    report = (world.out / "report.html").read_text()
    assert "0.001: failed, exit code 3" in report
    assert "the loss is &lt;not&gt; a number" in report
    # What failed, and only that, is tried again; the better rate then wins after all.
    world.forget()
    world.measure()
    assert world.run() == 0
    again = kinds(world)
    assert ("fit", "LoRA", "0.001", "0") in again
    assert ("test", "FullFineTune", "5e-05", "1") in again
    assert not [call for call in again if call[0] == "fit" and call[2] != "0.001"]


def test_a_method_whose_every_trial_fails_has_a_row_without_numbers(world):
    world.measure(fail=[["fit", "FullFineTune", lr, "0"] for lr in ("1e-05", "5e-05")])
    assert world.run() == 1
    assert (world.out / "results.csv").read_text().splitlines()[2].startswith("recipe,FullFineTune,,,0,2,")
    assert "FullFineTune has no result" in (world.out / "report.html").read_text()


def test_a_study_in_which_everything_fails_still_has_a_report(world):
    world.measure(
        fail=[["fit", "LoRA", lr, "0"] for lr in ("0.0003", "0.001", "0.003")],
        silent=[["fit", "FullFineTune", lr, "0"] for lr in ("1e-05", "5e-05")],
    )
    assert world.run() == 1
    assert "No run gave a result" in (world.out / "report.html").read_text()
    assert "exit code 0 but left no result" in world.output


def test_a_diverged_run_is_never_chosen(world):
    world.measure(
        val={"LoRA": {"0.0003": 0.1, "0.001": float("nan"), "0.003": 0.2}, "FullFineTune": {"1e-05": 0.1, "5e-05": 0.2}}
    )
    assert world.run() == 0
    assert {call[2] for call in kinds(world) if call[:2] == ("test", "LoRA")} == {"0.003"}
    assert "0.001: diverged" in (world.out / "report.html").read_text()


def test_a_killed_trial_goes_on_from_its_checkpoint(world):
    world.measure(sleep=0.01, fail=[["fit", "LoRA", "0.001", "0"]])
    world.run()
    assert not any(call["resume"] for call in world.calls())
    world.forget()
    world.measure()
    assert world.run() == 0
    resumed = [(call["method"], call["lr"], call["seed"]) for call in world.calls() if call["resume"]]
    assert resumed == [("LoRA", "0.001", "0")]
    # The log goes on after what it said before the failure.
    assert (world.out / "recipe/LoRA/lr-0.001-seed-0/log.txt").read_text().count("fit LoRA begins") == 2


def test_the_written_command_runs_the_trial_again(world):
    world.run()
    folder = world.out / "recipe/LoRA/lr-0.001-seed-0"
    before = json.loads((folder / "metrics.json").read_text())
    commands = (folder / "command.txt").read_text().splitlines()
    assert len(commands) == 2
    (folder / "metrics.json").unlink()
    for command in commands:
        subprocess.run(command, shell=True, check=True, stdout=subprocess.DEVNULL)
    assert json.loads((folder / "metrics.json").read_text()) == before
    assert (world.out / "recipe/LoRA/lr-0.003-seed-0/command.txt").read_text().count("\n") == 1


def test_threads_are_shared_between_the_jobs(world, monkeypatch):
    monkeypatch.setattr("common.compare.stages.cpu_count", lambda: 8)
    world.run(jobs=4)
    assert {call["threads"] for call in world.calls()} == {"2"}
    assert json.loads((world.out / "recipe/LoRA/lr-0.001-seed-0/trial.json").read_text())["side_by_side"] == 4


def test_wrong_jobs_and_a_second_study_in_the_same_folder_are_refused(world):
    with pytest.raises(GraftError, match="--jobs 0"):
        world.run(jobs=0)
    world.out.mkdir(parents=True)
    with FileLock(world.out / ".lock"), pytest.raises(GraftError, match="Another study is running"):
        world.run()


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_study_leaves_no_process_and_goes_on_later(world, number):
    world.measure(sleep=60)
    fake = Path(__file__).with_name("fake_graft.py")
    lines = ["import signal, sys", "from pathlib import Path", "from common.compare import compare"]
    # A shell starts what runs in its background with this signal ignored, which children inherit.
    lines += ["signal.signal(signal.SIGINT, signal.default_int_handler)"]
    lines += [f"sys.exit(compare(Path('study.yaml'), jobs=2, command=(sys.executable, '-S', {str(fake)!r})))"]
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    process = subprocess.Popen(
        [sys.executable, "-c", "\n".join(lines)], env=environment, stdout=subprocess.PIPE, text=True
    )
    for _ in range(150):
        time.sleep(0.1)
        if len(world.calls()) == 2 and len(list(world.out.rglob("last.ckpt"))) == 2:
            break
    children = [call["process"] for call in world.calls()]
    assert len(children) == 2
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "goes on from here" in output
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)
    world.forget()
    world.measure()
    assert world.run() == 0
    assert sum(call["resume"] for call in world.calls()) == 2
