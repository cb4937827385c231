"""Write a backbone's features of the user's proteins, for search, clustering, or models of another kind."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from common.checkpoint import write_atomically
from common.errors import GraftError
from common.parquet import arrow, need_parquet, packed
from domains.protein._inputs import Given, batches, read_given, tracked
from domains.protein._task import ProteinTask
from domains.protein.backbones import ProteinBackbone, build, residue_features
from domains.protein.data._records import Long

EMBEDDINGS = "embeddings"


def embed(
    source: ProteinTask | str,
    files: Sequence[Path],
    out: Path = Path("embeddings.safetensors"),
    *,
    residues: bool = False,
    skip_bad: bool = False,
) -> str:
    """Write the last layer's features of proteins as a safetensors file, or as Parquet where its name ends in .parquet.

    The tensor `embeddings` is (N, width), float32, the mean over each protein's residues; row i belongs to the i-th of
    the metadata's `ids` (JSON). With `residues` there is instead a tensor `0`, `1`, ... (residues, width) a protein.
    A Parquet file has a row a protein, `id` and `embedding`, or with `residues` a row a residue, `id`, `position` (from
    1) and `embedding`.

    Args:
        source: A loaded adapter, whose data's rule for long proteins holds, or the name of a bare backbone, which takes
            whole proteins.
        files: FASTA files, or folders that are searched for them.
        out: The file to write.
        residues: One vector a residue, instead of their mean.
        skip_bad: Count and leave out sequences that cannot be used, instead of stopping at the first.

    Returns:
        A summary in one line.

    Raises:
        GraftError: No sequence, one that cannot be used, two of the same id, a file that cannot be written, or Parquet
            without pyarrow.
    """
    if out.is_dir():
        raise GraftError(f"{out} is a folder; give the name of the file to write with --out.")
    if out.suffix == ".parquet":
        need_parquet(f"--out {out}")
    if isinstance(source, str):
        built = build(source)
        model, most, longest = built.model.eval(), None, built.max_length
        long: Long = "truncate"
    else:
        built, model, long = source._built, source.eval().backbone, source.facts.long
        most = source.facts.max_length
        longest = most if long == "refuse" else None
    given, skipped = read_given(files, pairs=False, longest=longest, skip_bad=skip_bad)
    if not given:
        raise GraftError(f"No sequence in {', '.join(map(str, files))} can be used ({skipped} were left out).")
    ids = _ids(given)
    found = _features(built, model, given, most, long, residues=residues)
    metadata = {"backbone": built.name, "pooling": "none" if residues else "mean"}
    if out.suffix == ".parquet":
        content = _parquet(ids, found, metadata, residues=residues)
    else:
        tensors = {str(n): f for n, f in enumerate(found)} if residues else {EMBEDDINGS: torch.stack(found)}
        content = save(tensors, {"ids": json.dumps(ids), **metadata})
    write_atomically(out, lambda file: file.write(content))
    left = f", {skipped} unusable ones left out" if skipped else ""
    return f"{out}: {len(found)} proteins, width {built.width}{left}"


def _parquet(ids: Sequence[str], found: Sequence[Tensor], metadata: Mapping[str, str], *, residues: bool) -> bytes:
    types = arrow()
    vectors = torch.cat(list(found)) if residues else torch.stack(list(found))
    names = [name for name, rows in zip(ids, found, strict=True) for _ in range(len(rows) if residues else 1)]
    columns = {"id": types.array(names, types.string())}
    if residues:
        places = [place for rows in found for place in range(1, len(rows) + 1)]
        columns["position"] = types.array(places, types.int32())
    flat = types.array(vectors.flatten().numpy())
    columns["embedding"] = types.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    return packed(types.table(columns).replace_schema_metadata(dict(metadata)))


def _features(
    built: ProteinBackbone, model: nn.Module, given: Sequence[Given], most: int | None, long: Long, *, residues: bool
) -> list[Tensor]:
    """Return (width,) or (residues, width) for each protein, in order."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    # Every stretch of a long protein is looked at, where the task's data looks at stretches.
    loader = batches([entry.record for entry in given], "residues", most, long)
    pieces: dict[int, list[Tensor]] = defaultdict(list)
    with torch.inference_mode():
        for batch in tracked(loader, device, "embedding"):
            features = residue_features(built, model, batch.residues, batch.mask).float().cpu()
            for index, length, row in zip(batch.index.tolist(), batch.mask.sum(dim=1).tolist(), features, strict=True):
                pieces[index].append(row[:length].clone())
    # All stretches of a long protein but its last have the same length, and batches come from short to long.
    whole = [torch.cat(sorted(pieces[index], key=len, reverse=True)) for index in range(len(given))]
    return whole if residues else [features.mean(dim=0) for features in whole]


def _ids(given: Sequence[Given]) -> list[str]:
    """Return the ids, which have to differ over all files.

    Raises:
        GraftError: Two files have the same id.
    """
    seen: dict[str, Path] = {}
    for entry in given:
        name = entry.record.id
        if name in seen:
            raise GraftError(f"'{name}' stands in {seen[name]} and in {entry.file}. Embed one file at a time.")
        seen[name] = entry.file
    return list(seen)
