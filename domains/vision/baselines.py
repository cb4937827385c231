"""Predictors that are not trained: what a trained method has to beat."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from domains.vision.data import ImageBatch, ImageData
from domains.vision.tasks import ImageClassification


def majority_class(task: ImageClassification, data: ImageData) -> Callable[[ImageBatch], Tensor]:
    """The most frequent class of the training split, for every image.

    Its probabilities are the classes' shares of the training split; of equally frequent classes the first is predicted.

    Returns:
        A predictor from a batch of B images to logits (B, classes).
    """
    counts = Counter(record.label for record in data.records("train"))
    logits = torch.tensor([counts[name] for name in task.facts.class_names]).log()  # softmax makes shares of them

    def predict(batch: ImageBatch) -> Tensor:
        return logits.repeat(len(batch.images), 1)

    return predict
