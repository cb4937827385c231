"""FastSpeech 2 with Conformer blocks (arXiv 2006.04558, 2005.08100) as a voice: all frames of a text at once."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import GraftError
from domains.speech.backbones._weights import from_source
from domains.speech.voices._arpabet import Arpabet, read_arpabet
from domains.speech.voices._families import FASTSPEECH2
from domains.speech.voices._mel_voice import ADVICE, MelFront, MelVoice, Target, load_vocoder, source_file
from domains.speech.voices._objective import Lines
from domains.speech.voices._scales import Scales, Spoken, measure_scales, pitch_track, symbol_means
from domains.speech.voices._starters import hop_of
from domains.speech.voices._warping import follow

_IGNORED = -100.0  # what the network's loss leaves out
_RATE = 22_050  # Hz, of the published voice, where the vocoder does not say
_LOWEST, _HIGHEST = 80.0, 7600.0  # Hz, of the mel filters of ESPnet's recipes
_FLOOR = 1e-10  # of a mel band there
_WINDOW = 4  # hops

# What the unadapted voice says to be measured: statements, questions and lists, all sounds of English among them.
LINES = (
    "The old fisherman tied his yellow boat to a post beside the harbor.",
    "Which of these three roads leads back to the village church?",
    "She bought apples, cheese, brown bread, and a jar of thick honey.",
    "I never thought that measuring a garden would take the whole afternoon!",
    "A young boy was joyfully chasing his dog around the fountain.",
    "Could you show us how this machine works, or should we ask your father?",
    "Heavy rain fell all night, but the morning was clear and calm.",
    "Their usual journey north begins with a quiet hour by the big stove.",
)


class FastSpeech2Talker:
    """Trains by the network's own loss and speaks all frames at once.

    With y the target, y' and y'' the spectrograms before and after the postnet, d, p and e the duration, pitch and
    energy of each symbol and d', p', e' what the predictors write, the loss is

    |y' - y|_1 + |y'' - y|_1 + (d' - log(d + 1))^2 + (p' - p)^2 + (e' - e)^2,

    each a mean over what is no padding. The network reads the targets' d, p and e, not its own, while it trains.
    """

    def teacher(self, voice: MelVoice, net: Any, speaker: Tensor | None) -> FastSpeech2Teacher:  # noqa: ANN401
        """Measure the voice's scales, and return what makes targets of recordings; see `Talker`.

        Raises:
            GraftError: Its frames are of another kind than the analysis; see `measure_scales`.
        """
        spoken = []
        for line in LINES:
            ids = torch.tensor(voice.symbols.encode(voice.symbols.spell(line)))
            own = _speak(net, ids, speaker)
            spoken.append((own, voice.sound(own.mel)))
        scales = measure_scales(voice.name, spoken, voice.front, voice.rate)
        for part in scales.figures["kept"]:
            warnings.warn(
                f"At what scale '{voice.name}' writes {part} could not be measured on its own sound (R2 "
                f"{scales.figures[f'{part}_r2']:.2f}): training keeps its own {part}, whatever the recordings have.",
                UserWarning,
                stacklevel=2,
            )
        return FastSpeech2Teacher(voice, net, speaker, scales)

    def loss(self, net: Any, lines: Lines, targets: Sequence[Target], speaker: Tensor | None) -> dict[str, Tensor]:  # noqa: ANN401
        """Return the network's own loss; see `Talker`."""
        return {"network": _taught(net, lines, targets, speaker).loss}

    def everything(self, net: Any, lines: Lines, mels: Sequence[Tensor], speaker: Tensor | None) -> Tensor:  # noqa: ANN401
        """Return spectrograms at two frames a symbol, and what the predictors write, (B, N); see `Talker`."""
        targets = []
        for length in lines.lengths.tolist():
            curve = torch.arange(length, device=lines.ids.device).cos()
            mel = curve.new_zeros(2 * length, net.config.num_mel_bins)
            targets.append(Target(mel, torch.full_like(curve, 2, dtype=torch.int64), curve, curve.flip(0)))
        out = _taught(net, lines, targets, speaker)
        parts = (out.spectrogram, out.duration_outputs, out.pitch_outputs, out.energy_outputs)
        return torch.cat([part.flatten(1) for part in parts], dim=1)

    def say(self, net: Any, ids: Tensor, speaker: Tensor | None, longest: float) -> Tensor:  # noqa: ANN401
        """Return the spectrogram at the predicted durations, shortened where they are too long; see `Talker`."""
        with _no_longer(net, round(longest * len(ids))):
            return _speak(net, ids, speaker).mel


