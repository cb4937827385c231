"""What an adapter costs elsewhere: error rates on another set before and after, and that it can be taken off."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, cast

import torch

from common.errors import GraftError
from common.exchange import fresh
from common.methods import LinearProbe
from domains.speech._recognition import Recognition
from domains.speech.data._records import SpeechBatch
from domains.speech.data.base import SpeechData
from domains.speech.metrics import text_metrics


@dataclass(frozen=True, kw_only=True)
class Forgetting:
    """Error rates of a recogniser on clips that it was not adapted to.

    Attributes:
        before: Rates of the backbone as it came, by the names of `text_metrics`.
        after: Rates with the adapter.
        restored: Whether the backbone computes exactly what it did before once the adapter is disabled; None where the
            method changed the weights themselves.
    """

    before: dict[str, float]
    after: dict[str, float]
    restored: bool | None


def forgetting(task: Recognition, data: SpeechData) -> Forgetting:
    """Measure what an adapter did to the recognition of another set, at the backbone's whole context.

    Args:
        task: A trained recogniser that goes on with its backbone's own output layer, as `common.exchange.load` returns.
        data: The other set, such as `LibriVoxClips`; its test split is used, with its own language and normaliser.

    Raises:
        GraftError: The output layer was made for the adapter's own language, so there is no before.
    """
    from peft import PeftModel

    if not getattr(task, "from_checkpoint", True):
        raise GraftError(
            f"{type(task).__name__} has a new output layer, so the unadapted '{task.backbone_name}' writes nothing to "
            "compare with. Measure a recogniser that goes on with its own."
        )
    data.prepare_data()
    data.setup()
    after = error_rates(task, data)
    bare = cast("Recognition", fresh(task, LinearProbe())).to(task.device).eval()
    before = error_rates(bare, data)
    if not isinstance(task.backbone, PeftModel):
        return Forgetting(before=before, after=after, restored=None)
    batch = task.example_batch()
    with torch.no_grad(), task.backbone.disable_adapter():
        restored = torch.equal(task.features(batch), bare.features(batch))
    return Forgetting(before=before, after=after, restored=restored)


def error_rates(task: Recognition, data: SpeechData) -> dict[str, float]:
    """Recognise the test split of a set at the backbone's whole context.

    Args:
        task: The recogniser.
        data: The set, set up; texts are compared under its own normaliser.

    Returns:
        Rates and counts by the names of `text_metrics`.
    """
    metrics = text_metrics(data.facts.normalizer).to(task.device)
    task.eval()
    with torch.no_grad(), _hearing(task, data):
        for batch in data.test_dataloader():
            moved = SpeechBatch(*(part if isinstance(part, tuple) else part.to(task.device) for part in batch))
            heard = task.hear(moved, full=task._built.context is not None)
            metrics.update(task.codes(task.write(heard)), task.targets(moved))
    return {name: float(value) for name, value in metrics.compute().items()}


@contextlib.contextmanager
def _hearing(task: Recognition, data: Any) -> Generator[None]:  # noqa: ANN401
    """Let a task hear another set's language inside the block."""
    facts, settings = task.facts, task.settings
    task.facts, task.settings = data.facts, {**settings, "language": None}
    try:
        yield
    finally:
        task.facts, task.settings = facts, settings
