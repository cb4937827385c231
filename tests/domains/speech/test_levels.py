"""Where speech begins and ends, and how loud it is, of sounds whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch

from domains.speech._levels import QUIETEST, cleaned, frame_levels, noise_level, speech_bounds, speech_level
from tests.domains.speech.sounds import buzz, hiss, nothing, syllables

RATE = 16_000


def rms(audio):
    return 10 * math.log10(float(audio.square().mean()))


@pytest.mark.parametrize("floor", [None, -60.0, -50.0])
@pytest.mark.parametrize("margin", [0.0, 0.075])
def test_silence_at_both_ends_is_found_in_quiet_and_in_noise(floor, margin):
    audio = torch.cat([nothing(0.4), syllables(), nothing(0.7)])
    if floor is not None:
        audio = audio + hiss(len(audio) / RATE, level=floor)
    start, end = speech_bounds(audio, RATE, margin)
    assert start / RATE == pytest.approx(0.4 - margin, abs=0.03)
    assert end / RATE == pytest.approx(len(audio) / RATE - 0.7 + margin, abs=0.03)
    assert start <= (0.4 - margin) * RATE + 1
    assert end >= len(audio) - (0.7 - margin) * RATE - 1


def test_a_margin_ends_where_the_recording_does():
    audio = syllables()
    assert speech_bounds(audio, RATE, 0.5) == (0, len(audio))


def test_pauses_inside_stay():
    audio = syllables(count=2, pause=1.0)
    start, end = speech_bounds(audio, RATE)
    assert end - start >= len(audio) - 0.03 * RATE


def test_the_level_of_speech_leaves_pauses_out():
    burst = buzz(150.0, 0.2)
    # Windows that reach half into a pause are as loud as half of what is in them.
    assert speech_level(syllables(pause=0.5), RATE) == pytest.approx(rms(burst), abs=1.0)


@pytest.mark.parametrize("gain", [0.01, 0.3, 1.0])
def test_all_recordings_are_brought_to_one_level(gain):
    found = cleaned(gain * torch.cat([nothing(0.3), syllables(), nothing(0.3)]), RATE, -26.0, 0.05)
    assert speech_level(found, RATE) == pytest.approx(-26.0, abs=0.3)
    assert len(found) / RATE == pytest.approx(1.1 + 0.1, abs=0.05)


def test_no_gain_clips():
    clicks = 0.01 * syllables()
    clicks[4000] = 0.9
    assert float(cleaned(clicks, RATE, -10.0, 0.05).abs().max()) == pytest.approx(0.95, abs=1e-4)


def test_levels_have_a_floor_and_short_audio_has_one_window():
    assert frame_levels(nothing(0.1), RATE).tolist() == [QUIETEST] * 8
    assert frame_levels(buzz(200.0, 0.01), RATE).shape == (1,)
    assert noise_level(frame_levels(hiss(2.0, level=-50.0), RATE)) == pytest.approx(-50.0, abs=1.0)
