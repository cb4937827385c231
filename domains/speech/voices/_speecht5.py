"""SpeechT5 (arXiv 2110.07205) as a voice: from characters to a mel spectrogram, frame by frame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import GraftError
from domains.speech.backbones._weights import from_source
from domains.speech.voices._characters import Characters, read_characters
from domains.speech.voices._families import SPEECHT5
from domains.speech.voices._mel_voice import ADVICE, MelFront, MelVoice, Target, load_vocoder, source_file
from domains.speech.voices._objective import Lines

_VOCABULARY = "spm_char.model"
_IGNORED = -100.0  # what the network's loss leaves out


class SpeechT5Talker:
    """Trains by the network's own loss and speaks by its own generation.

    The decoder's prenet drops half of its units in every mode, as its authors do for variety: draws are the caller's to
    seed. With y the target, y' and y'' the spectrograms before and after the postnet, s the logits of the end, A the
    weights of cross-attention (L symbols, F frames), the loss is

    |y' - y|_1 + |y'' - y|_1 + BCE(s, end) + 10 mean(A (1 - exp(-(l / L - f / F)^2 / (2 0.4^2)))),

    the first two as means over bands and frames, the third with weight 5 on the end, the last, the guided attention of
    arXiv 1710.08969, over the first two heads of each layer, or as the folder's configuration says.
    """

    def teacher(self, voice: MelVoice, net: Any, speaker: Tensor | None) -> SpeechT5Teacher:  # noqa: ANN401
        """Return what makes spectrograms of recordings; see `Talker`."""
        return SpeechT5Teacher(voice.front)

    def loss(self, net: Any, lines: Lines, targets: Sequence[Target], speaker: Tensor | None) -> dict[str, Tensor]:  # noqa: ANN401
        """Return the network's own loss; see `Talker`."""
        given, labels = _inputs(net, lines, [target.mel for target in targets], speaker)
        return {"spectrogram": net(**given, labels=labels).loss}

    def everything(self, net: Any, lines: Lines, mels: Sequence[Tensor], speaker: Tensor | None) -> Tensor:  # noqa: ANN401
        """Return spectrograms and ends as the network writes them after the true frames, (B, N); see `Talker`."""
        from transformers.models.speecht5.modeling_speecht5 import shift_spectrograms_right

        given, labels = _inputs(net, lines, mels, speaker)
        before, _ = shift_spectrograms_right(labels, net.config.reduction_factor)
        given["input_values"] = given.pop("input_ids")
        hidden = net.speecht5(**given, decoder_input_values=before).last_hidden_state
        return torch.cat([part.flatten(1) for part in net.speech_decoder_postnet(hidden)], dim=1)

    def say(self, net: Any, ids: Tensor, speaker: Tensor | None, longest: float) -> Tensor:  # noqa: ANN401
        """Return a spectrogram that ends where the network says so; see `Talker`."""
        most = (net.config.max_speech_positions - 1) * net.config.reduction_factor
        return net.generate(
            ids[None],
            attention_mask=torch.ones_like(ids)[None],
            speaker_embeddings=_needed(speaker)[None],
            maxlenratio=min(longest, most / len(ids)),
        )


@dataclass(frozen=True)
class SpeechT5Teacher:
    """The spectrogram of a recording is all that the loss compares with; see `Teacher`."""

    front: MelFront
    figures: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, ids: Tensor, audio: Tensor) -> Target:
        """Return the target of a recording; see `Teacher`."""
        return Target(self.front(audio))


def _inputs(net: Any, lines: Lines, mels: Sequence[Tensor], speaker: Tensor | None) -> tuple[dict[str, Any], Tensor]:  # noqa: ANN401
    """Return the network's inputs, and the spectrograms (B, F, bands) cut to whole steps, `_IGNORED` behind the end."""
    step = net.config.reduction_factor
    whole = [mel[: len(mel) // step * step] for mel in mels]
    labels = nn.utils.rnn.pad_sequence(whole, batch_first=True, padding_value=_IGNORED)
    places = torch.arange(lines.ids.shape[1], device=lines.ids.device)
    given = {
        "input_ids": lines.ids,
        "attention_mask": (places < lines.lengths[:, None]).long(),
        "speaker_embeddings": _needed(speaker).expand(len(mels), -1),
        "use_cache": False,
    }
    return given, labels


def _needed(speaker: Tensor | None) -> Tensor:
    if speaker is None:
        raise ValueError("A SpeechT5 reads a speaker vector.")
    return speaker


def load_speecht5(source: str, vocoder: str, *, pretrained: bool = True) -> MelVoice:
    """Load a `SpeechT5ForTextToSpeech` with its vocabulary, its spectrograms and a vocoder.

    Layers are never skipped in training (`layerdrop` 0): an adapter has few steps, and guided attention wants all.

    Args:
        source: A local folder, or a name of the hub such as `microsoft/speecht5_tts`.
        vocoder: The same of a `SpeechT5HifiGan`.
        pretrained: Load the network's weights; False gives random ones.

    Raises:
        GraftError: One of them cannot be had or read, is something else, or they do not fit each other.
    """
    from transformers import AutoConfig, SpeechT5FeatureExtractor, SpeechT5ForTextToSpeech, SpeechT5HifiGan

    config: Any = from_source(source, AutoConfig, advice=ADVICE)
    extractor: Any = from_source(source, SpeechT5FeatureExtractor, advice=ADVICE)
    front = MelFront(
        window=torch.from_numpy(extractor.window).float(),
        filters=torch.from_numpy(extractor.mel_filters).float(),
        hop=extractor.sample_stride,
        transform=extractor.n_fft,
        floor=extractor.mel_floor,
    )
    if front.filters.shape[1] != config.num_mel_bins:
        raise GraftError(
            f"'{source}' writes {config.num_mel_bins} mel bands, and its preprocessor_config.json has "
            f"{front.filters.shape[1]}. Fetch it again."
        )
    fits = {"bands": config.num_mel_bins, "rate": extractor.sampling_rate, "hop": front.hop}
    made = load_vocoder(vocoder, SpeechT5HifiGan, **fits)
    if pretrained:
        model: Any = from_source(source, SpeechT5ForTextToSpeech, weights=True, advice=ADVICE)
    else:
        model = SpeechT5ForTextToSpeech(config)
    model.speecht5.encoder.wrapped_encoder.layerdrop = model.speecht5.decoder.wrapped_decoder.layerdrop = 0.0
    return MelVoice(
        name=source,
        model=model.eval(),
        family=SPEECHT5,
        symbols=_vocabulary(source, config.vocab_size),
        rate=extractor.sampling_rate,
        bands=config.num_mel_bins,
        speaker_width=config.speaker_embedding_dim,
        most_symbols=config.max_text_positions,
        most_frames=config.max_speech_positions * config.reduction_factor,
        front=front,
        vocoder=made,
        talker=SpeechT5Talker(),
    )


def _vocabulary(source: str, size: int) -> Characters:
    symbols = read_characters(source_file(source, _VOCABULARY))
    if max(*symbols.ids.values(), symbols.end) >= size:
        raise GraftError(f"{_VOCABULARY} of '{source}' has more symbols than its network ({size}). Fetch it again.")
    return symbols
