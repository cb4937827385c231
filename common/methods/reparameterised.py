"""Reparameterised methods: a weight change of low rank or few degrees of freedom, which merges into the weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, cast

from common.errors import GraftError
from common.methods._base import OnModules, Plan, exact, require_types

if TYPE_CHECKING:
    from torch import nn

    from common.roles import RoleMap


@dataclass(frozen=True, kw_only=True)
class LoRA(OnModules):
    """Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685).

    y = W x + s B A x with A of shape (rank, in) and B of shape (out, rank), B = 0 at the start; s = alpha / rank, or
    alpha / sqrt(rank) with `rslora` (Kalajdzievski 2023, arXiv 2312.03732). Trainable parameters: rank (in + out) for
    each adapted layer. The first choice where attention carries the model; merges without a trace.

    Args:
        rank: Rank of the change.
        alpha: Scale; None takes 2 * rank.
        dropout: Dropout on the adapter's input; each adapted layer then keeps its input twice for the backward pass.
        rslora: Scale by the square root of the rank.
        dora: Train the weight's magnitude apart from its direction (Liu et al. 2024, arXiv 2402.09353).
        init: `default` (Kaiming A, zero B), `gaussian`, `orthogonal`, or a start from the weight's own spectrum:
            `pissa` (arXiv 2404.02948), `olora` (arXiv 2406.01775).
    """

    taxonomy: ClassVar[str] = "reparameterised"
    summary: ClassVar[str] = "low-rank change of the weight"
    source: ClassVar[str] = "arXiv 2106.09685"

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    init: Literal["default", "gaussian", "orthogonal", "pissa", "olora"] = "default"

    def plan(self, model: nn.Module, roles: RoleMap | None) -> Plan:
        """Take Linear, Conv and Embedding layers; see the base class."""
        from peft import LoraConfig

        _positive_rank("LoRA", self.rank)
        if not 0.0 <= self.dropout < 1.0:
            raise GraftError(f"LoRA dropout is {self.dropout}; give a share in [0, 1).")
        if self.dora and self.init in ("pissa", "olora"):
            raise GraftError(f"LoRA with dora cannot start from {self.init}, since no export could hold it. Drop one.")
        targets = self.select(model, roles)
        require_types("LoRA", model, targets, ("Linear", "Conv1d", "Conv2d", "Conv3d", "Embedding"))
        for name in targets:
            _refuse_convolution_the_engine_gets_wrong(name, model.get_submodule(name))
        config = LoraConfig(
            r=self.rank,
            lora_alpha=cast("int", self.alpha if self.alpha is not None else 2 * self.rank),  # PEFT takes any number
            target_modules=exact(list(targets)),
            lora_dropout=self.dropout,
            use_rslora=self.rslora,
            use_dora=self.dora,
            init_lora_weights=True if self.init == "default" else self.init,
        )
        return Plan(peft_config=config, targets=targets)


@dataclass(frozen=True, kw_only=True)
class VeRA(OnModules):
    """Vector-based random matrix adaptation (Kopiczko et al. 2023, arXiv 2310.11454).

    y = W x + diag(b) B diag(d) A x with frozen random A, B shared by all layers; only the vectors b (length out) and d
    (length rank) train: rank + out parameters for each layer. For the smallest adapter files; linear layers only.

    Args:
        rank: Rank of the shared random matrices; large, since they cost no training parameters.
        dropout: Dropout on the adapter's input.
        d_initial: Starting value of d.
        seed: Seed of the shared random matrices, which are drawn again on load.
    """

    taxonomy: ClassVar[str] = "reparameterised"
    summary: ClassVar[str] = "shared random matrices, trained scaling vectors"
    source: ClassVar[str] = "arXiv 2310.11454"

    rank: int = 256
    dropout: float = 0.0
    d_initial: float = 0.1
    seed: int = 0

    def plan(self, model: nn.Module, roles: RoleMap | None) -> Plan:
        """Take Linear layers; see the base class."""
        from peft import VeraConfig

        _positive_rank("VeRA", self.rank)
        targets = self.select(model, roles)
        require_types("VeRA", model, targets, ("Linear",))
        config = VeraConfig(
            r=self.rank,
            target_modules=exact(list(targets)),
            vera_dropout=self.dropout,
            d_initial=self.d_initial,
            projection_prng_key=self.seed,
            save_projection=False,
        )
        return Plan(peft_config=config, targets=targets)


def _positive_rank(method: str, rank: int) -> None:
    if rank < 1:
        raise GraftError(f"{method} rank is {rank}; give a whole number of at least 1.")


def _refuse_convolution_the_engine_gets_wrong(name: str, module: nn.Module) -> None:
    """Refuse the convolutions on which PEFT's LoRA is silently wrong: it drops dilation and padding mode."""
    dilation = getattr(module, "dilation", None)
    if not isinstance(dilation, tuple):
        return
    wrong = ""
    if any(d != 1 for d in dilation):
        wrong = f"dilation {dilation}"
    elif getattr(module, "padding_mode", "zeros") != "zeros":
        wrong = f"padding mode {getattr(module, 'padding_mode', '')!r}"
    elif "same" in type(module).__name__.lower():
        wrong = f"padding computed from the input ({type(module).__name__})"
    if wrong:
        raise GraftError(f"LoRA on '{name}' is refused: the engine ignores its {wrong}. Choose roles without it.")
