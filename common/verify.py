"""Does an adapter folder still do what its certificate says: recomputed here, on this machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from common.domain import Domain
from common.errors import GraftError
from common.exchange import CERTIFICATE, MERGE_TOLERANCE, PROBE, load, merged_backbone, probe_values

# Another processor or version of torch adds in another order; another base or a damaged adapter is far off this.
TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What was measured.

    Attributes:
        output_error: Largest difference from the stored outputs, relative to the largest of them where that is above
            one.
        merge_error: Largest difference that merging makes here; None where the method cannot be merged.
        not_mergeable: Why it cannot be merged.
        base_digest: SHA-256 of the base model's weights, which were recomputed and fit.
        versions: Library versions that the certificate was written with.
    """

    output_error: float
    merge_error: float | None
    not_mergeable: str
    base_digest: str
    versions: Mapping[str, str]


def verify(folder: Path, domains: Mapping[str, Domain]) -> Verified:
    """Load an adapter folder, and compare its outputs and its merge with what it was exported with.

    Args:
        folder: The adapter folder.
        domains: The registered domains.

    Raises:
        GraftError: Another base model, missing files, or outputs that differ by more than rounding.
    """
    task = load(folder, domains)
    expected, certificate = _stored(folder)
    batch = task.example_batch()
    with torch.no_grad():
        output = task(batch)
        values = probe_values(output)
        if values.shape != expected.shape:
            raise GraftError(f"{folder} gives {len(values)} values and {len(expected)} are stored. Export it again.")
        error = float((values - expected).abs().max()) / max(1.0, float(expected.abs().max()))
        if not error <= TOLERANCE:
            raise GraftError(
                f"{folder} does not compute what it was exported with: outputs differ by {error:.1e} ({TOLERANCE:.0e} "
                f"allowed). It is damaged, or a library has changed (written with {_named(certificate)}); export again."
            )
        merge_error, reason = None, ""
        try:
            task.backbone = merged_backbone(task)
        except GraftError as refusal:
            reason = str(refusal)
        else:
            merge_error = float((task(batch) - output).abs().max())
    if merge_error is not None and merge_error > MERGE_TOLERANCE:
        raise GraftError(
            f"Merging {folder} changes the outputs by {merge_error:.1e} ({MERGE_TOLERANCE:.0e} allowed). Use the "
            "adapter unmerged."
        )
    return Verified(
        output_error=error,
        merge_error=merge_error,
        not_mergeable=reason,
        base_digest=task.attached.base_digest,
        versions=certificate.get("versions", {}),
    )


def _stored(folder: Path) -> tuple[torch.Tensor, dict]:
    """Read the stored outputs and the certificate."""
    try:
        return load_file(folder / PROBE)["outputs"], json.loads((folder / CERTIFICATE).read_text())
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise GraftError(
            f"{folder} has no readable {PROBE} and {CERTIFICATE} ({error}). Export the adapter again."
        ) from error


def _named(certificate: Mapping) -> str:
    return ", ".join(f"{name} {number}" for name, number in certificate.get("versions", {}).items()) or "unknown ones"
