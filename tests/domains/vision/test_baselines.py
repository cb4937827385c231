"""`graft baseline` on images: a predictor that is not trained, judged as a run is."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.domains.vision.conftest import write_recipe


@pytest.fixture
def uneven(settings, pictures, tmp_path):
    """A recipe whose folders give the splits; of the training pictures most are dogs."""
    root = tmp_path / "pets"
    kept = {"train": {"cat": 2, "dog": 6, "elk": 2}, "val": {"cat": 2, "dog": 1, "elk": 1}}
    kept["test"] = {"cat": 1, "dog": 2, "elk": 1}
    for split, counts in kept.items():
        first = {"train": 0, "val": 6, "test": 8}[split]
        for label, count in counts.items():
            (root / split / label).mkdir(parents=True)
            for number in range(first, first + count):
                shutil.copy(pictures / label / f"{number}.png", root / split / label)
    data = settings["data"]["init_args"]
    data["root"] = str(root)
    del data["val_fraction"], data["test_fraction"]
    return write_recipe(tmp_path / "recipe.yaml", settings)


def test_the_majority_class_is_predicted_with_its_share(graft, uneven, tmp_path):
    run = tmp_path / "run"
    outcome = graft.done("baseline", "MajorityClass", "--config", uneven, "--run", run, "--seed_everything", "3")
    assert outcome.err == ""
    record = json.loads((run / "metrics.json").read_text())
    assert outcome.out.splitlines()[:2] == [
        f"{run}: {stage}  " + "  ".join(f"{name} {value:.4f}" for name, value in record[stage].items())
        for stage in ("val", "test")
    ]
    assert (record["method"]["class_path"], record["baseline"], record["seed"]) == ("MajorityClass", True, 3)
    assert record["recipe"] == str(uneven)
    assert record["val"].keys() == record["test"].keys() == {"accuracy", "macro_f1", "ece"}
    assert (record["val"]["accuracy"], record["test"]["accuracy"]) == (0.25, 0.5)
    # One class has F1 = 2 * 0.5 * 1 / (0.5 + 1), the two others none; all confidence is 6 of 10.
    assert record["test"]["macro_f1"] == pytest.approx((2 / 3) / 3)
    assert record["test"]["ece"] == pytest.approx(0.6 - 0.5)
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert [(row["label"], row["prediction"], row["probability"]) for row in rows] == [
        (label, "dog", 0.6) for label in ("cat", "dog", "dog", "elk")
    ]


def test_the_saved_configuration_repeats_the_baseline(graft, uneven, tmp_path):
    graft.done("baseline", "MajorityClass", "--config", uneven, "--run", tmp_path / "run", "--data.shots", "2")
    graft.done("baseline", "MajorityClass", "--config", tmp_path / "run" / "config.yaml", "--run", tmp_path / "again")
    first, second = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("run", "again"))
    assert first["test"] == second["test"]
    # With as many pictures of each class the first is predicted.
    assert first["test"]["accuracy"] == 0.25


def test_a_folder_of_its_own_is_named_after_recipe_and_baseline(graft, uneven, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    graft.done("baseline", "MajorityClass", "--config", uneven)
    assert (tmp_path / "runs" / "recipe-MajorityClass" / "metrics.json").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("MajorityClas", "Unknown baseline of domain vision 'MajorityClas'. Did you mean 'MajorityClass'? Allowed: "),
        ("MajorityClass --resume", "A baseline runs in one go and cannot be resumed. Leave --resume out."),
        ("MajorityClass --data.rot x", "'rot' is no setting of ImageFolder. Did you mean 'root'?"),
        ("MajorityClass --data.root /nowhere", "There is no folder '/nowhere': "),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_results(graft, recipe, tmp_path, argv, message):
    run, (name, *options) = tmp_path / "run", argv.split()
    assert graft.refused("baseline", name, "--config", recipe, "--run", run, *options).startswith(message)
    assert not run.exists() or not list(run.iterdir())


def test_the_verbs_of_trained_runs_refuse_a_baseline(graft, recipe, tmp_path):
    run = tmp_path / "run"
    argv = ("baseline", "MajorityClass", "--config", recipe, "--run", run)
    graft.done(*argv)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert graft.refused(*argv).endswith("already holds a run. Choose another --run folder, or remove that one first.")
    for other in (
        ("test", "--run", run),
        ("validate", "--run", run),
        ("export", run, tmp_path / "out"),
        ("fit", "--run", run, "--resume"),
    ):
        assert "holds the baseline MajorityClass: its results are complete" in graft.refused(*other)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_a_baseline_takes_no_folder_of_a_run(graft, recipe, finished):
    assert "already holds a run" in graft.refused("baseline", "MajorityClass", "--config", recipe, "--run", finished)


@pytest.mark.parametrize("argv", [["--help"], ["MajorityClass", "--help"]])
def test_help_is_given_with_and_without_a_name(graft, argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        graft("baseline", *argv)
    assert stopped.value.code == 0
    assert "usage: graft baseline" in capsys.readouterr().out
