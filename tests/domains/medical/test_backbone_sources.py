"""Where medical backbones come from: names and arguments, weights in files, starters, bundles, image backbones."""

from __future__ import annotations

import json
import os

import monai.networks.nets
import pytest
import timm
import torch
from safetensors.torch import save_file

from common.attach import attach, probe
from common.errors import GraftError
from common.images import backbones as image_backbones
from common.methods import METHODS
from common.roles import resolve
from common.starters import save_starter
from domains.medical.backbones import build, features
from domains.medical.starters import STARTERS, stated
from tests.cases import STANDALONE
from tests.domains.medical.nets import CLASSES, NETS, arguments, build_net, images, upstream, whole
from tests.toy import SMALL

NAMES = ("background", "cortex", "other")


# ---- names and arguments


def options(**changes):
    return {"spatial_dims": 3, "channels": 1, "classes": 2, "patch_size": (16, 16, 16), "pretrained": False} | changes


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(GraftError, match=r"Unknown medical backbone 'SegResnet'\. Did you mean 'SegResNet'\?"):
        build("SegResnet", **options())


def test_a_network_without_weights_of_its_own_says_where_they_may_come_from():
    with pytest.raises(GraftError, match=r"no pretrained weights of 'UNet' .* 'weights', .*unet3d-colin.* 'bundle:"):
        build("UNet", **options(pretrained=True))


@pytest.mark.parametrize(
    ("arch", "net", "message"),
    [
        ("UNet", {"chanels": (4, 8)}, r"Unknown argument of UNet in 'net' 'chanels'\. Did you mean 'channels'"),
        ("UNet", {"in_channels": 2}, r"net\.in_channels of UNet follows from the data"),
        ("UNet", {"channels": (4, 8), "strides": (2, 2, 2), "norm": 3}, "UNet cannot be built with net .* Mend"),
        ("UNet", {"channels": (4,)}, "UNet cannot be built with net"),
        ("SegResNet", {"init_filters": 6}, "SegResNet cannot be built with net"),
        ("SegResNet", {"blocks_up": (1,)}, "SegResNet cannot run with net"),
        ("SegResNet", {"use_conv_final": False}, "net.use_conv_final of SegResNet is False; here it has to be True"),
        ("DynUNet", {"deep_supervision": True}, "net.deep_supervision of DynUNet is True; here it has to be False"),
        ("DynUNet", {"strides": (2, 2, 2, 2, 2)}, r"maps a patch of .* a DynUNet's first stride is 1"),
        ("UNETR", {"hidden_size": 25}, "UNETR cannot be built .* hidden.size should be divisible by num_heads"),
        ("SwinUNETR", {"feature_size": 10}, "SwinUNETR cannot be built .* divisible by 12"),
    ],
)
def test_arguments_that_do_not_fit_are_one_clear_line(arch, net, message):
    with pytest.raises(GraftError, match=message) as caught:
        build(arch, **options(net=net, patch_size=(64, 64, 64)))
    assert "\n" not in str(caught.value)


def test_arguments_that_do_not_fit_are_not_blamed_on_the_smallest_patch():
    with pytest.raises(GraftError, match="SegResNet cannot run with net"):
        build("SegResNet", **options(net={"blocks_up": (1,)}, patch_size=(8, 8, 8)))


# ---- weights


def test_weights_written_from_within_dataparallel_are_read(tmp_path):
    state = upstream("unet", 2).state_dict()
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "w.pt")
    built = build_net("unet", 2, weights=str(tmp_path / "w.pt"))
    assert torch.equal(built.model.state_dict()["model.0.residual.weight"], state["model.0.residual.weight"])


def test_a_file_without_the_output_layer_gives_a_backbone_alone(tmp_path):
    save_file(
        {k: v for k, v in upstream("unet", 2).state_dict().items() if "model.2." not in k}, tmp_path / "w.safetensors"
    )
    assert build_net("unet", 2, weights=str(tmp_path / "w.safetensors")).head_weights == {}


