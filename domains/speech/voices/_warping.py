"""Durations of a recording's symbols by warping it onto the voice's own speech of the same text."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from domains.speech.backbones._backbone import bare
from domains.speech.voices._alignment import warp, warped_durations
from domains.speech.voices._spectrum import log_mel, magnitudes
from domains.speech.voices._vits import log_durations
from domains.speech.voices._voice import Voice, frames_of, read, synthesize

_CEPSTRA = 13


def warp_recording(voice: Voice, model: nn.Module, ids: Tensor, audio: Tensor) -> Tensor:
    """Align a recording to its text.

    The voice says the text at its predicted durations without noise; its mel-cepstra, each with mean 0 and deviation 1
    within the clip, are warped onto the recording's, and the durations go along.

    Args:
        voice: The voice.
        model: Its network, as it came.
        ids: (L,).
        audio: The recording, (T,) at `voice.rate`.

    Returns:
        Frames of each symbol in the recording, int64 (L,), which sum up to the recording's.
    """
    with torch.no_grad():
        prior = read(model, ids[None], torch.tensor([len(ids)], device=ids.device))
        logs = log_durations(bare(model), prior.hidden, prior.mask, None)
        frames = frames_of(logs, prior.mask)[0].long()
        said = synthesize(voice, model, ids, durations=frames, noise=0.0)
    found = warped_durations(frames.cpu().numpy(), warp(_cepstra(voice, said), _cepstra(voice, audio)))
    return torch.from_numpy(found)


def _cepstra(voice: Voice, audio: Tensor) -> np.ndarray:
    """Return standardised mel-cepstra (F, 13) without the loudness."""
    from scipy.fft import dct

    whole = audio[None, : len(audio) // voice.hop * voice.hop].detach().cpu().float()
    bands = log_mel(magnitudes(whole, 4 * voice.hop, voice.hop), voice.rate)[0].T.numpy()
    cepstra = dct(bands.astype(np.float64), norm="ortho", axis=1)[:, 1 : _CEPSTRA + 1]
    return (cepstra - cepstra.mean(0)) / (cepstra.std(0) + 1e-6)
