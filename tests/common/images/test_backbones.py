"""Backbones of every family: their roles, the methods that work on them, their tokens and their weights."""

from __future__ import annotations

import os
import pickle
import re

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from common.attach import attach, probe
from common.errors import GraftError
from common.images.backbones import FAMILIES, build, last_norm, read_weights, takes_size, tokens
from common.images.starters import STARTERS
from common.matrix.settings import TINY
from common.methods import METHODS, LoRA
from common.roles import resolve
from tests.cases import CASES, LINEAR_ONLY, on_networks
from tests.nets import NETS, build_net, images

CNNS = ("convnext", "efficientnet", "mobilenetv3", "mobilenetv4", "resnet")
FEEDLESS = tuple(key for key in CNNS if key != "convnext")  # without a feed-forward network
WINDOWED = ("swin", "swinv2")


def vit_roles(depth, *, norms=1, qkv=1, gates=1, inner_norms=2):
    """Count the roles of a ViT: `depth` blocks and `norms` norms outside of them."""
    blocks = {"attention_qkv": qkv, "attention_out": 1, "ffn_in": gates, "ffn_out": 1}
    roles = {role: count * depth for role, count in blocks.items()}
    return {"stem": 1, **roles, "norm": inner_norms * depth + norms}


ROLES = {
    "vit": vit_roles(6),
    "vit-avg": vit_roles(2),
    "deit": vit_roles(2),
    "dinov2": vit_roles(2),
    "siglip": vit_roles(2),
    "beit": vit_roles(2),
    "eva02-fused": vit_roles(2),
    # Three projections instead of one, a gate beside the first layer, and a norm inside the feed-forward network.
    "eva02": vit_roles(2, qkv=3, gates=2, inner_norms=3),
    "dinov3": vit_roles(2),
    # Beside those of the blocks: after the patches, at the end, and before each of three mergings.
    "swin": vit_roles(5, norms=5),
    "swinv2": vit_roles(5, norms=5),
    # Four blocks; three downsamplings, each with a norm; a norm after the stem and one in timm's head.
    "convnext": {"stem": 1, "ffn_in": 4, "ffn_out": 4, "conv": 3, "norm": 4 + 3 + 2},
}


