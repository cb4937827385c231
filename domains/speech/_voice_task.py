"""What a task that speaks shares: facts, texts as ids, speaking, evaluation by ear, results."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from common.loading import mix_seed
from common.splits import stable_hash
from common.task import AdaptedTask
from domains.speech._voice_figures import Collected, packed, unpacked, voice_figures
from domains.speech.data.voices import VoiceBatch, VoiceFacts
from domains.speech.voice_metrics import score_rows
from domains.speech.voice_rows import voice_rows
from domains.speech.voices import pieces, synthesize
from domains.speech.voices._objective import Lines, everything

_MOST_SYMBOLS = 400  # of a piece that is said at once; longer lines are cut
_PAUSE = 0.2  # seconds of silence between pieces
_PROBED = ("rate", "language", "speaker", "pseudo_labelled", "max_seconds")


class Pace(nn.Module):
    """How fast the adapted voice speaks: one number, the logarithm of a factor of all durations."""

    def __init__(self) -> None:
        super().__init__()
        self.log_pace = nn.Parameter(torch.zeros(()))

    def forward(self, outputs: Tensor) -> Tensor:
        """Return what the voice makes as it is; the pace acts on durations before it."""
        return outputs


class VoiceTask(AdaptedTask):
    """What a task that speaks shares; its settings have `measures`, the parts that a test measures."""

    domain: ClassVar[str] = "speech"

    def __init__(self, **options: Any) -> None:  # noqa: ANN401
        super().__init__(**options)
        self._voice: Any  # a `Voice`, or another that a subclass builds, with `symbols` and `rate`
        self._spelled: dict[str, list[int]] = {}
        self._spoken: set[int] = set()

    @property
    def primary(self) -> tuple[str, str]:  # type: ignore[override]
        """Who seems to speak, or where that is not measured the mel-cepstral distortion."""
        return ("speaker_similarity", "max") if "speaker" in self.settings["measures"] else ("mcd", "min")

    def build_head(self) -> nn.Module:
        """Build the pace."""
        return Pace()

    def build_loss(self) -> nn.Module:
        """Build nothing: the objective is no function of outputs and targets alone."""
        return nn.Identity()

    def build_metrics(self) -> MetricCollection:
        """Build the figures of spoken texts."""
        return voice_figures(self.facts.rate, self.settings["measures"], self.facts.language)

    # ---- texts

    def _ids(self, text: str) -> list[int]:
        if text not in self._spelled:
            symbols = self._voice.symbols
            self._spelled[text] = symbols.encode(symbols.spell(text))
        return self._spelled[text]

    def _lines(self, texts: Sequence[str]) -> Lines:
        rows = [torch.tensor(self._ids(text)) for text in texts]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return Lines(ids.to(self.device), torch.tensor([len(row) for row in rows], device=self.device))

    def features(self, batch: VoiceBatch) -> Tensor:
        """Run all parts of the voice on the texts of a batch, (B, N); see `everything`."""
        return everything(self._voice, self.backbone, self._lines(batch.text))

    # ---- steps

    def parts_of(self, batch: VoiceBatch) -> dict[str, Tensor]:
        """Return the weighted parts of the loss by name."""
        raise NotImplementedError

    def compute_loss(self, batch: VoiceBatch) -> Tensor:
        """Return the scalar training loss of a batch."""
        return torch.stack(list(self.parts_of(batch).values())).sum()

    def training_step(self, batch: VoiceBatch, batch_idx: int) -> Tensor:
        """Compute the loss of one batch, and log its parts."""
        parts = self.parts_of(batch)
        loss = torch.stack(list(parts.values())).sum()
        penalty = self.peft.penalty(self.backbone)
        loss = loss if penalty is None else loss + penalty
        size = len(batch.audio)
        self.log_dict({f"train/{name}": part.detach() for name, part in parts.items()}, batch_size=size)
        self.log("train_loss", loss, prog_bar=True, batch_size=size)
        return loss

    def validation_step(self, batch: VoiceBatch, batch_idx: int) -> None:
        """Compute the loss with seeded draws, and speak the chosen texts."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix_seed(0, batch_idx))
            parts, size = self.parts_of(batch), len(batch.audio)
        self.log_dict({f"val/{name}": p for name, p in parts.items()}, on_step=False, on_epoch=True, batch_size=size)
        total = torch.stack(list(parts.values())).sum()
        self.log("val/loss", total, on_step=False, on_epoch=True, batch_size=size)
        rows = [row for row, place in enumerate(batch.index.tolist()) if place in self._spoken]
        if rows:
            chosen = VoiceBatch(
                batch.audio[rows], batch.lengths[rows], tuple(batch.text[row] for row in rows), batch.index[rows]
            )
            self._evaluate(chosen, "val", self.val_metrics)

    def _choose_spoken(self, data: Any) -> None:  # noqa: ANN401
        """Choose by a hash the `val_spoken` validation recordings whose texts are spoken."""
        order = sorted(data.records("val"), key=lambda record: stable_hash(record.id, "spoken"))
        chosen = {record.id for record in order[: self.settings["val_spoken"]]}
        self._spoken = {place for place, record in enumerate(data.records("val")) if record.id in chosen}

    def _without_words(self) -> MetricCollection:
        """Build validation's figures: all measures but the words, for which a recogniser has to run."""
        cheap = [part for part in self.settings["measures"] if part != "words"]
        return voice_figures(self.facts.rate, cheap, self.facts.language)

    # ---- evaluation

    def _evaluate(self, batch: VoiceBatch, stage: str, metrics: MetricCollection) -> Tensor:
        output = self.infer(batch)
        metrics.update(output, self.targets(batch))
        named = {f"{stage}/{name}": metric for name, metric in metrics.items()}
        self.log_dict(named, prog_bar=True, on_step=False, on_epoch=True, batch_size=len(batch.audio))
        return output

    def infer(self, batch: VoiceBatch) -> Tensor:
        """Speak the texts of a batch; see `packed`. Each text has draws of its own, the same in every evaluation."""
        waves = [self.speak(t, seed=i) for t, i in zip(batch.text, batch.index.tolist(), strict=True)]
        return packed(waves, batch.text).to(self.device)

    def targets(self, batch: VoiceBatch) -> Tensor:
        """Return the recordings of a batch; see `packed`."""
        clips = [audio[:length] for audio, length in zip(batch.audio, batch.lengths.tolist(), strict=True)]
        return packed(clips, batch.text).to(self.device)

    # ---- speaking

    def say(self, text: str, *, seed: int = 0) -> tuple[Tensor, int]:
        """Speak a text of any length.

        Returns:
            Waveform (T,), float32 in [-1, 1], and its sampling rate in Hz.

        Raises:
            GraftError: The voice cannot say it.
        """
        was_training = self.training
        self.eval()
        try:
            return self.speak(text, seed=seed).cpu(), self._voice.rate
        finally:
            self.train(was_training)

    def speak(self, text: str, *, seed: int = 0) -> Tensor:
        """Speak a text with the parameters as they are; see `say`."""
        symbols, waves = self._voice.symbols, []
        for place, piece in enumerate(pieces(symbols.spell(text), self.most_symbols())):
            ids = torch.tensor(symbols.encode(piece), device=self.device)
            waves.append(self.utter(ids, mix_seed(seed, place)))
            waves.append(waves[-1].new_zeros(round(_PAUSE * self._voice.rate)))
        return torch.cat(waves[:-1])

    def most_symbols(self) -> int:
        """Return how many symbols are said at once; longer lines are cut."""
        return _MOST_SYMBOLS

    def utter(self, ids: Tensor, seed: int) -> Tensor:
        """Speak ids (L,) at once: (T,)."""
        pace = float(self.head.log_pace.detach().exp())
        return synthesize(self._voice, self.backbone, ids, pace=pace, seed=seed)

    # ---- facts and results

    def example_batch(self) -> VoiceBatch:
        """Make two texts with a second and less of noise."""
        generator = torch.Generator().manual_seed(0)
        lengths = torch.tensor([self.facts.rate, round(0.7 * self.facts.rate)])
        audio = 0.1 * torch.randn(2, self.facts.rate, generator=generator)
        audio *= torch.arange(audio.shape[1]) < lengths[:, None]
        device = next(self.backbone.parameters()).device
        texts = self._voice.symbols.example
        return VoiceBatch(audio.to(device), lengths.to(device), texts, torch.arange(2, device=device))

    def describe_facts(self) -> dict[str, Any]:
        """Return what is needed to speak, and whose voice it is."""
        return json.loads(json.dumps({key: getattr(self.facts, key) for key in _PROBED}))

    def load_facts(self, facts: Mapping[str, Any]) -> None:
        """Set the facts from an adapter's record."""
        self.facts = VoiceFacts(**{key: facts[key] for key in _PROBED}, name="", digest="", counts={})

    def describe_data(self, data: Any) -> dict[str, Any]:  # noqa: ANN401
        """Return name, digest, sizes, where the texts come from, and the recordings' quality."""
        facts, described = self.facts, {}
        for key in ("minutes", "pseudo", "left_out"):
            described[key] = dict(getattr(facts, key))
        for key in ("language", "speaker", "pseudo_labelled", "faults"):
            described[key] = getattr(facts, key)
        pitch = facts.f0_median
        described["f0_median"] = pitch if math.isfinite(pitch) else None
        if self.posterior is not None and self.settings["posterior"] == "train":
            described["posterior_parameters"] = sum(p.numel() for p in self.posterior.parameters())
        return {"name": facts.name, "digest": facts.digest, **facts.counts, **json.loads(json.dumps(described))}

    def predictions(self, outputs: Sequence[Tensor], data: Any, folder: Path) -> list[dict[str, Any]]:  # noqa: ANN401
        """Return for each test recording its text and figures, for some with sound and picture; see `voice_rows`."""
        places = [place for batch in data.test_dataloader() for place in batch.index.tolist()]
        records = [data.records("test")[place] for place in places]
        waves = [wave for output in outputs for wave in unpacked(output)[0]]
        clips = [data.load(record) for record in records]
        scores = [_plain(row) for row in self._measured(waves, clips, [record.text for record in records])]
        rows = voice_rows(records, waves, clips, self.facts.rate, scores, folder)
        return [row for _, row in sorted(zip(places, rows, strict=True), key=lambda one: one[0])]

    def _measured(self, waves: list[Tensor], clips: list[Tensor], texts: list[str]) -> list[dict[str, Any]]:
        """Return the rows that the test's figures were made of; what a baseline spoke is measured here, words apart."""
        metrics = getattr(self, "test_metrics", None)
        collected: Collected | None = next(iter(metrics.values())).collected if metrics else None
        if collected is not None and len(collected.rows) == len(texts):
            return collected.rows
        return score_rows(waves, clips, texts, self.facts.rate, parts=("acoustics",))

    # ---- model card

    def usage(self) -> str:
        """Return lines that load the export with peft and safetensors onto the voice that Graft builds."""
        options = {key: self.settings[key] for key in ("pretrained", "weights")}
        given = "".join(f", {key}={value!r}" for key, value in options.items() if value not in (None, True))
        return self._usage_with(
            names="build_voice, synthesize",
            build=f"build_voice({self.settings['backbone']!r}{given})",
            head='pace = load_file(f"{FOLDER}/head.safetensors")["log_pace"].exp()',
            speak="synthesize(voice, model, ids, pace=pace)",
        )

    def _usage_with(self, *, names: str, build: str, head: str, speak: str) -> str:
        """Return the lines of `usage`: what is imported of voices, how one is built, its head read, a line spoken."""
        from common.tuners import is_own

        tuned = "model = PeftModel.from_pretrained(voice.model, FOLDER).eval()"
        if self.attached.plan.mode == "full":
            tuned = 'voice.model.load_state_dict(load_file(f"{FOLDER}/model.safetensors"))\nmodel = voice.model.eval()'
        elif self.attached.plan.mode == "frozen":
            tuned = "model = voice.model  # the head alone was trained"
        own = is_own(getattr(self.attached.plan.peft_config, "peft_type", None))
        registered = "import common.tuners  # registers Graft's own tuners with peft\n" if own else ""
        head = f"{head}\n" if head else ""
        return (
            "import soundfile\nimport torch\nfrom peft import PeftModel\nfrom safetensors.torch import load_file\n\n"
            f"{registered}from domains.speech.voices import {names}\n\n"
            f"voice = {build}\n{tuned}\n{head}"
            'ids = torch.tensor(voice.symbols.encode(voice.symbols.spell("Hello, it is me.")))\n'
            f"wave = {speak}\n"
            'soundfile.write("hello.wav", wave.numpy(), voice.rate)\n'
        )


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of figures as JSON takes them: None for nan."""
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
