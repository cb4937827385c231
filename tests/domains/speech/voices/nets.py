"""Tiny voices with random weights: one as transformers saves it, one as Piper exports it."""

from __future__ import annotations

import json
import re

import torch
from torch import nn
from transformers import VitsConfig, VitsModel, VitsTokenizer

from common import artifacts
from domains.speech import voices
from domains.speech.voices import _starters
from domains.speech.voices._starters import PiperVoice
from domains.speech.voices._vits import build_vits, trainable

SIZE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "ffn_dim": 24,
    "flow_size": 8,
    "spectrogram_bins": 17,
    "prior_encoder_num_flows": 2,
    "prior_encoder_num_wavenet_layers": 2,
    "posterior_encoder_num_wavenet_layers": 2,
    "duration_predictor_filter_channels": 12,
    "upsample_initial_channel": 16,
    "upsample_rates": (4, 4),
    "upsample_kernel_sizes": (8, 8),
    "resblock_kernel_sizes": (3, 5),
    "layerdrop": 0.5,
}
SECOND = {**SIZE, "vocab_size": 40, "resblock_dilation_sizes": ((1, 2), (2, 6))}
FIRST = {**SIZE, "vocab_size": 30, "resblock_dilation_sizes": ((1, 3), (1, 3)), "wavenet_dilation_rate": 2}
IPA = "_^$ !',-.:;?abdefhijklmnopstuvwzæðŋɐɑɔəɚɛɹɪʃʊʌʒˈˌːθɡ"  # noqa: RUF001  (phonemes)
LETTERS = "_abcdefghijklmnopqrstuvwxyz' "


def spread(model, seed=0, std=0.25):
    """Draw every matrix wide enough to matter, and small enough that no spline is left."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=std, generator=generator)
    return model.eval()


def settings():
    """What stands beside a Piper voice, as its own file has it."""
    return {
        "audio": {"sample_rate": 8000},
        "espeak": {"voice": "en-us"},
        "inference": {"noise_scale": 0.667, "length_scale": 1, "noise_w": 0.8},
        "phoneme_id_map": {symbol: [number] for number, symbol in enumerate(IPA)},
    }


def piper_net(seed=0, *, posterior=False):
    """A VITS of the second kind, as a starter is built."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return spread(trainable(build_vits(VitsConfig(**SECOND), second_kind=True), posterior=posterior), seed)


def piper_name(name):
    """The name that VITS' own code gives a tensor of transformers'."""
    table = (
        (r"^text_encoder\.encoder\.layers\.(\d+)\.attention\.([qkv])_proj", r"enc_p.encoder.attn_layers.\1.conv_\2"),
        (r"^text_encoder\.encoder\.layers\.(\d+)\.attention\.out_proj", r"enc_p.encoder.attn_layers.\1.conv_o"),
        (r"^text_encoder\.encoder\.layers\.(\d+)\.attention\.", r"enc_p.encoder.attn_layers.\1."),
        (r"^text_encoder\.encoder\.layers\.(\d+)\.layer_norm", r"enc_p.encoder.norm_layers_1.\1"),
        (r"^text_encoder\.encoder\.layers\.(\d+)\.final_layer_norm", r"enc_p.encoder.norm_layers_2.\1"),
        (r"^text_encoder\.encoder\.layers\.(\d+)\.feed_forward", r"enc_p.encoder.ffn_layers.\1"),
        (r"^text_encoder\.embed_tokens", "enc_p.emb"),
        (r"^text_encoder\.project", "enc_p.proj"),
        (r"^duration_predictor\.flows\.(\d)", lambda m: f"dp.flows.{max(0, 2 * int(m[1]) - 1)}"),
        (r"^duration_predictor", "dp"),
        (r"^flow\.flows\.(\d)", lambda m: f"flow.flows.{2 * int(m[1])}"),
        (r"^decoder\.upsampler", "dec.ups"),
        (r"^decoder", "dec"),
        (r"conv_dds\.convs_dilated", "convs.convs_sep"),
        (r"conv_dds\.convs_pointwise", "convs.convs_1x1"),
        (r"conv_dds\.norms", "convs.norms"),
        (r"wavenet\.", "enc."),
        (r"^((?:dp|flow)\..*?)conv_(pre|post|proj)\b", r"\1\2"),
    )
    for pattern, new in table:
        name = re.sub(pattern, new, name)
    if re.search(r"norm", name):
        name = name.replace(".weight", ".gamma").replace(".bias", ".beta")
    return name


def piper_file(model):
    """The bytes of an ONNX file that holds a network's tensors as Piper's export does: weight norms without a name."""
    from onnx import helper, numpy_helper

    nodes, tensors = [], []

    def keep(name, value):
        tensors.append(numpy_helper.from_array(value.contiguous().numpy(), name))

    state = {piper_name(name): tensor.detach() for name, tensor in model.state_dict().items()}
    anonymous = 0
    for name, tensor in state.items():
        owner, _, part = name.rpartition(".")
        if part == "weight" and name != "enc_p.emb.weight":
            value = tensor[..., None] if re.search(r"conv_[qkvo]$", owner) else tensor
            stored = name
            if ".enc." in name or name.startswith("dec.ups"):
                stored, anonymous = f"onnx::Conv_{anonymous}", anonymous + 1
            keep(stored, value)
            kind = "ConvTranspose" if ".ups." in owner else "Conv"
            inputs = ["x", stored, *([f"{owner}.bias"] if f"{owner}.bias" in state else [])]
            path = re.sub(r"\.(?!\d)", "/", owner)
            nodes.append(helper.make_node(kind, inputs, ["y"], name=f"/{path}/{kind}"))
        elif name == "enc_p.emb.weight":
            keep("sid", tensor)
            nodes.append(helper.make_node("Gather", ["sid", "ids"], ["y"], name="/enc_p/emb/Gather"))
        elif part == "translate":
            keep(f"{owner}.m", tensor)
        elif part == "log_scale":
            keep(f"/{owner.replace('.flows', '/flows')}/Exp_output_0", (-tensor).exp())
        else:
            keep(name, tensor)
    return helper.make_model(helper.make_graph(nodes, "voice", [], [], tensors)).SerializeToString()


def toy_piper(monkeypatch, *, seed=0, model=None):
    """Put a tiny Piper voice named `toy` in place of the catalog's; return its network."""
    model = piper_net(seed) if model is None else model
    members = {"toy.onnx": piper_file(model), "toy.onnx.json": json.dumps(settings()).encode()}
    read_member = artifacts.read_member
    monkeypatch.setattr(
        _starters.artifacts,
        "read_member",
        lambda name, member: members[member] if name == "toy" else read_member(name, member),
    )
    toy = PiperVoice(name="toy", model="toy.onnx", options=SECOND)
    for module in (_starters, voices):
        monkeypatch.setattr(module, "STARTERS", {"toy": toy})
    return model


def toy_folder(folder, *, seed=0, dropout=0.0, **options):
    """Save a tiny VITS that reads letters as transformers does; return the folder's name."""
    folder.mkdir(parents=True, exist_ok=True)
    config = VitsConfig(
        **{**FIRST, **options}, sampling_rate=8000, hidden_dropout=dropout, attention_dropout=dropout,
        activation_dropout=dropout,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VitsModel(config)
    model.save_pretrained(str(folder))
    (folder / "vocab.json").write_text(json.dumps({letter: number for number, letter in enumerate(LETTERS)}))
    tokenizer = VitsTokenizer(
        str(folder / "vocab.json"), pad_token="_", unk_token="_", language="eng", phonemize=False, is_uroman=False
    )
    tokenizer.save_pretrained(str(folder))
    return str(folder)
