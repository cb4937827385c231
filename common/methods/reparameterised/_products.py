"""Changes of the weight built of products: Hadamard, Kronecker, with the weight itself, of shards, bounded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from common.errors import GraftError
from common.methods.reparameterised._layers import (
    OnLinear,
    Shape,
    WeightChange,
    at_least,
)

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True, kw_only=True)
class LoHa(WeightChange):
    """Low-rank Hadamard product (FedPara; Hyeon-Woo et al. 2021, arXiv 2108.06098; LyCORIS, arXiv 2309.14859).

    W + s (B1 A1) * (B2 A2), the product taken elementwise, so that two pairs of rank r give a change of rank up to r^2:
    B1, B2 of shape (out, rank), A1, A2 of shape (rank, in), A2 = 0 at the start, s = alpha / rank. Trainable
    parameters: 2 rank (in + out) for each layer; a convolution's `in` is its inputs / groups times its kernel
    positions. For changes that a low rank does not hold, at twice LoRA's parameters a rank; merges without a trace.

    Args:
        rank: Rank of each of the two products.
        alpha: Scale; None takes the rank, so that s = 1.
    """

    taxonomy: ClassVar[str] = "reparameterised"
    summary: ClassVar[str] = "elementwise product of two low-rank changes"
    source: ClassVar[str] = "arXiv 2108.06098"
    sized_by: ClassVar[str] = "rank"

    rank: int = 8
    alpha: float | None = None

    def check(self) -> None:
        """See the base class."""
        at_least(1, "LoHa", rank=self.rank)

    def engine(self, target: str) -> PeftConfig:
        """See the base class."""
        from peft import LoHaConfig

        return LoHaConfig(r=self.rank, alpha=_alpha(self), target_modules=target)

    def form(self) -> tuple[str, dict[str, Any]]:
        """See the base class."""
        return "hadamard", {"rank": self.rank, "scale": _alpha(self) / self.rank}


@dataclass(frozen=True, kw_only=True)
class LoKr(WeightChange):
    """Low-rank Kronecker product (LyCORIS; Yeh et al. 2023, arXiv 2309.14859).

    W + s C (x) (B A), the Kronecker product: out = a b and in = c d with a, c the greatest divisors up to the roots;
    C of shape (a, c), zero at the start, B (b, rank), A (rank, d), s = alpha / rank. Where rank is at least half of
    max(b, d), B A is one full matrix of shape (b, d). Trainable parameters for each layer: a c + rank (b + d), or
    a c + b d. A convolution's `in` is its inputs / groups times its kernel positions. For the smallest files among the
    changes of full rank; merges without a trace.

    Args:
        rank: Rank of the second factor.
        alpha: Scale; None takes the rank, so that s = 1.
    """

    taxonomy: ClassVar[str] = "reparameterised"
    summary: ClassVar[str] = "Kronecker product of two small matrices"
    source: ClassVar[str] = "arXiv 2309.14859"

    rank: int = 8
    alpha: float | None = None

    def check(self) -> None:
        """See the base class."""
        at_least(1, "LoKr", rank=self.rank)

    def engine(self, target: str) -> PeftConfig:
        """See the base class."""
        from peft import LoKrConfig

        return LoKrConfig(r=self.rank, alpha=_alpha(self), target_modules=target)

    def form(self) -> tuple[str, dict[str, Any]]:
        """See the base class."""
        return "kronecker", {"rank": self.rank, "scale": _alpha(self) / self.rank}


def _alpha(spec: LoHa | LoKr) -> Any:  # noqa: ANN401  (PEFT's annotation asks for a whole number; it takes any)
    return spec.alpha if spec.alpha is not None else spec.rank


@dataclass(frozen=True, kw_only=True)
class HiRA(WeightChange):
    """Hadamard high-rank adaptation (Huang et al. 2025, OpenReview TwJrTz9cRS).

    W + W * (B A), the product taken elementwise: A of shape (rank, in), B of shape (out, rank), B = 0 at the start. The
    change has the frozen weight's rank at LoRA's parameters, rank (in + out) for each layer; a convolution's `in` is
    its inputs / groups times its kernel positions. For tasks where LoRA's low rank is the limit; an entry of the weight
    that is zero stays zero. Merges without a trace.

    Args:
        rank: Rank of the factor.
    """

    taxonomy: ClassVar[str] = "reparameterised"
    summary: ClassVar[str] = "weight times a low-rank matrix, elementwise"
    source: ClassVar[str] = "OpenReview TwJrTz9cRS"
    sized_by: ClassVar[str] = "rank"

    rank: int = 32

    def check(self) -> None:
        """See the base class."""
        at_least(1, "HiRA", rank=self.rank)

    def engine(self, target: str) -> PeftConfig:
        """See the base class."""
        from peft import HiraConfig

        return HiraConfig(r=self.rank, target_modules=target)

    def form(self) -> tuple[str, dict[str, Any]]:
        """See the base class."""
        return "hadamard_weight", {"rank": self.rank}


@dataclass(frozen=True, kw_only=True)
class MiSS(WeightChange):
    """Matrix shard sharing (Kang and Yin 2024, arXiv 2409.15371).

    y = W x + D' sum_k x_k, x_k the runs of `rank` inputs and D of shape (rank, out) shared by all of them, zero at the
    start: one matrix multiplication of a short input. Trainable parameters: rank out for each layer; a rank above a
    layer's inputs (inputs / groups times kernel positions) is lowered to them. Half of LoRA's parameters and less
    memory at the same rank; merges without a trace.

    Args:
        rank: Length of the shared shard.
    """

    taxonomy: ClassVar[str] = "reparameterised"
    summary: ClassVar[str] = "one shard added to all runs of inputs"
    source: ClassVar[str] = "arXiv 2409.15371"
    sized_by: ClassVar[str] = "rank"

    rank: int = 64

    def check(self) -> None:
        """See the base class."""
        at_least(1, "MiSS", rank=self.rank)

    def misfit(self, shape: Shape) -> str:
        """See the base class."""
        return f"{shape[1]} inputs" if shape[1] < self.rank else ""

    def engine(self, target: str) -> PeftConfig:
        """See the base class."""
        from peft import MissConfig

        return MissConfig(r=self.rank, target_modules=target)

    def form(self) -> tuple[str, dict[str, Any]]:
        """See the base class."""
        return "shards", {"rank": self.rank}


@dataclass(frozen=True, kw_only=True)
class DeLoRA(WeightChange):
    """Decoupled low-rank adaptation, of bounded size (Bini et al. 2025, arXiv 2503.18225).

    W + (l / rank) B diag(1 / (|b_i| |a_i|)) A diag(n): A of shape (rank, in) with rows a_i, B of shape (out, rank) with
    columns b_i, B = 0 at the start, n the lengths of W's columns, l a trained bound. Direction and strength train
    apart, so a high learning rate does not carry the weight away. Trainable parameters: rank (in + out) + 1 for each
    layer; a convolution's `in` is its inputs / groups times its kernel positions. For long training and high rates;
    merges without a trace.

    Args:
        rank: Rank of the change.
        bound: Start of the bound l.
    """

    taxonomy: ClassVar[str] = "reparameterised"
    summary: ClassVar[str] = "low-rank change of bounded size"
    source: ClassVar[str] = "arXiv 2503.18225"
    sized_by: ClassVar[str] = "rank"

    rank: int = 8
    bound: float = 15.0

    def check(self) -> None:
        """See the base class."""
        at_least(1, "DeLoRA", rank=self.rank)
        if self.bound <= 0:
            raise GraftError(f"DeLoRA bound is {self.bound}; give a number above 0.")

    def engine(self, target: str) -> PeftConfig:
        """See the base class."""
        from peft import DeloraConfig

        bound: Any = self.bound  # PEFT's annotation asks for a whole number; it takes any
        return DeloraConfig(r=self.rank, delora_lambda=bound, target_modules=target)

    def form(self) -> tuple[str, dict[str, Any]]:
        """See the base class."""
        return "bounded", {"rank": self.rank, "bound": self.bound}


@dataclass(frozen=True, kw_only=True)
class DEFT(WeightChange):
    """Decompositional efficient fine-tuning (Kumar et al. 2025, arXiv 2509.22793).

    (I - P relu(P)') W + P R: a subspace spanned by P of shape (out, rank) is taken out of the weight and R of shape
    (rank, in) put in its place, R = relu(P)' W at the start, where nothing changes but for rounding. Trainable
    parameters: rank (in + out) for each layer; a rank above a layer's outputs is lowered to them; a convolution's `in`
    is its inputs / groups times its kernel positions. Where some of what the model knows should give way to what it
    learns; merges without a trace.

    Args:
        rank: Dimensions of the exchanged subspace.
    """

    taxonomy: ClassVar[str] = "reparameterised"
    summary: ClassVar[str] = "take a subspace out of the weight and put another in"
    source: ClassVar[str] = "arXiv 2509.22793"
    sized_by: ClassVar[str] = "rank"

    rank: int = 8

    def check(self) -> None:
        """See the base class."""
        at_least(1, "DEFT", rank=self.rank)

    def engine(self, target: str) -> PeftConfig:
        """See the base class."""
        from peft import DeftConfig

        return DeftConfig(r=self.rank, target_modules=target)

    def form(self) -> tuple[str, dict[str, Any]]:
        """See the base class."""
        return "projection", {"rank": self.rank}


@dataclass(frozen=True, kw_only=True)
class GraLoRA(WeightChange):
    """Granular low-rank adaptation (Jung et al. 2025, arXiv 2505.20355).

    W + s D with D cut into k x k blocks, each B_ij A_ij of rank `rank` / k, B = 0 at the start, s = alpha / rank: k
    times LoRA's rank at its parameters, rank (in + out) for each layer; a convolution's `in` is its inputs / groups
    times its kernel positions. An outlying input channel spoils the gradient of its own blocks only. A number of cuts
    that does not divide the rank and a layer's sizes is lowered to the next that does. For ranks where LoRA overfits
    (32 and more); merges without a trace.

    It runs in Graft's own tuner: PEFT's takes inputs of the shape (items, tokens, channels) alone.

    Args:
        rank: Sum of the ranks of a row of blocks.
        alpha: Scale; None takes 2 * rank.
        blocks: Cuts k in each direction; the paper takes 2 up to rank 32 and 4 above.
    """

    taxonomy: ClassVar[str] = "reparameterised"
    summary: ClassVar[str] = "low-rank changes of the weight's blocks"
    source: ClassVar[str] = "arXiv 2505.20355"

    rank: int = 32
    alpha: float | None = None
    blocks: int = 2

    def check(self) -> None:
        """See the base class."""
        at_least(1, "GraLoRA", rank=self.rank, blocks=self.blocks)

    def misfit(self, shape: Shape) -> str:
        """See the base class."""
        return "inputs of other shapes than (items, tokens, channels)"

    def form(self) -> tuple[str, dict[str, Any]]:
        """See the base class."""
        alpha = self.alpha if self.alpha is not None else 2 * self.rank
        return "granular", {"rank": self.rank, "blocks": self.blocks, "scale": alpha / self.rank}


@dataclass(frozen=True, kw_only=True)
class GLoRA(OnLinear):
    """Generalised LoRA (Chavan et al. 2023, arXiv 2306.07967).

    W + W * A + B for the weight and b + d b + e + W c for the bias, with A and B of rank r (each as LoRA's product), c
    of shape (in, 1), also a product of rank r, and d, e one number each; all start at zero effect. Trainable parameters
    for each layer: 2 rank (in + out), and with a bias + rank (in + 1) + 2. The paper searches a structure for each
    layer; here all take this one. Where scale, shift and low rank should act together; linear layers only. Merges
    without a trace.

    Args:
        rank: Rank of the products.
    """

    taxonomy: ClassVar[str] = "reparameterised"
    summary: ClassVar[str] = "scale, shift and low-rank change in one"
    source: ClassVar[str] = "arXiv 2306.07967"
    sized_by: ClassVar[str] = "rank"

    rank: int = 8

    def check(self) -> None:
        """See the base class."""
        at_least(1, "GLoRA", rank=self.rank)

    def configure(self, target: str, shapes: Mapping[str, Shape]) -> tuple[PeftConfig, tuple[str, ...]]:
        """See the base class."""
        from peft import GloraConfig

        return GloraConfig(r=self.rank, target_modules=target), ()


@dataclass(frozen=True, kw_only=True)
class PEANuT(OnLinear):
    """Weight-aware neural tweakers (Zhong et al. 2024, arXiv 2410.01870).

    W + s (B g(A W))': a small network reads the frozen weight and writes its change; with W' of shape (in, out), A of
    shape (rank, out), B of shape (out, rank), B = 0 at the start, g a nonlinearity with `depth` pairs of residual
    layers of shape (rank, rank) in between. Trainable parameters: 2 rank out + 2 depth rank^2 for each layer. The
    change is nonlinear in its parameters, but a change of the weight alone, so it merges without a trace. For complex
    changes at few parameters; a step costs the small network on each weight. Linear layers only.

    Args:
        rank: Width of the network.
        depth: Pairs of layers in the middle.
        activation: The nonlinearity g.
        scale: The factor s.
    """

    taxonomy: ClassVar[str] = "reparameterised"
    summary: ClassVar[str] = "a small network writes the weight's change"
    source: ClassVar[str] = "arXiv 2410.01870"
    sized_by: ClassVar[str] = "rank"

    rank: int = 32
    depth: int = 0
    activation: Literal["relu", "gelu", "tanh", "silu"] = "relu"
    scale: float = 1.0

    def check(self) -> None:
        """See the base class."""
        at_least(1, "PEANuT", rank=self.rank)
        at_least(0, "PEANuT", depth=self.depth)

    def configure(self, target: str, shapes: Mapping[str, Shape]) -> tuple[PeftConfig, tuple[str, ...]]:
        """See the base class."""
        from peft import PeanutConfig

        config = PeanutConfig(
            r=self.rank, depth=self.depth, act_fn=self.activation, scaling=self.scale, target_modules=target
        )
        return config, ()
