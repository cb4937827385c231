"""Metrics of protein tasks: rankings (ROC, precision and recall, Spearman), F1 by class, perplexity.

Scores are compared as margins (log odds) and never as probabilities: in single precision a softmax makes all certain
answers equal, and torchmetrics takes a batch whose logits happen to lie in [0, 1] for probabilities.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassMatthewsCorrCoef
from torchmetrics.functional.classification import binary_auroc, binary_average_precision
from torchmetrics.regression import MeanSquaredError
from torchmetrics.utilities import dim_zero_cat

from domains.protein.data._records import IGNORE


def class_keys(names: Sequence[str], prefix: str = "f1_") -> list[str]:
    """Turn names of classes into different names of metrics, of letters, digits and underscores."""
    keys: list[str] = []
    for name in names:
        key = f"{prefix}{re.sub(r'[^0-9A-Za-z]+', '_', name).strip('_')}"
        same = sum(other == key or other.startswith(f"{key}__") for other in keys)
        keys.append(f"{key}__{same + 1}" if same else key)
    return keys


def margins(logits: Tensor) -> Tensor:
    """Return each class's log odds against all others, double (N, K), for logits (N, K)."""
    logits = logits.double()
    own = torch.eye(logits.shape[1], dtype=torch.bool, device=logits.device)
    others = logits[:, None, :].masked_fill(own, -torch.inf).logsumexp(dim=-1)
    return logits - others


def ranks(values: Tensor) -> Tensor:
    """Return the ranks of values (N,), from 1, double; equal values share the mean of theirs."""
    _, place, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[place]


class _Ranking(Metric):
    """What the ranking metrics share: a score and a truth for each example and class.

    Args:
        classes: K. With two exclusive classes the second one is what is looked for; else the mean over all classes
            counts, without those of which the split has no example or nothing else.
        exclusive: An example is of one class (integer targets, possibly `IGNORE`), else of any number of them
            (targets of zeros and ones).
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    scores: list[Tensor]
    truths: list[Tensor]

    def __init__(self, classes: int, *, exclusive: bool = True) -> None:
        super().__init__()
        self.classes, self.exclusive = classes, exclusive
        self.add_state("scores", default=[], dist_reduce_fx="cat")
        self.add_state("truths", default=[], dist_reduce_fx="cat")

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch.

        Args:
            outputs: Logits (B, K, ...).
            targets: Integer (B, ...) if exclusive, else (B, K).
        """
        if not self.exclusive:
            self.scores.append(outputs.double())
            self.truths.append(targets > 0.5)
            return
        flat, target = outputs.movedim(1, -1).flatten(0, -2), targets.flatten()
        judged = target != IGNORE
        odds, truth = margins(flat[judged]), functional.one_hot(target[judged], self.classes).bool()
        first = 1 if self.classes == 2 else 0
        self.scores.append(odds[:, first:])
        self.truths.append(truth[:, first:])

    def compute(self) -> Tensor:
        """Return the mean over the classes that can be judged; nan where there is none."""
        scores, truths = dim_zero_cat(self.scores), dim_zero_cat(self.truths)
        found = [
            self._one(_to_unit(score), truth.long())
            for score, truth in zip(scores.unbind(1), truths.unbind(1), strict=True)
            if truth.any() and not truth.all()
        ]
        return torch.stack(found).mean().float() if found else torch.tensor(torch.nan, device=scores.device)

    def _one(self, scores: Tensor, truth: Tensor) -> Tensor:
        raise NotImplementedError


def _to_unit(scores: Tensor) -> Tensor:
    """Map scores (N,) to [0, 1], in the same order with the same ties: torchmetrics squashes any others."""
    _, place = torch.unique(scores, return_inverse=True)
    return place.double() / max(1, int(place.max()))


class Auroc(_Ranking):
    """Area under the ROC curve, one class against the rest."""

    def _one(self, scores: Tensor, truth: Tensor) -> Tensor:
        return binary_auroc(scores, truth)


class Aupr(_Ranking):
    """Average precision: the area under the curve of precision over recall, in steps."""

    def _one(self, scores: Tensor, truth: Tensor) -> Tensor:
        return binary_average_precision(scores, truth)


class ClassF1(MulticlassF1Score):
    """F1 of one class; 0 where neither the targets nor the predictions show it.

    Args:
        number: The class.
        classes: K.
    """

    def __init__(self, number: int, classes: int) -> None:
        super().__init__(classes, average="none", ignore_index=IGNORE)
        self.number = number

    def compute(self) -> Tensor:
        """Return the class's F1."""
        return super().compute()[self.number]


