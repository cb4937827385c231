"""Predictors that are not fine-tuned: what a method has to beat. Each makes a function of a batch.

They read what a network would read, so a long protein is cut for them as it is for a network. Classes and labels are
predicted as logits, numbers in their own unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch.nn import functional

from common.errors import GraftError
from domains.protein._alphabet import ALPHABET, PAD, STANDARD
from domains.protein._task import ProteinTask
from domains.protein.data._records import IGNORE, ProteinBatch

Predictor = Callable[[ProteinBatch], Tensor]

_K = 3
_STEPS = 500  # of L-BFGS; it stops by itself long before
_FLAT = 1e-9  # largest gradient at which it stops
_RARE = 1e-6  # share given to a class that training does not show, so that its logit is finite


def majority_class(task: ProteinTask, data: Any) -> Predictor:  # noqa: ANN401
    """The most frequent class of the training split, for every protein or residue; the mean where a number is due.

    Its probabilities are the classes' shares of the training split. Of labels that go together, each has its own share.
    """
    kind, targets = task.facts.kind, [batch.target for batch in data.train_dataloader()]
    if kind == "value":
        mean = torch.cat(targets).double().mean().float()
        return lambda batch: mean.to(batch.residues.device).expand(len(batch.residues))
    if kind == "labels":
        shares = torch.cat(targets).double().mean(dim=0).clamp(_RARE, 1 - _RARE).float()
        return lambda batch: shares.logit().to(batch.residues.device).expand(len(batch.residues), -1)
    if kind == "unlabelled":
        raise _unfit("MajorityClass", "targets, and this set has none")
    known = torch.cat([target[target != IGNORE] for target in targets])
    counts = torch.bincount(known, minlength=len(task.facts.class_names)).float()
    logits = (counts / counts.sum()).clamp(min=_RARE).log()
    if kind == "residues":
        return lambda batch: logits.to(batch.residues.device)[:, None].expand(*_sizes(batch, len(logits)))
    return lambda batch: logits.to(batch.residues.device).expand(len(batch.residues), -1)


def composition(task: ProteinTask, data: Any) -> Predictor:  # noqa: ANN401
    """Logistic (for a number: ridge) regression on the shares of the 20 amino acids.

    Shares are standardised by the training split and the squared weights penalised as scikit-learn's
    `LogisticRegression` and `Ridge` do with their defaults (C = 1, alpha = 1). Of a pair it reads the sum and the
    absolute difference of both, so that the order of the two does not matter.
    """
    kind = task.facts.kind
    if kind in ("residues", "unlabelled"):
        raise _unfit("Composition", "one target a protein or pair")
    batches = list(_training(data))
    x = torch.cat([_shares(batch) for batch in batches])
    y = torch.cat([batch.target for batch in batches])
    mean, spread = x.mean(dim=0), x.std(dim=0, correction=0).clamp(min=1e-6)
    standard = (x - mean) / spread
    if kind == "value":
        weight, bias = fit_ridge(standard, y.double())
    else:
        weight, bias = fit_logistic(standard, y, len(task.facts.class_names))

    def predict(batch: ProteinBatch) -> Tensor:
        given = ((_shares(batch).cpu() - mean) / spread) @ weight + bias
        return given.float().to(batch.residues.device)

    return predict


def kmer_nearest(task: ProteinTask, data: Any) -> Predictor:  # noqa: ANN401
    """What the training protein with the most 3-mers in common (Jaccard index) is.

    The logit of a class is the index of its nearest training protein. A number is that of the nearest one, or the mean
    of all that are equally near. Of a pair, the index is the mean of its two proteins', matched in the better order.
    """
    kind = task.facts.kind
    if kind in ("residues", "unlabelled"):
        raise _unfit("KmerNearest", "one target a protein or pair")
    batches = list(_training(data))
    known = [_Kmers.of(part) for part in _parts(batches)]
    targets = torch.cat([batch.target for batch in batches])
    classes = len(task.facts.class_names)

    def predict(batch: ProteinBatch) -> Tensor:
        near = torch.from_numpy(_similarity([_Kmers.of(part) for part in _parts([batch])], known))  # (B, N)
        if kind == "value":
            nearest = near == near.amax(dim=1, keepdim=True)
            found = (nearest * targets).sum(dim=1) / nearest.sum(dim=1)
        else:
            found = _best_by_class(near, targets, classes)
        return found.float().to(batch.residues.device)

    return predict


# ---- regressions ---------------------------------------------------------------------------------------------------


def fit_logistic(x: Tensor, y: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Fit logistic regression with L-BFGS: the sum of the cross-entropies plus half the squared weights is least.

    Args:
        x: Features, double (N, F).
        y: Classes (N,), or zeros and ones (N, K), each column a regression of its own.
        classes: K.

    Returns:
        Weights (F, K) and biases (K,), double.
    """
    weight = torch.zeros(x.shape[1], classes, dtype=torch.double, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.double, requires_grad=True)
    together = y.ndim == 2
    optimizer = torch.optim.LBFGS(
        (weight, bias), max_iter=_STEPS, tolerance_grad=_FLAT, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = x @ weight + bias
        if together:
            error = functional.binary_cross_entropy_with_logits(logits, y.double(), reduction="sum")
        else:
            error = functional.cross_entropy(logits, y, reduction="sum")
        # The mean is as well conditioned for ten examples as for ten thousand.
        loss = (error + 0.5 * weight.square().sum()) / len(x)
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weight.detach(), bias.detach()


def fit_ridge(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Fit ridge regression: the squared errors plus the squared weights are least.

    Args:
        x: Features, double (N, F), each of mean 0.
        y: Values, double (N,).

    Returns:
        Weights (F,) and the bias, double.
    """
    bias = y.mean()
    penalty = torch.eye(x.shape[1], dtype=x.dtype)
    return torch.linalg.solve(x.T @ x + penalty, x.T @ (y - bias)), bias


# ---- features ------------------------------------------------------------------------------------------------------


def _training(data: Any) -> Iterator[ProteinBatch]:  # noqa: ANN401
    yield from data.train_dataloader()


def _shares(batch: ProteinBatch) -> Tensor:
    """Return the shares of the 20 amino acids, double (B, 20); of pairs the sum and the difference, (B, 40)."""
    counts = [functional.one_hot(part, PAD + 1)[..., : len(ALPHABET)].sum(dim=1) for part in _both(batch)]
    shares = [
        count[:, : len(STANDARD)].double() / count.sum(dim=1, keepdim=True).clamp(min=1).double() for count in counts
    ]
    if len(shares) == 1:
        return shares[0]
    return torch.cat((shares[0] + shares[1], (shares[0] - shares[1]).abs()), dim=1)


def _both(batch: ProteinBatch) -> list[Tensor]:
    """Return the residues (B, L) of the proteins, and those of their partners where there are any."""
    return [batch.residues, batch.second] if batch.second.shape[1] else [batch.residues]


def _parts(batches: Iterable[ProteinBatch]) -> list[list[Tensor]]:
    """Return the residues of all batches: of the proteins, and of their partners where there are any."""
    return [list(part) for part in zip(*(_both(batch) for batch in batches), strict=True)]


@dataclass(frozen=True)
class _Kmers:
    """Which 3-mers each of N proteins has: (N, 3-mers) of zeros and ones, and how many, (N,)."""

    table: sparse.csr_array
    sizes: np.ndarray

    @classmethod
    def of(cls, batches: Iterable[Tensor]) -> _Kmers:
        """Read them off residues (B, L)."""
        rows, columns, before = [], [], 0
        for residues in batches:
            if residues.shape[1] >= _K:
                windows = residues.cpu().unfold(1, _K, 1)  # (B, L - 2, 3)
                row, place = (windows != PAD).all(dim=2).nonzero(as_tuple=True)
                letters = windows[row, place]
                code = sum(letters[:, at] * len(ALPHABET) ** at for at in range(_K))
                rows.append(row + before)
                columns.append(torch.as_tensor(code))
            before += len(residues)
        none = torch.zeros(0, dtype=torch.long)
        pairs = torch.unique(torch.stack((torch.cat([none, *rows]), torch.cat([none, *columns]))), dim=1).numpy()
        shape = (before, len(ALPHABET) ** _K)
        table = sparse.csr_array((np.ones(pairs.shape[1], np.float32), (pairs[0], pairs[1])), shape=shape)
        return cls(table, np.bincount(pairs[0], minlength=before))

    def jaccard(self, other: _Kmers) -> np.ndarray:
        """Return the index of each of these proteins with each of the others, (N, M); 0 where there is no 3-mer."""
        shared = (self.table @ other.table.T).toarray()
        either = self.sizes[:, None] + other.sizes[None] - shared
        return shared / np.maximum(either, 1)


def _similarity(given: list[_Kmers], known: list[_Kmers]) -> np.ndarray:
    """Return the similarity of B proteins or pairs with N others, (B, N)."""
    if len(given) == 1:
        return given[0].jaccard(known[0])
    straight = given[0].jaccard(known[0]) + given[1].jaccard(known[1])
    crossed = given[0].jaccard(known[1]) + given[1].jaccard(known[0])
    return np.maximum(straight, crossed) / 2


def _best_by_class(near: Tensor, targets: Tensor, classes: int) -> Tensor:
    """Return the similarity (B, K) of each class's nearest training protein; -1 for a class that training lacks.

    Of labels that go together: how much nearer the nearest protein with the label is than the nearest without.
    """
    if targets.ndim == 1:
        members = functional.one_hot(targets, classes).bool()
        return torch.stack([_best(near, members[:, number]) for number in range(classes)], dim=1)
    members = targets > 0.5
    return torch.stack([_best(near, m) - _best(near, ~m) for m in members.unbind(1)], dim=1)


def _best(near: Tensor, members: Tensor) -> Tensor:
    return near[:, members].amax(dim=1) if members.any() else torch.full((len(near),), -1.0, dtype=near.dtype)


def _sizes(batch: ProteinBatch, classes: int) -> tuple[int, int, int]:
    return len(batch.residues), classes, batch.residues.shape[1]


def _unfit(name: str, needs: str) -> GraftError:
    return GraftError(f"{name} needs {needs}. Leave it out, or take another baseline.")
