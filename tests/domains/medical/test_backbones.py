"""Medical backbones: the numbers of MONAI's networks, their roles, the methods on them, the sizes that they take."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm

from common.attach import attach, probe
from common.errors import GraftError
from common.matrix.settings import TINY
from common.methods import METHODS, LoRA
from common.roles import resolve
from domains.medical.backbones import build, features
from tests.cases import ALIKE, CASES, LINEAR_ONLY, STANDALONE
from tests.domains.medical.nets import CLASSES, EACH, NETS, arguments, build_net, images, upstream, whole
from tests.toy import SMALL

NETWORK = pytest.mark.parametrize(("key", "dims"), EACH)
CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Compute in one thread; toy tensors are too small to share out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- the same network


@pytest.mark.parametrize("affine", [True, False])
@NETWORK
def test_backbone_and_output_layer_are_the_network_of_monai(key, dims, affine, tmp_path):
    norm = "norm" if key.startswith("unet") and key != "unetr" else "norm_name"
    plain = key != "segresnet" and norm not in arguments(key, dims)
    reference = upstream(key, dims, **({norm: ("INSTANCE", {"affine": affine})} if plain else {}))
    torch.save(reference.state_dict(), tmp_path / "w.pt")
    built = build_net(key, dims, weights=str(tmp_path / "w.pt"))
    batch = images(key, dims)
    for training in (False, True):
        with torch.no_grad():
            expected = reference.train(training)(batch)
            built.output.train(training)
            assert torch.equal(whole(built, built.model.train(training), batch), expected)
    assert built.head_classes == ()


@NETWORK
def test_features_have_the_announced_width_and_the_output_the_images_size(key, dims):
    built, batch = build_net(key, dims), images(key, dims)
    with torch.no_grad():
        out = features(built, built.model, batch)
        assert out.shape[:2] == (2, built.width)
        assert built.output(out).shape == (2, CLASSES, *batch.shape[2:])
    assert not built.model.training
    assert built.dense
    assert built.spatial_dims == dims
    assert built.head_weights == {}


@NETWORK
def test_full_fine_tuning_reaches_every_parameter(key, dims):
    """Under distributed training a parameter without a gradient is an error, so a backbone carries none."""
    built = build_net(key, dims)
    output = built.output(features(built, built.model.train(), images(key, dims)))
    (output * torch.randn_like(output)).sum().backward()
    for module in (built.model, built.output):
        assert [name for name, parameter in module.named_parameters() if parameter.grad is None] == []


@NETWORK
def test_instance_norms_have_something_to_train(key, dims):
    for name, module in build_net(key, dims).model.named_modules():
        # MONAI's second version of the SwinUNETR leaves no choice for these.
        if isinstance(module, _InstanceNorm) and not name.startswith("swinViT.layers"):
            assert module.affine, name


def test_affine_can_be_turned_off_and_other_norms_are_left_alone():
    off = build_net("unet", 3, net=arguments("unet", 3) | {"norm": ("INSTANCE", {"affine": False})})
    assert not any(module.affine for module in off.model.modules() if isinstance(module, _InstanceNorm))
    batch = build_net("unet", 3, net=arguments("unet", 3) | {"norm": "batch"})
    assert any(isinstance(module, nn.BatchNorm3d) for module in batch.model.modules())


@NETWORK
def test_the_way_up_is_named_from_fine_to_coarse(key, dims):
    built, batch = build_net(key, dims), images(key, dims)
    seen = {}
    for name, _ in built.decoder:
        built.model.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: seen.update({name: output})
        )
    with torch.no_grad():
        built.model(batch)
    sides = [batch.shape[2]] + [seen[name].shape[2] for name, _ in built.decoder]
    assert sides == sorted(sides, reverse=True)
    assert len(set(sides)) == len(sides)
    assert [seen[name].shape[1] for name, _ in built.decoder] == [width for _, width in built.decoder]
    assert bool(built.decoder) == (key != "unet-plain")


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("arch", ["UNet", "SegResNet", "UNETR", "SwinUNETR", "DynUNet"])
def test_the_defaults_make_a_network_of_a_moderate_size(arch, dims):
    built = build(arch, spatial_dims=dims, channels=2, classes=4, patch_size=(64,) * dims, pretrained=False)
    assert 1e6 < sum(p.numel() for p in built.model.parameters()) < 2e7
    assert resolve(built.model, built.family).count()["conv"] > 10


# ---- roles

ROLES = {
    "unet": {"stem": 2, "conv": 9, "norm": 8},
    "unet-plain": {"stem": 1, "conv": 1, "norm": 2},
    # Four blocks of two, two downsamplings, two upsamplings of two.
    "segresnet": {"stem": 1, "conv": 2 * 6 + 2 + 2 * 2, "norm": 2 * 6},
    "unetr": {
        "stem": 3,
        **dict.fromkeys(("attention_qkv", "attention_out", "ffn_in", "ffn_out"), 12),
        "conv": 1 + (1 + 2 * 3) + (1 + 3) + 1 + 4 * 4,
        "norm": 2 * 12 + 1 + 3 + 2 * 2 + 2 + 4 * 3,
    },
    "swin": {
        "stem": 3,
        **dict.fromkeys(("attention_qkv", "attention_out", "ffn_in", "ffn_out"), 4),
        "conv": 1 + 2 * 4 + 4 * 5,
        "norm": 2 * 4 + 4 + (3 + 2 * 4) + 3 * 5,
    },
    "dynunet": {"stem": 1, "conv": 1 + 2 + 2 + 2 * 3, "norm": 2 * 3 + 2 * 2},
}


@pytest.mark.parametrize("key", list(NETS))
def test_roles_are_counted(key):
    built = build_net(key, 3)
    assert resolve(built.model, built.family).count() == ROLES[key]


@NETWORK
def test_every_layer_with_a_matrix_carries_a_role_and_no_container_does(key, dims):
    built = build_net(key, dims)
    roles = resolve(built.model, built.family).role_of
    layers = [name for name, module in built.model.named_modules() if isinstance(module, (*CONVOLUTIONS, nn.Linear))]
    # As in timm's Swin family, merging patches is neither attention nor feed-forward.
    assert [n for n in layers if n not in roles] == [n for n in layers if n.endswith("downsample.reduction")]
    assert all(not list(built.model.get_submodule(name).children()) for name in roles)


@NETWORK
def test_the_stem_is_what_reads_the_image(key, dims):
    built = build_net(key, dims, channels=5)
    roles = resolve(built.model, built.family).role_of
    reads = [n for n, m in built.model.named_modules() if isinstance(m, CONVOLUTIONS) and m.in_channels == 5]
    assert [name for name, role in roles.items() if role == "stem"] == reads
    assert not set(reads) & set(resolve(built.model, built.family).select(["all"]))


@NETWORK
def test_blocks_are_in_the_order_in_which_they_run(key, dims):
    built = build_net(key, dims)
    blocks = resolve(built.model, built.family).blocks
    called = []
    for name in blocks:
        built.model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    with torch.no_grad():
        features(built, built.model, images(key, dims))
    assert tuple(called) == blocks
    assert len(blocks) > 1


# ---- methods

# A method may act on some roles only; a network without them is refused.
ON = {(method, key): ["attention", "ffn"] for method in LINEAR_ONLY if method != "BEFT" for key in ("unetr", "swin")}
ON["Convpass", "swin"] = ["ffn"]  # whose attention reads windows
ON["ConvLoRA", "swin"] = ["ffn"]
BLOCKS = ("AdapterPlus", "LoReFT", "NoReFT", "DiReFT", "LST")
REFUSED = {
    (method, key): reason
    for key in ("unet", "segresnet", "dynunet")
    for method, reason in (
        *((method, r"it takes Linear") for method in LINEAR_ONLY),
        ("BEFT", r"Role 'attention_qkv' matches no module of this"),
        ("Houlsby", r"Role 'attention_out' matches no module of this"),
        ("DiffFit", r"Role 'attention_out' matches no module of this"),
        ("SCT", r"Role 'attention_out' matches no module of this"),
        ("Pfeiffer", r"Role 'ffn_out' matches no module of this"),
        ("Compacter", r"Role 'attention_out' matches no module of this"),
        ("ParallelAdapter", r"Role 'ffn' matches no module of this"),
        ("AdaptFormer", r"Role 'ffn' matches no module of this"),
        ("Convpass", r"Role 'attention' matches no module of this"),
        ("ConvLoRA", r"Role 'attention_qkv' matches no module of this"),
        ("RepAdapter", r"Role 'attention_qkv' matches no module of this"),
        *((method, "acts on the hidden states that blocks hand on") for method in BLOCKS),
    )
}
NO_TOKENS = {"swin": "attends within windows of a grid"} | dict.fromkeys(
    ("unet", "segresnet", "dynunet"), "its blocks are convolutions and read no tokens"
)
REFUSED |= {
    (name, key): rf"{name} cannot act on this \w+ backbone: (it )?{reason}"
    for name, method in METHODS.items()
    for key, reason in NO_TOKENS.items()
    if method.taxonomy == "prompts"
}
REFUSED["PrefixTuning", "unetr"] = "PrefixTuning cannot act on this unetr backbone: its attention is computed by hand"
REFUSED |= {  # of which it is a part
    (name, key): reason
    for (method, key), reason in REFUSED.items()
    for name in ("MAM", "UniPELT")
    if method == "PrefixTuning"
}
REFUSED["LST", "swin"] = "LST needs blocks of one width, and this backbone's have 12, 24, 48, 96 channels"
REFUSED["BEFT", "unetr"] = r"BEFT trains biases, and 'vit\.blocks\.0\.attn\.qkv' has none"


def spec_of(method, key):
    """A method at toy size."""
    on = {"on": ON[method, key]} if (method, key) in ON else {}
    small = {name: value for name, value in (SMALL | TINY).get(method, {}).items() if name != "target_modules"}
    return METHODS[method](**(small | on))


def cases():
    """Every method on every network; a step of a 3D transformer takes a second, so most see it in 2D only."""
    for key, dims in EACH:
        if key != "unet-plain":  # has a single convolution, whose scale an instance norm takes away again
            for method in STANDALONE:
                slow = key in ("swin", "unetr") and dims == 3 and method not in ("LastBlocks", "LoRA")
                slow = slow or (method in ALIKE and (key, dims) not in (("unet", 3), ("unetr", 2)))
                marks = [pytest.mark.slow] if slow else []
                yield pytest.param(key, dims, method, marks=marks, id=f"{key}-{dims}-{method}")


@pytest.mark.parametrize(("key", "dims", "method"), list(cases()))
def test_every_method_trains_and_reloads_on_every_network_or_says_why_not(key, dims, method, tmp_path):
    spec, batch = spec_of(method, key), images(key, dims, count=1)
    built = build_net(key, dims)
    if (method, key) in REFUSED:
        with pytest.raises(GraftError, match=REFUSED[method, key]):
            attach(built.model, spec, built.family)
        return

    def run(model, training=False):
        with torch.set_grad_enabled(training):
            return features(built, model, batch)

    bare = run(built.model)
    attached = attach(built.model, spec, built.family)
    attached.train(False)
    CASES[method].check_start(run(attached.model), bare)
    probe(attached, lambda: features(built, attached.model, batch))
    trained = [parameter for parameter in attached.model.parameters() if parameter.requires_grad]
    assert bool(trained) == (method != "LinearProbe")
    if not trained:
        return
    attached.train(True)
    run(attached.model, training=True).square().mean().backward()
    torch.optim.AdamW(trained, lr=0.05).step()
    attached.train(False)
    after = run(attached.model)
    assert not torch.allclose(after, bare, atol=1e-5)
    fresh = build_net(key, dims).model
    if isinstance(attached.model, PeftModel):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT finds no hub configuration
            attached.model.save_pretrained(str(tmp_path))
            fresh = PeftModel.from_pretrained(fresh, str(tmp_path))
    else:
        fresh.load_state_dict(attached.model.state_dict())
    torch.testing.assert_close(run(fresh.eval()), after, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("key", "out"), [("unetr", "out_proj"), ("swin", "proj")])
@torch.no_grad()
def test_the_thirds_of_a_fused_projection_are_queries_keys_and_values(key, out):
    """The same vector added to all keys changes no softmax, and added to all values the mixed ones by itself."""
    built = build_net(key, 2)
    roles = resolve(built.model, built.family)
    assert list(roles.shares) == [name for name, role in roles.role_of.items() if role == "attention_qkv"]
    name = next(iter(roles.shares))
    qkv = built.model.get_submodule(name)
    added = [torch.zeros(qkv.out_features)]
    qkv.register_forward_hook(lambda module, args, result: result + added[0])
    mixed = []
    last = built.model.get_submodule(name.removesuffix("qkv") + out)
    last.register_forward_pre_hook(lambda module, args: mixed.append(args[0]))
    size = qkv.out_features // 3
    vector = torch.randn(size, generator=torch.Generator().manual_seed(0))
    for third in (None, 0, 1, 2):
        if third is not None:
            added[0] = torch.cat([vector * (place == third) for place in range(3)])
        features(built, built.model, images(key, 2, count=1))
    torch.testing.assert_close(mixed[2], mixed[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed[3], mixed[0] + vector, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(mixed[1], mixed[0], atol=1e-4)


@pytest.mark.parametrize(
    ("key", "on", "blocks"),
    [
        ("unet", "conv@last:2", ("model.1.submodule.1.submodule", "model.1.submodule.2")),
        ("unetr", "attention@last:1", ("vit.blocks.11",)),  # of those that have attention
        ("unetr", "all@last:1", ("decoder2",)),
        ("segresnet", "conv@first:1", ("down_layers.0",)),
        ("dynunet", "conv@first:2@last:1", ("downsamples.0",)),
    ],
)
def test_bottlenecks_stand_in_the_chosen_blocks(key, on, blocks):
    built, batch = build_net(key, 2), images(key, 2)
    roles = resolve(built.model, built.family)
    attached = attach(built.model, METHODS["Houlsby"](on=[on]), built.family)
    inside = tuple(f"{block}." for block in blocks)
    assert list(attached.plan.targets) == [n for n in roles.select([on.partition("@")[0]]) if n.startswith(inside)]
    probe(attached, lambda: features(built, attached.model, batch))


@pytest.mark.parametrize("key", ["unet", "unetr", "dynunet"])
def test_an_adapter_loads_onto_monais_own_network(key, tmp_path):
    """Names are MONAI's, so a user needs the output layer's weights and nothing of Graft's network."""
    reference = upstream(key, 3)
    torch.save(reference.state_dict(), tmp_path / "w.pt")
    built = build_net(key, 3, weights=str(tmp_path / "w.pt"))
    attached = attach(built.model, LoRA(rank=2), built.family)
    for name, parameter in attached.model.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(len(name)))
    attached.train(False)
    batch = images(key, 3)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT finds no hub configuration
        expected = whole(built, attached.model, batch)
        attached.model.save_pretrained(str(tmp_path / "adapter"))
        bare = reference.eval()(batch)
        loaded = PeftModel.from_pretrained(reference, str(tmp_path / "adapter")).eval()
        assert not torch.allclose(bare, expected, atol=1e-2)
        torch.testing.assert_close(loaded(batch), expected, atol=1e-5, rtol=1e-5)


