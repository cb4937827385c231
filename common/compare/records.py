"""The results for programs: a line for each recipe and method as CSV or Parquet, in plain units."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from common.compare.evidence import COSTS, Block, Comparison
from common.compare.results import MEMORY_PARTS, Row, Spread
from common.parquet import arrow, need_parquet, packed

_COSTS = (
    *("params_trainable", "trainable_percent", "params_total"),
    *(f"memory_{part}" for part in ("total", *MEMORY_PARTS)),
    *("flops_per_step", "step_seconds", "batch_size", "steps", "fit_seconds"),
    *("adapter_bytes", "head_bytes", "backbone_bytes", "peak_cuda_bytes"),
)
# Columns of results.csv that are no real numbers, but words or whole ones.
_WORDS = ("recipe", "method", "seeds", "primary", "mode", "worst_class", "worst_class_measure", "resampled", "pareto")
_WORDS += ("worst_group", "worst_group_measure", "prepared")
_WHOLE = ("n", "failed_runs", "settings", "worst_class_examples", "worst_group_examples")


def write_csv(blocks: Sequence[Block], path: Path) -> None:
    """Write one line for each recipe and method, in plain units (bytes, seconds).

    What is unknown is left empty, as is what does not apply to a baseline.
    """
    records = _records(blocks)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(records[0]))
        writer.writeheader()
        writer.writerows(records)


def write_parquet(blocks: Sequence[Block], path: Path) -> None:
    """Write what `write_csv` does as Parquet: the same columns, of one type each in every study.

    Raises:
        GraftError: If pyarrow is not installed.
    """
    need_parquet("--parquet")
    types = arrow()
    records = _records(blocks)
    kinds = {**dict.fromkeys(_WORDS, types.string()), **dict.fromkeys(_WHOLE, types.int64()), "best": types.bool_()}
    schema = types.schema([(name, kinds.get(name, types.float64())) for name in records[0]])
    path.write_bytes(packed(types.Table.from_pylist(records, schema=schema)))


def _records(blocks: Sequence[Block]) -> list[dict[str, object]]:
    metrics = list(dict.fromkeys(name for block in blocks for row in block.rows for name in row.test))
    return [_record(row, metrics) | _proof(row, block.comparison) for block in blocks for row in block.rows]


def _record(row: Row, metrics: Sequence[str]) -> dict[str, object]:
    record: dict[str, object] = {
        "recipe": row.recipe,
        "method": row.method,
        "lr": row.lr,
        "seeds": " ".join(map(str, row.seeds)),
        "n": len(row.seeds),
        "failed_runs": row.failed,
        "primary": row.primary,
        "mode": row.mode,
        "weight_decay": row.weight_decay,
        "settings": row.settings,
        "val_primary_mean": row.val.mean if row.val else None,
        "val_primary_std": row.val.std if row.val else None,
    }
    for name in metrics:
        spread = row.test.get(name)
        record[f"test_{name}_mean"] = spread.mean if spread else None
        record[f"test_{name}_std"] = spread.std if spread else None
    for kind, worst in (("class", row.worst), ("group", row.worst_group)):
        spread = Spread.of(worst.values) if worst else None
        record |= {
            f"worst_{kind}": worst.name if worst else None,
            f"worst_{kind}_measure": worst.measure if worst else None,
            f"worst_{kind}_mean": spread.mean if spread else None,
            f"worst_{kind}_std": spread.std if spread else None,
            f"worst_{kind}_examples": worst.examples if worst else None,
        }
    record |= {
        "prepared": " ".join(start.preparation.name for start in row.starts),
        "prepared_params_trainable": row.prepared_cost("params_trainable"),
        "prepared_seconds": row.prepared_cost("fit_seconds"),
    }
    return record | {name: row.cost.get(name) for name in _COSTS}


def _proof(row: Row, comparison: Comparison | None) -> dict[str, object]:
    """What the tests say of one row."""
    found = comparison.intervals.get(row.method) if comparison else None
    to_best = comparison.to_best.get(row.method) if comparison else None
    to_full = comparison.to_full.get(row.method) if comparison else None
    fronts = [key for key, _, _ in COSTS if comparison and row.method in comparison.fronts[key]]
    return {
        "test_primary_low": found.low if found else None,
        "test_primary_high": found.high if found else None,
        "resampled": found.over if found else None,
        "best": comparison is not None and row.method == comparison.best,
        "difference_to_best": to_best.difference.value if to_best else None,
        "p_to_best": to_best.p if to_best else None,
        "difference_to_full": to_full.difference.value if to_full else None,
        "difference_to_full_low": to_full.difference.low if to_full else None,
        "difference_to_full_high": to_full.difference.high if to_full else None,
        "p_to_full": to_full.p if to_full else None,
        "p_to_full_permutation": to_full.permutation if to_full else None,
        "relative_gap_to_full": comparison.gaps.get(row.method) if comparison else None,
        "pareto": " ".join(fronts),
    }
