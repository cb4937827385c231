"""Speech backbones: Whisper, wav2vec2, HuBERT and WavLM, with the roles of their modules."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from common.errors import GraftError, unknown
from domains.speech.backbones._augment import SpecAugment
from domains.speech.backbones._backbone import SpeechBackbone, encode
from domains.speech.backbones._decoding import decode, generate
from domains.speech.backbones._starters import STARTERS, build_starter
from domains.speech.backbones._tokens import CharacterTokens, TextTokens, WhisperTokens
from domains.speech.backbones._torchaudio import PREFIX, load_bundle
from domains.speech.backbones._waves import WAVES, load_wave
from domains.speech.backbones._weights import from_source
from domains.speech.backbones._whisper import load_whisper

__all__ = [
    "CharacterTokens",
    "SpecAugment",
    "SpeechBackbone",
    "TextTokens",
    "WhisperTokens",
    "build",
    "decode",
    "encode",
    "generate",
]


def build(
    name: str,
    *,
    pretrained: bool = True,
    weights: str | None = None,
    layers: int | None = None,
    encoder_only: bool = False,
) -> SpeechBackbone:
    """Build a backbone.

    Args:
        name: `whisper-tiny-en`; a local folder or hub name (`OWNER/NAME`) of a Whisper, wav2vec2, HuBERT or WavLM of
            transformers; or a bundle of torchaudio, such as `torchaudio:WAV2VEC2_BASE`.
        pretrained: Load weights; False gives random ones (tests, from-scratch baselines).
        weights: A local file with the weights of the named starter or bundle.
        layers: Keep only the encoder's first so many blocks; not for a recogniser with a decoder. A pretrained network
            that is cut has no output layer of its own any more.
        encoder_only: Take a Whisper's encoder alone, for CTC and utterance classification, where a decoder never runs.

    Raises:
        GraftError: An unknown name, weights that cannot be had or do not fit, or a number of layers out of range.
    """
    if weights is not None and not pretrained:
        raise GraftError(f"'weights' is {weights} and pretrained is false. Leave one of them out.")
    if name in STARTERS:
        built = build_starter(name, pretrained=pretrained, weights=weights, encoder_only=encoder_only)
    elif name.startswith(PREFIX):
        built = load_bundle(name, pretrained=pretrained, weights=weights)
    elif weights is not None:
        raise GraftError(
            f"'{name}' brings its own weights. Leave out 'weights', or name one of: {', '.join(STARTERS)}."
        )
    elif Path(name).is_dir() or name.count("/") == 1:
        built = _load(name, pretrained=pretrained, encoder_only=encoder_only)
    else:
        raise unknown("speech backbone", name, (*STARTERS, "FOLDER", "OWNER/NAME", f"{PREFIX}BUNDLE"))
    if encoder_only and built.kind == "ctc":
        built = dataclasses.replace(built, kind="encoder", tokens=None, ctc_head=None)
    return built if layers is None else _cut(built, layers, pretrained=pretrained)


def _load(name: str, *, pretrained: bool, encoder_only: bool) -> SpeechBackbone:
    """Load a network of transformers, whose configuration says of which kind it is."""
    from transformers import AutoConfig

    config = from_source(name, AutoConfig)
    if config.model_type == "whisper":
        return load_whisper(name, name, config, pretrained=pretrained, encoder_only=encoder_only)
    if config.model_type in WAVES:
        return load_wave(name, name, config, pretrained=pretrained)
    raise unknown(f"kind of network in '{name}'", str(config.model_type), ("whisper", *WAVES))


def _cut(built: SpeechBackbone, layers: int, *, pretrained: bool) -> SpeechBackbone:
    """Take the encoder's last blocks off."""
    if built.kind == "seq2seq":
        raise GraftError(
            f"layers={layers}: the decoder of '{built.name}' reads what its whole encoder writes. Leave out 'layers', "
            "or take the encoder alone."
        )
    if not 1 <= layers <= built.layers:
        raise GraftError(f"layers={layers}: '{built.name}' has {built.layers} blocks; give 1 to {built.layers}.")
    model: Any = built.model
    owner = getattr(model, "encoder", model)
    owner = getattr(owner, "transformer", owner)
    owner.layers = owner.layers[:layers]
    if layers == built.layers or not pretrained:
        return dataclasses.replace(built, layers=layers)
    # The output layer reads what the last block writes, so it fits a cut network only where nothing was learnt yet.
    kind = "encoder" if built.kind == "ctc" else built.kind
    return dataclasses.replace(built, layers=layers, kind=kind, tokens=None, ctc_head=None)
