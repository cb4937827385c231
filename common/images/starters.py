"""The starter checkpoints of the catalog, converted to state dicts of timm models.

Both come from packages with weights in another layout. Nothing of the packages is run: an ONNX graph is
read as data, a PyTorch file with `weights_only=True`.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from common import artifacts
from common.errors import GraftError

if TYPE_CHECKING:
    import onnx

_FOCUS = "vit-small-patch14-focus"
_LITE0 = "efficientnet-lite0"
_PATCH = 14
_BLOCKS = 12
_HEADS = ("attention.attention.query", "attention.attention.key", "attention.attention.value")
_FOCUS_LINEARS = {"attention.output.dense": "attn.proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
# Raise this when the conversion below changes: it is part of the name of the converted file.
_FOCUS_CONVERSION = 1


@dataclass(frozen=True, kw_only=True)
class Starter:
    """A checkpoint of the catalog and the timm model that takes it.

    Attributes:
        name: Name of the catalog row.
        arch: Name of the timm model.
        mean: Mean of each RGB channel (images scaled to 0..1) that the weights expect to be subtracted.
        std: Standard deviation of each channel that they expect to be divided by.
        image_size: Default side length of the square input, pixels.
        patch: The side length has to be a multiple of this; 1 where any size goes.
        read: Reads the state dict for an image size; use `load`, which checks the size first.
    """

    name: str
    arch: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_size: int
    patch: int
    read: Callable[[int], dict[str, Tensor]]

    def load(self, image_size: int | None = None) -> dict[str, Tensor]:
        """Read the state dict of the timm model at an image size, fetching the file first where needed.

        Args:
            image_size: Side length of the square input, pixels; by default the starter's own.

        Raises:
            GraftError: The size does not fit the model, or the file cannot be had.
        """
        return self.read(self._checked(image_size))

    def model_args(self, image_size: int | None = None) -> dict[str, int]:
        """Return the keyword arguments with which `timm.create_model(arch, ...)` fits `load(image_size)`.

        Raises:
            GraftError: The size does not fit the model.
        """
        size = self._checked(image_size)
        # A network without patches is the same at any size.
        return {"img_size": size} if self.patch > 1 else {}

    def _checked(self, image_size: int | None) -> int:
        size = self.image_size if image_size is None else image_size
        _check_size(self.name, size, self.patch)
        return size


def vit_small_patch14_focus(image_size: int) -> dict[str, Tensor]:
    """Read the ViT-S/14 as a state dict of timm's `vit_small_patch14_dinov2`.

    The position grid (37 x 37) is resized to the image size by bicubic interpolation without antialiasing, as the model
    itself did; timm's own resize is antialiased and gives other tokens. So build the model at this size.

    Args:
        image_size: Side length of the square input, pixels, a multiple of 14.

    Returns:
        All tensors of the model without a classifier, float32; `pos_embed` is (1, 1 + (image_size / 14)^2, 384).

    Raises:
        GraftError: The size is no multiple of 14, or the file cannot be had or is not the expected graph.
    """
    from safetensors.torch import load_file

    _check_size(_FOCUS, image_size, _PATCH)
    state = load_file(_converted_focus() / "model.safetensors")
    cls, grid = state["pos_embed"].split([1, state["pos_embed"].shape[1] - 1], dim=1)
    state["pos_embed"] = torch.cat([cls, _resize_grid(grid, image_size // _PATCH)], dim=1)
    return state


def efficientnet_lite0(image_size: int = 224) -> dict[str, Tensor]:
    """Read the ImageNet CNN as a state dict of timm's `tf_efficientnet_lite0`, its 1000-class `classifier` included.

    Args:
        image_size: Not used; the network takes any size.

    Raises:
        GraftError: The file cannot be had, or does not fit the model.
    """
    import timm

    (member,) = artifacts.row(_LITE0).members
    # The row's sha256 was checked, and `weights_only` builds nothing but tensors and plain containers.
    given = torch.load(io.BytesIO(artifacts.read_member(_LITE0, member)), map_location="cpu", weights_only=True)
    with torch.device("meta"):
        wanted = timm.create_model(STARTERS[_LITE0].arch).state_dict()
    if len(given) != len(wanted):
        raise GraftError(f"'{_LITE0}' holds {len(given)} tensors and {STARTERS[_LITE0].arch} has {len(wanted)}.")
    # Both list the same layers in the same order under different names.
    state: dict[str, Tensor] = {}
    for (source, tensor), (name, like) in zip(given.items(), wanted.items(), strict=True):
        if tensor.shape != like.shape:
            raise GraftError(
                f"'{_LITE0}': {source} is {tuple(tensor.shape)} and {name} of {STARTERS[_LITE0].arch} is "
                f"{tuple(like.shape)}; use the timm version that Graft asks for."
            )
        state[name] = tensor
    return state


def _check_size(name: str, size: int, patch: int) -> None:
    if size < patch or size % patch:
        below = max(size // patch, 1) * patch
        raise GraftError(
            f"The image size {size} does not fit '{name}': it has to be a multiple of {patch}; "
            f"take {below} or {below + patch}."
        )


def _converted_focus() -> Path:
    """Return the folder of the converted ViT; converting takes seconds, so it is done once."""
    digest = artifacts.row(_FOCUS).sha256[:12]
    return artifacts.prepared(f"{_FOCUS}-{digest}-{_FOCUS_CONVERSION}", _convert_focus)


def _convert_focus(folder: Path) -> None:
    import onnx
    from safetensors.torch import save_file

    (member,) = artifacts.row(_FOCUS).members
    graph = onnx.load_from_string(artifacts.read_member(_FOCUS, member)).graph
    save_file(_focus_state(graph), folder / "model.safetensors")


def _focus_state(graph: onnx.GraphProto) -> dict[str, Tensor]:
    """Convert the backbone of the ONNX graph; its decoder is left out."""
    from onnx import numpy_helper

    stored = {tensor.name: tensor for tensor in graph.initializer}
    nodes = {node.name: node for node in graph.node}

    def tensor(name: str) -> Tensor:
        if name not in stored:
            raise GraftError(f"The graph of '{_FOCUS}' has no tensor '{name}': fetch the file its row names.")
        return torch.from_numpy(numpy_helper.to_array(stored[name]).copy())

    def weight(node_name: str) -> Tensor:
        # The exporter dropped the names of matrices, so each is found as the second input of its own node, transposed.
        # Never by order: the graph holds key, value, query.
        if node_name not in nodes:
            raise GraftError(f"The graph of '{_FOCUS}' has no node '{node_name}': fetch the file its row names.")
        return tensor(nodes[node_name].input[1]).T

    def anonymous(shape: tuple[int, ...]) -> Tensor:
        found = [name for name, value in stored.items() if name.startswith("onnx::") and tuple(value.dims) == shape]
        if len(found) != 1:
            raise GraftError(f"The graph of '{_FOCUS}' has {len(found)} unnamed tensors of shape {shape} and not 1.")
        return tensor(found[0])

    state = {
        "cls_token": tensor("backbone.embeddings.cls_token"),
        "pos_embed": torch.cat([anonymous((1, 1, 384)), anonymous((1, 37 * 37, 384))], dim=1),
        "patch_embed.proj.weight": tensor("backbone.embeddings.patch_embeddings.projection.weight"),
        "patch_embed.proj.bias": tensor("backbone.embeddings.patch_embeddings.projection.bias"),
        "norm.weight": tensor("backbone.layernorm.weight"),
        "norm.bias": tensor("backbone.layernorm.bias"),
    }
    for index in range(_BLOCKS):
        state |= _focus_block(index, tensor, weight)
    return {name: value.contiguous() for name, value in state.items()}


def _focus_block(index: int, tensor: Callable[[str], Tensor], weight: Callable[[str], Tensor]) -> dict[str, Tensor]:
    source, target = f"backbone.encoder.layer.{index}", f"blocks.{index}"
    matrices = {
        name: weight(f"/backbone/encoder/layer.{index}/{name.replace('.', '/')}/MatMul")
        for name in (*_HEADS, *_FOCUS_LINEARS)
    }
    state = {
        f"{target}.attn.qkv.weight": torch.cat([matrices[head] for head in _HEADS]),
        f"{target}.attn.qkv.bias": torch.cat([tensor(f"{source}.{head}.bias") for head in _HEADS]),
    }
    for old, new in _FOCUS_LINEARS.items():
        state[f"{target}.{new}.weight"] = matrices[old]
        state[f"{target}.{new}.bias"] = tensor(f"{source}.{old}.bias")
    for which in ("1", "2"):
        state[f"{target}.norm{which}.weight"] = tensor(f"{source}.norm{which}.weight")
        state[f"{target}.norm{which}.bias"] = tensor(f"{source}.norm{which}.bias")
        state[f"{target}.ls{which}.gamma"] = tensor(f"{source}.layer_scale{which}.lambda1")
    return state


def _resize_grid(grid: Tensor, side: int) -> Tensor:
    """Resize position embeddings (1, n*n, C) to (1, side*side, C)."""
    old = round(grid.shape[1] ** 0.5)
    image = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    image = functional.interpolate(image, size=(side, side), mode="bicubic", align_corners=False, antialias=False)
    return image.permute(0, 2, 3, 1).reshape(1, side * side, -1)


STARTERS: Mapping[str, Starter] = MappingProxyType(
    {
        starter.name: starter
        for starter in (
            Starter(
                name=_FOCUS,
                arch="vit_small_patch14_dinov2",
                mean=(0.485, 0.456, 0.406),
                std=(0.229, 0.224, 0.225),
                image_size=224,
                patch=_PATCH,
                read=vit_small_patch14_focus,
            ),
            Starter(
                name=_LITE0,
                arch="tf_efficientnet_lite0",
                mean=(0.5, 0.5, 0.5),
                std=(0.5, 0.5, 0.5),
                image_size=224,
                patch=1,
                read=efficientnet_lite0,
            ),
        )
    }
)
"""The vision starters by catalog name."""
