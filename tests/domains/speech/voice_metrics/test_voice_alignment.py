"""Warping against every possible path, mel-cepstra against their formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from domains.speech.voice_metrics import frame_distortion, mel_cepstra, warp
from domains.speech.voice_metrics._cepstra import ORDER, mel_power
from tests.domains.speech.sounds import buzz, hiss, syllables


def cheapest(cost):
    """The least cost over all paths, by trying all of them."""

    def from_(row, column):
        here = cost[row, column]
        if (row, column) == (cost.shape[0] - 1, cost.shape[1] - 1):
            return here
        steps = [(row + 1, column + 1), (row + 1, column), (row, column + 1)]
        return here + min(from_(*step) for step in steps if step[0] < cost.shape[0] and step[1] < cost.shape[1])

    return from_(0, 0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 10_000))
def test_no_path_is_cheaper(rows, columns, seed):
    cost = np.random.default_rng(seed).random((rows, columns))
    path = warp(cost)
    assert tuple(path[0]) == (0, 0)
    assert tuple(path[-1]) == (rows - 1, columns - 1)
    steps = np.diff(path, axis=0)
    assert {tuple(step) for step in steps} <= {(1, 0), (0, 1), (1, 1)}
    assert cost[path[:, 0], path[:, 1]].sum() == pytest.approx(cheapest(cost))


def test_a_sequence_aligns_with_itself_along_the_diagonal():
    values = np.random.default_rng(0).random(40)
    path = warp(np.abs(values[:, None] - values[None, :]))
    assert (path[:, 0] == path[:, 1]).all()
    assert len(path) == 40


def test_a_repeated_frame_is_warped_away():
    values = np.random.default_rng(1).random(30)
    slow = np.repeat(values, 2)
    cost = np.abs(slow[:, None] - values[None, :])
    path = warp(cost)
    assert cost[path[:, 0], path[:, 1]].max() == 0


def test_a_distortion_is_the_difference_of_smooth_spectra_in_decibels():
    bands, rng = 40, np.random.default_rng(2)
    one, other = rng.standard_normal((2, 1, ORDER + 1))
    waves = np.cos(math.pi * np.outer(np.arange(ORDER + 1), np.arange(bands) + 0.5) / bands)
    decibels = 20 / math.log(10) * ((one - other)[0, 1:] @ waves[1:])
    assert frame_distortion(one, other)[0, 0] == pytest.approx(np.sqrt((decibels**2).mean()))


def test_cepstra_rebuild_the_spectrum_up_to_their_order():
    audio, bands = hiss(0.5) + 0.1 * buzz(200.0, 0.5), 40
    levels = 0.5 * np.log(mel_power(audio, 16_000))
    waves = np.cos(math.pi * np.outer(np.arange(ORDER + 1), np.arange(bands) + 0.5) / bands)
    smooth = mel_cepstra(audio, 16_000) @ waves
    # The best fit of so many cosines, as least squares finds it.
    wanted = np.linalg.lstsq(waves.T, levels.T, rcond=None)[0].T @ waves
    np.testing.assert_allclose(smooth, wanted, atol=1e-6)


def test_white_noise_has_one_power_in_all_bands():
    power = mel_power(hiss(4.0, level=-20.0), 16_000).mean(axis=0)
    assert np.ptp(10 * np.log10(power)) < 2.0


def test_loudness_and_rate_leave_the_cepstra_alone():
    sound = syllables() + hiss(len(syllables()) / 16_000, level=-60)
    one = mel_cepstra(sound, 16_000)
    np.testing.assert_allclose(mel_cepstra(0.25 * sound, 16_000)[:, 1:], one[:, 1:], atol=1e-4)
    assert len(mel_cepstra(torch.zeros(22_050), 22_050)) == len(mel_cepstra(torch.zeros(16_000), 16_000)) == 101
