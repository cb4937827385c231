"""Loaders whose order and position belong to a run's state, so that a resumed run sees the batches that were due.

The order of an epoch is a pure function of `(seed, epoch)`; augmentation is a pure function of
`(seed, epoch, index)`. A checkpoint therefore stores two numbers, the epoch and the batches already taken, and no RNG
state of a worker.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence, Sized
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


class EpochSampler(Sampler[list[int]]):
    """Batches of indices, a pure function of `(seed, epoch)`, split over the ranks of a distributed run.

    Subclasses give every rank the same number of batches, and the same number in every epoch, so that a schedule
    knows its end.
    """

    def __init__(self, size: int, *, seed: int) -> None:
        if size < 1:
            raise GraftError("The training split is empty; give at least one training example.")
        self.size, self.seed = size, seed
        self.epoch = 0
        self.rank, self.world = _place()

    @property
    def sampler(self) -> EpochSampler:
        """This sampler again: Lightning announces each epoch to `loader.batch_sampler.sampler` and nowhere else."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration yields."""
        self.epoch = epoch

    def identity(self) -> dict[str, int]:
        """Return all that the order depends on besides the epoch."""
        return {"size": self.size, "seed": self.seed, "world": self.world}

    def __len__(self) -> int:
        raise NotImplementedError

    def _shuffled(self, count: int, *purpose: int) -> list[int]:
        """Shuffle `range(count)` by the seed, the epoch and what it is for."""
        generator = torch.Generator().manual_seed(mix_seed(self.seed, self.epoch, *purpose))
        return cast("list[int]", torch.randperm(count, generator=generator).tolist())

    def _share(self, order: list[int]) -> list[int]:
        """Take this rank's part of an order, which is padded with its own beginning until all ranks get as many."""
        padded = len(order) + -len(order) % self.world
        return (order * -(-padded // len(order)))[:padded][self.rank :: self.world]


class EpochBatchSampler(EpochSampler):
    """Shuffled batches of one size; the shuffled order is shared out as `torch.utils.data.DistributedSampler` does."""

    def __init__(self, size: int, batch_size: int, *, seed: int, drop_last: bool = False) -> None:
        if batch_size < 1:
            raise GraftError(f"batch_size is {batch_size}; it must be at least 1.")
        super().__init__(size, seed=seed)
        self.batch_size, self.drop_last = batch_size, drop_last

    def identity(self) -> dict[str, int]:
        """Return all that the order depends on besides the epoch."""
        return {**super().identity(), "batch_size": self.batch_size, "drop_last": int(self.drop_last)}

    def __len__(self) -> int:
        share = -(-self.size // self.world)
        full, rest = divmod(share, self.batch_size)
        return full if self.drop_last and full else full + bool(rest)

    def __iter__(self) -> Iterator[list[int]]:
        mine = self._share(self._shuffled(self.size))
        for batch in range(len(self)):
            yield mine[batch * self.batch_size : (batch + 1) * self.batch_size]


class BucketBatchSampler(EpochSampler):
    """Shuffled batches of examples of about one length, each of at most so many tokens, padding included.

    Lengths are rounded up to bounds an eighth of an octave apart (at least 8). Each epoch shuffles the examples within
    a bound, walks through them from short to long, closes a batch when another example would break the budget, and
    shuffles the batches. The budget holds for the bounds, so how many batches there are depends on the lengths alone,
    and each epoch puts other examples of a bound together.

    Batches differ in their number of examples; a loss that averages over a batch weighs long examples more. Ranks share
    out whole batches, padded with the first ones of the epoch.

    Args:
        lengths: Tokens of each example.
        tokens_per_batch: Most tokens in a batch: its longest example times its number of examples.
        seed: Seed of the order.

    Raises:
        GraftError: There are no examples, or one is longer than a batch may be.
    """

    def __init__(self, lengths: Sequence[int], tokens_per_batch: int, *, seed: int) -> None:
        super().__init__(len(lengths), seed=seed)
        self.tokens_per_batch = _checked_budget(lengths, tokens_per_batch)
        self._lengths = mix_seed(*lengths)
        self._bounds = [min(_bound(length), tokens_per_batch) for length in lengths]
        self._sizes = [len(batch) for batch in _cut(sorted(self._bounds), tokens_per_batch)]

    def identity(self) -> dict[str, int]:
        """Return all that the order depends on besides the epoch."""
        return {**super().identity(), "tokens_per_batch": self.tokens_per_batch, "lengths": self._lengths}

    def __len__(self) -> int:
        return -(-len(self._sizes) // self.world)

    def __iter__(self) -> Iterator[list[int]]:
        # A stable sort of a shuffled order shuffles within each bound.
        order = sorted(self._shuffled(self.size), key=self._bounds.__getitem__)
        ends = list(itertools.accumulate(self._sizes))
        for number in self._share(self._shuffled(len(ends), 1)):
            yield order[ends[number] - self._sizes[number] : ends[number]]


def _checked_budget(lengths: Sequence[int], tokens_per_batch: int) -> int:
    """Refuse a budget that the longest example breaks."""
    if max(lengths, default=1) > tokens_per_batch:
        raise GraftError(
            f"tokens_per_batch is {tokens_per_batch}, the longest example has {max(lengths)} tokens: raise it to at "
            "least that, or shorten the examples."
        )
    return tokens_per_batch


def _bound(length: int) -> int:
    step = max(8, (1 << max(length, 1).bit_length()) // 16)
    return -(-length // step) * step


def _cut(lengths: Sequence[int], tokens_per_batch: int) -> list[range]:
    """Cut ascending lengths into runs whose last length times their size keeps to the budget."""
    runs: list[range] = []
    start = 0
    for position, length in enumerate(lengths):
        if (position - start + 1) * length > tokens_per_batch:
            runs.append(range(start, position))
            start = position
    return [*runs, range(start, len(lengths))]


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

    def __init__(self, dataset: Dataset[Any], sampler: EpochSampler, **kwargs: Any) -> None:  # noqa: ANN401
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
        return {"epoch": self.epochs.epoch, "taken": self._taken, **self.epochs.identity()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue behind the batches that `state` says were taken.

        Raises:
            GraftError: The loader differs (data size, size of batches, seed or number of processes), so that the
                order would be another one.
        """
        self.check(state)
        self.epochs.set_epoch(state["epoch"])
        self._resume = {"epoch": state["epoch"], "taken": state["taken"]}

    def check(self, state: Mapping[str, int]) -> None:
        """Refuse the state of a loader whose order is another; `load_state_dict` says when."""
        mine = self.epochs.identity()
        wrong = [f"{key} was {state.get(key)} and is {value}" for key, value in mine.items() if state.get(key) != value]
        if wrong:
            raise GraftError(f"This checkpoint cannot resume: {'; '.join(wrong)}. Use the run's own configuration.")


def first_batches(loader: DataLoader[Any], count: int, *, singly: bool = False) -> Iterator[Any]:
    """Yield a loader's first batches.

    Args:
        loader: A loader of batches at its start; a `StatefulLoader` shall not have been iterated.
        count: How many batches, if there are as many.
        singly: Yield each of their examples as a batch of one.
    """
    if not singly:
        yield from itertools.islice(loader, count)
        return
    dataset = loader.dataset
    if isinstance(dataset, EpochSeeded):
        dataset.set_epoch(0)
    batches = cast("Iterable[list[int]]", loader.batch_sampler)
    order = [[index] for batch in itertools.islice(batches, count) for index in batch]
    yield from DataLoader(dataset, batch_sampler=order, collate_fn=loader.collate_fn, num_workers=loader.num_workers)


class _Skipping(Sampler[list[int]]):
    """The batches of a sampler without the first `skip`; nothing is loaded to be thrown away."""

    def __init__(self, inner: EpochSampler, skip: int) -> None:
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


def bucketed_loader(
    dataset: Dataset[Any],
    lengths: Sequence[int],
    tokens_per_batch: int,
    *,
    seed: int,
    num_workers: int = 0,
    **kwargs: Any,  # noqa: ANN401
) -> StatefulLoader:
    """Build a shuffled, resumable loader of batches of about one length; see `BucketBatchSampler`.

    Args:
        dataset: A sized, map-style dataset; if it has `set_epoch`, it is told the epoch before each pass.
        lengths: Tokens of each of its examples.
        tokens_per_batch: Most tokens per process and step, padding included.
        seed: Seed of the order.
        num_workers: Worker processes; 0 loads in the main process.
        **kwargs: Passed on to `torch.utils.data.DataLoader` (`collate_fn`, `pin_memory`).
    """
    sampler = BucketBatchSampler(lengths, tokens_per_batch, seed=seed)
    return StatefulLoader(dataset, sampler, num_workers=num_workers, **kwargs)


def bucketed_eval_loader(
    dataset: Dataset[Any],
    lengths: Sequence[int],
    tokens_per_batch: int,
    *,
    num_workers: int = 0,
    **kwargs: Any,  # noqa: ANN401
) -> DataLoader[Any]:
    """Build a loader that takes every example once, from short to long, in batches of at most so many tokens."""
    _checked_budget(lengths, tokens_per_batch)
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    runs = _cut([lengths[index] for index in order], tokens_per_batch) if order else []
    batches = [[order[position] for position in run] for run in runs]
    return DataLoader(dataset, batch_sampler=batches, num_workers=num_workers, **kwargs)


def eval_loader(
    dataset: Dataset[Any],
    batch_size: int,
    *,
    num_workers: int = 0,
    **kwargs: Any,  # noqa: ANN401
) -> DataLoader[Any]:
    """Build a loader that takes every example once, in order."""
    return DataLoader(dataset, batch_size=batch_size, shuffle=False, num_workers=num_workers, **kwargs)
