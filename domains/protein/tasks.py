"""The Lightning modules that say something of a whole protein, or of a pair of proteins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import MetricCollection

from common.class_weights import ClassWeights
from common.methods import MethodSpec
from common.split_data import named
from common.task import OptimSpec
from domains.protein._alphabet import PAD
from domains.protein._task import ProteinTask
from domains.protein.data._records import ProteinBatch, Record
from domains.protein.heads import HeadKind, PairHead, PooledProteinHead, Pooling
from domains.protein.metrics import class_metrics, label_metrics, value_metrics


class _PooledTask(ProteinTask):
    """What the tasks share whose head reads the pooled features of a protein.

    Args:
        backbone: A starter's name, an ESM-2 or other Hugging Face encoder's, or a local folder or file.
        peft: The PEFT method.
        optim: Optimizer and schedule.
        pooling: How residues become one vector; see `PooledProteinHead`.
        head: `linear` or `mlp`.
        hidden: Width of the MLP head's hidden layer.
        layers: Keep only the first layers of the backbone.
        pretrained: Start from pretrained weights.
        weights: A local file of weights, instead of the backbone's own.
        cache_features: Keep what a frozen backbone makes of each protein on disk, for later epochs and runs; with
            LinearProbe.
        seed: Seed of head, adapter and training steps.
        gradient_checkpointing: Recompute blocks in the backward pass.
    """

    def __init__(
        self,
        backbone: str,
        peft: MethodSpec,
        optim: OptimSpec = OptimSpec(),  # noqa: B008  (frozen)
        pooling: Pooling = "mean",
        head: HeadKind = "linear",
        hidden: int = 256,
        layers: int | None = None,
        pretrained: bool = True,
        weights: str | None = None,
        cache_features: bool = False,
        seed: int = 0,
        gradient_checkpointing: bool = False,
    ) -> None:
        settings = {
            "backbone": backbone,
            "pooling": pooling,
            "head": head,
            "hidden": hidden,
            "layers": layers,
            "pretrained": pretrained,
            "weights": weights,
            "cache_features": cache_features,
        }
        super().__init__(
            peft=peft, optim=optim, settings=settings, seed=seed, gradient_checkpointing=gradient_checkpointing
        )

    def features(self, batch: ProteinBatch) -> Tensor:
        """Return the features (B, L, width), or (B, 1 + L, width) with the start token where `cls` is pooled by."""
        start = self.settings["pooling"] == "cls"
        return self._residue_features(batch, start=start)

    def build_head(self) -> nn.Module:
        """Build pooling and output layer."""
        return PooledProteinHead(self._built.width, self._outputs(), **self._head_options())

    def _outputs(self) -> int:
        return len(self.facts.class_names)

    def _head_options(self) -> dict[str, Any]:
        settings = self.settings
        return {"pooling": settings["pooling"], "kind": settings["head"], "hidden": settings["hidden"]}

    def _head_arguments(self) -> str:
        options = ", ".join(f"{key}={value!r}" for key, value in self._head_options().items())
        return f"{self._built.width}, {self._outputs()}, {options}"

    def _output_lines(self) -> str:
        return f"outputs = head({self._features_line('residues', 'mask')}, mask)\n"

    def _features_line(self, residues: str, mask: str) -> str:
        start = ", start=True" if self.settings["pooling"] == "cls" else ""
        return f"residue_features(built, model, {residues}, {mask}{start})"


class _ClassTask(_PooledTask):
    """What the tasks of exclusive classes share.

    Args:
        backbone: See `_PooledTask`.
        peft: The PEFT method.
        optim: Optimizer and schedule.
        class_weights: Weights of the cross-entropy: `none`, or `balanced` (inverse frequencies of the training labels).
        label_smoothing: Share of the target mass spread over all classes.
        **options: See `_PooledTask`.
    """

    def __init__(
        self,
        backbone: str,
        peft: MethodSpec,
        optim: OptimSpec = OptimSpec(),  # noqa: B008  (frozen)
        class_weights: ClassWeights = "none",
        label_smoothing: float = 0.0,
        **options: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(backbone, peft, optim, **options)
        self.settings |= {"class_weights": class_weights, "label_smoothing": label_smoothing}

    @property
    def primary(self) -> tuple[str, str]:  # type: ignore[override]
        """AUROC of two classes, accuracy of more."""
        return ("auroc" if len(self.facts.class_names) == 2 else "accuracy", "max")

    def build_loss(self) -> nn.Module:
        """Build the cross-entropy."""
        return nn.CrossEntropyLoss(self._class_weights(), label_smoothing=self.settings["label_smoothing"])

    def build_metrics(self) -> MetricCollection:
        """Build accuracy, Matthews correlation, AUROC, average precision and F1; see `class_metrics`."""
        return class_metrics(self.facts.class_names)

    def predictions(self, outputs: Sequence[Tensor], data: Any, folder: Path) -> list[dict[str, Any]]:  # noqa: ANN401
        """Return id, label, prediction and its probability of each test record."""
        names = self.facts.class_names
        rows = []
        for record, logits in by_record(outputs, data):
            probability = logits.float().softmax(dim=-1)
            best = int(probability.argmax())
            row = {**named(record.id, record.group), "label": record.label, "prediction": names[best]}
            rows.append({**row, "probability": round(float(probability[best]), 6)})
        return rows


class SequenceClassification(_ClassTask):
    """Classify proteins or peptides into one class each.

    Args:
        backbone: A starter's name, an ESM-2 or other Hugging Face encoder's, or a local folder or file.
        peft: The PEFT method.
        optim: Optimizer and schedule.
        **options: See `_ClassTask` and `_PooledTask`.
    """

    kind: ClassVar[str] = "classes"


class PairClassification(_ClassTask):
    """Classify pairs of proteins; the order of the two does not matter.

    Args:
        backbone: A starter's name, an ESM-2 or other Hugging Face encoder's, or a local folder or file.
        peft: The PEFT method.
        optim: Optimizer and schedule.
        **options: See `_ClassTask` and `_PooledTask`.
    """

    kind: ClassVar[str] = "pairs"

    def build_head(self) -> nn.Module:
        """Build pooling, the symmetric joint of both vectors, and the output layer."""
        return PairHead(self._built.width, self._outputs(), **self._head_options())

    def features(self, batch: ProteinBatch) -> Tensor:
        """Return the features (2B, L, width) of the first proteins and then of their partners, in one pass."""
        residues = _stacked(batch)
        return super().features(batch._replace(residues=residues, mask=residues != PAD))

    def forward(self, batch: ProteinBatch) -> Tensor:
        """Return logits (B, K)."""
        with self.attached.grad_mode():
            first, second = self.features(batch).chunk(2)
        masks = (_stacked(batch) != PAD).chunk(2)
        return self.head(first, masks[0], second, masks[1])

    def _output_lines(self) -> str:
        return (
            'second = torch.tensor([encode("MKVLAAGIVG")])\nother = torch.ones_like(second, dtype=torch.bool)\n'
            f"first = {self._features_line('residues', 'mask')}\n"
            f"outputs = head(first, mask, {self._features_line('second', 'other')}, other)\n"
        )


class MultiLabel(_PooledTask):
    """Find the labels of a protein, any number of them.

    Args:
        backbone: A starter's name, an ESM-2 or other Hugging Face encoder's, or a local folder or file.
        peft: The PEFT method.
        optim: Optimizer and schedule.
        **options: See `_PooledTask`.
    """

    kind: ClassVar[str] = "labels"
    primary: ClassVar[tuple[str, str]] = ("aupr", "max")

    def build_loss(self) -> nn.Module:
        """Build the cross-entropy of each label for itself."""
        return nn.BCEWithLogitsLoss()

    def build_metrics(self) -> MetricCollection:
        """Build AUROC and average precision, means over the labels."""
        return label_metrics(self.facts.class_names)

    def _example_targets(self, residues: Tensor) -> Tensor:
        return torch.zeros(len(residues), self._outputs())

    def predictions(self, outputs: Sequence[Tensor], data: Any, folder: Path) -> list[dict[str, Any]]:  # noqa: ANN401
        """Return id, labels, predicted labels (probability above 0.5) and all probabilities of each test record."""
        names = self.facts.class_names
        rows = []
        for record, logits in by_record(outputs, data):
            probability = dict(zip(names, (round(p, 6) for p in logits.float().sigmoid().tolist()), strict=True))
            found = ";".join(name for name, p in probability.items() if p > 0.5)
            row = {"label": record.label, "prediction": found, "probabilities": probability}
            rows.append(named(record.id, record.group) | row)
        return rows


class SequenceRegression(_PooledTask):
    """Predict a number for each protein: stability, fitness, brightness.

    The head works in standard deviations from the mean of the training values; outputs are in the values' own unit.

    Args:
        backbone: A starter's name, an ESM-2 or other Hugging Face encoder's, or a local folder or file.
        peft: The PEFT method.
        optim: Optimizer and schedule.
        **options: See `_PooledTask`.
    """

    kind: ClassVar[str] = "value"
    primary: ClassVar[tuple[str, str]] = ("spearman", "max")

    def _outputs(self) -> int:
        return 1

    def build_loss(self) -> nn.Module:
        """Build the mean square error in squared standard deviations of the training values."""
        return _ScaledError(self.facts.std)

    def build_metrics(self) -> MetricCollection:
        """Build Spearman's and Pearson's correlation, and the root mean square error in the values' unit."""
        return value_metrics()

    def forward(self, batch: ProteinBatch) -> Tensor:
        """Return values (B,) in their own unit."""
        return super().forward(batch)[:, 0].float() * self.facts.std + self.facts.mean

    def _example_targets(self, residues: Tensor) -> Tensor:
        return torch.full((len(residues),), self.facts.mean)

    def _output_lines(self) -> str:
        lines = super()._output_lines()
        return f"{lines}outputs = outputs[:, 0] * {self.facts.std!r} + {self.facts.mean!r}  # in the values' own unit\n"

    def predictions(self, outputs: Sequence[Tensor], data: Any, folder: Path) -> list[dict[str, Any]]:  # noqa: ANN401
        """Return id, true value and predicted value of each test record."""
        return [
            {**named(record.id, record.group), "label": float(record.label), "prediction": round(float(value), 6)}
            for record, value in by_record(outputs, data)
        ]


class _ScaledError(nn.Module):
    """Mean square error of values (B,) over the square of `std`."""

    def __init__(self, std: float) -> None:
        super().__init__()
        self.std = std

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs - targets) / self.std).square().mean()


def by_record(outputs: Sequence[Tensor], data: Any) -> Iterator[tuple[Record, Tensor]]:  # noqa: ANN401
    """Yield each test record with its output, in the order of the records, whatever that of the batches was.

    Args:
        outputs: Outputs (B, ...) of each test batch.
        data: The datamodule.
    """
    records = data.records("test")
    index = torch.cat([batch.index for batch in data.test_dataloader()])
    for place, output in sorted(zip(index.tolist(), torch.cat(list(outputs)), strict=True), key=lambda pair: pair[0]):
        yield records[place], output


def _stacked(batch: ProteinBatch) -> Tensor:
    """Return the residues of first proteins and partners, (2B, the longer L)."""
    longest = max(batch.residues.shape[1], batch.second.shape[1])
    parts = (batch.residues, batch.second)
    return torch.cat([functional.pad(part, (0, longest - part.shape[1]), value=PAD) for part in parts])
