"""What a checkpoint holds, what it refuses, and that a failed write leaves the old one."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from common.checkpoint import (
    LAST,
    AtomicCheckpointIO,
    check_state,
    read_checkpoint,
    state_keys,
    write_atomically,
)
from common.errors import GraftError
from common.run import fit
from common.task import OptimSpec as Spec
from common.tuners._base import Kept
from tests.cases import ON_TOY
from tests.toy import Facts, ToyData, ToyTask, spec_of, toy_backbone

STATISTICS = {"input_norm.running_mean", "input_norm.running_var", "input_norm.num_batches_tracked"}


# ---- what it holds -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "lora"
    fit(ToyTask(spec_of("LoRA")), ToyData(), folder, max_epochs=1)
    return folder


@pytest.mark.parametrize("method", ON_TOY)
def test_the_expected_state_is_what_training_changes(method):
    task = ToyTask(spec_of(method))
    task.facts = Facts()
    task.assemble()
    keys = task._state_keys()
    trained = {name for name, p in task.named_parameters() if p.requires_grad}
    extra = {f"backbone.{name}" for name in STATISTICS} if method == "FullFineTune" else set()
    kept = (module.named_buffers(prefix=name) for name, module in task.named_modules() if isinstance(module, Kept))
    extra |= {name for buffers in kept for name, _ in buffers}
    assert keys == trained | extra
    assert {"head.weight", "head.bias"} <= keys
    assert keys <= task.state_dict().keys()


def test_a_checkpoint_holds_no_frozen_weight(run):
    state = read_checkpoint(run / LAST)["state_dict"]
    frozen = {f"backbone.base_model.model.{name}" for name in toy_backbone().state_dict()}
    assert not frozen & state.keys()
    assert not any(".base_layer." in name for name in state)
    adapter = {name for name in state if name.startswith("backbone.")}
    assert all(".lora_A." in name or ".lora_B." in name for name in adapter)
    assert state.keys() - adapter == {"head.weight", "head.bias"}
    assert (run / LAST).stat().st_size < 60_000


def test_a_checkpoint_says_what_it_belongs_to(run):
    identity = read_checkpoint(run / LAST)["graft"]
    task = ToyTask(spec_of("LoRA"))
    task.facts = Facts()
    task.assemble()
    assert identity == {**task.identity(), "data": {"name": "toy", "digest": "none"}}
    assert identity["peft"]["class_path"] == "LoRA"


def test_norms_of_the_head_train_their_statistics():
    head = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False))
    statistics = {"0.running_mean", "0.running_var", "0.num_batches_tracked"}
    parameters = {name for name, _ in head.named_parameters()}
    assert state_keys(head.train()) == parameters | statistics
    assert state_keys(head.eval()) == parameters
    assert state_keys(head.train().requires_grad_(False)) == statistics


# ---- what does not fit ---------------------------------------------------------------------------------------------


def test_missing_unexpected_and_misshapen_tensors_are_all_named():
    net = nn.Linear(2, 3)
    keys = set(net.state_dict())
    check_state(net.state_dict(), net, keys)
    with pytest.raises(GraftError, match=r"1 tensors differ: missing bias\)"):
        check_state({"weight": net.weight}, net, keys)
    with pytest.raises(GraftError, match="unexpected extra"):
        check_state({**net.state_dict(), "extra": torch.zeros(1)}, net, keys)
    with pytest.raises(GraftError, match=r"weight has shape \(3, 5\) instead of \(3, 2\)"):
        check_state({"weight": torch.zeros(3, 5), "bias": net.bias}, net, keys)
    with pytest.raises(GraftError, match=r"2 tensors differ: missing bias; unexpected extra"):
        check_state({"weight": net.weight, "extra": net.bias}, net, keys)


def test_many_differences_are_counted_and_three_are_shown():
    with pytest.raises(GraftError, match=r"5 tensors differ: missing k0; missing k1; missing k2; \.\.\.\)"):
        check_state({}, nn.Linear(1, 1), {f"k{i}" for i in range(5)})


def edited(run, folder, change):
    """Copy a run's checkpoint with a change, and return the folder."""
    state = torch.load(run / LAST, weights_only=True)
    change(state)
    folder.mkdir()
    torch.save(state, folder / LAST)
    return folder


