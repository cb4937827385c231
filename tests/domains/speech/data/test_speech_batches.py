"""Batches: whole, of like lengths, resumable, with speeds, and without clips that turn out to be unreadable."""

from __future__ import annotations

import warnings

import pytest
import torch

from common.errors import GraftError
from domains.speech._audio import read_audio
from domains.speech.data import Manifest
from domains.speech.data._confound import fit_probe, mel_statistics
from domains.speech.data._dataset import at_speed
from domains.speech.data._splits import part_texts, split_by_group

TEXTS = [
    f"{one} {other}" for one in ("red", "green", "blue", "black", "white") for other in ("hat", "cat", "bat", "mat")
]


@pytest.fixture
def path(clip, table):
    lengths = [0.3 + 0.2 * (n % 7) for n in range(len(TEXTS))]
    rows = [f"{clip(f'{n}.wav', 200 + 20 * n, lengths[n])},{text}" for n, text in enumerate(TEXTS)]
    return table("path,text", *rows)


def opened(path, **options):
    data = Manifest(path, **options)
    data.setup()
    return data


def test_a_batch_is_padded_and_keeps_to_the_budget(path, tmp_path):
    data = opened(path, seconds_per_batch=4.0)
    seen = []
    for batch in data.train_dataloader():
        assert batch.audio.dtype == torch.float32
        assert batch.audio.shape == (len(batch.text), int(batch.lengths.max()))
        assert batch.audio.numel() <= 4 * 16_000
        assert batch.target.shape == (len(batch.text), 0)
        for audio, length, text, index in zip(batch.audio, batch.lengths, batch.text, batch.index, strict=True):
            record = data.records("train")[int(index)]
            assert text == record.text
            assert torch.equal(audio[:length], read_audio(tmp_path / record.path))
            assert not audio[length:].any()
        seen += batch.index.tolist()
    assert sorted(seen) == list(range(data.facts.counts["train"]))


def test_evaluation_goes_from_short_to_long_and_training_is_shuffled(path):
    data = opened(path, seconds_per_batch=3.0, val_fraction=0.3)
    lengths = torch.cat([batch.lengths for batch in data.val_dataloader()]).tolist()
    assert lengths == sorted(lengths)
    loader = data.train_dataloader()
    orders = []
    for epoch in range(2):
        loader.epochs.set_epoch(epoch)
        orders.append([batch.index.tolist() for batch in loader])
    assert orders[0] != orders[1]


def test_plain_batches_ignore_lengths(path):
    data = opened(path, batch_size=3)
    assert [len(batch.text) for batch in data.train_dataloader()][:-1] == [3] * (len(data.train_dataloader()) - 1)


def test_a_clip_longer_than_a_batch_is_refused(path):
    with pytest.raises(GraftError, match="seconds_per_batch is 1:"):
        opened(path, seconds_per_batch=1.0).train_dataloader()


def test_a_loader_resumes_where_it_stood(path):
    data = opened(path, seconds_per_batch=3.0, speed=(0.9, 1.0, 1.1))
    whole = list(data.train_dataloader())
    loader = data.train_dataloader()
    batches = iter(loader)
    for _ in range(2):
        next(batches)
    resumed = data.train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    rest = list(resumed)
    assert len(rest) == len(whole) - 2
    assert all(torch.equal(one.audio, other.audio) for one, other in zip(rest, whole[2:], strict=True))


@pytest.mark.parametrize("speed", [0.9, 1.1])
def test_speed_changes_length_and_pitch(clip, tmp_path, speed):
    audio = read_audio(tmp_path / clip("a.wav", 440, 1.0))
    changed = at_speed(audio, speed)
    assert len(changed) == pytest.approx(len(audio) / speed, abs=1)
    assert float(torch.fft.rfft(changed).abs().argmax()) * 16_000 / len(changed) == pytest.approx(440 * speed, abs=2)


def test_speeds_are_drawn_in_training_only_and_anew_in_each_epoch(path):
    data = opened(path, speed=(0.9, 1.0, 1.1))
    seconds = [record.seconds for record in data.records("train")]
    assert data.facts.max_seconds == pytest.approx(max(seconds) / 0.9, abs=1e-3)
    dataset = data._dataset("train", ())
    drawn = []
    for epoch in range(3):
        dataset.set_epoch(epoch)
        ratios = [round(seconds[n] * 16_000 / len(dataset[n].audio), 1) for n in range(len(dataset))]
        assert set(ratios) <= {0.9, 1.0, 1.1}
        assert [len(dataset[n].audio) for n in range(len(dataset))] == [
            len(dataset[n].audio) for n in range(len(dataset))
        ]
        assert all(len(dataset[n].audio) <= dataset.lengths[n] + 1 for n in range(len(dataset)))
        drawn.append(ratios)
    assert drawn[0] != drawn[1] != drawn[2]
    held = data._dataset("test", ())
    assert [len(held[n].audio) for n in range(len(held))] == [round(r.seconds * 16_000) for r in data.records("test")]


