"""Sound files as tensors: read, one channel chosen, cut, resampled, and checked."""

from __future__ import annotations

import functools
import hashlib
import io
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.errors import GraftError, unknown

if TYPE_CHECKING:
    from torchaudio.transforms import Resample

RATE = 16_000
"""Samples per second that every backbone of this domain takes, in Hz."""

Channel = Literal["mix", "left", "right"]
CHANNELS: tuple[Channel, ...] = ("mix", "left", "right")

SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au"})
"""Files that libsndfile reads."""
AV_SUFFIXES = frozenset({".g722", ".m4a", ".aac", ".mp4", ".webm", ".wma", ".amr"})
"""Files that need PyAV."""

# Below telephone speech nothing is left of most consonants; above, a header is damaged or it is no sound.
_LEAST_RATE, _MOST_RATE = 4_000, 384_000
_SILENCE = 1e-4
_CHUNK = 8192


class Header(NamedTuple):
    """What a sound file says about itself.

    Attributes:
        rate: Samples per second, in Hz.
        channels: Number of channels.
        seconds: Length.
    """

    rate: int
    channels: int
    seconds: float


def read_audio(
    path: Path,
    rate: int = RATE,
    *,
    channel: Channel = "mix",
    start: float | None = None,
    end: float | None = None,
    declared: int | None = None,
) -> Tensor:
    """Read a sound file, or a stretch of it, as one channel at the rate asked for.

    Args:
        path: The file: WAV, FLAC, OGG, Opus, MP3, AIFF; G.722, M4A, AAC, MP4, WebM over PyAV.
        rate: Samples per second of the result, in Hz.
        channel: "mix" averages the channels; "left" and "right" take the first or the second of two.
        start: Where to begin, in seconds; None for the beginning.
        end: Where to stop, in seconds; None for the end.
        declared: The rate that the file is said to have, in Hz; it must be the one in its header.

    Returns:
        float32 (T,) in [-1, 1].

    Raises:
        GraftError: The file is missing, unreadable, cut off, empty, silent, or holds values that are no numbers; its
            rate is not the declared one; the channel or the stretch is not in it.
    """
    path = Path(path)
    with _open(path) as file:
        return _decode(file, str(path), path.suffix, rate, channel, start, end, declared)


def decode_audio(data: bytes, name: str, rate: int = RATE, *, channel: Channel = "mix") -> Tensor:
    """Read a sound file that is in memory; see `read_audio`. `name` tells its format and names it in messages."""
    return _decode(io.BytesIO(data), name, Path(name).suffix, rate, channel, None, None, None)


def read_header(path: Path) -> Header:
    """Read what a sound file says about itself, without its samples.

    Raises:
        GraftError: The file is missing, unreadable or empty, or states an impossible rate.
    """
    path = Path(path)
    with _open(path) as file:
        header = _header(file, str(path), path.suffix)
    if not header.seconds > 0:
        raise GraftError(f"{path} holds no sound (0 samples): record it again or leave it out.")
    _check_rate(str(path), header.rate, None)
    return header


