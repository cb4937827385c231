"""What a voice is taught by on the route of conversion: its own speech with another speaker's pitch and timbre."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from common import artifacts
from common.attach import state_digest
from common.errors import GraftError
from common.frozen import content
from common.loading import mix_seed
from domains.speech.voices._conversion import fit_conversion
from domains.speech.voices._vits import log_durations
from domains.speech.voices._voice import Voice, frames_of, read, speak
from domains.speech.voices._world import analyse, render

_VERSION = "1"  # of how lessons are made; part of the cache's key
_FILE = "lessons.safetensors"
_LOUDEST = 32_767


class Lesson(NamedTuple):
    """A line as the voice said it, and what it should have sounded like.

    Attributes:
        durations: Frames of each symbol, int64 (L,).
        drawn: What was drawn for the latents, of deviation 1, (C, F).
        audio: The converted speech, (F * hop,).
    """

    durations: Tensor
    drawn: Tensor
    audio: Tensor


def lessons_of(
    voice: Voice, lines: Mapping[str, Tensor], clips: Mapping[str, Tensor], seed: int = 0
) -> dict[str, Lesson]:
    """Let a voice say lines, and convert what it said; it is made once and kept in the cache.

    A text, its durations and what was drawn for its latents decide each frame of a synthesis, so that converted speech
    is aligned to the voice's own latents frame by frame: no alignment has to be guessed, and no words are lost by one.

    Args:
        voice: The voice, unadapted.
        lines: Ids (L,) of each text that a lesson is wanted for.
        clips: Recordings (T,) of the target speaker at `voice.rate` by text, from which the conversion is learned; each
            text is one of the lines.
        seed: Seed of all draws.

    Raises:
        GraftError: There is too little speech, or the cache cannot be written.
    """
    digest = hashlib.sha256(f"{_VERSION}\n{state_digest(voice.model)}\n{seed}\n".encode())
    for text, ids in lines.items():
        digest.update(f"{text}\n{ids.tolist()}\n".encode())
    for text, clip in clips.items():
        digest.update(f"{text}\n{content(clip).hex()}\n".encode())

    def build(folder: Path) -> None:
        save_file(_converted(voice, lines, clips, seed), folder / _FILE)

    file = artifacts.prepared(f"lessons-{digest.hexdigest()[:32]}", build) / _FILE
    try:
        stored = load_file(file)
        return {
            text: Lesson(
                durations=stored[f"durations.{place}"],
                drawn=_drawn(voice, int(stored[f"durations.{place}"].sum()), mix_seed(seed, place)),
                audio=stored[f"audio.{place}"].float() / _LOUDEST,
            )
            for place, text in enumerate(lines)
        }
    except (OSError, KeyError, SafetensorError) as error:
        raise GraftError(f"The prepared file {file} is damaged ({error}): delete its folder and run again.") from error


def _converted(voice: Voice, lines: Mapping[str, Tensor], clips: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Return durations and converted speech, in 16 bits, of each line by its place."""
    said = {}
    for place, (text, ids) in enumerate(_shown(lines, "letting the voice say the lines")):
        said[text] = _say(voice, ids, mix_seed(seed, place))
    found = {text: analyse(audio, voice.rate) for text, (_, audio) in _shown(said, "analysing the voice's speech")}
    heard = {text: analyse(clip, voice.rate) for text, clip in _shown(clips, "analysing the recordings")}
    conversion = fit_conversion([(found[text], heard[text]) for text in heard], seed)
    made: dict[str, Tensor] = {}
    for place, (text, (durations, audio)) in enumerate(_shown(said, "converting the voice's speech")):
        converted = render(audio, voice.rate, found[text], conversion(found[text])).clamp(-1.0, 1.0)
        made |= {f"durations.{place}": durations, f"audio.{place}": (converted * _LOUDEST).round().short()}
    return made


def _say(voice: Voice, ids: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return durations (L,) and speech (F * hop,) of a line, at the voice's own noise."""
    net: Any = voice.model
    with torch.no_grad():
        prior = read(net, ids[None], torch.tensor([len(ids)]))
        start = torch.randn(1, 2, len(ids), generator=torch.Generator().manual_seed(mix_seed(seed, 1)))
        logs = log_durations(net, prior.hidden, prior.mask, start * voice.duration_noise)
        durations = frames_of(logs, prior.mask)[0].long()
        drawn = _drawn(voice, int(durations.sum()), seed)
        return durations, speak(net, prior, durations[None], lambda scale: voice.noise * scale * drawn)[1]


def _drawn(voice: Voice, frames: int, seed: int) -> Tensor:
    return torch.randn(voice.latents, frames, generator=torch.Generator().manual_seed(seed))


def _shown(items: Mapping[str, Any], doing: str) -> Any:  # noqa: ANN401
    """Iterate over items with a bar where somebody looks."""
    console = Console(stderr=True)
    return track(items.items(), doing, console=console, transient=True, disable=not sys.stderr.isatty())
