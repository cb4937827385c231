"""How much of a learned change to speak with: a share chosen on the validation texts by words and speaker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.domain import Domain
from common.errors import GraftError
from common.exchange import restore
from common.run import read_trained
from domains.speech.voice_metrics import PARTS, Part, score

SHARES = (0.0, 0.25, 0.5, 0.7, 0.85, 1.0)


def figures_by_share(
    run: Path,
    data: Any,  # noqa: ANN401
    domains: Mapping[str, Domain],
    shares: Sequence[float] = SHARES,
    *,
    parts: Sequence[Part] = PARTS,
    most: int = 24,
) -> list[dict[str, float]]:
    """Speak validation texts with several shares of what a run learned, and measure each.

    Args:
        run: Folder of a finished run of `VoiceAdaptation`.
        data: Its datamodule, set up.
        domains: The registered domains.
        shares: From 0, the voice as it came, to 1.
        parts: What to measure; see `score`.
        most: Texts to speak, the first of the split.

    Returns:
        For each share its figures, with `share` among them.

    Raises:
        GraftError: The run has not finished.
    """
    record, records, found = read_trained(run), data.records("val")[:most], []
    clips, texts = [data.load(one) for one in records], [one.text for one in records]
    for share in shares:
        task: Any = restore(run, {**record, "settings": {**record["settings"], "scale": share}}, domains)
        spoken = [task.say(text, seed=place)[0] for place, text in enumerate(texts)]
        language = task.facts.language
        found.append({"share": share, **score(spoken, clips, texts, task.facts.rate, parts=parts, language=language)})
    return found


def best_share(figures: Sequence[Mapping[str, float]], most_words: float = 0.05) -> float:
    """Return the share whose voice is most like the speaker's, among those that cost few words.

    Args:
        figures: What `figures_by_share` returned, share 0 among them.
        most_words: How much the word error rate may lie above that of share 0.

    Raises:
        GraftError: Share 0 was not measured.
    """
    base = next((row for row in figures if row["share"] == 0.0), None)
    if base is None:
        raise GraftError("The voice as it came (share 0) was not measured. Put 0 among the shares.")
    allowed = [row for row in figures if row["wer"] <= base["wer"] + most_words]
    return max(allowed, key=lambda row: row["speaker_similarity"])["share"]
