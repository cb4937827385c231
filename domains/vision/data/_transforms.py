"""What happens to a decoded image before it enters a batch; everything stays uint8."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.transforms import v2


class RightAngles(nn.Module):
    """Turn an image by a random multiple of 90 degrees; no pixel is interpolated."""

    def forward(self, image: Tensor) -> Tensor:
        """Turn one image, (3, H, W), or a batch of them."""
        return torch.rot90(image, int(torch.randint(4, ()).item()), dims=(-2, -1))


def crop_and_flip(size: int, *, flip: bool) -> nn.Module:
    """Crop a random half to the whole of the image, resize it to a square, and mirror it every other time."""
    steps: list[nn.Module] = [v2.RandomResizedCrop(size, scale=(0.5, 1.0), antialias=True)]
    if flip:
        steps.append(v2.RandomHorizontalFlip())
    return v2.Compose(steps)


def turn_and_flip(size: int, *, flip: bool) -> nn.Module:
    """Show the whole image in one of its 8 orientations (4 without `flip`), for shapes that a crop would cut off."""
    steps: list[nn.Module] = [centre(size), RightAngles()]
    if flip:
        steps.append(v2.RandomHorizontalFlip())
    return v2.Compose(steps)


def centre(size: int) -> nn.Module:
    """Resize the shorter side and take the square in the middle."""
    return v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size)])
