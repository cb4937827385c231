"""Encoders that read the waveform: wav2vec 2.0 (arXiv 2006.11477), HuBERT (2106.07447) and WavLM (2110.13900)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.errors import GraftError
from common.roles import Family
from domains.speech.backbones._augment import SpecAugment
from domains.speech.backbones._backbone import SpeechBackbone
from domains.speech.backbones._families import HUBERT, WAV2VEC2, WAVLM
from domains.speech.backbones._tokens import CharacterTokens
from domains.speech.backbones._wavlm import call_projections
from domains.speech.backbones._weights import from_source

_MASK = "masked_spec_embed"
_BOUNDARY = "|"


@dataclass(frozen=True, kw_only=True)
class WaveFront:
    """Runs an encoder of waveforms by its three parts, so that SpecAugment can stand between them.

    Attributes:
        library: Whose network it is.
        windows: Kernel and stride of each convolution, samples.
        epsilon: What is added to an utterance's variance when it is normalised; None where it is not.
        masked: Whether the blocks are told which features are padding. Networks whose first convolution is normalised
            over time were trained without, and read the padding as silence.
    """

    library: Literal["transformers", "torchaudio"]
    windows: tuple[tuple[int, int], ...]
    epsilon: float | None
    masked: bool

    @property
    def hop(self) -> int:
        """Samples from one feature to the next."""
        return math.prod(stride for _, stride in self.windows)

    def frames(self, lengths: Tensor) -> Tensor:
        """Return how many features audio of these lengths, samples, has."""
        for kernel, stride in self.windows:
            lengths = torch.div(lengths - kernel, stride, rounding_mode="floor") + 1
        return lengths

    def __call__(
        self, model: nn.Module, audio: Tensor, lengths: Tensor, *, full: bool, augment: SpecAugment | None, every: bool
    ) -> tuple[Tensor, Tensor]:
        """Run the network; see `encode`."""
        network: Any = model
        own = self.frames(lengths)
        if self.epsilon is not None:
            audio = _normalised(audio, lengths, self.epsilon)
        hf = self.library == "transformers"
        extractor = network.feature_extractor
        audio = audio.to(extractor.conv_layers[0].conv.weight.dtype)
        local = extractor(audio).transpose(1, 2) if hf else extractor(audio, None)[0]  # (B, F, channels)
        hidden = network.feature_projection(local) if hf else network.encoder.feature_projection(local)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        mask = torch.arange(hidden.shape[1], device=audio.device) < own.unsqueeze(1)
        if augment is not None:
            hidden = _hide(hidden, own, augment, getattr(network, _MASK, None))
        blocks = network.encoder.layers if hf else network.encoder.transformer.layers
        with _states(blocks) if every else contextlib.nullcontext([]) as states:
            hidden = self._blocks(network, hidden, mask)
        return (torch.stack([*states[:-1], hidden], dim=1) if every else hidden), mask

    def _blocks(self, network: Any, hidden: Tensor, mask: Tensor) -> Tensor:  # noqa: ANN401
        if self.library == "transformers":
            return network.encoder(hidden, attention_mask=mask if self.masked else None).last_hidden_state
        if not self.masked:
            return network.encoder.transformer(hidden)
        hidden = hidden.masked_fill(~mask.unsqueeze(2), 0.0)
        batch, frames = mask.shape
        apart = torch.zeros(batch, 1, 1, frames, dtype=hidden.dtype, device=hidden.device)
        apart = apart.masked_fill(~mask[:, None, None, :], -1e4).expand(batch, 1, frames, frames)
        return network.encoder.transformer(hidden, attention_mask=apart)


def _normalised(audio: Tensor, lengths: Tensor, epsilon: float) -> Tensor:
    """Bring each utterance (B, T) to mean 0 and variance 1, and leave zeros behind its end."""
    inside = torch.arange(audio.shape[1], device=audio.device) < lengths.unsqueeze(1)
    audio = audio.float() * inside
    count = lengths.unsqueeze(1)
    centred = (audio - audio.sum(dim=1, keepdim=True) / count) * inside
    variance = centred.square().sum(dim=1, keepdim=True) / count
    return centred / (variance + epsilon).sqrt()


def _hide(hidden: Tensor, lengths: Tensor, augment: SpecAugment, stand_in: Tensor | None) -> Tensor:
    """Put the network's own mask vector, or zeros, in place of hidden time, and zeros in place of hidden channels."""
    time, bands = augment.masks(lengths, hidden.shape[1], hidden.shape[2])
    if stand_in is None:
        hidden = hidden.masked_fill(time.unsqueeze(2), 0.0)
    else:
        hidden = torch.where(time.unsqueeze(2), stand_in.to(hidden.dtype), hidden)
    return hidden.masked_fill(bands.unsqueeze(1), 0.0)