def convolutions(model, *, kernel=None):
    """Find the dense convolutions of a CNN outside of squeeze-and-excite, by their type alone."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
        and module.groups == 1
        and (kernel is None or module.kernel_size == kernel)
        and ".se." not in name
    ]


# ---- roles


@pytest.mark.parametrize("key", list(ROLES))
def test_roles_are_counted_by_depth(key):
    built = build_net(key)
    roles = resolve(built.model, built.family)
    assert roles.count() == ROLES[key]
    assert len(roles.blocks) == (
        5 if key.startswith("swin") else ROLES[key]["attention_out" if key not in CNNS else "ffn_out"]
    )


@pytest.mark.parametrize("key", ["efficientnet", "mobilenetv3", "mobilenetv4"])
def test_pointwise_convolutions_are_all_found(key):
    built = build_net(key)
    roles = resolve(built.model, built.family)
    expected = convolutions(built.model, kernel=(1, 1))
    assert [name for name, role in roles.role_of.items() if role == "conv"] == expected
    assert roles.count()["norm"] == sum(isinstance(m, nn.BatchNorm2d) for m in built.model.modules())
    assert roles.count()["stem"] == 1


def test_convolutions_of_a_resnet_are_all_found():
    built = build_net("resnet")
    roles = resolve(built.model, built.family)
    everything = convolutions(built.model)
    stem = [name for name in everything if not name.startswith("layer")]
    assert [name for name, role in roles.role_of.items() if role == "stem"] == stem
    assert [name for name, role in roles.role_of.items() if role == "conv"] == [n for n in everything if n not in stem]


def test_convolutions_that_cannot_merge_carry_no_role():
    for arch in ("resnext50_32x4d", "mobilenetv3_small_050"):
        with torch.device("meta"):
            model = timm.create_model(arch, num_classes=0)
        roles = resolve(model, FAMILIES[type(model).__name__])
        grouped = [name for name, module in model.named_modules() if getattr(module, "groups", 1) > 1]
        assert grouped
        assert not set(grouped) & set(roles.role_of)


@pytest.mark.parametrize("key", list(NETS))
def test_all_never_takes_stem_head_or_norms(key):
    built = build_net(key)
    chosen = resolve(built.model, built.family).select(["all"])
    assert chosen
    assert set(chosen.values()) <= {"attention_qkv", "attention_out", "ffn_in", "ffn_out", "conv"}
    outside = re.compile(
        r"(patch_embed|stem|conv_stem|conv1|head|head_dist|classifier|fc|attn_pool|.*norm\d?|.*bn\d)\b"
    )
    assert not [name for name in chosen if outside.match(name)]


# ---- methods

SPECS = {
    **{name: method(**TINY.get(name, {})) for name, method in METHODS.items()},
    "LoRA": METHODS["LoRA"](rank=2),
    "VeRA": METHODS["VeRA"](rank=4),
    "InvertibleAdapter": METHODS["InvertibleAdapter"](on=["stem"]),
    "FacTTT": METHODS["FacTTT"](rank=2),
    "FacTTK": METHODS["FacTTK"](rank=2),
}
NO_TOKENS = {"swin": "attends within windows of a grid", "swinv2": "attends within windows of a grid"} | dict.fromkeys(
    CNNS, "its blocks are convolutions and read no tokens"
)
REFUSED = {
    (method, key): rf"{method} cannot act on .* \(Conv2d, role conv\).* it takes Linear\."
    for key in CNNS
    for method in LINEAR_ONLY
} | {
    ("ConvAdapter", key): r"Role 'conv' matches no module of this (vit|swin) backbone"
    for key in NETS
    if key not in CNNS
}
REFUSED |= {
    (method, key): f"Role '{role}' matches no module of this"
    for method, role, keys in (
        ("BEFT", "attention_qkv", CNNS),
        ("Houlsby", "attention_out", CNNS),
        ("Pfeiffer", "ffn_out", FEEDLESS),
        ("Compacter", "attention_out", CNNS),
        ("ParallelAdapter", "ffn", FEEDLESS),
        ("AdaptFormer", "ffn", FEEDLESS),
        ("Convpass", "attention", CNNS),
        ("ConvLoRA", "attention_qkv", CNNS),
        ("RepAdapter", "attention_qkv", CNNS),
        ("DiffFit", "attention_out", CNNS),
        ("SCT", "attention_out", CNNS),
    )
    for key in keys
}
REFUSED |= {
    (name, key): rf"{name} cannot act on this \w+ backbone: (it )?{reason}"
    for name, method in METHODS.items()
    for key, reason in NO_TOKENS.items()
    if method.taxonomy == "prompts"
}
REFUSED |= {  # of which it is a part
    (name, key): reason
    for (method, key), reason in REFUSED.items()
    for name in ("MAM", "UniPELT")
    if method == "PrefixTuning"
}
REFUSED |= {
    (method, key): f"{method} acts on the hidden states that blocks hand on, .* none of this"
    for method in ("AdapterPlus", "LoReFT", "NoReFT", "DiReFT", "LST")
    for key in CNNS
}
REFUSED |= {("LST", key): "LST needs blocks of one width, and this backbone's have 16, 32" for key in WINDOWED}
REFUSED |= {
    (method, key): f"{method} needs the grid .* none at .*attn.* and 2 more of this"
    for method in ("Convpass", "ConvLoRA")
    for key in WINDOWED
}


@pytest.mark.parametrize(("key", "method"), on_networks(NETS, first=("vit", "resnet")))
def test_every_method_works_on_every_family_or_says_why_not(key, method):
    built, batch = build_net(key), images(key)
    with torch.no_grad():
        bare = tokens(built.model, batch)
    if (method, key) in REFUSED:
        with pytest.raises(GraftError, match=REFUSED[method, key]):
            attach(built.model, SPECS[method], built.family)
        return
    attached = attach(built.model, SPECS[method], built.family)
    attached.train(False)
    with torch.no_grad():
        CASES[method].check_start(tokens(attached.model, batch), bare)
    probe(attached, lambda: tokens(attached.model, batch))


@pytest.mark.parametrize(("key", "on", "block"), [("vit", "attention", "blocks.5"), ("resnet", "conv", "layer4.0")])
def test_roles_are_narrowed_down_to_the_last_blocks(key, on, block):
    built, batch = build_net(key), images(key)
    roles = resolve(built.model, built.family)
    spec = METHODS["Houlsby"](on=[f"{on}@last:1"])
    attached = attach(built.model, spec, built.family)
    wanted = [name for name in roles.select([on]) if name.startswith(f"{block}.")]
    assert list(attached.plan.targets) == wanted
    assert roles.blocks[-1] == block
    probe(attached, lambda: tokens(attached.model, batch))


def test_lora_takes_grafts_own_tuner_where_padding_depends_on_the_input():
    with torch.device("meta"):
        model = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    family = FAMILIES[type(model).__name__]
    stem, rest = (LoRA(on=[role]).plan(model, resolve(model, family)) for role in ("stem", "all"))
    assert "Graft's own tuner" in stem.notes[0]
    assert "conv_stem (class Conv2dSame)" in stem.notes[0]
    assert rest.notes[0] == "LoRA runs in PEFT's own tuner."
    assert len(rest.targets) == 32


@pytest.mark.parametrize("key", list(NETS))
def test_full_fine_tuning_reaches_every_parameter(key):
    """Under distributed training a parameter without a gradient is an error, so a backbone carries none."""
    built = build_net(key)
    output = tokens(built.model.train(), images(key))
    (output * torch.randn_like(output)).sum().backward()
    assert [name for name, parameter in built.model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("key", ["resnet", "swinv2"])
def test_random_weights_leave_no_branch_shut(key):
    for module in build_net(key).model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
            assert module.weight.all()


# ---- tokens


@pytest.mark.parametrize("key", list(NETS))
def test_tokens_have_the_announced_shape(key):
    built, batch = build_net(key), images(key)
    with torch.no_grad():
        out = tokens(built.model, batch)
    assert out.ndim == 3
    assert out.shape[::2] == (2, built.width)
    assert built.prefix_tokens == {"deit": 2, "dinov2": 5, "dinov3": 5}.get(
        key, 0 if key in (*CNNS, "swin", "swinv2", "siglip") else 1
    )
    patches = out.shape[1] - built.prefix_tokens
    assert round(patches**0.5) ** 2 == patches


@pytest.mark.parametrize("key", ["vit", "dinov2", "swin", "swinv2", "efficientnet", "resnet", "mobilenetv3"])
def test_pooled_tokens_are_timms_own_features(key):
    built, batch = build_net(key), images(key)
    with torch.no_grad():
        expected = (
            built.model.global_pool(built.model.forward_features(batch)) if "mobile" in key else built.model(batch)
        )
        out = tokens(built.model, batch)
    pooled = out[:, 0] if built.prefix_tokens else out.mean(dim=1)
    torch.testing.assert_close(pooled, expected.flatten(1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("key", ["efficientnet", "swin"])
def test_positions_of_a_feature_map_stand_in_row_order(key):
    built, batch = build_net(key), torch.randn(1, 3, 128, 128)
    if key == "swin":
        batch = images(key)
    with torch.no_grad():
        features, out = built.model.forward_features(batch), tokens(built.model, batch)
    grid = features if key == "swin" else features.permute(0, 2, 3, 1)  # (B, H, W, C)
    assert grid.shape[1] == grid.shape[2] > 1
    for row in range(grid.shape[1]):
        for column in range(grid.shape[2]):
            assert torch.equal(out[:, row * grid.shape[2] + column], grid[:, row, column])


@pytest.mark.parametrize(("key", "norm"), [("vit-avg", "fc_norm"), ("beit", "fc_norm"), ("convnext", "head.norm")])
def test_a_norm_that_timm_counts_to_the_classifier_is_applied(key, norm):
    built, batch = build_net(key), images(key)
    assert last_norm(built.model) == norm
    layer = built.model.get_submodule(norm)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 1.5)
        layer.bias.uniform_(-0.5, 0.5)
        raw, out = built.model.forward_features(batch), tokens(built.model, batch)
    raw = raw.flatten(2).transpose(1, 2) if raw.ndim == 4 else raw
    expected = functional.layer_norm(raw, raw.shape[-1:], layer.weight, layer.bias, layer.eps)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("key", ["beit", "eva02-fused", "swinv2"])
def test_separated_biases_change_no_token(key):
    """These call `qkv` only with its bias apart, which an adapter on it needs."""
    built, batch = build_net(key), images(key)
    assert not built.plain
    with torch.no_grad():
        separate = tokens(built.model, batch)
        for module in built.model.modules():
            if hasattr(module, "qkv_bias_separate"):
                module.qkv_bias_separate = False
                module.q_bias.normal_()
                module.v_bias.normal_()
        fused = tokens(built.model, batch)
        assert not torch.allclose(fused, separate)
        for module in built.model.modules():
            if hasattr(module, "qkv_bias_separate"):
                module.qkv_bias_separate = True
        torch.testing.assert_close(tokens(built.model, batch), fused, atol=1e-5, rtol=1e-5)


def test_plain_means_that_timm_builds_the_same(tmp_path):
    assert build_net("vit").plain
    assert build_net("resnet").plain
    assert not build_net("vit", depth=2).plain
    assert not build_net("siglip").plain
    assert not build(next(iter(STARTERS)), 28, pretrained=False, depth=1).plain


# ---- names and sizes


def test_unknown_names_get_the_nearest_one():
    with pytest.raises(
        GraftError, match=r"Unknown image backbone 'test_vitt'\. Did you mean 'test_vit'\? Use a starter"
    ):
        build("test_vitt", 32, pretrained=False)
    with pytest.raises(GraftError, match=r"Did you mean 'vit-small-patch14-focus'\?"):
        build("vit_small_patch14_focus", 28)


def test_unknown_weights_of_a_known_model_get_the_known_ones():
    with pytest.raises(
        GraftError, match=r"Unknown weights of timm model test_vit 'r160_in1'\. Did you mean 'r160_in1k'\?"
    ):
        build("test_vit.r160_in1", 32, pretrained=False)


@pytest.mark.filterwarnings("ignore:A test tried to use socket")
def test_a_hub_that_cannot_be_reached_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        GraftError, match=r"weights of timm model 'test_vit' could not be had .*\. Connect to the hub"
    ) as caught:
        build("test_vit", 32)
    assert "\n" not in str(caught.value)


def test_a_size_that_the_model_cannot_take_is_refused():
    with pytest.raises(GraftError, match="image size 30 does not fit 'vit-small-patch14-focus'"):
        build("vit-small-patch14-focus", 30, pretrained=False)


@pytest.mark.parametrize(("arch", "size"), [("test_vit", 40), ("test_vit", 8), ("swin_tiny_patch4_window7_224", 30)])
def test_a_size_that_patches_do_not_fill_is_refused(arch, size):
    with pytest.raises(GraftError, match=rf"image_size {size} is no multiple of \d+, .* Take \d+ or \d+\."):
        build(arch, size, pretrained=False)


def test_models_built_for_a_size_get_it():
    assert build("test_vit", 48, pretrained=False).model.patch_embed.grid_size == (3, 3)
    assert takes_size("test_vit")
    assert not takes_size("test_resnet")
    assert not takes_size("efficientnet-lite0")


def test_normalisation_is_the_models_own():
    built = build("test_resnet", 32, pretrained=False)
    wanted = timm.data.resolve_model_data_config(built.model)
    assert (built.mean, built.std) == (wanted["mean"], wanted["std"])
    starter = STARTERS["efficientnet-lite0"]
    built = build("efficientnet-lite0", 32, pretrained=False)
    assert (built.mean, built.std) == (starter.mean, starter.std)


# ---- depth


@pytest.mark.parametrize("key", ["vit", "eva02", "beit"])
def test_depth_keeps_the_first_blocks(key):
    whole, cut = build_net(key), build_net(key, depth=1)
    assert resolve(cut.model, cut.family).blocks == ("blocks.0",)
    batch = images(key)
    seen = []
    whole.model.blocks[0].register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        tokens(whole.model, batch)
        last = whole.model.get_submodule(last_norm(whole.model) or "norm")
        torch.testing.assert_close(tokens(cut.model, batch), last(seen[0]), atol=1e-5, rtol=1e-5)


def test_depth_is_refused_where_it_does_not_fit():
    with pytest.raises(GraftError, match=r"depth=7: 'test_vit' has 6 blocks; give 1 to 6"):
        build_net("vit", depth=7)
    with pytest.raises(GraftError, match=r"depth=0: .* give 1 to 6"):
        build_net("vit", depth=0)
    for key in ("efficientnet", "resnet", "convnext", "swin"):
        with pytest.raises(GraftError, match="only ViT backbones can be cut"):
            build_net(key, depth=1)


# ---- weights


def state_of(arch, seed=3, **options):
    torch.manual_seed(seed)
    return timm.create_model(arch, **options).state_dict()


@pytest.mark.parametrize("kind", ["safetensors", "pth", "wrapped"])
def test_weights_come_from_a_local_file_and_its_classifier_is_left_out(tmp_path, kind):
    state = state_of("test_vit", img_size=32, num_classes=7)
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 3} if kind == "wrapped" else state, path)
    model = build("test_vit", 32, weights=str(path)).model
    assert set(model.state_dict()) == {name for name in state if not name.startswith("head.")}
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_parts_that_graft_takes_off_may_be_missing_or_present_in_the_file(tmp_path):
    arch, args = NETS["siglip"].arch, {**NETS["siglip"].args, "img_size": 32, "num_classes": 0}
    state = state_of(arch, **args)
    assert any(name.startswith("attn_pool.") for name in state)
    save_file(state, tmp_path / "whole.safetensors")
    save_file({k: v for k, v in state.items() if not k.startswith("attn_pool.")}, tmp_path / "less.safetensors")
    for name in ("whole", "less"):
        with pytest.MonkeyPatch.context() as patch:
            create = timm.create_model
            patch.setattr(
                timm, "create_model", lambda *a, create=create, **k: create(*a, **(k | dict(NETS["siglip"].args)))
            )
            model = build(arch, 32, weights=str(tmp_path / f"{name}.safetensors")).model
        assert torch.equal(model.state_dict()["norm.weight"], state["norm.weight"])
        assert not any(key.startswith("attn_pool.") for key in model.state_dict())


@pytest.mark.parametrize(("arch", "size"), [("test_resnet", 32), ("test_vit2", 32), ("test_vit", 48)])
def test_weights_of_another_model_or_size_are_refused(tmp_path, arch, size):
    options = {"img_size": size} if takes_size(arch) else {}
    save_file(state_of(arch, num_classes=0, **options), tmp_path / "w.safetensors")
    with pytest.raises(GraftError, match=r"does not fit timm model 'test_vit' at 32 px: \d+ tensors differ, such as"):
        build("test_vit", 32, weights=str(tmp_path / "w.safetensors"))


def test_a_starter_takes_no_other_weights(tmp_path):
    with pytest.raises(GraftError, match="'efficientnet-lite0' brings its own weights"):
        build("efficientnet-lite0", 32, weights=str(tmp_path / "w.pth"))


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_file_that_would_run_code_is_refused_and_runs_nothing(tmp_path):
    trap = tmp_path / "was-run"
    for name, write in (("a.pth", torch.save), ("b.pth", lambda obj, path: path.write_bytes(pickle.dumps(obj)))):
        write({"state_dict": Malicious(trap)}, tmp_path / name)
        with pytest.raises(GraftError, match=r"cannot be read: it is damaged, or holds more than tensors") as caught:
            read_weights(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not trap.exists()


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_damaged_weights_are_refused(tmp_path, name):
    path = tmp_path / name
    with pytest.raises(GraftError, match="There is no weights file"):
        read_weights(path)
    state = {"weight": torch.randn(64, 64)}
    save_file(state, path) if name.endswith("safetensors") else torch.save(state, path)
    whole = path.read_bytes()
    for damaged in (b"", b"junk", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(GraftError, match="cannot be read"):
            read_weights(path)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, torch.zeros(3), {"state_dict": {"a": 1}}])
def test_a_file_without_a_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(GraftError, match="holds no state dict"):
        read_weights(tmp_path / "w.pth")
