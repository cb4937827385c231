"""The Lightning modules that recognise speech: with a decoder that writes, or with CTC."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import MetricCollection

from common.errors import GraftError, unknown
from common.frozen import FrozenPrefix, content
from common.methods import MethodSpec
from common.task import OptimSpec
from domains.speech._recognition import Recognition
from domains.speech._task import Context
from domains.speech.backbones import CharacterTokens, SpecAugment, SpeechBackbone, TextTokens, decode, generate
from domains.speech.data._records import Record, SpeechBatch
from domains.speech.heads import CTCHead

Vocabulary = Literal["auto", "characters", "checkpoint"]
VOCABULARIES: tuple[Vocabulary, ...] = ("auto", "characters", "checkpoint")

_IGNORE = -100


class Seq2SeqRecognition(Recognition):
    """Recognise speech with an encoder and a decoder that writes one token after the other (Whisper).

    Trained with teacher forcing: the cross-entropy of each token of the transcript, given those before it. Whisper's
    own output layer writes, there is no new head. Validation decodes greedily, test and prediction with `beams`.

    Args:
        backbone: `whisper-tiny-en`, the hub name of a Whisper, or a local folder.
        peft: The PEFT method.
        optim: Optimizer and schedule.
        context: What the encoder sees: `audio` pads to the longest clip of a batch, which is several times cheaper for
            short clips; `full` pads to the 30 s that Whisper was trained with; `auto` takes `audio` where all clips of
            the data are short.
        full_context_test: With less than the full context, let a test report all error rates at full context too, which
            takes most of its time.
        language: Language of the audio, for a multilingual Whisper (`es`); None takes the data's.
        beams: Beams of the search in test and prediction; 1 is greedy.
        max_tokens: Most tokens to write for a clip; None for as many as the decoder has positions.
        timestamps: Let the decoder write times too; only predictions show them.
        spec_augment: Hide times and bands of the training audio; None does not.
        cache_encoder: Encode each clip once and keep the result on disk; only where nothing before the decoder is
            trained or random. Clips are then padded to the longest that the data allows.
        pretrained: Start from pretrained weights.
        weights: A local file or folder of weights, instead of the backbone's own.
        seed: Seed of the adapter and the training steps.
        gradient_checkpointing: Recompute blocks in the backward pass.

    Raises:
        GraftError: An argument is out of range.
    """

    encoder_only: ClassVar[bool] = False

    def __init__(
        self,
        backbone: str,
        peft: MethodSpec,
        optim: OptimSpec = OptimSpec(),  # noqa: B008  (frozen)
        context: Context = "auto",
        full_context_test: bool = True,
        language: str | None = None,
        beams: int = 1,
        max_tokens: int | None = None,
        timestamps: bool = False,
        spec_augment: SpecAugment | None = None,
        cache_encoder: bool = False,
        pretrained: bool = True,
        weights: str | None = None,
        seed: int = 0,
        gradient_checkpointing: bool = False,
    ) -> None:
        wrong = [f"{name} is {value}" for name, value in (("beams", beams), ("max_tokens", max_tokens)) if value == 0]
        wrong += [f"{name} is {v}" for name, v in (("beams", beams), ("max_tokens", max_tokens)) if v and v < 0]
        if wrong:
            raise GraftError(f"Seq2SeqRecognition: {'; '.join(wrong)}; at least 1 is allowed. Mend the recipe's model.")
        if cache_encoder and spec_augment is not None:
            raise GraftError(
                "cache_encoder keeps what the encoder made of each clip, and spec_augment changes the clips in every "
                "epoch. Leave one of them out."
            )
        settings = {
            "backbone": backbone,
            "context": context,
            "language": language,
            "beams": beams,
            "max_tokens": max_tokens,
            "timestamps": timestamps,
            "cache_encoder": cache_encoder,
            "pretrained": pretrained,
            "weights": weights,
        }
        super().__init__(
            peft=peft,
            optim=optim,
            settings=settings,
            spec_augment=spec_augment,
            seed=seed,
            gradient_checkpointing=gradient_checkpointing,
        )
        self.full_context_test = full_context_test

    @property
    def tokens(self) -> TextTokens:
        """The backbone's tokens.

        Raises:
            GraftError: It has no decoder.
        """
        if self._built.kind != "seq2seq" or self._built.tokens is None:
            raise GraftError(
                f"'{self._built.name}' has no decoder that writes. Take CTCRecognition, or a Whisper as backbone."
            )
        return self._built.tokens

    @property
    def language(self) -> str:
        """The language of the audio; "" where it is not known."""
        return self.facts.language if self.settings["language"] is None else self.settings["language"]

    def build_head(self) -> nn.Module:
        """Build nothing: the decoder has its own output layer."""
        _ = self.tokens
        return nn.Identity()

    def build_loss(self) -> nn.Module:
        """Build the cross-entropy over the tokens of the transcripts."""
        return nn.CrossEntropyLoss(ignore_index=_IGNORE)

    def _check_text(self, split: str, record: Record) -> None:
        start, longest = len(self._start()), self._built.model.config.max_target_positions
        if start + len(record.text.encode()) < longest:  # a token holds at least a byte
            return
        length = start + len(self.tokens.encode(record.text))
        if length > longest:
            raise GraftError(
                f"The transcript of '{record.id}' ({split}) has {length} tokens with those that start it, and "
                f"'{self.backbone_name}' writes at most {longest}. Cut the clip into shorter ones or leave it out."
            )

    # ---- the encoder

    def frozen_prefix(self) -> FrozenPrefix | None:
        """Return the encoder, where its outputs are to be kept."""
        if not self.settings["cache_encoder"]:
            return None
        transform = {"backbone": self.backbone_name, "samples": self._samples(), "full": self.full_context()}
        return FrozenPrefix(modules={"encoder": self._built.model.model.encoder}, transform=transform)

    def _samples(self) -> int:
        """Samples of the longest clip that the data allows."""
        return math.ceil(self.facts.max_seconds * self.facts.rate)

    def hear(self, batch: SpeechBatch, *, full: bool | None = None, all_layers: bool = False) -> tuple[Tensor, Tensor]:
        """Run the encoder, or look up what it made of the clips; see `SpeechTask.hear`.

        What is kept must not depend on a clip's neighbours, and the decoder has no mask; so with `cache_encoder` each
        clip is padded to the longest that the data allows, in training and ever after.
        """
        full = self.full_context() if full is None else full
        if not self.settings["cache_encoder"] or full != self.full_context():
            return super().hear(batch, full=full, all_layers=all_layers)
        samples = max(self._samples(), batch.audio.shape[1])
        audio = functional.pad(batch.audio, (0, samples - batch.audio.shape[1]))
        even = batch._replace(audio=audio, lengths=torch.full_like(batch.lengths, samples))
        if self.frozen_rows is None:
            features, mask = super().hear(even, full=full)
        else:
            rows = self.frozen_rows.rows(
                [content(clip) for clip in audio],
                lambda place: (super(Seq2SeqRecognition, self).hear(_only(even, place), full=full)[0][0],),
            )
            features = torch.stack([row[0] for row in rows])
            mask = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
        frames = -(-batch.lengths // self._built.hop)
        return features, mask & (torch.arange(mask.shape[1], device=mask.device) < frames[:, None])

    # ---- steps

    def _start(self) -> list[int]:
        return list(self.tokens.start(self.language, timestamps=False))

    def teacher(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return what the decoder reads and what it is to write next, both (B, U).

        It reads the start and the text; it is to write the text and its end, and nothing is asked of the start.
        """
        tokens, start = self.tokens, self._start()
        read, wanted = [], []
        for text in texts:
            ids = tokens.encode(text)
            read.append([*start, *ids])
            wanted.append([*[_IGNORE] * (len(start) - 1), *ids, tokens.eos])
        return _padded(read, tokens.pad).to(self.device), _padded(wanted, _IGNORE).to(self.device)

    def features(self, batch: SpeechBatch) -> Tensor:
        """Return logits (B, U, V) of the token behind each one that the decoder reads."""
        return self._logits(self.hear(batch), self.teacher(batch.text)[0])

    def _logits(self, heard: tuple[Tensor, Tensor], read: Tensor) -> Tensor:
        with self.attached.grad_mode():
            return decode(self._built, self.backbone, heard[0], read)

    def loss_of(self, heard: tuple[Tensor, Tensor], batch: SpeechBatch) -> Tensor:
        """Return the mean cross-entropy of the tokens."""
        read, wanted = self.teacher(batch.text)
        return self.loss(self._logits(heard, read).float().transpose(1, 2), wanted)

    def write(self, heard: tuple[Tensor, Tensor], *, beams: int = 1) -> list[str]:
        """Decode without a teacher."""
        return [self.tokens.decode(ids) for ids in self.ids_of(heard, beams=beams)]

    def ids_of(self, heard: tuple[Tensor, Tensor], *, beams: int = 1) -> list[list[int]]:
        """Return the ids of the texts, with those of times where `timestamps` asks for them."""
        return generate(
            self._built,
            self.backbone,
            heard[0],
            beams=beams,
            max_tokens=self.settings["max_tokens"],
            timestamps=self.settings["timestamps"],
            language=self.language,
        )

    # ---- model card

    def _imports(self) -> str:
        return "from domains.speech.backbones import build, encode, generate\n"

    def _head_lines(self) -> str:
        return ""

    def _output_lines(self, call: str) -> str:
        language = f", language={self.language!r}" if self.language else ""
        return (
            f"features, mask = {call})\n    (ids,) = generate(built, model, features{language})\n"
            "text = built.tokens.decode(ids)"
        )


