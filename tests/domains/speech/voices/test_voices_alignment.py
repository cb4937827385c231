"""Monotonic alignment against all alignments there are, warping against recursion, and spectra."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
from torch.distributions import Normal

from domains.speech.voices import expand
from domains.speech.voices._alignment import align, frame_likelihoods, warp, warped_durations
from domains.speech.voices._spectrum import log_mel, magnitudes, mel_distance, stft_distance
from domains.speech.voices._warping import follow


def ways(symbols, frames):
    """All ways to give each of the symbols a frame or more."""
    for cuts in itertools.combinations(range(1, frames), symbols - 1):
        yield np.diff([0, *cuts, frames])


@pytest.mark.parametrize(("symbols", "frames"), [(1, 1), (1, 4), (3, 3), (3, 7), (5, 9)])
def test_the_alignment_is_the_best_of_all(symbols, frames):
    generator = torch.Generator().manual_seed(symbols * frames)
    likelihoods = torch.randn(1, symbols, frames, generator=generator)

    def total(durations):
        rows = np.repeat(np.arange(symbols), durations)
        return float(likelihoods[0, rows, np.arange(frames)].sum())

    found = align(likelihoods, torch.tensor([symbols]), torch.tensor([frames]))[0]
    assert total(found.numpy()) == pytest.approx(max(map(total, ways(symbols, frames))))
    assert int(found.sum()) == frames
    assert int(found.min()) >= 1


def test_rows_of_a_batch_are_aligned_alone():
    likelihoods = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(0))
    both = align(likelihoods, torch.tensor([3, 5]), torch.tensor([6, 9]))
    assert torch.equal(both[0, :3], align(likelihoods[:1, :3, :6], torch.tensor([3]), torch.tensor([6]))[0])
    assert both[0, 3:].tolist() == [0, 0]
    with pytest.raises(ValueError, match="5 symbols need as many frames, and there are 4"):
        align(likelihoods, torch.tensor([3, 5]), torch.tensor([6, 4]))


def test_likelihoods_are_those_of_gaussians():
    generator = torch.Generator().manual_seed(0)
    latents, mean, log_scale = (torch.randn(2, 4, n, generator=generator) for n in (6, 3, 3))
    expected = Normal(mean[..., None], log_scale.exp()[..., None]).log_prob(latents[:, :, None]).sum(1)
    torch.testing.assert_close(frame_likelihoods(latents, mean, log_scale), expected, atol=1e-4, rtol=1e-4)


def test_frames_drawn_from_symbols_are_found_again():
    mean = 4 * torch.randn(1, 6, 5, generator=torch.Generator().manual_seed(1))
    durations = torch.tensor([[2, 1, 4, 3, 2]])
    latents = expand(mean, durations)
    found = align(frame_likelihoods(latents, mean, torch.zeros_like(mean)), torch.tensor([5]), torch.tensor([12]))
    assert torch.equal(found, durations)


# ---- warping


def test_a_warp_takes_the_cheapest_way():
    draw = np.random.default_rng(0)
    one, two = draw.normal(size=(6, 2)), draw.normal(size=(8, 2))
    cost = np.linalg.norm(one[:, None] - two[None], axis=2)

    @functools.cache
    def best(row, column):
        """The least cost of a path to a cell, and the path."""
        if row == column == 0:
            return cost[0, 0], ((0, 0),)
        before = [(row - 1, column - 1), (row - 1, column), (row, column - 1)]
        spent, path = min(best(*step) for step in before if min(step) >= 0)
        return spent + cost[row, column], (*path, (row, column))

    path = best(5, 7)[1]
    first = [min(column for row, column in path if row == place) for place in range(6)]
    assert warp(one, two).tolist() == [*first, 8]


def test_a_sequence_slowed_down_is_followed():
    draw = np.random.default_rng(1)
    one = draw.normal(size=(10, 3))
    times = np.array([1, 3, 2, 1, 1, 4, 2, 1, 2, 3])
    bounds = warp(one, np.repeat(one, times, axis=0))
    assert np.diff(bounds).tolist() == times.tolist()
    assert warped_durations(np.array([4, 0, 6]), bounds).tolist() == [7, 0, 13]


def test_durations_follow_another_saying_of_the_text():
    draw = torch.Generator().manual_seed(2)
    durations, slower = torch.tensor([3, 0, 5, 2, 6]), torch.tensor([6, 0, 5, 6, 6])
    own = torch.randn(16, 20, generator=draw)
    times = (slower / durations.clamp(min=1)).long().repeat_interleave(durations)
    other = 2.0 * own.repeat_interleave(times, dim=0) + 3.0  # louder
    found = follow(durations, own, other + 0.01 * torch.randn(other.shape, generator=draw))
    assert found.tolist() == slower.tolist()
    short = follow(durations, own, other[:4])
    assert int(short.sum()) == 4
    assert int(short.min()) >= 0


# ---- spectra


def test_a_spectrogram_has_a_frame_for_each_hop_and_shows_a_tone_where_it_is():
    rate, hop, width = 16_000, 100, 400
    tone = torch.sin(2 * torch.pi * 4000 * torch.arange(1600) / rate)[None]
    found = magnitudes(tone, width, hop)
    assert found.shape == (1, 201, 16)
    assert (found[0, :, 2:-2].argmax(0) == 100).all()
    part = tone[0, 5 * hop - 150 : 5 * hop + 250] * torch.hann_window(width)  # centred on samples 500 to 600
    torch.testing.assert_close(found[0, :, 5], (torch.fft.rfft(part).abs().square() + 1e-6).sqrt())
    assert magnitudes(torch.zeros(1, 120), width, hop).shape == (1, 201, 1)


def test_mel_bands_follow_slaney():
    spectrum = torch.rand(1, 201, 3, generator=torch.Generator().manual_seed(0))
    from transformers.audio_utils import mel_filter_bank

    bank = mel_filter_bank(201, 20, 0.0, 8000.0, 16_000, norm="slaney", mel_scale="slaney")
    expected = torch.from_numpy(bank.T).float() @ spectrum
    torch.testing.assert_close(log_mel(spectrum, 16_000, 20), expected.clamp(min=1e-5).log(), atol=1e-4, rtol=1e-3)


def test_distances_are_zero_for_equal_sounds_and_grow_with_the_difference():
    draw = torch.Generator().manual_seed(0)
    sound = 0.1 * torch.randn(2, 4096, generator=draw)
    for distance in (stft_distance, lambda a, b: mel_distance(a, b, 16_000, 256)):
        assert float(distance(sound, sound)) == pytest.approx(0.0, abs=1e-6)
        near, far = (float(distance(sound * gain, sound)) for gain in (0.9, 0.3))
        assert 0 < near < far
    louder = sound.clone().requires_grad_()
    stft_distance(louder * 0.5, sound).backward()
    assert louder.grad is not None
    assert bool(louder.grad.any())
