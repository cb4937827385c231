"""Combine exported adapters of one backbone in the space of its weights: linear, TIES and DARE."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from common import __version__
from common.domain import Domain
from common.errors import GraftError
from common.exchange import CERTIFICATE, GRAFT, HEAD, MODEL, fresh, load, merged_backbone, new_folder, write_json
from common.methods import FullFineTune, LinearProbe

if TYPE_CHECKING:
    pass

How = Literal["linear", "ties", "dare"]
Change = Mapping[str, Tensor]  # a backbone's parameter to what an adapter adds to it


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How the changes of several adapters become one.

    Attributes:
        weights: The factor of each adapter.
        how: `linear` adds w_i d_i. `ties` (arXiv 2306.01708) keeps the `density` largest entries of each d_i, lets the
            weighted sum decide the sign of each entry, and averages those that agree with it, by their weights, times
            the sum of all weights. `dare` (arXiv 2311.03099) keeps each entry with probability `density`, divides it by
            `density`, and adds as `linear` does.
        density: Share of a change's entries that `ties` and `dare` keep, in (0, 1].
        seed: Seed of what `dare` drops.
    """

    weights: tuple[float, ...]
    how: How = "linear"
    density: float = 0.2
    seed: int = 0

    def check(self, adapters: int) -> None:
        """Raise one `GraftError` that names everything that is wrong."""
        wrong = [] if self.how in get_args(How) else [f"how is '{self.how}' (one of {', '.join(get_args(How))})"]
        if len(self.weights) != adapters:
            wrong.append(f"{len(self.weights)} weights for {adapters} adapters")
        if not 0 < self.density <= 1:
            wrong.append(f"density is {self.density} (in (0, 1])")
        if adapters < 2:
            wrong.append("fewer than two adapters")
        if wrong:
            raise GraftError(f"These adapters cannot be combined: {'; '.join(wrong)}.")


def combine(folders: Sequence[Path], out: Path, domains: Mapping[str, Domain], rule: Rule) -> None:
    """Write an adapter folder whose backbone holds the combined changes of several adapters.

    The folder is laid out as that of full fine-tuning: plain weights, with head and task of the first adapter, so that
    `graft predict` takes it. For another one's head, name that one first.

    Args:
        folders: Adapter folders of one backbone; any method that merges.
        out: The folder to make; it must not exist.
        domains: The registered domains.
        rule: How to combine.

    Raises:
        GraftError: The rule does not fit, the adapters stand on different weights, one cannot be merged, or `out`
            exists; nothing is left then.
    """
    rule.check(len(folders))
    first = load(folders[0], domains)
    record = json.loads((folders[0] / GRAFT).read_text())
    bare = fresh(first, LinearProbe()).backbone
    changes = []
    for folder in folders:
        task = load(folder, domains)
        other = json.loads((folder / GRAFT).read_text())
        if other["base_digest"] != record["base_digest"]:
            raise GraftError(
                f"{folder} stands on other weights ({other['backbone']}) than {folders[0]} "
                f"({record['backbone']}). Combine adapters of one backbone."
            )
        changes.append(_change(merged_backbone(task), bare))
    total = combined(changes, rule)
    state = bare.state_dict()
    with torch.no_grad():
        for name, change in total.items():
            state[name] = (state[name].to(change.dtype) + change).to(state[name].dtype)
    with new_folder(out) as place:
        save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, place / MODEL)
        save_file(first.head.state_dict(), place / HEAD)
        kept = {key: record[key] for key in ("domain", "task", "settings", "facts", "optim", "seed", "base_digest")}
        method = FullFineTune().describe()
        write_json(
            place / GRAFT,
            {"schema": 1, "graft": __version__, **kept, "method": method, "backbone": record["backbone"]},
        )
        told = {"adapters": [str(folder) for folder in folders], **asdict(rule)}
        write_json(place / CERTIFICATE, {"combined": told})
        (place / "README.md").write_text(_card(told, record))


def combined(changes: Sequence[Change], rule: Rule) -> dict[str, Tensor]:
    """Combine changes of the same parameters; a parameter that an adapter does not change is a change of zero.

    Args:
        changes: For each adapter the changed parameters, name to difference, in any shapes.
        rule: How to combine; it must fit the number of changes.

    Returns:
        The changes to add to the frozen weights.
    """
    generator = torch.Generator().manual_seed(rule.seed)
    if rule.how == "ties":
        changes = [_trimmed(change, rule.density) for change in changes]
    elif rule.how == "dare":
        changes = [_dropped(change, rule.density, generator) for change in changes]
    joined: Callable[[Tensor, Tensor], Tensor] = _agreeing if rule.how == "ties" else _sum
    weights = torch.tensor(rule.weights)
    result = {}
    for name in sorted(set().union(*changes)):
        like = next(change[name] for change in changes if name in change)
        stacked = torch.stack([change.get(name, torch.zeros_like(like)) for change in changes])
        result[name] = joined(stacked, weights.to(like.dtype).view(-1, *(1,) * like.ndim))
    return result


def _sum(stacked: Tensor, weights: Tensor) -> Tensor:
    return (weights * stacked).sum(0)


def _agreeing(stacked: Tensor, weights: Tensor) -> Tensor:
    """Average the entries whose sign is that of the weighted sum, by weight, times the sum of all weights."""
    weighted = weights * stacked
    agrees = (weighted.sign() == weighted.sum(0).sign()) & (stacked != 0)
    share = (weights.abs() * agrees).sum(0)
    return weights.abs().sum() * (weighted * agrees).sum(0) / share.clamp_min(torch.finfo(share.dtype).tiny)


def _trimmed(change: Change, density: float) -> dict[str, Tensor]:
    """Keep the largest entries of a whole change, all parameters together."""
    sizes = torch.cat([tensor.abs().flatten() for tensor in change.values()])
    dropped = len(sizes) - max(1, round(density * len(sizes)))
    if dropped == 0:
        return dict(change)
    threshold = sizes.kthvalue(dropped).values
    return {name: tensor * (tensor.abs() > threshold) for name, tensor in change.items()}


def _dropped(change: Change, density: float, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        name: tensor * (torch.rand(tensor.shape, generator=generator) < density) / density
        for name, tensor in sorted(change.items())
    }


def _change(merged: nn.Module, bare: nn.Module) -> dict[str, Tensor]:
    """Return what differs, in single precision at least; integers (counters of batches) stay the frozen ones."""
    frozen = bare.state_dict()
    found = {}
    for name, tensor in merged.state_dict().items():
        if tensor.is_floating_point() and not torch.equal(tensor, frozen[name]):
            precise = torch.promote_types(tensor.dtype, torch.float32)
            found[name] = tensor.to(precise) - frozen[name].to(precise)
    return found


def _card(told: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    lines = [f"- `{name}`, weight {weight:g}" for name, weight in zip(told["adapters"], told["weights"], strict=True)]
    kept = "" if told["how"] == "linear" else f", density {told['density']:g}"
    return (
        f"# Combined adapters on {record['backbone']}\n\nRule: {told['how']}{kept}. Head and task are the "
        "first adapter's. Nothing says how well this works: measure it.\n\n" + "\n".join(lines) + "\n"
    )
