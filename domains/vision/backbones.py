"""Vision backbones: the starters, and any timm model, with the roles of their modules and their input facts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from common.errors import GraftError, suggest
from common.roles import NORMS, Family, Pattern
from common.task import Backbone
from domains.vision.starters import STARTERS

LINEAR = (nn.Linear,)
CONV = (nn.Conv2d,)


def _dense(module: nn.Module) -> bool:
    """A convolution over all channels; low-rank changes of grouped ones cannot be merged."""
    return getattr(module, "groups", 1) == 1


def _pointwise(module: nn.Module) -> bool:
    return _dense(module) and getattr(module, "kernel_size", None) == (1, 1)


_NORM = (Pattern(r".*", NORMS),)

VIT = Family(
    name="vit",
    block=r"blocks\.\d+",
    roles={
        "stem": (Pattern(r"patch_embed\.proj", CONV),),
        "attention_qkv": (Pattern(r"blocks\.\d+\.attn\.(qkv|q_proj|k_proj|v_proj)", LINEAR),),
        "attention_out": (Pattern(r"blocks\.\d+\.attn\.proj", LINEAR),),
        "ffn_in": (Pattern(r"blocks\.\d+\.mlp\.(fc1|fc1_g|fc1_x|w12)", LINEAR),),
        "ffn_out": (Pattern(r"blocks\.\d+\.mlp\.(fc2|w3)", LINEAR),),
        "norm": _NORM,
    },
)
SWIN = Family(
    name="swin",
    block=r"layers\.\d+\.blocks\.\d+",
    roles={
        "stem": (Pattern(r"patch_embed\.proj", CONV),),
        "attention_qkv": (Pattern(r"layers\.\d+\.blocks\.\d+\.attn\.qkv", LINEAR),),
        "attention_out": (Pattern(r"layers\.\d+\.blocks\.\d+\.attn\.proj", LINEAR),),
        "ffn_in": (Pattern(r"layers\.\d+\.blocks\.\d+\.mlp\.fc1", LINEAR),),
        "ffn_out": (Pattern(r"layers\.\d+\.blocks\.\d+\.mlp\.fc2", LINEAR),),
        "norm": _NORM,
    },
)
CONVNEXT = Family(
    name="convnext",
    block=r"stages\.\d+\.blocks\.\d+",
    roles={
        "stem": (Pattern(r"stem\.\d+", CONV),),
        "ffn_in": (Pattern(r"stages\.\d+\.blocks\.\d+\.mlp\.fc1", (*LINEAR, *CONV)),),
        "ffn_out": (Pattern(r"stages\.\d+\.blocks\.\d+\.mlp\.fc2", (*LINEAR, *CONV)),),
        "conv": (Pattern(r"stages\.\d+\.downsample\.1", CONV, _dense),),
        "norm": _NORM,
    },
)
EFFICIENTNET = Family(
    name="efficientnet",
    block=r"blocks\.\d+\.\d+",
    roles={
        "stem": (Pattern(r"conv_stem", CONV),),
        "conv": (Pattern(r"blocks\.\d+\.\d+\.(conv|conv_pw|conv_pwl|conv_exp)|conv_head", CONV, _pointwise),),
        "norm": _NORM,
    },
)
RESNET = Family(
    name="resnet",
    block=r"layer\d+\.\d+",
    roles={
        "stem": (Pattern(r"conv1(\.\d+)?", CONV),),
        "conv": (Pattern(r"layer\d+\.\d+\.(conv\d|downsample\.\d)", CONV, _dense),),
        "norm": _NORM,
    },
)

FAMILIES: dict[str, Family] = {
    "VisionTransformer": VIT,
    "VisionTransformerDistilled": VIT,
    "Beit": VIT,
    "Eva": VIT,
    "SwinTransformer": SWIN,
    "SwinTransformerV2": SWIN,
    "ConvNeXt": CONVNEXT,
    "EfficientNet": EFFICIENTNET,
    "MobileNetV3": EFFICIENTNET,
    "ResNet": RESNET,
}
# Modules of timm whose models are built for one input size and take it as `img_size`.
SIZED = ("vision_transformer", "deit", "beit", "eva", "swin_transformer", "swin_transformer_v2")


@dataclass(frozen=True, kw_only=True)
class VisionBackbone(Backbone):
    """A backbone without a classifier, and what its input must look like.

    Attributes:
        mean: Per-channel mean that inputs in [0, 1] are normalised by.
        std: Per-channel standard deviation.
        width: Channels of its features.
        prefix_tokens: Class and register tokens before the patch tokens; 0 for feature maps.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    width: int
    prefix_tokens: int


