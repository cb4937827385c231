"""Rows of predictions.jsonl for generated speech, with sounds to hear and spectrograms to see for a few of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from common.checkpoint import write_atomically
from common.splits import stable_hash
from domains.speech._text import normalize
from domains.speech.data.voices import VoiceRecord
from domains.speech.pictures import picture_of
from domains.speech.speak import encoded
from domains.speech.voice_metrics import NORMALIZER

_SHOWN = 16  # of a test split, chosen by a hash of their ids
_DIGITS = 6


def voice_rows(
    records: Sequence[VoiceRecord],
    generated: Sequence[Tensor],
    reference: Sequence[Tensor],
    rate: int,
    scores: Sequence[Mapping[str, Any]],
    folder: Path,
    *,
    shown: int = _SHOWN,
) -> list[dict[str, Any]]:
    """Make a row for each utterance; for some of them write what was said and what the speaker said.

    Which ones are shown is decided by a hash of their ids, so it is the same ones in every run. Sounds are MP3, which
    every browser plays: about 4 kB a second.

    Args:
        records: What was to be said.
        generated: What was generated, (T_i,) float32.
        reference: The speaker's recordings, (T'_i,) float32.
        rate: Samples per second of both.
        scores: The rows of `score_rows`.
        folder: The run's folder; sounds and pictures go to `predictions/` in it.
        shown: How many are shown.

    Returns:
        id, path (of the recording), text, whether it is a pseudo-label, and the scores; where shown also `sound`,
        `picture`, `reference_sound` and `reference_picture`, paths inside `folder`.
    """
    order = sorted(range(len(records)), key=lambda place: stable_hash(records[place].id, "sounds"))
    chosen = set(order[:shown])
    rows = []
    for place, (record, said, real, score) in enumerate(zip(records, generated, reference, scores, strict=True)):
        row = {"id": record.id, "path": record.path, "text": record.text, "pseudo_label": record.pseudo}
        row |= {name: round(v, _DIGITS) if isinstance(v, float) else v for name, v in score.items()}
        if place in chosen:
            stem = f"predictions/{stable_hash(record.id):016x}"
            row |= _shown(folder, stem, said, rate, record.text, score.get("hypothesis"))
            target = _shown(folder, f"{stem}-recording", real, rate, record.text, None)
            row |= {f"reference_{name}": path for name, path in target.items()}
        rows.append(row)
    return rows


def _shown(folder: Path, stem: str, audio: Tensor, rate: int, text: str, hypothesis: str | None) -> dict[str, str]:
    """Write a sound and its spectrogram; below this, where a recogniser listened, what it heard."""
    names = {"sound": f"{stem}.mp3", "picture": f"{stem}.png"}
    write_atomically(folder / names["sound"], lambda file: file.write(encoded(audio, rate, "MP3")))
    if hypothesis is None:
        drawn = picture_of(audio, rate, None, "", title=text)
    else:
        said, heard = (normalize(words, NORMALIZER) for words in (text, hypothesis))
        drawn = picture_of(audio, rate, said, heard, title=text)
    write_atomically(folder / names["picture"], lambda file: file.write(drawn))
    return names
