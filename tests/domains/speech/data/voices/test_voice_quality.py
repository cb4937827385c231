"""Clipping, noise and bandwidth of sounds for which they are known, and what is made of them."""

from __future__ import annotations

import math

import pytest
import torch
from torchaudio.functional import lowpass_biquad

from domains.speech.data.voices._quality import Limits, Quality, middle_of, quality_of
from tests.domains.speech.sounds import buzz, hiss, nothing, syllables

RATE = 16_000


def sine(hertz=200.0, peak=0.9, seconds=1.0):
    return peak * torch.sin(2 * math.pi * hertz * torch.arange(round(seconds * RATE)) / RATE)


@pytest.mark.parametrize("gain", [1.0, 0.5])
@pytest.mark.parametrize("top", [0.5, 0.8])
def test_the_share_of_clipped_samples_is_the_arc_that_is_cut_off(top, gain):
    # A sine is above `top` of its peak for 1 - 2/pi asin(top) of the time, whatever gain came after the clipping.
    clipped = gain * sine(peak=1.0).clamp(-top, top)
    assert quality_of(clipped, RATE).clipped == pytest.approx(1 - 2 / math.pi * math.asin(top), abs=0.04)


@pytest.mark.parametrize("audio", [sine(), sine(100.0), buzz(90.0), syllables(), 0.9 * hiss().clamp(-1, 1)])
def test_a_whole_sound_is_not_clipped(audio):
    assert quality_of(audio, RATE).clipped == 0


@pytest.mark.parametrize("snr", [10.0, 20.0, 40.0])
def test_the_level_above_the_noise_is_found(snr):
    speech = syllables(count=6, pause=0.3)
    burst = float(buzz(150.0, 0.2).square().mean())
    noisy = speech + hiss(len(speech) / RATE, level=10 * math.log10(burst) - snr)
    assert quality_of(noisy, RATE).snr == pytest.approx(snr, abs=2.0)


def test_digital_silence_between_words_is_no_endless_ratio():
    assert 40 < quality_of(torch.cat([nothing(0.5), syllables()]), RATE).snr <= 80


@pytest.mark.parametrize("rate", [16_000, 22_050])
def test_the_band_of_a_telephone_is_found(rate):
    sound = hiss(2.0, rate)
    assert quality_of(sound, rate).bandwidth == pytest.approx(rate / 2, rel=0.02)
    for _ in range(12):
        sound = lowpass_biquad(sound, rate, 2500.0)
    narrow = quality_of(sound, rate).bandwidth
    assert 2500 < narrow < 4500
    assert quality_of(buzz(200.0, 1.0, rate, partials=5), rate).bandwidth == pytest.approx(1000, abs=200)


def test_the_middle_of_a_set_counts_clipped_samples_and_takes_medians():
    clips = [Quality(clipped=c, snr=s, bandwidth=b) for c, s, b in ((0.1, 10, 1e3), (0.0, 30, 8e3), (0.0, 20, 4e3))]
    assert middle_of(clips, [100, 100, 800]) == Quality(clipped=pytest.approx(0.01), snr=20, bandwidth=4e3)


def test_every_fault_is_named_with_its_figure():
    faults = Limits().faults(Quality(clipped=0.05, snr=8.4, bandwidth=2100.0), 0.25)
    for words in ("0.2 minutes", "5.00% of the samples", "8 dB", "2100 Hz"):
        assert any(words in fault for fault in faults), faults
    assert not Limits().faults(Quality(clipped=0.0, snr=30.0, bandwidth=8000.0), 20.0)