def resume(folder, task=None, data=None, **options):
    return fit(task or ToyTask(spec_of("LoRA")), data or ToyData(), folder, resume=True, max_epochs=2, **options)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state["state_dict"].pop("head.bias"), r"missing head\.bias"),
        (lambda state: state["state_dict"].update(more=torch.zeros(1)), "unexpected more"),
        (lambda state: state["state_dict"].update({"head.bias": torch.zeros(9)}), r"head\.bias has shape \(9,\)"),
        (lambda state: state["state_dict"].clear(), "tensors differ"),
        (lambda state: state["graft"].pop("seed"), "seed is 0 here and None in the checkpoint"),
    ],
)
def test_a_checkpoint_with_other_tensors_is_refused(run, tmp_path, change, words):
    with pytest.raises(GraftError, match=words):
        resume(edited(run, tmp_path / "run", change))


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (lambda: ToyTask(spec_of("BitFit")), r"peft.class_path is 'BitFit' here and 'LoRA'"),
        (lambda: ToyTask(spec_of("LoRA", rank=4)), r"peft.init_args.rank is 4 here and 2"),
        (lambda: ToyTask(spec_of("LoRA"), base_seed=1), r"settings.base_seed is 1 here and 0.*base_digest is"),
        (lambda: ToyTask(spec_of("LoRA"), seed=1), "seed is 1 here and 0 in the checkpoint"),
        (lambda: ToyTask(spec_of("LoRA"), optim=Spec(lr=0.5)), r"optim.lr is 0\.5 here and"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_by_name(run, tmp_path, task, words):
    with pytest.raises(GraftError, match=words):
        resume(edited(run, tmp_path / "run", lambda state: None), task())


def test_other_base_weights_under_the_same_name_are_refused(run, tmp_path):
    class Task(ToyTask):
        def build_backbone(self):
            built = super().build_backbone()
            with torch.no_grad():
                built.model.embed.weight[0, 0] += 1e-6
            return built

    Task.__name__ = "ToyTask"
    with pytest.raises(GraftError, match="another run: base_digest is"):
        resume(edited(run, tmp_path / "run", lambda state: None), Task(spec_of("LoRA")))


@pytest.mark.parametrize(("data", "words"), [({"batch_size": 5}, "batch_size was 4"), ({"size": 24}, "size was 20")])
def test_other_data_is_refused(run, tmp_path, data, words):
    with pytest.raises(GraftError, match=words):
        resume(edited(run, tmp_path / "run", lambda state: None), data=ToyData(**data))


def test_a_refused_checkpoint_stays_as_it_was(run, tmp_path):
    folder = edited(run, tmp_path / "run", lambda state: None)
    before = (folder / LAST).read_bytes()
    with pytest.raises(GraftError):
        resume(folder, ToyTask(spec_of("BitFit")))
    assert (folder / LAST).read_bytes() == before


# ---- reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_checkpoint_is_refused(run, tmp_path, share):
    whole = (run / LAST).read_bytes()
    (tmp_path / LAST).write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(GraftError, match="damaged or not a checkpoint"):
        read_checkpoint(tmp_path / LAST)
    with pytest.raises(GraftError, match="damaged"):
        resume(tmp_path)


def test_a_byte_that_changed_on_the_disk_is_never_read_as_a_weight(run, tmp_path):
    """Torch writes checksums and does not compare them; a flipped bit would train on in silence."""
    whole, expected = (run / LAST).read_bytes(), read_checkpoint(run / LAST)["state_dict"]
    positions = torch.randint(len(whole), (60,), generator=torch.Generator().manual_seed(0)).tolist()
    refused = 0
    for position in positions:
        changed = bytearray(whole)
        changed[position] ^= 0x10
        (tmp_path / LAST).write_bytes(changed)
        try:
            state = read_checkpoint(tmp_path / LAST)["state_dict"]
        except GraftError:
            refused += 1
        else:  # padding between the members
            assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert refused > 30


class Payload:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


@pytest.mark.parametrize("kind", ["text", "pickle", "torch"])
def test_files_that_are_no_checkpoint_are_refused_and_nothing_is_run(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / LAST
    if kind == "text":
        path.write_text("weights")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Payload()))
    else:
        torch.save({"graft": {}, "state_dict": Payload()}, path)
    with pytest.raises(GraftError, match="damaged or not a checkpoint"):
        read_checkpoint(path)
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("content", [{"state_dict": {}}, [1, 2], torch.zeros(2)])
def test_checkpoints_of_others_are_refused(tmp_path, content):
    torch.save(content, tmp_path / LAST)
    with pytest.raises(GraftError, match="is not a checkpoint of Graft"):
        read_checkpoint(tmp_path / LAST)


