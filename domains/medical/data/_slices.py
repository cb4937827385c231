"""Choosing which slices of one volume train, validate and test, with gaps between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from common.errors import GraftError
from common.loading import mix_seed
from common.splits import Split

VAL_QUANTILES = (0.2, 0.4, 0.6, 0.8)
# Slices nearer than this to a labelled one look like it.
GAP = 2


def choose_slices(found: Sequence[int], labelled: int, draw: int) -> Mapping[Split, tuple[int, ...]]:
    """Split the slices of a volume.

    Validation takes the slices at fixed quantiles of the extent, whatever `labelled` and `draw` are. Training takes
    `labelled` slices, evenly spread over what is at least 2 away from validation, from an offset that `draw` chooses.
    The test takes every slice at least 2 away from all of these.

    Args:
        found: Numbers of the slices that hold something, ascending and without holes.
        labelled: How many slices train.
        draw: Which offset: another number, other slices.

    Raises:
        GraftError: There are not so many slices, or none would be left for the test.
    """
    val = tuple(found[round(quantile * (len(found) - 1))] for quantile in VAL_QUANTILES)
    free = [number for number in found if _distance(number, val) >= GAP]
    if not 1 <= labelled <= len(free):
        raise GraftError(f"labelled is {labelled}: between 1 and {len(free)} slices can be labelled.")
    offset = mix_seed(labelled, draw) / 2**63
    train = tuple(free[int((number + offset) * len(free) / labelled)] for number in range(labelled))
    test = tuple(number for number in found if _distance(number, (*val, *train)) >= GAP)
    if not test:
        raise GraftError(f"labelled is {labelled}, which leaves no slice for the test: lower it.")
    return {"train": train, "val": val, "test": test}


def _distance(number: int, others: Sequence[int]) -> int:
    return min(abs(number - other) for other in others)
