"""A run in a folder: exact resume at any moment, its record, and what it refuses."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch

from common import run as runs
from common.checkpoint import LAST, read_checkpoint
from common.errors import GraftError
from common.run import METRICS, build_trainer, fast_precision, fit, make_folder, read_record, validate
from tests.cases import ON_TOY
from tests.toy import ToyData, ToyTask, spec_of

ROOT = Path(__file__).parents[2]


class Die(L.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            raise RuntimeError("killed")


class Snapshots(L.Callback):
    """Keep every `last.ckpt` that a run writes: a run that is killed goes on from one of them."""

    def __init__(self, run, folder):
        self.run, self.folder, self.seen = run, folder, b""
        folder.mkdir()

    def _keep(self):
        content = (self.run / LAST).read_bytes() if (self.run / LAST).exists() else b""
        if content != self.seen:
            self.seen = content
            (self.folder / f"{len(list(self.folder.iterdir())):02d}.ckpt").write_bytes(content)

    def on_train_batch_start(self, *args):
        self._keep()

    def on_train_end(self, *args):
        self._keep()


def equal(first, second):
    """Whether two nested values are the same, tensors bit for bit."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second


def outcome(run):
    state = read_checkpoint(run / LAST)
    parts = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")
    return {part: state[part] for part in parts} | {"val": read_record(run)["val"]}


# ---- resume --------------------------------------------------------------------------------------------------------

TASKS = {
    "LoRA": lambda: ToyTask(spec_of("LoRA", dropout=0.1, on=["attention", "ffn"])),
    "BitFit": lambda: ToyTask(spec_of("BitFit")),
    "NormTuning": lambda: ToyTask(spec_of("NormTuning")),
    "LastBlocks": lambda: ToyTask(spec_of("LastBlocks")),
    "LinearProbe": lambda: ToyTask(spec_of("LinearProbe")),
    "FullFineTune": lambda: ToyTask(spec_of("FullFineTune")),
    "AdaLoRA": lambda: ToyTask(spec_of("AdaLoRA", warmup=0.0, every=2)),
    "VBLoRA": lambda: ToyTask(spec_of("VBLoRA", dropout=0.1)),
    "VeRA": lambda: ToyTask(spec_of("VeRA", dropout=0.1)),
    "IA3": lambda: ToyTask(spec_of("IA3")),
    "LoRA-pissa": lambda: ToyTask(spec_of("LoRA", init="pissa")),
}


def resumes_exactly(task, folder, size, **options):
    """Run without a break, then go on from everything that the run ever wrote; all must end alike."""
    options = {"max_epochs": 2, "save_every": 1} | options
    fit(
        task(),
        ToyData(size=size),
        folder / "whole",
        callbacks=[Snapshots(folder / "whole", folder / "kept")],
        **options,
    )
    expected = outcome(folder / "whole")
    kept = sorted((folder / "kept").iterdir())
    for snapshot in kept:
        run = folder / snapshot.stem
        run.mkdir()
        shutil.copy(snapshot, run / LAST)
        fit(task(), ToyData(size=size), run, resume=True, **options)
        found = outcome(run)
        differ = [part for part in expected if not equal(expected[part], found[part])]
        assert not differ, f"resumed from {snapshot.name}: {differ} differ"
    return len(kept)


@pytest.mark.parametrize("name", TASKS)
def test_resume_is_bit_exact_with_accumulated_gradients(tmp_path, name):
    """Three batches an epoch, two to a step: saved after step 1, at the epoch's end, after step 3, at the end."""
    assert resumes_exactly(TASKS[name], tmp_path, size=12, accumulate_grad_batches=2) == 4


def test_resume_is_bit_exact_at_every_step(tmp_path):
    assert resumes_exactly(TASKS["LoRA"], tmp_path, size=12) == 2 * 3


def test_resume_is_bit_exact_with_validation_within_the_epoch(tmp_path):
    assert resumes_exactly(TASKS["FullFineTune"], tmp_path, size=16, val_check_interval=2) == 8


def test_resume_is_bit_exact_with_a_limit_of_steps(tmp_path):
    assert resumes_exactly(TASKS["LoRA"], tmp_path, size=12, max_epochs=None, max_steps=5) == 5


def test_a_run_that_dies_goes_on_from_what_it_saved(tmp_path):
    """After one step nothing is saved, after three the second, after five an epoch."""
    options = {"max_epochs": 2, "save_every": 2}
    fit(TASKS["LoRA"](), ToyData(), tmp_path / "whole", **options)
    for step in (1, 3, 6):
        run = tmp_path / f"run{step}"
        with pytest.raises(RuntimeError, match="killed"):
            fit(TASKS["LoRA"](), ToyData(), run, callbacks=[Die(step)], **options)
        assert not (run / METRICS).exists()
        record = fit(TASKS["LoRA"](), ToyData(), run, resume=True, **options)
        assert equal(outcome(run), outcome(tmp_path / "whole"))
        assert record["cost"]["steps"] == 10