# ---- sizes


@pytest.mark.parametrize(
    ("arch", "net", "divisor"),
    [
        ("UNet", {"channels": (4, 8, 16, 16), "strides": (2, 2, 2)}, 8),
        ("UNet", {"channels": (4, 8, 16), "strides": ((1, 2, 2), (2, 2, 2))}, 4),
        ("SegResNet", {"init_filters": 8}, 8),
        ("DynUNet", {"filters": (4, 4, 8, 8, 8)}, 16),
        ("UNETR", {"hidden_size": 24, "num_heads": 2, "feature_size": 4}, 16),
        ("SwinUNETR", {"feature_size": 12}, 32),
    ],
)
def test_inputs_are_multiples_of_the_divisor(arch, net, divisor):
    built = build(arch, spatial_dims=3, channels=1, classes=2, patch_size=(64, 40, 16), pretrained=False, net=net)
    assert built.divisor == divisor
    padded = tuple(-(-side // divisor) * divisor for side in (64, 40, 16))
    with torch.no_grad():
        small = torch.zeros(1, 1, *((2 * divisor, divisor, divisor) if arch != "UNETR" else padded))
        assert built.output(features(built, built.model, small)).shape[2:] == small.shape[2:]
    with pytest.raises(GraftError, match=r"takes images of .* voxels, not \(\d+, \d+, \d+\)"):
        features(built, built.model, small[..., :-1])
    assert built.input_size == (padded if arch == "UNETR" else None)


def test_a_unetr_takes_its_own_size_only():
    built = build_net("unetr", 2)
    with pytest.raises(GraftError, match=r"'UNETR' takes images of \(32, 16\) voxels, not \(32, 32\)"):
        features(built, built.model, torch.zeros(1, 1, 32, 32))


@pytest.mark.parametrize(
    ("key", "patch", "smallest"),
    [("unet", (4, 4, 4), (8, 4, 4)), ("dynunet", (3, 2, 4), (8, 4, 4)), ("swin", (32, 32, 32), (64, 32, 32))],
)
def test_a_patch_that_leaves_one_voxel_to_an_instance_norm_names_the_smallest(key, patch, smallest):
    net = {name: value for name, value in arguments(key, 3).items() if name != "norm_name"}
    with pytest.raises(GraftError, match=r"too small for .* The smallest patch is ") as caught:
        build_net(key, 3, net=net, patch_size=patch)
    assert f"The smallest patch is {smallest}, in any order of the axes" in str(caught.value)
    for order in (smallest, smallest[::-1]):
        built = build_net(key, 3, net=net, patch_size=order)
        with torch.no_grad():
            features(built, built.model.train(), torch.randn(1, 1, *order))
