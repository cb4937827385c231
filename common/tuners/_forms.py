"""Changes of a weight read as a matrix (rows = outputs, columns = inputs / groups times kernel positions), by name.

Each is a module that maps the frozen matrix to the changed one and changes nothing at the start. Values that need the
frozen weight (a spectrum, norms) are buffers, which an adapter file holds: another machine's library may return another
basis for the same weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from common.tuners._base import like


class Form(nn.Module):
    """A change of a matrix; a subclass makes its parameters, lowering sizes that a small matrix does not allow.

    Args:
        weight: The frozen matrix (rows, columns), in single precision at least.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.rows, self.columns = weight.shape

    def forward(self, weight: Tensor) -> Tensor:
        """Return the changed matrix (rows, columns)."""
        raise NotImplementedError

    @staticmethod
    def drawn(weight: Tensor, *shape: int) -> nn.Parameter:
        """Return a trained matrix at Kaiming's uniform start."""
        return nn.Parameter(nn.init.kaiming_uniform_(torch.empty(*shape, **like(weight)), a=math.sqrt(5)))

    @staticmethod
    def zeros(weight: Tensor, *shape: int) -> nn.Parameter:
        """Return a trained tensor of zeros."""
        return nn.Parameter(torch.zeros(*shape, **like(weight)))


class Hadamard(Form):
    """W + s (B1 A1) * (B2 A2), elementwise, with A2 = 0 at the start (LoHa)."""

    def __init__(self, weight: Tensor, *, rank: int, scale: float) -> None:
        super().__init__(weight)
        self.scale = scale
        self.up_1, self.down_1 = self.drawn(weight, self.rows, rank), self.drawn(weight, rank, self.columns)
        self.up_2, self.down_2 = self.drawn(weight, self.rows, rank), self.zeros(weight, rank, self.columns)

    def forward(self, weight: Tensor) -> Tensor:
        """Add the product of the two products."""
        return weight + self.scale * (self.up_1 @ self.down_1) * (self.up_2 @ self.down_2)


class Kronecker(Form):
    """W + s C (x) (B A) with C = 0 at the start (LoKr); B A is one matrix where that is smaller."""

    def __init__(self, weight: Tensor, *, rank: int, scale: float) -> None:
        super().__init__(weight)
        self.scale = scale
        (a, b), (c, d) = factors(self.rows), factors(self.columns)
        self.outer = self.zeros(weight, a, c)
        if 2 * rank < max(b, d):
            self.up, self.down = self.drawn(weight, b, rank), self.drawn(weight, rank, d)
        else:
            self.inner = self.drawn(weight, b, d)

    def forward(self, weight: Tensor) -> Tensor:
        """Add the Kronecker product."""
        inner = self.up @ self.down if hasattr(self, "up") else self.inner
        return weight + self.scale * torch.kron(self.outer, inner)


class HadamardWeight(Form):
    """W + W * (B A), elementwise, with B = 0 at the start (HiRA)."""

    def __init__(self, weight: Tensor, *, rank: int) -> None:
        super().__init__(weight)
        self.down, self.up = self.drawn(weight, rank, self.columns), self.zeros(weight, self.rows, rank)

    def forward(self, weight: Tensor) -> Tensor:
        """Add the weight's product with the low-rank matrix."""
        return weight + weight * (self.up @ self.down)


