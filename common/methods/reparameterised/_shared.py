"""Changes of the weight from what all layers share: random matrices, banks of vectors, one vector for all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from common.errors import GraftError
from common.methods.reparameterised._layers import OnLinear, Shape, at_least, fitting, in_unit, say_fitted

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True, kw_only=True)
class _RandomMatrices(OnLinear):
    """What VeRA and its probabilistic kin share: settings, checks and the configuration but for its class."""

    taxonomy: ClassVar[str] = "reparameterised"
    sized_by: ClassVar[str] = "rank"

    rank: int = 256
    dropout: float = 0.0
    d_initial: float = 0.1
    seed: int = 0

    def check(self) -> None:
        """See the base class."""
        at_least(1, type(self).__name__, rank=self.rank)
        in_unit(type(self).__name__, dropout=self.dropout)

    def _settings(self, target: str) -> dict[str, Any]:
        return {
            "r": self.rank,
            "target_modules": target,
            "d_initial": self.d_initial,
            "projection_prng_key": self.seed,
            "save_projection": False,
        }


@dataclass(frozen=True, kw_only=True)
class VeRA(_RandomMatrices):
    """Vector-based random matrix adaptation (Kopiczko et al. 2023, arXiv 2310.11454).

    y = W x + diag(b) B diag(d) A x with frozen random A, B shared by all layers; only the vectors b (length out) and d
    (length rank) train: rank + out parameters for each layer. For the smallest adapter files; linear layers only.

    Args:
        rank: Rank of the shared random matrices; large, since they cost no training parameters.
        dropout: Dropout on the adapter's input.
        d_initial: Starting value of d.
        seed: Seed of the shared random matrices, which are drawn again on load.
    """

    summary: ClassVar[str] = "shared random matrices, trained scaling vectors"
    source: ClassVar[str] = "arXiv 2310.11454"

    def configure(self, target: str, shapes: Mapping[str, Shape]) -> tuple[PeftConfig, tuple[str, ...]]:
        """See the base class."""
        from peft import VeraConfig

        return VeraConfig(vera_dropout=self.dropout, **self._settings(target)), ()


@dataclass(frozen=True, kw_only=True)
class PVeRA(_RandomMatrices):
    """Probabilistic VeRA (Fillioux et al. 2025, arXiv 2512.07703).

    As VeRA, with the middle of the product drawn: z = m + e v, m and v the two halves of diag(d) A x (A of shape (2
    rank, in)), e normal noise in training and zero in use; y = W x + diag(b) B z. Trainable parameters: 2 rank + out
    for each layer. A regulariser by noise where labels are few; linear layers only. In use it is a change of the
    weight, so it merges without a trace.

    Args:
        rank: Rank of the shared random matrices.
        dropout: Dropout on the adapter's input.
        d_initial: Starting value of d.
        seed: Seed of the shared random matrices, which are drawn again on load.
    """

    summary: ClassVar[str] = "VeRA with noise in training"
    source: ClassVar[str] = "arXiv 2512.07703"

    def configure(self, target: str, shapes: Mapping[str, Shape]) -> tuple[PeftConfig, tuple[str, ...]]:
        """See the base class."""
        from peft import PveraConfig

        return PveraConfig(pvera_dropout=self.dropout, **self._settings(target)), ()


@dataclass(frozen=True, kw_only=True)
class RandLoRA(OnLinear):
    """Full-rank adaptation by random low-rank bases (Albert et al. 2025, arXiv 2502.00987).

    W + s sum_j B_j diag(l_j) A diag(g_j): n = ceil(min(in, out) / rank) frozen random pairs B_j, A, shared by all
    layers, that together reach full rank; l_j (length rank) and g_j (length min(in, out)) train, l = 0 at the start,
    s = alpha / rank. Trainable parameters: n (rank + min(in, out)) for each layer; a *greater* rank means *fewer*.
    Where a full rank matters; linear layers only. Merges without a trace. PEFT's tuner pairs the columns of the B_j and
    the rows of A in another order than the paper; all are random, so the reach is the same.

    Args:
        rank: Rank of one basis.
        alpha: Scale; None takes the paper's 20 * rank.
        dropout: Dropout on the adapter's input.
        seed: Seed of the shared random bases, which are drawn again on load.
    """

    taxonomy: ClassVar[str] = "reparameterised"
    summary: ClassVar[str] = "full rank from shared random bases"
    source: ClassVar[str] = "arXiv 2502.00987"

    rank: int = 32
    alpha: float | None = None
    dropout: float = 0.0
    seed: int = 0

    def check(self) -> None:
        """See the base class."""
        at_least(1, "RandLoRA", rank=self.rank)
        in_unit("RandLoRA", dropout=self.dropout)

    def configure(self, target: str, shapes: Mapping[str, Shape]) -> tuple[PeftConfig, tuple[str, ...]]:
        """See the base class."""
        from peft import RandLoraConfig

        alpha: Any = self.alpha if self.alpha is not None else 20 * self.rank
        config = RandLoraConfig(
            r=self.rank,
            randlora_alpha=alpha,
            target_modules=target,
            randlora_dropout=self.dropout,
            projection_prng_key=self.seed,
            save_projection=False,
        )
        return config, ()


@dataclass(frozen=True, kw_only=True)
class VBLoRA(OnLinear):
    """LoRA from a bank of vectors (Li et al. 2024, arXiv 2405.15179).

    W + B A with A and B put together from sub-vectors of length v; each is a mixture of the k best of h vectors in a
    bank that all layers share, by trained logits. Trainable parameters: h v for the bank and rank h (in + out) / v for
    each layer's logits. The bank starts small and random, so a fresh adapter changes the outputs a little, as in the
    paper. For adapters of many layers in small files; linear layers only. A length that does not divide all layers'
    sizes is lowered to the next that does. Merges without a trace.

    Args:
        rank: Rank of the change.
        vectors: Vectors h in the bank; the paper takes 90 to 2048.
        length: Length v of the vectors.
        top: How many vectors k are mixed.
        dropout: Dropout on the adapter's input.
    """

    taxonomy: ClassVar[str] = "reparameterised"
    summary: ClassVar[str] = "low-rank change out of a shared bank of vectors"
    source: ClassVar[str] = "arXiv 2405.15179"

    rank: int = 4
    vectors: int = 256
    length: int = 256
    top: int = 2
    dropout: float = 0.0

    def check(self) -> None:
        """See the base class."""
        at_least(1, "VBLoRA", rank=self.rank, vectors=self.vectors, length=self.length, top=self.top)
        in_unit("VBLoRA", dropout=self.dropout)
        if self.top > self.vectors:
            raise GraftError(f"VBLoRA mixes the top {self.top} of {self.vectors} vectors; lower 'top'.")

    def configure(self, target: str, shapes: Mapping[str, Shape]) -> tuple[PeftConfig, tuple[str, ...]]:
        """See the base class."""
        from peft import VBLoRAConfig

        length = fitting(self.length, (side for shape in shapes.values() for side in shape))
        config = VBLoRAConfig(
            r=self.rank,
            num_vectors=self.vectors,
            vector_length=length,
            topk=self.top,
            vblora_dropout=self.dropout,
            target_modules=target,
        )
        return config, say_fitted("Vector length", self.length, length)


@dataclass(frozen=True, kw_only=True)
class TinyLoRA(OnLinear):
    """A handful of parameters along the weight's own directions (Morris et al. 2026, arXiv 2602.04118).

    W + B (sum_i v_i P_i) A: B A the best approximation of W of this rank, P_i frozen random matrices (rank, rank), v a
    trained vector of length u, zero at the start. Trainable parameters: u for each layer, or for each group of layers
    with `tying` (1 ties all). For the smallest adapters there are; linear layers only. The file holds A, B and P too,
    so it is larger than its trained part. Merges without a trace.

    Args:
        rank: Rank of the frozen approximation.
        parameters: Length u of the trained vector.
        tying: Share of tying: 0 gives each layer its own vector, 1 one to all.
        seed: Seed of the random matrices.
    """

    taxonomy: ClassVar[str] = "reparameterised"
    summary: ClassVar[str] = "a few numbers along the weight's directions"
    source: ClassVar[str] = "arXiv 2602.04118"
    sized_by: ClassVar[str] = "parameters"

    rank: int = 2
    parameters: int = 64
    tying: float = 0.0
    seed: int = 0

    def check(self) -> None:
        """See the base class."""
        at_least(1, "TinyLoRA", rank=self.rank, parameters=self.parameters)
        if not 0.0 <= self.tying <= 1.0:
            raise GraftError(f"TinyLoRA tying is {self.tying}; give a share in [0, 1].")

    def configure(self, target: str, shapes: Mapping[str, Shape]) -> tuple[PeftConfig, tuple[str, ...]]:
        """See the base class."""
        from peft import TinyLoraConfig

        config = TinyLoraConfig(
            r=self.rank,
            u=self.parameters,
            weight_tying=self.tying,
            projection_seed=self.seed,
            target_modules=target,
        )
        return config, ()


@dataclass(frozen=True, kw_only=True)
class UniLoRA(OnLinear):
    """One vector for all LoRA factors (Li et al. 2025, arXiv 2506.00799).

    LoRA whose entries of all A and B are read out of one trained vector t of length d, each entry at a place that the
    seed draws, scaled so that the map is an isometry. Trainable parameters: d for the whole model. t starts small and
    random (at zero nothing could be learned), so a fresh adapter changes the outputs a little, as in the paper. For one
    number to set the budget by; linear layers only. Merges without a trace.

    Args:
        rank: Rank of the change.
        length: Length d of the vector.
        dropout: Dropout on the adapter's input.
        seed: Seed of the places, which are drawn again on load.
    """

    taxonomy: ClassVar[str] = "reparameterised"
    summary: ClassVar[str] = "all low-rank factors out of one vector"
    source: ClassVar[str] = "arXiv 2506.00799"
    sized_by: ClassVar[str] = "length"

    rank: int = 4
    length: int = 256
    dropout: float = 0.0
    seed: int = 0

    def check(self) -> None:
        """See the base class."""
        at_least(1, "UniLoRA", rank=self.rank, length=self.length)
        in_unit("UniLoRA", dropout=self.dropout)

    def configure(self, target: str, shapes: Mapping[str, Shape]) -> tuple[PeftConfig, tuple[str, ...]]:
        """See the base class."""
        from peft import UniLoraConfig

        config = UniLoraConfig(
            r=self.rank,
            theta_d_length=self.length,
            unilora_dropout=self.dropout,
            proj_seed=self.seed,
            target_modules=target,
        )
        return config, ()
