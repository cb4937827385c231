"""The starter checkpoints: conversion by name, sizes, and agreement with the networks they were taken from."""

from __future__ import annotations

import hashlib
import io
import random

import pytest
import timm
import torch
from onnx import helper, numpy_helper
from safetensors.torch import save
from torch.nn import functional

from common import artifacts
from common.errors import GraftError
from common.images import starters
from common.images.starters import STARTERS, efficientnet_lite0, vit_small_patch14_focus

FOCUS = "vit-small-patch14-focus"
LITE0 = "efficientnet-lite0"
LAST_TOKENS = "/backbone/layernorm/Add_1_output_0"
# ImageNet class indices of photographs whose content is beyond doubt.
PHOTOS = {
    "animals/birds/peacock.png": 84,
    "animals/mammals/cats/tiger.png": 292,
    "animals/mammals/equines/zebra.png": 340,
    "food/fruit/banana.png": 954,
    "food/fruit/lemon.png": 951,
    "food/fruit/pineapple.png": 953,
    "food/fruit/strawberry.png": 949,
    "food/vegetables/broccoli.png": 937,
    "hobbies/music/string/violin.png": 889,
    "vehicles/flight/balloon360.png": 417,
}


@pytest.fixture
def tiny_graph():
    """A graph in the layout of the real file, with 3 x 3 matrices, and the matrices by module.

    The real file's traps are kept: matrices without names, one node each, in another order than query, key, value.
    """
    generator = torch.Generator().manual_seed(0)
    tensors, nodes, matrices = {}, [], {}

    def named(name: str, *shape: int) -> None:
        tensors[name] = torch.randn(*shape, generator=generator)

    named("backbone.embeddings.cls_token", 1, 1, 3)
    named("onnx::Concat_1", 1, 1, 384)
    named("onnx::Reshape_2", 1, 37 * 37, 384)
    named("backbone.embeddings.patch_embeddings.projection.weight", 3, 3, 2, 2)
    for name in ("backbone.embeddings.patch_embeddings.projection.bias", "backbone.layernorm.weight"):
        named(name, 3)
    named("backbone.layernorm.bias", 3)
    parts = ("attention.attention.key", "attention.attention.value", "attention.attention.query")
    for index in range(12):
        layer = f"backbone.encoder.layer.{index}"
        for part in (*parts, "attention.output.dense", "mlp.fc1", "mlp.fc2"):
            named(f"{layer}.{part}.bias", 3)
            matrix = f"onnx::MatMul_{len(tensors)}"
            named(matrix, 3, 3)
            matrices[f"{index}.{part}"] = tensors[matrix]
            name = f"/backbone/encoder/layer.{index}/{part.replace('.', '/')}/MatMul"
            nodes.append(helper.make_node("MatMul", ["x", matrix], [f"{name}_output_0"], name=name))
        for which in ("1", "2"):
            named(f"{layer}.norm{which}.weight", 3)
            named(f"{layer}.norm{which}.bias", 3)
            named(f"{layer}.layer_scale{which}.lambda1", 3)
    stored = [numpy_helper.from_array(value.numpy(), name) for name, value in tensors.items()]
    random.Random(0).shuffle(stored)
    graph = helper.make_graph(nodes, "tiny", [], [], initializer=stored)
    return graph, tensors, matrices


def test_vit_matrices_are_found_by_node_and_transposed(tiny_graph):
    graph, tensors, matrices = tiny_graph
    state = starters._focus_state(graph)
    for index in range(12):
        heads = [matrices[f"{index}.attention.attention.{part}"].T for part in ("query", "key", "value")]
        assert torch.equal(state[f"blocks.{index}.attn.qkv.weight"], torch.cat(heads))
        assert torch.equal(state[f"blocks.{index}.mlp.fc2.weight"], matrices[f"{index}.mlp.fc2"].T)
        scale = tensors[f"backbone.encoder.layer.{index}.layer_scale2.lambda1"]
        assert torch.equal(state[f"blocks.{index}.ls2.gamma"], scale)
    assert torch.equal(state["pos_embed"][:, :1], tensors["onnx::Concat_1"])
    assert torch.equal(state["pos_embed"][:, 1:], tensors["onnx::Reshape_2"])


