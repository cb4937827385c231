"""The Lightning module that says of which class an utterance is: a keyword, an emotion, a language, a speaker."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn
from torchmetrics import MetricCollection

from common.class_weights import ClassWeights, balanced_weights
from common.errors import unknown
from common.methods import MethodSpec
from common.split_data import named
from common.task import OptimSpec
from domains.speech._task import Context, SpeechTask
from domains.speech.backbones import SpecAugment
from domains.speech.data._records import SpeechBatch
from domains.speech.heads import Pooling, UtteranceHead
from domains.speech.metrics import class_metrics


class UtteranceClassification(SpeechTask):
    """Classify utterances into one class each: keywords, emotions (the protocol of PEFT-SER, arXiv 2306.05350).

    What is said must not be the only thing that tells classes apart: beside the task's own figures the record carries
    the data card's `confound`, the accuracy of a probe that sees the mean and the deviation of each mel band alone.

    Args:
        backbone: A wav2vec2, HuBERT or WavLM by hub name, a bundle of torchaudio, a Whisper (its encoder is used), or a
            local folder.
        peft: The PEFT method.
        optim: Optimizer and schedule.
        pooling: How the features of a clip become one vector: `mean` or `attention`.
        hidden: Width of the head's hidden layer.
        layer_mix: Read a learned weighted sum of all layers instead of the last one, as PEFT-SER does.
        class_weights: Weights of the cross-entropy: `none`, or `balanced` (inverse frequencies of the training labels).
        context: What a Whisper's encoder sees: `audio` pads to the longest clip of a batch, `full` to the 30 s that it
            was trained with, `auto` takes `audio` where all clips of the data are short.
        layers: Keep only the first layers of the encoder.
        spec_augment: Hide times and bands of the training audio; None does not.
        pretrained: Start from pretrained weights.
        weights: A local file or folder of weights, instead of the backbone's own.
        seed: Seed of head, adapter and training steps.
        gradient_checkpointing: Recompute blocks in the backward pass.
    """

    kind: ClassVar[str] = "classes"
    primary: ClassVar[tuple[str, str]] = ("uar", "max")

    def __init__(
        self,
        backbone: str,
        peft: MethodSpec,
        optim: OptimSpec = OptimSpec(),  # noqa: B008  (frozen)
        pooling: Pooling = "mean",
        hidden: int = 256,
        layer_mix: bool = False,
        class_weights: ClassWeights = "none",
        context: Context = "auto",
        layers: int | None = None,
        spec_augment: SpecAugment | None = None,
        pretrained: bool = True,
        weights: str | None = None,
        seed: int = 0,
        gradient_checkpointing: bool = False,
    ) -> None:
        if class_weights not in ("none", "balanced"):
            raise unknown("class_weights", class_weights, ("none", "balanced"))
        settings = {
            "backbone": backbone,
            "pooling": pooling,
            "hidden": hidden,
            "layer_mix": layer_mix,
            "class_weights": class_weights,
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
        self._weights: Tensor | None = None

    # ---- building

    def setup(self, stage: str | None = None) -> None:
        """Weigh the classes by the training labels where that is asked for, and build everything."""
        if self.settings["class_weights"] == "balanced" and not hasattr(self, "backbone"):
            data = self._datamodule()
            counts = Counter(record.label for record in data.records("train"))
            self._weights = balanced_weights(counts, data.facts.class_names)
        super().setup(stage)

    def build_head(self) -> nn.Module:
        """Build the sum of layers, the pooling and the output layers."""
        return UtteranceHead(self._built.width, len(self.facts.class_names), **self._head_options())

    def _head_options(self) -> dict[str, Any]:
        layers = self._built.layers + 1 if self.settings["layer_mix"] else None
        return {"pooling": self.settings["pooling"], "hidden": self.settings["hidden"], "layers": layers}

    def build_loss(self) -> nn.Module:
        """Build the cross-entropy."""
        return nn.CrossEntropyLoss(self._weights)  # there are none without data, where nothing is trained either

    def build_metrics(self) -> MetricCollection:
        """Build unweighted average recall, macro F1 and accuracy."""
        return class_metrics(len(self.facts.class_names))

    # ---- steps

    def features(self, batch: SpeechBatch) -> Tensor:
        """Return the features (B, F, width), or (B, layers + 1, F, width) with `layer_mix`."""
        return self.hear(batch, all_layers=self.settings["layer_mix"])[0]

    def forward(self, batch: SpeechBatch) -> Tensor:
        """Return logits (B, K)."""
        features, mask = self.hear(batch, all_layers=self.settings["layer_mix"])
        return self.head(features, mask)

    def targets(self, batch: SpeechBatch) -> Tensor:
        """Return the classes (B,)."""
        return batch.target

    def on_test_epoch_end(self) -> None:
        """Put the data card's probe beside the task's own accuracy."""
        probe = self.facts.confound.get("mel_statistics")
        if probe is not None:
            self.log("test/mel_statistics_accuracy", probe)

    # ---- results

    def predictions(self, outputs: Sequence[Tensor], data: Any, folder: Path) -> list[dict[str, Any]]:  # noqa: ANN401
        """Return id, label, prediction and its probability of each test clip that could be read."""
        names, records = self.facts.class_names, data.records("test")
        rows: dict[int, dict[str, Any]] = {}
        for batch, logits in zip(data.test_dataloader(), outputs, strict=True):
            for place, shares in zip(batch.index.tolist(), logits.float().softmax(dim=-1).tolist(), strict=True):
                best = shares.index(max(shares))
                record = records[place]
                rows[place] = {
                    **named(record.id, record.speaker),
                    "path": record.path,
                    "speaker": record.speaker,
                    "label": record.label,
                    "prediction": names[best],
                    "probability": round(shares[best], 6),
                }
        return [rows[place] for place in sorted(rows)]

    # ---- model card

    def _imports(self) -> str:
        return "from domains.speech.backbones import build, encode\nfrom domains.speech.heads import UtteranceHead\n"

    def _head_lines(self) -> str:
        options = ", ".join(f"{key}={value!r}" for key, value in self._head_options().items())
        return (
            f"head = UtteranceHead({self._built.width}, {len(self.facts.class_names)}, {options}).eval()\n"
            'head.load_state_dict(load_file(f"{FOLDER}/head.safetensors"))\n'
        )

    def _output_lines(self, call: str) -> str:
        mixed = ", all_layers=True" if self.settings["layer_mix"] else ""
        return f"outputs = head(*{call}{mixed}))  # logits of {', '.join(self.facts.class_names)}"
