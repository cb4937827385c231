"""Whisper (Radford et al. 2022, arXiv 2212.04356): its encoder at any length of audio, and how one is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.errors import GraftError
from domains.speech.backbones._augment import SpecAugment
from domains.speech.backbones._backbone import SpeechBackbone
from domains.speech.backbones._families import WHISPER, WHISPER_ENCODER
from domains.speech.backbones._mel import RATE, STRIDE, log_mel
from domains.speech.backbones._tokens import WhisperTokens
from domains.speech.backbones._weights import from_source

HOP = 2 * STRIDE
_MULTILINGUAL = 51_865  # ids of the smallest vocabulary that has all languages


@dataclass(frozen=True, kw_only=True)
class WhisperFront:
    """Runs Whisper's encoder with the first of its positions, as many as the audio is long.

    Attributes:
        bands: Mel bands of its spectrogram.
        positions: Features of its whole context.
    """

    bands: int
    positions: int

    def frames(self, lengths: Tensor) -> Tensor:
        """Return how many features audio of these lengths, samples, has."""
        return (lengths + HOP - 1) // HOP

    def __call__(
        self, model: nn.Module, audio: Tensor, lengths: Tensor, *, full: bool, augment: SpecAugment | None, every: bool
    ) -> tuple[Tensor, Tensor]:
        """Run the encoder of a recogniser, or one that stands alone; see `encode`."""
        encoder: Any = getattr(model, "model", model)
        encoder = getattr(encoder, "encoder", encoder)
        own = self.frames(lengths)
        frames = self.positions if full else int(own.max())
        mel = log_mel(audio, 2 * frames, self.bands, 2 * self.positions)
        if augment is not None:
            time, bands = augment.masks(2 * own, 2 * frames, self.bands)
            mel = mel.masked_fill(time.unsqueeze(1) | bands.unsqueeze(2), 0.0)
        pieces = [mel] if torch.is_grad_enabled() or mel.device.type != "cpu" else mel.split(self._at_once(frames))
        features = torch.cat([self._run(encoder, piece, every=every) for piece in pieces])
        return features, torch.arange(frames, device=audio.device) < own.unsqueeze(1)

    def _at_once(self, frames: int) -> int:
        """Return how many clips of this many features a processor hears at a time: together one whole context.

        More of them leave its cache, and each of their activations is memory that the system has to find anew.
        """
        return max(1, self.positions // frames)

    @staticmethod
    def _run(encoder: Any, mel: Tensor, *, every: bool) -> Tensor:  # noqa: ANN401
        """Map a spectrogram (B, M, 2 F) to features (B, F, C), or (B, layers + 1, F, C)."""
        positions = encoder.embed_positions.weight[: mel.shape[2] // 2]
        hidden = functional.gelu(encoder.conv1(mel.to(positions.dtype)))
        hidden = functional.gelu(encoder.conv2(hidden)).transpose(1, 2) + positions
        hidden = functional.dropout(hidden, p=encoder.dropout, training=encoder.training)
        states = [hidden]
        for layer in encoder.layers:
            hidden = layer(hidden, None)
            states.append(hidden)
        hidden = encoder.layer_norm(hidden)
        return torch.stack([*states[:-1], hidden], dim=1) if every else hidden


def whisper(name: str, model: Any, tokens: WhisperTokens, *, encoder_only: bool) -> SpeechBackbone:  # noqa: ANN401
    """Make a backbone of a `WhisperForConditionalGeneration`, in eval mode and without the drop-out of layers."""
    config = model.config
    config.apply_spec_augment = False
    for side in (model.model.encoder, model.model.decoder):
        side.layerdrop = 0.0
    config.encoder_layerdrop = config.decoder_layerdrop = 0.0
    return SpeechBackbone(
        name=name,
        model=(model.model.encoder if encoder_only else model).eval(),
        family=WHISPER_ENCODER if encoder_only else WHISPER,
        kind="encoder" if encoder_only else "seq2seq",
        width=config.d_model,
        layers=config.encoder_layers,
        rate=RATE,
        hop=HOP,
        context=config.max_source_positions * HOP / RATE,
        tokens=None if encoder_only else tokens,
        ctc_head=None,
        front=WhisperFront(bands=config.num_mel_bins, positions=config.max_source_positions),
    )


def load_whisper(name: str, source: str, config: Any, *, pretrained: bool, encoder_only: bool) -> SpeechBackbone:  # noqa: ANN401
    """Load a Whisper of transformers.

    Args:
        name: What to call it.
        source: A local folder, or a name of the hub.
        config: Its configuration.
        pretrained: Take its weights; False takes its architecture, tokenizer and generation settings alone.
        encoder_only: Take the encoder alone.

    Raises:
        GraftError: It cannot be had or read.
    """
    from transformers import GenerationConfig, PreTrainedTokenizerFast, WhisperForConditionalGeneration

    if pretrained:
        model = from_source(source, WhisperForConditionalGeneration, weights=True)
    else:
        model = WhisperForConditionalGeneration(config)
        model.generation_config = from_source(source, GenerationConfig)
    tokenizer = from_source(source, PreTrainedTokenizerFast).backend_tokenizer
    multilingual = getattr(model.generation_config, "is_multilingual", None)
    if multilingual is None:
        multilingual = config.vocab_size >= _MULTILINGUAL
    try:
        tokens = WhisperTokens(
            tokenizer, size=config.vocab_size, multilingual=multilingual, pad=model.config.pad_token_id
        )
    except GraftError as error:
        raise GraftError(f"'{source}': {error}") from error
    return whisper(name, model, tokens, encoder_only=encoder_only)
