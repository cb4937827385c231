"""MONAI's DynUNet, each module of it reached by one name."""

from __future__ import annotations

from typing import Any

import monai.networks.nets
import torch
from torch import Tensor


class DynUNet(monai.networks.nets.DynUNet):
    """The same network with the same outputs; it takes no deep supervision.

    MONAI's runs its blocks through `skip_layers`, which holds them a second time. A block that a method replaces under
    its first name would go on running there unchanged, and each weight would be written twice.
    """

    def __init__(self, **args: Any) -> None:  # noqa: ANN401
        super().__init__(**args)
        del self.skip_layers

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, C, *spatial) to the output block's result."""
        skips = [self.input_block(x)]
        for block in self.downsamples:
            skips.append(block(skips[-1]))
        x = self.bottleneck(skips[-1])
        for block, skip in zip(self.upsamples, reversed(skips), strict=True):
            x = block(x, skip)
        return torch.as_tensor(self.output_block(x))
