"""The starter: CTranslate2's format by a writer of its own, and the real file on real speech."""

from __future__ import annotations

import io
import re
import struct
import warnings

import numpy as np
import pytest
import soundfile
import torch
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

from common import artifacts
from common.errors import GraftError
from domains.speech.backbones import _starters, build, encode, generate
from domains.speech.backbones._ctranslate2 import WhisperSize, read_ctranslate2, whisper_state
from domains.speech.backbones._starters import STARTERS, Starter
from tests.domains.speech.nets import byte_tokenizer, tiny_whisper

LAYERS = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny Whisper whose weights half precision can hold."""
    folder = tiny_whisper(tmp_path_factory.mktemp("nets") / "w", layers=(LAYERS, LAYERS))
    found = WhisperForConditionalGeneration.from_pretrained(folder).eval()
    for parameter in found.parameters():
        parameter.data = parameter.data.half().float()
    return found


def tensors_of(model):
    """What CTranslate2 would write of a Whisper of transformers, by its own names."""
    own, out = dict(model.state_dict()), {}

    def copy(theirs, ours, parts=(("weight", "weight"), ("bias", "bias"))):
        out.update({f"{theirs}/{a}": own[f"{ours}.{b}"] for a, b in parts})

    def norm(theirs, ours):
        copy(theirs, ours, (("gamma", "weight"), ("beta", "bias")))

    def stack(theirs, ours, names):
        weights = [own[f"{ours}.{name}.weight"] for name in names]
        biases = [own.get(f"{ours}.{name}.bias", torch.zeros(len(weights[0]))) for name in names]
        out[f"{theirs}/weight"], out[f"{theirs}/bias"] = torch.cat(weights), torch.cat(biases)

    for side in ("encoder", "decoder"):
        out[f"{side}/position_encodings/encodings"] = own[f"model.{side}.embed_positions.weight"]
        norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
        for i in range(LAYERS):
            theirs, ours = f"{side}/layer_{i}", f"model.{side}.layers.{i}"
            norm(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm")
            norm(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
            stack(f"{theirs}/self_attention/linear_0", f"{ours}.self_attn", ("q_proj", "k_proj", "v_proj"))
            copy(f"{theirs}/self_attention/linear_1", f"{ours}.self_attn.out_proj")
            for n in (0, 1):
                copy(f"{theirs}/ffn/linear_{n}", f"{ours}.fc{n + 1}")
            if side == "decoder":
                norm(f"{theirs}/attention/layer_norm", f"{ours}.encoder_attn_layer_norm")
                copy(f"{theirs}/attention/linear_0", f"{ours}.encoder_attn.q_proj")
                stack(f"{theirs}/attention/linear_1", f"{ours}.encoder_attn", ("k_proj", "v_proj"))
                copy(f"{theirs}/attention/linear_2", f"{ours}.encoder_attn.out_proj")
    for name in ("conv1", "conv2"):
        copy(f"encoder/{name}", f"model.encoder.{name}")
    return out | {"decoder/embeddings/weight": own["model.decoder.embed_tokens.weight"]}


def write(tensors, version=6, kind="WhisperSpec"):
    """A CTranslate2 file, with one number and the alias that every Whisper has."""

    def text(value):
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    parts = [struct.pack("<I", version), text(kind), struct.pack("<II", 3, len(tensors) + 1)]
    for name, tensor in tensors.items():
        data = tensor.half().numpy().tobytes()
        parts += [text(name), struct.pack(f"<B{tensor.ndim}I", tensor.ndim, *tensor.shape)]
        parts += [struct.pack("<BI", 4, len(data)), data]
    parts += [text("decoder/num_heads"), struct.pack("<BBI", 0, 2, 2), np.int16(4).tobytes()]
    return b"".join(
        [*parts, struct.pack("<I", 1), text("decoder/projection/weight"), text("decoder/embeddings/weight")]
    )


def test_a_file_comes_back_under_the_names_of_transformers(model):
    found = whisper_state(read_ctranslate2(write(tensors_of(model)), "file"), LAYERS, "file")
    expected = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
        assert found[name].dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda data: data[:-30], "it ends at byte"),
        (lambda data: data[:5000], "it ends at byte"),
        (lambda data: data + b"xx", "2 bytes stand behind its end"),
        (lambda data: b"", "it ends at byte 0"),
        (lambda data: b"\x07" + data[1:], "'WhisperSpec' of version 7"),
        (lambda data: b"PK" + data[2:], "of version"),
    ],
)
def test_a_damaged_file_is_refused(model, change, named):
    with pytest.raises(GraftError, match=rf"weights\.bin is no CTranslate2 file of a Whisper \(.*{named}"):
        read_ctranslate2(change(write(tensors_of(model))), "weights.bin")


def test_a_file_without_a_tensor_is_refused(model):
    tensors = tensors_of(model)
    del tensors["decoder/layer_1/attention/linear_1/weight"]
    with pytest.raises(GraftError, match="no tensor 'decoder/layer_1/attention/linear_1/weight'"):
        whisper_state(read_ctranslate2(write(tensors), "file"), LAYERS, "file")


@pytest.fixture
def toy(model, monkeypatch):
    """A starter at toy size in place of the real one, its package's members made here."""
    tokenizer = byte_tokenizer()
    size = WhisperSize(
        vocabulary=model.config.vocab_size, width=16, layers=LAYERS, heads=4, hidden=24, bands=80,
        eos=tokenizer.token_to_id("<|endoftext|>"),
    )  # fmt: skip
    wide = dict(tensors_of(model))
    for side, positions in (("encoder", 1500), ("decoder", 448)):  # those that every published Whisper has
        wide[f"{side}/position_encodings/encodings"] = torch.randn(positions, 16).half().float()
    members = {
        "tokenizer.json": tokenizer.to_str().encode(),
        "config.json": b'{"suppress_ids": [1, 2], "suppress_ids_begin": [3]}',
        "model.bin": write(wide),
    }
    monkeypatch.setattr(_starters, "STARTERS", {"toy": Starter(name="toy", folder="f", size=size)})
    monkeypatch.setattr(artifacts, "read_member", lambda name, member: members[member.removeprefix("f/")])
    return members