class Matthews(MulticlassMatthewsCorrCoef):
    """Matthews correlation (for several classes Gorodkin 2004, doi 10.1016/j.compbiolchem.2004.09.006).

    0 where all predictions or all targets are of one class, for which torchmetrics gives a small number other than 0.

    Args:
        classes: K.
    """

    def __init__(self, classes: int) -> None:
        super().__init__(classes, ignore_index=IGNORE)

    def compute(self) -> Tensor:
        """Return the correlation."""
        table = self.confmat.double()
        truth, found, count = table.sum(dim=1), table.sum(dim=0), table.sum()
        spread = (count**2 - truth.square().sum()) * (count**2 - found.square().sum())
        both = table.trace() * count - (truth * found).sum()
        return (both / spread.sqrt() if spread > 0 else torch.zeros_like(both)).float()


class _Values(Metric):
    """Keep all predicted and true values."""

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    found: list[Tensor]
    wanted: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("found", default=[], dist_reduce_fx="cat")
        self.add_state("wanted", default=[], dist_reduce_fx="cat")

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add values (B,) and true values (B,)."""
        self.found.append(outputs.double())
        self.wanted.append(targets.double())


class Pearson(_Values):
    """Correlation of predicted and true values; 0 where one of them is constant."""

    def compute(self) -> Tensor:
        """Return the correlation."""
        return _correlation(dim_zero_cat(self.found), dim_zero_cat(self.wanted))


class Spearman(_Values):
    """Rank correlation with shared ranks for equal values; 0 where the predicted or the true values are constant."""

    def compute(self) -> Tensor:
        """Return the correlation."""
        return _correlation(ranks(dim_zero_cat(self.found)), ranks(dim_zero_cat(self.wanted)))


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    a, b = a - a.mean(), b - b.mean()
    spread = (a.square().sum() * b.square().sum()).sqrt()
    return ((a * b).sum() / spread if spread > 0 else spread.new_zeros(())).float()


class Perplexity(Metric):
    """exp of the mean cross-entropy over all judged residues of a split; the alphabet's size is that of a guess."""

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.double), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add logits (B, K, L) and letters (B, L) with `IGNORE`."""
        self.total += functional.cross_entropy(outputs.double(), targets, ignore_index=IGNORE, reduction="sum")
        self.count += (targets != IGNORE).sum()

    def compute(self) -> Tensor:
        """Return the perplexity."""
        return (self.total / self.count).exp().float()


def class_metrics(names: Sequence[str]) -> MetricCollection:
    """Metrics of exclusive classes, for logits (B, K, ...) and integer targets (B, ...) with `IGNORE`.

    Accuracy, Matthews correlation, macro F1, AUROC and average precision (of the second of two classes, else the mean
    over classes), and F1 of each class where there are more than two (of two, `f1` is the second one's).
    """
    count = len(names)
    metrics: dict[str, Any] = {
        "accuracy": MulticlassAccuracy(count, average="micro", ignore_index=IGNORE),
        "mcc": Matthews(count),
        "auroc": Auroc(count),
        "aupr": Aupr(count),
    }
    if count == 2:
        metrics["f1"] = ClassF1(1, 2)
        return MetricCollection(metrics, compute_groups=[["accuracy"], ["mcc"], ["auroc", "aupr"], ["f1"]])
    metrics["macro_f1"] = MulticlassF1Score(count, average="macro", ignore_index=IGNORE)
    by_class = {key: ClassF1(number, count) for number, key in enumerate(class_keys(names))}
    groups = [["accuracy"], ["mcc"], ["auroc", "aupr"], ["macro_f1", *by_class]]
    return MetricCollection(metrics | by_class, compute_groups=groups)


def label_metrics(names: Sequence[str]) -> MetricCollection:
    """Metrics of labels that may go together, for logits and targets of 0 and 1 (B, K): AUROC and average precision."""
    metrics: dict[str, Any] = {
        "auroc": Auroc(len(names), exclusive=False),
        "aupr": Aupr(len(names), exclusive=False),
    }
    return MetricCollection(metrics, compute_groups=[["auroc", "aupr"]])


def value_metrics() -> MetricCollection:
    """Metrics of a number, for values (B,) in the target's unit: both correlations and the root mean square error."""
    metrics: dict[str, Any] = {
        "spearman": Spearman(),
        "pearson": Pearson(),
        "rmse": MeanSquaredError(squared=False),
    }
    return MetricCollection(metrics, compute_groups=[["spearman", "pearson"], ["rmse"]])
