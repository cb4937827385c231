"""Voice conversion: one speaker's speech with another's pitch and timbre, learned from the same sentences of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.errors import GraftError
from domains.speech._pitch import LEAST_VOICED
from domains.speech.voices._alignment import warp
from domains.speech.voices._world import CEPSTRA, Analysis

_COMPONENTS, _FRAMES_EACH = 16, 500  # Gaussians at most, and frames that each has to have
_MOST_FRAMES = 20_000  # that the Gaussians are fitted to; every n-th is taken
_SHAPE = slice(1, 14)  # the cepstra that sentences are warped by
_WIDEST = 2.0  # factor that a converted coefficient's deviation may be raised by
_SHARE = 0.8  # of the way to the converted envelope: all of it sounds duller, and costs words
_OUTERMOST = 2.5  # deviations of pitch


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """A map from one speaker to another, frame by frame.

    Envelopes follow a joint density of both speakers' mel-cepstra x and y, a mixture of K Gaussians (Kain and Macon
    1998): y = sum_k p(k | x) (m_y + S_yx S_xx^-1 (x - m_x))_k, whose deviation over all frames is then widened to that
    of the target (after Toda, Black and Tokuda 2007); the level stays the source's. Logarithms of pitch are shifted and
    scaled from the one speaker's median and deviation to the other's. Where either speaker has no pitch it stays.

    Attributes:
        weights: (K,).
        means: (K, 2 C), source before target.
        factors: Cholesky factors of the source's covariances, (K, C, C).
        slopes: S_yx S_xx^-1, (K, C, C).
        middle: Mean of what is converted, (C,).
        widening: Factor of its deviation, (C,).
        pitches: Median and deviation of the logarithm of pitch, of the source and of the target; None without pitch.
    """

    weights: NDArray[np.float64]
    means: NDArray[np.float64]
    factors: NDArray[np.float64]
    slopes: NDArray[np.float64]
    middle: NDArray[np.float64]
    widening: NDArray[np.float64]
    pitches: tuple[tuple[float, float], tuple[float, float]] | None

    def __call__(self, found: Analysis) -> Analysis:
        """Convert what was found in a clip of the source speaker."""
        converted = self._widened(found.envelope)
        envelope = found.envelope + _SHARE * (converted - found.envelope)
        envelope[:, 0] = found.envelope[:, 0]
        return Analysis(self._pitch(found.pitch), envelope)

    def _pitch(self, hertz: NDArray[np.float64]) -> NDArray[np.float64]:
        if self.pitches is None:
            return hertz
        (middle, spread), (other, other_spread) = self.pitches
        away = np.clip((np.log(np.maximum(hertz, 1.0)) - middle) / spread, -_OUTERMOST, _OUTERMOST)
        return np.where(hertz > 0, np.exp(other + other_spread * away), 0.0)

    def _widened(self, envelope: NDArray[np.float64]) -> NDArray[np.float64]:
        return self.middle + self.widening * (_smooth(self.expected(envelope)) - self.middle)

    def expected(self, envelope: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the mean of the target's cepstra given the source's, both (F, C)."""
        from scipy.linalg import solve_triangular

        width, likelihoods, answers = envelope.shape[1], [], []
        for weight, mean, factor, slope in zip(self.weights, self.means, self.factors, self.slopes, strict=True):
            away = envelope - mean[:width]
            white = solve_triangular(factor, away.T, lower=True)
            likelihoods.append(np.log(weight) - np.log(np.diag(factor)).sum() - 0.5 * (white**2).sum(axis=0))
            answers.append(mean[width:] + away @ slope.T)
        stacked = np.stack(likelihoods)
        shares = np.exp(stacked - stacked.max(axis=0))
        return np.einsum("kf,kfc->fc", shares / shares.sum(axis=0), np.stack(answers))


def fit_conversion(pairs: Sequence[tuple[Analysis, Analysis]], seed: int = 0) -> Conversion:
    """Learn a conversion from sentences that both speakers said.

    Args:
        pairs: The source's and the target's analysis of each sentence; they are aligned by dynamic time warping.
        seed: Seed of the mixture's start.

    Raises:
        GraftError: There is too little speech.
    """
    from sklearn.mixture import GaussianMixture

    found = [_aligned(source, target) for source, target in pairs]
    joint = np.concatenate([np.zeros((0, 2 * CEPSTRA)), *found])
    if len(joint) < _FRAMES_EACH:
        raise GraftError(
            f"Only {len(joint)} frames of 5 ms of the voice's speech and of the recordings belong together, and "
            f"{_FRAMES_EACH} are needed. Give more recordings, or take another route."
        )
    some = joint[:: -(-len(joint) // _MOST_FRAMES)]
    components = max(1, min(_COMPONENTS, len(some) // _FRAMES_EACH))
    mixture = GaussianMixture(components, reg_covar=1e-4, max_iter=60, random_state=seed).fit(some)
    means, covariances = np.asarray(mixture.means_), np.asarray(mixture.covariances_)
    own, across = covariances[:, :CEPSTRA, :CEPSTRA], covariances[:, CEPSTRA:, :CEPSTRA]
    bare = Conversion(
        weights=np.asarray(mixture.weights_),
        means=means,
        factors=np.linalg.cholesky(own),
        slopes=np.swapaxes(np.linalg.solve(own, np.swapaxes(across, 1, 2)), 1, 2),
        middle=np.zeros(CEPSTRA),
        widening=np.ones(CEPSTRA),
        pitches=_pitches(pairs),
    )
    made, wanted = bare.expected(some[:, :CEPSTRA]), some[:, CEPSTRA:]
    widening = np.clip(wanted.std(axis=0) / np.maximum(made.std(axis=0), 1e-6), 1.0, _WIDEST)
    return Conversion(**{**vars(bare), "middle": made.mean(axis=0), "widening": widening})


def _aligned(source: Analysis, target: Analysis) -> NDArray[np.float64]:
    """Return cepstra of frames that belong together and are both voiced or both not, (N, 2 C)."""
    path = warp(_standard(source.envelope), _standard(target.envelope))
    other = np.minimum((path[:-1] + path[1:]) // 2, len(target.envelope) - 1)
    alike = (source.pitch > 0) == (target.pitch[other] > 0)
    return np.concatenate([source.envelope, target.envelope[other]], axis=1)[alike]


def _standard(envelope: NDArray[np.float64]) -> NDArray[np.float64]:
    shape = envelope[:, _SHAPE]
    return (shape - shape.mean(axis=0)) / (shape.std(axis=0) + 1e-6)


def _smooth(track: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weigh each frame (F, C) with its neighbours, 1 to 2 to 1."""
    padded = np.pad(track, ((1, 1), (0, 0)), mode="edge")
    return 0.25 * padded[:-2] + 0.5 * padded[1:-1] + 0.25 * padded[2:]


def _pitches(pairs: Sequence[tuple[Analysis, Analysis]]) -> tuple[tuple[float, float], tuple[float, float]] | None:
    found = []
    for side in (0, 1):
        hertz = np.concatenate([pair[side].pitch for pair in pairs])
        logs = np.log(hertz[hertz > 0])
        if len(logs) < LEAST_VOICED:
            return None
        found.append((float(np.median(logs)), max(float(logs.std()), 1e-3)))
    return found[0], found[1]
