"""The prompts of the Asterisk voice, decoded once and labelled once by the suite's own recogniser."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common import artifacts
from common.errors import GraftError
from domains.speech._audio import RATE, decode_audio, fingerprint
from domains.speech.data._prepared import progress_bar
from domains.speech.data.prompts import ASTERISK, PARTS
from domains.speech.data.voices._labels import RECOGNISER, SECONDS, Labeller, labeller

ROOT = "usr/share/asterisk/sounds/en_US_f_Allison/"
_INDEX = "prompts.json"
_SILENCE = "silence/"  # the package's pauses; the codec leaves some noise in them


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One recording of the package.

    Attributes:
        id: Its name in the package, without suffix.
        path: The decoded clip, 16 kHz.
        seconds: How long it is.
        content: Fingerprint of the clip.
        text: What is said: known from the file's name, or what a recogniser heard; "" where nothing was.
        pseudo: Whether a recogniser heard it.
        confidence: See `PseudoLabel`; 0 for a known text.
        agreed: See `PseudoLabel`; True for a known text.
    """

    id: str
    path: str
    seconds: float
    content: str
    text: str
    pseudo: bool
    confidence: float
    agreed: bool


def prompts(make: Callable[[], Labeller] = labeller) -> tuple[Sequence[Prompt], int]:
    """Return all recordings of the package with their texts, labelling them at the first call (some minutes).

    The second value is how many files of the package hold silence.

    Args:
        make: Makes what labels a clip; called only where labels are missing.

    Raises:
        GraftError: An archive is not in the cache and cannot be fetched, or the prepared folder is damaged.
    """
    key = f"asterisk-voice-1-{artifacts.row(ASTERISK).sha256[:12]}-{artifacts.row(RECOGNISER).sha256[:12]}"
    folder = artifacts.prepared(key, lambda scratch: _build(scratch, make()))
    try:
        whole = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        found = [Prompt(**{**row, "path": str(folder / row["path"])}) for row in whole["prompts"]]
        spoken = [prompt for prompt in found if not prompt.id.startswith(_SILENCE)]
        return spoken, whole["silent"] + len(found) - len(spoken)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise GraftError(f"The prepared folder {folder} is damaged ({error}): delete it and run again.") from error


def _build(folder: Path, label: Labeller) -> None:
    import soundfile

    known = {name: word for part in PARTS.values() for name, word in part.items()}
    sounds = {
        member.name.removeprefix(ROOT).removesuffix(".g722"): member.data
        for member in artifacts.iter_members(artifacts.fetch(ASTERISK), ROOT)
        if member.data is not None and member.name.endswith(".g722")
    }
    rows: list[Prompt] = []
    silent = 0
    with progress_bar() as bar:
        for name, data in bar.track(sorted(sounds.items()), description="Labelling the prompts"):
            try:
                audio = decode_audio(data, f"{name}.g722")
            except GraftError:
                silent += 1
                continue
            path = folder / f"{name}.flac"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, audio.numpy(), RATE, subtype="PCM_16")
            text, confidence, agreed = known.get(name, ""), 0.0, True
            if name not in known and len(audio) <= SECONDS * RATE:
                heard = label(audio)
                text, confidence, agreed = heard.text, round(heard.confidence, 4), heard.agreed
            rows.append(
                Prompt(
                    id=name,
                    path=path.relative_to(folder).as_posix(),
                    seconds=len(audio) / RATE,
                    content=fingerprint(path),
                    text=text,
                    pseudo=name not in known,
                    confidence=confidence,
                    agreed=agreed,
                )
            )
    whole = {"prompts": [dataclasses.asdict(row) for row in rows], "silent": silent}
    (folder / _INDEX).write_text(json.dumps(whole, ensure_ascii=False, indent=0), encoding="utf-8")
