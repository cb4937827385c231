"""Sounds whose pitch, level and length are known."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def buzz(hertz, seconds: float = 1.0, rate: int = 16_000, *, partials: int = 20, first: int = 1) -> Tensor:
    """A harmonic sound: float32 (T,), peak about 0.5. `hertz` is a number or one for each sample."""
    count = round(seconds * rate)
    track = np.broadcast_to(np.asarray(hertz, dtype=float), count)
    phase = 2 * np.pi * np.cumsum(track) / rate
    # Partials fade with their number, and none lies beyond what the rate can hold.
    parts = [np.sin(n * phase) / n * (n * track < 0.45 * rate) for n in range(first, partials + 1)]
    sound = np.sum(parts, axis=0)
    return torch.from_numpy(0.5 * sound / np.abs(sound).max()).float()


def hiss(seconds: float = 1.0, rate: int = 16_000, *, level: float = -26.0, seed: int = 0) -> Tensor:
    """White noise of a level in dBFS: float32 (T,)."""
    generator = torch.Generator().manual_seed(seed)
    return 10 ** (level / 20) * torch.randn(round(seconds * rate), generator=generator)


def nothing(seconds: float, rate: int = 16_000) -> Tensor:
    """Digital silence: float32 (T,)."""
    return torch.zeros(round(seconds * rate))


def syllables(hertz: float = 150.0, count: int = 4, rate: int = 16_000, *, pause: float = 0.1) -> Tensor:
    """Bursts of a harmonic sound of 0.2 s, each as loud, with pauses between: float32 (T,)."""
    burst = buzz(hertz, 0.2, rate)
    return torch.cat([part for _ in range(count) for part in (burst, nothing(pause, rate))][:-1])
