"""SpecAugment (Park et al. 2019, arXiv 1904.08779): stretches of time and bands of frequency hidden in training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import GraftError


@dataclass(frozen=True, kw_only=True)
class SpecAugment:
    """How much of each utterance to hide.

    A mask's width is drawn evenly from zero to the widest, and then its place. Masks of time are drawn within the
    utterance and grow with it (arXiv 1912.05533). On Whisper the bands are those of its log-mel spectrogram; on a
    network that reads the waveform they are channels of its projected features, as in wav2vec 2.0.

    Args:
        time_masks: Masks of time for each utterance.
        time_share: Width of the widest mask of time, as a share of the utterance.
        band_masks: Masks of bands for each utterance.
        band_share: Width of the widest mask of bands, as a share of all bands.
    """

    time_masks: int = 2
    time_share: float = 0.1
    band_masks: int = 2
    band_share: float = 0.3

    def check(self) -> None:
        """Raise one `GraftError` that names every value out of range."""
        counts = {"time_masks": self.time_masks, "band_masks": self.band_masks}
        shares = {"time_share": self.time_share, "band_share": self.band_share}
        problems = [f"{name} is {count} (at least 0)" for name, count in counts.items() if count < 0]
        problems += [f"{name} is {share} (from 0 to 1)" for name, share in shares.items() if not 0 <= share <= 1]
        if problems:
            raise GraftError(f"spec_augment: {'; '.join(problems)}. Mend the recipe's 'spec_augment'.")

    def masks(self, lengths: Tensor, frames: int, bands: int) -> tuple[Tensor, Tensor]:
        """Draw what to hide, from torch's own random state on the CPU.

        Args:
            lengths: (B,), frames of each utterance.
            frames: Frames F of the batch.
            bands: Number M of bands.

        Returns:
            True where time is hidden (B, F), and where bands are (B, M).
        """
        own = lengths.cpu()
        time = _spans(self.time_masks, own.double() * self.time_share, own, frames)
        widest = torch.full((len(own),), bands * self.band_share, dtype=torch.double)
        band = _spans(self.band_masks, widest, torch.full_like(own, bands), bands)
        return time.to(lengths.device), band.to(lengths.device)


def _spans(number: int, widest: Tensor, room: Tensor, size: int) -> Tensor:
    """Draw `number` spans for each row, up to `widest` (B,) wide and within the first `room` (B,) of `size` places."""
    drawn = torch.rand(2, len(room), number, dtype=torch.double)
    widths = (drawn[0] * (widest.unsqueeze(1).floor() + 1)).floor()  # (B, N)
    starts = (drawn[1] * (room.unsqueeze(1) - widths + 1)).floor()
    places = torch.arange(size).view(1, 1, -1)
    inside = (places >= starts.unsqueeze(2)) & (places < (starts + widths).unsqueeze(2))  # (B, N, size)
    return inside.any(dim=1)
