"""What a study trains before its trials: its seed, its commands, its place in identity, ledger and report."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.compare import load_studies
from common.compare.ledger import Ledger
from common.compare.prepared import placed, references
from common.errors import GraftError

REPO = Path(__file__).parents[3]
FAKE = Path(__file__).with_name("fake_graft.py")
STUDY = """
title: Two steps
question: Does a first step pay?
recipe: recipe.yaml
out: runs/small
prepare:
  domain:
    recipe: first.yaml
    peft: {class_path: Adapt, init_args: {rank: 4}}
    lr: 1e-3
    overrides: {data.text: corpus}
    seed: 7
methods:
  LoRA: {peft: {class_path: LoRA}, lr: [1e-3]}
  Two:
    peft: {class_path: Stack, init_args: {first: "${prepared:domain}", then: {class_path: LoRA}}}
    lr: [1e-3, 3e-3]
seeds: [0, 1]
"""
ADAPTER = Path("runs/small/prepared/domain/adapter")
TWO = {"lr-0.001-seed-0", "lr-0.003-seed-0", "lr-0.003-seed-1"}


@pytest.fixture
def two(world):
    """A world with a study of two steps."""
    Path("first.yaml").write_text("model: MaskedLM\npeft: {class_path: Other}\n")
    world.write(STUDY)
    world.measure(**measures())
    return world


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Where the finished study is kept: it takes its time."""
    return tmp_path_factory.mktemp("store") / "done"


@pytest.fixture
def done(two, store):
    """The same world when its study has run."""
    if store.exists():
        shutil.copytree(store, two.folder, dirs_exist_ok=True)
    else:
        assert two.run() == 0, two.output
        shutil.copytree(two.folder, store)
    return two


def measures(**changes):
    val = {"Adapt": {"0.001": 0.4}, "LoRA": {"0.001": 0.7}, "Stack": {"0.001": 0.6, "0.003": 0.8}}
    test = {"LoRA": {"0": 0.7, "1": 0.7}, "Stack": {"0": 0.8, "1": 0.9}}
    return {"val": val, "test": test, **changes}


def calls(world):
    return [(call["verb"], call["method"], call["seed"]) for call in world.calls()]


def write_changed(world, old, new):
    assert old in STUDY
    world.write(STUDY.replace(old, new))


def test_references_are_found_and_filled_at_any_depth():
    study = {"a": ["${prepared:x}/head", {"b": "${y}"}], "c": 3, "d": "$x {z}"}
    assert references(study) == ["prepared:x", "y"]
    assert references({"a": 1}) == []


def test_it_is_fitted_and_exported_once_before_everything_with_its_own_seed(done):
    assert calls(done)[:2] == [("fit", "Adapt", "7"), ("export", "Adapt", "7")]
    assert [call[0] for call in calls(done)].count("export") == 1
    first = done.calls()[0]["options"]
    assert (first["--model.optim.lr"], first["--data.text"], first["--config"]) == ("0.001", "corpus", "first.yaml")
    stacked = [call for call in done.calls() if call["method"] == "Stack" and call["verb"] == "fit"]
    assert {call["seed"] for call in stacked} == {"0", "1"}
    for call in stacked:
        given = json.loads(call["options"]["--peft"])["init_args"]
        assert given == {"first": str(ADAPTER), "then": {"class_path": "LoRA"}}
        assert "--data.text" not in call["options"]
    report = (done.out / "report.html").read_text()
    assert f"graft export {ADAPTER.parent} {ADAPTER}" in report
    assert report.index("graft fit --config first.yaml") < report.index("graft fit --config recipe.yaml")
    assert "Nothing was found." in report


def test_the_written_commands_make_it_again(done):
    before = (ADAPTER / "adapter_model.safetensors").read_bytes()
    commands = (ADAPTER.parent / "command.txt").read_text().splitlines()
    shutil.rmtree(ADAPTER)
    for command in commands:
        subprocess.run(command, shell=True, check=True, stdout=subprocess.DEVNULL)
    assert (ADAPTER / "adapter_model.safetensors").read_bytes() == before


def test_a_study_that_was_moved_keeps_its_runs(done):
    shutil.move("runs/small", "elsewhere")
    done.forget()
    assert done.run(out=Path("elsewhere")) == 0, done.output
    assert done.calls() == []


def test_the_seed_is_0_unless_it_is_said_and_the_methods_own_seeds_do_not_touch_it(two):
    write_changed(two, "    seed: 7\n", "")
    two.write(
        (two.folder / "study.yaml").read_text().replace("seeds: [0, 1]", "seeds: [3, 4]\nseed_options: [data.draw]")
    )
    study = load_studies(Path("study.yaml"))[0]
    (one,) = study.needed()
    assert one.seed == 0
    assert one.options[one.options.index("--seed_everything") + 1] == "0"
    assert "--data.draw" not in one.options
    assert {trial.seed for trial in study.possible()} == {3, 4}
    assert [trial.prepared for trial in study.tuning()] == [(), (one,), (one,)]