def build(
    name: str,
    image_size: int,
    *,
    pretrained: bool = True,
    weights: str | None = None,
    depth: int | None = None,
) -> VisionBackbone:
    """Build a pretrained backbone without classifier.

    Args:
        name: A starter of the catalog (`vit-small-patch14-focus`, `efficientnet-lite0`) or any timm model name.
        image_size: Side of the square input in pixels.
        pretrained: Load pretrained weights; False gives random ones (tests, from-scratch baselines).
        weights: A local `.safetensors` or `.pth` state dict for a timm model, instead of the hub's.
        depth: Keep only the first blocks of a ViT; None keeps all.

    Raises:
        GraftError: Unknown name, weights that cannot be had or do not fit, a depth or size that the model has not.
    """
    if name in STARTERS:
        starter = STARTERS[name]
        model = _create(starter.arch, image_size, starter.model_args(image_size))
        if pretrained:
            model.load_state_dict(starter.load(image_size), strict=False)
        mean, std = starter.mean, starter.std
    else:
        model = _timm_model(name, image_size, pretrained=pretrained, weights=weights)
        facts = timm.data.resolve_model_data_config(model)
        mean, std = tuple(facts["mean"]), tuple(facts["std"])
    if depth is not None:
        _truncate(model, name, depth)
    return VisionBackbone(
        name=name,
        model=model.eval(),
        family=FAMILIES.get(type(model).__name__),
        mean=mean,
        std=std,
        width=int(model.num_features),
        prefix_tokens=int(getattr(model, "num_prefix_tokens", 0)),
    )


def _timm_model(name: str, image_size: int, *, pretrained: bool, weights: str | None) -> Any:  # noqa: ANN401
    if not timm.is_model(name):
        near = suggest(name, [*STARTERS, *timm.list_models()]).split(" Allowed:")[0]
        raise GraftError(
            f"Unknown vision backbone '{name}'.{near} Use a starter ({', '.join(STARTERS)}) or a timm model."
        )
    if weights is None:
        return _create(name, image_size, {}, pretrained=pretrained)
    model = _create(name, image_size, {})
    state = read_weights(Path(weights))
    own = model.state_dict()
    classifier = ("head.", "classifier.", "fc.")
    state = {key: tensor for key, tensor in state.items() if key in own or not key.startswith(classifier)}
    wrong = sorted(set(own) ^ set(state)) or [k for k in own if own[k].shape != state[k].shape]
    if wrong:
        raise GraftError(
            f"{weights} does not fit timm model '{name}' at {image_size} px: {len(wrong)} tensors, e.g. {wrong[0]}."
        )
    model.load_state_dict(state)
    return model


def _create(name: str, image_size: int, args: dict[str, Any], *, pretrained: bool = False) -> Any:  # noqa: ANN401
    """Create a timm model without classifier, at the wanted input size where its architecture is built for one."""
    from timm.models import model_entrypoint

    sized = model_entrypoint(name).__module__.rpartition(".")[2] in SIZED
    options = {"img_size": image_size} if sized else {}
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **(options | args))
    except AssertionError as error:
        raise GraftError(
            f"timm model '{name}' cannot be built for {image_size} px: {error}. Choose another image_size."
        ) from error
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise GraftError(
            f"The weights of timm model '{name}' could not be had ({type(error).__name__}). Connect to the hub, give a "
            "local file with 'weights', or use a starter."
        ) from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a local `.safetensors` or torch file, without unpickling code.

    Raises:
        GraftError: No such file, or not a state dict.
    """
    if not path.is_file():
        raise GraftError(f"There is no weights file {path}. Give a .safetensors or .pth file.")
    if path.suffix == ".safetensors":
        return load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("state_dict", "model", "model_state"):
        state = state.get(key, state)
    return state


def _truncate(model: nn.Module, name: str, depth: int) -> None:
    blocks = getattr(model, "blocks", None)
    if FAMILIES.get(type(model).__name__) is not VIT or blocks is None:
        raise GraftError(
            f"depth={depth}: only ViT backbones can be cut after a block, and '{name}' is none. Leave it out."
        )
    if not 1 <= depth <= len(blocks):
        raise GraftError(f"depth={depth}: '{name}' has {len(blocks)} blocks; give 1 to {len(blocks)}.")
    model.blocks = blocks[:depth]


def tokens(model: nn.Module, images: Tensor) -> Tensor:
    """Run a timm backbone and return its features as tokens.

    Args:
        model: The backbone, bare or with adapters.
        images: Normalised images, (B, 3, H, W).

    Returns:
        (B, N, C): prefix tokens first where there are any; the positions of a feature map in row order.
    """
    out = model.forward_features(images)  # type: ignore[operator]
    if out.ndim == 3:
        return out
    channels_last = out.shape[-1] == model.num_features and out.shape[1] != model.num_features
    return out.flatten(1, 2) if channels_last else out.flatten(2).transpose(1, 2)
