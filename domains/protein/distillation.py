"""The Lightning module that teaches a small language model the hidden states of a large one."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn

from common.errors import GraftError
from common.methods import MethodSpec
from common.task import OptimSpec
from domains.protein._alphabet import STANDARD
from domains.protein.backbones import ProteinBackbone, build, residue_features
from domains.protein.data._records import IGNORE, ProteinBatch
from domains.protein.residue_tasks import MaskedLM

_MEAN_WEIGHT = 4.0  # a mean over residues varies about a fourth as much as the states themselves
_CONCENTRATION = 0.5  # of the Dirichlet distribution: a few amino acids make up most of a drawn composition


class DistilledHead(nn.Module):
    """The language model's own output layer, and beside it a layer that says the teacher's states.

    Args:
        lm: The output layer; what the task's logits come from.
        width: Width of the student's features.
        teacher: Width of the teacher's.
    """

    def __init__(self, lm: nn.Module, width: int, teacher: int) -> None:
        super().__init__()
        self.lm = lm
        self.states = nn.Linear(width, teacher)

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, L, width) to logits of the letters (B, L, len(ALPHABET))."""
        return self.lm(features)


class Distillation(MaskedLM):
    """Train a language model to say what another one holds of each residue (FitNets, arXiv 1412.6550), and its letters.

    With h the teacher's features of a residue, divided by their spread, s the student's guess of them, and h_bar and
    s_bar their means over a protein, the loss is mean (s - h)^2 + 4 mean (s_bar - h_bar)^2 + `lm_weight` *
    cross-entropy. The teacher reads every protein whole; in about half of the student's proteins residues are hidden
    as in `MaskedLM`, and only there are letters asked for.

    A teacher can label any sequence, so a share of the proteins of every batch is changed first: a random part of
    their residues is drawn anew from a composition that is itself drawn (Dirichlet, 0.5). That shows the student what
    natural proteins hardly have, such as peptides of three amino acids.

    Args:
        backbone: The student: a starter's name, an ESM-2 or other Hugging Face encoder's, or a local folder or file.
        peft: The PEFT method; FullFineTune for a student that starts from nothing.
        teacher: The backbone whose features are taught.
        optim: Optimizer and schedule.
        share: Share of the residues that are asked for where a protein has hidden ones.
        changed: Share of the proteins that are changed.
        lm_weight: Weight of the cross-entropy.
        layers: Keep only the first layers of the student.
        pretrained: Start from pretrained weights.
        weights: A local file of weights, instead of the student's own.
        seed: Seed of student, head, training steps and hidden residues.
        gradient_checkpointing: Recompute blocks in the backward pass.
    """

    def __init__(
        self,
        backbone: str,
        peft: MethodSpec,
        teacher: str = "unirep-256",
        optim: OptimSpec = OptimSpec(),  # noqa: B008  (frozen)
        share: float = 0.15,
        changed: float = 0.3,
        lm_weight: float = 0.5,
        layers: int | None = None,
        pretrained: bool = True,
        weights: str | None = None,
        seed: int = 0,
        gradient_checkpointing: bool = False,
    ) -> None:
        if not 0 <= changed <= 1 or lm_weight < 0:
            raise GraftError(
                f"changed is {changed} and lm_weight {lm_weight}: a share lies in [0, 1], a weight is at least 0."
            )
        super().__init__(
            backbone,
            peft,
            optim=optim,
            share=share,
            layers=layers,
            pretrained=pretrained,
            weights=weights,
            seed=seed,
            gradient_checkpointing=gradient_checkpointing,
        )
        self.settings |= {"teacher": teacher, "changed": changed, "lm_weight": lm_weight}

    @cached_property
    def _teacher(self) -> tuple[ProteinBackbone, Tensor]:
        """The teacher and the spread of its features; in a tuple, so that it is no part of this module's state."""
        built = build(self.settings["teacher"])
        built.model.requires_grad_(False).to(self.device)
        generator = torch.Generator().manual_seed(0)
        residues = torch.randint(0, len(STANDARD), (32, 64), generator=generator).to(self.device)
        with torch.no_grad():
            features = residue_features(built, built.model, residues, torch.ones_like(residues, dtype=torch.bool))
        return built, features.flatten(0, 1).var(dim=0).mean().sqrt()

    def build_head(self) -> nn.Module:
        """Build the layer of the teacher's states beside the backbone's own output layer.

        Raises:
            GraftError: The backbone has no output layer, or the teacher cannot be built.
        """
        return DistilledHead(super().build_head(), self._built.width, self._teacher[0].width)

    def compute_loss(self, batch: ProteinBatch) -> Tensor:
        """Return the loss of a batch, changed and hidden by the seed of the step."""
        residues = batch.residues
        batch = batch._replace(residues=self._change(residues, batch.mask))
        draws = torch.rand(2, *residues.shape, device=residues.device)
        letters = torch.randint(0, len(STANDARD), residues.shape, device=residues.device)
        given, wanted = self._hide(batch, draws, letters)
        hidden = torch.rand(len(residues), 1, device=residues.device) < 0.5
        given = torch.where(hidden, given, batch.residues)
        with self.attached.grad_mode():
            features = self.features(batch._replace(residues=given))
        logits = self.head(features).movedim(-1, 1)
        letter_loss = self.loss(logits.float(), wanted.masked_fill(~hidden, IGNORE))
        return self._state_loss(features, batch) + self.settings["lm_weight"] * letter_loss

    def validation_step(self, batch: ProteinBatch, batch_idx: int) -> None:
        """Log the states' loss besides what `MaskedLM` does."""
        super().validation_step(batch, batch_idx)
        found = self._state_loss(self.features(batch), batch)
        self.log("val/state_loss", found, on_step=False, on_epoch=True, batch_size=len(batch.residues))

    # ---- model card

    def _head_lines(self) -> str:
        return (
            "head = built.lm_head.eval()\n"
            'state = load_file(f"{FOLDER}/head.safetensors")\n'
            'head.load_state_dict({n.removeprefix("lm."): t for n, t in state.items() if n.startswith("lm.")})\n'
        )

    # ---- what the loss is made of

    def _state_loss(self, features: Tensor, batch: ProteinBatch) -> Tensor:
        """Compare the student's states with the teacher's: by residue and in the mean over each protein."""
        built, spread = self._teacher
        with torch.no_grad():
            wanted = residue_features(built, built.model, batch.residues, batch.mask)
        kept = batch.mask.unsqueeze(2)
        error = (self.head.states(features).float() - wanted.float() / spread) * kept  # (B, L, teacher's width)
        lengths = kept.sum(dim=1)
        by_residue = error.square().sum() / (lengths.sum() * error.shape[2])
        return by_residue + _MEAN_WEIGHT * (error.sum(dim=1) / lengths).square().mean()

    def _change(self, residues: Tensor, mask: Tensor) -> Tensor:
        """Draw a random part of some proteins' residues anew, each protein from a composition of its own; (B, L)."""
        count, length = residues.shape
        alpha = torch.full((count, len(STANDARD)), _CONCENTRATION, device=residues.device)
        drawn = torch.multinomial(torch.distributions.Dirichlet(alpha).sample(), length, replacement=True)
        rate = torch.rand(count, 1, device=residues.device)
        chosen = torch.rand(count, 1, device=residues.device) < self.settings["changed"]
        replaced = chosen & mask & (torch.rand(count, length, device=residues.device) < rate)
        return torch.where(replaced, drawn, residues)
