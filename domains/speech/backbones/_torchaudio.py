"""The bundles of torchaudio: wav2vec 2.0, HuBERT and WavLM, from PyTorch's own server."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from common.errors import GraftError, unknown
from domains.speech.backbones._backbone import SpeechBackbone
from domains.speech.backbones._families import TORCHAUDIO, TORCHAUDIO_WAVLM
from domains.speech.backbones._tokens import CharacterTokens
from domains.speech.backbones._waves import WaveFront
from domains.speech.backbones._wavlm import open_torchaudio

PREFIX = "torchaudio:"
_BLANK, _BOUNDARY = "-", "|"
_EPSILON = 1e-5  # of the layer norm that torchaudio applies to the waveform


def bundles() -> dict[str, Any]:
    """Return the bundles of encoders by name."""
    from torchaudio import pipelines

    found = {name: getattr(pipelines, name) for name in dir(pipelines) if name.isupper()}
    return {name: bundle for name, bundle in found.items() if isinstance(bundle, pipelines.Wav2Vec2Bundle)}


def load_bundle(name: str, *, pretrained: bool, weights: str | None) -> SpeechBackbone:
    """Build a bundle of torchaudio.

    Args:
        name: `torchaudio:` and the bundle's name.
        pretrained: Take its weights.
        weights: Its local weights file, a `.pth`; None downloads it.

    Raises:
        GraftError: An unknown name, or weights that cannot be had, are damaged or of another network.
    """
    from torchaudio.pipelines._wav2vec2 import utils

    offered = bundles()
    key = name.removeprefix(PREFIX)
    if key not in offered:
        raise unknown("bundle of torchaudio", key, offered)
    bundle = offered[key]
    model = utils._get_model(bundle._model_type, bundle._params)
    if pretrained:
        state = _state(name, bundle, weights)
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise GraftError(f"The weights do not fit '{name}' ({reason}). Give those of this bundle.") from error
    if bundle._model_type == "WavLM":
        open_torchaudio(model)
    output, model.aux = model.aux, None
    model.encoder.transformer.layer_drop = -1.0  # torchaudio skips a block where a number in [0, 1) is not above it
    extractor = model.feature_extractor.conv_layers
    front = WaveFront(
        library="torchaudio",
        windows=tuple((layer.kernel_size, layer.stride) for layer in extractor),
        epsilon=_EPSILON if bundle._normalize_waveform else None,
        masked=bundle._model_type != "WavLM",  # torchaudio's WavLM takes no mask
    )
    labels = getattr(bundle, "_labels", None)
    return SpeechBackbone(
        name=name,
        model=model.eval(),
        family=TORCHAUDIO_WAVLM if bundle._model_type == "WavLM" else TORCHAUDIO,
        kind="encoder" if output is None else "ctc",
        width=model.encoder.feature_projection.projection.out_features,
        layers=len(model.encoder.transformer.layers),
        rate=int(bundle.sample_rate),
        hop=front.hop,
        context=None,
        tokens=None if output is None else _vocabulary(labels),
        ctc_head=None if output is None else output.eval(),
        front=front,
    )


def _state(name: str, bundle: Any, weights: str | None) -> dict[str, Any]:  # noqa: ANN401
    """Read a bundle's weights; only tensors are ever unpickled."""
    from torchaudio.pipelines._wav2vec2 import utils

    axes = getattr(bundle, "_remove_aux_axis", None)
    try:
        if weights is None:
            return utils._get_state_dict(bundle._path, {"weights_only": True}, axes)
        state = torch.load(Path(weights), map_location="cpu", weights_only=True)
        if axes and len(state["aux.weight"]) > bundle._params["aux_num_out"]:
            utils._remove_aux_axes(state, axes)
        return state
    except (OSError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise GraftError(
            f"The weights of '{name}' could not be had or read ({type(error).__name__}: {reason}). Connect to "
            "download.pytorch.org, or give the file with 'weights'."
        ) from error


def _vocabulary(labels: tuple[str, ...]) -> CharacterTokens:
    """Build the vocabulary of a bundle's labels, behind the blank 0."""
    ids = {" " if label == _BOUNDARY else label: index for index, label in enumerate(labels, start=1)}
    return CharacterTokens({letter: index for letter, index in ids.items() if letter != _BLANK}, size=len(labels) + 1)
