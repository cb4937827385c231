"""Measures of one utterance beside another, where they differ by what is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from domains.speech.voice_metrics import acoustics
from tests.domains.speech.sounds import buzz, hiss, nothing, syllables

RATE = 16_000


def phrase(hertz: float = 150.0) -> torch.Tensor:
    """A vowel, a hiss, and another vowel that is coloured differently."""
    return torch.cat([buzz(hertz, 0.4), 0.3 * hiss(0.2), buzz(1.2 * hertz, 0.4, partials=4)])


def test_an_utterance_is_no_different_from_itself():
    found = acoustics(phrase(), phrase(), RATE)
    assert found.mcd == pytest.approx(0.0, abs=1e-5)
    assert (found.f0_rmse, found.voicing_error, found.duration_error) == (0.0, 0.0, 0.0)
    assert found.f0_median == found.f0_median_reference


def test_silence_around_it_does_not_count():
    later = torch.cat([nothing(0.5), phrase(), nothing(0.3)])
    found = acoustics(later, phrase(), RATE)
    assert found.seconds == pytest.approx(found.seconds_reference, abs=0.05)  # a window at either end
    assert found.mcd < 1.0
    assert found.f0_rmse < 60


def test_a_voice_an_octave_higher_is_1200_cents_away():
    found = acoustics(buzz(240.0, 1.0), buzz(120.0, 1.0), RATE)
    assert found.f0_rmse == pytest.approx(1200.0, abs=15)
    assert found.f0_median / found.f0_median_reference == pytest.approx(2.0, rel=0.01)


def test_a_whisper_is_all_voicing_error_and_has_no_pitch():
    found = acoustics(hiss(1.0), buzz(120.0, 1.0), RATE)
    assert found.voicing_error > 0.9
    assert math.isnan(found.f0_rmse)
    assert math.isnan(found.f0_median)


def test_half_the_length_is_half_a_duration_error_and_hardly_a_distortion():
    found = acoustics(buzz(150.0, 0.5), buzz(150.0, 1.0), RATE)
    assert found.duration_error == pytest.approx(0.5, abs=0.03)
    assert found.mcd < 1.0


def test_a_filter_is_a_distortion_of_its_own_response():
    sound = hiss(2.0, level=-20.0)
    coloured = sound - 0.9 * torch.nn.functional.pad(sound, (1, 0))[:-1]
    # What 13 cosines take up of the filter's response over the mel bands, in dB.
    from torchaudio.functional import melscale_fbanks

    frequencies = torch.linspace(0, RATE / 2, 513)
    response = (1 - 0.9 * torch.exp(-2j * math.pi * frequencies / RATE)).abs().square()
    bank = melscale_fbanks(513, 0.0, 7000.0, 40, RATE).T
    levels = 0.5 * torch.log(bank @ response / bank.sum(dim=1)).numpy()
    waves = np.cos(math.pi * np.outer(np.arange(14), np.arange(40) + 0.5) / 40)
    cepstra = 2 / 40 * waves @ levels
    wanted = 10 / math.log(10) * math.sqrt(2 * (cepstra[1:] ** 2).sum())
    assert acoustics(coloured, sound, RATE).mcd == pytest.approx(wanted, rel=0.05)


def test_another_rate_changes_hardly_anything():
    at_16, at_22 = (acoustics(syllables(180.0, rate=r), syllables(150.0, rate=r), r) for r in (16_000, 22_050))
    assert at_16.mcd == pytest.approx(at_22.mcd, rel=0.1)
    assert at_16.f0_median == pytest.approx(at_22.f0_median, rel=0.01)
