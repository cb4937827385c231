"""The model card of an exported adapter: what it was trained on, how good it is, what it cost, how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def render(record: Mapping[str, Any], certificate: Mapping[str, Any], usage: str) -> str:
    """Write the card as Markdown.

    Args:
        record: The run's `metrics.json`.
        certificate: What the export measured.
        usage: Python lines that load the export with plain libraries.
    """
    cost, data, method = record["cost"], record["data"], record["method"]
    name = method["class_path"]
    settings = ", ".join(f"{key}={value}" for key, value in method["init_args"].items())
    rows = [f"| {stage} | {_metrics(record[stage])} |" for stage in ("val", "test") if record.get(stage)]
    notes = [f"- {note}" for note in record.get("notes", [])]
    merged = certificate["merge_max_abs_error"]
    lines = [
        "---",
        "library_name: peft",
        f"tags: [graft, {record['domain']}, {name.lower()}]",
        "---",
        f"# {name} on {record['backbone']}, {data.get('name', 'own data')}",
        "",
        f"Trained with Graft {record['environment']['graft']}: `{name}({settings})`.",
        "",
        *([*notes, ""] if notes else []),
        "## Quality",
        "| split | metrics |",
        "|---|---|",
        *rows,
        "" if record.get("test") else "\nThe test split of this run was not read.",
        "",
        "## Cost",
        f"- trainable: {cost['params_trainable']:,} of {cost['params_total']:,} parameters, "
        f"{cost['trainable_percent']:.3f} %",
        f"- training memory: {cost['train_memory']['total'] / 1e6:.1f} MB at batch {cost['batch_size']}",
        f"- {cost['flops_per_step'] / 1e9:.1f} GFLOP a step, {cost['steps']} steps, {cost['fit_seconds']:.0f} s",
        f"- adapter {cost['adapter_bytes']:,} bytes, head {cost['head_bytes']:,} bytes",
        "",
        "## Data",
        f"- {data.get('name')}: {data.get('train')} train, {data.get('val')} validation, {data.get('test')} test",
        f"- digest of the split: `{data.get('digest')}`",
        "",
        "## Base model",
        f"- {record['backbone']}",
        f"- SHA-256 of its weights: `{record['base_digest']}`",
        "",
        "## Certificate",
        f"- reloaded with plain peft, outputs differ by at most {certificate['reload_max_abs_error']:.1e}",
        f"- merged, outputs differ by at most {merged:.1e}"
        if merged is not None
        else f"- not mergeable: {certificate['not_mergeable']}",
        "",
        "## Use",
        "```python",
        usage.strip(),
        "```",
        "",
    ]
    return "\n".join(lines)


def _metrics(values: Mapping[str, float]) -> str:
    return ", ".join(f"{key} {value:.4f}" for key, value in values.items())
