"""Images drawn from a label map (SynthSeg: Billot et al., arXiv 2107.09559), so that nets learn shape, not contrast."""

from __future__ import annotations

import torch
from torch import Tensor

from domains.medical.data._augment import random_field, spread_levels, uniform
from domains.medical.data._geometry import smooth

TISSUES = 3


def tissue_regions(image: Tensor, label: Tensor) -> Tensor:
    """Split each class into tissues by intensity: fluid, grey and white matter on a T1-weighted image.

    The tissues are found by k-means over the whole brain, started from its quantiles, so the result is one of the image
    alone.

    Args:
        image: float32 (D, H, W).
        label: uint8 (D, H, W); 0 is outside the brain.

    Returns:
        uint8 (D, H, W): 0 outside the brain, else 1 + (class - 1) * 3 + tissue, the tissues from dark to bright.
    """
    brain = label > 0
    values = image[brain]
    means = torch.quantile(values[:: max(1, len(values) // 100_000)], torch.tensor([0.1, 0.5, 0.9]))
    for _ in range(20):
        nearest = (values[:, None] - means).abs().argmin(dim=1)
        means = torch.stack([values[nearest == tissue].mean() for tissue in range(TISSUES)])
    tissue = (values[:, None] - means).abs().argmin(dim=1)
    regions = torch.zeros_like(label)
    regions[brain] = (1 + (label[brain].long() - 1) * TISSUES + tissue).to(label.dtype)
    return regions


def draw_image(regions: Tensor, classes: int) -> Tensor:
    """Draw an image from regions: a Gaussian for each, blur, bias field, gamma.

    The mean of a region is its tissue's, drawn from [0, 1] apart from the other tissues', and moved a little for each
    class: white matter looks alike in all classes, and nuclei stand out somewhat.

    Args:
        regions: uint8 (*spatial), as `tissue_regions` makes it, deformed already.
        classes: Number of classes without the background.

    Returns:
        float32 (1, *spatial), about in [0, 1]; zero outside the brain.
    """
    means = 0.1 + 0.8 * spread_levels(TISSUES) + torch.randn(classes, TISSUES) * 0.07
    means = means.reshape(-1).clamp(0.03, 1.0)
    spreads = torch.rand(classes * TISSUES) * 0.08
    table = torch.stack([torch.cat([torch.zeros(1), means]), torch.cat([torch.zeros(1), spreads])])
    flat = regions.long()
    image = table[0][flat] + table[1][flat] * torch.randn(regions.shape)
    image = smooth(image[None], [uniform(0.3, 1.0)] * regions.ndim)
    image = image * torch.exp(0.2 * random_field(regions.shape, 1))
    image = image.clamp_min(0) ** uniform(0.7, 1.4)
    image = image + torch.randn_like(image) * uniform(0.0, 0.03)
    return torch.where(flat > 0, image, 0.0)
