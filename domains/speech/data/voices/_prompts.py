"""The prompts of the Asterisk voice, decoded once and labelled once by the suite's own recogniser."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common import artifacts
from common.errors import GraftError
from common.splits import stable_hash
from domains.speech._audio import RATE, decode_audio, fingerprint
from domains.speech.data._prepared import progress_bar
from domains.speech.data.prompts import ASTERISK, PARTS
from domains.speech.data.voices._labels import RECOGNISER, SECONDS, Labeller, labeller

ROOT = "usr/share/asterisk/sounds/en_US_f_Allison/"
_INDEX = "prompts.json"
_SILENCE = "silence/"  # the package's pauses; the codec leaves some noise in them
PROMPT_PARTS = 16


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


def prompts(make: Callable[[], Labeller] = labeller, parts: int = PROMPT_PARTS) -> tuple[Sequence[Prompt], int]:
    """Return recordings of the package with their texts, labelling them at the first call (some minutes for all).

    They are labelled in parts, each of which is kept, so that an interrupted run goes on where it was; processes that
    need them at the same time share the parts. The second value is how many files among them hold silence.

    Args:
        make: Makes what labels a clip; called only where labels are missing.
        parts: How many of the sixteen parts are read; which clips are in a part a hash of their names decides.

    Raises:
        GraftError: An archive is not in the cache and cannot be fetched, or a prepared folder is damaged.
    """
    key = f"asterisk-voice-1-{artifacts.row(ASTERISK).sha256[:12]}-{artifacts.row(RECOGNISER).sha256[:12]}"
    work = _Work(make)
    found: list[Prompt] = []
    silent = 0
    wanted = range(min(parts, PROMPT_PARTS))
    builds = {f"{key}-{part:02}": functools.partial(work.build, part=part) for part in wanted}
    for folder in artifacts.prepared_parts(builds):
        try:
            whole = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
            found += [Prompt(**{**row, "path": str(folder / row["path"])}) for row in whole["prompts"]]
            silent += whole["silent"]
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise GraftError(f"The prepared folder {folder} is damaged ({error}): delete it and run again.") from error
    return sorted(found, key=lambda prompt: prompt.id), silent


class _Work:
    """Decodes and labels; what it needs is read and built where the first part is missing.

    Args:
        make: See `prompts`.
    """

    def __init__(self, make: Callable[[], Labeller]) -> None:
        self._make = make
        self._known = {name: word for part in PARTS.values() for name, word in part.items()}

    @functools.cached_property
    def _label(self) -> Labeller:
        return self._make()

    @functools.cached_property
    def _sounds(self) -> dict[str, bytes]:
        return {
            member.name.removeprefix(ROOT).removesuffix(".g722"): member.data
            for member in artifacts.iter_members(artifacts.fetch(ASTERISK), ROOT)
            if member.data is not None and member.name.endswith(".g722")
        }

    def build(self, folder: Path, part: int) -> None:
        """Write the clips of a part, chosen by a hash of their names, and their index."""
        names = sorted(name for name in self._sounds if stable_hash(name, "part") % PROMPT_PARTS == part)
        silent = [name for name in names if name.startswith(_SILENCE)]
        rows: list[Prompt] = []
        with progress_bar() as bar:
            spoken = [name for name in names if name not in silent]
            for name in bar.track(spoken, description=f"Labelling the prompts, part {part + 1} of {PROMPT_PARTS}"):
                rows.append(self._prompt(folder, name))
        whole = {"prompts": [dataclasses.asdict(row) for row in rows], "silent": len(silent)}
        (folder / _INDEX).write_text(json.dumps(whole, ensure_ascii=False, indent=0), encoding="utf-8")

    def _prompt(self, folder: Path, name: str) -> Prompt:
        import soundfile

        audio = decode_audio(self._sounds[name], f"{name}.g722")
        path = folder / f"{name}.flac"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, audio.numpy(), RATE, subtype="PCM_16")
        text, confidence, agreed = self._known.get(name, ""), 0.0, True
        if name not in self._known and len(audio) <= SECONDS * RATE:
            heard = self._label(audio)
            text, confidence, agreed = heard.text, round(heard.confidence, 4), heard.agreed
        return Prompt(
            id=name,
            path=path.relative_to(folder).as_posix(),
            seconds=len(audio) / RATE,
            content=fingerprint(path),
            text=text,
            pseudo=name not in self._known,
            confidence=confidence,
            agreed=agreed,
        )
