"""Which modules of the speech networks carry which role, and their blocks in the order in which they run."""

from __future__ import annotations

from torch import nn

from common.roles import NORMS, Family, Pattern, TokenStream

LINEAR = (nn.Linear,)
CONV = (nn.Conv1d,)
EMBEDDING = (nn.Embedding,)
_BOTH = r"(q_proj|k_proj|v_proj)"


def _projections(attention: str) -> dict[str, str]:
    return {f"attention_{part}": rf"{attention}\.{part}_proj" for part in "qkv"}


def _whisper(name: str, encoder: str, decoder: str | None) -> Family:
    sides = [encoder] if decoder is None else [encoder, decoder]
    layer = rf"({'|'.join(rf'{side}layers' for side in sides)})\.\d+"
    attention = rf"{layer}\.(self_attn|encoder_attn)"
    return Family(
        name=name,
        block=layer,
        stream=layer,
        parts={}
        if decoder is None
        else {"encoder": encoder.removesuffix(r"\."), "decoder": decoder.removesuffix(r"\.")},
        roles={
            "stem": (Pattern(rf"{encoder}conv[12]", CONV),),
            "attention_qkv": (Pattern(rf"{attention}\.{_BOTH}", LINEAR),),
            "attention_out": (Pattern(rf"{attention}\.out_proj", LINEAR),),
            "ffn_in": (Pattern(rf"{layer}\.fc1", LINEAR),),
            "ffn_out": (Pattern(rf"{layer}\.fc2", LINEAR),),
            "norm": (Pattern(r".*", NORMS),),
            # The embedding of tokens is the output layer too, so an adapter on one alone could not be merged, and the
            # positions are cut to the audio's length, past any adapter: neither has a role.
        },
        tokens=TokenStream(
            blocks=rf"{encoder}layers\.\d+",  # the decoder writes from left to right
            attention=Pattern(rf"{layer}\.self_attn", (nn.Module,)),
            mask=("attention_mask", 0),
        ),
        projections=_projections(attention),
    )


WHISPER = _whisper("whisper", r"model\.encoder\.", r"model\.decoder\.")
WHISPER_ENCODER = _whisper("whisper-encoder", "", None)


def _wave(name: str, projection: str, layer: str, attention: str = r"\.attention", *, fixed: str = "") -> Family:
    """Lay out a network that reads the waveform: convolutions, a projection, a positional convolution, blocks.

    The positional convolution is weight-normalised, its weight computed of two parameters: it has no role.
    `attention` is where in a block the projections stand.
    """
    convolutions = r"feature_extractor\.conv_layers"
    return Family(
        name=name,
        block=layer,
        stream=layer,
        roles={
            "stem": (Pattern(rf"{convolutions}\.0\.conv", CONV), Pattern(projection, LINEAR)),
            "conv": (Pattern(rf"{convolutions}\.[1-9]\d*\.conv", CONV),),
            "attention_qkv": (Pattern(rf"{layer}{attention}\.{_BOTH}", LINEAR),),
            "attention_out": (Pattern(rf"{layer}{attention}\.out_proj", LINEAR),),
            "ffn_in": (Pattern(rf"{layer}\.feed_forward\.intermediate_dense", LINEAR),),
            "ffn_out": (Pattern(rf"{layer}\.feed_forward\.output_dense", LINEAR),),
            "norm": (Pattern(r".*", NORMS),),
            "embed": (Pattern(rf"{layer}\.attention\.rel_attn_embed", EMBEDDING),),
        },
        tokens=TokenStream(
            blocks=layer,
            attention=Pattern(rf"{layer}\.attention", (nn.Module,)),
            mask=("attention_mask", 0),
            fixed=fixed,
        ),
        projections=_projections(rf"{layer}{attention}"),
    )


_BIASED = "it scores features by their distance, which a prompt has not"
_HF = (r"feature_projection\.projection", r"encoder\.layers\.\d+")
WAV2VEC2 = _wave("wav2vec2", *_HF)
HUBERT = _wave("hubert", *_HF)
WAVLM = _wave("wavlm", *_HF, fixed=_BIASED)

_TORCHAUDIO = (r"encoder\.feature_projection\.projection", r"encoder\.transformer\.layers\.\d+")
TORCHAUDIO = _wave("torchaudio", *_TORCHAUDIO)
TORCHAUDIO_WAVLM = _wave("torchaudio-wavlm", *_TORCHAUDIO, r"\.attention\.attention", fixed=_BIASED)
