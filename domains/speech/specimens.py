"""Tiny speech networks with random weights, on which `graft matrix` tries every method."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import remove_parametrizations

from common.matrix import Specimen
from common.roles import NORMS, Family, Pattern
from domains.speech.backbones._families import WAV2VEC2, WHISPER

WIDTH = 64
_SAMPLES = 1600
_LINEAR = (nn.Linear,)

_BLOCK = r"(encoder|decoder)\.wrapped_(encoder|decoder)\.layers\.\d+"
_ATTENTION = rf"{_BLOCK}\.(attention|self_attn|encoder_attn)"
_FRONT = r"encoder\.prenet\.feature_encoder\.conv_layers"
SPEECHT5 = Family(
    name="speecht5",
    projections={f"attention_{part}": rf"{_ATTENTION}\.{part}_proj" for part in "qkv"},
    block=_BLOCK,
    parts={"encoder": "encoder", "decoder": "decoder"},
    roles={
        "stem": (
            Pattern(rf"{_FRONT}\.0\.conv", (nn.Conv1d,)),
            Pattern(r"encoder\.prenet\.feature_projection\.projection", _LINEAR),
        ),
        "conv": (Pattern(rf"{_FRONT}\.[1-9]\d*\.conv", (nn.Conv1d,)),),
        "attention_qkv": (Pattern(rf"{_ATTENTION}\.(q_proj|k_proj|v_proj)", _LINEAR),),
        "attention_out": (Pattern(rf"{_ATTENTION}\.out_proj", _LINEAR),),
        "ffn_in": (Pattern(rf"{_BLOCK}\.feed_forward\.intermediate_dense", _LINEAR),),
        "ffn_out": (Pattern(rf"{_BLOCK}\.feed_forward\.output_dense", _LINEAR),),
        "norm": (Pattern(r".*", NORMS),),
        # The positional convolution is weight-normalised, its weight computed of two parameters: it has no role.
    },
)

_TEXT = r"text_encoder\.encoder\.layers\.\d+"
_CONV = (nn.Conv1d, nn.ConvTranspose1d)
VITS = Family(
    name="vits",
    projections={f"attention_{part}": rf"{_TEXT}\.attention\.{part}_proj" for part in "qkv"},
    block=rf"{_TEXT}|flow\.flows\.\d+|decoder\.resblocks\.\d+",
    parts={"text": "text_encoder", "flow": "flow", "decoder": "decoder"},
    roles={
        "attention_qkv": (Pattern(rf"{_TEXT}\.attention\.(q_proj|k_proj|v_proj)", _LINEAR),),
        "attention_out": (Pattern(rf"{_TEXT}\.attention\.out_proj", _LINEAR),),
        "ffn_in": (Pattern(rf"{_TEXT}\.feed_forward\.conv_1", _CONV),),
        "ffn_out": (Pattern(rf"{_TEXT}\.feed_forward\.conv_2", _CONV),),
        "conv": (
            Pattern(r"text_encoder\.project", _CONV),
            Pattern(r"flow\.flows\.\d+\.(conv_pre|conv_post|wavenet\.(in_layers|res_skip_layers)\.\d+)", _CONV),
            Pattern(r"decoder\.(conv_pre|conv_post|upsampler\.\d+|resblocks\.\d+\.convs[12]\.\d+)", _CONV),
        ),
        "norm": (Pattern(r".*", NORMS),),
        "embed": (Pattern(r"text_encoder\.embed_tokens", (nn.Embedding,)),),
    },
)


def whisper() -> Specimen:
    """Build a Whisper of two and two blocks, from a spectrogram to the decoder's states."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=40,
        d_model=WIDTH,
        num_mel_bins=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=2 * WIDTH,
        decoder_ffn_dim=2 * WIDTH,
        max_source_positions=10,
        max_target_positions=12,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    model = _seeded(WhisperForConditionalGeneration, config)
    generator = torch.Generator().manual_seed(1)
    spectrogram = torch.randn(2, 16, 20, generator=generator)
    ids = torch.randint(3, 40, (2, 6), generator=generator)

    def run(network: Any, inputs: tuple[Tensor, Tensor]) -> Tensor:  # noqa: ANN401
        out = network(input_features=inputs[0], decoder_input_ids=inputs[1], output_hidden_states=True)
        return out.decoder_hidden_states[-1]

    return Specimen(name="Whisper", model=model, family=WHISPER, inputs=(spectrogram, ids), run=run)


