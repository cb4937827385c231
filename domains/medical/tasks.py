"""The Lightning modules of the medical domain."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from common.attach import Attached
from common.checkpoint import write_atomically
from common.class_weights import ClassWeights
from common.errors import GraftError
from common.methods import LinearProbe, MethodSpec
from common.split_data import named
from common.task import Backbone, OptimSpec
from domains.medical._labelmaps import dice_keys, largest_components, plain_names, write_nifti
from domains.medical._task import MedicalTask
from domains.medical.backbones._hooks import outputs_of
from domains.medical.data._records import IGNORE, VolumeBatch
from domains.medical.heads import HeadInit, PooledVolumeHead, SegmentationHead, TokenDecoder
from domains.medical.losses import LossKind, SegmentationLoss
from domains.medical.metrics import (
    ClassDice,
    Hausdorff95,
    MacroAUROC,
    MeanDice,
    SurfaceDice,
    VoxelCalibrationError,
    count_overlaps,
    dice_scores,
)
from domains.medical.pictures import picture_of

_WINDOWS = 4  # that go through the network at once
_PICTURES = 16  # of a test split, chosen by a hash of their cases' ids


class Segmentation(MedicalTask):
    """Label each voxel of volumes or images.

    Training takes patches; evaluation slides a window of the same size over whole cases and blends the windows'
    logits with Gaussian weights. Voxels without a label are in no loss and in no metric. Distances are in mm; where the
    data does not know the size of its voxels, one counts as 1 mm.

    Args:
        backbone: A MONAI network, a starter's name, `bundle:FOLDER`, or for images (2D) a timm ViT.
        peft: The PEFT method.
        optim: Optimizer and schedule.
        net: Arguments of the MONAI network, before its defaults here.
        loss: `dice_ce`, `dice_focal`, `tversky` or `ce`; see `SegmentationLoss`.
        class_weights: Weights of the loss's voxelwise term: `none`, `balanced` (inverse frequencies of the training
            labels), or one number per class with the background's first.
        head_init: `auto` starts from the checkpoint's own output layer where its classes are the data's, `fresh` never.
        pretrained: Start from pretrained weights.
        weights: A local file of weights, instead of the backbone's own.
        overlap: Share of the window that neighbouring windows have in common.
        largest_component: In evaluation keep only the largest connected part (over faces) of each class.
        decoder_width: Channels of the decoder of a ViT's tokens.
        deep_supervision: How many coarser outputs of the network's decoder are trained too (Lee et al. 2015, arXiv
            1409.5185), each through a 1x1 convolution and enlarged to the image, since labels of a few slices cannot
            be made coarser. The loss of the i-th counts 2^-i of the image's own, all weights scaled to sum to one.
            Evaluation reads the image's own output alone.
        cache_features: Keep what a frozen backbone makes of each image on disk, for later epochs and runs; with
            LinearProbe, without augmentation and on whole images.
        seed: Seed of head, adapter and training steps.
        gradient_checkpointing: Recompute blocks in the backward pass.

    Raises:
        GraftError: Arguments out of range; all are named.
    """

    primary: ClassVar[tuple[str, str]] = ("dice", "max")

    def __init__(
        self,
        backbone: str,
        peft: MethodSpec,
        optim: OptimSpec = OptimSpec(),  # noqa: B008  (frozen)
        net: dict[str, Any] | None = None,
        loss: LossKind = "dice_ce",
        class_weights: ClassWeights | list[float] = "none",
        head_init: HeadInit = "auto",
        pretrained: bool = True,
        weights: str | None = None,
        overlap: float = 0.5,
        largest_component: bool = False,
        decoder_width: int = 128,
        deep_supervision: int = 0,
        cache_features: bool = False,
        seed: int = 0,
        gradient_checkpointing: bool = False,
    ) -> None:
        problems = [] if 0 <= overlap < 1 else [f"overlap is {overlap} (a share in [0, 1))"]
        problems += [] if decoder_width >= 1 else [f"decoder_width is {decoder_width} (at least 1)"]
        problems += [] if deep_supervision >= 0 else [f"deep_supervision is {deep_supervision} (at least 0)"]
        if deep_supervision and isinstance(peft, LinearProbe):
            problems.append("deep_supervision with LinearProbe, which trains nothing behind the coarser outputs")
        if loss == "tversky" and class_weights != "none":
            problems.append(
                "class_weights with loss 'tversky', which has no voxelwise term (set class_weights to none)"
            )
        if problems:
            raise GraftError(f"Segmentation: {'; '.join(problems)}. Mend the recipe's 'model'.")
        settings = {
            "backbone": backbone,
            "net": net,
            "loss": loss,
            "class_weights": class_weights,
            "head_init": head_init,
            "pretrained": pretrained,
            "weights": weights,
            "overlap": overlap,
            "largest_component": largest_component,
            "decoder_width": decoder_width,
            "deep_supervision": deep_supervision,
            "cache_features": cache_features,
        }
        super().__init__(
            peft=peft, optim=optim, settings=settings, seed=seed, gradient_checkpointing=gradient_checkpointing
        )

    # ---- building

    def assemble(self, attach_with: Callable[[Backbone], Attached] | None = None) -> None:
        """Build everything; validation goes without the surface metrics, which cost more than the epoch."""
        super().assemble(attach_with)
        self.val_metrics = self._collection(surfaces=False)

    def build_head(self) -> nn.Module:
        """Build the output layer, or the decoder of tokens."""
        names, deep = self.facts.class_names, self.settings["deep_supervision"]
        if deep > len(self._built.decoder):
            raise GraftError(
                f"deep_supervision is {deep}, and '{self._built.name}' has {len(self._built.decoder)} coarser outputs "
                "on its way up. Set it to that or less."
            )
        if self._built.dense:
            return SegmentationHead(self._built, names, init=self.settings["head_init"], deep=deep)
        return TokenDecoder(self._built.width, len(names), self._built.divisor, hidden=self.settings["decoder_width"])

    def build_loss(self) -> nn.Module:
        """Build the loss over labelled voxels."""
        return SegmentationLoss(self.settings["loss"], IGNORE, self._class_weights())

    def build_metrics(self) -> MetricCollection:
        """Build Dice (mean and by class), surface distances in mm and voxelwise calibration; see `metrics`."""
        return self._collection(surfaces=True)

    def _collection(self, *, surfaces: bool) -> MetricCollection:
        classes, spacing = len(self.facts.class_names), self.facts.spacing
        pooled = self.facts.spatial_dims == 2
        by_class = {
            key: ClassDice(number, classes, IGNORE, pooled=pooled)
            for number, key in enumerate(dice_keys(self.facts.class_names), start=1)
        }
        metrics: dict[str, Any] = {"dice": MeanDice(classes, IGNORE, pooled=pooled)}
        groups = [["dice", *by_class], ["ece"]]
        if surfaces:
            metrics["hd95_mm"] = Hausdorff95(classes, IGNORE, spacing, pooled=pooled)
            metrics["surface_dice_mm"] = SurfaceDice(classes, IGNORE, spacing, pooled=pooled)
            groups.append(["hd95_mm", "surface_dice_mm"])
        metrics |= {"ece": VoxelCalibrationError(IGNORE), **by_class}
        return MetricCollection(metrics, compute_groups=groups)

    def _train_labels(self, data: Any) -> Iterable[Tensor]:  # noqa: ANN401
        return (data.case("train", index)["label"] for index in range(len(data.records("train"))))

    def _example_labels(self, generator: torch.Generator) -> Tensor:
        return torch.randint(0, len(self.facts.class_names), (2, *self.facts.patch_size), generator=generator)

    def _head_arguments(self) -> str:
        names = self.facts.class_names
        if self._built.dense:
            deep = self.settings["deep_supervision"]
            return f"built, {names!r}, init='fresh'" + (f", deep={deep}" if deep else "")
        return f"{self._built.width}, {len(names)}, {self._built.divisor}, hidden={self.settings['decoder_width']}"

    # ---- steps

    def forward(self, batch: VolumeBatch) -> Tensor:
        """Return logits (B, K, *spatial) for images (B, C, *spatial), all in one piece."""
        logits = super().forward(batch)
        return logits[(..., *(slice(side) for side in batch.image.shape[2:]))]

    def compute_loss(self, batch: VolumeBatch) -> Tensor:
        """Return the loss of a batch, of the coarser outputs too where these are supervised."""
        if not self.settings["deep_supervision"]:
            return super().compute_loss(batch)
        layers = cast(SegmentationHead, self.head).deep
        names = [name for name, _ in self._built.decoder[: len(layers)]]
        with outputs_of(self._built.model, names) as coarse:
            losses = [super().compute_loss(batch)]
        padded, sides = self._padded(batch).shape[2:], batch.image.shape[2:]
        mode = "bilinear" if len(sides) == 2 else "trilinear"
        for name, layer in zip(names, layers, strict=True):
            logits = interpolate(layer(coarse[name]), size=padded, mode=mode, align_corners=False)
            losses.append(self.loss(logits[(..., *(slice(side) for side in sides))], self.targets(batch)))
        weights = [2.0**-level for level in range(len(losses))]
        return torch.stack([weight * loss for weight, loss in zip(weights, losses, strict=True)]).sum() / sum(weights)

    def infer(self, batch: VolumeBatch) -> Tensor:
        """Return logits (B, K, *spatial) for whole cases, window by window."""
        from monai.inferers.utils import sliding_window_inference

        # In place, the windows are blended in the precision that they come in.
        outputs = sliding_window_inference(
            batch.image,
            roi_size=self.facts.patch_size,
            sw_batch_size=_WINDOWS,
            predictor=lambda images: self(batch._replace(image=images)).float(),
            overlap=self.settings["overlap"],
            mode="gaussian",
        )
        outputs = torch.as_tensor(outputs)
        return largest_components(outputs) if self.settings["largest_component"] else outputs

    def keep(self, outputs: Tensor) -> Tensor:
        """Return the label maps, uint8 (B, *spatial)."""
        return outputs.argmax(dim=1).to(torch.uint8)

    def on_validation_epoch_end(self) -> None:
        """Name the classes that validation says nothing about."""
        self._warn_absent(self.val_metrics, "validation")

    def on_test_epoch_end(self) -> None:
        """Name the classes that the test says nothing about."""
        self._warn_absent(self.test_metrics, "test")

    def _warn_absent(self, metrics: MetricCollection, split: str) -> None:
        names = [self.facts.class_names[number] for number in metrics["dice"].absent()]  # type: ignore[operator]
        if names:
            warnings.warn(
                f"No label of the {split} split shows {', '.join(names)}: predicted there, a class counts 0 in Dice, "
                "else not at all.",
                stacklevel=2,
            )

    # ---- results

    def predictions(self, outputs: Sequence[Tensor], data: Any, folder: Path) -> list[dict[str, Any]]:  # noqa: ANN401
        """Return id, Dice (mean and by class), absent classes, label map and picture of each test case.

        Label maps lie on the grid that the case was prepared on. A class that neither labels nor prediction show has
        no Dice. Pictures are drawn of up to 16 cases, chosen by a hash of their ids.
        """
        maps = [found for batch in outputs for found in batch]
        records = data.records("test")
        ids = [record.id for record in records]
        pictured = set(sorted(ids, key=lambda name: hashlib.sha256(name.encode()).hexdigest())[:_PICTURES])
        files = plain_names(ids)
        rows = []
        for index, (name, found, file) in enumerate(zip(ids, maps, files, strict=True)):
            case = data.case("test", index)
            scores = self._case_scores(found, case["label"])
            path = folder / "predictions" / f"{file}.nii.gz"
            write_nifti(path, found.numpy(), case["affine"])
            picture = None
            if name in pictured:
                title = name if scores["dice"] is None else f"{name}, mean Dice {scores['dice']:.3f}"
                drawn = picture_of(case, self.facts.class_names, found.numpy(), title=title)
                picture = f"predictions/{file}.png"
                write_atomically(folder / picture, lambda target, drawn=drawn: target.write(drawn))
            row = {**scores, "map": f"predictions/{file}.nii.gz", "picture": picture}
            rows.append(named(name, records[index].group) | row)
        return rows

    def _case_scores(self, found: Tensor, label: Tensor) -> dict[str, Any]:
        overlaps = count_overlaps(found, label, len(self.facts.class_names), IGNORE)
        scores = dice_scores(overlaps)[1:]
        mean = float(scores.nanmean())
        keys = dice_keys(self.facts.class_names)
        return {
            "dice": None if math.isnan(mean) else round(mean, 6),
            **{key: None if s.isnan() else round(float(s), 6) for key, s in zip(keys, scores, strict=True)},
            "absent": [self.facts.class_names[number] for number in range(1, len(overlaps)) if not overlaps[number, 2]],
        }


class VolumeClassification(MedicalTask):
    """Classify volumes or images into one class each, by the pooled features of a network.

    Args:
        backbone: A MONAI network, a starter's name, `bundle:FOLDER`, or for images (2D) a timm backbone.
        peft: The PEFT method.
        optim: Optimizer and schedule.
        net: Arguments of the MONAI network, before its defaults here.
        class_weights: Weights of the cross-entropy: `none`, `balanced` (inverse frequencies of the training labels),
            or one number per class.
        pretrained: Start from pretrained weights.
        weights: A local file of weights, instead of the backbone's own.
        cache_features: Keep what a frozen backbone makes of each image on disk, for later epochs and runs; with
            LinearProbe and without augmentation.
        seed: Seed of head, adapter and training steps.
        gradient_checkpointing: Recompute blocks in the backward pass.
    """

    primary: ClassVar[tuple[str, str]] = ("accuracy", "max")

    def __init__(
        self,
        backbone: str,
        peft: MethodSpec,
        optim: OptimSpec = OptimSpec(),  # noqa: B008  (frozen)
        net: dict[str, Any] | None = None,
        class_weights: ClassWeights | list[float] = "none",
        pretrained: bool = True,
        weights: str | None = None,
        cache_features: bool = False,
        seed: int = 0,
        gradient_checkpointing: bool = False,
    ) -> None:
        settings = {
            "backbone": backbone,
            "net": net,
            "class_weights": class_weights,
            "pretrained": pretrained,
            "weights": weights,
            "cache_features": cache_features,
        }
        super().__init__(
            peft=peft, optim=optim, settings=settings, seed=seed, gradient_checkpointing=gradient_checkpointing
        )

    def build_head(self) -> nn.Module:
        """Build pooling and classifier."""
        return PooledVolumeHead(self._built.width, len(self.facts.class_names))

    def build_loss(self) -> nn.Module:
        """Build the cross-entropy."""
        return nn.CrossEntropyLoss(weight=self._class_weights())

    def build_metrics(self) -> MetricCollection:
        """Build accuracy, the area under the ROC curve (mean over classes, one against the rest) and calibration."""
        classes = len(self.facts.class_names)
        metrics: dict[str, Any] = {
            "accuracy": MulticlassAccuracy(classes, average="micro"),
            "auroc": MacroAUROC(classes),
            "ece": MulticlassCalibrationError(classes, n_bins=15),
        }
        return MetricCollection(metrics, compute_groups=False)

    def _train_labels(self, data: Any) -> Iterable[Tensor]:  # noqa: ANN401
        number = {name: position for position, name in enumerate(self._datamodule().facts.class_names)}
        return (torch.tensor([number[record.target]]) for record in data.records("train"))

    def _example_labels(self, generator: torch.Generator) -> Tensor:
        return torch.tensor([0, 1])

    def _head_arguments(self) -> str:
        return f"{self._built.width}, {len(self.facts.class_names)}"

    def predictions(self, outputs: Sequence[Tensor], data: Any, folder: Path) -> list[dict[str, Any]]:  # noqa: ANN401
        """Return id, label, prediction, probability and file of each test case."""
        top, index = torch.cat(list(outputs)).softmax(dim=-1).max(dim=-1)
        return [
            {
                **named(record.id, record.group),
                "label": record.target,
                "prediction": self.facts.class_names[int(i)],
                "probability": round(float(p), 6),
                "path": str(record.image[0]) if record.image else None,
            }
            for record, p, i in zip(data.records("test"), top, index, strict=True)
        ]
