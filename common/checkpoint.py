"""Exact resume: what a run needs to go on as if it had never stopped, and none of the frozen weights.

A checkpoint holds the trained parameters, the buffers that train with them, optimizer, schedule, loop position and
loader position. Random numbers need no storing: each step is seeded from (seed, rank, step). It is written beside its
final name and then moved there, so a kill at any moment leaves the last whole checkpoint.
"""

from __future__ import annotations

import errno
import os
import pickle
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from common.errors import GraftError

LAST = "last.ckpt"


def state_keys(module: nn.Module) -> set[str]:
    """Return the names that a checkpoint of this module holds.

    These are the trainable parameters, the running statistics of norms that are in train mode by policy, which is
    to say of norms whose statistics a training step changes, and the buffers of adapters that ask for it.
    """
    keys = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    for prefix, child in module.named_modules():
        if isinstance(child, _NormBase) and child.track_running_stats and child.training:
            keys |= {f"{prefix}.{name}" for name, _ in child.named_buffers(recurse=False)}
        if getattr(child, "in_checkpoints", False):
            keys |= {f"{prefix}.{name}" for name, _ in child.named_buffers(recurse=False)}
    return keys


def make_room(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Let adapters whose sizes depend on the data that they saw take the sizes of a checkpoint."""
    for prefix, child in module.named_modules():
        if hasattr(type(child), "make_room"):
            cast("Any", child).make_room(f"{prefix}.", state)


def differences(mine: Mapping[str, Any], theirs: Mapping[str, Any], path: str = "") -> list[str]:
    """Word how two nested mappings of plain values differ, one entry a value."""
    found: list[str] = []
    for key in dict.fromkeys((*mine, *theirs)):
        own, other = mine.get(key), theirs.get(key)
        if isinstance(own, dict) and isinstance(other, dict):
            found += differences(own, other, f"{path}{key}.")
        elif own != other:
            found.append(f"{path}{key} is {own!r} here and {other!r} in the checkpoint")
    return found


def check_state(state: Mapping[str, Tensor], module: nn.Module, keys: set[str]) -> None:
    """Refuse a checkpoint whose tensors are not exactly the expected ones.

    Raises:
        GraftError: Missing, unexpected or misshapen tensors, by name.
    """
    own = module.state_dict()
    problems = [f"missing {name}" for name in sorted(keys - set(state))]
    problems += [f"unexpected {name}" for name in sorted(set(state) - keys)]
    problems += [
        f"{name} has shape {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in sorted(keys & set(state))
        if state[name].shape != own[name].shape
    ]
    if problems:
        shown = "; ".join(problems[:3]) + ("; ..." if len(problems) > 3 else "")
        raise GraftError(
            f"The checkpoint does not fit this model ({len(problems)} tensors differ: {shown}). "
            "Use the configuration that the run was started with."
        )


def write_atomically(path: Path, write: Any) -> None:  # noqa: ANN401
    """Write a file beside its final name, flush it to the disk, then move it into place.

    Args:
        path: Final name; an existing file is replaced only by a complete one.
        write: Called with a binary file object.

    Raises:
        GraftError: The disk is full or the folder may not be written; nothing half-written is left.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise _explain_write_error(path, error) from error
    except BaseException:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise


def _explain_write_error(path: Path, error: Exception) -> Exception:
    """Word a failed write; torch covers the operating system's error with a RuntimeError of its own."""
    code = None
    cause: BaseException | None = error
    while cause is not None and code is None:
        code, cause = getattr(cause, "errno", None), cause.__cause__ or cause.__context__
    if code in (errno.ENOSPC, errno.EDQUOT) or "file write failed" in str(error):
        return GraftError(f"The disk is full: {path} could not be written (the old file, if any, is kept). Free space.")
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return GraftError(f"No permission to write {path}. Choose another folder.")
    if code in (errno.ENOTDIR, errno.EEXIST):
        return GraftError(f"{path.parent} is a file, not a folder. Choose another folder.")
    if isinstance(error, OSError):
        return GraftError(f"{path} could not be written: {error.strerror or error}. Choose another place.")
    return error


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint reading and writing, made atomic and free of unpickling."""

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | os.PathLike[str],
        storage_options: Any = None,  # noqa: ANN401
    ) -> None:
        """Write a checkpoint atomically; see `write_atomically`."""
        write_atomically(Path(path), lambda file: torch.save(checkpoint, file))

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Any = "cpu",  # noqa: ANN401
        weights_only: bool | None = True,
    ) -> dict[str, Any]:
        """Read a checkpoint; tensors and plain values only."""
        return read_checkpoint(Path(path))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU without unpickling code.

    Raises:
        GraftError: No such file, or one that is damaged or not a checkpoint.
    """
    if not path.is_file():
        raise GraftError(f"There is no checkpoint at {path}. Start the run first with `graft fit`.")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch writes checksums, but does not compare them
        state = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise GraftError(f"No permission to read {path}. Change its permissions.") from error
    except (zipfile.BadZipFile, RuntimeError, OSError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as error:
        raise _damaged(path) from error
    if damaged:
        raise _damaged(path)
    if not isinstance(state, dict) or "graft" not in state:
        raise GraftError(f"{path} is not a checkpoint of Graft. Give the last.ckpt of a run.")
    return state


def read_finished(folder: Path, steps: int) -> dict[str, Any]:
    """Read a run's checkpoint, which must be the one that its record describes.

    Args:
        folder: The run's folder.
        steps: The steps that the record says were taken.

    Raises:
        GraftError: See `read_checkpoint`; or the run was trained on after its record was written.
    """
    state = read_checkpoint(folder / LAST)
    if state.get("global_step") != steps:
        raise GraftError(
            f"{folder} was trained to step {state.get('global_step')} after its results of step {steps} were written. "
            f"Finish it with `graft fit --run {folder} --resume`."
        )
    return state


def _damaged(path: Path) -> GraftError:
    return GraftError(f"{path} is damaged or not a checkpoint of Graft. Start the run again.")


class LastCheckpoint(L.Callback):
    """Keep one file, `last.ckpt`: at the end of every epoch, and every so many steps within one.

    Args:
        folder: The run's folder.
        every_n_steps: Also save after this many optimizer steps; 0 saves at the end of epochs only.
    """

    def __init__(self, folder: Path, every_n_steps: int = 0) -> None:
        self.path = folder / LAST
        self.every_n_steps = every_n_steps
        self._saved_at = 0

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Save within an epoch, between accumulated batches and not on its last one (the epoch's own save follows)."""
        step = trainer.global_step
        due = self.every_n_steps > 0 and step > self._saved_at and step % self.every_n_steps == 0
        if due and not trainer.is_last_batch and not trainer.fit_loop._should_accumulate():
            self._save(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save behind the epoch's validation."""
        self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        self._saved_at = trainer.global_step
        trainer.save_checkpoint(self.path, weights_only=False)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: where a run saves is no part of its result."""
        return {}
