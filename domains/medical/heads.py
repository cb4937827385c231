"""Heads of medical tasks: a network's own output layer, a decoder of patch tokens, pooling for classification."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.errors import GraftError, unknown
from domains.medical.backbones import MedicalBackbone

HeadInit = Literal["auto", "fresh"]


class SegmentationHead(nn.Module):
    """The output layer that was taken off a network, for the task's classes.

    Args:
        backbone: The network, built for as many classes.
        class_names: Names of the classes, in the order of their labels.
        init: `auto` starts from the checkpoint's own output layer where that tells apart the same classes in the same
            order, else from random weights; `fresh` always from random weights.
        deep: How many coarser outputs of the decoder get an output layer of their own, for deep supervision.

    Attributes:
        from_checkpoint: Whether it started from the checkpoint's own output layer.
        deep: The coarser outputs' layers, 1x1 convolutions, fine to coarse.
    """

    def __init__(
        self, backbone: MedicalBackbone, class_names: Sequence[str], init: HeadInit = "auto", deep: int = 0
    ) -> None:
        super().__init__()
        if init not in ("auto", "fresh"):
            raise unknown("head_init", init, ("auto", "fresh"))
        self.output = copy.deepcopy(backbone.output)
        self.from_checkpoint = init == "auto" and bool(class_names) and backbone.head_classes == tuple(class_names)
        if self.from_checkpoint:
            self._load(backbone)
        else:
            for module in self.output.modules():
                reset: Any = getattr(module, "reset_parameters", None)
                if reset is not None:
                    reset()
        convolution = nn.Conv2d if backbone.spatial_dims == 2 else nn.Conv3d
        widths = [width for _, width in backbone.decoder[:deep]]
        self.deep = nn.ModuleList(convolution(width, len(class_names), kernel_size=1) for width in widths)

    def _load(self, backbone: MedicalBackbone) -> None:
        own, given = self.output.state_dict(), backbone.head_weights
        wrong = sorted(set(own) ^ set(given)) or [name for name in own if own[name].shape != given[name].shape]
        if wrong:
            raise GraftError(
                f"The output layer in the checkpoint of '{backbone.name}' names these classes and does not fit "
                f"({len(wrong)} tensors differ, such as {wrong[0]}). Set head_init to 'fresh'."
            )
        self.output.load_state_dict(dict(given))

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, width, *spatial or coarser) to logits (B, K, *spatial)."""
        return torch.as_tensor(self.output(features))


class TokenDecoder(nn.Module):
    """A light decoder from a grid of patch tokens to logits for each pixel.

    Tokens are projected, twice enlarged two times with a 3x3 convolution behind, classified, and the logits enlarged to
    the image; every enlargement is bilinear.

    Args:
        width: Channels C of the tokens.
        classes: Number of classes K.
        patch: Pixels along each side of a patch.
        hidden: Channels inside the decoder.
    """

    def __init__(self, width: int, classes: int, patch: int, hidden: int = 128) -> None:
        super().__init__()
        self.patch = patch
        self.project = nn.Conv2d(width, hidden, kernel_size=1)
        self.refine = nn.ModuleList(
            nn.Sequential(nn.Conv2d(hidden, hidden, kernel_size=3, padding=1), nn.GroupNorm(1, hidden), nn.GELU())
            for _ in range(2)
        )
        self.classifier = nn.Conv2d(hidden, classes, kernel_size=1)

    def forward(self, features: Tensor) -> Tensor:
        """Map token features (B, C, h, w) to logits (B, K, h * patch, w * patch)."""
        size = [side * self.patch for side in features.shape[2:]]
        x = self.project(features)
        for block in self.refine:
            x = block(functional.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False))
        return functional.interpolate(self.classifier(x), size=size, mode="bilinear", align_corners=False)


class PooledVolumeHead(nn.Module):
    """Class logits of a whole image from the mean and the maximum of its features.

    Args:
        width: Channels of the features.
        classes: Number of classes K.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(2 * width, classes)

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, width, *spatial) to logits (B, K)."""
        flat = features.flatten(2)  # (B, width, voxels)
        return self.classifier(torch.cat((flat.mean(dim=2), flat.amax(dim=2)), dim=1))
