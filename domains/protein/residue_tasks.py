"""The Lightning modules that say something of each residue: its class, or which letter was hidden there."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from common.class_weights import ClassWeights
from common.errors import GraftError
from common.loading import mix_seed
from common.methods import MethodSpec
from common.split_data import named
from common.task import OptimSpec
from domains.protein._alphabet import ALPHABET, STANDARD
from domains.protein._task import ProteinTask
from domains.protein.backbones import MASK, lm_features
from domains.protein.data._records import IGNORE, ProteinBatch, Record
from domains.protein.data.base import UNLABELLED_RESIDUE
from domains.protein.heads import ResidueHead
from domains.protein.metrics import Perplexity, class_metrics

_HIDDEN, _REPLACED = 0.8, 0.1  # of the residues asked for; the rest is left as it is


class ResidueClassification(ProteinTask):
    """Classify each residue: secondary structure, disorder, binding and modification sites.

    Outputs are logits (B, K, L), as torch's cross-entropy takes them.

    Args:
        backbone: A starter's name, an ESM-2 or other Hugging Face encoder's, or a local folder or file.
        peft: The PEFT method.
        optim: Optimizer and schedule.
        class_weights: Weights of the cross-entropy: `none`, or `balanced` (inverse frequencies of the training labels).
        layers: Keep only the first layers of the backbone.
        pretrained: Start from pretrained weights.
        weights: A local file of weights, instead of the backbone's own.
        cache_features: Keep what a frozen backbone makes of each protein on disk, for later epochs and runs; with
            LinearProbe.
        seed: Seed of head, adapter and training steps.
        gradient_checkpointing: Recompute blocks in the backward pass.
    """

    kind: ClassVar[str] = "residues"

    def __init__(
        self,
        backbone: str,
        peft: MethodSpec,
        optim: OptimSpec = OptimSpec(),  # noqa: B008  (frozen)
        class_weights: ClassWeights = "none",
        layers: int | None = None,
        pretrained: bool = True,
        weights: str | None = None,
        cache_features: bool = False,
        seed: int = 0,
        gradient_checkpointing: bool = False,
    ) -> None:
        settings = {
            "backbone": backbone,
            "class_weights": class_weights,
            "layers": layers,
            "pretrained": pretrained,
            "weights": weights,
            "cache_features": cache_features,
        }
        super().__init__(
            peft=peft, optim=optim, settings=settings, seed=seed, gradient_checkpointing=gradient_checkpointing
        )

    @property
    def primary(self) -> tuple[str, str]:  # type: ignore[override]
        """AUROC of two classes, accuracy of more."""
        return ("auroc" if len(self.facts.class_names) == 2 else "accuracy", "max")

    def _train_labels(self, records: Sequence[Record]) -> Counter[str]:
        return Counter(chain.from_iterable(record.label for record in records))

    def build_head(self) -> nn.Module:
        """Build the output layer."""
        return ResidueHead(self._built.width, len(self.facts.class_names))

    def _head_arguments(self) -> str:
        return f"{self._built.width}, {len(self.facts.class_names)}"

    def build_loss(self) -> nn.Module:
        """Build the cross-entropy over the residues with a label."""
        return JudgedCrossEntropy(self._class_weights())

    def build_metrics(self) -> MetricCollection:
        """Build accuracy, Matthews correlation, AUROC, average precision and F1 over residues with a label."""
        return class_metrics(self.facts.class_names)

    def forward(self, batch: ProteinBatch) -> Tensor:
        """Return logits (B, K, L)."""
        return super().forward(batch).movedim(-1, 1)

    def _example_targets(self, residues: Tensor) -> Tensor:
        return torch.zeros_like(residues)

    def keep(self, outputs: Tensor) -> Tensor:
        """Return the predicted classes (B, L), uint8."""
        return outputs.argmax(dim=1).to(torch.uint8)

    def predictions(self, outputs: Sequence[Tensor], data: Any, folder: Path) -> list[dict[str, Any]]:  # noqa: ANN401
        """Return id, labels and predictions (one letter a residue) of each test record, and the share that is right.

        Residues behind `max_length` that the data left out are not in it.
        """
        names = self.facts.class_names
        found: dict[int, str] = defaultdict(str)
        for index, classes in _pieces(outputs, data):
            found[index] += "".join(names[int(number)] for number in classes)
        rows = []
        for index, record in enumerate(data.records("test")):
            pairs = [(a, b) for a, b in zip(record.label, found[index], strict=False) if a != UNLABELLED_RESIDUE]
            right = round(sum(a == b for a, b in pairs) / len(pairs), 6) if pairs else None
            row = {"label": record.label, "prediction": found[index], "accuracy": right}
            rows.append(named(record.id, record.group) | row)
        return rows


class MaskedLM(ProteinTask):
    """Go on with the training of a protein language model on the user's own sequences, without labels.

    A masked language model has to tell `share` of the residues, of which 80 % are hidden, 10 % replaced by a random
    amino acid and 10 % left (arXiv 1810.04805); a model that reads from left to right has to tell each next residue.
    Only the 20 standard amino acids are asked for. In evaluation the same residues of a protein are asked for every
    time.

    The head is the backbone's own output layer and is trained along with the adapter.

    Args:
        backbone: A starter's name, an ESM-2 or other Hugging Face encoder's, or a local folder or file.
        peft: The PEFT method.
        optim: Optimizer and schedule.
        share: Share of the residues that a masked language model has to tell; at least one of each protein.
        layers: Keep only the first layers of the backbone.
        pretrained: Start from pretrained weights.
        weights: A local file of weights, instead of the backbone's own.
        seed: Seed of adapter, training steps and hidden residues.
        gradient_checkpointing: Recompute blocks in the backward pass.
    """

    kind: ClassVar[str] = "unlabelled"
    primary: ClassVar[tuple[str, str]] = ("perplexity", "min")

    def __init__(
        self,
        backbone: str,
        peft: MethodSpec,
        optim: OptimSpec = OptimSpec(),  # noqa: B008  (frozen)
        share: float = 0.15,
        layers: int | None = None,
        pretrained: bool = True,
        weights: str | None = None,
        seed: int = 0,
        gradient_checkpointing: bool = False,
    ) -> None:
        if not 0 < share < 1:
            raise GraftError(f"share is {share}; the share of residues to tell lies above 0 and below 1.")
        settings = {
            "backbone": backbone,
            "share": share,
            "layers": layers,
            "pretrained": pretrained,
            "weights": weights,
        }
        super().__init__(
            peft=peft, optim=optim, settings=settings, seed=seed, gradient_checkpointing=gradient_checkpointing
        )

    def build_head(self) -> nn.Module:
        """Take the backbone's own output layer.

        Raises:
            GraftError: It has none.
        """
        if self._built.lm_head is None:
            raise GraftError(
                f"'{self._built.name}' has no output layer of a language model to go on with. Take one that has, whole "
                "(without 'layers'), such as unirep-256 or esm2_t6_8M_UR50D."
            )
        return self._built.lm_head

    def build_loss(self) -> nn.Module:
        """Build the cross-entropy over the residues asked for."""
        return JudgedCrossEntropy()

    def build_metrics(self) -> MetricCollection:
        """Build perplexity and accuracy over the residues asked for."""
        metrics: dict[str, Any] = {
            "perplexity": Perplexity(),
            "accuracy": MulticlassAccuracy(len(ALPHABET), average="micro", ignore_index=IGNORE),
        }
        return MetricCollection(metrics, compute_groups=False)

    # ---- hiding residues

    def features(self, batch: ProteinBatch) -> Tensor:
        """Return what the output layer reads, (B, L, width)."""
        return lm_features(self._built, self.backbone, batch.residues, batch.mask)

    def forward(self, batch: ProteinBatch) -> Tensor:
        """Return logits of the letters (B, len(ALPHABET), L) for residues that may be hidden already."""
        with self.attached.grad_mode():
            features = self.features(batch)
        return self.head(features).movedim(-1, 1)

    def compute_loss(self, batch: ProteinBatch) -> Tensor:
        """Return the loss of a batch whose residues are chosen anew, by the seed of the step."""
        draws = torch.rand(2, *batch.residues.shape, device=batch.residues.device)
        letters = torch.randint(0, len(STANDARD), batch.residues.shape, device=batch.residues.device)
        given, wanted = self._hide(batch, draws, letters)
        return self.loss(self(batch._replace(residues=given)), wanted)

    def infer(self, batch: ProteinBatch) -> Tensor:
        """Return logits (B, len(ALPHABET), L) with the residues of evaluation hidden."""
        return self(batch._replace(residues=self._hide_fixed(batch)[0]))

    def targets(self, batch: ProteinBatch) -> Tensor:
        """Return the letters asked for in evaluation (B, L), `IGNORE` elsewhere."""
        return self._hide_fixed(batch)[1]

    def _hide_fixed(self, batch: ProteinBatch) -> tuple[Tensor, Tensor]:
        """Choose by the protein's number and nothing else, so that neither batch nor method changes the question."""
        draws = torch.ones(2, *batch.residues.shape)
        letters = torch.zeros(batch.residues.shape, dtype=torch.long)
        lengths = batch.mask.sum(dim=1).tolist()
        for row, (index, length) in enumerate(zip(batch.index.tolist(), lengths, strict=True)):
            generator = torch.Generator().manual_seed(mix_seed(index, length))
            draws[:, row, :length] = torch.rand(2, length, generator=generator)
            letters[row, :length] = torch.randint(0, len(STANDARD), (length,), generator=generator)
        device = batch.residues.device
        return self._hide(batch, draws.to(device), letters.to(device))

    def _hide(self, batch: ProteinBatch, draws: Tensor, letters: Tensor) -> tuple[Tensor, Tensor]:
        """Hide residues.

        Args:
            batch: The proteins.
            draws: (2, B, L) in [0, 1): which residues are asked for, and what becomes of each.
            letters: (B, L), amino acids to put in the place of some.

        Returns:
            What the backbone is given and what it is to tell (`IGNORE` where it is not asked), both (B, L).
        """
        # Letters that stand for several amino acids, or that a backbone has no symbol for, are read, never asked for.
        standard = batch.mask & (batch.residues < len(STANDARD))
        if self._built.causal:
            return batch.residues, batch.residues.masked_fill(~standard, IGNORE)
        which, what = draws[0].masked_fill(~standard, 2.0), draws[1]
        least = which.amin(dim=1, keepdim=True)
        asked = standard & ((which < self.settings["share"]) | (which == least))
        given = batch.residues.masked_fill(asked & (what < _HIDDEN), MASK)
        given = torch.where(asked & (what >= _HIDDEN) & (what < _HIDDEN + _REPLACED), letters, given)
        return given, batch.residues.masked_fill(~asked, IGNORE)

    # ---- results

    def keep(self, outputs: Tensor) -> Tensor:
        """Return the likeliest letters (B, L), uint8."""
        return outputs.argmax(dim=1).to(torch.uint8)

    def predictions(self, outputs: Sequence[Tensor], data: Any, folder: Path) -> list[dict[str, Any]]:  # noqa: ANN401
        """Return id, the number of residues asked for and the share told rightly, of each test record."""
        found: dict[int, dict[str, Any]] = {}
        for batch, letters in zip(data.test_dataloader(), outputs, strict=True):
            wanted = self._hide_fixed(batch)[1]
            asked, right = (wanted != IGNORE).sum(dim=1), (letters.long() == wanted).sum(dim=1)
            for index, count, hits in zip(batch.index.tolist(), asked.tolist(), right.tolist(), strict=True):
                found[index] = {"asked": count, "accuracy": round(hits / count, 6)}
        return [named(record.id, record.group) | found[index] for index, record in enumerate(data.records("test"))]

    # ---- model card

    def _uses(self) -> str:
        return "build, lm_features"

    def _head_import(self) -> str:
        return ""

    def _head_lines(self) -> str:
        return 'head = built.lm_head.eval()\nhead.load_state_dict(load_file(f"{FOLDER}/head.safetensors"))\n'

    def _output_lines(self) -> str:
        return "outputs = head(lm_features(built, model, residues, mask))  # logits of the letters of ALPHABET\n"


class JudgedCrossEntropy(nn.Module):
    """Cross-entropy of logits (B, K, L) over the residues that have a label; 0 where none has.

    Args:
        weight: A weight for each class (K,), or None.
    """

    weight: Tensor | None

    def __init__(self, weight: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean, weighted by class."""
        if not (targets != IGNORE).any():
            return outputs.sum() * 0.0
        return functional.cross_entropy(outputs, targets, weight=self.weight, ignore_index=IGNORE)


def _pieces(outputs: Sequence[Tensor], data: Any) -> Iterator[tuple[int, Tensor]]:  # noqa: ANN401
    """Yield the record and the classes (L,) of each test item, without padding, those of one record in order.

    All stretches of a long protein but its last have the same length, and batches come from short to long.
    """
    items = [
        (int(index), classes[: int(length)])
        for batch, found in zip(data.test_dataloader(), outputs, strict=True)
        for index, length, classes in zip(batch.index, batch.mask.sum(dim=1), found, strict=True)
    ]
    yield from sorted(items, key=lambda item: (item[0], -len(item[1])))