def test_the_classes_of_the_file_and_of_the_data_may_differ_in_number(tmp_path):
    torch.save(upstream("unet", 2, out_channels=7).state_dict(), tmp_path / "w.pt")
    built = build_net("unet", 2, weights=str(tmp_path / "w.pt"))
    assert built.head_weights["0.conv.weight"].shape[1] == 7
    assert built.output.state_dict()["0.conv.weight"].shape[1] == CLASSES


@pytest.mark.parametrize(
    ("key", "changes", "name"),
    [
        ("unet", {"channels": (4, 8, 8)}, r"model\.1\.submodule"),
        (
            "unet",
            {"in_channels": 2},
            r"model\.0\.conv\.unit0\.conv\.weight \(\(4, 2, 3, 3\) in the file, \(4, 1, 3, 3\) here",
        ),
        ("unet", {"num_res_units": 1}, "missing in the file"),
        ("unetr", {"img_size": (32, 32)}, "position_embeddings"),
        ("segresnet", {"blocks_down": (1, 3, 1)}, "missing here"),
    ],
)
def test_weights_of_another_network_are_refused_by_name(key, changes, name, tmp_path):
    torch.save(upstream(key, 2, **changes).state_dict(), tmp_path / "w.pt")
    with pytest.raises(GraftError, match=rf"w\.pt does not fit this .* such as .*{name}.* Give 'net'"):
        build_net(key, 2, weights=str(tmp_path / "w.pt"))


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_weights_that_would_run_code_are_refused_and_run_nothing(tmp_path):
    torch.save({"state_dict": Malicious(tmp_path / "was-run")}, tmp_path / "w.pt")
    with pytest.raises(GraftError, match="cannot be read"):
        build_net("unet", 2, weights=str(tmp_path / "w.pt"))
    with pytest.raises(GraftError, match="There is no weights file"):
        build_net("unet", 2, weights=str(tmp_path / "none.pt"))
    assert not (tmp_path / "was-run").exists()


# ---- starters


def starter_weights(path, classes=NAMES):
    """Write a random network of the starter's architecture as a starter file; return the network."""
    torch.manual_seed(5)
    args = dict(STARTERS["unet3d-colin"].net)
    net = monai.networks.nets.UNet(3, 1, 3, **args, norm=("INSTANCE", {"affine": True})).half().float()
    state = net.state_dict()
    parts = [{k: v for k, v in state.items() if k.startswith("model.2.") == head} for head in (False, True)]
    layer = {name.removeprefix("model.2."): tensor for name, tensor in parts[1].items()}
    save_starter(path, parts[0], layer, stated(classes, (2, 2, 2), "test"))
    return net


def test_a_starter_is_its_network_with_its_head(tmp_path):
    net = starter_weights(tmp_path / "s.safetensors")
    file = str(tmp_path / "s.safetensors")
    built = build("unet3d-colin", **options(pretrained=True, classes=3, weights=file, patch_size=(32, 16, 16)))
    assert built.head_classes == NAMES
    assert built.family.name == "unet"
    batch = torch.randn(1, 1, 32, 16, 16)
    with torch.no_grad():
        assert torch.equal(whole(built, built.model, batch), net.eval()(batch))
    other = build("unet3d-colin", **options(pretrained=True, classes=5, weights=file, patch_size=(32, 16, 16)))
    assert other.output.state_dict()["0.conv.weight"].shape[1] == 5


def test_a_starter_says_what_it_is_built_for():
    with pytest.raises(GraftError, match=r"'unet3d-colin' is built for a number of axes of 3, and the data has 2"):
        build("unet3d-colin", **options(spatial_dims=2, patch_size=(32, 32)))
    with pytest.raises(GraftError, match=r"'unet3d-colin' is built for a number of channels of 1, and the data has 4"):
        build("unet3d-colin", **options(channels=4))
    with pytest.raises(GraftError, match=r"'unet3d-colin' brings its own network\. Leave out 'net'"):
        build("unet3d-colin", **options(net={"channels": (4, 8)}))
    assert build("unet3d-colin", **options(patch_size=(32, 16, 16))).head_weights == {}


