"""Loaders whose order and position belong to a run's state, so that a resumed run sees the batches that were due.

The order of an epoch is a pure function of `(seed, epoch)`; augmentation is a pure function of
`(seed, epoch, index)`. A checkpoint therefore stores two numbers, the epoch and the batches already taken, and no RNG
state of a worker.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Generator, Iterator, Mapping, Sized
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch.distributed import is_available
from torch.utils.data import DataLoader, Dataset, Sampler

from common.errors import GraftError


@runtime_checkable
class EpochSeeded(Protocol):
    """A dataset whose augmentation depends on the epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Tell the dataset which epoch its next items belong to."""


def mix_seed(*parts: int) -> int:
    """Mix integers into one 63-bit seed; unlike a sum, (1, 0) and (0, 1) give unrelated seeds."""
    digest = hashlib.blake2b(",".join(str(part) for part in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@contextlib.contextmanager
def item_rng(seed: int, epoch: int, index: int) -> Generator[None]:
    """Draw torch's CPU random numbers from `(seed, epoch, index)` inside the block, and restore the RNG after it."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(mix_seed(seed, epoch, index))  # the CPU's alone, unlike manual_seed
        yield


class EpochBatchSampler(Sampler[list[int]]):
    """Shuffled batches of indices, a pure function of `(seed, epoch)`, split over the ranks of a distributed run.

    Every rank sees the same number of batches: the shuffled order is padded with its own beginning, as
    `torch.utils.data.DistributedSampler` does.
    """

    def __init__(self, size: int, batch_size: int, *, seed: int, drop_last: bool = False) -> None:
        if batch_size < 1:
            raise GraftError(f"batch_size is {batch_size}; it must be at least 1.")
        if size < 1:
            raise GraftError("The training split is empty; give at least one training example.")
        self.size, self.batch_size, self.seed, self.drop_last = size, batch_size, seed, drop_last
        self.epoch = 0
        self.rank, self.world = _place()

    @property
    def sampler(self) -> EpochBatchSampler:
        """This sampler again: Lightning announces each epoch to `loader.batch_sampler.sampler` and nowhere else."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration yields."""
        self.epoch = epoch

    def __len__(self) -> int:
        share = -(-self.size // self.world)
        full, rest = divmod(share, self.batch_size)
        return full if self.drop_last and full else full + bool(rest)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(mix_seed(self.seed, self.epoch))
        order = cast("list[int]", torch.randperm(self.size, generator=generator).tolist())
        padded = self.size + -self.size % self.world
        order = (order * -(-padded // self.size))[:padded]
        mine = order[self.rank :: self.world]
        for batch in range(len(self)):
            yield mine[batch * self.batch_size : (batch + 1) * self.batch_size]


def _place() -> tuple[int, int]:
    """Return this process's rank and the number of processes."""
    if is_available():
        from torch.distributed import get_rank, get_world_size, is_initialized

        if is_initialized():
            return get_rank(), get_world_size()
    return 0, 1


class StatefulLoader(DataLoader[Any]):
    """A `DataLoader` that can say and restore where in the epoch it stands.

    Lightning stores `state_dict()` in every checkpoint because this class has the stateful protocol.
    """

    def __init__(self, dataset: Dataset[Any], sampler: EpochBatchSampler, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(dataset, batch_sampler=sampler, **kwargs)
        self.epochs = sampler
        self._options = kwargs
        self._taken = 0
        self._resume: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # ty: ignore[incompatible-method-override]
        # A generator on purpose: Lightning asks for the iterator before it announces the epoch, and nothing here may
        # run before the first batch is asked for.
        dataset = self.dataset
        if isinstance(dataset, EpochSeeded):
            dataset.set_epoch(self.epochs.epoch)
        # A position belongs to its epoch: one stored at an epoch's end says nothing about the next.
        resume, self._resume = self._resume, None
        skip = resume["taken"] if resume and resume["epoch"] == self.epochs.epoch else 0
        self._taken = skip
        remaining = _Skipping(self.epochs, skip)
        for batch in DataLoader(dataset, batch_sampler=remaining, **self._options):
            self._taken += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, the batches taken in it, and what the order depends on."""
        return {"epoch": self.epochs.epoch, "taken": self._taken, **self._identity()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue behind the batches that `state` says were taken.

        Raises:
            GraftError: The loader differs (data size, batch size, seed or number of processes), so that the order
                would be another one.
        """
        self.check(state)
        self.epochs.set_epoch(state["epoch"])
        self._resume = {"epoch": state["epoch"], "taken": state["taken"]}

    def check(self, state: Mapping[str, int]) -> None:
        """Refuse the state of a loader whose order is another; `load_state_dict` says when."""
        mine = self._identity()
        wrong = [f"{key} was {state.get(key)} and is {value}" for key, value in mine.items() if state.get(key) != value]
        if wrong:
            raise GraftError(f"This checkpoint cannot resume: {'; '.join(wrong)}. Use the run's own configuration.")

    def _identity(self) -> dict[str, int]:
        sampler = self.epochs
        return {
            "size": sampler.size,
            "batch_size": sampler.batch_size,
            "seed": sampler.seed,
            "world": sampler.world,
            "drop_last": int(sampler.drop_last),
        }


class _Skipping(Sampler[list[int]]):
    """The batches of a sampler without the first `skip`; nothing is loaded to be thrown away."""

    def __init__(self, inner: EpochBatchSampler, skip: int) -> None:
        self.inner, self.skip = inner, skip

    def __len__(self) -> int:
        return len(self.inner) - self.skip

    def __iter__(self) -> Iterator[list[int]]:
        for position, batch in enumerate(self.inner):
            if position >= self.skip:
                yield batch


def train_loader(
    dataset: Dataset[Any],
    batch_size: int,
    *,
    seed: int,
    num_workers: int = 0,
    drop_last: bool = False,
    **kwargs: Any,  # noqa: ANN401
) -> StatefulLoader:
    """Build a shuffled, resumable loader.

    Args:
        dataset: A sized, map-style dataset; if it has `set_epoch`, it is told the epoch before each pass.
        batch_size: Examples per process and step.
        seed: Seed of the order.
        num_workers: Worker processes; 0 loads in the main process.
        drop_last: Leave out a last, smaller batch (never the only one).
        **kwargs: Passed on to `torch.utils.data.DataLoader` (`collate_fn`, `pin_memory`).
    """
    sampler = EpochBatchSampler(len(cast("Sized", dataset)), batch_size, seed=seed, drop_last=drop_last)
    return StatefulLoader(dataset, sampler, num_workers=num_workers, **kwargs)


def eval_loader(
    dataset: Dataset[Any],
    batch_size: int,
    *,
    num_workers: int = 0,
    **kwargs: Any,  # noqa: ANN401
) -> DataLoader[Any]:
    """Build a loader that takes every example once, in order."""
    return DataLoader(dataset, batch_size=batch_size, shuffle=False, num_workers=num_workers, **kwargs)
