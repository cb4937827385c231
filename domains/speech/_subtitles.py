"""Subtitles: what was said from when to when, as SubRip (SRT) and WebVTT."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Segment:
    """What was said from when to when, in seconds."""

    start: float
    end: float
    text: str


def srt(segments: Iterable[Segment]) -> str:
    """Write segments as SubRip; those without text are left out."""
    said = [segment for segment in segments if segment.text.strip()]
    return "".join(
        f"{number}\n{_clock(one.start, ',')} --> {_clock(one.end, ',')}\n{_plain(one.text)}\n\n"
        for number, one in enumerate(said, start=1)
    )


def vtt(segments: Iterable[Segment]) -> str:
    """Write segments as WebVTT; those without text are left out."""
    said = [segment for segment in segments if segment.text.strip()]
    cues = (f"{_clock(one.start, '.')} --> {_clock(one.end, '.')}\n{_escaped(one.text)}\n\n" for one in said)
    return "WEBVTT\n\n" + "".join(cues)


WRITERS: Mapping[str, Callable[[Iterable[Segment]], str]] = {".srt": srt, ".vtt": vtt}


def _clock(seconds: float, point: str) -> str:
    """Return hours, minutes, seconds and milliseconds."""
    whole, thousandths = divmod(round(seconds * 1000), 1000)
    return f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02}{point}{thousandths:03}"


def _plain(text: str) -> str:
    """Return a text in one line: an empty line would end its cue."""
    return " ".join(text.split())


def _escaped(text: str) -> str:
    return _plain(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
