"""Sound files are read as they were written, in every format, and what cannot be used is refused in one line."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import soundfile
import torch

from common.errors import GraftError
from domains.speech._audio import decode_audio, fingerprint, read_audio, read_header

RATE = 16_000


def tone(seconds: float = 0.5, rate: int = RATE, pitch: float = 440.0) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def pitch_of(audio: torch.Tensor, rate: int = RATE) -> float:
    power = torch.fft.rfft(audio).abs()
    return float(power.argmax()) * rate / len(audio)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3", "aiff"])
def test_formats(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, tone(1.0), RATE)
    audio = read_audio(path)
    assert (audio.dtype, audio.shape) == (torch.float32, (RATE,))
    assert pitch_of(audio) == pytest.approx(440, abs=2)
    assert read_header(path)[:2] == (RATE, 1)
    assert read_header(path).seconds == pytest.approx(1.0, abs=0.05)
    assert torch.equal(decode_audio(path.read_bytes(), path.name), audio)


@pytest.mark.parametrize(("suffix", "codec", "rate"), [("m4a", "aac", 44_100), ("g722", "g722", 16_000)])
def test_formats_that_need_pyav(tmp_path, suffix, codec, rate):
    import av

    path = tmp_path / f"a.{suffix}"
    with av.open(str(path), "w", format="g722" if suffix == "g722" else None) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.layout = "mono"
        samples = tone(1.0, rate)[None]
        planar = codec == "aac"
        given = samples if planar else (samples * 32767).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(given, format="fltp" if planar else "s16", layout="mono")
        frame.rate = rate
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    audio = read_audio(path)
    assert len(audio) == pytest.approx(RATE, rel=0.1)
    assert pitch_of(audio) == pytest.approx(440, abs=3)
    assert read_header(path).rate == rate


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_resampling_keeps_pitch_length_and_amplitude(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", tone(1.0, rate), rate, subtype="FLOAT")
    audio = read_audio(tmp_path / "a.wav")
    assert len(audio) == RATE
    inner = slice(500, -500)
    assert (audio - torch.from_numpy(tone(1.0)))[inner].abs().max() < 5e-3


def test_channels(tmp_path):
    left, right = tone(pitch=300), tone(pitch=800)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], axis=1), RATE, subtype="FLOAT")
    expected = {"left": left, "right": right, "mix": (left + right) / 2}
    for channel, samples in expected.items():
        assert torch.allclose(read_audio(tmp_path / "a.wav", channel=channel), torch.from_numpy(samples), atol=1e-7)
    with pytest.raises(GraftError, match=r"Unknown channel 'midle'\. Did you mean 'mix'"):
        read_audio(tmp_path / "a.wav", channel="midle")
    soundfile.write(tmp_path / "many.wav", np.stack([left] * 3, axis=1), RATE)
    with pytest.raises(GraftError, match="3 channels"):
        read_audio(tmp_path / "many.wav", channel="left")


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_stretches(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, tone(1.0), RATE)
    whole = read_audio(path)
    assert torch.equal(read_audio(path, start=0.25, end=0.75), whole[4_000:12_000])
    assert torch.equal(read_audio(path, start=0.5), whole[8_000:])
    assert torch.equal(read_audio(path, end=1.005), whole)
    for start, end in ((0.5, 1.5), (1.0, None), (0.5, 0.5)):
        with pytest.raises(GraftError, match=r"lasts 1\.00 s; the stretch from .* is not in it"):
            read_audio(path, start=start, end=end)


def test_what_is_louder_than_full_is_clipped(tmp_path):
    soundfile.write(tmp_path / "a.wav", 5 * tone(), RATE, subtype="FLOAT")
    assert read_audio(tmp_path / "a.wav").abs().max() == 1


def broken(folder):
    """Pairs of a broken file and what its error says."""
    sound = tone(1.0)
    soundfile.write(folder / "a.wav", sound, RATE)
    soundfile.write(folder / "a.flac", sound, RATE)
    soundfile.write(folder / "zero.wav", sound[:0], RATE)
    soundfile.write(folder / "silent.wav", 0 * sound, RATE)
    soundfile.write(folder / "nan.wav", sound * np.nan, RATE, subtype="FLOAT")
    soundfile.write(folder / "opposite.wav", np.stack([sound, -sound], axis=1), RATE, subtype="FLOAT")
    whole = (folder / "a.wav").read_bytes()
    (folder / "cut.wav").write_bytes(whole[:20_000])
    (folder / "cut.flac").write_bytes((folder / "a.flac").read_bytes()[:6_000])
    (folder / "rate.wav").write_bytes(whole[:24] + struct.pack("<I", 3) + whole[28:])
    (folder / "empty.wav").write_bytes(b"")
    (folder / "text.wav").write_text("this is no sound")
    (folder / "text.m4a").write_text("this is no sound")
    return {
        "missing.wav": "There is no file",
        "zero.wav": "holds no sound",
        "silent.wav": "is silent",
        "nan.wav": "no finite numbers",
        "opposite.wav": "channel: left or right",
        "cut.wav": "is cut off",
        "cut.flac": "(Cannot read|cut off)",
        "rate.wav": "states a rate of 3 Hz",
        "empty.wav": "Cannot read",
        "text.wav": "Cannot read .* give one of",
        "text.m4a": "Cannot read .*Invalid data.* give one of",
        ".": "Cannot open",
    }


def test_what_cannot_be_used_is_refused_in_one_line(tmp_path):
    for name, said in broken(tmp_path).items():
        with pytest.raises(GraftError, match=said) as caught:
            read_audio(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert name == "." or name in str(caught.value)


def test_a_header_alone_shows_most_faults(tmp_path):
    faults = broken(tmp_path)
    for name in ("missing.wav", "zero.wav", "cut.wav", "rate.wav", "empty.wav", "text.wav", "text.m4a"):
        with pytest.raises(GraftError, match=faults[name]):
            read_header(tmp_path / name)


def test_a_wrong_declared_rate_is_refused(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(), 8_000)
    assert len(read_audio(tmp_path / "a.wav", declared=8_000)) == 2 * len(tone())
    with pytest.raises(GraftError, match="declared as 16000 Hz and its header says 8000 Hz"):
        read_audio(tmp_path / "a.wav", declared=16_000)


def test_a_fingerprint_tells_changed_files_apart(tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(2.0), RATE)
    before = fingerprint(path)
    assert fingerprint(path) == before
    soundfile.write(path, 0.9 * tone(2.0), RATE)
    assert fingerprint(path) != before
