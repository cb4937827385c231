"""Pictures of utterances: the log-mel spectrogram, and below it what was said and what was heard, word under word."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from domains.speech.metrics import Alignment, align

_WIDTH, _HEIGHT, _EDGE = 8.0, 1.9, 0.5  # inches: the page, the spectrogram, the space left and right of it
_TOP, _AXIS, _LINE, _GAP = 0.3, 0.42, 0.17, 0.12  # inches: the title, the axis of time, a line of text, between lines
_COLUMNS = 88  # characters of a line of text
_FONT, _SMALL = 8, 7
_DPI = 110
_BANDS, _WINDOW, _HOP = 80, 0.025, 0.010  # mel bands; seconds
_RANGE = 8.0  # of the logarithms (base 10) that are drawn, below the loudest: 80 dB
_COLOURS = {"=": "#303030", "S": "#C00000", "D": "#C00000", "I": "#C00000"}

Step = tuple[str, str, str]


def log_mel(audio: Tensor, rate: int) -> NDArray[Any]:
    """Return the logarithm (base 10) of the mel spectrogram's power, (bands, frames), at most 80 dB below the loudest.

    Args:
        audio: float32 (T,).
        rate: Samples per second.
    """
    from torchaudio.transforms import MelSpectrogram

    window, hop = round(_WINDOW * rate), round(_HOP * rate)
    padded = torch.nn.functional.pad(audio.cpu().float(), (0, max(0, window - len(audio))))
    size = 1 << (window - 1).bit_length()
    mel = MelSpectrogram(rate, n_fft=size, win_length=window, hop_length=hop, n_mels=_BANDS)(padded)
    found = mel.clamp(min=1e-12).log10()
    return found.clamp(min=float(found.max()) - _RANGE).numpy()


def lines_of(alignment: Alignment, columns: int = _COLUMNS) -> list[list[Step]]:
    """Break an alignment into lines of at most so many characters; a word that is longer has a line of its own."""
    lines: list[list[Step]] = [[]]
    used = 0
    for step in alignment.steps:
        size = _size(step)
        if lines[-1] and used + size > columns:
            lines.append([])
            used = 0
        lines[-1].append(step)
        used += size + 1
    return lines


def picture_of(audio: Tensor, rate: int, reference: str | None, hypothesis: str, *, title: str = "") -> bytes:
    """Draw an utterance.

    Args:
        audio: float32 (T,).
        rate: Samples per second.
        reference: What was said; None where that is not known.
        hypothesis: What was heard. Words that differ from the reference are red, a missing one is a line of dots.
        title: A line above.

    Returns:
        A PNG.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if reference is None:
        found = Alignment(steps=tuple(("=", word, word) for word in hypothesis.split()))
    else:
        found = align(reference, hypothesis)
    lines, rows = lines_of(found), 1 if reference is None else 2
    text = len(lines) * (rows * _LINE + _GAP)
    height = _TOP + _HEIGHT + _AXIS + text
    with mpl.rc_context({"font.size": _FONT, "font.family": "sans-serif", "text.parse_math": False}):
        figure: Any = Figure(figsize=(_WIDTH, height), dpi=_DPI)
        FigureCanvasAgg(figure)
        inside = (_WIDTH - 1.3 * _EDGE) / _WIDTH
        place = (_EDGE / _WIDTH, (_AXIS + text) / height, inside, _HEIGHT / height)
        _draw_sound(figure.add_axes(place), audio, rate)
        page = figure.add_axes((0, 0, 1, 1))
        page.set_axis_off()
        page.patch.set_alpha(0)
        wrong = "" if reference is None else f"   {found.errors} of {found.words} words wrong"
        page.text(_EDGE, 0.06, _short(title) + wrong, fontsize=_FONT + 1, va="top")
        for number, line in enumerate(lines):
            top = _TOP + _HEIGHT + _AXIS + number * (rows * _LINE + _GAP)
            _draw_line(page, line, top, both=reference is not None)
        page.set(xlim=(0, _WIDTH), ylim=(height, 0), aspect="auto")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _draw_sound(axes: Any, audio: Tensor, rate: int) -> None:  # noqa: ANN401 (matplotlib is half typed)
    seconds = len(audio) / rate
    axes.imshow(log_mel(audio, rate), origin="lower", aspect="auto", cmap="magma", extent=(0, seconds, 0, _BANDS))
    wanted = [hertz for hertz in (250, 500, 1000, 2000, 4000, 8000) if hertz <= rate / 2]
    places = [_BANDS * _mel(hertz) / _mel(rate / 2) for hertz in wanted]
    axes.set_yticks(places, [f"{hertz / 1000:g}" for hertz in wanted], fontsize=_SMALL)
    axes.set_ylabel("kHz", fontsize=_SMALL)
    axes.set_xlabel("seconds", fontsize=_SMALL, labelpad=1)
    axes.tick_params(axis="x", labelsize=_SMALL, pad=1)


def _draw_line(page: Any, line: Sequence[Step], top: float, *, both: bool) -> None:  # noqa: ANN401
    """Write a line of words: the reference above, the hypothesis below."""
    names = ("said", "heard") if both else ("heard",)
    step = (_WIDTH - 1.3 * _EDGE) / _COLUMNS
    for row, name in enumerate(names):
        page.text(_EDGE - 0.08, top + row * _LINE, name, fontsize=_SMALL, ha="right", va="top", color="#808080")
    column = 0
    for sign, reference, hypothesis in line:
        words = (reference, hypothesis) if both else (hypothesis,)
        for row, word in enumerate(words):
            page.text(
                _EDGE + column * step,
                top + row * _LINE,
                word or "·" * _size((sign, reference, hypothesis)),
                fontsize=_FONT,
                family="monospace",
                va="top",
                color=_COLOURS[sign],
            )
        column += _size((sign, reference, hypothesis)) + 1


def _size(step: Step) -> int:
    return max(len(step[1]), len(step[2]))


def _short(title: str, most: int = 70) -> str:
    return title if len(title) <= most else f"...{title[3 - most :]}"


def _mel(hertz: float) -> float:
    """Return the mel of a frequency, as torchaudio counts it (O'Shaughnessy 1987)."""
    return 2595.0 * float(np.log10(1.0 + hertz / 700.0))
