"""What the speech tasks share: backbone, facts, how much context the encoder sees, and lines that load an export."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from common.errors import GraftError, unknown
from common.methods import MethodSpec
from common.task import AdaptedTask, Backbone, OptimSpec
from domains.speech.backbones import SpecAugment, SpeechBackbone, build, encode
from domains.speech.data._records import Record, SpeechBatch, SpeechFacts

Context = Literal["auto", "audio", "full"]
CONTEXTS: tuple[Context, ...] = ("auto", "audio", "full")

_EXAMPLE = (1.0, 0.7)  # seconds of the two clips of an example batch: one of them is padded
_KINDS = {"text": "a transcript for each clip", "classes": "a class for each clip"}
_PROBED = ("kind", "rate", "language", "normalizer", "max_seconds", "short")


class SpeechTask(AdaptedTask):
    """What the speech tasks share.

    Attributes:
        kind: The `SpeechFacts.kind` of the data that the task takes.
        encoder_only: Whether a recogniser's decoder is left away.
    """

    domain: ClassVar[str] = "speech"
    kind: ClassVar[str] = ""
    encoder_only: ClassVar[bool] = True

    def __init__(
        self,
        *,
        peft: MethodSpec,
        optim: OptimSpec,
        settings: Mapping[str, Any],
        spec_augment: SpecAugment | Mapping[str, Any] | None,
        seed: int,
        gradient_checkpointing: bool,
    ) -> None:
        if settings["context"] not in CONTEXTS:
            raise unknown("context", settings["context"], CONTEXTS)
        if isinstance(spec_augment, Mapping):  # as a record holds it
            spec_augment = SpecAugment(**spec_augment)
        if spec_augment is not None:
            spec_augment.check()
        hidden = asdict(spec_augment) if spec_augment is not None else None
        super().__init__(
            peft=peft,
            optim=optim,
            settings={**settings, "spec_augment": hidden},
            seed=seed,
            gradient_checkpointing=gradient_checkpointing,
        )
        self._spec_augment = spec_augment
        self._built: SpeechBackbone
        self._encoder_only = self.encoder_only

    @property
    def facts(self) -> SpeechFacts:
        """What is known about the data.

        Raises:
            GraftError: When set to those of data that the task cannot take.
        """
        return self._facts

    @facts.setter
    def facts(self, facts: SpeechFacts | None) -> None:
        if facts is not None and facts.kind != self.kind:
            raise GraftError(
                f"{type(self).__name__} needs data with {_KINDS[self.kind]}, and this has {_KINDS[facts.kind]}. "
                "Take another task or other data."
            )
        self._facts: Any = facts

    def build_backbone(self) -> Backbone:
        """Build the named backbone.

        Raises:
            GraftError: It reads another sampling rate than the data has, or not as long audio.
        """
        self._built = self.build_named(encoder_only=self.encoder_only)
        built, facts = self._built, self.facts
        if facts.rate != built.rate:
            raise GraftError(
                f"'{built.name}' reads audio at {built.rate} Hz, and the data comes at {facts.rate} Hz. Take a "
                f"backbone that reads {facts.rate} Hz."
            )
        if built.context is not None and facts.max_seconds > built.context:
            raise GraftError(
                f"'{built.name}' reads at most {built.context:g} s at a time, and the data allows clips of "
                f"{facts.max_seconds:g} s (slowing down by 'speed' included). Lower data.max_seconds, or leave 'speed' "
                "out."
            )
        return built

    def build_named(self, *, encoder_only: bool) -> SpeechBackbone:
        """Build what the settings name."""
        self._encoder_only = encoder_only
        wanted = {key: self.settings[key] for key in ("pretrained", "weights", "layers") if key in self.settings}
        return build(self.settings["backbone"], encoder_only=encoder_only, **wanted)

    # ---- the encoder

    def full_context(self) -> bool:
        """Whether the encoder sees audio padded to all that it was trained with, rather than to the batch's length."""
        if self._built.context is None:
            return False
        context = self.settings["context"]
        return context == "full" or (context == "auto" and not self.facts.short)

    def hear(self, batch: SpeechBatch, *, full: bool | None = None, all_layers: bool = False) -> tuple[Tensor, Tensor]:
        """Run the encoder with its adapters.

        Args:
            batch: The clips.
            full: Whether to pad to the whole context; None as the task was asked to.
            all_layers: Return every layer; see `encode`.

        Returns:
            Features (B, F, width), or (B, layers + 1, F, width), and mask (B, F).
        """
        hidden = self._spec_augment if self.training else None
        full = self.full_context() if full is None else full
        with self.attached.grad_mode():
            return encode(
                self._built,
                self.backbone,
                batch.audio,
                batch.lengths,
                full_context=full,
                spec_augment=hidden,
                all_layers=all_layers,
            )

    def features(self, batch: SpeechBatch) -> Tensor:
        """Return the encoder's features (B, F, width)."""
        return self.hear(batch)[0]

    def example_batch(self) -> SpeechBatch:
        """Make two seeded clips of noise of different length."""
        generator = torch.Generator().manual_seed(0)
        lengths = torch.tensor([round(seconds * self.facts.rate) for seconds in _EXAMPLE])
        audio = 0.1 * torch.randn(2, int(lengths.max()), generator=generator)
        audio *= torch.arange(audio.shape[1]) < lengths[:, None]
        device = next(self.backbone.parameters()).device
        none = torch.zeros(2, 0, dtype=torch.long)
        target = torch.tensor([0, 1]) if self.kind == "classes" else none
        text = ("", "") if self.kind == "classes" else self._example_texts()
        moved = (tensor.to(device) for tensor in (target, torch.arange(2)))
        return SpeechBatch(audio.to(device), lengths.to(device), text, *moved)

    def _example_texts(self) -> tuple[str, str]:
        return "a", "to be"

    # ---- facts

    def describe_facts(self) -> dict[str, Any]:
        """Return all that is needed to read and predict a new clip."""
        facts = self.facts
        described = {key: getattr(facts, key) for key in (*_PROBED, "class_names", "characters")}
        return json.loads(json.dumps(described))  # lists for tuples, as they come back from a file

    def load_facts(self, facts: Mapping[str, Any]) -> None:
        """Set the facts from an adapter's record."""
        kept = {key: facts[key] for key in _PROBED}
        tuples = {key: tuple(facts[key]) for key in ("class_names", "characters")}
        self.facts = SpeechFacts(**kept, **tuples, name="", digest="", counts={})

    def describe_data(self, data: Any) -> dict[str, Any]:  # noqa: ANN401
        """Return name, digest, sizes, what was left out, and the data card."""
        facts = self.facts
        described = {
            "name": facts.name,
            "digest": facts.digest,
            **facts.counts,
            "seconds": dict(facts.seconds),
            "language": facts.language,
            "normalizer": facts.normalizer,
            "classes": list(facts.class_names),
            "skipped": facts.skipped,
            "left_out": dict(facts.left_out),
            "speakers": dict(facts.speakers),
        }
        card = {"confound": dict(facts.confound), "transcripts": dict(facts.transcripts)}
        return described | {key: value for key, value in card.items() if value}

    # ---- model card

    def usage(self) -> str:
        """Return lines that load the export with peft and safetensors onto the backbone that Graft builds."""
        from common.tuners import is_own

        settings = self.settings
        options = {key: settings.get(key) for key in ("pretrained", "weights", "layers")}
        options = {key: value for key, value in options.items() if value not in (None, True)}
        if self._encoder_only:
            options["encoder_only"] = True
        given = "".join(f", {key}={value!r}" for key, value in options.items())
        tuned = "model = PeftModel.from_pretrained(built.model, FOLDER).eval()"
        if self.attached.plan.mode == "full":
            tuned = 'built.model.load_state_dict(load_file(f"{FOLDER}/model.safetensors"))\nmodel = built.model.eval()'
        elif self.attached.plan.mode == "frozen":
            tuned = "model = built.model.eval()"
        own = is_own(getattr(self.attached.plan.peft_config, "peft_type", None))
        registered = "import common.tuners  # registers Graft's own tuners with peft\n" if own else ""
        long = (
            f"# audio: float32 (1, T) at {self.facts.rate} Hz, at most {self._longest():g} s; lengths: (1,), samples\n"
        )
        call = "encode(built, model, audio, lengths" + (", full_context=True" if self.full_context() else "")
        return (
            "from pathlib import Path\n\nimport torch\nfrom peft import PeftModel\n"
            "from safetensors.torch import load_file\n\n"
            "from domains.speech._audio import read_audio\n"
            f"{self._imports()}{registered}\n"
            f"built = build({settings['backbone']!r}{given})\n{tuned}\n{self._head_lines()}"
            f'{long}audio = read_audio(Path("clip.wav"), {self.facts.rate})[None]\n'
            "lengths = torch.tensor([audio.shape[1]])\n"
            f"with torch.no_grad():\n    {self._output_lines(call)}\n"
        )

    def _longest(self) -> float:
        """Most seconds that the task reads at a time."""
        context = self._built.context
        return self.facts.max_seconds if context is None or not self.full_context() else context

    def _imports(self) -> str:
        raise NotImplementedError

    def _head_lines(self) -> str:
        raise NotImplementedError

    def _output_lines(self, call: str) -> str:
        """Return what follows the backbone, given the call of `encode` without its last bracket."""
        raise NotImplementedError


def records_of(data: Any, splits: Sequence[str] = ("train", "val", "test")) -> Iterator[tuple[str, Record]]:  # noqa: ANN401
    """Yield the records of some splits with the split's name."""
    for split in splits:
        for record in data.records(split):
            yield split, record


def warn(message: str) -> None:
    """Warn the user of what stays possible and is seldom meant."""
    warnings.warn(message, UserWarning, stacklevel=3)
