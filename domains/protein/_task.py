"""What the protein tasks share: backbone, facts, class weights, and lines that load an export."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from common.class_weights import balanced_weights
from common.errors import GraftError, unknown
from common.frozen import FrozenPrefix, content
from common.methods import MethodSpec
from common.task import AdaptedTask, Backbone, OptimSpec
from domains.protein._alphabet import PAD, STANDARD
from domains.protein.backbones import ProteinBackbone, build, residue_features
from domains.protein.data._records import ProteinBatch, ProteinFacts

_EXAMPLE = (13, 8)  # residues of the two proteins of an example batch: one of them is padded
_KINDS = {
    "classes": "one class a protein",
    "labels": "any number of labels a protein",
    "value": "a number a protein",
    "residues": "a class a residue",
    "pairs": "pairs of proteins",
    "unlabelled": "sequences without labels",
}


class ProteinTask(AdaptedTask):
    """What the protein tasks share: backbone, facts, class weights.

    Attributes:
        kind: The `ProteinFacts.kind` of the data that the task takes.
    """

    domain: ClassVar[str] = "protein"
    kind: ClassVar[str] = ""

    def __init__(
        self,
        *,
        peft: MethodSpec,
        optim: OptimSpec,
        settings: Mapping[str, Any],
        seed: int,
        gradient_checkpointing: bool,
    ) -> None:
        super().__init__(
            peft=peft, optim=optim, settings=settings, seed=seed, gradient_checkpointing=gradient_checkpointing
        )
        self._built: ProteinBackbone
        self._balanced: Tensor | None = None

    @property
    def facts(self) -> ProteinFacts:
        """What is known about the data.

        Raises:
            GraftError: When set to those of data that the task cannot take.
        """
        return self._facts

    @facts.setter
    def facts(self, facts: ProteinFacts | None) -> None:
        if facts is not None and facts.kind != self.kind:
            raise GraftError(
                f"{type(self).__name__} needs data with {_KINDS[self.kind]}, and this has {_KINDS[facts.kind]}. "
                "Take another task or other data."
            )
        self._facts: Any = facts

    def setup(self, stage: str | None = None) -> None:
        """Weigh the classes by the training labels where that is asked for, and build everything."""
        if self.settings.get("class_weights") == "balanced" and not hasattr(self, "backbone"):
            data = self._datamodule()
            self._balanced = balanced_weights(self._train_labels(data.records("train")), data.facts.class_names)
        super().setup(stage)

    def _train_labels(self, records: Sequence[Any]) -> Counter[str]:
        """Count the training labels by class."""
        return Counter(record.label for record in records)

    def _class_weights(self) -> Tensor | None:
        given = self.settings["class_weights"]
        if given not in ("none", "balanced"):
            raise unknown("class_weights", given, ("none", "balanced"))
        return self._balanced  # there is none without data (export, predict), where nothing is trained either

    def build_backbone(self) -> Backbone:
        """Build the named backbone."""
        wanted = {key: self.settings[key] for key in ("pretrained", "weights", "layers")}
        self._built = build(self.settings["backbone"], **wanted)
        return self._built

    def features(self, batch: ProteinBatch) -> Tensor:
        """Return the backbone's features (B, L, width), one vector a residue."""
        return self._residue_features(batch)

    def _residue_features(self, batch: ProteinBatch, *, start: bool = False) -> Tensor:
        """Return `residue_features`, out of the cache where there is one."""
        if self.frozen_rows is None:
            return residue_features(self._built, self.backbone, batch.residues, batch.mask, start=start)
        items = [row[mask].unsqueeze(0) for row, mask in zip(batch.residues.cpu(), batch.mask.cpu(), strict=True)]

        def alone(position: int) -> tuple[Tensor]:
            residues = items[position].to(batch.residues.device)
            mask = torch.ones_like(residues, dtype=torch.bool)
            return (residue_features(self._built, self.backbone, residues, mask, start=start)[0],)

        rows = self.frozen_rows.rows([content(item) for item in items], alone)
        length = batch.residues.shape[1] + start
        return torch.stack([functional.pad(row[0], (0, 0, 0, length - len(row[0]))) for row in rows])

    def frozen_prefix(self) -> FrozenPrefix | None:
        """Return the whole backbone where its features are to be cached.

        Raises:
            GraftError: Training takes other stretches of long proteins in every epoch.
        """
        if not self.settings.get("cache_features"):
            return None
        facts = self.facts
        if facts.long == "window" and facts.kind != "residues" and facts.counts["long"]:
            raise GraftError(
                f"cache_features needs the same residues in every epoch, and {facts.counts['long']} protein(s) are "
                "longer than max_length. Raise max_length, or set long to truncate."
            )
        transform = {"backbone": self._built.name, "start": self.settings.get("pooling") == "cls"}
        return FrozenPrefix(modules={"backbone": self.backbone}, transform=transform)

    def forward(self, batch: ProteinBatch) -> Tensor:
        """Return the head's output for a batch."""
        with self.attached.grad_mode():
            features = self.features(batch)
        return self.head(features, batch.mask)

    def targets(self, batch: ProteinBatch) -> Tensor:
        """Return the targets."""
        return batch.target

    def example_batch(self) -> ProteinBatch:
        """Make two seeded random proteins of different length."""
        generator = torch.Generator().manual_seed(0)
        sequences = [torch.randint(0, len(STANDARD), (length,), generator=generator) for length in _EXAMPLE]
        residues = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=PAD)
        second = residues.flip(0) if self.kind == "pairs" else residues[:, :0]
        made = ProteinBatch(residues, residues != PAD, self._example_targets(residues), torch.arange(2), second)
        device = next(self.backbone.parameters()).device
        return ProteinBatch(*(tensor.to(device) for tensor in made))

    def _example_targets(self, residues: Tensor) -> Tensor:
        return torch.tensor([0, 1])

    def describe_facts(self) -> dict[str, Any]:
        """Return all that is needed to read and predict a new sequence."""
        facts = self.facts
        described = {
            "kind": facts.kind,
            "class_names": facts.class_names,
            "max_length": facts.max_length,
            "long": facts.long,
            "mean": facts.mean,
            "std": facts.std,
        }
        return json.loads(json.dumps(described))  # lists for tuples, as they come back from a file

    def load_facts(self, facts: Mapping[str, Any]) -> None:
        """Set the facts from an adapter's record."""
        kept = {key: facts[key] for key in ("kind", "max_length", "long", "mean", "std")}
        names = tuple(facts["class_names"])
        self.facts = ProteinFacts(**kept, class_names=names, name="", digest="", counts={})

    def describe_data(self, data: Any) -> dict[str, Any]:  # noqa: ANN401
        """Return name, digest, sizes, classes, what was left out, and the nearest neighbour's scores."""
        facts = self.facts
        return {
            "name": facts.name,
            "digest": facts.digest,
            **facts.counts,
            "classes": list(facts.class_names),
            "skipped": facts.skipped,
            "left_out": dict(facts.left_out),
            "leak": dict(facts.leak),
        }

    # ---- model card ---------------------------------------------------------------------------------------------

    def usage(self) -> str:
        """Return lines that load the export with peft and safetensors onto the backbone that Graft builds."""
        from common.tuners import is_own

        settings = self.settings
        options = {key: settings[key] for key in ("pretrained", "weights", "layers") if settings[key] is not None}
        given = "".join(f", {key}={value!r}" for key, value in options.items())
        tuned = "model = PeftModel.from_pretrained(built.model, FOLDER).eval()"
        if self.attached.plan.mode == "full":
            tuned = 'built.model.load_state_dict(load_file(f"{FOLDER}/model.safetensors"))\nmodel = built.model.eval()'
        elif self.attached.plan.mode == "frozen":
            tuned = "model = built.model.eval()"
        own = is_own(getattr(self.attached.plan.peft_config, "peft_type", None))
        registered = "import common.tuners  # registers Graft's own tuners with peft\n" if own else ""
        return (
            "import torch\nfrom peft import PeftModel\nfrom safetensors.torch import load_file\n"
            "from domains.protein._alphabet import encode\n"
            f"from domains.protein.backbones import {self._uses()}\n{self._head_import()}{registered}"
            f"built = build({settings['backbone']!r}{given})\n{tuned}\n{self._head_lines()}"
            f"# one protein of at most {self.facts.max_length} residues\n"
            'residues = torch.tensor([encode("MKTAYIAKQR")])\nmask = torch.ones_like(residues, dtype=torch.bool)\n'
            f"{self._output_lines()}"
        )

    def _uses(self) -> str:
        return "build, residue_features"

    def _head_import(self) -> str:
        return f"from domains.protein.heads import {type(self.head).__name__}\n"

    def _head_lines(self) -> str:
        return (
            f"head = {type(self.head).__name__}({self._head_arguments()}).eval()\n"
            'head.load_state_dict(load_file(f"{FOLDER}/head.safetensors"))\n'
        )

    def _head_arguments(self) -> str:
        """Return the arguments that build the head anew, as they stand in code."""
        raise NotImplementedError

    def _output_lines(self) -> str:
        return "outputs = head(residue_features(built, model, residues, mask), mask)\n"
