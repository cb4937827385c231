"""What a frozen recogniser hears in two sounds: a distance that protects the words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from domains.speech.backbones import SpeechBackbone, build, encode
from domains.speech.voices._objective import Windows


class Listener:
    """A Whisper's encoder, frozen.

    The distance of two sounds is the mean over its layers of ||h - h'||_1 / ||h'||_1, h the features of a layer: a
    feature matching (arXiv 1512.09300) in which words weigh more than timbre, since the recogniser was trained on
    speakers of all kinds. It reads short windows at their own length.

    Args:
        name: `whisper-tiny-en`, or another Whisper by folder or hub name.
    """

    def __init__(self, name: str) -> None:
        self.built: SpeechBackbone = build(name, encoder_only=True)
        self.model: Any = self.built.model.eval().requires_grad_(False)

    def distance(self, windows: Windows, rate: int) -> Tensor:
        """Return the distance, a scalar with a gradient to `windows.made`."""
        self.model.to(windows.made.device)
        made = self._features(windows.made, rate)
        with torch.no_grad():
            wanted = self._features(windows.wanted, rate)
        spread = (made - wanted).abs().mean(dim=(0, 2, 3)) / wanted.abs().mean(dim=(0, 2, 3))  # per layer
        return spread.mean()

    def _features(self, audio: Tensor, rate: int) -> Tensor:
        from torchaudio.functional import resample

        heard = resample(audio, rate, self.built.rate)
        heard = functional.pad(heard, (0, -heard.shape[1] % self.built.hop))
        lengths = torch.full((len(heard),), heard.shape[1], device=heard.device)
        features, _ = encode(self.built, self.model, heard, lengths, all_layers=True)
        return features
