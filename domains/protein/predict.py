"""Run an exported adapter on the user's sequences and write a CSV."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.checkpoint import write_atomically
from common.errors import GraftError
from domains.protein._inputs import Given, batches, read_given, tracked
from domains.protein._task import ProteinTask
from domains.protein.data._records import Record

_HEADERS = {
    "classes": ("prediction", "probability"),
    "pairs": ("prediction", "probability"),
    "labels": ("prediction",),
    "value": ("prediction",),
    "residues": ("position", "residue", "prediction", "probability"),
}


def predict(
    task: ProteinTask, files: Sequence[Path], out: Path = Path("predictions.csv"), *, skip_bad: bool = False
) -> str:
    """Predict for proteins, residues or pairs.

    Args:
        task: The loaded adapter, in eval mode.
        files: FASTA files, or folders that are searched for them; for pairs, tables with the columns `a` and `b`.
        out: The CSV to write: file, id, prediction and, for classes and labels, one probability column each. Residues
            have a row each, with position (from 1) and letter. Long proteins are cut as the task's data cut them.
        skip_bad: Count and leave out sequences that cannot be used, instead of stopping at the first.

    Returns:
        A summary in one line.

    Raises:
        GraftError: No sequence, one that cannot be used, or a CSV that cannot be written; nothing half-written is left.
    """
    facts = task.facts
    if facts.kind not in _HEADERS:
        raise GraftError(
            f"{type(task).__name__} predicts no labels. Use `graft embed` for its features, or "
            "domains.protein.scoring for mutations."
        )
    if out.is_dir():
        raise GraftError(f"{out} is a folder; give the name of the CSV to write with --out.")
    longest = facts.max_length if facts.long == "refuse" else None
    given, skipped = read_given(files, pairs=facts.kind == "pairs", longest=longest, skip_bad=skip_bad)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "id", *_HEADERS[facts.kind], *facts.class_names])
    for entry, output in zip(given, _outputs(task, given), strict=True):
        writer.writerows([entry.file, entry.record.id, *row] for row in _rows(task, entry.record, output))
    write_atomically(out, lambda file: file.write(text.getvalue().encode()))
    what = "pairs" if facts.kind == "pairs" else "proteins"
    return f"{out}: {len(given)} {what}" + (f", {skipped} unusable ones left out" if skipped else "")


def _outputs(task: ProteinTask, given: Sequence[Given]) -> list[Tensor]:
    """Return each protein's output, in order: (K,), (), or (residues, K)."""
    if not given:
        return []
    facts = task.facts
    task.to("cuda" if torch.cuda.is_available() else "cpu")
    loader = batches([entry.record for entry in given], facts.kind, facts.max_length, facts.long)
    found: dict[int, list[Tensor]] = defaultdict(list)
    with torch.inference_mode():
        for batch in tracked(loader, task.device, "predicting"):
            outputs = task.infer(batch).float().cpu()
            for index, length, output in zip(
                batch.index.tolist(), batch.mask.sum(dim=1).tolist(), outputs, strict=True
            ):
                found[index].append(output[:, :length].T if facts.kind == "residues" else output)
    if facts.kind != "residues":
        return [found[index][0] for index in range(len(given))]
    # All stretches of a long protein but its last have the same length, and batches come from short to long.
    return [torch.cat(sorted(found[index], key=len, reverse=True)) for index in range(len(given))]


def _rows(task: ProteinTask, record: Record, output: Tensor) -> Iterator[list[Any]]:
    """Yield the rows of a protein, behind file and id."""
    kind, names = task.facts.kind, task.facts.class_names
    if kind == "value":
        yield [f"{float(output):.6f}"]
    elif kind == "labels":
        shares = output.sigmoid().tolist()
        yield [";".join(n for n, p in zip(names, shares, strict=True) if p > 0.5), *_plain(shares)]
    elif kind == "residues":
        for at, shares in enumerate(output.softmax(dim=1).tolist()):
            best = shares.index(max(shares))
            yield [at + 1, record.sequence[at], names[best], *_plain([shares[best], *shares])]
    else:
        shares = output.softmax(dim=0).tolist()
        best = shares.index(max(shares))
        yield [names[best], *_plain([shares[best], *shares])]


def _plain(values: Sequence[float]) -> list[str]:
    return [f"{value:.6f}" for value in values]
