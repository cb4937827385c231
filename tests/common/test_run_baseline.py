"""A predictor that is not trained, judged as a run is: its record, its metrics, and what its folder refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from common import run as runs
from common.checkpoint import LAST
from common.errors import GraftError
from common.run import METRICS, baseline, fit, read_record, validate
from tests.toy import ToyData, ToyTask, most_frequent, spec_of, untrained


def lora():
    return ToyTask(spec_of("LoRA"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    fit(lora(), ToyData(), folder, max_epochs=1, recipe="x.yaml")
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def labels():
    return [int(y) for _, y in ToyData().test_dataloader().dataset]


def test_a_baselines_record_has_what_a_runs_has(tmp_path, finished):
    folder = tmp_path / "run"
    record = baseline(lora(), ToyData(), folder, "Most", most_frequent, config="a: 1\n", recipe="x.yaml")
    assert record == read_record(folder)
    trained = read_record(finished)
    assert record.keys() == trained.keys() | {"baseline"}
    assert record["cost"].keys() == trained["cost"].keys()
    assert record["environment"] == trained["environment"]
    for part in ("schema", "recipe", "domain", "task", "settings", "facts", "seed", "primary", "status", "data"):
        assert record[part] == trained[part], part
    assert record["method"] == {"class_path": "Most", "init_args": {}}
    assert record["baseline"] is True
    assert (record["backbone"], record["optim"], record["trainer"]) == ("", None, None)
    cost = {name: value for name, value in record["cost"].items() if value}
    assert cost.keys() == {"fit_seconds"}
    assert record["cost"]["params_trainable"] == 0
    assert record["cost"]["train_memory"] is None
    assert (folder / "config.yaml").read_text() == "a: 1\n"
    assert {path.name for path in folder.iterdir()} == {"config.yaml", METRICS, "predictions.jsonl"}


def test_a_baseline_is_measured_by_the_tasks_metrics_without_a_loss(tmp_path):
    record = baseline(lora(), ToyData(), tmp_path / "run", "Most", most_frequent)
    truth, most = labels(), max({0, 1}, key=[int(y) for _, y in ToyData().train_dataloader().dataset].count)
    expected = sum(y == most for y in truth) / len(truth)
    assert record["val"] == record["test"] == {"accuracy": pytest.approx(expected)}
    rows = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert rows == [{"id": str(i), "prediction": most} for i in range(len(truth))]


def test_a_set_for_testing_only_is_not_validated_on(tmp_path):
    class TestOnly(ToyData):
        def records(self, split):
            return range(8 if split == "test" else 0)

        def val_dataloader(self):
            raise GraftError("there is none")

    record = baseline(lora(), TestOnly(), tmp_path / "run", "Most", most_frequent)
    assert record["val"] == {}
    assert record["test"]["accuracy"] == pytest.approx(max(labels().count(y) for y in (0, 1)) / 8)


def test_a_baseline_may_assemble_its_task_and_infer(tmp_path):
    """An untrained network is evaluated as a run of no step would be: in eval mode, on the same batches."""
    task, data = lora(), ToyData()
    record = baseline(task, data, tmp_path / "run", "Untrained", untrained)
    task.eval()
    with torch.no_grad():
        guesses = torch.cat([task(batch).argmax(-1) for batch in data.test_dataloader()])
    assert record["test"]["accuracy"] == pytest.approx(float((guesses == torch.tensor(labels())).float().mean()))
    assert record["backbone"] == "toy"
    assert record["base_digest"] == task.attached.base_digest


def test_what_is_kept_of_an_output_is_the_tasks_to_say(tmp_path):
    class Keeps(ToyTask):
        def keep(self, outputs):
            return outputs.argmax(-1).byte()

        def predictions(self, outputs, data, folder):
            (folder / "predictions").mkdir()
            (folder / "predictions" / "a.txt").write_text("mine")
            return [{"id": str(i), "number": int(x)} for i, x in enumerate(torch.cat(outputs))]

    baseline(Keeps(spec_of("LoRA")), ToyData(), tmp_path / "run", "Most", most_frequent)
    rows = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert {row["number"] for row in rows} <= {0, 1}
    assert (tmp_path / "run" / "predictions" / "a.txt").exists()


@pytest.mark.parametrize("where", ["function", "predictor", "predictions"])
def test_a_baseline_that_fails_leaves_no_results(tmp_path, where):
    def function(task, data):
        if where == "function":
            raise GraftError("no such thing")
        fine = most_frequent(task, data)

        def predict(batch):
            if where == "predictor":
                raise GraftError("no such thing")
            return fine(batch)

        return predict

    class Failing(ToyTask):
        def predictions(self, outputs, data, folder):
            raise GraftError("no such thing")

    task = Failing(spec_of("LoRA")) if where == "predictions" else lora()
    with pytest.raises(GraftError, match="no such thing"):
        baseline(task, ToyData(), tmp_path / "run", "Odd", function, config="a: 1\n")
    assert not list((tmp_path / "run").iterdir())
    baseline(lora(), ToyData(), tmp_path / "run", "Most", most_frequent)


@pytest.mark.parametrize("left", [LAST, METRICS])
def test_a_baseline_takes_no_folder_that_is_in_use(copy, left):
    for path in copy.iterdir():
        if path.name != left:
            path.unlink()
    before = (copy / left).read_bytes()
    with pytest.raises(GraftError, match=r"already holds a run\. Choose another"):
        baseline(lora(), ToyData(), copy, "Most", most_frequent)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == {left: before}


def test_a_baseline_is_not_trained_nor_evaluated_again(tmp_path):
    folder = tmp_path / "run"
    baseline(lora(), ToyData(), folder, "Most", most_frequent)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for verb in (runs.test, validate, lambda *given: fit(*given, resume=True, max_epochs=1)):
        with pytest.raises(GraftError, match="holds the baseline Most"):
            verb(lora(), ToyData(), folder)
    with pytest.raises(GraftError, match="already holds a run"):
        fit(lora(), ToyData(), folder, max_epochs=1)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
