"""Phonemes by espeak-ng, whose library and data the package `espeakng-loader` brings along."""

from __future__ import annotations

import ctypes
import functools
import re
from typing import Any

from common.errors import GraftError

_SYNCHRONOUS, _KEEP_RUNNING, _UTF8, _IPA = 2, 0x8000, 1, 0x02
_LONGEST_PATH = 160  # of the buffer in which espeak-ng keeps its data's path
_MARKS = ".,:;!?\u2026\u2014\u2013"
_END = re.compile(rf"([{_MARKS}])[^\w{_MARKS}]*\w?$")
_WRITTEN = {"\u2026": ".", "\u2014": ",", "\u2013": ","}  # the ellipsis and the dashes
_SHORT = re.compile(r"\b(mr|mrs|ms|dr|st|prof|rev|gen|sgt|capt|lt|jr|sr|vs|etc)\.$", re.IGNORECASE)


def phonemes(text: str, language: str) -> str:
    """Turn text into IPA with stress marks, its clauses ended by `,`, `.`, `:`, `;`, `!` or `?` where the text has one.

    Args:
        text: One line.
        language: A voice of espeak-ng, such as `en-us`.

    Raises:
        GraftError: espeak-ng has no such voice, or could not be started.
    """
    library = _library()
    if library.espeak_SetVoiceByName(language.encode()) != 0:
        raise GraftError(f"espeak-ng has no voice '{language}'. Give one of `espeak-ng --voices`, such as en-us.")
    line = " ".join(text.replace("\0", " ").split())
    raw = line.encode()
    buffer = ctypes.create_string_buffer(raw)
    start = ctypes.addressof(buffer)
    place = ctypes.c_void_p(start)
    written, done = "", 0
    while place.value is not None:
        # Each call reads a clause, and the first letter of the next one ahead.
        said = (library.espeak_TextToPhonemes(ctypes.byref(place), _UTF8, _IPA) or b"").decode()
        read = len(raw) if place.value is None else place.value - start
        said = re.sub(r"\([a-z-]+\)", "", said).strip()  # the name of another language that it changed to
        if said:
            written += f" {said}{_mark(raw[:read].decode(errors='ignore'), raw[done:read].decode(errors='ignore'))}"
        done = read
    return written.strip()


def _mark(read: str, clause: str) -> str:
    """Return the mark that ends a clause, given all that was read and what belongs to it."""
    found = _END.search(clause)
    if found is None:
        return ""
    before = read[: len(read) - len(clause) + found.end(1)]
    # The title before a name ends no sentence; behind the text's last word a full stop always does.
    if found[1] == "." and _SHORT.search(before) and found.end(1) < len(clause):
        return ""
    return _WRITTEN.get(found[1], found[1])


@functools.cache
def _library() -> Any:  # noqa: ANN401
    import espeakng_loader

    path = espeakng_loader.get_data_path()
    if len(path) >= _LONGEST_PATH:
        raise GraftError(
            f"espeak-ng takes paths below {_LONGEST_PATH} letters, and its data lie in {path}. Move the venv."
        )
    try:
        library = ctypes.CDLL(espeakng_loader.get_library_path())
    except OSError as error:
        raise GraftError(f"espeak-ng could not be loaded: {error}. Install espeakng-loader again.") from error
    library.espeak_TextToPhonemes.restype = ctypes.c_char_p
    library.espeak_TextToPhonemes.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_int, ctypes.c_int]
    library.espeak_Initialize.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
    if library.espeak_Initialize(_SYNCHRONOUS, 0, path.encode(), _KEEP_RUNNING) < 0:
        raise GraftError(f"espeak-ng could not read its data in {path}. Install espeakng-loader again.")
    return library
