"""Voices that speak by way of a mel spectrogram and a vocoder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

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

    def __call__(self, audio: Tensor) -> Tensor:
        """Return log-mel bands (F, bands) of a recording (T,), longer than half a window."""
        with torch.autocast(audio.device.type, enabled=False):  # half precision would round soft bands away
            edge = len(self.window) // 2
            padded = functional.pad(audio.float()[None, None], (edge, edge), mode="reflect")[0, 0]
            cut = padded.unfold(0, len(self.window), self.hop) * self.window.to(audio.device)
            magnitudes = torch.fft.rfft(cut, self.transform).abs()
            return (magnitudes @ self.filters.to(audio.device)).clamp(min=self.floor).log10()


class Talker(Protocol):
    """What one kind of network does with texts, spectrograms and a speaker vector; `net` has no wrapper around it."""

    def loss(self, net: Any, lines: Lines, mels: list[Tensor], speaker: Tensor) -> dict[str, Tensor]:  # noqa: ANN401
        """Return the parts of the network's own loss on target spectrograms (F_i, bands)."""
        ...

    def everything(self, net: Any, lines: Lines, mels: list[Tensor], speaker: Tensor) -> Tensor:  # noqa: ANN401
        """Run all parts of the network, (B, N), so that a gradient reaches each."""
        ...

    def say(self, net: Any, ids: Tensor, speaker: Tensor, longest: float) -> Tensor:  # noqa: ANN401
        """Return the spectrogram (F, bands) of ids (L,), no longer than `longest` frames a symbol."""
        ...


@dataclass(frozen=True, kw_only=True)
class MelVoice(Backbone):
    """A network from text to a mel spectrogram, and what is known of it.

    Attributes:
        symbols: How it reads.
        rate: Sampling rate, Hz.
        bands: Mel bands.
        speaker_width: Width of its speaker vector.
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
    voice: MelVoice, model: nn.Module, ids: Tensor, speaker: Tensor, *, longest: float = 20.0, seed: int = 0
) -> Tensor:
    """Speak one line.

    Args:
        voice: What `build_mel_voice` returned.
        model: Its network, bare or with adapters, in eval mode.
        ids: (L,), of `voice.symbols.encode`.
        speaker: The speaker vector, (`voice.speaker_width`,).
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


def load_vocoder(source: str, kind: Any, *, bands: int, rate: int, hop: int) -> nn.Module:  # noqa: ANN401
    """Load a HiFi-GAN (arXiv 2010.05646) that fits a network, frozen.

    Args:
        source: A local folder, or a name of the hub.
        kind: Its class in transformers.
        bands: Mel bands that the network writes.
        rate: The network's sampling rate, Hz.
        hop: Samples of a frame.

    Raises:
        GraftError: It cannot be had or read, or belongs to other spectrograms.
    """
    from transformers import AutoConfig

    advice = f"Give a {kind.__name__} as 'vocoder', by its folder or its name on the hub."
    config: Any = from_source(source, AutoConfig, advice=advice)
    if config.model_type != kind.config_class.model_type:
        raise GraftError(f"'{source}' is a {config.model_type}. {advice}")
    found = {"bands": config.model_in_dim, "rate": config.sampling_rate, "samples a frame": hop_of(config)}
    wanted = {"bands": bands, "rate": rate, "samples a frame": hop}
    odd = [f"{name} {found[name]} instead of {wanted[name]}" for name in wanted if found[name] != wanted[name]]
    if odd:
        raise GraftError(f"The vocoder '{source}' has {', '.join(odd)}. Take the vocoder of this voice.")
    model: nn.Module = from_source(source, kind, weights=True, advice=advice)
    return model.eval().requires_grad_(False)