@dataclass(frozen=True)
class FastSpeech2Teacher:
    """Analyses recordings at the scales of a voice, and aligns them to its own speech of their texts; see `Teacher`.

    A symbol's pitch is the mean of log F0, drawn straight across what is unvoiced, over its frames, its energy the mean
    norm of the magnitudes. Where a part has no scale, a recording no pitch or a symbol no frame, the label is what the
    unadapted voice itself would write there: left without a label, a predictor would drift with the encoder that it
    reads.

    Attributes:
        voice: The voice.
        net: Its network, as it came, in eval mode.
        speaker: The speaker vector that it speaks with, or None.
        scales: Its scales.
    """

    voice: MelVoice
    net: Any
    speaker: Tensor | None
    scales: Scales

    @property
    def figures(self) -> Mapping[str, Any]:
        """R2 of the scales, and what could not be measured."""
        return self.scales.figures

    def __call__(self, ids: Tensor, audio: Tensor) -> Target:
        """Return the target of a recording; see `Teacher`."""
        front, own = self.voice.front, _speak(self.net, ids, self.speaker)
        magnitudes = front.magnitudes(audio)
        mel = self.scales.mel(front.bands(magnitudes))
        durations = follow(own.durations, own.mel, mel)
        pitch, energy = own.pitch, own.energy
        track = pitch_track(audio, self.voice.rate, front.hop, len(mel))
        if self.scales.pitch is not None and track is not None:
            found = self.scales.pitch(symbol_means(track[0], durations))
            pitch = torch.where(found.isnan(), own.pitch, found)
        if self.scales.energy is not None:
            found = self.scales.energy(symbol_means(magnitudes.norm(dim=1), durations))
            energy = torch.where(found.isnan(), own.energy, found)
        return Target(mel, durations, pitch, energy)


@torch.no_grad()
def _speak(net: Any, ids: Tensor, speaker: Tensor | None) -> Spoken:  # noqa: ANN401
    """Return what a network in eval mode makes of ids (L,) by its own predictions."""
    out = net(**_inputs(Lines(ids[None], torch.tensor([len(ids)], device=ids.device)), speaker))
    pitch, energy = out.pitch_outputs[0, :, 0], out.energy_outputs[0, :, 0]
    return Spoken(out.spectrogram[0].float(), out.duration_outputs[0], pitch.float(), energy.float())


def _taught(net: Any, lines: Lines, targets: Sequence[Target], speaker: Tensor | None) -> Any:  # noqa: ANN401
    """Run the network on the targets' durations, pitch and energy, its layers in whatever mode they are."""
    pad = nn.utils.rnn.pad_sequence
    _, durations, pitch, energy = zip(*targets, strict=True)
    labels = {
        "spectrogram_labels": pad([target.mel for target in targets], batch_first=True, padding_value=_IGNORED),
        "duration_labels": pad(durations, batch_first=True),
        "pitch_labels": pad(pitch, batch_first=True)[..., None],
        "energy_labels": pad(energy, batch_first=True)[..., None],
    }
    with _teaching(net):
        return net(**_inputs(lines, speaker), **labels)


def _inputs(lines: Lines, speaker: Tensor | None) -> dict[str, Any]:
    places = torch.arange(lines.ids.shape[1], device=lines.ids.device)
    return {
        "input_ids": lines.ids,
        "attention_mask": (places < lines.lengths[:, None]).long(),
        "speaker_embedding": None if speaker is None else speaker.expand(len(lines.ids), -1),
        "return_dict": True,
    }


@contextlib.contextmanager
def _teaching(net: Any) -> Iterator[None]:  # noqa: ANN401
    """Have the network read labels and return its loss, which it does by its own flag and its duration predictor's."""
    readers = (net, net.duration_predictor)
    before = [module.training for module in readers]
    try:
        for module in readers:
            module.training = True
        yield
    finally:
        for module, training in zip(readers, before, strict=True):
            module.training = training


