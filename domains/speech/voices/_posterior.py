"""The posterior encoder that Piper's files lack: distilled from the voice's own speech, where the latents are known."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common import artifacts
from common.attach import state_digest
from common.errors import GraftError
from common.loading import mix_seed
from domains.speech.voices._spectrum import magnitudes, mel_distance, stft_distance
from domains.speech.voices._vits import log_durations
from domains.speech.voices._voice import Voice, frames_of, read, speak

_VERSION = "2"  # of how it is distilled; part of the cache's key
LAYERS = 8
CROP = 64  # frames of an example
_NOISE = (0.3, 1.0)  # shares of the prior's deviation that the voice's speech is drawn with
_GAIN = (0.3, 1.5)  # factors of loudness that a recording may differ by
_LOWEST = -6.0  # of the logarithmic deviation


class Posterior(nn.Module):
    """A posterior encoder of VITS (arXiv 2106.06103, section 2.1): spectrogram to Gaussians of latents.

    A WaveNet without dilation, as transformers' `VitsPosteriorEncoder` has it, that reads log magnitudes: a distilled
    one has seen few loudnesses.

    Args:
        bins: Frequencies of the spectrogram.
        latents: Channels of the latents.
        width: Channels within; 0 takes as many as the latents have.
        layers: Layers of the WaveNet.
    """

    def __init__(self, bins: int, latents: int, width: int = 0, layers: int = LAYERS) -> None:
        super().__init__()
        from torch.nn.utils import parametrize
        from transformers import VitsConfig
        from transformers.models.vits.modeling_vits import VitsPosteriorEncoder

        config = VitsConfig(
            spectrogram_bins=bins,
            flow_size=latents,
            hidden_size=width or latents,
            posterior_encoder_num_wavenet_layers=layers,
            wavenet_kernel_size=5,
            wavenet_dilation_rate=1,
        )
        self.net: Any = VitsPosteriorEncoder(config)
        for module in self.net.modules():
            if parametrize.is_parametrized(module, "weight"):
                parametrize.remove_parametrizations(module, "weight")

    def forward(self, spectrum: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and logarithmic deviation, each (B, latents, F).

        Args:
            spectrum: Magnitudes (B, bins, F).
            mask: (B, 1, F), 1 at frames of the recording.
        """
        _, mean, log_scale = self.net((spectrum.log() + 4.0) / 4.0, mask)
        return mean, log_scale.clamp(min=_LOWEST)


class Pair(NamedTuple):
    """What a voice said and the latents that it said it with: (C, F) and (F * hop,)."""

    latents: Tensor
    audio: Tensor


def speak_pairs(voice: Voice, lines: Sequence[str], seconds: float, seed: int) -> list[Pair]:
    """Let a voice say lines and keep the latents.

    Args:
        voice: The voice, unadapted.
        lines: Texts; those that it cannot say are passed over.
        seconds: How much speech to make; the lines are repeated with other draws where they are too few.
        seed: Seed of the order and of all draws.

    Raises:
        GraftError: It can say none of the lines.
    """
    spelled = [voice.symbols.encode(found) for found in (_spelled(voice, line) for line in lines) if found]
    if not spelled:
        raise GraftError(f"'{voice.name}' can say none of the {len(lines)} lines. Give text in its language.")
    generator = torch.Generator().manual_seed(seed)
    wanted, made, pairs = int(seconds * voice.rate), 0, []
    net: Any = voice.model

    def draw(scale: Tensor) -> Tensor:
        low, high = _NOISE
        share = low + (high - low) * float(torch.rand(1, generator=generator))
        return share * scale * torch.randn(scale.shape, generator=generator)

    for number in range(len(spelled) * 100):
        if number % len(spelled) == 0:
            order = torch.randperm(len(spelled), generator=generator).tolist()
        ids = torch.tensor(spelled[order[number % len(spelled)]])
        with torch.no_grad():
            prior = read(net, ids[None], torch.tensor([len(ids)]))
            start = torch.randn(1, 2, len(ids), generator=generator) * voice.duration_noise
            frames = frames_of(log_durations(net, prior.hidden, prior.mask, start), prior.mask)
            pairs.append(Pair(*speak(net, prior, frames, draw)))
        made += len(pairs[-1].audio)
        if made >= wanted:
            break
    return pairs


