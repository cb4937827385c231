"""Cases of `common/methods/hybrid.py`."""

from __future__ import annotations

from common.roles import NORMS
from tests.cases._case import Case, both, matrix, toy, whole


def _lora(layer, rank):
    rows, columns = matrix(layer)
    return min(rank, rows, columns) * (rows + columns)


def _norms_and_lora(spec, layer, role):
    return whole(layer) if isinstance(layer, NORMS) else _lora(layer, 2)


def _three(spec, layer, role):
    """LoRA of rank 2 on attention, bottlenecks of width 3 at the networks, scale and shift of the norms."""
    if isinstance(layer, NORMS):
        return whole(layer)
    outputs = matrix(layer)[0]
    return 2 * 3 * outputs + 3 + outputs if role == "ffn_out" else _lora(layer, 2)


def _nearest(spec, model, targets):
    """LoRA on the chosen layers, at the rank of 1 to `most` that comes nearest to the share."""
    wanted = spec.share * whole(model)
    counts = [sum(_lora(model.get_submodule(name), rank) for name in targets) for rank in range(1, spec.most + 1)]
    return min(counts, key=lambda count: (abs(count - wanted), count))


def _mam(spec, model, targets):
    """Keys and values for each block of width 8, and a bottleneck beside each feed-forward network."""
    return len(model.blocks) * (2 * spec.length * 8 + spec.width * (8 + 8 + 1) + 8)


def _unipelt(spec, model, targets):
    """For each block of width 8: keys and values, A and B of queries and values, a bottleneck, and four gates."""
    block = 2 * spec.length * 8 + 2 * spec.rank * (8 + 8) + 2 * spec.width * 8 + spec.width + 8 + 4 * (8 + 1)
    return len(model.blocks) * block


CASES = {
    "MAM": Case(
        toy=toy("MAM", length=2, width=3),
        zoo=None,
        total=_mam,
        mergeable=False,
        random_start=True,
        starts_elsewhere=True,
        without_family="belongs to no family that Graft knows",
    ),
    "UniPELT": Case(
        toy=toy("UniPELT"),
        zoo=None,
        total=_unipelt,
        mergeable=False,
        random_start=True,
        starts_elsewhere=True,
        without_family="belongs to no family that Graft knows",
    ),
    # Built on exported adapters: see tests/common/methods/test_composed.py.
    "Stack": Case(toy=None, zoo=None, starts_elsewhere=True),
    "AdapterFusion": Case(toy=None, zoo=None, mergeable=False, random_start=True, starts_elsewhere=True),
    "Mixture": both("Mixture", per_layer=_norms_and_lora, random_start=True),
    "PerGroup": Case(
        toy=toy("PerGroup"),
        zoo=None,
        per_layer=_three,
        mergeable=False,
        random_start=True,
        without_family="2 groups for 0 blocks",
    ),
    "AtBudget": both("AtBudget", total=_nearest, random_start=True),
    "AtBudget-large": Case(toy=toy("AtBudget", share=0.5, most=6), zoo=None, total=_nearest, random_start=True),
}