@contextlib.contextmanager
def _states(blocks: nn.ModuleList) -> Generator[list[Tensor]]:
    """Collect what goes into the first block and what comes out of each."""
    states: list[Tensor] = []

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        states.append(inputs[0])

    def behind(module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ANN401
        states.append(output[0] if isinstance(output, tuple) else output)

    handles = [blocks[0].register_forward_pre_hook(before)]
    handles += [block.register_forward_hook(behind) for block in blocks]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """A kind of network: transformers' classes without and with an output layer, the encoder's name in these, roles."""

    plain: str
    ctc: str
    inside: str
    family: Family
    mend: Callable[[nn.Module], None] = lambda model: None


WAVES = {
    "wav2vec2": _Kind(plain="Wav2Vec2Model", ctc="Wav2Vec2ForCTC", inside="wav2vec2", family=WAV2VEC2),
    "hubert": _Kind(plain="HubertModel", ctc="HubertForCTC", inside="hubert", family=HUBERT),
    "wavlm": _Kind(plain="WavLMModel", ctc="WavLMForCTC", inside="wavlm", family=WAVLM, mend=call_projections),
}
"""The networks of waveforms by transformers' `model_type`."""


def load_wave(name: str, source: str, config: Any, *, pretrained: bool) -> SpeechBackbone:  # noqa: ANN401
    """Load an encoder of waveforms of transformers, with its CTC output layer where the checkpoint has one.

    Args:
        name: What to call it.
        source: A local folder, or a name of the hub.
        config: Its configuration.
        pretrained: Take its weights; False takes its architecture, vocabulary and input settings alone.

    Raises:
        GraftError: It cannot be had or read, or has parts that are not known here.
    """
    import transformers

    kind = WAVES[config.model_type]
    if getattr(config, "add_adapter", False):
        raise GraftError(
            f"'{source}' shortens its features by convolutions behind its blocks (add_adapter), which is not known "
            "here. Take a checkpoint without."
        )
    with_output = any(str(shape).endswith("ForCTC") for shape in config.architectures or ())
    cls = getattr(transformers, kind.ctc if with_output else kind.plain)
    if pretrained:
        whole = from_source(source, cls, weights=True, optional=(_MASK, f"{kind.inside}.{_MASK}"))
    else:
        whole = cls(config)
    model = getattr(whole, kind.inside) if with_output else whole
    kind.mend(model)
    _quiet(model)
    extractor = from_source(source, transformers.Wav2Vec2FeatureExtractor)
    front = WaveFront(
        library="transformers",
        windows=tuple(zip(config.conv_kernel, config.conv_stride, strict=True)),
        epsilon=1e-7 if extractor.do_normalize else None,
        masked=config.feat_extract_norm == "layer",
    )
    return SpeechBackbone(
        name=name,
        model=model.eval(),
        family=kind.family,
        kind="ctc" if with_output else "encoder",
        width=config.hidden_size,
        layers=config.num_hidden_layers,
        rate=extractor.sampling_rate,
        hop=front.hop,
        context=None,
        tokens=_vocabulary(source, config) if with_output else None,
        ctc_head=whole.lm_head.eval() if with_output else None,
        front=front,
    )


def _quiet(model: Any) -> None:  # noqa: ANN401
    """Take out what the network would do of itself in training: its own masks, and the drop-out of whole blocks.

    The vector that stands for hidden time stays as it was pretrained: it is a buffer under the same name. Nothing below
    the convolutions asks for a gradient, so no graph of them is kept unless something in them trains.
    """
    config = model.config
    config.layerdrop = 0.0
    config.apply_spec_augment = False
    model.feature_extractor._requires_grad = False
    if hasattr(model, _MASK):
        vector = getattr(model, _MASK).detach().clone()
        delattr(model, _MASK)
        model.register_buffer(_MASK, vector)


def _vocabulary(source: str, config: Any) -> CharacterTokens:  # noqa: ANN401
    """Read the characters of a checkpoint off its tokenizer."""
    from transformers import Wav2Vec2CTCTokenizer

    tokenizer = from_source(source, Wav2Vec2CTCTokenizer)
    found = tokenizer.get_vocab()
    boundary = tokenizer.word_delimiter_token or _BOUNDARY
    if tokenizer.pad_token is None or not all(isinstance(index, int) for index in found.values()):
        raise GraftError(
            f"'{source}' has no plain vocabulary of characters with a blank. Take one of a single language, or train "
            "an output layer of your own."
        )
    names = {" " if name == boundary else name: index for name, index in found.items()}
    letters = {name: index for name, index in names.items() if len(name) == 1 and index < config.vocab_size}
    return CharacterTokens(letters, blank=tokenizer.pad_token_id, size=config.vocab_size)
