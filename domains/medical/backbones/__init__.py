"""Medical backbones: MONAI's segmentation networks in 2D and 3D, and timm's image backbones for slices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from common.errors import GraftError, unknown
from common.starters import starter_file
from common.task import Backbone
from domains.medical.backbones._bundle import read_bundle
from domains.medical.backbones._nets import NETS, create
from domains.medical.backbones._weights import load, read
from domains.medical.starters import STARTERS

__all__ = ["NETS", "MedicalBackbone", "build", "features"]

BUNDLE = "bundle:"


@dataclass(frozen=True, kw_only=True)
class MedicalBackbone(Backbone):
    """A network up to its output layer, and what is known of that layer.

    Attributes:
        spatial_dims: 2 or 3.
        width: Channels of its features.
        divisor: Sides of an input have to be multiples of it.
        output: The network's own output layer, for the wanted number of classes: `output(model(x))` is the network.
            The identity for a token backbone.
        head_weights: State of the output layer in the checkpoint; empty where it has none or the start is random.
        head_classes: The classes that `head_weights` tell apart, in order; empty where unknown.
        dense: Whether features have the resolution that the output layer wants; False for token backbones, whose
            features are a grid coarser by `divisor`.
        input_size: The only input size (voxels along each axis) that it takes; None where any multiple will do.
        prefix_tokens: Class and register tokens of a token backbone, which its features leave out.
        decoder: Modules of a network on the way up whose outputs are coarser than the image, fine to coarse, and their
            channels.
    """

    spatial_dims: int
    width: int
    divisor: int
    output: nn.Module
    head_weights: Mapping[str, Tensor] = field(default_factory=dict)
    head_classes: tuple[str, ...] = ()
    dense: bool = True
    input_size: tuple[int, ...] | None = None
    prefix_tokens: int = 0
    decoder: tuple[tuple[str, int], ...] = ()


def build(
    name: str,
    *,
    spatial_dims: int,
    channels: int,
    classes: int,
    patch_size: Sequence[int],
    pretrained: bool = True,
    weights: str | None = None,
    net: Mapping[str, Any] | None = None,
) -> MedicalBackbone:
    """Build a backbone and take its output layer off.

    Args:
        name: A network of MONAI (`UNet`, `SegResNet`, `UNETR`, `SwinUNETR`, `DynUNet`), a starter of the catalog
            (`unet3d-colin`), a MONAI bundle (`bundle:FOLDER`), or for 2D data an image backbone (see
            `common.images.backbones.build`), which sees one channel three times.
        spatial_dims: 2 or 3.
        channels: Channels of the images.
        classes: Number of classes, background included.
        patch_size: Voxels along each axis of a training patch, which is also what inference feeds.
        pretrained: Load weights; False gives random ones (tests, from-scratch baselines).
        weights: A local `.safetensors` or torch file: a starter file, or a state dict of the whole network.
        net: Constructor arguments of a MONAI network, before its defaults; for a ViT `depth` alone.

    Raises:
        GraftError: An unknown name, weights that cannot be had or do not fit, arguments or a patch that the network
            cannot take.
    """
    options = dict(net or {})
    if not (name in NETS or name in STARTERS or name.startswith(BUNDLE)):
        return _image_backbone(
            name, spatial_dims, channels, patch_size, pretrained=pretrained, weights=weights, net=options
        )
    source = _source(name, pretrained=pretrained, weights=weights, net=options)
    _check_facts(name, source.takes, {"spatial_dims": spatial_dims, "in_channels": channels})
    given = {"spatial_dims": spatial_dims, "channels": channels, "classes": classes, "patch_size": patch_size}
    built = create(source.arch, **given, net=source.net)
    _check_facts(name, source.takes, {"img_size": built.input_size})
    head: dict[str, Tensor] = {}
    names = source.classes
    if source.file is not None:
        found = read(source.file, source.arch)
        head, names = load(built, found, str(source.file)), found.classes or names
    return MedicalBackbone(
        name=name,
        model=built.model,
        family=built.family,
        spatial_dims=spatial_dims,
        width=_width(built.output),
        divisor=built.divisor,
        output=built.output,
        head_weights=head,
        head_classes=names if head else (),
        input_size=built.input_size,
        decoder=built.decoder,
    )


@dataclass(frozen=True, kw_only=True)
class _Source:
    """Where a network and its weights come from; `takes` is what the data has to be."""

    arch: str
    net: Mapping[str, Any]
    takes: Mapping[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    file: Path | None = None


def _source(name: str, *, pretrained: bool, weights: str | None, net: Mapping[str, Any]) -> _Source:
    if name in NETS:
        if pretrained and weights is None:
            raise GraftError(
                f"There are no pretrained weights of '{name}' itself. Give a file with 'weights', take a starter "
                f"({', '.join(STARTERS)}) or '{BUNDLE}FOLDER', or set pretrained to false."
            )
        return _Source(arch=name, net=net, file=Path(weights) if weights else None)
    if net:
        raise GraftError(f"'{name}' brings its own network. Leave out 'net', or name one of: {', '.join(NETS)}.")
    if name in STARTERS:
        starter = STARTERS[name]
        file = Path(weights) if weights else starter_file(name) if pretrained else None
        takes = {"spatial_dims": starter.spatial_dims, "in_channels": starter.channels}
        return _Source(arch=starter.arch, net=starter.net, takes=takes, file=file)
    if weights is not None:
        raise GraftError(f"'{name}' brings its own weights. Leave out 'weights'.")
    bundle = read_bundle(Path(name.removeprefix(BUNDLE)))
    file = bundle.weights if pretrained else None
    return _Source(arch=bundle.arch, net=bundle.net, takes=bundle.takes, classes=bundle.classes, file=file)


_FACTS = {"spatial_dims": "number of axes", "in_channels": "number of channels", "img_size": "patch_size"}


def _check_facts(name: str, takes: Mapping[str, Any], has: Mapping[str, Any]) -> None:
    """Refuse data that a given network was not built for."""
    for key, value in has.items():
        wanted = takes.get(key, value)
        if isinstance(value, tuple):
            wanted = tuple(wanted) if isinstance(wanted, Sequence) else (wanted,) * len(value)
        if value is not None and wanted != value:
            raise GraftError(
                f"'{name}' is built for a {_FACTS[key]} of {wanted}, and the data has {value}. Change the data's "
                "settings, or take another backbone."
            )


def _width(output: nn.Module) -> int:
    """Return the channels that the output layer reads."""
    convolutions = [
        module for module in output.modules() if hasattr(module, "in_channels") and not list(module.children())
    ]
    return int(convolutions[0].in_channels)


def _image_backbone(
    name: str,
    spatial_dims: int,
    channels: int,
    patch_size: Sequence[int],
    *,
    pretrained: bool,
    weights: str | None,
    net: Mapping[str, Any],
) -> MedicalBackbone:
    """Build a timm backbone for 2D images; its features are the grid of patch tokens."""
    # Imported late: timm takes seconds, and MONAI's networks do not need it.
    import timm

    from common.images import backbones as images

    if name not in images.STARTERS and not timm.is_model(name):
        raise unknown("medical backbone", name, (*NETS, *STARTERS, f"{BUNDLE}FOLDER", *images.STARTERS))
    if spatial_dims != 2:
        raise GraftError(
            f"'{name}' sees 2D images and the data has {spatial_dims} axes. Take one of: {', '.join(NETS)}."
        )
    if channels not in (1, 3):
        raise GraftError(f"'{name}' sees 1 or 3 channels and the data has {channels}. Take one of: {', '.join(NETS)}.")
    if len(set(patch_size)) != 1:
        raise GraftError(
            f"'{name}' sees square images and the data's patch_size is {tuple(patch_size)}. Make it square."
        )
    if set(net) - {"depth"}:
        raise GraftError(f"'{name}' takes 'depth' alone in 'net', not {', '.join(sorted(set(net) - {'depth'}))}.")
    built = images.build(name, patch_size[0], pretrained=pretrained, weights=weights, **net)
    model: Any = built.model
    return MedicalBackbone(
        name=name,
        model=built.model,
        family=built.family,
        spatial_dims=2,
        width=built.width,
        divisor=int(model.feature_info[-1]["reduction"]),
        output=nn.Identity(),
        dense=False,
        input_size=tuple(patch_size),
        prefix_tokens=built.prefix_tokens,
    )


def features(backbone: MedicalBackbone, model: nn.Module, images: Tensor) -> Tensor:
    """Run a backbone.

    Args:
        backbone: What `build` returned.
        model: Its model, bare or with adapters.
        images: (B, C, *spatial), normalised.

    Returns:
        (B, width, *spatial), coarser along each axis where the output layer enlarges it; for a token backbone
        (B, width, H / divisor, W / divisor).

    Raises:
        GraftError: Sides that the network cannot take.
    """
    sides = tuple(images.shape[2:])
    if any(side % backbone.divisor for side in sides) or sides != (backbone.input_size or sides):
        wanted = backbone.input_size or f"multiples of {backbone.divisor}"
        raise GraftError(
            f"'{backbone.name}' takes images of {wanted} voxels, not {sides}. Pad them, or set patch_size."
        )
    if backbone.dense:
        return model(images)
    from common.images.backbones import tokens

    grid = [side // backbone.divisor for side in sides]
    patches = tokens(model, images.expand(-1, 3, -1, -1))[:, backbone.prefix_tokens :]  # (B, N, C)
    return patches.transpose(1, 2).unflatten(2, grid)
