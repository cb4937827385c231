"""Voices that speak by way of a mel spectrogram and a vocoder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.errors import GraftError
from common.task import Backbone
from domains.speech.backbones._backbone import bare
from domains.speech.backbones._weights import from_source
from domains.speech.voices._objective import Lines
from domains.speech.voices._starters import hop_of
from domains.speech.voices._symbols import Symbols

ADVICE = "Connect to the hub, or give a local folder as transformers saves one."


@dataclass(frozen=True)
class MelFront:
    """The log-mel spectrogram that a network was trained on.

    With x the recording, reflected by half a window at both ends, w the window, M the mel filters and f a frame,
    log10(max(floor, M |FFT(w x[f hop : f hop + width])|)).

    Attributes:
        window: (width,).
        filters: (transform // 2 + 1, bands).
        hop: Samples from one frame to the next.
        transform: Samples of the transform; a narrower window is padded behind its end.
        floor: Least value of a band before the logarithm.
    """

    window: Tensor
    filters: Tensor
    hop: int
    transform: int
    floor: float

    def frames(self, samples: int) -> int:
        """Return how many frames a recording has."""
        return 1 + samples // self.hop

    def magnitudes(self, audio: Tensor) -> Tensor:
        """Return the magnitudes (F, transform // 2 + 1) of a recording (T,), longer than half a window."""
        edge = len(self.window) // 2
        padded = functional.pad(audio.float()[None, None], (edge, edge), mode="reflect")[0, 0]
        cut = padded.unfold(0, len(self.window), self.hop) * self.window.to(audio.device)
        return torch.fft.rfft(cut, self.transform).abs()

    def bands(self, magnitudes: Tensor) -> Tensor:
        """Return log-mel bands (F, bands) of magnitudes."""
        return (magnitudes @ self.filters.to(magnitudes.device)).clamp(min=self.floor).log10()

    def __call__(self, audio: Tensor) -> Tensor:
        """Return log-mel bands (F, bands) of a recording (T,), longer than half a window."""
        with torch.autocast(audio.device.type, enabled=False):  # half precision would round soft bands away
            return self.bands(self.magnitudes(audio))


class Target(NamedTuple):
    """What a network's loss on one recording compares with; a network that finds its own pace needs the first alone.

    Attributes:
        mel: The spectrogram as the network writes it, (F, bands).
        durations: Frames of each symbol, int64 (L,), which sum up to F.
        pitch: Pitch of each symbol as the network's predictor writes it, (L,).
        energy: Energy of each symbol as the network's predictor writes it, (L,).
    """

    mel: Tensor
    durations: Tensor | None = None
    pitch: Tensor | None = None
    energy: Tensor | None = None

    def to(self, device: torch.device) -> Target:
        """Return it on a device."""
        return Target(*(None if part is None else part.to(device) for part in self))


class Teacher(Protocol):
    """Makes of a recording what the loss compares with.

    Attributes:
        figures: What it measured beforehand, as plain values for the run's record; empty where it measured nothing.
    """

    figures: Mapping[str, Any]

    def __call__(self, ids: Tensor, audio: Tensor) -> Target:
        """Return the target of a recording (T,) of ids (L,)."""
        ...


class Talker(Protocol):
    """What one kind of network does with texts, targets and a speaker vector; `net` has no wrapper around it.

    The speaker vector is None where the network reads none.
    """

    def teacher(self, voice: MelVoice, net: Any, speaker: Tensor | None) -> Teacher:  # noqa: ANN401
        """Return what makes targets of recordings, given the voice as it came, in eval mode.

        Raises:
            GraftError: What it has to know of the voice cannot be found out.
        """
        ...

    def loss(self, net: Any, lines: Lines, targets: Sequence[Target], speaker: Tensor | None) -> dict[str, Tensor]:  # noqa: ANN401
        """Return the parts of the network's own loss."""
        ...

    def everything(self, net: Any, lines: Lines, mels: Sequence[Tensor], speaker: Tensor | None) -> Tensor:  # noqa: ANN401
        """Run all parts of the network, (B, N), so that a gradient reaches each; `mels` (F_i, bands) may be any."""
        ...

    def say(self, net: Any, ids: Tensor, speaker: Tensor | None, longest: float) -> Tensor:  # noqa: ANN401
        """Return the spectrogram (F, bands) of ids (L,), no longer than `longest` frames a symbol."""
        ...


@dataclass(frozen=True, kw_only=True)
class MelVoice(Backbone):
    """A network from text to a mel spectrogram, and what is known of it.

    Attributes:
        symbols: How it reads.
        rate: Sampling rate, Hz.
        bands: Mel bands.
        speaker_width: Width of its speaker vector; 0 where it reads none.
        most_symbols: Most symbols that it reads at once, ends included.
        most_frames: Most frames that it writes.
        front: How recordings become its spectrograms.
        vocoder: From spectrograms (F, bands) to waveforms (T,); frozen, and no part of `model`.
        talker: How it is trained and speaks.
    """

    symbols: Symbols
    rate: int
    bands: int
    speaker_width: int
    most_symbols: int
    most_frames: int
    front: MelFront
    vocoder: nn.Module
    talker: Talker

    def sound(self, mel: Tensor) -> Tensor:
        """Turn a spectrogram (F, bands) into a waveform, (T,) float32 in [-1, 1]."""
        with torch.no_grad():
            return self.vocoder.to(mel.device)(mel.float()).float()


def say(
    voice: MelVoice,
    model: nn.Module,
    ids: Tensor,
    speaker: Tensor | None = None,
    *,
    longest: float = 20.0,
    seed: int = 0,
) -> Tensor:
    """Speak one line.

    Args:
        voice: What `build_mel_voice` returned.
        model: Its network, bare or with adapters, in eval mode.
        ids: (L,), of `voice.symbols.encode`.
        speaker: The speaker vector, (`voice.speaker_width`,); None for a voice that reads none.
        longest: Most frames of each symbol.
        seed: Seed of what the network draws; on one machine the same seed speaks the same samples.

    Returns:
        (T,) float32 in [-1, 1] at `voice.rate`.
    """
    with torch.no_grad(), draws(seed, ids.device):
        return voice.sound(voice.talker.say(bare(model), ids, speaker, longest))


@contextlib.contextmanager
def draws(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from a seed, and leave the random state as it was."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def source_file(source: str, name: str) -> Path:
    """Return a file of a local folder or of the hub.

    Raises:
        GraftError: It cannot be had.
    """
    from transformers.utils.hub import cached_file

    try:
        return Path(str(cached_file(source, name)))
    except OSError as error:
        reason = " ".join(str(error).split()).split(". ")[0]
        raise GraftError(f"'{source}' has no {name} that could be had ({reason}). {ADVICE}") from error


def load_vocoder(
    source: str,
    kind: Any,  # noqa: ANN401
    *,
    bands: int,
    rate: int | None = None,
    hop: int | None = None,
) -> Any:  # noqa: ANN401
    """Load a HiFi-GAN (arXiv 2010.05646) that fits a network, frozen.

    Args:
        source: A local folder, or a name of the hub.
        kind: Its class in transformers.
        bands: Mel bands that the network writes.
        rate: The network's sampling rate, Hz; None where it does not say.
        hop: Samples of a frame; None where the network does not say.

    Raises:
        GraftError: It cannot be had or read, or belongs to other spectrograms.
    """
    from transformers import AutoConfig

    advice = f"Give a {kind.__name__} as 'vocoder', by its folder or its name on the hub."
    config: Any = from_source(source, AutoConfig, advice=advice)
    if config.model_type != kind.config_class.model_type:
        raise GraftError(f"'{source}' is a {config.model_type}. {advice}")
    rate_of = getattr(config, "sampling_rate", None)
    found = {"bands": config.model_in_dim, "rate": rate_of, "samples a frame": hop_of(config)}
    wanted = {"bands": bands, "rate": rate, "samples a frame": hop}
    wanted = {name: want for name, want in wanted.items() if want is not None}
    odd = [f"{name} {found[name]} instead of {wanted[name]}" for name in wanted if found[name] != wanted[name]]
    if odd:
        raise GraftError(f"The vocoder '{source}' has {', '.join(odd)}. Take the vocoder of this voice.")
    model: Any = from_source(source, kind, weights=True, advice=advice)
    return model.eval().requires_grad_(False)
