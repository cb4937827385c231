"""What transformers loads, with its errors in one line."""

from __future__ import annotations

from typing import Any

import torch

from common.errors import GraftError

_ADVICE = "Connect to the hub, give a local folder, or take whisper-tiny-en."


def from_source(
    source: str,
    kind: Any,  # noqa: ANN401
    *,
    weights: bool = False,
    optional: tuple[str, ...] = (),
    advice: str = _ADVICE,
) -> Any:  # noqa: ANN401
    """Call `kind.from_pretrained`.

    Args:
        source: A local folder, or a name of the hub.
        kind: A class of transformers.
        weights: Whether it has weights, which have to be whole and come in single precision.
        optional: Beginnings of the names of weights that may be missing.
        advice: What to do where it cannot be had.

    Raises:
        GraftError: It cannot be had or read, or lacks weights.
    """
    try:
        if not weights:
            return kind.from_pretrained(source)
        model, info = kind.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, ImportError, TypeError) as error:
        reason = " ".join(str(error).split()).split(". ")[0]
        raise GraftError(f"'{source}' could not be had or read ({type(error).__name__}: {reason}). {advice}") from error
    lost = [name for name in sorted(info["missing_keys"]) if not name.startswith(optional or ("\0",))]
    lost += sorted(str(key) for key in info.get("mismatched_keys", ()))
    if lost:
        raise GraftError(f"'{source}' lacks {len(lost)} of its weights, such as {lost[0]}. Fetch it again.")
    return model