def test_a_speed_that_would_make_a_clip_too_long_is_not_drawn(path):
    data = opened(path, speed=(0.9, 1.0), max_seconds=1.5)
    longest = [n for n, record in enumerate(data.records("train")) if record.seconds == pytest.approx(1.5)]
    assert longest
    dataset = data._dataset("train", ())
    for epoch in range(6):
        dataset.set_epoch(epoch)
        assert all(len(dataset[n].audio) == 24_000 for n in longest)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_clip_that_turns_bad_is_named_counted_and_left_out(path, tmp_path, workers):
    data = opened(path, batch_size=4, max_bad=0.1, num_workers=workers)
    bad = data.records("train")[1]
    (tmp_path / bad.path).write_bytes(b"no sound any more")
    loader = data.train_dataloader()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seen = [index for _ in range(2) for batch in loader for index in batch.index.tolist()]
    assert 1 not in seen
    assert set(seen) == set(range(data.facts.counts["train"])) - {1}
    said = [str(w.message) for w in caught if "left out" in str(w.message)]
    assert len(said) == 1
    assert "Cannot read" in said[0]
    assert bad.path in said[0]


def test_more_bad_clips_than_allowed_stop_the_run(path, tmp_path):
    data = opened(path, batch_size=4, max_bad=0.1)
    for record in data.records("train")[:3]:
        (tmp_path / record.path).write_bytes(b"")
    with pytest.warns(UserWarning, match="left out"), pytest.raises(GraftError, match=r"3 of 20 clips .* max_bad 0\.1"):
        list(data.train_dataloader())


def test_a_batch_of_bad_clips_alone(path, tmp_path):
    """In training another clip stands in, in evaluation the batch is passed over."""
    data = opened(path, batch_size=1, max_bad=0.2)
    for split in ("train", "test"):
        (tmp_path / data.records(split)[0].path).write_bytes(b"")
    with pytest.warns(UserWarning, match="train: clip 1 that is left out"):
        train = [batch.index.tolist() for batch in data.train_dataloader()]
    with pytest.warns(UserWarning, match="test: clip 2 that is left out"):
        test = [batch.index.tolist() for batch in data.test_dataloader()]
    assert all(len(batch) == 1 for batch in train)
    assert len(train) == data.facts.counts["train"]
    assert sorted(train).count([1]) == 2
    assert sorted(test) == [[n] for n in range(1, data.facts.counts["test"])]


def test_few_shots_are_a_fixed_subset(path):
    few, other = (opened(path, shots=5, shots_draw=draw) for draw in (0, 1))
    assert few.facts.counts["train"] == other.facts.counts["train"] == 5
    assert few.facts.digest != other.facts.digest
    assert few.facts.digest == opened(path, shots=5, seed=9).facts.digest
    with pytest.raises(GraftError, match="shots is 99"):
        opened(path, shots=99)


def test_a_share_is_a_fixed_subset(path):
    whole, half = opened(path), opened(path, share=0.5)
    assert half.facts.counts["train"] == round(whole.facts.counts["train"] / 2)
    assert half.facts.counts["test"] == whole.facts.counts["test"]
    assert half.describe_splits()["splits"].keys() == {"train", "val", "test"}


def test_arguments_out_of_range_are_all_named():
    with pytest.raises(GraftError, match=r"max_seconds is 0 .*batch_size is 0 .*max_bad is 1 .*speed has 3\.0"):
        Manifest("x.csv", max_seconds=0, batch_size=0, max_bad=1, speed=(3.0,))
    for options, said in (
        ({"normalizer": "lowr"}, "Unknown normalizer"),
        ({"channel": "top"}, "Unknown channel"),
        ({"long": "cut"}, "Unknown rule for long clips"),
        ({"val_fraction": 0.9, "test_fraction": 0.2}, "their sum below 1"),
    ):
        with pytest.raises(GraftError, match=said):
            Manifest("x.csv", **options)


def test_groups_are_never_torn_and_shares_are_kept():
    groups = [f"g{n // 4}" for n in range(400)]
    sides = split_by_group(groups, [""] * 400, {"train": 0.7, "val": 0.1, "test": 0.2})
    assert all(len(set(sides[n : n + 4])) == 1 for n in range(0, 400, 4))
    assert sides.count("train") == pytest.approx(280, abs=4)
    assert sides.count("test") == pytest.approx(80, abs=4)


def test_a_shared_text_chooses_one_side_by_a_hash():
    sides, texts = ["train", "val", "test"] * 300, [f"t{n // 3}" for n in range(900)]
    kept = part_texts(sides, texts, {"train": 0.7, "val": 0.1, "test": 0.2})
    assert all(sum(side is not None for side in kept[n : n + 3]) == 1 for n in range(0, 900, 3))
    assert kept.count("train") == pytest.approx(210, abs=30)
    assert part_texts(["train", "val"], ["a", "a"], None) == [None, "val"]


def test_mel_statistics_know_the_channel_and_not_the_order():
    noise = torch.randn(16_000, generator=torch.Generator().manual_seed(0)) / 10
    assert mel_statistics(noise).shape == (80,)
    loud = mel_statistics(4 * noise)
    assert torch.allclose(loud[:40] - mel_statistics(noise)[:40], torch.full((40,), 2.7726), atol=1e-2)
    assert torch.isfinite(mel_statistics(noise[:100])).all()


def test_the_probe_finds_the_minimum_of_its_loss():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(60, 5, generator=generator)
    labels = (features @ torch.randn(5, 3, generator=generator)).argmax(dim=1)
    logits = fit_probe(features, labels, 3)(features)
    assert (logits.argmax(dim=1) == labels).double().mean() > 0.9
    # At the minimum the gradient of the bias vanishes: mean predicted shares are the shares of the classes.
    assert torch.allclose(logits.softmax(dim=1).mean(dim=0), torch.bincount(labels).double() / 60, atol=1e-4)
