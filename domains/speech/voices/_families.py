"""Which modules of a VITS, a SpeechT5 that speaks and a FastSpeech2Conformer carry which role."""

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

_CONFORMER_BLOCK = r"(encoder|decoder)\.conformer_layers\.\d+"
_PREDICTOR = r"(duration|pitch|energy)_predictor"

FASTSPEECH2 = Family(
    name="fastspeech2_conformer",
    projections={f"attention_{part}": rf"{_CONFORMER_BLOCK}\.self_attn\.linear_{part}" for part in "qkv"},
    block=_CONFORMER_BLOCK,
    stream=_CONFORMER_BLOCK,
    parts={
        "text": "encoder",
        "durations": "duration_predictor",
        "pitch": "pitch_predictor|pitch_embed",
        "energy": "energy_predictor|energy_embed",
        "decoder": "decoder",
        "postnet": "speech_decoder_postnet",
        "speaker": "projection",
    },
    roles={
        "attention_qkv": (Pattern(rf"{_CONFORMER_BLOCK}\.self_attn\.linear_[qkv]", _LINEAR),),
        "attention_out": (Pattern(rf"{_CONFORMER_BLOCK}\.self_attn\.linear_out", _LINEAR),),
        "ffn_in": (Pattern(rf"{_CONFORMER_BLOCK}\.feed_forward(_macaron)?\.conv1", _CONV),),
        "ffn_out": (Pattern(rf"{_CONFORMER_BLOCK}\.feed_forward(_macaron)?\.conv2", _CONV),),
        # What reads the speaker vector and the curves of pitch and energy.
        "stem": (Pattern(r"projection", _LINEAR), Pattern(r"(pitch|energy)_embed\.conv", _CONV)),
        "conv": (
            Pattern(rf"{_CONFORMER_BLOCK}\.conv_module\.(pointwise_conv1|depthwise_conv|pointwise_conv2)", _CONV),
            Pattern(rf"{_PREDICTOR}\.conv_layers\.\d+\.conv", _CONV),
            Pattern(r"speech_decoder_postnet\.layers\.\d+\.conv", _CONV),
        ),
        "norm": (Pattern(r".*", NORMS),),
        "embed": (Pattern(r"encoder\.embed", (nn.Embedding,)),),
        "head": (Pattern(rf"{_PREDICTOR}\.linear|speech_decoder_postnet\.feat_out", _LINEAR),),
    },
)
"""Parts: `text`, `durations`, `pitch`, `energy`, `decoder`, `postnet`, and `speaker` where it reads a speaker vector.

The projection of relative positions has no role.
"""
