"""Which modules of a VITS and of a SpeechT5 that speaks carry which role."""

from __future__ import annotations

from torch import nn

from common.roles import NORMS, Family, Pattern

_LINEAR, _CONV, _ANY_CONV = (nn.Linear,), (nn.Conv1d,), (nn.Conv1d, nn.ConvTranspose1d)
_LAYER = r"text_encoder\.encoder\.layers\.\d+"
_WAVENET = r"wavenet\.(in_layers|res_skip_layers)\.\d+"

VITS = Family(
    name="vits",
    projections={f"attention_{part}": rf"{_LAYER}\.attention\.{part}_proj" for part in "qkv"},
    block=rf"{_LAYER}|flow\.flows\.\d+|decoder\.resblocks\.\d+",
    parts={
        "text": "text_encoder",
        "flow": "flow",
        "decoder": "decoder",
        "durations": "duration_predictor",
        "posterior": "posterior_encoder",
    },
    roles={
        "attention_qkv": (Pattern(rf"{_LAYER}\.attention\.(q_proj|k_proj|v_proj)", _LINEAR),),
        "attention_out": (Pattern(rf"{_LAYER}\.attention\.out_proj", _LINEAR),),
        "ffn_in": (Pattern(rf"{_LAYER}\.feed_forward\.conv_1", _CONV),),
        "ffn_out": (Pattern(rf"{_LAYER}\.feed_forward\.conv_2", _CONV),),
        # The stems read what another part writes: symbols' states, latents, a spectrogram.
        "stem": (Pattern(r"(decoder|posterior_encoder)\.conv_pre", _CONV),),
        "conv": (
            Pattern(r"text_encoder\.project", _CONV),
            Pattern(rf"flow\.flows\.\d+\.(conv_pre|conv_post|{_WAVENET})", _CONV),
            Pattern(r"decoder\.(conv_post|upsampler\.\d+|resblocks\.\d+\.(convs|convs1|convs2)\.\d+)", _ANY_CONV),
            Pattern(r"duration_predictor\.(flows\.\d+\.)?(conv_pre|conv_proj|conv_1|conv_2|proj)", _CONV),
            Pattern(r"duration_predictor\.(flows\.\d+\.)?conv_dds\.(convs_dilated|convs_pointwise)\.\d+", _CONV),
            Pattern(rf"posterior_encoder\.(conv_proj|{_WAVENET})", _CONV),
        ),
        "norm": (Pattern(r".*", NORMS),),
        "embed": (Pattern(r"text_encoder\.embed_tokens", (nn.Embedding,)),),
    },
)
"""Parts: `text`, `flow`, `decoder`, `durations`, and `posterior`, which no synthesis runs."""

_SPEECHT5_BLOCK = r"speecht5\.(encoder\.wrapped_encoder|decoder\.wrapped_decoder)\.layers\.\d+"
_SPEECHT5_ATTENTION = rf"{_SPEECHT5_BLOCK}\.(attention|self_attn|encoder_attn)"

SPEECHT5 = Family(
    name="speecht5",
    projections={f"attention_{part}": rf"{_SPEECHT5_ATTENTION}\.{part}_proj" for part in "qkv"},
    block=_SPEECHT5_BLOCK,
    stream=_SPEECHT5_BLOCK,
    parts={"text": "speecht5.encoder", "decoder": "speecht5.decoder", "postnet": "speech_decoder_postnet"},
    roles={
        "attention_qkv": (Pattern(rf"{_SPEECHT5_ATTENTION}\.(q_proj|k_proj|v_proj)", _LINEAR),),
        "attention_out": (Pattern(rf"{_SPEECHT5_ATTENTION}\.out_proj", _LINEAR),),
        "ffn_in": (Pattern(rf"{_SPEECHT5_BLOCK}\.feed_forward\.intermediate_dense", _LINEAR),),
        "ffn_out": (Pattern(rf"{_SPEECHT5_BLOCK}\.feed_forward\.output_dense", _LINEAR),),
        # The prenet reads the frames before and the speaker.
        "stem": (Pattern(r"speecht5\.decoder\.prenet\.(layers\.\d+|final_layer|speaker_embeds_layer)", _LINEAR),),
        "conv": (Pattern(r"speech_decoder_postnet\.layers\.\d+\.conv", _CONV),),
        "norm": (Pattern(r".*", NORMS),),
        "embed": (Pattern(r"speecht5\.encoder\.prenet\.embed_tokens", (nn.Embedding,)),),
        "head": (Pattern(r"speech_decoder_postnet\.(feat_out|prob_out)", _LINEAR),),
    },
)
"""Parts: `text`, `decoder`, `postnet`. The embedding of relative positions has no role."""
