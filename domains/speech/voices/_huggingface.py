"""VITS voices by their name on the hub or a folder, as transformers saves them."""

from __future__ import annotations

from typing import Any

from common.errors import GraftError
from domains.speech.backbones._weights import from_source
from domains.speech.voices._families import VITS
from domains.speech.voices._starters import hop_of
from domains.speech.voices._symbols import Letters
from domains.speech.voices._vits import build_vits, trainable
from domains.speech.voices._voice import Voice


def load_folder(source: str, *, pretrained: bool, posterior: bool) -> Voice:
    """Load a `VitsModel` with its tokenizer.

    Args:
        source: A local folder, or a name of the hub.
        pretrained: Load its weights; False gives random ones.
        posterior: Keep its posterior encoder.

    Raises:
        GraftError: It cannot be had or read, is no VITS of one speaker, or reads phonemes or romanised text, which its
            tokenizer leaves to others.
    """
    from transformers import AutoConfig, VitsModel, VitsTokenizer

    config: Any = from_source(source, AutoConfig)
    if config.model_type != "vits":
        by_mel = config.model_type in ("speecht5", "fastspeech2_conformer")
        advice = "Take the task SpectrogramVoice" if by_mel else "Give a VITS of transformers"
        raise GraftError(f"'{source}' is a {config.model_type}, and the voices of this task are VITS. {advice}.")
    tokenizer: Any = from_source(source, VitsTokenizer)
    if tokenizer.phonemize or tokenizer.is_uroman:
        how = "phonemes" if tokenizer.phonemize else "romanised text"
        raise GraftError(f"'{source}' reads {how}, which Graft does not make for it. Take a voice that reads letters.")
    model: Any = from_source(source, VitsModel, weights=True) if pretrained else build_vits(config, second_kind=False)
    return Voice(
        name=source,
        model=trainable(model, posterior=posterior).eval(),
        family=VITS,
        symbols=Letters(tokenizer),
        language=tokenizer.language or "",
        rate=config.sampling_rate,
        hop=hop_of(config),
        bins=config.spectrogram_bins,
        latents=config.flow_size,
        noise=config.noise_scale,
        duration_noise=config.noise_scale_duration,
        posterior=posterior,
    )
