"""Pitch of sounds whose pitch is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from domains.speech._pitch import HOP, median_pitch, pitch
from tests.domains.speech.sounds import buzz, hiss, nothing


@pytest.mark.parametrize("rate", [16_000, 22_050, 44_100])
@pytest.mark.parametrize("hertz", [75.0, 98.0, 196.0, 331.0, 450.0])
def test_a_steady_pitch_is_found(hertz, rate):
    found = pitch(buzz(hertz, 0.6, rate), rate)
    assert len(found) == round(0.6 / HOP) + 1
    inner = found[4:-4]
    np.testing.assert_allclose(inner, hertz, rtol=0.005)


def test_the_pitch_is_the_one_of_the_period_though_its_partial_is_missing():
    np.testing.assert_allclose(pitch(buzz(150.0, 0.5, first=3), 16_000)[4:-4], 150.0, rtol=0.005)


def test_a_glide_is_followed():
    track = np.linspace(110.0, 220.0, 16_000)
    found = pitch(buzz(track, 1.0), 16_000)[5:-5]
    wanted = np.interp(np.arange(5, 96) * HOP, np.arange(16_000) / 16_000, track)
    np.testing.assert_allclose(found, wanted, rtol=0.01)


def test_a_quiet_hum_in_noise_is_found_and_noise_alone_is_not_voiced():
    sound = torch.cat([buzz(120.0, 0.5), nothing(0.5)]) + hiss(1.0, level=-40.0)
    found = pitch(sound, 16_000)
    assert (found[4:46] > 0).mean() > 0.95
    assert (found[54:] > 0).mean() < 0.05
    np.testing.assert_allclose(found[4:46][found[4:46] > 0], 120.0, rtol=0.02)


def test_noise_as_loud_as_speech_is_mostly_not_voiced():
    assert (pitch(hiss(1.0), 16_000) > 0).mean() < 0.1


def test_silence_and_a_single_sample_are_not_voiced():
    assert not pitch(nothing(0.2), 16_000).any()
    assert pitch(torch.ones(1), 16_000).shape == (1,)


def test_what_lies_outside_the_range_is_not_taken_for_a_pitch():
    assert not (pitch(buzz(150.0, 0.4), 16_000, floor=200.0, ceiling=280.0)[4:-4] == 150.0).any()


def test_the_median_counts_voiced_frames_alone():
    tracks = [np.array([0.0, 100.0, 100.0, 100.0]), np.array([200.0, 200.0, 0.0, 300.0])]
    assert median_pitch(tracks) == np.median([100, 100, 100, 200, 200, 300])
    assert np.isnan(median_pitch([np.zeros(50)]))
