"""The speaker embedding's front end against another library's, and what it says of real voices."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from common.errors import GraftError
from domains.speech._audio import read_audio
from domains.speech.data import LibriVoxClips, StampSpeech
from domains.speech.voice_metrics import SpeakerEncoder, _speaker, speaker_levels, spectrum_distance
from tests.domains.speech.sounds import buzz, hiss, nothing, syllables

RATE = 16_000


@pytest.fixture
def encoder(monkeypatch):
    """The network with random weights, as the one that is loaded."""
    torch.manual_seed(0)
    model = SpeakerEncoder().eval()
    for parameter in model.parameters():  # as they are drawn, all sounds are alike to it
        parameter.data.mul_(3.0)
    monkeypatch.setattr(_speaker, "speaker_encoder", lambda: model)
    return model


def test_the_front_end_is_that_of_another_library():
    audio = (syllables() + 0.1 * hiss(len(syllables()) / RATE)).numpy()
    bank = mel_filter_bank(201, 40, 0.0, 8000.0, RATE, norm="slaney", mel_scale="slaney")
    wanted = spectrogram(
        audio,
        window_function(400, "hann", periodic=True),
        frame_length=400,
        hop_length=160,
        power=2.0,
        center=True,
        pad_mode="constant",
        mel_filters=bank,
        mel_floor=0.0,
    )
    found = _speaker._mel(torch.from_numpy(audio)).T.numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3 * wanted.max() * 1e-3)


@pytest.mark.parametrize("seconds", [0.3, 1.6, 2.2, 2.9, 5.0, 11.37])
def test_parts_overlap_and_cover_a_clip(seconds):
    samples = round(seconds * RATE)
    starts = _speaker.part_starts(samples)
    assert starts[0] == 0
    assert all(later - earlier == 77 for earlier, later in itertools.pairwise(starts))
    last = starts[-1] * 160
    # The last part is at least three quarters full, or the only one; less than a step and a part's quarter is lost.
    assert len(starts) == 1 or samples - last >= 0.75 * 160 * 160
    assert samples - (last + 160 * 160) < 77 * 160 + 0.75 * 160 * 160


def test_a_short_clip_is_one_part_with_silence_behind(encoder):
    clip = buzz(120.0, 0.5)
    padded = torch.cat([_speaker._loud_enough(clip), nothing(1.1)])
    wanted = encoder(_speaker._mel(padded)[None, :160])[0]
    torch.testing.assert_close(encoder.embed(clip, RATE), wanted, rtol=1e-4, atol=1e-5)


def test_a_long_clip_is_the_mean_of_its_parts(encoder):
    clip = syllables(count=12)
    mels = _speaker._mel(torch.nn.functional.pad(_speaker._loud_enough(clip), (0, 160 * 160)))
    starts = _speaker.part_starts(len(clip))
    assert len(starts) > 2
    wanted = torch.stack([encoder(mels[None, s : s + 160])[0] for s in starts]).mean(dim=0)
    found = encoder.embed(clip, RATE)
    torch.testing.assert_close(found, wanted / wanted.norm(), rtol=1e-4, atol=1e-5)
    assert float(found.norm()) == pytest.approx(1.0, abs=1e-5)


def test_quiet_audio_is_raised_and_loud_audio_left():
    quiet = _speaker._loud_enough(1e-3 * syllables())
    assert 10 * np.log10(float(quiet.square().mean())) == pytest.approx(-30.0, abs=0.01)
    torch.testing.assert_close(_speaker._loud_enough(syllables()), syllables())
    assert not _speaker._loud_enough(nothing(0.1)).any()


def test_levels_leave_a_clip_out_of_its_own_centroid(encoder):
    one, two = buzz(120.0), hiss(1.0)
    levels = speaker_levels([one, two], {"one": [one]}, RATE)
    embedded = [encoder.embed(clip, RATE) for clip in (one, two)]
    centre = sum(embedded) / sum(embedded).norm()
    assert levels["same"] == pytest.approx(float(embedded[0] @ embedded[1]), abs=1e-6)
    assert levels["other: one"] == pytest.approx(float(embedded[0] @ centre), abs=1e-6)
    assert levels["other: one"] != pytest.approx(levels["same"], abs=1e-6)
    with pytest.raises(GraftError, match="at least 2"):
        speaker_levels([one], {}, RATE)


def test_the_long_term_spectrum_tells_colour_and_neither_loudness_nor_pauses():
    sound = hiss(2.0, level=-20.0)
    spaced = torch.cat([nothing(0.5), 0.3 * sound, nothing(0.5)])
    assert spectrum_distance([spaced], [sound], RATE) < 0.3
    coloured = sound - 0.9 * torch.nn.functional.pad(sound, (1, 0))[:-1]
    assert spectrum_distance([coloured], [sound], RATE) > 3.0


@pytest.mark.artifacts
def test_a_voice_is_nearer_to_itself_than_to_others():
    russian, english = StampSpeech("ru"), LibriVoxClips()
    for data in (russian, english):
        data.prepare_data()
        data.setup()
    chosen = [record for record in russian.records("test") if record.seconds > 1.5][:10]
    voice = [read_audio(Path(record.path)) for record in chosen]
    others = [read_audio(Path(record.path)) for record in english.records("test")]
    levels = speaker_levels(voice, {"librivox": others}, RATE)
    assert levels["same"] > 0.75
    assert levels["other: librivox"] < 0.65
    halves = spectrum_distance(voice[::2], voice[1::2], RATE)
    assert halves < 0.5 * spectrum_distance(others, voice, RATE)