def distil(
    voice: Voice,
    pairs: Sequence[Pair],
    *,
    steps: int = 600,
    batch: int = 16,
    lr: float = 1e-3,
    seed: int = 0,
    sound: float = 1.0,
    width: int = 0,
    layers: int = LAYERS,
) -> Posterior:
    """Train a posterior encoder on what a voice said.

    The loss is the Gaussian negative log-likelihood of the latents, the mean over channels and frames of
    0.5 ((z - m) / s)^2 + log s, and `sound` times what the frozen decoder makes of drawn latents, against what was
    said: most directions of the latents are hardly audible, and the likelihood alone weighs all alike. It is no
    approximation of VITS' own posterior, which saw recordings, but the inverse of the decoder on the decoder's speech;
    how well it reads a recording of someone else is for a run to show.

    Args:
        voice: The voice.
        pairs: What `speak_pairs` returned.
        steps: Steps of Adam with a cosine schedule.
        batch: Crops of `CROP` frames in a step.
        lr: Highest learning rate.
        seed: Seed of the start and of the crops.
        sound: Weight of mel distance plus half the STFT distance, on a quarter of the crops.
        width: Channels within; see `Posterior`.
        layers: Layers of its WaveNet.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix_seed(seed, 7))
        posterior = Posterior(voice.bins, voice.latents, width, layers)
    spectra = [magnitudes(pair.audio[None], 2 * (voice.bins - 1), voice.hop)[0] for pair in pairs]
    trained = [parameter for parameter in voice.model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    optimizer = torch.optim.AdamW(posterior.parameters(), lr=lr, betas=(0.8, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    weights = torch.tensor([float(pair.latents.shape[1]) for pair in pairs])
    quiet, console = not sys.stderr.isatty(), Console(stderr=True)
    for _ in track(range(steps), "distilling a posterior encoder", console=console, transient=True, disable=quiet):
        chosen = torch.multinomial(weights, batch, replacement=True, generator=generator).tolist()
        crops = [_crop(spectra[place], pairs[place], voice.hop, generator) for place in chosen]
        loss = _reading_loss(voice, posterior, crops, sound, generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(posterior.parameters(), 5.0)
        optimizer.step()
        schedule.step()
    for parameter in trained:
        parameter.requires_grad_(True)
    return posterior.eval().requires_grad_(False)


def _reading_loss(
    voice: Voice, posterior: Posterior, crops: Sequence[tuple[Tensor, ...]], sound: float, generator: torch.Generator
) -> Tensor:
    """Compare what a posterior encoder reads in crops with what they were said with, at loudnesses that are drawn."""
    spectrum, latents, audio = (torch.stack(part) for part in zip(*crops, strict=True))
    low, high = _GAIN
    gain = low + (high - low) * torch.rand(len(crops), 1, 1, generator=generator)
    mean, log_scale = posterior(spectrum * gain, spectrum.new_ones(len(crops), 1, CROP))
    inside = slice(8, -8)  # a crop's ends lack their neighbours
    loss = gaussian_loss(latents[..., inside], mean[..., inside], log_scale[..., inside])
    if sound:
        few = slice(max(1, len(crops) // 4))
        drawn = mean[few] + torch.randn(mean[few].shape, generator=generator) * log_scale[few].exp()
        loss = loss + sound * _sound_loss(voice, drawn, audio[few])
    return loss


def gaussian_loss(latents: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Return the mean negative log-likelihood of latents, without its constant."""
    return (0.5 * ((latents - mean) * (-log_scale).exp()).square() + log_scale).mean()


def posterior_of(voice: Voice, lines: Sequence[str], *, seconds: float, steps: int, seed: int = 0) -> Posterior:
    """Return a voice's distilled posterior encoder: the catalog's, or one made once and kept in the cache.

    The catalog's row is named as the voice's with `-posterior` behind; its file is what `load_posterior` reads.

    Args:
        voice: The voice, unadapted.
        lines: Texts that it may say.
        seconds: How much of its own speech it is distilled from.
        steps: Steps of `distil`.
        seed: Seed of all.

    Raises:
        GraftError: The voice can say none of the lines, or the cache cannot be written.
    """
    if f"{voice.name}-posterior" in artifacts.catalog():
        return load_posterior(voice, artifacts.fetch(f"{voice.name}-posterior"))
    digest = hashlib.sha256()
    for part in (_VERSION, state_digest(voice.model), seconds, steps, seed, *lines):
        digest.update(f"{part}\n".encode())

    def build(folder: Path) -> None:
        made = distil(voice, speak_pairs(voice, lines, seconds, seed), steps=steps, seed=seed)
        save_file(dict(made.state_dict()), folder / _FILE)

    file = artifacts.prepared(f"posterior-{digest.hexdigest()[:32]}", build) / _FILE
    return load_posterior(voice, file)


_FILE = "posterior.safetensors"


def load_posterior(voice: Voice, file: Path) -> Posterior:
    """Read the weights of a voice's posterior encoder, in whole or half precision.

    Raises:
        GraftError: It is missing, damaged or of another voice.
    """
    posterior = Posterior(voice.bins, voice.latents)
    try:
        posterior.load_state_dict({name: tensor.float() for name, tensor in load_file(file).items()})
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise GraftError(f"{file} is no posterior encoder of '{voice.name}' ({reason}). Leave it out.") from error
    return posterior.eval().requires_grad_(False)


def _spelled(voice: Voice, line: str) -> str:
    try:
        return voice.symbols.spell(line)
    except GraftError:
        return ""  # a line that this voice cannot say teaches it nothing


def _crop(spectrum: Tensor, pair: Pair, hop: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Cut the same frames out of spectrogram, latents and sound; what is shorter is repeated."""
    frames = pair.latents.shape[1]
    if frames < CROP:
        times = math.ceil(CROP / frames)
        whole = pair.audio[: frames * hop].repeat(times)[: CROP * hop]
        return spectrum.repeat(1, times)[:, :CROP], pair.latents.repeat(1, times)[:, :CROP], whole
    start = int(torch.randint(frames - CROP + 1, (1,), generator=generator))
    span = slice(start, start + CROP)
    return spectrum[:, span], pair.latents[:, span], pair.audio[start * hop : (start + CROP) * hop]


def _sound_loss(voice: Voice, latents: Tensor, audio: Tensor) -> Tensor:
    """Decode the middle half of crops (B, C, CROP) with the frozen decoder and compare it with what was said."""
    net: Any = voice.model
    quarter = CROP // 4
    made = net.decoder(latents[..., quarter:-quarter])[:, 0]
    wanted = audio[:, quarter * voice.hop : -quarter * voice.hop]
    return mel_distance(made, wanted, voice.rate, voice.hop) + 0.5 * stft_distance(made, wanted)
