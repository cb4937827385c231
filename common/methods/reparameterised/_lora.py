"""LoRA and its variants."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from common.errors import GraftError
from common.methods._base import CONVOLUTIONS, Calibration, OnModules, Plan, exact, listed, require_types
from common.methods.reparameterised._layers import at_least, in_unit

if TYPE_CHECKING:
    from collections.abc import Mapping

    from peft import PeftConfig
    from torch import Tensor, nn

    from common.roles import RoleMap

_EVA_TYPES = ("Linear",)
_TYPES = ("Linear", *CONVOLUTIONS, "Embedding")
_EVA_NOTE = (
    "A starts at what {batches} training batches show before the first step; until then, and where there are no data, "
    "it starts as by default."
)


# Containers of A and B, in PEFT's tuner and in Graft's.
_DOWN = {"lora_A", "lora_embedding_A", "wlora_A"}
_UP = {"lora_B", "lora_embedding_B", "wlora_B"}


_SHARES = ("queries", "keys", "values")


@dataclass(frozen=True, kw_only=True)
class LoRA(OnModules):
    """Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685).

    y = W x + s B A x with A of shape (rank, in) and B of shape (out, rank), B = 0 at the start; s = alpha / rank, or
    alpha / sqrt(rank) with `rslora` (Kalajdzievski 2023, arXiv 2312.03732). Trainable parameters: rank (in + out) for
    each adapted layer; a convolution's `in` is its inputs / groups times its kernel positions. A rank above a thin
    layer's own size, min(in, out), is lowered to it there, at the same s. The first choice where attention carries the
    model; merges without a trace.

    PEFT's own tuner does it. Where a target is a convolution that PEFT refuses or gets wrong (transposed, grouped,
    dilated, padded otherwise than with zeros, of a class of its own, or a 3D kernel of which only the last side exceeds
    one), or a layer that computes queries, keys and values at once and of which only some are wanted (the paper adapts
    `attention_q` and `attention_v`; each gets an A and B of its own), Graft's own does it for all targets: it runs each
    layer once with W + s B A in place of W, and has no dropout and the starts `default` and `gaussian` only.

    Args:
        rank: Rank of the change.
        alpha: Scale; None takes 2 * rank.
        dropout: Dropout on the adapter's input; each adapted layer then keeps its input twice for the backward pass.
        rslora: Scale by the square root of the rank.
        dora: Train the weight's magnitude apart from its direction (Liu et al. 2024, arXiv 2402.09353).
        init: `default` (Kaiming A, zero B), `gaussian`, `orthogonal`, or a start from the weight's own spectrum:
            `pissa` (arXiv 2404.02948), `olora` (arXiv 2406.01775); or `eva` (arXiv 2410.07170): the rows of A are the
            first right singular vectors of the layer's inputs in the first training batches, one rank for all layers;
            linear layers only, and until data are seen, and where there are none, as `default`.
        batches: Training batches that `eva` looks at.
        quantize: Hold the backbone's frozen linear layers in 8 bits (`int8`) or 4 (`nf4`: QLoRA, Dettmers et al. 2023,
            arXiv 2305.14314), by bitsandbytes. Weights take a quarter or an eighth of their memory, steps take longer,
            and the adapter cannot be merged into them; it loads on the whole weights too.
        b_rate: How many times the learning rate of A that of B is (LoRA+; Hayou et al. 2024, arXiv 2402.12354, who take
            16); 1 trains both alike.
        freeze_a: Train B alone (LoRA-FA; Zhang et al. 2023, arXiv 2308.03303): rank out parameters for each layer, and
            no layer keeps its input for A's gradient.
    """

    taxonomy: ClassVar[str] = "reparameterised"
    summary: ClassVar[str] = "low-rank change of the weight"
    source: ClassVar[str] = "arXiv 2106.09685"
    sized_by: ClassVar[str] = "rank"
    takes_thirds: ClassVar[bool] = True

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    init: Literal["default", "gaussian", "orthogonal", "pissa", "olora", "eva"] = "default"
    batches: int = 8
    quantize: Literal["int8", "nf4"] | None = None
    b_rate: float = 1.0
    freeze_a: bool = False

    @property
    def calibration(self) -> Calibration | None:
        """Look at the layers' inputs, where the start is made of them."""
        return Calibration(of="input_moment", batches=self.batches) if self.init == "eva" else None

    def calibrate(self, layers: Mapping[str, Any], seen: Mapping[str, Tensor]) -> None:
        """Set A to the first principal directions of the layers' inputs; see the base class."""
        import torch

        for name, layer in layers.items():
            down = layer.lora_A[layer.active_adapters[0]].weight
            directions = torch.linalg.eigh(seen[name]).eigenvectors.flip(1).T  # by rows, the strongest first
            down.data.copy_(directions[: len(down)])

    def plan(self, model: nn.Module, roles: RoleMap | None) -> Plan:
        """Take Linear, convolution and Embedding layers; see the base class."""
        at_least(1, "LoRA", rank=self.rank, batches=self.batches)
        in_unit("LoRA", dropout=self.dropout)
        if self.b_rate <= 0:
            raise GraftError(f"LoRA b_rate is {self.b_rate}; give a factor above 0, such as 16.")
        if self.dora and self.init in ("pissa", "olora"):
            raise GraftError(f"LoRA with dora cannot start from {self.init}, since no export could hold it. Drop one.")
        targets = self.select(model, roles)
        eva = self.init == "eva"
        require_types("LoRA with init 'eva'" if eva else "LoRA", model, targets, _EVA_TYPES if eva else _TYPES)
        thirds = self.thirds(roles)
        lowered = self._lowered(model, targets, thirds)
        notes = _say_lowered(self.rank, lowered)
        wrong = {name: _what_the_engine_gets_wrong(model.get_submodule(name)) for name in targets}
        wrong |= {name: " and ".join(_SHARES[third] for third in some) + " alone" for name, some in thirds.items()}
        wrong = {name: reason for name, reason in wrong.items() if reason}
        if not wrong:
            config = self._engine_config(targets, lowered)
            held = self._held_in_fewer_bits(model, roles, targets)
            notes = (_EVA_NOTE.format(batches=self.batches), *notes) if eva else notes
            notes = ("LoRA runs in PEFT's own tuner.", *notes)
            looks = ((self, tuple(targets)),) if eva else ()
            return Plan(peft_config=config, targets=targets, notes=notes, quantise=held, looks=looks)
        name, reason = next(iter(wrong.items()))
        if self.quantize is not None:
            raise GraftError(
                f"LoRA quantize '{self.quantize}' takes PEFT's own tuner, which cannot do '{name}' ({reason}). Set "
                "quantize to null, or choose other roles with 'on'."
            )
        self._refuse_what_weight_space_lacks(f"PEFT's own tuner cannot do '{name}' ({reason})")
        engine = f"LoRA runs in Graft's own tuner, since PEFT's cannot do {len(wrong)} of {len(targets)} layers: "
        engine += listed([f"{name} ({reason})" for name, reason in wrong.items()]) + "."
        return Plan(peft_config=self._own_config(targets, thirds), targets=targets, notes=(engine, *notes))

    @property
    def alone(self) -> str:
        """See the base class; what is said of A and B by their names would reach other parts' too."""
        own = self.freeze_a or self.b_rate != 1
        return "freeze_a and b_rate act on all LoRA layers of a run" if own else super().alone

    def after_attach(self, model: nn.Module) -> None:
        """Freeze A where that is wanted."""
        for name, parameter in model.named_parameters() if self.freeze_a else ():
            if not _DOWN.isdisjoint(name.split(".")):
                parameter.requires_grad_(False)

    def rate_factor(self, name: str) -> float:
        """Return B's own factor."""
        return 1.0 if _UP.isdisjoint(name.split(".")) else self.b_rate

    @property
    def _scale(self) -> float:
        alpha = self.alpha if self.alpha is not None else 2 * self.rank
        return alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def _lowered(
        self, model: nn.Module, targets: Mapping[str, str], thirds: Mapping[str, tuple[int, ...]]
    ) -> dict[str, int]:
        """Return the rank of every layer that is too thin for the wanted one."""
        from common.tuners import matrix_shape

        shapes = {name: matrix_shape(model.get_submodule(name)) for name in targets}
        sizes = {name: min(rows // (3 if name in thirds else 1), columns) for name, (rows, columns) in shapes.items()}
        if self.init == "orthogonal" and self.rank % 2 == 0:  # it takes even ranks only
            sizes = {name: size - size % 2 for name, size in sizes.items()}
            if too_thin := [name for name, size in sizes.items() if not size]:
                raise GraftError(
                    f"LoRA init 'orthogonal' needs a rank of at least 2, and '{too_thin[0]}' allows 1. Choose another "
                    "init, or other roles with 'on'."
                )
        return {name: size for name, size in sizes.items() if size < self.rank}

    def _held_in_fewer_bits(
        self, model: nn.Module, roles: RoleMap | None, targets: Mapping[str, str]
    ) -> dict[str, Literal["int8", "nf4"]]:
        """Choose the linear layers to quantise: all that carry a role of weights, and the targets."""
        from torch import nn as torch_nn

        from common.roles import GROUPS

        if self.quantize is None:
            return {}
        if self.dora or self.init in ("pissa", "olora"):
            raise GraftError(
                f"LoRA quantize '{self.quantize}' goes with neither dora nor the starts pissa and olora, which need "
                "the whole weight. Drop one."
            )
        held = [name for name, role in roles.role_of.items() if role in GROUPS["all"]] if roles else []
        linear = [
            name for name in dict.fromkeys((*held, *targets)) if type(model.get_submodule(name)) is torch_nn.Linear
        ]
        return dict.fromkeys(linear, self.quantize)

    def _engine_config(self, targets: Mapping[str, str], lowered: Mapping[str, int]) -> PeftConfig:
        from peft import LoraConfig

        if lowered and self.rslora and self.init in ("pissa", "olora"):
            raise GraftError(
                f"LoRA with rslora cannot start from {self.init} where layers allow less than rank {self.rank} "
                f"({listed(list(lowered))}), since no export could hold it. Set rslora to false, or lower the rank."
            )
        ranks = {f"^{re.escape(name)}": rank for name, rank in lowered.items()}  # PEFT would match a suffix
        root = math.sqrt if self.rslora else float
        return LoraConfig(
            r=self.rank,
            lora_alpha=cast("int", self.alpha if self.alpha is not None else 2 * self.rank),  # PEFT takes any number
            rank_pattern=ranks,
            alpha_pattern={pattern: self._scale * root(rank) for pattern, rank in ranks.items()},
            target_modules=exact(list(targets)),
            lora_dropout=self.dropout,
            use_rslora=self.rslora,
            use_dora=self.dora,
            init_lora_weights=True if self.init in ("default", "eva") else self.init,
        )

    def _own_config(self, targets: Mapping[str, str], thirds: Mapping[str, tuple[int, ...]]) -> PeftConfig:
        from common.tuners import WeightLoraConfig

        return WeightLoraConfig(
            target_modules=exact(list(targets)),
            r=self.rank,
            scale=self._scale,
            dora=self.dora,
            init=self.init,
            thirds={name: list(some) for name, some in thirds.items()},
        )

    def _refuse_what_weight_space_lacks(self, because: str) -> None:
        if self.dropout:
            raise GraftError(
                f"LoRA dropout is {self.dropout}, but {because}, and Graft's own changes the weight, where there is no "
                "input to drop. Set dropout to 0, or choose other roles with 'on'."
            )
        if self.init not in ("default", "gaussian"):
            raise GraftError(
                f"LoRA init is '{self.init}', but {because}, and Graft's own starts from 'default' or 'gaussian'. "
                "Choose one of them, or other roles with 'on'."
            )


def _say_lowered(rank: int, lowered: Mapping[str, int]) -> tuple[str, ...]:
    if not lowered:
        return ()
    layers = listed([f"{name} ({size})" for name, size in lowered.items()])
    return (f"Rank {rank} is lowered to the layer's own size in {len(lowered)} layers: {layers}.",)


def _what_the_engine_gets_wrong(module: nn.Module) -> str:
    """Say why PEFT's LoRA is no choice for a layer, or nothing where it is right, merging included."""
    from torch import nn as torch_nn
    from torch.nn.modules.conv import _ConvNd

    if not isinstance(module, _ConvNd):
        return ""
    if module.transposed:
        return "transposed"
    if module.groups > 1:
        return f"{module.groups} groups"
    if any(d != 1 for d in module.dilation):
        return f"dilation {module.dilation}"
    if module.padding_mode != "zeros":
        return f"padding mode '{module.padding_mode}'"
    if type(module) not in (torch_nn.Conv1d, torch_nn.Conv2d, torch_nn.Conv3d):
        return f"class {type(module).__name__}"
    if isinstance(module, torch_nn.Conv3d) and module.kernel_size[:2] == (1, 1):
        return f"kernel {module.kernel_size}"
    return ""
