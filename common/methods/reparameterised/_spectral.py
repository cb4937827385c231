"""Changes of the weight with few entries in another basis: Fourier, wavelet, circulant blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from common.methods.reparameterised._layers import OnLinear, Shape, WeightChange, at_least

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True, kw_only=True)
class FourierFT(WeightChange):
    """Fourier transform fine-tuning (Gao et al. 2024, arXiv 2405.03003).

    W + s Re(F^-1(E)): E of the weight's shape, zero but for n trained entries at places that the seed draws. The paper
    draws them from a normal distribution; here they start at zero, so that nothing changes. Trainable parameters:
    min(n, in out) for each layer, whatever its size; a convolution's `in` is its inputs / groups times its kernel
    positions. For very small files on large layers; wants a high learning rate (the paper's 1e-2 to 1e-1). Merges
    without a trace.

    Args:
        entries: Trained entries n of each layer's spectrum; the paper takes 3000 for ViT-L.
        scale: The factor s; the paper's 100 to 150 for RoBERTa, 300 for ViT and LLaMA.
        seed: Seed of the places, which are drawn again on load.
    """

    taxonomy: ClassVar[str] = "reparameterised"
    summary: ClassVar[str] = "few Fourier coefficients of the change"
    source: ClassVar[str] = "arXiv 2405.03003"
    sized_by: ClassVar[str] = "entries"

    entries: int = 1000
    scale: float = 150.0
    seed: int = 0

    def check(self) -> None:
        """See the base class."""
        at_least(1, "FourierFT", entries=self.entries)

    def misfit(self, shape: Shape) -> str:
        """See the base class."""
        return f"{shape[0] * shape[1]} weights" if shape[0] * shape[1] < self.entries else ""

    def engine(self, target: str) -> PeftConfig:
        """See the base class."""
        from peft import FourierFTConfig

        return FourierFTConfig(
            n_frequency=self.entries,
            scaling=self.scale,
            random_loc_seed=self.seed,
            init_weights=True,
            target_modules=target,
        )

    def form(self) -> tuple[str, dict[str, Any]]:
        """See the base class."""
        return "spectrum", {"entries": self.entries, "scale": self.scale, "seed": self.seed}


@dataclass(frozen=True, kw_only=True)
class WaveFT(OnLinear):
    """Wavelet fine-tuning (Bilican et al. 2025, arXiv 2505.12532).

    W + s IDWT(E): E of the weight's shape, zero but for n trained entries at places that the seed draws, zero at the
    start; IDWT the inverse wavelet transform. Trainable parameters: min(n, in out) for each layer. As FourierFT, with
    changes that stay local; linear layers only. Merges without a trace.

    Args:
        entries: Trained coefficients n of each layer.
        scale: The factor s.
        wavelet: Family of the wavelet (`db1` is Haar's).
        seed: Seed of the places, which are drawn again on load.
    """

    taxonomy: ClassVar[str] = "reparameterised"
    summary: ClassVar[str] = "few wavelet coefficients of the change"
    source: ClassVar[str] = "arXiv 2505.12532"
    sized_by: ClassVar[str] = "entries"

    entries: int = 2592
    scale: float = 25.0
    wavelet: str = "db1"
    seed: int = 0

    def check(self) -> None:
        """See the base class."""
        at_least(1, "WaveFT", entries=self.entries)

    def configure(self, target: str, shapes: Mapping[str, Shape]) -> tuple[PeftConfig, tuple[str, ...]]:
        """See the base class."""
        import re

        from peft import WaveFTConfig

        sizes = {name: rows * columns for name, (rows, columns) in shapes.items() if rows * columns < self.entries}
        config = WaveFTConfig(
            n_frequency=self.entries,
            scaling=self.scale,
            wavelet_family=self.wavelet,
            random_loc_seed=self.seed,
            n_frequency_pattern={f"^{re.escape(name)}": size for name, size in sizes.items()},
            target_modules=target,
        )
        note = f"{self.entries} entries are lowered to the layer's own size in {len(sizes)} layers."
        return config, (note,) if sizes else ()


@dataclass(frozen=True, kw_only=True)
class C3A(WeightChange):
    """Circular convolution adaptation (Chen et al. 2024, arXiv 2407.19342).

    W + C / in with C of circulant blocks of side b, each given by b numbers: a circular convolution, of full rank at
    in out / b trainable parameters for each layer. The paper draws them uniformly; here they start at zero, so that
    nothing changes. A convolution's `in` is its inputs / groups times its kernel positions. A side that does not divide
    a layer's inputs and outputs is lowered to the next that does. For full rank at few parameters; wants a high
    learning rate. Merges without a trace.

    Args:
        block: Side b of the blocks; the greater, the fewer parameters.
    """

    taxonomy: ClassVar[str] = "reparameterised"
    summary: ClassVar[str] = "circulant blocks added to the weight"
    source: ClassVar[str] = "arXiv 2407.19342"

    block: int = 256

    def check(self) -> None:
        """See the base class."""
        at_least(1, "C3A", block=self.block)

    def misfit(self, shape: Shape) -> str:
        """See the base class."""
        return f"{shape[1]} inputs, {shape[0]} outputs" if shape[0] % self.block or shape[1] % self.block else ""

    def engine(self, target: str) -> PeftConfig:
        """See the base class."""
        from peft import C3AConfig

        return C3AConfig(block_size=self.block, init_weights=True, target_modules=target)

    def form(self) -> tuple[str, dict[str, Any]]:
        """See the base class."""
        return "circulant", {"block": self.block}