def fingerprint(path: Path) -> str:
    """Hash a file's size and its first, middle and last 8 KiB: enough to tell that a sound file was changed."""
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=12)
    with path.open("rb") as file:
        for place in sorted({0, max(size // 2 - _CHUNK // 2, 0), max(size - _CHUNK, 0)}):
            file.seek(place)
            digest.update(file.read(_CHUNK))
    return digest.hexdigest()


def resample(audio: Tensor, orig: int, new: int) -> Tensor:
    """Change the rate of float32 (..., T) from `orig` to `new` Hz (windowed sinc, by torchaudio)."""
    return audio if orig == new else _resampler(orig, new)(audio)


@functools.lru_cache(maxsize=32)
def _resampler(orig: int, new: int) -> Resample:
    from torchaudio.transforms import Resample

    return Resample(orig, new)


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise GraftError(f"There is no file '{path}': correct the path.") from None
    except OSError as error:
        raise GraftError(f"Cannot open {path} ({error.strerror or error}): give a sound file.") from error


def _decode(
    file: BinaryIO,
    name: str,
    suffix: str,
    rate: int,
    channel: Channel,
    start: float | None,
    end: float | None,
    declared: int | None,
) -> Tensor:
    if channel not in CHANNELS:
        raise unknown("channel", channel, CHANNELS)
    if suffix.lower() in AV_SUFFIXES:
        found, samples = _read_av(file, name, suffix)
        _check_rate(name, found, declared)
        first, last = _stretch(name, start, end, found, len(samples))
        samples = samples[first:last]
    else:
        found, samples = _read_sndfile(file, name, declared, start, end)
    audio = torch.from_numpy(_one_channel(samples, channel, name))
    if not len(audio):
        raise GraftError(f"{name} holds no sound (0 samples): record it again or leave it out.")
    if not torch.isfinite(audio).all():
        raise GraftError(f"{name} holds samples that are no finite numbers: write it again or leave it out.")
    peak = float(audio.abs().max())
    if peak < _SILENCE:
        hint = " in the mix of its channels: choose one with channel: left or right" if samples.shape[1] > 1 else ""
        raise GraftError(
            f"{name} is silent{hint or ': record it again or leave it out'} (peak {peak:.1e}, at least 1e-4)."
        )
    return resample(audio, found, rate).clamp(-1.0, 1.0)


def _read_sndfile(
    file: BinaryIO, name: str, declared: int | None, start: float | None, end: float | None
) -> tuple[int, np.ndarray]:
    """Return the rate and the samples, float32 (T, channels)."""
    import soundfile

    _check_riff(file, name)
    try:
        with soundfile.SoundFile(file) as sound:
            _check_rate(name, sound.samplerate, declared)
            first, last = _stretch(name, start, end, sound.samplerate, sound.frames)
            if first:
                sound.seek(first)
            samples = sound.read(last - first, dtype="float32", always_2d=True)
            found = sound.samplerate
    except (soundfile.SoundFileError, RuntimeError, ValueError) as error:
        raise _unreadable(name, error) from error
    if len(samples) < last - first:
        raise GraftError(
            f"{name} is cut off: its header announces {last - first} samples and {len(samples)} are there. Copy it "
            "again or leave it out."
        )
    return found, samples


def _read_av(file: BinaryIO, name: str, suffix: str) -> tuple[int, np.ndarray]:
    """Return the rate and the samples, float32 (T, channels)."""
    import av

    try:
        with av.open(file, format="g722" if suffix.lower() == ".g722" else None) as container:
            stream = container.streams.audio[0]
            resampler = av.AudioResampler(format="fltp")
            frames = [out for frame in container.decode(stream) for out in resampler.resample(frame)]
            found = stream.codec_context.sample_rate
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise _unreadable(name, error) from error
    parts = [frame.to_ndarray() for frame in frames]
    return found, (np.concatenate(parts, axis=1).T if parts else np.zeros((0, 1), dtype=np.float32))


def _header(file: BinaryIO, name: str, suffix: str) -> Header:
    if suffix.lower() in AV_SUFFIXES:
        rate, samples = _read_av(file, name, suffix)
        return Header(rate, samples.shape[1], len(samples) / rate)
    import soundfile

    _check_riff(file, name)
    try:
        with soundfile.SoundFile(file) as sound:
            return Header(sound.samplerate, sound.channels, sound.frames / max(sound.samplerate, 1))
    except (soundfile.SoundFileError, RuntimeError, ValueError) as error:
        raise _unreadable(name, error) from error


def _check_riff(file: BinaryIO, name: str) -> None:
    """Refuse a WAV file that is shorter than it states; libsndfile reads what is left of it in silence."""
    head = file.read(8)
    there = file.seek(0, io.SEEK_END)
    file.seek(0)
    stated = int.from_bytes(head[4:], "little") + 8
    # A stream's header was written before its end was known: 0 or all ones.
    if head[:4] == b"RIFF" and there < stated < 2**32 - 1 and stated > 8:
        raise GraftError(f"{name} is cut off: it states {stated} bytes and has {there}. Copy it again or leave it out.")


def _unreadable(name: str, error: Exception) -> GraftError:
    allowed = ", ".join(sorted(suffix[1:] for suffix in SUFFIXES | AV_SUFFIXES))
    reason = getattr(error, "strerror", None) or " ".join(str(error).split()).split(": ")[-1].rstrip(".")
    return GraftError(f"Cannot read {name} as sound ({reason}): give one of {allowed}.")


def _check_rate(name: str, found: int, declared: int | None) -> None:
    if not _LEAST_RATE <= found <= _MOST_RATE:
        raise GraftError(
            f"{name} states a rate of {found} Hz; {_LEAST_RATE} to {_MOST_RATE} are possible: write it again with "
            "the rate that it was recorded at."
        )
    if declared is not None and declared != found:
        raise GraftError(
            f"{name} is declared as {declared} Hz and its header says {found} Hz: correct the one that is wrong."
        )


def _stretch(name: str, start: float | None, end: float | None, rate: int, frames: int) -> tuple[int, int]:
    """Turn a stretch in seconds into samples and check that it is in the file."""
    first = 0 if start is None else round(start * rate)
    last = frames if end is None else round(end * rate)
    # Ends are written with rounded decimals: a hundredth of a second behind the end is the end.
    if frames < last <= frames + 0.01 * rate:
        last = frames
    if frames and not 0 <= first < last <= frames:
        raise GraftError(
            f"{name} lasts {frames / rate:.2f} s; the stretch from {start or 0:g} to "
            f"{frames / rate if end is None else end:g} s is not in it: correct start and end."
        )
    return first, last


def _one_channel(samples: np.ndarray, channel: Channel, name: str) -> np.ndarray:
    """Choose from (T, channels): (T,) float32."""
    count = samples.shape[1]
    if channel == "mix" or count == 1:
        return np.ascontiguousarray(samples.mean(axis=1, dtype=np.float32))
    if count > 2:
        raise GraftError(f"{name} has {count} channels, so none is the {channel} one: use channel: mix.")
    return np.ascontiguousarray(samples[:, 0 if channel == "left" else 1])
