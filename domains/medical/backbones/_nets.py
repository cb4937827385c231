"""Building the MONAI networks: their arguments, their output layer, and the sizes that they take."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from common.errors import GraftError, unknown
from common.roles import Family
from domains.medical.backbones import _families
from domains.medical.backbones._hooks import outputs_of

# What follows from the data and is never given by the user.
FROM_DATA = ("spatial_dims", "in_channels", "out_channels", "img_size")


@dataclass(frozen=True, kw_only=True)
class Net:
    """A network architecture of MONAI.

    Attributes:
        defaults: Constructor arguments where the user gives none.
        forced: Arguments that have one possible value here, for the output layer to be the head.
        output: Name of the output layer.
        decoder: From the arguments, the modules on the way up whose outputs are coarser than the image, fine to coarse.
        factors: From the arguments and the number of axes, by how much the innermost map is coarser along each axis.
        family: From the arguments, the roles of its modules.
        sized: Whether it is built for one input size.
        ignored: Pattern of parameter names that no output depends on, and which a checkpoint may hold.
    """

    defaults: Mapping[str, Any]
    forced: Mapping[str, Any] = field(default_factory=dict)
    output: str
    decoder: Callable[[Mapping[str, Any]], tuple[str, ...]]
    factors: Callable[[Mapping[str, Any], int], tuple[int, ...]]
    family: Callable[[Mapping[str, Any]], Family]
    sized: bool = False
    ignored: str = ""


def _along(strides: Sequence[int | Sequence[int]], axes: int) -> tuple[int, ...]:
    """Multiply the strides of all levels, along each axis."""
    spread = [tuple(step) if isinstance(step, Sequence) else (step,) * axes for step in strides]
    return tuple(math.prod(step[axis] for step in spread) for axis in range(axes))


_AFFINE = ("INSTANCE", {"affine": True})
NETS: Mapping[str, Net] = {
    "UNet": Net(
        defaults={
            "channels": (16, 32, 64, 128, 256),
            "strides": (2, 2, 2, 2),
            "num_res_units": 2,
            "norm": _AFFINE,
        },
        output="model.2",
        decoder=lambda args: tuple(f"model{'.1.submodule' * level}.2" for level in range(1, len(args["channels"]) - 1)),
        factors=lambda args, axes: _along(args["strides"][: len(args["channels"]) - 1], axes),
        family=lambda args: _families.unet(len(args["channels"])),
    ),
    "SegResNet": Net(
        defaults={"init_filters": 16, "blocks_down": (1, 2, 2, 4), "blocks_up": (1, 1, 1)},
        forced={"use_conv_final": True},
        output="conv_final",
        decoder=lambda args: tuple(f"up_layers.{number}" for number in reversed(range(len(args["blocks_up"]) - 1))),
        factors=lambda args, axes: (2 ** (len(args["blocks_down"]) - 1),) * axes,
        family=lambda args: _families.SEGRESNET,
    ),
    "UNETR": Net(
        defaults={"feature_size": 16, "hidden_size": 192, "mlp_dim": 768, "num_heads": 3, "norm_name": _AFFINE},
        output="out",
        decoder=lambda args: ("decoder3", "decoder4", "decoder5"),
        factors=lambda args, axes: (16,) * axes,
        family=lambda args: _families.UNETR,
        sized=True,
        ignored=r"vit\.blocks\.\d+\.(norm_)?cross_attn\..*",
    ),
    "SwinUNETR": Net(
        defaults={"feature_size": 24, "patch_size": 2, "norm_name": _AFFINE},
        output="out",
        decoder=lambda args: ("decoder2", "decoder3", "decoder4", "decoder5"),
        factors=lambda args, axes: (args["patch_size"] ** 5,) * axes,
        family=lambda args: _families.SWIN_UNETR,
    ),
    "DynUNet": Net(
        defaults={
            "kernel_size": (3, 3, 3, 3, 3),
            "strides": (1, 2, 2, 2, 2),
            "upsample_kernel_size": (2, 2, 2, 2),
            "filters": (16, 32, 64, 128, 256),
            "norm_name": _AFFINE,
        },
        forced={"deep_supervision": False},
        output="output_block",
        decoder=lambda args: tuple(f"upsamples.{number}" for number in reversed(range(len(args["strides"]) - 2))),
        factors=lambda args, axes: _along(args["strides"], axes),
        family=lambda args: _families.DYNUNET,
        ignored=r"(skip_layers|deep_supervision_heads)\..*",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Built:
    """A network, taken apart.

    Attributes:
        arch: Its name in `NETS`.
        model: The network up to its output layer.
        output: The output layer, for the wanted number of classes.
        family: Roles of `model`.
        divisor: Sides of an input are multiples of it.
        input_size: The only input size (voxels along each axis) that the network takes; None where any will do.
        decoder: Modules on the way up whose outputs are coarser than the image, fine to coarse, and their channels.
    """

    arch: str
    model: nn.Module
    output: nn.Module
    family: Family
    divisor: int
    input_size: tuple[int, ...] | None
    decoder: tuple[tuple[str, int], ...] = ()


def create(
    arch: str,
    *,
    spatial_dims: int,
    channels: int,
    classes: int,
    patch_size: Sequence[int],
    net: Mapping[str, Any],
) -> Built:
    """Build a network with random weights and take its output layer off.

    An instance norm is built with a scale and a shift (`affine`) unless the arguments turn them off, so that there is
    something to train; they start as one and zero, which is the norm without them.

    Args:
        arch: A name of `NETS`.
        spatial_dims: 2 or 3.
        channels: Input channels.
        classes: Output channels of the output layer.
        patch_size: Voxels along each axis of a training patch.
        net: Constructor arguments; they go before the defaults.

    Raises:
        GraftError: Unknown or unfit arguments, or a patch that the network cannot take.
    """
    entry = NETS[arch]
    _check_arguments(arch, net)
    given = {"spatial_dims": spatial_dims, "in_channels": channels, "out_channels": classes}
    try:
        args = {**entry.defaults, **net, **entry.forced}
        args |= {key: _affine(args[key]) for key in ("norm", "norm_name") if key in args}
        factors = entry.factors(args, spatial_dims)
        divisor = math.lcm(*factors)
        padded = tuple(-(-side // divisor) * divisor for side in patch_size)
        model = _class(arch)(**args, **given, **({"img_size": padded} if entry.sized else {})).eval()
    except (TypeError, ValueError, AssertionError, LookupError, NotImplementedError) as error:
        raise _unfit(arch, "be built", net, error) from error
    for name in {name.rpartition(".")[0] for name, _ in model.named_parameters() if re.fullmatch(entry.ignored, name)}:
        # MONAI's UNETR carries a norm in each block that it never calls.
        model.set_submodule(name, nn.Identity())
    output = model.get_submodule(entry.output)
    model.set_submodule(entry.output, nn.Identity())
    built = Built(
        arch=arch,
        model=model,
        output=output,
        family=entry.family(args),
        divisor=divisor,
        input_size=padded if entry.sized else None,
    )
    _check_sizes(built, channels, padded, factors, net)
    return replace(built, decoder=_decoder(built, entry.decoder(args), channels, padded))


def _class(arch: str) -> Callable[..., nn.Module]:
    # Imported late: MONAI takes seconds, which a listing of tasks need not wait for.
    if arch == "DynUNet":
        from domains.medical.backbones._dynunet import DynUNet

        return DynUNet
    import monai.networks.nets

    return getattr(monai.networks.nets, arch)


def _parameters(arch: str) -> Mapping[str, inspect.Parameter]:
    import monai.networks.nets

    return inspect.signature(getattr(monai.networks.nets, arch)).parameters


def upstream_defaults(arch: str) -> dict[str, Any]:
    """Return MONAI's own value of each argument that `NETS` gives another default."""
    found = {key: _parameters(arch)[key].default for key in NETS[arch].defaults}
    return {key: value for key, value in found.items() if value is not inspect.Parameter.empty}


