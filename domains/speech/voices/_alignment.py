"""Which frames belong to which symbol: VITS' monotonic alignment, and dynamic time warping."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def frame_likelihoods(latents: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Return the log-likelihood of each frame's latents under each symbol's Gaussian.

    Args:
        latents: (B, C, F).
        mean: (B, C, L).
        log_scale: (B, C, L), natural logarithm of the deviation.

    Returns:
        (B, L, F), summed over the channels.
    """
    with torch.autocast(latents.device.type, enabled=False):  # sums of large terms that nearly cancel
        latents, mean, log_scale = latents.float(), mean.float(), log_scale.float()
        weight = (-2 * log_scale).exp()
        constant = (-0.5 * math.log(2 * math.pi) - log_scale - 0.5 * mean.square() * weight).sum(1)  # (B, L)
        squares = weight.transpose(1, 2) @ latents.square()
        return constant[:, :, None] - 0.5 * squares + (mean * weight).transpose(1, 2) @ latents


def align(likelihoods: Tensor, symbols: Tensor, frames: Tensor) -> Tensor:
    """Find the likeliest monotonic alignment (Glow-TTS, arXiv 2005.11129; the MAS of VITS).

    Every frame belongs to one symbol, every symbol has a frame or more, and symbols follow each other in order. With
    Q[l, f] the likelihood of the best alignment of frames up to f that ends on symbol l,
    Q[l, f] = max(Q[l, f - 1], Q[l - 1, f - 1]) + likelihoods[l, f].

    Args:
        likelihoods: (B, L, F).
        symbols: (B,), symbols of each row.
        frames: (B,), frames of each row, no fewer than its symbols.

    Returns:
        Frames of each symbol, int64 (B, L), 0 behind the end.
    """
    rows = zip(likelihoods.detach().float().cpu().numpy(), symbols.tolist(), frames.tolist(), strict=True)
    found = np.zeros(likelihoods.shape[:2], dtype=np.int64)
    for place, (values, length, span) in enumerate(rows):
        found[place, :length] = _best_path(values[:length, :span].astype(np.float64))
    return torch.from_numpy(found).to(likelihoods.device)


def _best_path(values: np.ndarray) -> np.ndarray:
    """Return the frames of each symbol of one row, (L,)."""
    symbols, frames = values.shape
    if frames < symbols:
        raise ValueError(f"{symbols} symbols need as many frames, and there are {frames}")
    score = np.full(symbols, -np.inf)
    score[0] = values[0, 0]
    moved = np.zeros((frames, symbols), dtype=bool)  # whether the best way to (f, l) comes from symbol l - 1
    for frame in range(1, frames):
        before = np.concatenate(([-np.inf], score[:-1]))
        moved[frame] = before > score
        score = np.where(moved[frame], before, score) + values[:, frame]
    durations = np.zeros(symbols, dtype=np.int64)
    symbol = symbols - 1
    for frame in range(frames - 1, -1, -1):
        durations[symbol] += 1
        symbol -= int(moved[frame, symbol])
    return durations


def warp(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Find where each frame of a sequence lies in another by dynamic time warping (Sakoe and Chiba 1978).

    Steps go one frame on in either sequence or in both; the cost is the Euclidean distance of the frames.

    Args:
        one: (F, C).
        two: (G, C).

    Returns:
        For each frame of `one` the number of frames of `two` before the first one that it meets, int64 (F + 1,), from
        0 to G: what lies between the boundaries of frames in `one` lies between these in `two`.
    """
    cost = np.sqrt(np.maximum(0.0, (one**2).sum(1)[:, None] + (two**2).sum(1)[None] - 2 * one @ two.T))
    total = np.full((len(one) + 1, len(two) + 1), np.inf)
    total[0, 0] = 0.0
    # Along an anti-diagonal all cells are independent of each other.
    for diagonal in range(len(one) + len(two) - 1):
        rows = np.arange(max(0, diagonal - len(two) + 1), min(len(one), diagonal + 1))
        columns = diagonal - rows
        best = np.minimum(total[rows, columns], np.minimum(total[rows, columns + 1], total[rows + 1, columns]))
        total[rows + 1, columns + 1] = best + cost[rows, columns]
    first = np.full(len(one) + 1, len(two), dtype=np.int64)
    row, column = len(one), len(two)
    while row > 0 and column > 0:
        first[row - 1] = column - 1
        steps = {(row - 1, column - 1): 0, (row - 1, column): 1, (row, column - 1): 2}
        row, column = min(steps, key=lambda step: (total[step], steps[step]))
    first[0] = 0
    return first


def warped_durations(durations: np.ndarray, boundaries: np.ndarray) -> np.ndarray:
    """Carry the durations of symbols over to another sequence.

    Args:
        durations: Frames of each symbol, int (L,).
        boundaries: What `warp` returned for the sequence that they sum up to, (F + 1,).

    Returns:
        Frames of each symbol in the other sequence, int64 (L,), 0 where the other has none.
    """
    ends = np.concatenate(([0], np.cumsum(durations)))
    return np.diff(boundaries[ends])
