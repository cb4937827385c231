"""Image backbones: the starters, and any timm model, with the roles of their modules and their input facts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import timm.data
import torch
from safetensors.torch import load_file
from timm.layers.attention import Attention, AttentionRope
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from common.errors import GraftError, suggest, unknown
from common.images.starters import STARTERS
from common.roles import NORMS, Family, Grid, Pattern, TokenStream
from common.task import Backbone

LINEAR = (nn.Linear,)
CONV = (nn.Conv2d,)


def _dense(module: nn.Module) -> bool:
    """A convolution over all channels; in a grouped one there is little for a low-rank change to save."""
    return getattr(module, "groups", 1) == 1


def _pointwise(module: nn.Module) -> bool:
    return _dense(module) and getattr(module, "kernel_size", None) == (1, 1)


def _fused(module: nn.Module) -> bool:
    """An attention that hands its scores to torch."""
    return getattr(module, "fused_attn", False) is True


_NORM = (Pattern(r".*", NORMS),)
_ATTENTION = (Attention, AttentionRope, BeitAttention, EvaAttention)
_NO_TOKENS = "its blocks are convolutions and read no tokens"


def _vit_grid(model: Any, layer: str) -> Grid:  # noqa: ANN401  (timm's attributes)
    return Grid(sides=tuple(model.patch_embed.grid_size), prefix=int(model.num_prefix_tokens))


def _swin_grid(model: nn.Module, layer: str) -> Grid | None:
    """Return the block's grid, which its feed-forward network reads row by row; its attention reads windows."""
    block, inner, _ = layer.partition(".mlp.")
    resolution: Any = model.get_submodule(block).input_resolution if inner else None
    return None if resolution is None else Grid(sides=tuple(resolution))


def _convnext_grid(model: nn.Module, layer: str) -> Grid:
    return Grid(sides=(0, 0))