class Granular(Form):
    """W + s D, each of k x k blocks of D of low rank: D_ij = B_ij A_ij with B = 0 at the start (GraLoRA).

    k is the greatest divisor of the rank, the rows and the columns that is not above the wanted one.
    """

    def __init__(self, weight: Tensor, *, rank: int, blocks: int, scale: float) -> None:
        super().__init__(weight)
        self.scale = scale
        cuts = divisor(math.gcd(rank, self.rows, self.columns), blocks)
        self.down = nn.Parameter(torch.empty(cuts, cuts, rank // cuts, self.columns // cuts, **like(weight)))
        nn.init.uniform_(self.down, -((self.columns // cuts) ** -0.5), (self.columns // cuts) ** -0.5)
        self.up = self.zeros(weight, cuts, cuts, self.rows // cuts, rank // cuts)

    def forward(self, weight: Tensor) -> Tensor:
        """Add the blocks."""
        change = torch.matmul(self.up, self.down).transpose(1, 2)  # (i, rows / k, j, columns / k)
        return weight + self.scale * change.reshape(weight.shape)


class Reflections(Form):
    """W H1 ... Hr with reflections H = I - 2 u u' / |u|^2, in equal pairs at the start, which cancel out (HRA)."""

    def __init__(self, weight: Tensor, *, rank: int) -> None:
        super().__init__(weight)
        half = self.drawn(weight, self.columns, rank // 2)
        self.directions = nn.Parameter(half.detach().repeat_interleave(2, dim=1))

    def forward(self, weight: Tensor) -> Tensor:
        """Reflect the inputs, one direction after the other."""
        for direction in nn.functional.normalize(self.directions, dim=0).unbind(1):
            weight = weight - 2 * torch.outer(weight @ direction, direction)
        return weight


class BlockRotation(Form):
    """W R with R of orthogonal blocks (I + S)^-1 (I - S), S skew-symmetric and zero at the start (OFT).

    The block's side is the greatest divisor of the columns that is not above the wanted one.
    """

    def __init__(self, weight: Tensor, *, block: int) -> None:
        super().__init__(weight)
        self.side = divisor(self.columns, block)
        self.angles = self.zeros(weight, self.columns // self.side, self.side * (self.side - 1) // 2)

    def forward(self, weight: Tensor) -> Tensor:
        """Rotate the inputs within each block."""
        rotations = cayley(skew(self.angles, self.side))
        blocks = weight.unflatten(1, (-1, self.side)).transpose(0, 1)  # (blocks, rows, side)
        return torch.bmm(blocks, rotations).transpose(0, 1).flatten(1)


class Butterfly(Form):
    """diag(s) W R1 ... Rm, each R of orthogonal blocks over two half-blocks of inputs that lie 2^i apart (BOFT).

    The blocks' side is the greatest even number up to the wanted one of which 2^(m - 1) divides the columns.
    """

    def __init__(self, weight: Tensor, *, block: int, factors: int) -> None:
        super().__init__(weight)
        self.side = 2 * divisor(self.columns // 2**factors, block // 2)
        if self.columns % (self.side * 2 ** (factors - 1)):
            raise ValueError(f"{factors} butterfly factors do not fit a weight with {self.columns} inputs.")
        self.angles = self.zeros(weight, factors, self.columns // self.side, self.side * (self.side - 1) // 2)
        self.scales = nn.Parameter(torch.ones(self.rows, **like(weight)))

    def forward(self, weight: Tensor) -> Tensor:
        """Rotate the inputs, near ones first, and scale the outputs."""
        half = self.side // 2
        for level, angles in enumerate(self.angles):
            rotations = cayley(skew(angles, self.side))
            parts = weight.view(self.rows, -1, 2, 2**level, half).permute(1, 3, 0, 2, 4)  # (groups, 2^i, rows, 2, half)
            turned = torch.bmm(parts.reshape(-1, self.rows, self.side), rotations)
            weight = turned.view(parts.shape).permute(2, 0, 3, 1, 4).reshape(weight.shape)
        return self.scales[:, None] * weight


class SubspaceRotation(Form):
    """W + B (diag(b) R diag(a) - I) A: the weight's first singular directions, turned and scaled (PSOFT)."""

    down: Tensor
    up: Tensor

    def __init__(self, weight: Tensor, *, rank: int) -> None:
        super().__init__(weight)
        rank = min(rank, self.rows, self.columns)
        left, values, right = principal(weight, rank)
        self.register_buffer("down", right)
        self.register_buffer("up", left * values)
        self.angles = self.zeros(weight, 1, rank * (rank - 1) // 2)
        self.scale_in = nn.Parameter(torch.ones(rank, **like(weight)))
        self.scale_out = nn.Parameter(torch.ones(rank, **like(weight)))

    def forward(self, weight: Tensor) -> Tensor:
        """Add what the turned part differs by."""
        rank = len(self.scale_in)
        turned = cayley(skew(self.angles, rank))[0] * self.scale_in * self.scale_out[:, None]
        change = turned - torch.eye(rank, dtype=turned.dtype, device=turned.device)
        return weight + self.up @ change @ self.down


class Spectrum(Form):
    """W + s Re(F^-1(E)), E zero but for n trained entries at places that the seed draws (FourierFT)."""

    places: Tensor

    def __init__(self, weight: Tensor, *, entries: int, scale: float, seed: int) -> None:
        super().__init__(weight)
        self.scale = scale
        places = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(seed))
        places = places[: min(entries, weight.numel())].to(weight.device)
        self.register_buffer("places", places, persistent=False)
        self.entries = self.zeros(weight, len(places))

    def forward(self, weight: Tensor) -> Tensor:
        """Add the inverse Fourier transform."""
        spectrum = torch.zeros(weight.numel(), dtype=self.entries.dtype, device=weight.device)
        spectrum = spectrum.index_put((self.places,), self.entries).view_as(weight)
        return weight + self.scale * torch.fft.ifft2(spectrum).real


class Circulant(Form):
    """W + C / columns, C of circulant blocks (C3A).

    The blocks' side is the greatest divisor of the rows and of the columns that is not above the wanted one.
    """

    def __init__(self, weight: Tensor, *, block: int) -> None:
        super().__init__(weight)
        self.side = divisor(math.gcd(self.rows, self.columns), block)
        self.kernels = self.zeros(weight, self.rows // self.side, self.columns // self.side, self.side)

    def forward(self, weight: Tensor) -> Tensor:
        """Add the blocks, entry (i, j) of a block being its kernel at (j - i)."""
        steps = torch.arange(self.side, device=weight.device)
        blocks = self.kernels[..., (steps[None, :] - steps[:, None]) % self.side]  # (m, n, side, side)
        return weight + blocks.transpose(1, 2).reshape(weight.shape) / self.columns


class Shards(Form):
    """W + D with D's column j the trained row j mod r, the same for all shards of r columns (MiSS)."""

    def __init__(self, weight: Tensor, *, rank: int) -> None:
        super().__init__(weight)
        self.shard = self.zeros(weight, min(rank, self.columns), self.rows)

    def forward(self, weight: Tensor) -> Tensor:
        """Add the shard to each run of columns."""
        repeats = math.ceil(self.columns / len(self.shard))
        return weight + self.shard.T.repeat(1, repeats)[:, : self.columns]


class Bounded(Form):
    """W + (l / r) sum_i (b_i a_i') / (|b_i| |a_i|) diag(n): low-rank, of bounded size (DeLoRA).

    n are the lengths of the frozen weight's columns, l is trained.
    """

    lengths: Tensor

    def __init__(self, weight: Tensor, *, rank: int, bound: float) -> None:
        super().__init__(weight)
        self.down, self.up = self.drawn(weight, rank, self.columns), self.zeros(weight, self.rows, rank)
        self.bound = nn.Parameter(torch.full((1,), float(bound), **like(weight)))
        self.register_buffer("lengths", weight.norm(dim=0))

    def forward(self, weight: Tensor) -> Tensor:
        """Add the bounded change."""
        sizes = self.down.norm(dim=1).clamp_min(1e-4) * self.up.norm(dim=0).clamp_min(1e-4)
        return weight + (self.up * (self.bound / len(sizes) / sizes)) @ self.down * self.lengths


class Projection(Form):
    """W + P (R - relu(P)' W) with R = relu(P)' W at the start: a subspace is taken out, another put in (DEFT)."""

    def __init__(self, weight: Tensor, *, rank: int) -> None:
        super().__init__(weight)
        directions = torch.empty(self.rows, min(rank, self.rows), **like(weight)).normal_(std=0.02)
        self.directions = nn.Parameter(directions)
        self.injected = nn.Parameter(torch.relu(directions).T @ weight)

    def forward(self, weight: Tensor) -> Tensor:
        """Exchange the subspace."""
        return weight + self.directions @ (self.injected - torch.relu(self.directions).T @ weight)


FORMS: Mapping[str, type[Form]] = {
    "hadamard": Hadamard,
    "kronecker": Kronecker,
    "hadamard_weight": HadamardWeight,
    "granular": Granular,
    "reflections": Reflections,
    "block_rotation": BlockRotation,
    "butterfly": Butterfly,
    "subspace_rotation": SubspaceRotation,
    "spectrum": Spectrum,
    "circulant": Circulant,
    "shards": Shards,
    "bounded": Bounded,
    "projection": Projection,
}


def factors(size: int) -> tuple[int, int]:
    """Split a number into the two factors nearest to its root, the smaller first."""
    smaller = divisor(size, math.isqrt(size))
    return smaller, size // smaller


def divisor(size: int, most: int) -> int:
    """Return the greatest divisor of a number that is at most `most`."""
    return next(d for d in range(max(1, min(size, most)), 0, -1) if size % d == 0)


def skew(upper: Tensor, side: int) -> Tensor:
    """Return skew-symmetric matrices (n, side, side) from their upper triangles (n, side (side - 1) / 2)."""
    rows, columns = torch.triu_indices(side, side, 1, device=upper.device)
    matrices = torch.zeros(len(upper), side, side, dtype=upper.dtype, device=upper.device)
    batch = torch.arange(len(upper), device=upper.device)[:, None]
    matrices = matrices.index_put((batch, rows[None], columns[None]), upper)
    return matrices - matrices.transpose(1, 2)


def cayley(matrices: Tensor) -> Tensor:
    """Return the orthogonal matrices (I + S)^-1 (I - S) of skew-symmetric ones (n, side, side)."""
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    return torch.linalg.solve(identity + matrices, identity - matrices)


def principal(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first singular directions, (rows, rank), (rank,), (rank, columns), with signs that are unique.

    Libraries differ in the signs; here the greatest entry of each left direction is positive.
    """
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    left, values, right = left[:, :rank], values[:rank], right[:rank]
    signs = left.gather(0, left.abs().argmax(0, keepdim=True)).sign()[0]
    return left * signs, values, right * signs[:, None]
