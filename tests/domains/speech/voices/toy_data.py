"""Recordings of a tiny voice: hums with texts, in a table."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import soundfile

from domains.speech.data.voices import VoiceManifest

RATE = 8000
TEXTS = {
    "train": ("a bad cab", "dad had a bag", "fed a deaf cad", "he bade a head", "a cage faded", "bag a big cab"),
    "val": ("a faded bead", "feed a deaf dab"),
    "test": ("a caged badge", "he had a bad egg", "a big bad bee"),
}


def hum(text, seed):
    """A harmonic tone of 150 to 180 Hz with a syllable for each word: float32 (T,)."""
    draw = np.random.default_rng(seed)
    parts = []
    for _ in text.split():
        time = np.arange(int(RATE * draw.uniform(0.25, 0.4))) / RATE
        pitch = draw.uniform(150, 180)
        tone = sum(np.sin(2 * np.pi * pitch * n * time) / n for n in range(1, 8))
        parts += [tone * np.hanning(len(time)), np.zeros(RATE // 25)]
    sound = 0.2 * np.concatenate(parts)
    return (sound + 0.001 * draw.standard_normal(len(sound))).astype(np.float32)


def table(folder: Path) -> Path:
    """Write the recordings and their table; return the table's path."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "clips.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "text", "split", "speaker"))
        for split, texts in TEXTS.items():
            for number, text in enumerate(texts):
                soundfile.write(folder / f"{split}-{number}.wav", hum(text, len(text) + number), RATE)
                writer.writerow((f"{split}-{number}.wav", text, split, "hummer"))
    return folder / "clips.csv"


def data_of(path: Path, **options) -> VoiceManifest:
    """The datamodule, set up."""
    made = VoiceManifest(
        str(path),
        language="en",
        speaker="hummer",
        **{"rate": RATE, "check": "warn", "seconds_per_batch": 15.0, "max_bad": 0.5} | options,
    )
    made.setup()
    return made