def wav2vec2() -> Specimen:
    """Build a wav2vec 2.0 of two blocks, from the waveform to its features."""
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    config = Wav2Vec2Config(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * WIDTH,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        num_feat_extract_layers=3,
        layerdrop=0.0,
        **_waves(),
    )
    model = _seeded(Wav2Vec2Model, config)
    model.feature_extractor._requires_grad = False  # else it asks for a graph of its own accord
    return Specimen(
        name="wav2vec 2.0",
        model=model,
        family=WAV2VEC2,
        inputs=_noise(),
        run=lambda network, audio: network(audio).last_hidden_state,
        engine=33,
    )


def speecht5() -> Specimen:
    """Build a SpeechT5 of speech to text, two and two blocks; speech out draws random numbers even in eval mode."""
    from transformers import SpeechT5Config, SpeechT5ForSpeechToText

    config = SpeechT5Config(
        vocab_size=40,
        hidden_size=WIDTH,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=2 * WIDTH,
        encoder_layerdrop=0.0,
        decoder_layers=2,
        decoder_ffn_dim=2 * WIDTH,
        decoder_attention_heads=4,
        decoder_layerdrop=0.0,
        encoder_max_relative_position=8,
        max_speech_positions=60,
        max_text_positions=20,
        **_waves(),
    )
    model: Any = _seeded(SpeechT5ForSpeechToText, config).speecht5
    model.encoder.prenet.feature_encoder._requires_grad = False
    ids = torch.randint(4, 40, (2, 6), generator=torch.Generator().manual_seed(2))

    def run(network: Any, inputs: tuple[Tensor, Tensor]) -> Tensor:  # noqa: ANN401
        return network(input_values=inputs[0], decoder_input_values=inputs[1]).last_hidden_state

    return Specimen(name="SpeechT5", model=model.eval(), family=SPEECHT5, inputs=(_noise(), ids), run=run)


def vits() -> Specimen:
    """Build a VITS from phonemes to the waveform, each phoneme two frames long and without noise."""
    from transformers import VitsConfig, VitsModel

    config = VitsConfig(
        vocab_size=30,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        ffn_dim=2 * WIDTH,
        layerdrop=0.0,
        flow_size=WIDTH,
        spectrogram_bins=9,
        use_stochastic_duration_prediction=False,
        upsample_initial_channel=WIDTH,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3, 5],
        resblock_dilation_sizes=[[1, 3], [1, 3]],
        duration_predictor_filter_channels=8,
        prior_encoder_num_flows=2,
        prior_encoder_num_wavenet_layers=2,
        posterior_encoder_num_wavenet_layers=1,
        wavenet_dilation_rate=2,
    )
    model: Any = _seeded(VitsModel, config, std=0.1)
    for module in model.flow.modules():
        if hasattr(module, "parametrizations"):
            remove_parametrizations(module, "weight")
    model.posterior_encoder, model.duration_predictor = nn.Identity(), nn.Identity()  # not run here
    ids = torch.randint(1, 30, (2, 6), generator=torch.Generator().manual_seed(1))
    return Specimen(name="VITS", model=model.eval(), family=VITS, inputs=ids, run=_speak)


def _speak(network: Any, ids: Tensor) -> Tensor:  # noqa: ANN401
    """Return the waveform (B, T) of phonemes (B, L), before the last tanh would flatten it."""
    padding = torch.ones(*ids.shape, 1)
    means = network.text_encoder(input_ids=ids, padding_mask=padding).prior_means  # (B, L, C)
    frames = means.repeat_interleave(2, dim=1).transpose(1, 2)
    latents = network.flow(frames, torch.ones(len(ids), 1, frames.shape[2]), reverse=True)
    return network.decoder(latents).squeeze(1)


def _waves() -> dict[str, Any]:
    """Return what the networks of waveforms have in common, without masks of their own."""
    return {
        "conv_dim": (16, 16, 16),
        "conv_kernel": (10, 4, 4),
        "conv_stride": (5, 4, 4),
        "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 2,
        "apply_spec_augment": False,
        "mask_time_prob": 0.0,
    }


def _noise() -> Tensor:
    return torch.randn(2, _SAMPLES, generator=torch.Generator().manual_seed(1)).mul(0.1)


def _seeded(kind: Any, config: Any, std: float = 0.15) -> Any:  # noqa: ANN401  (classes of transformers)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return spread(kind(config), std=std)


def spread(model: Any, seed: int = 0, std: float = 0.3) -> Any:  # noqa: ANN401
    """Draw matrices wide enough that every layer matters; transformers starts near zero. In eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "embed" not in name and "parametrizations" not in name:
            nn.init.normal_(parameter, std=std, generator=generator)
    return model.eval()
