"""A network's scales, against voices that were given known ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchaudio.functional import melscale_fbanks

from common.errors import GraftError
from domains.speech.voices._mel_voice import MelFront
from domains.speech.voices._scales import Spoken, fit_line, measure_scales, pitch_track, symbol_means

RATE, HOP, BANDS = 8000, 128, 20
FRONT = MelFront(
    window=torch.hann_window(4 * HOP),
    filters=melscale_fbanks(2 * HOP + 1, 80.0, RATE / 2, BANDS, RATE, norm="slaney", mel_scale="slaney"),
    hop=HOP,
    transform=4 * HOP,
    floor=1e-10,
)
SLOPE = torch.linspace(0.5, 2.0, BANDS)
SHIFT = torch.linspace(-1.0, 1.0, BANDS)


def said(seed, *, whispered=False):
    """A planted line, each symbol a buzz of its own pitch, loudness and colour: what was written, and its sound."""
    draw = np.random.default_rng(seed)
    durations = draw.integers(8, 16, 12)
    hertz, loud = draw.uniform(90, 220, 12), draw.uniform(0.02, 0.2, 12)
    per_sample = np.repeat(durations * HOP, 1)
    phase = np.cumsum(2 * math.pi * np.repeat(hertz, per_sample) / RATE)
    tilt = np.repeat(draw.uniform(0.3, 1.5, 12), per_sample)
    sound = sum(np.sin(n * phase) / n**tilt for n in range(1, 15))
    if whispered:
        sound = draw.standard_normal(len(phase))
    audio = torch.from_numpy(sound * np.repeat(loud, per_sample)).float()
    audio += 1e-4 * torch.randn(len(audio), generator=torch.Generator().manual_seed(seed))
    frames = int(durations.sum())
    magnitudes = FRONT.magnitudes(audio)[:frames]
    lengths = torch.from_numpy(durations)
    energy = torch.stack([part.mean() for part in magnitudes.square().sum(1).sqrt().split(durations.tolist())])
    mel = SLOPE * FRONT(audio)[:frames] + SHIFT
    return Spoken(mel, lengths, torch.from_numpy(1.7 * np.log(hertz) - 8).float(), 0.2 * energy - 3), audio


def test_a_line_is_that_of_least_squares():
    draw = torch.Generator().manual_seed(0)
    found = torch.randn(50, 3, generator=draw)
    wanted = found * torch.tensor([2.0, 0.1, -1.0]) + torch.randn(50, 3, generator=draw)
    line = fit_line(found, wanted)
    for column in range(3):
        slope, shift = np.polyfit(found[:, column].numpy(), wanted[:, column].numpy(), 1)
        rest = np.corrcoef(found[:, column].numpy(), wanted[:, column].numpy())[0, 1] ** 2
        assert float(line.slope[column]) == pytest.approx(slope, abs=1e-5)
        assert float(line.shift[column]) == pytest.approx(shift, abs=1e-5)
        assert float(line.fit[column]) == pytest.approx(rest if slope > 0 else 0.0, abs=1e-5)
    still = fit_line(torch.ones(5, 1), torch.arange(5.0)[:, None])
    assert (float(still.slope), float(still.shift), float(still.fit)) == (0.0, 2.0, 0.0)


def test_planted_scales_are_found_again():
    scales = measure_scales("toy", [said(0), said(1), said(2)], FRONT, RATE)
    torch.testing.assert_close(scales.mel.slope.float(), SLOPE, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(scales.mel.shift.float(), SHIFT, atol=1e-3, rtol=1e-3)
    assert scales.figures["kept"] == []
    assert scales.figures["mel_r2_least"] > 0.999
    assert float(scales.pitch.slope) == pytest.approx(1.7, rel=0.15)  # symbols' edges are heard in each other
    hertz = torch.tensor([100.0, 150.0, 200.0])
    torch.testing.assert_close(scales.pitch(hertz.log()), 1.7 * hertz.log() - 8, atol=0.1, rtol=0)
    assert float(scales.energy.slope) == pytest.approx(0.2, rel=1e-3)
    assert float(scales.energy.shift) == pytest.approx(-3, rel=1e-3)
    again = measure_scales("toy", [said(0), said(1), said(2)], FRONT, RATE)
    assert torch.equal(again.pitch.slope, scales.pitch.slope)


def test_what_cannot_be_found_is_kept_or_refused():
    lines = [said(seed) for seed in range(3)]
    deaf = [(own._replace(pitch=own.pitch.roll(5), energy=-own.energy), audio) for own, audio in lines]
    scales = measure_scales("toy", deaf, FRONT, RATE)
    assert scales.figures["kept"] == ["pitch", "energy"]
    assert (scales.pitch, scales.energy) == (None, None)
    assert scales.figures["energy_r2"] == 0.0
    whispered = measure_scales("toy", [said(seed, whispered=True) for seed in range(3)], FRONT, RATE)
    assert whispered.figures["kept"] == ["pitch"]
    other = [(own._replace(mel=own.mel.roll(20, 0)), audio) for own, audio in lines]
    with pytest.raises(GraftError, match=r"scale 'toy' writes its frames .* 0\.\d\d .* the median needs 0\.7"):
        measure_scales("toy", other, FRONT, RATE)


def test_a_symbols_mean_is_over_its_frames():
    found = symbol_means(torch.tensor([1.0, 3.0, 5.0, 7.0]), torch.tensor([2, 0, 1, 1]))
    assert found[[0, 2, 3]].tolist() == [2.0, 5.0, 7.0]
    assert bool(found[1].isnan())


def test_a_pitch_track_goes_straight_across_what_has_none():
    time = torch.arange(RATE) / RATE
    hertz = torch.where(time < 0.4, 100.0, 200.0)
    buzz = sum((2 * math.pi * n * hertz * time).sin() / n for n in range(1, 10)) * ((time < 0.4) | (time > 0.6))
    logs, voiced = pitch_track(buzz, RATE, HOP, 60)
    middle = round(0.5 * RATE / HOP)
    assert logs[5].exp() == pytest.approx(100, rel=0.01)
    assert logs[55].exp() == pytest.approx(200, rel=0.01)
    assert logs[middle].exp() == pytest.approx(20_000**0.5, rel=0.1)
    assert (voiced[5], voiced[middle], voiced[55]) == (1, 0, 1)
    assert pitch_track(torch.zeros(RATE), RATE, HOP, 60) is None