def test_vit_conversion_has_the_names_of_the_timm_model(tiny_graph):
    with torch.device("meta"):
        model = timm.create_model(STARTERS[FOCUS].arch, num_classes=0)
    assert set(starters._focus_state(tiny_graph[0])) == set(model.state_dict())


def test_another_graph_is_refused_by_the_name_that_is_missing(tiny_graph):
    graph = tiny_graph[0]
    del graph.node[0]
    with pytest.raises(GraftError, match=r"no node '/backbone/encoder/layer\.0/attention/attention/key/MatMul'"):
        starters._focus_state(graph)


@pytest.fixture
def converted(tmp_path, monkeypatch):
    """A converted ViT that lies in the cache already, with a position grid that holds its own row and column."""
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path))
    steps = torch.arange(37.0)
    grid = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), dim=-1).reshape(1, 37 * 37, 2)
    state = {"pos_embed": torch.cat([torch.full((1, 1, 2), -1.0), grid], dim=1)}

    def build(folder):
        (folder / "model.safetensors").write_bytes(save(state))

    monkeypatch.setattr(starters, "_convert_focus", build)
    return state


def test_vit_position_grid_keeps_its_orientation(converted):
    assert torch.equal(vit_small_patch14_focus(518)["pos_embed"], converted["pos_embed"])
    small = vit_small_patch14_focus(98)["pos_embed"]
    assert small.shape == (1, 1 + 7 * 7, 2)
    assert torch.equal(small[:, 0], converted["pos_embed"][:, 0])
    rows, columns = small[0, 1:].reshape(7, 7, 2).unbind(-1)
    # Cell i of 7 has its centre at (i + 0.5) * 37 / 7 - 0.5; a bicubic kernel reproduces a linear ramp.
    centres = (torch.arange(7) + 0.5) * 37 / 7 - 0.5
    torch.testing.assert_close(rows, centres[:, None].expand(7, 7), atol=0.1, rtol=0)
    torch.testing.assert_close(columns, centres[None, :].expand(7, 7), atol=0.1, rtol=0)


def test_vit_position_grid_is_not_antialiased(converted, tmp_path):
    spike = torch.zeros(1, 37 * 37, 2)
    spike[0, 18 * 37 + 18] = 1.0
    small = starters._resize_grid(spike, 7)[0].reshape(7, 7, 2)
    # The centre of cell 3 is exactly position 18: without antialiasing it takes that position's value alone.
    torch.testing.assert_close(small[3, 3], torch.ones(2))
    small[3, 3] = 0.0
    torch.testing.assert_close(small, torch.zeros(7, 7, 2))


@pytest.mark.parametrize("size", [100, 7, 0])
def test_vit_sizes_have_to_be_multiples_of_the_patch(size):
    for use in (STARTERS[FOCUS].load, STARTERS[FOCUS].model_args, vit_small_patch14_focus):
        with pytest.raises(GraftError, match=f"image size {size} does not fit .* multiple of 14; take"):
            use(size)


def test_starters_agree_with_the_catalog():
    rows = {
        name: row for name, row in artifacts.catalog().items() if row.kind == "checkpoint" and "vision" in row.domains
    }
    assert {name: row.backbone for name, row in rows.items()} == {n: f"timm:{s.arch}" for n, s in STARTERS.items()}


