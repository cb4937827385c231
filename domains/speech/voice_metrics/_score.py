"""All measures of generated speech at once: a row for each utterance, and the figures of the set."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from torch import Tensor

from common.errors import GraftError, unknown
from domains.speech.voice_metrics._acoustics import Acoustics, acoustics
from domains.speech.voice_metrics._speaker import similarities, speaker_encoder, spectrum_distance
from domains.speech.voice_metrics._words import NORMALIZER, RECOGNISER, heard, word_errors

Part = Literal["acoustics", "words", "speaker"]
CHEAP: tuple[Part, ...] = ("acoustics",)
"""What costs milliseconds a clip. Words cost a second a clip on one CPU thread, the speaker a tenth."""
PARTS: tuple[Part, ...] = ("acoustics", "words", "speaker")

Row = dict[str, Any]


def score_rows(
    generated: Sequence[Tensor],
    reference: Sequence[Tensor],
    texts: Sequence[str],
    rate: int,
    *,
    parts: Sequence[Part] = PARTS,
    recogniser: str = RECOGNISER,
    normalizer: str = NORMALIZER,
    language: str = "",
) -> list[Row]:
    """Measure each generated utterance beside the recording of the same text.

    Args:
        generated: Utterances (T_i,), float32.
        reference: Recordings (T'_i,) of the target speaker, float32.
        texts: What each of them says.
        rate: Samples per second of both.
        parts: What to measure: `acoustics` (the fields of `Acoustics`), `words` (`hypothesis`, `errors`, `words`,
            `wer`), `speaker` (`speaker_similarity`, the cosine with the centroid of all recordings).
        recogniser: Which recogniser listens, unadapted.
        normalizer: How texts are written before words are compared.
        language: Language of the texts, for a recogniser of many.

    Raises:
        GraftError: The three lists differ in length, nothing is given, or a part is unknown.
    """
    if not len(generated) == len(reference) == len(texts) or not texts:
        raise GraftError(
            f"{len(generated)} utterances, {len(reference)} recordings and {len(texts)} texts were given to score; "
            "give as many of each, and at least one."
        )
    for part in parts:
        if part not in PARTS:
            raise unknown("part of the score", part, PARTS)
    rows: list[Row] = [{} for _ in texts]
    if "acoustics" in parts:
        for row, one, other in zip(rows, generated, reference, strict=True):
            row.update(dataclasses.asdict(acoustics(one, other, rate)))
    if "words" in parts:
        hypotheses = [heard(one, rate, name=recogniser, language=language) for one in generated]
        counts = word_errors(texts, hypotheses, normalizer)
        for row, said, (errors, words) in zip(rows, hypotheses, counts, strict=True):
            row.update(hypothesis=said, errors=errors, words=words, wer=errors / max(1, words))
    if "speaker" in parts:
        encoder = speaker_encoder()
        target = [encoder.embed(one, rate) for one in reference]
        for row, cosine in zip(rows, similarities([encoder.embed(g, rate) for g in generated], target), strict=True):
            row["speaker_similarity"] = cosine
    return rows


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Sum up the rows of a set.

    Returns:
        Of acoustics: `mcd` (dB), `f0_rmse` (cents), `voicing_error`, `duration_error`, each the mean of the utterances
        that have one; `f0_median` and `f0_median_reference` (Hz), the medians of the utterances' medians; `f0_gap`
        between these, in semitones, above 0 where the generated voice is higher; `duration_ratio`, all generated
        seconds over all recorded ones. Of words: `wer`, over all words together. Of the speaker: `speaker_similarity`.
    """
    found: dict[str, float] = {}
    names = {name for row in rows for name in row}
    fields = {field.name for field in dataclasses.fields(Acoustics)}
    if fields <= names:
        for name in ("mcd", "f0_rmse", "voicing_error", "duration_error"):
            found[name] = _over(rows, name, np.mean)
        for name in ("f0_median", "f0_median_reference"):
            found[name] = _over(rows, name, np.median)
        found["f0_gap"] = 12.0 * math.log2(found["f0_median"] / found["f0_median_reference"])
        found["duration_ratio"] = sum(r["seconds"] for r in rows) / sum(r["seconds_reference"] for r in rows)
    if "errors" in names:
        found["wer"] = sum(row["errors"] for row in rows) / max(1, sum(row["words"] for row in rows))
    if "speaker_similarity" in names:
        found["speaker_similarity"] = _over(rows, "speaker_similarity", np.mean)
    return found


def intervals(
    rows: Sequence[Mapping[str, Any]], *, draws: int = 1000, share: float = 0.95, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Return an interval for each figure of `summary`, by a percentile bootstrap over the utterances.

    It says what other texts would have changed, not other seeds of training: these take several runs.

    Args:
        rows: The rows of `score_rows`.
        draws: How often as many utterances are drawn anew, with replacement.
        share: How many of the drawn figures lie inside.
        seed: Seed of the draws.
    """
    rng = np.random.default_rng(seed)
    drawn = [summary([rows[place] for place in rng.integers(len(rows), size=len(rows))]) for _ in range(draws)]
    tail = 100.0 * (1.0 - share) / 2.0
    found = {}
    for name in summary(rows):
        low, high = np.nanpercentile([one[name] for one in drawn], [tail, 100.0 - tail])
        found[name] = (float(low), float(high))
    return found


def score(
    generated: Sequence[Tensor],
    reference: Sequence[Tensor],
    texts: Sequence[str],
    rate: int,
    *,
    parts: Sequence[Part] = PARTS,
    **options: Any,  # noqa: ANN401
) -> dict[str, float]:
    """Measure generated speech; `summary` of `score_rows`, and with `speaker` also `spectrum_distance` of the set (dB).

    Args:
        generated: See `score_rows`.
        reference: See `score_rows`.
        texts: See `score_rows`.
        rate: See `score_rows`.
        parts: See `score_rows`; `CHEAP` for every epoch.
        **options: `recogniser`, `normalizer`, `language`.

    Raises:
        GraftError: See `score_rows`.
    """
    found = summary(score_rows(generated, reference, texts, rate, parts=parts, **options))
    if "speaker" in parts:
        found["spectrum_distance"] = spectrum_distance(generated, reference, rate)
    return found


def _over(rows: Sequence[Mapping[str, Any]], name: str, how: Any) -> float:  # noqa: ANN401
    values = [row[name] for row in rows if math.isfinite(row[name])]
    return float(how(values)) if values else float("nan")
