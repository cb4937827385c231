"""Ranking the triplets of PEFT's AdaLoRA layers by what the loss feels of them (arXiv 2303.10512)."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.adalora.layer import AdaLoraLayer
from torch import Tensor, nn

ADAPTER = "default"
_SMOOTHING = 0.85  # of sensitivity and of uncertainty, as in the paper
_PARTS = ("lora_A", "lora_E", "lora_B")  # (rank, in), (rank, 1), (out, rank)


def layers(model: nn.Module) -> dict[str, Any]:
    """Return the AdaLoRA layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaLoraLayer)}


def triplets(model: nn.Module, rank: int) -> int:
    """Return how many triplets a rank a layer makes."""
    return rank * len(layers(model))


def orthogonality(model: nn.Module) -> Tensor:
    """Return |A A' - I| + |B' B - I| (Frobenius), the mean over all factors."""
    found = []
    for layer in layers(model).values():
        for factor in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER].T):
            gram = factor @ factor.T
            found.append((gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).norm())
    return torch.stack(found).mean()


@torch.no_grad()
def observe(model: nn.Module, memory: dict[str, Tensor]) -> None:
    """Update sensitivity |p dL/dp| and its uncertainty, both smoothed, of every trained number."""
    for name, layer in layers(model).items():
        for part in _PARTS:
            parameter = getattr(layer, part)[ADAPTER]
            felt = torch.zeros_like(parameter) if parameter.grad is None else (parameter * parameter.grad).abs()
            sensitivity = _recall(memory, f"{name}.{part}.sensitivity", parameter)
            sensitivity.mul_(_SMOOTHING).add_(felt, alpha=1 - _SMOOTHING)
            uncertainty = _recall(memory, f"{name}.{part}.uncertainty", parameter)
            uncertainty.mul_(_SMOOTHING).add_((felt - sensitivity).abs(), alpha=1 - _SMOOTHING)


@torch.no_grad()
def prune(model: nn.Module, memory: dict[str, Tensor], keep: int | None) -> None:
    """Set the entries e of all triplets but the greatest to zero.

    Args:
        model: The adapted model.
        memory: What `observe` has written; the choice is kept in it.
        keep: How many triplets stay in the whole model; None keeps to the last choice.
    """
    found = layers(model)
    if keep is not None:
        scores = torch.cat([_scores(memory, name, layer) for name, layer in found.items()])
        kept = torch.zeros_like(scores, dtype=torch.bool)
        kept[scores.topk(min(keep, len(scores))).indices] = True
        sizes = [len(layer.lora_E[ADAPTER]) for layer in found.values()]
        memory.update({f"{name}.kept": part for name, part in zip(found, kept.split(sizes), strict=True)})
    for name, layer in found.items():
        entries = layer.lora_E[ADAPTER]
        if f"{name}.kept" in memory:
            entries.mul_(memory[f"{name}.kept"].to(entries.device)[:, None])


def _recall(memory: dict[str, Tensor], key: str, parameter: Tensor) -> Tensor:
    """Return a running value on the parameter's device, zero at first."""
    memory[key] = memory[key].to(parameter.device) if key in memory else torch.zeros_like(parameter)
    return memory[key]


def _scores(memory: dict[str, Tensor], name: str, layer: Any) -> Tensor:  # noqa: ANN401
    """Return the importance of each triplet of a layer: that of its entry, and the mean ones of its two vectors."""

    def felt(part: str) -> Tensor:
        return memory[f"{name}.{part}.sensitivity"] * memory[f"{name}.{part}.uncertainty"]

    return felt("lora_E").view(-1) + felt("lora_A").mean(dim=1) + felt("lora_B").mean(dim=0)
