"""The Lightning modules of the vision domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassF1Score

from common.errors import GraftError
from common.frozen import FrozenPrefix, content
from common.images.backbones import ImageBackbone, build, last_norm, takes_size, tokens
from common.methods import MethodSpec
from common.split_data import named
from common.task import AdaptedTask, OptimSpec
from domains.vision.data import ImageBatch, ImageFacts
from domains.vision.heads import HeadKind, PooledHead, Pooling


class ImageClassification(AdaptedTask):
    """Classify images into one class each.

    Args:
        backbone: A starter's name or a timm model's.
        peft: The PEFT method.
        optim: Optimizer and schedule.
        pooling: How tokens become one vector; see `PooledHead`.
        head: `linear` or `mlp`.
        hidden: Width of the MLP head's hidden layer.
        depth: Keep only the first blocks of a ViT.
        pretrained: Start from pretrained weights.
        weights: A local state dict for a timm model, instead of the hub's.
        label_smoothing: Share of the target mass spread over all classes.
        cache_features: Keep what a frozen backbone makes of each image on disk, for later epochs and runs; with
            LinearProbe and without augmentation.
        seed: Seed of head, adapter and training steps.
        gradient_checkpointing: Recompute blocks in the backward pass.
    """

    domain: ClassVar[str] = "vision"
    primary: ClassVar[tuple[str, str]] = ("accuracy", "max")
    facts: ImageFacts

    def __init__(
        self,
        backbone: str,
        peft: MethodSpec,
        optim: OptimSpec = OptimSpec(),  # noqa: B008  (frozen)
        pooling: Pooling = "auto",
        head: HeadKind = "linear",
        hidden: int = 256,
        depth: int | None = None,
        pretrained: bool = True,
        weights: str | None = None,
        label_smoothing: float = 0.0,
        cache_features: bool = False,
        seed: int = 0,
        gradient_checkpointing: bool = False,
    ) -> None:
        settings = {
            "backbone": backbone,
            "pooling": pooling,
            "head": head,
            "hidden": hidden,
            "depth": depth,
            "pretrained": pretrained,
            "weights": weights,
            "label_smoothing": label_smoothing,
            "cache_features": cache_features,
        }
        super().__init__(
            peft=peft, optim=optim, settings=settings, seed=seed, gradient_checkpointing=gradient_checkpointing
        )
        self._built: ImageBackbone

    def build_backbone(self) -> ImageBackbone:
        """Build the named backbone at the data's image size."""
        wanted = {key: self.settings[key] for key in ("pretrained", "weights", "depth")}
        self._built = build(self.settings["backbone"], self.facts.image_size, **wanted)
        self.register_buffer("mean", torch.tensor(self._built.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self._built.std).view(3, 1, 1), persistent=False)
        return self._built

    def build_head(self) -> nn.Module:
        """Build pooling and classifier."""
        return PooledHead(
            self._built.width,
            self._built.prefix_tokens,
            len(self.facts.class_names),
            pooling=self.settings["pooling"],
            kind=self.settings["head"],
            hidden=self.settings["hidden"],
        )

    def build_loss(self) -> nn.Module:
        """Build the cross-entropy."""
        return nn.CrossEntropyLoss(label_smoothing=self.settings["label_smoothing"])

    def build_metrics(self) -> MetricCollection:
        """Build top-1, top-5 (with more than five classes), macro F1 and calibration error (15 bins)."""
        classes = len(self.facts.class_names)
        metrics: dict[str, Any] = {
            "accuracy": MulticlassAccuracy(classes, average="micro"),
            "macro_f1": MulticlassF1Score(classes, average="macro"),
            "ece": MulticlassCalibrationError(classes, n_bins=15),
        }
        if classes > 5:
            metrics["top5"] = MulticlassAccuracy(classes, top_k=5, average="micro")
        return MetricCollection(metrics, compute_groups=False)

    def features(self, batch: ImageBatch) -> Tensor:
        """Return the backbone's tokens (B, N, C) for uint8 images (B, 3, H, W), or (B, 1, C) out of the cache."""
        images = batch[0]
        if self.frozen_rows is None:
            return self._tokens(images)
        identities = [content(image) for image in images.cpu()]
        read = 1 if self.head.pooling == "cls" else None  # all that the head reads
        rows = self.frozen_rows.rows(identities, lambda item: (self._tokens(images[item : item + 1])[0, :read],))
        return torch.stack([row[0] for row in rows])

    def _tokens(self, images: Tensor) -> Tensor:
        normalised = (images.to(self.mean.dtype) / 255.0 - self.mean) / self.std  # type: ignore[operator]
        return tokens(self.backbone, normalised)

    def frozen_prefix(self) -> FrozenPrefix | None:
        """Return the whole backbone where its features are to be cached.

        Raises:
            GraftError: The data augments, so that no image comes twice.
        """
        if not self.settings["cache_features"]:
            return None
        if getattr(self._datamodule(), "augment", False):
            raise GraftError("cache_features needs the same images in every epoch. Set the data's augment to false.")
        built, pooling = self._built, self.head.pooling
        transform = {"backbone": built.name, "mean": built.mean, "std": built.std, "class_token": pooling == "cls"}
        return FrozenPrefix(modules={"backbone": self.backbone}, transform=transform)

    def targets(self, batch: ImageBatch) -> Tensor:
        """Return the labels (B,)."""
        return batch[1]

    def example_batch(self) -> ImageBatch:
        """Make two seeded noise images."""
        size = self.facts.image_size
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=generator)
        labels = torch.tensor([0, 1])
        device = next(self.backbone.parameters()).device
        return ImageBatch(images.to(device), labels.to(device), labels.to(device))

    def describe_facts(self) -> dict[str, Any]:
        """Return image size, class names, and how an image becomes a square."""
        facts = self.facts
        return {"image_size": facts.image_size, "class_names": list(facts.class_names), "fit": facts.fit}

    def load_facts(self, facts: Mapping[str, Any]) -> None:
        """Set image size and class names from an adapter's record."""
        self.facts = ImageFacts(
            image_size=facts["image_size"],
            class_names=tuple(facts["class_names"]),
            name="",
            digest="",
            counts={},
            skipped=0,
            fit=facts["fit"],
        )

    def describe_data(self, data: Any) -> dict[str, Any]:  # noqa: ANN401
        """Return name, digest, sizes, classes and the number of skipped images."""
        facts = self.facts
        return {
            "name": facts.name,
            "digest": facts.digest,
            **facts.counts,
            "classes": list(facts.class_names),
            "skipped": facts.skipped,
        }

    def predictions(self, outputs: Sequence[Tensor], data: Any, folder: Path) -> list[dict[str, Any]]:  # noqa: ANN401
        """Return id, label, prediction, probability and file of each test image."""
        probabilities = torch.cat(list(outputs)).softmax(dim=-1)
        top, index = probabilities.max(dim=-1)
        names = self.facts.class_names
        return [
            {
                **named(record.id, record.group),
                "label": record.label,
                "prediction": names[int(i)],
                "probability": round(float(p), 6),
                "path": str(record.path),
            }
            for record, p, i in zip(data.records("test"), top, index, strict=True)
        ]

    def usage(self) -> str:
        """Return lines that load the export with timm, peft and safetensors."""
        from common.tuners import is_own

        name, size = self.settings["backbone"], self.facts.image_size
        options = f"pretrained={self.settings['pretrained']}, num_classes=0"
        options += f", img_size={size}" if takes_size(name) else ""
        base = f"import timm\nbase = timm.create_model({name!r}, {options})"
        if not self._built.plain:
            given = {key: self.settings[key] for key in ("weights", "depth") if self.settings[key] is not None}
            options = "".join(f", {key}={value!r}" for key, value in given.items())
            base = (
                "from common.images.backbones import build  # Graft prepares this backbone for adapters\n"
                f"base = build({name!r}, {size}{options}).model"
            )
        tuned = "model = PeftModel.from_pretrained(base, FOLDER).eval()"
        if self.attached.plan.mode == "full":
            tuned = 'base.load_state_dict(load_file(f"{FOLDER}/model.safetensors"))\nmodel = base.eval()'
        elif self.attached.plan.mode == "frozen":
            tuned = "model = base.eval()"
        last = f"model.{last_norm(self.backbone)}(" if last_norm(self.backbone) else ""
        registered = is_own(getattr(self.attached.plan.peft_config, "peft_type", None))
        own = "import common.tuners  # registers Graft's own tuners with peft\n" if registered else ""
        return (
            f"from peft import PeftModel\nfrom safetensors.torch import load_file\n{own}{base}\n{tuned}\n"
            'head = load_file(f"{FOLDER}/head.safetensors")\n'
            f"# images: RGB in [0, 1], {size} x {size}, then normalised:\n"
            f"# mean {self._built.mean}, std {self._built.std}\n"
            f"tokens = {last}model.forward_features(images){')' if last else ''}\n"
        )