# ---- bundles


def write_bundle(folder, key="unet", dims=3, metadata=True, **changes):
    """Write a bundle as MONAI lays it out; return its network."""
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    args = {"spatial_dims": dims, "in_channels": 1, "out_channels": CLASSES} | arguments(key, dims)
    args |= {"_target_": NETS[key].arch} | changes
    args = {name: value for name, value in args.items() if value is not None}
    config = {"imports": ["$import torch"], "network_def": args, "network": "$@network_def.to('cpu')"}
    (folder / "configs" / "inference.json").write_text(json.dumps(config))
    if metadata:
        channels = {str(index): name for index, name in enumerate(NAMES)}
        described = {"network_data_format": {"outputs": {"pred": {"channel_def": channels}}}}
        (folder / "configs" / "metadata.json").write_text(json.dumps(described))
    kept = {name: value for name, value in args.items() if not name.startswith("_")}
    given = {name: value for name, value in kept.items() if not isinstance(value, str) or value[0] not in "$@"}
    torch.manual_seed(5)
    net = getattr(monai.networks.nets, NETS[key].arch)(**given)
    torch.save(net.state_dict(), folder / "models" / "model.pt")
    return net.eval()


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("unet", {}),
        ("unet", {"_target_": "monai.networks.nets.UNet", "norm": "batch", "num_res_units": None}),
        ("segresnet", {"_desc_": "text"}),
        ("segresnet", {"init_filters": None}),
        ("dynunet", {"deep_supervision": True}),
        ("unetr", {"img_size": [32, 16, 16]}),
    ],
)
def test_a_bundle_is_the_network_that_it_describes(key, changes, tmp_path):
    net = write_bundle(tmp_path / "b", key, **changes)
    patch = NETS[key].patch[3]
    built = build(f"bundle:{tmp_path / 'b'}", **options(pretrained=True, classes=CLASSES, patch_size=patch))
    with torch.no_grad():
        assert torch.equal(whole(built, built.model, images(key, 3)), net(images(key, 3)))
    assert built.head_classes == NAMES
    random = build(f"bundle:{tmp_path / 'b'}", **options(classes=CLASSES, patch_size=patch))
    assert random.head_weights == {}
    assert random.head_classes == ()


