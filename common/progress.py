"""Progress that a person can watch: bars on a terminal, one line an epoch elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console


def progress_callbacks() -> list[L.Callback]:
    """Return the progress display that suits where the output goes."""
    return [RichProgressBar()] if sys.stderr.isatty() else [EpochLines()]


class EpochLines(L.Callback):
    """Write one line an epoch to standard error: step, training loss, validation metrics, elapsed seconds."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, soft_wrap=True, highlight=False)
        self._start = time.monotonic()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the epoch's line."""
        values: dict[str, Any] = dict(trainer.callback_metrics)
        shown = "  ".join(f"{name} {float(value):.4f}" for name, value in sorted(values.items()))
        elapsed = time.monotonic() - self._start
        self._console.print(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {shown}  {elapsed:.0f} s")