def test_a_starter_is_built_of_its_package(toy, model):
    options = {"encoder_only": False, "weights": None}
    built = _starters.build_starter("toy", pretrained=True, **options)
    state = built.model.state_dict()
    assert torch.equal(
        state["model.decoder.layers.1.fc1.weight"], model.state_dict()["model.decoder.layers.1.fc1.weight"]
    )
    assert built.model.proj_out.weight is built.model.model.decoder.embed_tokens.weight
    assert built.context == 30.0
    assert (built.kind, built.hop, built.rate, len(built.tokens.start())) == ("seq2seq", 320, 16_000, 2)
    settings = built.model.generation_config
    assert (settings.suppress_tokens, settings.begin_suppress_tokens) == ([1, 2], [3])
    fresh = _starters.build_starter("toy", pretrained=False, **options)
    assert fresh.model.state_dict().keys() == state.keys()


def test_weights_of_another_network_are_refused(toy, model, tmp_path):
    (tmp_path / "other.bin").write_bytes(write(tensors_of(model)))
    for name, named in (
        ("other.bin", r"does not fit 'toy': 2 tensors differ.*1500, 16\) here"),
        ("none", "no weights file"),
    ):
        with pytest.raises(GraftError, match=named):
            _starters.build_starter("toy", pretrained=True, weights=str(tmp_path / name), encoder_only=False)


# ---- the real file


def test_every_starter_has_a_row():
    for name in STARTERS:
        row = artifacts.row(name)
        assert row.domains == ("speech",) or list(row.domains) == ["speech"]
        assert {"model.bin", "tokenizer.json", "config.json"} == {member.rpartition("/")[2] for member in row.members}


def clips():
    """The five LibriVox clips of pocketsphinx-testdata: audio at 16 kHz and the words that are read."""
    from debian.debfile import DebFile

    data = DebFile(str(artifacts.fetch("pocketsphinx-testdata"))).data
    root = "./usr/share/pocketsphinx/test/data/librivox"
    names = data.get_content(f"{root}/fileids").decode().split()
    lines = data.get_content(f"{root}/transcription").decode().splitlines()
    sounds = [soundfile.read(io.BytesIO(data.get_content(f"{root}/{name}.wav")), dtype="float32") for name in names]
    assert {rate for _, rate in sounds} == {16_000}
    texts = [re.sub(r"</?s>|\(.*\)", "", line).split() for line in lines]
    return [sound for sound, _ in sounds], texts


def words(text):
    """Lower case, no punctuation, hyphens as spaces."""
    return re.sub(r"[^a-z' ]", "", text.lower().replace("-", " ")).split()


def errors(found, wanted):
    """Words to exchange, put in or take out."""
    row = list(range(len(wanted) + 1))
    for number, word in enumerate(found, 1):
        before, row[0] = row[0], number
        for place, other in enumerate(wanted, 1):
            before, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, before + (word != other))
    return row[-1]


@pytest.mark.artifacts
def test_the_starter_reads_librivox_as_transformers_generate_does():
    if "pocketsphinx-testdata" not in artifacts.catalog():
        pytest.skip("the catalog has no row pocketsphinx-testdata")
    built = build("whisper-tiny-en")
    sounds, texts = clips()
    lengths = torch.tensor([len(sound) for sound in sounds])
    audio = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(sound) for sound in sounds], batch_first=True)
    with torch.no_grad():
        features, _ = encode(built, built.model, audio, lengths, full_context=True)
    found = generate(built, built.model, features)
    mel = WhisperFeatureExtractor()(sounds, sampling_rate=16_000, return_tensors="pt").input_features
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = built.model.generate(mel, max_length=448)
    texts_found = [built.tokens.decode(ids) for ids in found]
    assert texts_found == [built.tokens.decode(ids) for ids in reference.tolist()]
    wrong = sum(errors(words(text), wanted) for text, wanted in zip(texts_found, texts, strict=True))
    assert 0.03 <= wrong / sum(len(text) for text in texts) <= 0.065