SCRIPT = """
import os, signal, sys
import lightning as L
from common.run import fit
from tests.common.test_run import TASKS
from tests.toy import ToyData
class Kill(L.Callback):
    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
fit(TASKS["LoRA"](), ToyData(), sys.argv[1], resume=True, max_epochs=3, save_every=2, callbacks=[Kill()])
"""


@pytest.mark.slow
def test_a_killed_process_goes_on_exactly(tmp_path):
    """SIGKILL at three random steps of one run, each in a process of its own."""
    fit(TASKS["LoRA"](), ToyData(), tmp_path / "whole", max_epochs=3, save_every=2)
    steps = sorted(random.sample(range(1, 15), 3))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = tmp_path / "run"
    for step in (*steps, -1):
        command = [sys.executable, "-c", SCRIPT, str(run), str(step)]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == (0 if step == -1 else -9), f"steps {steps}: {done.stderr[-2000:]}"
        left = {path.name for path in run.iterdir()} if run.exists() else set()
        assert left <= {LAST, METRICS}
    assert equal(outcome(run), outcome(tmp_path / "whole")), f"killed at {steps}"


# ---- a finished run ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    fit(TASKS["LoRA"](), ToyData(), folder, max_epochs=2, config="a: 1\n", recipe="x.yaml")
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def test_the_record_says_what_was_run(finished):
    record = read_record(finished)
    task = TASKS["LoRA"]()
    assert record["schema"] == 1
    assert (record["recipe"], record["domain"], record["task"], record["backbone"]) == (
        "x.yaml",
        "toy",
        "ToyTask",
        "toy",
    )
    assert record["method"] == task.peft.describe()
    assert record["optim"]["lr"] == task.optim.lr
    assert record["primary"] == {"name": "accuracy", "mode": "max"}
    assert record["status"] == "fitted"
    assert record["val"].keys() == {"accuracy", "loss"}
    assert record["test"] is None
    assert record["data"]["train"] == 20
    assert record["environment"]["precision"] == "32-true"
    assert record["trainer"] == {"precision": "32-true", "accumulate_grad_batches": 1}
    assert (finished / "config.yaml").read_text() == "a: 1\n"
    by_role = record["cost"]["params_by_role"].values()
    assert sum(role["trainable"] for role in by_role) == record["cost"]["params_trainable_backbone"]


def test_the_recorded_validation_is_that_of_the_saved_weights(finished):
    assert validate(TASKS["LoRA"](), ToyData(), finished)["val"] == pytest.approx(read_record(finished)["val"])


def test_validate_writes_nothing(copy):
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    validate(TASKS["LoRA"](), ToyData(), copy)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