def test_lite0_is_renamed_in_order_and_every_shape_checked(monkeypatch):
    wanted = timm.create_model("tf_efficientnet_lite0").state_dict()
    given = {f"theirs.{index}": value for index, value in enumerate(wanted.values())}
    monkeypatch.setattr(artifacts, "read_member", lambda *_: buffer.getvalue())
    buffer = io.BytesIO()
    torch.save(given, buffer)
    state = efficientnet_lite0()
    assert list(state) == list(wanted)
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    buffer = io.BytesIO()
    torch.save({**given, "theirs.3": torch.zeros(7)}, buffer)
    with pytest.raises(GraftError, match=r"theirs\.3 is \(7,\)"):
        efficientnet_lite0()
    buffer = io.BytesIO()
    torch.save(dict(list(given.items())[1:]), buffer)
    with pytest.raises(GraftError, match="holds 295 tensors"):
        efficientnet_lite0()


# ---- with the real files


@pytest.mark.artifacts
@pytest.mark.parametrize("name", list(STARTERS))
@pytest.mark.parametrize("size", [None, 98, 196])
def test_state_dict_loads_strictly(name, size):
    starter = STARTERS[name]
    classes = 0 if name == FOCUS else 1000
    model = timm.create_model(starter.arch, num_classes=classes, **starter.model_args(size))
    model.load_state_dict(starter.load(size), strict=True)
    side = size or starter.image_size
    with torch.inference_mode():
        assert torch.isfinite(model.eval()(torch.zeros(1, 3, side, side))).all()


@pytest.mark.artifacts
def test_vit_gives_the_tokens_of_the_onnx_graph():
    import onnx
    import onnxruntime

    starter = STARTERS[FOCUS]
    (member,) = artifacts.row(FOCUS).members
    graph = onnx.load_from_string(artifacts.read_member(FOCUS, member))
    # The graph ends in a saliency map; the tokens after the last norm are made an output of their own.
    graph.graph.output.append(helper.make_tensor_value_info(LAST_TOKENS, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    smooth = functional.interpolate(noise, size=(224, 224), mode="bicubic")
    sharp = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    images = torch.cat([smooth, sharp])
    (expected,) = session.run([LAST_TOKENS], {"input_image": images.numpy()})
    model = timm.create_model(starter.arch, num_classes=0, **starter.model_args(224)).eval()
    model.load_state_dict(starter.load(224), strict=True)
    with torch.inference_mode():
        tokens = model.forward_features(images)
    assert tokens.shape == (4, 257, 384)
    assert (tokens - torch.from_numpy(expected)).abs().max() < 1e-4


@pytest.mark.artifacts
def test_vit_is_converted_once():
    first = starters._converted_focus() / "model.safetensors"
    before = first.stat().st_mtime_ns
    digest = hashlib.sha256(first.read_bytes()).hexdigest()
    state = vit_small_patch14_focus(98)
    state["pos_embed"].zero_()
    state["norm.weight"].zero_()
    assert first.stat().st_mtime_ns == before
    # Tensors that a caller changes are the caller's own.
    assert hashlib.sha256(first.read_bytes()).hexdigest() == digest


@pytest.mark.artifacts
def test_lite0_names_what_is_on_photographs():
    from PIL import Image
    from torchvision.transforms.v2 import functional as images

    starter = STARTERS[LITE0]
    model = timm.create_model(starter.arch).eval()
    model.load_state_dict(starter.load(), strict=True)
    prefix = "usr/share/tuxpaint/stamps/"
    batch, labels = [], []
    for member in artifacts.iter_members(artifacts.fetch("tuxpaint-stamps"), prefix):
        label = PHOTOS.get(member.name.removeprefix(prefix))
        if label is None or member.data is None:
            continue
        photo = Image.open(io.BytesIO(member.data)).convert("RGBA")
        side = max(photo.size)
        square = Image.new("RGBA", (side, side), "white")
        square.alpha_composite(photo, ((side - photo.width) // 2, (side - photo.height) // 2))
        square = square.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
        pixels = images.to_dtype(images.pil_to_tensor(square), torch.float32, scale=True)
        batch.append(images.normalize(pixels, list(starter.mean), list(starter.std)))
        labels.append(label)
    assert sorted(labels) == sorted(PHOTOS.values())
    with torch.inference_mode():
        assert model(torch.stack(batch)).argmax(1).tolist() == labels
