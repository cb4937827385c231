"""A share of what training changed: parameters on the line from their start to their end."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Share:
    """Put parameters at a share of their way, and back.

    p(s) = p_start + s (p_end - p_start) for each trained parameter. Every method starts without effect, so that s = 0
    is the backbone as it was. Where a weight is what is trained (FullFineTune, BitFit, SSF), the change itself is
    scaled by s; where it is a product that starts at zero (LoRA's B A, an adapter's up-projection), by s times a factor
    that hardly changes.

    Args:
        parameters: The trained parameters by name, at their start.
        share: s, from 0 to 1.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], share: float) -> None:
        self.share = share
        self._parameters = dict(parameters)
        self._start = {name: value.detach().clone() for name, value in parameters.items()}
        self._ends: dict[str, Tensor] = {}

    @property
    def entered(self) -> bool:
        """Whether the parameters stand at their share now."""
        return bool(self._ends)

    def enter(self) -> None:
        """Note the parameters as they are, their ends, and put them at their share of the way."""
        if self.entered:
            return
        self._ends = {name: value.detach().clone() for name, value in self._parameters.items()}
        with torch.no_grad():
            for name, value in self._parameters.items():
                value.copy_(torch.lerp(self._start[name].to(value.device), value, self.share))

    def leave(self) -> None:
        """Put the parameters back at their ends."""
        with torch.no_grad():
            for name, end in self._ends.items():
                self._parameters[name].copy_(end)
        self._ends = {}