def test_without_peft_and_lr_it_is_what_its_recipe_says(two):
    write_changed(two, "    peft: {class_path: Adapt, init_args: {rank: 4}}\n    lr: 1e-3\n", "")
    (one,) = load_studies(Path("study.yaml"))[0].needed()
    assert one.method == "Other"
    assert one.fit == (
        *"fit --config first.yaml --seed_everything 7 --data.text corpus".split(),
        *("--run", str(ADAPTER.parent)),
    )


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
@pytest.mark.parametrize("verb", ["fit", "export"])
def test_a_study_that_is_killed_on_the_way_goes_on(two, verb):
    """Killed while it is fitted, it goes on with that; killed after, it is not fitted again."""
    two.measure(**measures(sleep=60) if verb == "fit" else measures())
    lines = ["import sys, time, common.compare.stages as stages", "from pathlib import Path"]
    if verb == "export":  # the process dies when adapter and fit are there and nothing else is
        lines += ["stages._refuse_foreign_folders = lambda study, n=[]: n.append(1) or len(n) < 2 or time.sleep(60)"]
    lines += [f"stages.compare(Path('study.yaml'), jobs=2, command=(sys.executable, '-S', {str(FAKE)!r}))"]
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    process = subprocess.Popen([sys.executable, "-c", "\n".join(lines)], env=environment, start_new_session=True)
    awaited = ADAPTER if verb == "export" else ADAPTER.parent / "last.ckpt"
    for _ in range(300):
        time.sleep(0.1)
        if awaited.exists():
            break
    children = [call["process"] for call in two.calls()]
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if verb == "fit":
        os.killpg(children[0], signal.SIGKILL)  # it has a session of its own
    two.forget()
    two.measure(**measures())
    assert two.run() == 0, two.output
    assert [(call["verb"], call["resume"]) for call in two.calls() if call["method"] == "Adapt"] == (
        [("fit", True), ("export", False)] if verb == "fit" else []
    )
    assert "NOT TO BE BELIEVED" not in two.output


def refused(world):
    with pytest.raises(GraftError, match="Results of different commands cannot be mixed") as error:
        world.run()
    return dict(line.removeprefix("- '").split("' ", 1) for line in str(error.value).splitlines()[1:])


def test_a_changed_preparation_invalidates_what_starts_from_it_and_nothing_else(done):
    write_changed(done, "rank: 4", "rank: 8")
    problems = refused(done)
    assert next(iter(problems)) == str(ADAPTER.parent)
    assert {Path(name).name for name in list(problems)[1:]} == TWO
    assert set(list(problems.values())[1:]) == {"started from another 'domain' than the study's."}
    for name in problems:
        shutil.rmtree(name)
    done.forget()
    assert done.run() == 0, done.output
    assert {call["method"] for call in done.calls()} == {"Adapt", "Stack"}
    assert "recipe, Two, 'lr-0.003-seed-1': the test split was read 2 times" in done.output  # which the ledger knows


def test_an_earlier_text_of_its_recipe_and_other_tensors_are_told(done):
    (ADAPTER / "adapter_model.safetensors").write_text("others")
    assert {Path(name).name for name in refused(done)} == TWO
    Path("first.yaml").write_text("model: Another\n")
    assert refused(done)[str(ADAPTER.parent)] == "was made by another command or an earlier text of its recipe."


def test_an_adapter_that_comes_out_otherwise_is_told_before_trials_are_mixed(done):
    shutil.rmtree(ADAPTER.parent)
    shutil.rmtree("runs/small/recipe/Two/lr-0.003-seed-1")
    world = json.loads(Path("world.json").read_text())
    Path("world.json").write_text(json.dumps(world | {"rounding": "another machine's"}))
    done.forget()
    assert {Path(name).name for name in refused(done)} == TWO - {"lr-0.003-seed-1"}
    assert {call["method"] for call in done.calls()} == {"Adapt"}


def test_ledger_and_checks_know_it(done):
    entries = Ledger(done.out).of(done.out / "prepared/domain")
    assert [entry.event for entry in entries] == ["prepare", "export"]
    assert set(entries[-1].digests) == {"val", "data", "adapter"}
    path = ADAPTER.parent / "metrics.json"
    record = json.loads(path.read_text())
    record["val"]["accuracy"] = 0.99
    path.write_text(json.dumps(record))
    assert done.run() == 1
    assert "prepared 'domain': val changed after it was prepared." in done.output