def test_no_file_is_said_so(tmp_path):
    with pytest.raises(GraftError, match="no checkpoint at"):
        read_checkpoint(tmp_path / LAST)


# ---- writing -------------------------------------------------------------------------------------------------------


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


@pytest.fixture
def old(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    return path


def test_a_write_replaces_the_file_and_makes_its_folder(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    for content in (b"first", b"second"):
        write_atomically(path, lambda file, content=content: file.write(content))
        assert path.read_bytes() == content
    assert names(path.parent) == ["file"]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("error", [KeyError("x"), KeyboardInterrupt(), RuntimeError("other")])
def test_a_write_that_fails_half_way_leaves_the_old_file_and_no_other(old, error):
    def write(file):
        file.write(b"half")
        file.flush()
        raise error

    with pytest.raises(type(error)):
        write_atomically(old, write)
    assert old.read_bytes() == b"old"
    assert names(old.parent) == ["file"]


class FullDisk:
    """A file that holds so many bytes and no more."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 100, 700, 5_000])
def test_a_full_disk_under_torch_save_is_one_line(old, room):
    """Torch's writer answers a failed write with an error of its own; the system's is only in its context."""
    state = {f"k{i}": torch.zeros(500) for i in range(5)}
    with pytest.raises(GraftError, match=r"The disk is full: .*file could not be written.*Free space"):
        write_atomically(old, lambda file: torch.save(state, FullDisk(file, room)))
    assert old.read_bytes() == b"old"
    assert names(old.parent) == ["file"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "disk is full"),
        (RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"), "disk is full"),
        (PermissionError(errno.EACCES, "Permission denied"), "No permission to write"),
        (OSError(errno.EROFS, "Read-only file system"), "No permission to write"),
        (OSError(errno.EIO, "Input/output error"), "could not be written: Input/output error"),
    ],
)
def test_errors_of_the_system_are_one_line(old, error, words):
    def write(file):
        raise error

    with pytest.raises(GraftError, match=words) as caught:
        write_atomically(old, write)
    assert "\n" not in str(caught.value)
    assert str(old) in str(caught.value)
    assert names(old.parent) == ["file"]


def test_a_folder_that_may_not_be_written_is_one_line(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", refuse)
    with pytest.raises(GraftError, match=r"No permission to write .*another folder"):
        write_atomically(tmp_path / "file", lambda file: None)


def test_a_file_in_the_folders_place_is_one_line(old):
    with pytest.raises(GraftError, match=r"file is a file, not a folder"):
        write_atomically(old / "deeper", lambda file: None)


def test_the_disk_fills_up_in_the_middle_of_a_run(tmp_path, monkeypatch):
    """The run stops with one line, and what it saved before is whole."""
    save, calls = torch.save, []

    def full_at_the_second(state, file):
        calls.append(1)
        save(state, FullDisk(file, 2_000) if len(calls) == 2 else file)

    monkeypatch.setattr(torch, "save", full_at_the_second)
    with pytest.raises(GraftError, match="disk is full"):
        fit(ToyTask(spec_of("LoRA")), ToyData(), tmp_path / "run", max_epochs=2)
    assert names(tmp_path / "run") == [LAST]
    assert read_checkpoint(tmp_path / "run" / LAST)["epoch"] == 0


def test_lightnings_plugin_writes_and_reads_the_same(tmp_path):
    io = AtomicCheckpointIO()
    content = {"graft": {"a": 1}, "state_dict": {"x": torch.arange(3)}}
    io.save_checkpoint(content, tmp_path / LAST)
    read = io.load_checkpoint(tmp_path / LAST, map_location=torch.device("meta"))
    assert read["state_dict"]["x"].tolist() == [0, 1, 2]
    assert names(tmp_path) == [LAST]
