"""The data card of a classification set: how far the class is given away by voice, room and channel alone."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from common import artifacts
from common.errors import GraftError
from common.splits import Split, stable_hash
from domains.speech._audio import RATE, Channel
from domains.speech.data._dataset import load
from domains.speech.data._records import Record

if TYPE_CHECKING:
    from torchaudio.transforms import MelSpectrogram

BANDS = 40
_MOST_CLIPS = 2_000
_DECAY = 1e-2


def mel_statistics(audio: Tensor) -> Tensor:
    """Describe a clip by the mean and the deviation over time of each of 40 log-mel bands.

    What is said leaves little trace in it; who speaks, where, and into what, does.

    Args:
        audio: float32 (T,) at 16 kHz.

    Returns:
        float32 (80,).
    """
    audio = nn.functional.pad(audio, (0, max(0, 400 - len(audio))))
    mel = torch.log(_mel()(audio) + 1e-6)
    return torch.cat([mel.mean(dim=-1), mel.std(dim=-1, correction=0)])


def fit_probe(features: Tensor, labels: Tensor, classes: int) -> Callable[[Tensor], Tensor]:
    """Fit a multinomial logistic regression with L2 decay on standardised features.

    Args:
        features: (N, D).
        labels: int64 (N,).
        classes: Number of classes K.

    Returns:
        What turns features (M, D) into logits (M, K).
    """
    mean, scale = features.mean(dim=0), features.std(dim=0, correction=0).clamp(min=1e-6)
    weight = torch.zeros(features.shape[1], classes, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    inputs = ((features - mean) / scale).double()
    solver = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = nn.functional.cross_entropy(inputs @ weight + bias, labels) + _DECAY / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(closure)
    fitted, offset = weight.detach(), bias.detach()
    return lambda new: ((new - mean) / scale).double() @ fitted + offset


def data_card(
    splits: Mapping[Split, Sequence[Record]], class_names: Sequence[str], channel: Channel, digest: str
) -> dict[str, float]:
    """Return accuracies on the test split; see `SpeechFacts.confound`. At most 2,000 clips a split are read, once.

    Args:
        splits: The records.
        class_names: The classes.
        channel: Which channel is taken.
        digest: Digest of the records: the card is kept in the cache under it.
    """
    names = {name: position for position, name in enumerate(class_names)}

    def build(folder: Path) -> None:
        train, test = (_described(splits[side], names, channel) for side in ("train", "test"))
        logits = fit_probe(*train, len(names))(test[0])
        majority = torch.bincount(train[1], minlength=len(names)).argmax()
        card = {
            "mel_statistics": round(float((logits.argmax(dim=1) == test[1]).double().mean()), 4),
            "majority": round(float((test[1] == majority).double().mean()), 4),
        }
        (folder / "card.json").write_text(json.dumps(card), encoding="utf-8")

    folder = artifacts.prepared(f"mel-card-1-{channel}-{digest[:16]}", build)
    return dict(json.loads((folder / "card.json").read_text(encoding="utf-8")))


def _described(records: Sequence[Record], names: Mapping[str, int], channel: Channel) -> tuple[Tensor, Tensor]:
    """Return (N, 80) and int64 (N,) of the readable ones among the first records by a hash."""
    features, labels = [], []
    for record in sorted(records, key=lambda r: (stable_hash(r.id, "card"), r.id))[:_MOST_CLIPS]:
        try:
            features.append(mel_statistics(load(record, channel)))
        except GraftError:
            # Named and counted when a loader meets it.
            continue
        labels.append(names[record.label])
    if not features:
        raise GraftError(f"None of the {len(records)} clips of a split can be read, '{records[0].path}' among them.")
    return torch.stack(features), torch.tensor(labels)


@functools.cache
def _mel() -> MelSpectrogram:
    from torchaudio.transforms import MelSpectrogram

    return MelSpectrogram(RATE, n_fft=400, hop_length=160, n_mels=BANDS)