def test_its_cost_stands_beside_the_methods_own(done):
    with (done.out / "results.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert [rows["Two"][f"prepared{key}"] for key in ("", "_seconds")] == ["domain", "67.0"]
    assert float(rows["Two"]["prepared_params_trainable"]) == int(22_056_576 * 0.005)
    assert [rows["LoRA"][f"prepared{key}"] for key in ("", "_seconds", "_params_trainable")] == ["", "", ""]
    words = "Adapt by first.yaml, 700 training examples of OpenClipart, validation accuracy 0.400, "
    words += "110 k trained parameters"
    for name in ("results.md", "report.html"):
        text = (done.out / name).read_text().replace("&#39;", "'")
        assert f"Prepared 'domain': {words}, 67 s. Two starts from it." in text
        assert "It was trained once, with seed 7, whatever their seeds" in text


@pytest.mark.parametrize("verb", ["fit", "export"])
def test_where_it_fails_what_starts_from_it_fails_with_its_words_and_the_rest_goes_on(two, verb):
    two.measure(**measures(fail=[[verb, "Adapt", "0.001", "7"]]))
    assert two.run() == 1
    assert {call["method"] for call in two.calls() if call["verb"] == "test"} == {"LoRA"}
    assert not [call for call in two.calls() if call["method"] == "Stack"]
    report = (two.out / "report.html").read_text()
    told = "prepare" if verb == "fit" else "export"
    assert f"runs/small/recipe/Two/lr-0.001-seed-0: {told} ended with exit code 3" in report


def test_what_no_method_starts_from_is_not_prepared_and_parts_share_what_is(two):
    write_changed(two, "${prepared:domain}", "adapters/other")
    assert load_studies(Path("study.yaml"))[0].needed() == []
    parts = "parts:\n  one: {recipe: recipe.yaml}\n  two: {recipe: recipe.yaml, overrides: {data.name: b}}\n"
    two.write(STUDY.replace("recipe: recipe.yaml\n", "", 1) + parts)
    one, other = (study.needed() for study in load_studies(Path("study.yaml")))
    assert one == other
    assert one[0].folder == ADAPTER.parent


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("prepared:domain}", "prepared:domian}", "'domian' is not prepared. Did you mean 'domain'? Allowed: domain"),
        ("prepared:domain}", "domain}", "has ${domain}, which is not understood: write ${prepared:NAME}"),
        ("data.text: corpus", "data.text: '${prepared:domain}'", "prepare 'domain' has ${prepared:domain}"),
        ("title: Two", "overrides: {model.weights: '${prepared:domain}'}\ntitle: Two", "overrides has ${prepared:"),
        ("    recipe: first.yaml", "    recipe: none.yaml", "recipe of prepare 'domain' is \"none.yaml\""),
        ("    lr: 1e-3", "    lr: [1e-3, 1e-2]", "prepare 'domain' has several values of lr or seed"),
        ("    lr: 1e-3", "    rate: 1e-3", "prepare 'domain' has an unknown key 'rate'"),
        ("    lr: 1e-3", "    lr: 0", "lr of prepare 'domain' is 0"),
        ("    seed: 7", "    seed: -1", "seed of prepare 'domain' is -1"),
        ("data.text: corpus", "model.optim.lr: 1", "prepare 'domain' gives lr and sets 'model.optim.lr' too"),
        ("data.text: corpus", "run: x", "overrides of prepare 'domain' sets 'run'"),
        ("  domain:\n", "  do/main:\n", "prepare 'do/main' cannot name a folder"),
        (
            "{class_path: Adapt, init_args: {rank: 4}}",
            "{rank: 4}",
            "peft of prepare 'domain' has an unknown key 'rank'",
        ),
    ],
)
def test_one_wrong_thing_is_named(two, old, new, words):
    write_changed(two, old, new)
    with pytest.raises(GraftError) as error:
        load_studies(Path("study.yaml"))
    assert words in str(error.value)


def test_a_file_without_prepare_and_a_recipe_of_its_folders_name_are_refused(two):
    start, end = STUDY.index("prepare:"), STUDY.index("methods:")
    two.write(STUDY[:start] + STUDY[end:])
    with pytest.raises(GraftError, match=r"'domain' is not prepared\. The file has no such prepare"):
        load_studies(Path("study.yaml"))
    two.write(STUDY[:start] + "prepare: 3\n" + STUDY[end:])
    with pytest.raises(GraftError, match="prepare is 3: give a mapping"):
        load_studies(Path("study.yaml"))
    Path("prepared.yaml").write_text("{}")
    write_changed(two, "recipe: recipe.yaml", "recipe: prepared.yaml")
    with pytest.raises(GraftError, match="share the folder names"):
        load_studies(Path("study.yaml"))


def test_a_folder_of_unusual_name_is_written_as_it_is(two):
    two.write(STUDY.replace("runs/small", 'runs/a "b" é'))
    study = load_studies(Path("study.yaml"))[0]
    trial = study.tuning()[-1]
    block = json.loads(trial.options[trial.options.index("--peft") + 1])
    assert block["init_args"]["first"] == str(study.needed()[0].adapter)
    assert placed("${prepared:domain}", study.preparations) == str(study.needed()[0].adapter)
