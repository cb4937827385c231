"""The order of batches: complete, different each epoch, resumable from any position, split over ranks."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset

from common.errors import GraftError
from common.loading import (
    BucketBatchSampler,
    EpochBatchSampler,
    StatefulLoader,
    bucketed_eval_loader,
    bucketed_loader,
    eval_loader,
    item_rng,
    mix_seed,
    train_loader,
)

SIZES = st.integers(1, 60)
BATCHES = st.integers(1, 17)


class Numbers(Dataset):
    """Items are (index, epoch, a draw), so that a batch shows everything that it depends on."""

    def __init__(self, size, seed=3):
        self.size, self.seed, self.epoch = size, seed, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        with item_rng(self.seed, self.epoch, index):
            return torch.tensor([index, self.epoch]), torch.rand(2)


def collect(loader):
    return [(pairs.tolist(), draws.tolist()) for pairs, draws in loader]


def sampler_of(size, batch_size, *, epoch=0, rank=0, world=1, **kwargs):
    sampler = EpochBatchSampler(size, batch_size, seed=5, **kwargs)
    sampler.rank, sampler.world = rank, world
    sampler.set_epoch(epoch)
    return sampler


@settings(deadline=None)
@given(size=SIZES, batch_size=BATCHES, epoch=st.integers(0, 1000))
def test_each_epoch_takes_every_index_once(size, batch_size, epoch):
    sampler = sampler_of(size, batch_size, epoch=epoch)
    batches = list(sampler)
    assert sorted(i for batch in batches for i in batch) == list(range(size))
    assert len(batches) == len(sampler) == -(-size // batch_size)
    assert all(len(batch) == batch_size for batch in batches[:-1])


@settings(deadline=None)
@given(size=SIZES, batch_size=BATCHES)
def test_drop_last_leaves_out_a_smaller_batch_but_never_the_only_one(size, batch_size):
    sampler = sampler_of(size, batch_size, drop_last=True)
    batches = list(sampler)
    assert len(batches) == len(sampler) == max(1, size // batch_size)
    if size >= batch_size:
        assert {len(batch) for batch in batches} == {batch_size}


def test_epochs_differ_and_an_epoch_repeats():
    first, again, second = (list(sampler_of(50, 7, epoch=e)) for e in (0, 0, 1))
    assert first == again
    assert first != second


def test_the_order_depends_on_the_seed():
    assert list(EpochBatchSampler(50, 7, seed=0)) != list(EpochBatchSampler(50, 7, seed=1))


@settings(deadline=None)
@given(size=SIZES, batch_size=st.integers(1, 9), world=st.integers(1, 8))
def test_ranks_share_the_data_and_take_equally_many_batches(size, batch_size, world):
    ranks = [list(sampler_of(size, batch_size, rank=rank, world=world)) for rank in range(world)]
    flat = [[i for batch in rank for i in batch] for rank in ranks]
    assert {len(rank) for rank in ranks} == {len(sampler_of(size, batch_size, world=world))}
    assert {len(indices) for indices in flat} == {-(-size // world)}
    counts = torch.bincount(torch.tensor([i for rank in flat for i in rank]), minlength=size)
    assert counts.min() >= 1
    assert counts.sum() - size == -size % world  # no more repeats than the ranks need to be equal
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_resumes_at_any_position(workers):
    def loader():
        return train_loader(Numbers(11), 3, seed=5, num_workers=workers)

    source = loader()
    source.batch_sampler.set_epoch(2)
    whole = collect(source)
    assert {epoch for pairs, _ in whole for _, epoch in pairs} == {2}
    for position in range(len(whole)) if workers == 0 else (2,):
        first = loader()
        first.batch_sampler.set_epoch(2)
        batches = iter(first)
        for _ in range(position):
            next(batches)
        second = loader()
        second.load_state_dict(first.state_dict())
        assert collect(second) == whole[position:]


def test_workers_change_nothing():
    assert collect(train_loader(Numbers(11), 3, seed=5)) == collect(train_loader(Numbers(11), 3, seed=5, num_workers=2))


def test_after_a_resumed_epoch_the_next_is_whole():
    source = train_loader(Numbers(11), 3, seed=5)
    batches = iter(source)
    next(batches)
    target = train_loader(Numbers(11), 3, seed=5)
    target.load_state_dict(source.state_dict())
    assert len(collect(target)) == 3
    target.batch_sampler.set_epoch(1)
    source.batch_sampler.set_epoch(1)
    assert collect(target) == collect(source)


def test_a_state_of_an_epochs_end_does_not_skip_the_next_epoch():
    source = train_loader(Numbers(11), 3, seed=5)
    collect(source)
    target = train_loader(Numbers(11), 3, seed=5)
    target.load_state_dict(source.state_dict())
    target.batch_sampler.set_epoch(1)  # as Lightning announces it
    assert sorted(index for pairs, _ in collect(target) for index, _ in pairs) == list(range(11))


def test_the_iterator_may_be_made_before_the_epoch_is_announced():
    early, late = train_loader(Numbers(11), 3, seed=5), train_loader(Numbers(11), 3, seed=5)
    iterator = iter(early)
    early.batch_sampler.set_epoch(4)
    late.batch_sampler.set_epoch(4)
    assert collect(iterator) == collect(late)


def test_lightning_announces_epochs_to_the_sampler():
    from lightning.fabric.utilities.data import _set_sampler_epoch

    loader = train_loader(Numbers(11), 3, seed=5)
    _set_sampler_epoch(loader, 6)
    assert {epoch for pairs, _ in collect(loader) for _, epoch in pairs} == {6}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"size": 12}, "size was 11 and is 12"),
        ({"batch_size": 4}, "batch_size was 3 and is 4"),
        ({"seed": 6}, "seed was 5 and is 6"),
        ({"drop_last": True}, "drop_last was 0 and is 1"),
    ],
)
def test_a_state_of_another_loader_is_refused(change, named):
    state = train_loader(Numbers(11), 3, seed=5).state_dict()
    options = {"size": 11, "batch_size": 3, "seed": 5, **change}
    loader = train_loader(Numbers(options.pop("size")), options.pop("batch_size"), **options)
    with pytest.raises(GraftError, match=named):
        loader.load_state_dict(state)


def test_a_state_of_another_number_of_processes_is_refused():
    state = train_loader(Numbers(11), 3, seed=5).state_dict()
    loader = train_loader(Numbers(11), 3, seed=5)
    loader.batch_sampler.world = 2
    with pytest.raises(GraftError, match="world was 1 and is 2"):
        loader.load_state_dict(state)


def test_loader_options_reach_the_batches():
    seen = []

    def collate(items):
        seen.append(len(items))
        return items

    list(train_loader(Numbers(5), 2, seed=0, collate_fn=collate))
    assert seen == [2, 2, 1]
    loader = train_loader(Marked(3), 2, seed=0, num_workers=1, worker_init_fn=mark)
    assert [batch.tolist() for batch in loader] == [[7, 7], [7]]


MARK = [0]


def mark(worker):
    MARK[0] = 7


@dataclass
class Plain(Dataset):
    size: int = 4

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return index


class Marked(Plain):
    def __getitem__(self, index):
        return MARK[0]


def test_a_dataset_without_epochs_is_loaded_too():
    assert sorted(torch.cat(list(train_loader(Plain(), 3, seed=0))).tolist()) == [0, 1, 2, 3]


def test_eval_loader_takes_all_in_order():
    assert torch.cat(list(eval_loader(Plain(7), 3))).tolist() == list(range(7))


@pytest.mark.parametrize(
    ("size", "batch_size", "named"), [(5, 0, "batch_size is 0"), (0, 3, "training split is empty")]
)
def test_sizes_below_one_are_refused(size, batch_size, named):
    with pytest.raises(GraftError, match=named):
        train_loader(Plain(size), batch_size, seed=0)


def test_item_rng_is_a_function_of_its_numbers_and_restores_the_state():
    def draw(*numbers):
        with item_rng(*numbers):
            return torch.rand(3).tolist()

    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert len({tuple(draw(*numbers)) for numbers in ((1, 2, 3), (2, 1, 3), (1, 3, 2), (3, 2, 1), (1, 2, 4))}) == 5
    with pytest.raises(KeyError), item_rng(0, 0, 0):
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-(2**40), 2**40), min_size=1, max_size=4))
def test_mixed_seeds_are_valid_and_depend_on_the_order(parts):
    seed = mix_seed(*parts)
    assert 0 <= seed < 2**63
    assert seed == mix_seed(*parts)
    torch.Generator().manual_seed(seed)
    if parts != parts[::-1]:
        assert seed != mix_seed(*parts[::-1])


def test_lightning_knows_that_the_loader_has_a_state():
    from lightning.fabric.utilities.types import _Stateful

    loader = train_loader(Plain(), 3, seed=0)
    assert isinstance(loader, StatefulLoader)
    assert isinstance(loader, _Stateful)


LENGTHS = st.lists(st.integers(1, 400), min_size=1, max_size=60)
UNEVEN = [5, 300, 17, 17, 18, 120, 60, 9, 33, 80, 81, 19, 250, 7, 64, 30, 31]


def bucket_sampler(lengths, tokens=400, *, epoch=0, rank=0, world=1, seed=5):
    sampler = BucketBatchSampler(lengths, tokens, seed=seed)
    sampler.rank, sampler.world = rank, world
    sampler.set_epoch(epoch)
    return sampler


@settings(deadline=None)
@given(lengths=LENGTHS, tokens=st.integers(400, 2000), epoch=st.integers(0, 1000))
def test_bucketed_epochs_take_every_index_once_within_the_budget(lengths, tokens, epoch):
    sampler = bucket_sampler(lengths, tokens, epoch=epoch)
    batches = list(sampler)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(batch) * max(lengths[i] for i in batch) <= tokens for batch in batches)
    assert len(batches) == len(sampler) == len(bucket_sampler(lengths, tokens, epoch=epoch + 1))


def test_buckets_hold_similar_lengths_and_pad_little():
    lengths = torch.randint(20, 1000, (2000,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = list(bucket_sampler(lengths, 8000))
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    assert padded / sum(lengths) < 1.1
    assert sum(lengths) / len(batches) > 0.8 * 8000


def test_bucketed_batches_are_mixed_anew_in_each_epoch():
    lengths = [20 + i % 50 for i in range(500)]
    first, again, second = (list(bucket_sampler(lengths, epoch=e)) for e in (0, 0, 1))
    assert first == again
    assert {frozenset(batch) for batch in first} != {frozenset(batch) for batch in second}
    means = [sum(lengths[i] for i in batch) / len(batch) for batch in first]
    assert means != sorted(means)
    assert first != list(bucket_sampler(lengths, seed=6))


@settings(deadline=None)
@given(lengths=LENGTHS, world=st.integers(1, 5))
def test_ranks_share_bucketed_batches_and_take_equally_many(lengths, world):
    ranks = [list(bucket_sampler(lengths, rank=rank, world=world)) for rank in range(world)]
    whole = len(bucket_sampler(lengths))
    assert {len(rank) for rank in ranks} == {-(-whole // world)} == {len(bucket_sampler(lengths, world=world))}
    assert {i for rank in ranks for batch in rank for i in batch} == set(range(len(lengths)))
    assert sum(map(len, ranks)) - whole == -whole % world


@pytest.mark.parametrize("position", [0, 2, 4])
def test_a_bucketed_loader_resumes_at_any_position(position):
    def loader():
        return bucketed_loader(Numbers(len(UNEVEN)), UNEVEN, 300, seed=5)

    whole, first, second = loader(), loader(), loader()
    for each in (whole, first):
        each.batch_sampler.set_epoch(2)
    expected = collect(whole)
    assert len(expected) > 4
    batches = iter(first)
    for _ in range(position):
        next(batches)
    second.load_state_dict(first.state_dict())
    assert collect(second) == expected[position:]
    for each in (whole, second):
        each.batch_sampler.set_epoch(3)
    assert collect(second) == collect(whole)


@pytest.mark.parametrize(
    ("lengths", "tokens", "named"),
    [
        ([*UNEVEN[:-1], 32], 300, "lengths was"),
        ([*UNEVEN, 3], 300, "size was 17 and is 18"),
        (UNEVEN, 301, "tokens_per_batch was 300 and is 301"),
    ],
)
def test_a_state_of_another_bucketed_loader_is_refused(lengths, tokens, named):
    state = bucketed_loader(Numbers(17), UNEVEN, 300, seed=5).state_dict()
    with pytest.raises(GraftError, match=named):
        bucketed_loader(Numbers(len(lengths)), lengths, tokens, seed=5).load_state_dict(state)


def test_a_state_does_not_pass_from_plain_to_bucketed_batches():
    state = train_loader(Numbers(17), 3, seed=5).state_dict()
    with pytest.raises(GraftError, match="tokens_per_batch was None and is 300"):
        bucketed_loader(Numbers(17), UNEVEN, 300, seed=5).load_state_dict(state)


@pytest.mark.parametrize("make", [bucketed_eval_loader, lambda *given: bucketed_loader(*given, seed=0)])
def test_an_example_longer_than_the_budget_is_refused(make):
    with pytest.raises(GraftError, match="tokens_per_batch is 299, the longest example has 300 tokens"):
        make(Plain(17), UNEVEN, 299)


def test_a_bucketed_loader_needs_examples():
    with pytest.raises(GraftError, match="training split is empty"):
        bucketed_loader(Plain(0), [], 100, seed=0)
    assert list(bucketed_eval_loader(Plain(0), [], 100)) == []


def test_bucketed_evaluation_takes_each_example_once_from_short_to_long():
    batches = [batch.tolist() for batch in bucketed_eval_loader(Plain(17), UNEVEN, 300)]
    order = [i for batch in batches for i in batch]
    assert [UNEVEN[i] for i in order] == sorted(UNEVEN)
    assert all(len(batch) * max(UNEVEN[i] for i in batch) <= 300 for batch in batches)
