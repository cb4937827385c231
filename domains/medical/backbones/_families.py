"""Which modules of the MONAI networks carry which role, and their blocks in the order in which they run."""

from __future__ import annotations

from typing import Any

from torch import nn

from common.roles import NORMS, Family, Grid, Pattern, TokenStream

LINEAR = (nn.Linear,)
CONV = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORM = (Pattern(r".*", NORMS),)
_NO_TOKENS = "its blocks are convolutions and read no tokens"


def unet(levels: int) -> Family:
    """Return the family of a `UNet`, whose levels lie in each other, each in the skip connection of the one above.

    Args:
        levels: Levels of resolution, the innermost included: the length of `channels`.
    """
    level = r"model(\.1\.submodule)"
    return Family(
        name="unet",
        block=rf"{level}*\.0|{level}{{{levels - 1}}}|{level}+\.2",
        roles={
            # Without residual units the level is the convolution itself.
            "stem": (Pattern(r"model\.0\.(conv|conv\.unit0\.conv|residual)", CONV),),
            "conv": (
                Pattern(r"model\.0\.conv\.unit[1-9]\d*\.conv", CONV),
                Pattern(r"model\.1\.submodule(\.\w+)*\.(conv|residual)", CONV),
            ),
            "norm": _NORM,
        },
        tokens=_NO_TOKENS,
    )


SEGRESNET = Family(
    name="segresnet",
    # The convolutions of `up_samples`, between two blocks of the way up, belong to no block.
    block=r"(down|up)_layers\.\d+",
    roles={
        "stem": (Pattern(r"convInit\.conv", CONV),),
        "conv": (
            Pattern(r"down_layers\.\d+\.0\.conv", CONV),
            Pattern(r"(down|up)_layers\.\d+\.\d+\.conv[12]\.conv", CONV),
            Pattern(r"up_samples\.\d+\.0\.conv", CONV),
            Pattern(r"up_samples\.\d+\.1\.(deconv|pixelshuffle\.conv_block)", CONV),
        ),
        "norm": _NORM,
    },
    tokens=_NO_TOKENS,
)

# The first block of the way down reads the image as the patch embedding does, through two of its convolutions.
_UNETR_STEM = Pattern(r"encoder1\.layer\.conv[13]\.conv", CONV)
_UNETR_CONV = (
    Pattern(r"encoder1\.layer\.conv2\.conv", CONV),
    Pattern(r"decoder\d\.transp_conv\.conv", CONV),
    Pattern(r"decoder\d\.conv_block\.conv[123]\.conv", CONV),
)


def _unetr_grid(model: Any, layer: str) -> Grid | None:  # noqa: ANN401  (MONAI's attributes)
    return Grid(sides=tuple(model.feat_size)) if layer.startswith("vit.blocks.") else None


def _swin_grid(model: Any, layer: str) -> Grid | None:  # noqa: ANN401  (MONAI's attributes)
    """Return the axes that the tokens keep before the feed-forward network; attention reads windows."""
    return Grid(sides=(0,) * len(model.swinViT.patch_size)) if ".mlp." in layer else None


UNETR = Family(
    name="unetr",
    block=r"vit\.blocks\.\d+|encoder\d|decoder\d",
    stream=r"vit\.blocks\.\d+",
    grid=_unetr_grid,
    roles={
        # With `proj_type: perceptron` the embedding is a reordering and a linear layer.
        "stem": (Pattern(r"vit\.patch_embedding\.patch_embeddings(\.1)?", (*CONV, *LINEAR)), _UNETR_STEM),
        "attention_qkv": (Pattern(r"vit\.blocks\.\d+\.attn\.qkv", LINEAR),),
        "attention_out": (Pattern(r"vit\.blocks\.\d+\.attn\.out_proj", LINEAR),),
        "ffn_in": (Pattern(r"vit\.blocks\.\d+\.mlp\.linear1", LINEAR),),
        "ffn_out": (Pattern(r"vit\.blocks\.\d+\.mlp\.linear2", LINEAR),),
        "conv": (
            *_UNETR_CONV,
            Pattern(r"encoder[2-4]\.transp_conv_init\.conv", CONV),
            Pattern(r"encoder[2-4]\.blocks\.\d+(\.0)?\.conv", CONV),
            Pattern(r"encoder[2-4]\.blocks\.\d+\.1\.conv[123]\.conv", CONV),
        ),
        "norm": _NORM,
    },
    tokens=TokenStream(
        blocks=r"vit\.blocks\.\d+",
        alone="its attention is computed by hand, where no key can be added",
    ),
    fused=r"vit\.blocks\.\d+\.attn\.qkv",
)

SWIN_UNETR = Family(
    name="swin_unetr",
    block=r"swinViT\.layers\d\.0\.blocks\.\d+|encoder\d+|decoder\d",
    stream=r"swinViT\.layers\d\.0\.blocks\.\d+",
    grid=_swin_grid,
    roles={
        "stem": (Pattern(r"swinViT\.patch_embed\.proj", CONV), _UNETR_STEM),
        "attention_qkv": (Pattern(r"swinViT\.layers\d\.0\.blocks\.\d+\.attn\.qkv", LINEAR),),
        "attention_out": (Pattern(r"swinViT\.layers\d\.0\.blocks\.\d+\.attn\.proj", LINEAR),),
        "ffn_in": (Pattern(r"swinViT\.layers\d\.0\.blocks\.\d+\.mlp\.linear1", LINEAR),),
        "ffn_out": (Pattern(r"swinViT\.layers\d\.0\.blocks\.\d+\.mlp\.linear2", LINEAR),),
        "conv": (
            *_UNETR_CONV,
            Pattern(r"swinViT\.layers\dc\.0\.layer\.conv[123]\.conv", CONV),  # with `use_v2`
            Pattern(r"encoder([2-9]|10)\.layer\.conv[123]\.conv", CONV),
        ),
        "norm": _NORM,
    },
    tokens="it attends within windows of a grid, in which a prompt has no place",
    fused=r"swinViT\.layers\d\.0\.blocks\.\d+\.attn\.qkv",
)

DYNUNET = Family(
    name="dynunet",
    block=r"input_block|downsamples\.\d+|bottleneck|upsamples\.\d+",
    roles={
        "stem": (Pattern(r"input_block\.conv[13]\.conv", CONV),),
        "conv": (
            Pattern(r"input_block\.conv2\.conv", CONV),
            Pattern(r"(downsamples\.\d+|bottleneck)\.conv[123]\.conv", CONV),
            Pattern(r"upsamples\.\d+\.transp_conv\.conv", CONV),
            Pattern(r"upsamples\.\d+\.conv_block\.conv[12]\.conv", CONV),
        ),
        "norm": _NORM,
    },
    tokens=_NO_TOKENS,
)