def test_test_adds_to_the_record_and_writes_predictions(copy):
    before = read_record(copy)
    record = runs.test(TASKS["LoRA"](), ToyData(), copy)
    assert record["test"].keys() == {"accuracy", "loss"}
    assert record == read_record(copy)
    assert {**record, "test": None} == before
    rows = [json.loads(line) for line in (copy / "predictions.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [str(i) for i in range(8)]
    right = [row["prediction"] == int(y) for row, (_, y) in zip(rows, ToyData().test_dataloader().dataset, strict=True)]
    assert record["test"]["accuracy"] == pytest.approx(sum(right) / 8)


def test_testing_with_another_configuration_is_refused(copy):
    with pytest.raises(GraftError, match="belongs to another run: peft"):
        runs.test(ToyTask(spec_of("BitFit")), ToyData(), copy)


def test_going_on_with_a_finished_run_changes_nothing(copy):
    record = runs.test(TASKS["LoRA"](), ToyData(), copy)
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    assert fit(TASKS["LoRA"](), ToyData(), copy, resume=True, max_epochs=2) == record
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


def test_a_run_killed_behind_its_last_checkpoint_still_gets_its_record(copy):
    before = read_record(copy)
    (copy / METRICS).unlink()
    record = fit(TASKS["LoRA"](), ToyData(), copy, resume=True, max_epochs=2, recipe="x.yaml")
    assert record["val"] == before["val"]
    for part in ("steps", "train_memory", "flops_per_step", "params_trainable"):
        assert record["cost"][part] == before["cost"][part]


def test_a_longer_run_forgets_the_results_of_the_shorter(copy):
    runs.test(TASKS["LoRA"](), ToyData(), copy)
    record = fit(TASKS["LoRA"](), ToyData(), copy, resume=True, max_epochs=3)
    assert record["cost"]["steps"] == 15
    assert record["test"] is None


def test_results_of_other_weights_are_refused(copy):
    """A run that was lengthened and killed has a checkpoint that its record does not describe."""
    with pytest.raises(RuntimeError, match="killed"):
        fit(TASKS["LoRA"](), ToyData(), copy, resume=True, max_epochs=3, save_every=1, callbacks=[Die(13)])
    for verb in (runs.test, validate):
        with pytest.raises(GraftError, match=r"trained to step 12 after its results of step 10.*--resume"):
            verb(TASKS["LoRA"](), ToyData(), copy)
    assert fit(TASKS["LoRA"](), ToyData(), copy, resume=True, max_epochs=3)["cost"]["steps"] == 15
    runs.test(TASKS["LoRA"](), ToyData(), copy)


def test_the_record_is_of_the_last_weights_wherever_the_fit_ends(tmp_path):
    """Seven steps end behind the validation of step five."""
    record = fit(TASKS["LoRA"](), ToyData(), tmp_path / "run", max_steps=7)
    assert record["val"] == pytest.approx(validate(TASKS["LoRA"](), ToyData(), tmp_path / "run")["val"])


def test_a_fit_without_validation_has_no_results(tmp_path):
    assert fit(TASKS["LoRA"](), ToyData(), tmp_path / "run", max_epochs=1, limit_val_batches=0)["val"] == {}


# ---- what a run refuses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [LAST, METRICS])
def test_a_folder_in_use_is_refused_without_resume(copy, left):
    for path in copy.iterdir():
        if path.name != left:
            path.unlink()
    with pytest.raises(GraftError, match="already holds a run"):
        fit(TASKS["LoRA"](), ToyData(), copy, max_epochs=2)


def test_resume_of_nothing_starts(tmp_path):
    assert fit(TASKS["LoRA"](), ToyData(), tmp_path / "run", resume=True, max_epochs=1)["cost"]["steps"] == 5


def test_a_refused_resume_leaves_the_runs_configuration(copy):
    with pytest.raises(GraftError, match="another run"):
        fit(ToyTask(spec_of("BitFit")), ToyData(), copy, resume=True, max_epochs=3, config="other: 1\n")
    assert (copy / "config.yaml").read_text() == "a: 1\n"
    fit(TASKS["LoRA"](), ToyData(), copy, resume=True, max_epochs=3, config="longer: 1\n")
    assert (copy / "config.yaml").read_text() == "longer: 1\n"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches is 2 here and 1 in the checkpoint"),
        ({"precision": "bf16-mixed"}, "precision is 'bf16-mixed' here and '32-true' in the checkpoint"),
    ],
)
def test_a_run_goes_on_with_its_own_trainer_only(copy, options, words):
    """Its steps would be others, and it would not end as the uninterrupted run."""
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    with pytest.raises(GraftError, match=words):
        fit(TASKS["LoRA"](), ToyData(), copy, resume=True, config="b: 1\n", **{"max_epochs": 3, **options})
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    if "precision" in options:  # only going on needs the same: evaluating may be done elsewhere
        assert runs.test(TASKS["LoRA"](), ToyData(), copy, **options)["test"]


@pytest.mark.parametrize("verb", [runs.test, validate])
def test_a_run_that_is_not_finished_is_refused(tmp_path, verb):
    with pytest.raises(GraftError, match="not a finished run"):
        verb(TASKS["LoRA"](), ToyData(), tmp_path)


def test_a_folder_that_cannot_be_made_is_refused_before_training(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(GraftError, match="is a file, not a folder"):
        fit(TASKS["LoRA"](), ToyData(), tmp_path / "file" / "run", max_epochs=1)
    make_folder(tmp_path / "a" / "b")
    assert not list((tmp_path / "a" / "b").iterdir())


def test_an_interrupted_run_is_interrupted(tmp_path):
    class Interrupt(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(TASKS["LoRA"](), ToyData(), tmp_path / "run", max_epochs=1, callbacks=[Interrupt()])
    assert not (tmp_path / "run" / METRICS).exists()


# ---- precision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ON_TOY)
def test_every_method_runs_in_mixed_precision(tmp_path, method):
    task = ToyTask(spec_of(method))
    record = fit(task, ToyData(), tmp_path / "run", max_epochs=1, precision="bf16-mixed", limit_train_batches=3)
    assert record["environment"]["precision"] == "bf16-mixed"
    assert all(value == value for value in record["val"].values())  # not NaN
    assert {p.dtype for p in task.parameters()} == {torch.float32}
    state = read_checkpoint(tmp_path / "run" / LAST)["state_dict"]
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert record["cost"]["flops_per_step"] > 0


def test_automatic_precision_is_one_that_the_trainer_takes(tmp_path):
    assert fast_precision() in ("bf16-mixed", "32-true")
    assert build_trainer(tmp_path, precision="auto").precision == fast_precision()


def test_the_trainer_takes_the_users_options_and_keeps_its_own(tmp_path):
    mine = Die(-1)
    trainer = build_trainer(
        tmp_path, callbacks=[mine], max_epochs=3, use_distributed_sampler=True, gradient_clip_val=None
    )
    assert mine in trainer.callbacks
    assert trainer.max_epochs == 3
    assert trainer._accelerator_connector.use_distributed_sampler is False
