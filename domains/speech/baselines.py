"""Predictors that are not trained as a network is: what a method has to beat. Each makes a function of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from common.attach import attach
from common.errors import GraftError
from common.methods import LinearProbe
from domains.speech._recognition import Recognition
from domains.speech._task import SpeechTask
from domains.speech.data._confound import fit_probe, mel_statistics
from domains.speech.data._records import SpeechBatch
from domains.speech.tasks import CTCRecognition

Predictor = Callable[[SpeechBatch], Tensor]

_RARE = 1e-6  # share given to a class that training does not show, so that its logit is finite


def zero_shot(task: SpeechTask, data: Any) -> Predictor:  # noqa: ANN401
    """Take the recogniser as it came, with its own output layer and the whole context that it was trained with.

    An unadapted Whisper that sees less than its 30 s writes in loops; so its own figure is measured at 30 s, whatever
    the task's `context` says.

    Raises:
        GraftError: The task does not recognise, or the checkpoint brings no output layer.
    """
    if not isinstance(task, Recognition):
        raise GraftError(f"ZeroShot needs a task that recognises, not {type(task).__name__}. Take MajorityClass.")
    task.assemble(lambda built: attach(built.model, LinearProbe(), built.family, name=built.name))
    if isinstance(task, CTCRecognition) and not task.from_checkpoint:
        raise GraftError(
            f"ZeroShot needs an output layer that was trained, and '{task.backbone_name}' brings none for CTC. Leave "
            "it out, or take a checkpoint that was fine-tuned for recognition and vocabulary 'checkpoint'."
        )
    task.eval()

    def predict(batch: SpeechBatch) -> Tensor:
        task.eval()
        with torch.no_grad():
            heard = task.hear(batch, full=task._built.context is not None)
            return task.codes(task.write(heard, beams=task.settings.get("beams", 1)))

    return predict


def majority_class(task: SpeechTask, data: Any) -> Predictor:  # noqa: ANN401
    """The most frequent class of the training split, for every clip; its probabilities are the classes' shares."""
    _needs_classes("MajorityClass", task)
    names = task.facts.class_names
    number = {name: place for place, name in enumerate(names)}
    labels = torch.tensor([number[record.label] for record in data.records("train")])
    shares = torch.bincount(labels, minlength=len(names)).double() / len(labels)
    logits = shares.clamp(min=_RARE).log().float()
    return lambda batch: logits.to(batch.audio.device).expand(len(batch.audio), -1)


def mel_statistics_probe(task: SpeechTask, data: Any) -> Predictor:  # noqa: ANN401
    """Logistic regression on the mean and the deviation of each mel band: what voice and channel alone give away."""
    _needs_classes("MelStatistics", task)
    batches = [(_statistics(batch), batch.target.cpu()) for batch in data.train_dataloader()]
    features, labels = (torch.cat([pair[part] for pair in batches]) for part in (0, 1))
    probe = fit_probe(features, labels, len(task.facts.class_names))
    return lambda batch: probe(_statistics(batch)).float().to(batch.audio.device)


def _statistics(batch: SpeechBatch) -> Tensor:
    """Return the statistics of each clip, (B, D)."""
    clips = zip(batch.audio.cpu(), batch.lengths.tolist(), strict=True)
    return torch.stack([mel_statistics(audio[:length]) for audio, length in clips])


def _needs_classes(name: str, task: SpeechTask) -> None:
    if task.kind != "classes":
        raise GraftError(f"{name} needs classes, and {type(task).__name__} writes texts. Take ZeroShot.")