def test_a_bundle_that_does_not_name_its_channels_has_unknown_classes(tmp_path):
    write_bundle(tmp_path, metadata=False)
    built = build(f"bundle:{tmp_path}", **options(pretrained=True, classes=CLASSES))
    assert built.head_weights
    assert built.head_classes == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_target_": "VNet"}, r"no 'network_def' of a network that Graft knows \(its _target_ is 'VNet'\)"),
        ({"_target_": "os.UNet"}, "no 'network_def' of a network that Graft knows"),
        ({"norm": "$__import__('os').mkdir('was-run')"}, r'network_def\.norm is "\$__import__.* never runs'),
        ({"dropout": "@dropout"}, r"network_def\.dropout is '@dropout', an expression"),
        ({"spatial_dims": 2}, "is built for a number of axes of 2, and the data has 3"),
        ({"in_channels": 4}, "is built for a number of channels of 4, and the data has 1"),
    ],
)
def test_a_bundle_that_graft_cannot_take_is_refused_and_runs_nothing(changes, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_bundle(tmp_path / "b")
    config = json.loads((tmp_path / "b/configs/inference.json").read_text())
    config["network_def"] |= changes
    (tmp_path / "b/configs/inference.json").write_text(json.dumps(config))
    with pytest.raises(GraftError, match=message):
        build("bundle:b", **options(pretrained=True))
    assert not (tmp_path / "was-run").exists()


def test_a_bundle_of_another_patch_is_refused(tmp_path):
    write_bundle(tmp_path, "unetr", img_size=[32, 16, 16])
    with pytest.raises(
        GraftError, match=r"is built for a patch_size of \(32, 16, 16\), and the data has \(16, 16, 16\)"
    ):
        build(f"bundle:{tmp_path}", **options(pretrained=True))


def test_a_folder_that_is_no_whole_bundle_is_refused(tmp_path):
    with pytest.raises(GraftError, match=r"There is no file .*inference\.json\. Give the folder of a MONAI bundle"):
        build(f"bundle:{tmp_path}", **options(pretrained=True))
    write_bundle(tmp_path)
    for argument in ({"weights": "x.pt"}, {"net": {"norm": "batch"}}):
        with pytest.raises(GraftError, match="brings its own"):
            build(f"bundle:{tmp_path}", **options(pretrained=True, **argument))
    (tmp_path / "models/model.pt").unlink()
    with pytest.raises(GraftError, match="There is no weights file"):
        build(f"bundle:{tmp_path}", **options(pretrained=True))
    (tmp_path / "configs/inference.json").write_text("{")
    with pytest.raises(GraftError, match="is damaged"):
        build(f"bundle:{tmp_path}", **options(pretrained=True))


# ---- image backbones


def flat(**changes):
    return options(spatial_dims=2, patch_size=(32, 32)) | changes


@pytest.mark.parametrize(
    ("name", "divisor", "grid"), [("test_vit", 16, 2), ("test_resnet", 32, 1), ("test_convnext2", 32, 1)]
)
def test_an_image_backbone_gives_a_grid_of_its_tokens(name, divisor, grid):
    built = build(name, **flat())
    assert not built.dense
    assert (built.divisor, built.input_size) == (divisor, (32, 32))
    batch = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        out = features(built, built.model, batch)
        tokens = image_backbones.tokens(built.model, batch.repeat(1, 3, 1, 1))[:, built.prefix_tokens :]
    assert out.shape == (2, built.width, grid, grid)
    for row in range(grid):
        for column in range(grid):
            assert torch.equal(out[:, :, row, column], tokens[:, row * grid + column])


@pytest.mark.parametrize("method", STANDALONE)
def test_every_method_works_on_a_vit_or_says_why_not(method):
    built, batch = build("test_vit", **flat()), torch.randn(1, 1, 32, 32)
    small = {name: value for name, value in SMALL.get(method, {}).items() if name != "target_modules"}
    if method == "ConvAdapter":
        with pytest.raises(GraftError, match="Role 'conv' matches no module"):
            attach(built.model, METHODS[method](**small), built.family)
        return
    attached = attach(built.model, METHODS[method](**small), built.family)
    probe(attached, lambda: features(built, attached.model, batch))


def test_a_vit_may_be_cut():
    built = build("test_vit", **flat(net={"depth": 2}))
    assert len(resolve(built.model, built.family).blocks) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spatial_dims": 3, "patch_size": (32, 32, 32)}, "sees 2D images and the data has 3 axes"),
        ({"channels": 2}, "sees 1 or 3 channels and the data has 2"),
        ({"patch_size": (32, 48)}, r"sees square images and the data's patch_size is \(32, 48\)"),
        ({"net": {"depth": 2, "width": 3}}, "takes 'depth' alone in 'net', not width"),
        ({"patch_size": (40, 40)}, "image_size 40 is no multiple of 16"),
    ],
)
def test_data_that_an_image_backbone_cannot_take_is_refused(changes, message):
    with pytest.raises(GraftError, match=message):
        build("test_vit", **flat(**changes))


def test_divisors_of_image_backbones_are_their_steps():
    for name in ("vit_tiny_patch16_224", "vit_small_patch14_dinov2", "swin_tiny_patch4_window7_224"):
        with torch.device("meta"):
            model = timm.create_model(name)
        side = model.default_cfg["input_size"][1]
        grid = model.patch_embed.grid_size[0] // (8 if "swin" in name else 1)
        assert model.feature_info[-1]["reduction"] == side // grid