class CTCRecognition(Recognition):
    """Recognise speech with an encoder and CTC (Graves et al. 2006): a symbol or a blank for each feature.

    Decoding is greedy: the likeliest symbol of each feature, repeats merged, blanks left out.

    Args:
        backbone: A wav2vec2, HuBERT or WavLM by hub name, a bundle of torchaudio, a Whisper (its encoder is used), or a
            local folder.
        peft: The PEFT method.
        optim: Optimizer and schedule.
        vocabulary: `characters` learns a new output layer over the characters of the training texts; `checkpoint` goes
            on with the output layer and the symbols that came with the weights; `auto` takes these where there are any.
        context: See `Seq2SeqRecognition`; only a Whisper's encoder has a context.
        full_context_test: See `Seq2SeqRecognition`.
        layers: Keep only the first layers of the encoder.
        spec_augment: Hide times and bands of the training audio; None does not.
        pretrained: Start from pretrained weights.
        weights: A local file or folder of weights, instead of the backbone's own.
        seed: Seed of head, adapter and training steps.
        gradient_checkpointing: Recompute blocks in the backward pass.
    """

    def __init__(
        self,
        backbone: str,
        peft: MethodSpec,
        optim: OptimSpec = OptimSpec(),  # noqa: B008  (frozen)
        vocabulary: Vocabulary = "auto",
        context: Context = "auto",
        full_context_test: bool = True,
        layers: int | None = None,
        spec_augment: SpecAugment | None = None,
        pretrained: bool = True,
        weights: str | None = None,
        seed: int = 0,
        gradient_checkpointing: bool = False,
    ) -> None:
        if vocabulary not in VOCABULARIES:
            raise unknown("vocabulary", vocabulary, VOCABULARIES)
        settings = {
            "backbone": backbone,
            "vocabulary": vocabulary,
            "context": context,
            "layers": layers,
            "pretrained": pretrained,
            "weights": weights,
        }
        super().__init__(
            peft=peft,
            optim=optim,
            settings=settings,
            spec_augment=spec_augment,
            seed=seed,
            gradient_checkpointing=gradient_checkpointing,
        )
        self.full_context_test = full_context_test
        self._short = 0.0  # clips of the last batch with fewer features than their text needs

    def build_named(self, *, encoder_only: bool) -> SpeechBackbone:
        """Build what the settings name: with its own output layer where it has one, a Whisper without its decoder."""
        if self.settings["layers"] is None:
            whole = super().build_named(encoder_only=False)
            if whole.kind != "seq2seq":
                return whole
        return super().build_named(encoder_only=encoder_only)

    @property
    def from_checkpoint(self) -> bool:
        """Whether symbols and output layer are the checkpoint's own."""
        wanted = self.settings["vocabulary"]
        return wanted == "checkpoint" or (wanted == "auto" and self._built.ctc_head is not None)

    @property
    def tokens(self) -> TextTokens:
        """The symbols.

        Raises:
            GraftError: The checkpoint was asked for its own and has none, or the training texts have no character.
        """
        if not self.from_checkpoint:
            if not self.facts.characters:
                raise GraftError("The training texts have no characters to learn. Give data with transcripts.")
            return CharacterTokens.of_characters("".join(self.facts.characters))
        if self._built.ctc_head is None or self._built.tokens is None:
            raise GraftError(
                f"'{self._built.name}' brings no CTC vocabulary of its own. Set vocabulary to 'characters'."
            )
        return self._built.tokens

    def build_head(self) -> nn.Module:
        """Build the output layer, or take the checkpoint's."""
        tokens = self.tokens
        if self.from_checkpoint and self._built.ctc_head is not None:
            return self._built.ctc_head
        return CTCHead(self._built.width, tokens.size)

    def build_loss(self) -> nn.Module:
        """Build CTC's loss; an utterance that is too short for its text adds nothing, and is counted."""
        return nn.CTCLoss(blank=self.tokens.pad, zero_infinity=True)

    # ---- steps

    def loss_of(self, heard: tuple[Tensor, Tensor], batch: SpeechBatch) -> Tensor:
        """Return the mean over the clips of CTC's loss per symbol."""
        features, mask = heard
        tokens = self.tokens
        ids = [tokens.encode(text) for text in batch.text]
        frames, symbols = mask.sum(dim=1).cpu(), torch.tensor([len(row) for row in ids])
        self._short = float(sum(needed(row) > have for row, have in zip(ids, frames.tolist(), strict=True)))
        shares = self.head(features).float().log_softmax(dim=-1).transpose(0, 1)  # (F, B, V)
        flat = torch.tensor([number for row in ids for number in row], dtype=torch.long, device=shares.device)
        return self.loss(shares, flat, frames, symbols)

    def training_step(self, batch: SpeechBatch, batch_idx: int) -> Tensor:
        """Compute the loss of one batch, and count its clips that are too short for their text."""
        loss = super().training_step(batch, batch_idx)
        self._log_short("train", batch)
        return loss

    def _evaluate(self, batch: SpeechBatch, stage: str, metrics: MetricCollection) -> Tensor:
        output = super()._evaluate(batch, stage, metrics)
        self._log_short(stage, batch)
        return output

    def _log_short(self, stage: str, batch: SpeechBatch) -> None:
        size = len(batch.audio)
        self.log(f"{stage}/too_short", self._short, on_step=False, on_epoch=True, reduce_fx="sum", batch_size=size)

    def write(self, heard: tuple[Tensor, Tensor], *, beams: int = 1) -> list[str]:
        """Decode greedily."""
        features, mask = heard
        tokens, best = self.tokens, self.head(features).argmax(dim=-1).cpu()
        paths = (row[: int(length)].tolist() for row, length in zip(best, mask.sum(dim=1), strict=True))
        return [tokens.decode(collapsed(path, tokens.pad)) for path in paths]

    # ---- model card

    def _imports(self) -> str:
        more = "" if self.from_checkpoint else ", CharacterTokens"
        head = "" if self.from_checkpoint else "from domains.speech.heads import CTCHead\n"
        return f"from domains.speech.backbones import build, encode{more}\n{head}"

    def _head_lines(self) -> str:
        if self.from_checkpoint:
            made = "head, tokens = built.ctc_head.eval(), built.tokens\n"
        else:
            characters = "".join(self.facts.characters)
            made = f"tokens = CharacterTokens.of_characters({characters!r})\nhead = CTCHead(built.width, tokens.size)\n"
        return f'{made}head.load_state_dict(load_file(f"{{FOLDER}}/head.safetensors"))\n'

    def _output_lines(self, call: str) -> str:
        return (
            f"features, mask = {call})\n    path = head(features)[0].argmax(dim=-1).unique_consecutive()\n"
            "text = tokens.decode([i for i in path.tolist() if i != tokens.pad])"
        )


def needed(ids: Sequence[int]) -> int:
    """Return how many features CTC needs for some symbols: one each, and a blank between two equal ones."""
    return len(ids) + sum(one == two for one, two in itertools.pairwise(ids))


def collapsed(path: Sequence[int], blank: int) -> list[int]:
    """Merge the repeats of a path and leave out its blanks."""
    return [symbol for symbol, _ in itertools.groupby(path) if symbol != blank]


def _only(batch: SpeechBatch, place: int) -> SpeechBatch:
    """Return a batch of one of the clips."""
    return SpeechBatch(*(part[place : place + 1] for part in batch))


def _padded(rows: Sequence[Sequence[int | None]], filler: int) -> Tensor:
    """Pad rows of ids at their ends to one length, (B, U)."""
    longest = max(map(len, rows), default=0)
    made: list[list[Any]] = [[*row, *[filler] * (longest - len(row))] for row in rows]
    return torch.tensor(made, dtype=torch.long)