def _check_arguments(arch: str, net: Mapping[str, Any]) -> None:
    taken = set(_parameters(arch))
    for key in net:
        if key in FROM_DATA:
            raise GraftError(f"net.{key} of {arch} follows from the data. Leave it out of the recipe's 'net'.")
        if key not in taken:
            raise unknown(f"argument of {arch} in 'net'", key, taken - set(FROM_DATA))
        if net[key] != NETS[arch].forced.get(key, net[key]):
            raise GraftError(
                f"net.{key} of {arch} is {net[key]!r}; here it has to be {NETS[arch].forced[key]!r}. Leave it out."
            )


def _affine(norm: Any) -> Any:  # noqa: ANN401
    """Give an instance norm its scale and shift, unless its options say otherwise."""
    name, options = (norm, {}) if isinstance(norm, str) else norm
    return (name, {"affine": True, **options}) if str(name).lower() == "instance" else norm


def _unfit(arch: str, verb: str, net: Mapping[str, Any], error: Exception) -> GraftError:
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return GraftError(f"{arch} cannot {verb} with net {dict(net)}: {text}. Mend the recipe's 'net'.")


def _check_sizes(
    built: Built, channels: int, padded: tuple[int, ...], factors: tuple[int, ...], net: Mapping[str, Any]
) -> None:
    """Refuse a patch or arguments with which the network cannot run, by running it on tensors without content."""
    try:
        shape = _mapped(built, channels, padded)
    except _RUN_ERRORS as error:
        smallest = (2 * factors[0], *factors[1:])
        if padded != factors or not _runs(built, channels, smallest):
            raise _unfit(built.arch, "run", net, error) from error
        raise GraftError(
            f"A patch of {padded} voxels is too small for {built.arch}: its innermost map would be a single voxel, "
            f"which an instance norm cannot take. The smallest patch is {smallest}, in any order of the axes: enlarge "
            "the data's patch_size, or take fewer levels with 'net'."
        ) from error
    if shape != padded:
        raise GraftError(
            f"{built.arch} with net {dict(net)} maps a patch of {padded} voxels to {shape}, and each voxel needs a "
            "label. Mend the recipe's 'net' (as many levels up as down; a DynUNet's first stride is 1)."
        )


_RUN_ERRORS = (RuntimeError, ValueError, TypeError)


def _runs(built: Built, channels: int, sides: tuple[int, ...]) -> bool:
    try:
        _mapped(built, channels, sides)
    except _RUN_ERRORS:
        return False
    return True


def _decoder(built: Built, names: Sequence[str], channels: int, sides: tuple[int, ...]) -> tuple[tuple[str, int], ...]:
    """Return the modules with the channels of their outputs."""
    with outputs_of(built.model, names) as seen:
        _mapped(built, channels, sides)
    return tuple((name, seen[name].shape[1]) for name in names)


def _mapped(built: Built, channels: int, sides: tuple[int, ...]) -> tuple[int, ...]:
    """Return the sides of the output for an input of these sides."""
    x = torch.empty((1, channels, *sides), device="meta")
    with torch.no_grad():
        for part in (built.model, built.output):
            state = {name: tensor.to("meta") for name, tensor in (*part.named_parameters(), *part.named_buffers())}
            x = torch.func.functional_call(part, state, (x,))
    return tuple(x.shape[2:])
