"""Weights of a whole network: from a file to its backbone and its output layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from common.errors import GraftError
from common.starters import is_starter_file
from domains.medical.backbones._nets import NETS, Built
from domains.medical.starters import classes_of, load_segmenter


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What a file holds.

    Attributes:
        backbone: The network without its output layer, under MONAI's names.
        head: The output layer, under its own names; empty where the file has none.
        classes: The classes that the output layer tells apart, in its order; empty where the file does not say.
    """

    backbone: Mapping[str, Tensor]
    head: Mapping[str, Tensor] = field(default_factory=dict)
    classes: tuple[str, ...] = ()


def read(path: Path, arch: str) -> Weights:
    """Read a starter file (see `common.starters`), or a state dict of the whole network.

    Args:
        path: A `.safetensors` or torch file; nothing in it is run.
        arch: A name of `NETS`.

    Raises:
        GraftError: No such file, one that is damaged or would run code, or no state dict.
    """
    # Imported late: timm takes seconds, and the networks here are not its.
    from common.images.backbones import read_weights

    if is_starter_file(path):
        starter = load_segmenter(path)
        return Weights(backbone=starter.backbone, head=starter.head, classes=classes_of(starter))
    state = read_weights(path)
    if state and all(name.startswith("module.") for name in state):  # written from within DataParallel
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    state = {name: tensor for name, tensor in state.items() if not re.fullmatch(NETS[arch].ignored, name)}
    output = f"{NETS[arch].output}."
    return Weights(
        backbone={name: tensor for name, tensor in state.items() if not name.startswith(output)},
        head={name.removeprefix(output): tensor for name, tensor in state.items() if name.startswith(output)},
    )


def load(built: Built, weights: Weights, source: str) -> dict[str, Tensor]:
    """Put the backbone's weights into a network, all of them or none.

    Args:
        built: The network.
        weights: What `read` returned.
        source: What to call the weights in an error.

    Returns:
        The output layer's weights, float32, to be loaded by a head of the same classes; empty where there are none.

    Raises:
        GraftError: The tensors are not exactly the network's.
    """
    own = built.model.state_dict()
    state = _with_norms(weights.backbone, built.model)
    wrong = sorted(set(own) ^ set(state)) or [name for name in own if own[name].shape != state[name].shape]
    if wrong:
        name = wrong[0]
        shapes = [tuple(side[name].shape) if name in side else "missing" for side in (state, own)]
        raise GraftError(
            f"{source} does not fit this {built.arch}: {len(wrong)} tensors differ, such as {name} ({shapes[0]} in the "
            f"file, {shapes[1]} here). Give 'net', the input channels and the patch_size that it was trained with."
        )
    built.model.load_state_dict(state)
    head = _with_norms(weights.head, built.output) if weights.head else {}
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in head.items()}


def _with_norms(state: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Add a scale of one and a shift of zero for instance norms that had none when the weights were trained."""
    added: dict[str, Tensor] = {}
    for name, norm in module.named_modules():
        if isinstance(norm, _InstanceNorm) and norm.affine and f"{name}.weight" not in state:
            added |= {f"{name}.weight": torch.ones(norm.num_features), f"{name}.bias": torch.zeros(norm.num_features)}
    return {**state, **added}
