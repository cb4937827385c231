"""Dynamic time warping: the cheapest way through two sequences that never goes back."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def warp(cost: NDArray[Any]) -> NDArray[np.int64]:
    """Align two sequences.

    The path with the least sum of costs from the first frames of both to the last ones, with the steps (1, 0), (0, 1)
    and (1, 1), all of weight one (Sakoe and Chiba, IEEE Transactions on ASSP 26, 1978). Of equally cheap ways the
    diagonal one is taken.

    Args:
        cost: (N, M), at least 0: what it costs that frame n of the one stands at frame m of the other.

    Returns:
        (P, 2), the pairs of frames of the path in order; max(N, M) <= P < N + M.
    """
    rows, columns = cost.shape
    # A border of infinities on two sides: a diagonal of the matrix is then one strided slice of its memory.
    stride = columns + 1
    total = np.full((rows + 1) * stride, np.inf)
    own = np.pad(cost.astype(np.float64), ((1, 0), (1, 0))).ravel()
    total[0] = 0.0
    for diagonal in range(rows + columns - 1):
        first, last = max(0, diagonal - columns + 1), min(rows - 1, diagonal)
        start = stride + 1 + diagonal + first * (stride - 1)
        stop = stride + 2 + diagonal + last * (stride - 1)
        here = slice(start, stop, max(1, stride - 1))
        before = [total[start - step : stop - step : max(1, stride - 1)] for step in (stride + 1, stride, 1)]
        total[here] = own[here] + np.minimum(np.minimum(before[0], before[1]), before[2])
    return _back(total.reshape(rows + 1, stride), rows, columns)


def _back(total: NDArray[Any], row: int, column: int) -> NDArray[np.int64]:
    path = []
    while row > 0 and column > 0:
        path.append((row - 1, column - 1))
        steps = ((row - 1, column - 1), (row - 1, column), (row, column - 1))
        row, column = min(steps, key=lambda step: total[step])
    return np.array(path[::-1], dtype=np.int64)