VIT = Family(
    name="vit",
    block=r"blocks\.\d+",
    stream=r"blocks\.\d+",
    grid=_vit_grid,
    roles={
        "stem": (Pattern(r"patch_embed\.proj", CONV),),
        "attention_qkv": (Pattern(r"blocks\.\d+\.attn\.(qkv|q_proj|k_proj|v_proj)", LINEAR),),
        "attention_out": (Pattern(r"blocks\.\d+\.attn\.proj", LINEAR),),
        "ffn_in": (Pattern(r"blocks\.\d+\.mlp\.(fc1|fc1_g|fc1_x|w12)", LINEAR),),
        "ffn_out": (Pattern(r"blocks\.\d+\.mlp\.(fc2|w3)", LINEAR),),
        "norm": _NORM,
    },
    tokens=TokenStream(
        blocks=r"blocks\.\d+",
        attention=Pattern(r"blocks\.\d+\.attn", _ATTENTION, _fused),
        rotary=("rope", "cat"),  # of EVA
        biased=True,  # in BEiT
    ),
    projections={f"attention_{share}": rf"blocks\.\d+\.attn\.{share}_proj" for share in "qkv"},
    fused=r"blocks\.\d+\.attn\.qkv",
)
SWIN = Family(
    name="swin",
    block=r"layers\.\d+\.blocks\.\d+",
    stream=r"layers\.\d+\.blocks\.\d+",
    grid=_swin_grid,
    roles={
        "stem": (Pattern(r"patch_embed\.proj", CONV),),
        "attention_qkv": (Pattern(r"layers\.\d+\.blocks\.\d+\.attn\.qkv", LINEAR),),
        "attention_out": (Pattern(r"layers\.\d+\.blocks\.\d+\.attn\.proj", LINEAR),),
        "ffn_in": (Pattern(r"layers\.\d+\.blocks\.\d+\.mlp\.fc1", LINEAR),),
        "ffn_out": (Pattern(r"layers\.\d+\.blocks\.\d+\.mlp\.fc2", LINEAR),),
        "norm": _NORM,
    },
    tokens="it attends within windows of a grid, in which a prompt has no place",
    fused=r"layers\.\d+\.blocks\.\d+\.attn\.qkv",
)
CONVNEXT = Family(
    name="convnext",
    block=r"stages\.\d+\.blocks\.\d+",
    grid=_convnext_grid,
    roles={
        "stem": (Pattern(r"stem\.\d+", CONV),),
        "ffn_in": (Pattern(r"stages\.\d+\.blocks\.\d+\.mlp\.fc1", (*LINEAR, *CONV)),),
        "ffn_out": (Pattern(r"stages\.\d+\.blocks\.\d+\.mlp\.fc2", (*LINEAR, *CONV)),),
        "conv": (Pattern(r"stages\.\d+\.downsample\.1", CONV, _dense),),
        "norm": _NORM,
    },
    tokens=_NO_TOKENS,
)
EFFICIENTNET = Family(
    name="efficientnet",
    block=r"blocks\.\d+\.\d+",
    roles={
        "stem": (Pattern(r"conv_stem", CONV),),
        "attention_qkv": (Pattern(r"blocks\.\d+\.\d+\.attn\.(query|key|value)\.proj", CONV, _pointwise),),
        "attention_out": (Pattern(r"blocks\.\d+\.\d+\.attn\.output\.proj", CONV, _pointwise),),
        "conv": (
            Pattern(r"blocks\.\d+\.\d+\.(conv|conv_pw|conv_pwl|conv_exp|pw_exp\.conv|pw_proj\.conv)", CONV, _pointwise),
            Pattern(r"conv_head", CONV, _pointwise),
        ),
        "norm": _NORM,
    },
    tokens=_NO_TOKENS,
    projections={
        f"attention_{name[0]}": rf"blocks\.\d+\.\d+\.attn\.{name}\.proj" for name in ("query", "key", "value")
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
    tokens=_NO_TOKENS,
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
# What timm counts to the classifier, so that `forward_features` leaves it out. A last norm there is applied to the
# tokens; the rest would be carried along unused, so it is taken off.
LAST_NORMS = ("fc_norm", "head.norm")
UNUSED = {"VisionTransformer": ("attn_pool",), "Eva": ("attn_pool",), "MobileNetV3": ("conv_head", "norm_head")}
CLASSIFIERS = ("head.", "head_dist.", "classifier.", "fc.")


@dataclass(frozen=True, kw_only=True)
class ImageBackbone(Backbone):
    """A backbone without a classifier, and what its input must look like.

    Attributes:
        mean: Per-channel mean that inputs in [0, 1] are normalised by.
        std: Per-channel standard deviation.
        width: Channels of its features.
        prefix_tokens: Class and register tokens before the patch tokens; 0 for feature maps.
        plain: Whether it is just what `timm.create_model(name, num_classes=0)` builds.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    width: int
    prefix_tokens: int
    plain: bool


def build(
    name: str,
    image_size: int,
    *,
    pretrained: bool = True,
    weights: str | None = None,
    depth: int | None = None,
) -> ImageBackbone:
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
        if weights is not None:
            raise GraftError(f"'{name}' brings its own weights; leave out 'weights', or name a timm model.")
        starter = STARTERS[name]
        model = _create(starter.arch, image_size, starter.model_args(image_size))
        if pretrained:
            model.load_state_dict(starter.load(image_size), strict=False)
        mean, std = starter.mean, starter.std
    else:
        model = _timm_model(name, image_size, pretrained=pretrained, weights=weights)
        facts = timm.data.resolve_model_data_config(model)
        mean, std = tuple(facts["mean"]), tuple(facts["std"])
    if not pretrained and weights is None:
        _open_branches(model)
    if depth is not None:
        _truncate(model, name, depth)
    changed = _adjust(model)
    return ImageBackbone(
        name=name,
        model=model.eval(),
        family=FAMILIES.get(type(model).__name__),
        mean=mean,
        std=std,
        width=int(model.num_features),
        prefix_tokens=int(getattr(model, "num_prefix_tokens", 0)),
        plain=not (changed or name in STARTERS or weights is not None or depth is not None),
    )


def _timm_model(name: str, image_size: int, *, pretrained: bool, weights: str | None) -> Any:  # noqa: ANN401
    if not timm.is_model(name):
        near = suggest(name, [*STARTERS, *timm.list_models()]).split(" Allowed:")[0]
        raise GraftError(
            f"Unknown image backbone '{name}'.{near} Use a starter ({', '.join(STARTERS)}) or a timm model."
        )
    arch, _, tag = name.partition(".")
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{arch}.*")]
    if tag and tag not in tags:
        raise unknown(f"weights of timm model {arch}", tag, tags)
    if weights is None:
        return _create(name, image_size, {}, pretrained=pretrained)
    model = _create(name, image_size, {})
    _load_file(model, name, image_size, Path(weights))
    return model


def _load_file(model: nn.Module, name: str, image_size: int, path: Path) -> None:
    """Load a local state dict; a classifier in it is left out, everything else must fit."""
    unused = tuple(f"{part}." for part in UNUSED.get(type(model).__name__, ()))
    own = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(unused)}
    state = read_weights(path)
    state = {key: tensor for key, tensor in state.items() if key in own or not key.startswith((*CLASSIFIERS, *unused))}
    wrong = sorted(set(own) ^ set(state)) or [key for key in own if own[key].shape != state[key].shape]
    if wrong:
        raise GraftError(
            f"{path} does not fit timm model '{name}' at {image_size} px: {len(wrong)} tensors differ, such as "
            f"{wrong[0]}. Give the weights of this model and image size."
        )
    model.load_state_dict(state, strict=False)  # all but the unused parts, as was just checked


def _adjust(model: nn.Module) -> bool:
    """Make every module of a timm model one that runs, and runs as a module; the tokens stay as they are.

    Returns:
        Whether anything was changed.
    """
    modules: list[Any] = list(model.modules())
    separate = [module for module in modules if getattr(module, "qkv_bias_separate", True) is False]
    separate = [module for module in separate if getattr(module, "q_bias", None) is not None]
    for module in separate:
        # BEiT, EVA and Swin V2 would read the weight of `qkv` without calling it, past any adapter on it.
        module.qkv_bias_separate = True
    unused = [name for name in UNUSED.get(type(model).__name__, ()) if not isinstance(_part(model, name), nn.Identity)]
    for name in unused:
        setattr(model, name, nn.Identity())
    return bool(separate or unused)


def _open_branches(model: nn.Module) -> None:
    """Let gradients through a random start: ResNet and Swin V2 begin with residual branches that are scaled to zero."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, NORMS) and isinstance(weight, Tensor) and not weight.any():
            nn.init.ones_(weight)


def _create(name: str, image_size: int, args: dict[str, Any], *, pretrained: bool = False) -> Any:  # noqa: ANN401
    """Create a timm model without classifier, at the wanted input size where its architecture is built for one."""
    options: dict[str, Any] = {"img_size": image_size} if takes_size(name) else {}
    try:
        model = timm.create_model(name, pretrained=pretrained, num_classes=0, **(options | args))
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
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", (1,))[0]
    if image_size % patch:
        below = max(image_size // patch, 1) * patch
        raise GraftError(
            f"image_size {image_size} is no multiple of {patch}, the patch side of '{name}': a part of each image "
            f"would go unseen. Take {below} or {below + patch}."
        )
    return model


def takes_size(name: str) -> bool:
    """Whether a timm model is built for one input size, which `timm.create_model` then takes as `img_size`."""
    from timm.models import model_entrypoint

    return timm.is_model(name) and model_entrypoint(name).__module__.rpartition(".")[2] in SIZED


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a local `.safetensors` or torch file, without unpickling code.

    Raises:
        GraftError: No such file, one that is damaged or would run code, or no state dict.
    """
    if not path.is_file():
        raise GraftError(f"There is no weights file {path}. Give a .safetensors or .pth file.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle fails in any of a dozen ways
        raise GraftError(
            f"{path} cannot be read: it is damaged, or holds more than tensors, which Graft never loads. "
            "Save the model's state_dict as .safetensors."
        ) from error
    for key in ("state_dict", "model", "model_state"):
        state = state.get(key, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise GraftError(f"{path} holds no state dict of names and tensors. Save model.state_dict() of a timm model.")
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


def last_norm(model: nn.Module) -> str:
    """Return the name of a norm behind `forward_features`, which `tokens` applies; empty without one."""
    return next((name for name in LAST_NORMS if not isinstance(_part(model, name), nn.Identity)), "")


def _part(model: nn.Module, name: str) -> nn.Module:
    """Return a submodule, also through PEFT's wrapper; the identity where there is none."""
    found: Any = model
    for part in name.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, nn.Module) else nn.Identity()


def tokens(model: Any, images: Tensor) -> Tensor:  # noqa: ANN401  (any timm model, bare or wrapped)
    """Run a timm backbone and return its features as tokens.

    Args:
        model: The backbone, bare or with adapters.
        images: Normalised images, (B, 3, H, W).

    Returns:
        (B, N, C): prefix tokens first where there are any; the positions of a feature map in row order.
    """
    out = model.forward_features(images)
    if norm := last_norm(model):
        out = _part(model, norm)(out)
    if out.ndim == 3:
        return out
    channels_last = out.shape[-1] == model.num_features and out.shape[1] != model.num_features
    return out.flatten(1, 2) if channels_last else out.flatten(2).transpose(1, 2)
