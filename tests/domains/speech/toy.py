"""What the tests of speech share: recognisers of a few units saved as folders, and a set of beeps with transcripts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from common.splits import SPLITS
from domains import DOMAINS as BUILTIN
from domains import speech
from domains.speech._audio import RATE
from domains.speech.data._records import Contents, Record
from domains.speech.data.base import SpeechData

DOMAINS = {**BUILTIN, "speech": speech.DOMAIN}
WORDS = {"low": 300.0, "mid": 900.0, "high": 2500.0}
COUNTS = {"train": 12, "val": 4, "test": 5}
SECONDS = 0.25  # of a word


def wave_folder(folder: Path, *, vocabulary: str = "") -> str:
    """Save a wav2vec 2.0 of 2 layers with random weights, with an output layer where a vocabulary is given."""
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC, Wav2Vec2Model

    config = Wav2Vec2Config(
        vocab_size=len(vocabulary) + 4,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        conv_dim=(16, 16, 16),
        conv_stride=(10, 8, 4),
        conv_kernel=(10, 8, 4),
        num_feat_extract_layers=3,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        pad_token_id=0,
        feat_extract_norm="layer",  # the other kind hears the padding of its neighbours
        do_stable_layer_norm=True,
    )
    torch.manual_seed(0)
    (Wav2Vec2ForCTC if vocabulary else Wav2Vec2Model)(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(folder)
    if vocabulary:
        letters = ["<pad>", "<s>", "</s>", "<unk>", *vocabulary.replace(" ", "|")]
        (folder / "vocab.json").write_text(json.dumps({letter: number for number, letter in enumerate(letters)}))
    return str(folder)


def beeps(text: str, seed: int = 0) -> np.ndarray:
    """A tone for each word, with a pause behind it and a little noise: float32 (T,)."""
    time = np.arange(round(SECONDS * RATE)) / RATE
    draw = np.random.default_rng(seed)
    tones = [np.where(time < 0.8 * SECONDS, 0.4 * np.sin(2 * np.pi * WORDS[word] * time), 0.0) for word in text.split()]
    sound = np.concatenate(tones)
    return (sound + 0.002 * draw.standard_normal(len(sound))).astype(np.float32)


def write_beeps(folder: Path) -> dict[str, list[tuple[Path, str]]]:
    """Write the clips of all splits as WAV files; return each with its text. No text stands in two splits."""
    folder.mkdir(parents=True, exist_ok=True)
    names, found, made = list(WORDS), {}, 0
    for split in SPLITS:
        clips = []
        for number in range(COUNTS[split]):
            digits = [(made + 5) // 3**place % 3 for place in range(4)][: 2 + made % 3]
            text, made = " ".join(names[digit] for digit in digits), made + 1
            path = folder / f"{split}-{number}.wav"
            soundfile.write(path, beeps(text, made), RATE)
            clips.append((path, text))
        found[split] = clips
    return found


class Beeps(SpeechData):
    """Beeps with transcripts, or with the first word as their class.

    Args:
        folder: Where they are written.
        classes: Give the first word as class.
        **options: See `SpeechData`.
    """

    def __init__(self, folder: str, classes: bool = False, **options: Any) -> None:
        super().__init__(**{"seconds_per_batch": 4.0} | options)
        self.folder, self.classes = folder, classes

    def _read(self) -> Contents:
        found = write_beeps(Path(self.folder))
        splits = {split: [self._record(path, text) for path, text in found[split]] for split in SPLITS}
        if self.classes:
            return Contents(kind="classes", splits=splits, class_names=tuple(WORDS), language="en")
        return Contents(kind="text", splits=splits, language="en")

    def _record(self, path: Path, text: str) -> Record:
        kind = {"label": text.split()[0]} if self.classes else {"text": f"{text.capitalize()}."}
        return Record(
            id=path.stem, path=str(path), speaker="b", seconds=len(text.split()) * SECONDS, content=text, **kind
        )


def data_of(folder: Path, **options: Any) -> Beeps:
    """The datamodule, set up."""
    made = Beeps(str(folder), **options)
    made.setup()
    return made


def task_of(cls: type, backbone: str, peft: Any, data: SpeechData, **options: Any) -> Any:
    """A task as a fit would build it, without a trainer."""
    made = cls(backbone=backbone, peft=peft, **{"seed": 1} | options)
    made.facts = data.facts
    made.assemble()
    return made.eval()