@contextlib.contextmanager
def _no_longer(net: Any, most: int) -> Iterator[None]:  # noqa: ANN401
    """Shorten predicted durations (B, L) that sum up to more than `most` frames, all by one factor."""

    def shorten(module: nn.Module, inputs: Any, durations: Tensor) -> Tensor:  # noqa: ANN401
        bounded = durations.clamp(max=most).where(durations >= 0, most)  # below 0 an integer has run over
        total = bounded.sum(dim=1, keepdim=True)
        return torch.where(total > most, bounded * most // total.clamp(min=1), bounded)

    handle = net.duration_predictor.register_forward_hook(shorten)
    try:
        yield
    finally:
        handle.remove()


def load_fastspeech2(source: str, vocoder: str, *, pretrained: bool = True) -> MelVoice:
    """Load a `FastSpeech2ConformerModel` with its vocabulary and its vocoder.

    Hop and sampling rate are the vocoder's (22,050 Hz where it states none). Recordings are analysed as ESPnet's
    recipes do, with mel filters from 80 to 7,600 Hz; the scales of the network are measured, see `measure_scales`.

    Args:
        source: A local folder, or a name of the hub such as `espnet/fastspeech2_conformer`.
        vocoder: The same of a `FastSpeech2ConformerHifiGan`.
        pretrained: Load the network's weights; False gives random ones.

    Raises:
        GraftError: One of them cannot be had or read, is something else, or they do not fit each other; or the network
            is of a kind that transformers cannot train.
    """
    from torchaudio.functional import melscale_fbanks
    from transformers import AutoConfig, FastSpeech2ConformerHifiGan, FastSpeech2ConformerModel

    config: Any = from_source(source, AutoConfig, advice=ADVICE)
    _check(source, config)
    made = load_vocoder(vocoder, FastSpeech2ConformerHifiGan, bands=config.num_mel_bins)
    rate, hop = getattr(made.config, "sampling_rate", _RATE), hop_of(made.config)
    bins, highest = _WINDOW * hop // 2 + 1, min(_HIGHEST, rate / 2)
    kind = {"norm": "slaney", "mel_scale": "slaney"}
    front = MelFront(
        window=torch.hann_window(_WINDOW * hop),
        filters=melscale_fbanks(bins, _LOWEST, highest, config.num_mel_bins, rate, **kind),
        hop=hop,
        transform=_WINDOW * hop,
        floor=_FLOOR,
    )
    if pretrained:
        model: Any = from_source(source, FastSpeech2ConformerModel, weights=True, advice=ADVICE)
    else:
        model = FastSpeech2ConformerModel(config)
    if not config.use_weighted_masking:
        model.criterion.use_masking = True  # without a mask it would learn to write the padding
    return MelVoice(
        name=source,
        model=model.eval(),
        family=FASTSPEECH2,
        symbols=_vocabulary(source, config.vocab_size),
        rate=rate,
        bands=config.num_mel_bins,
        speaker_width=config.speaker_embed_dim or 0,
        most_symbols=config.max_source_positions,
        most_frames=config.max_source_positions,
        front=front,
        vocoder=made,
        talker=FastSpeech2Talker(),
    )


def _check(source: str, config: Any) -> None:  # noqa: ANN401
    """Refuse what transformers cannot train, or what speaks with an id that Graft does not give."""
    wanted = {"reduction_factor": 1, "speaking_speed": 1.0}
    wrong = [f"{name} {getattr(config, name):g}" for name, want in wanted.items() if getattr(config, name) != want]
    several = ("num_speakers", "num_languages")
    wrong += [f"{name} {getattr(config, name)}" for name in several if (getattr(config, name) or 0) > 1]
    if wrong:
        raise GraftError(
            f"'{source}' has {', '.join(wrong)}. Give a FastSpeech2ConformerModel of one language with 1 for each, of "
            "one speaker or with a speaker vector."
        )


def _vocabulary(source: str, size: int) -> Arpabet:
    symbols = read_arpabet(source_file(source, "vocab.json"))
    if max(symbols.ids.values()) >= size:
        raise GraftError(f"vocab.json of '{source}' has more symbols than its network ({size}). Fetch it again.")
    return symbols
