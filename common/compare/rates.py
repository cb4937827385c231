"""The learning rates that a comparison on the command line offers each method, three apiece.

They are starting points: a best rate at an end of its grid is named in the report, and a study file or `--rates` moves
the grid. Methods that change pretrained weights themselves need lower rates than those that add small new parts, and
those that train a few shared numbers higher ones.

| methods | rates |
|---|---|
| LinearProbe | 3e-3, 1e-2, 3e-2 (of the head: `model.optim.head_lr`) |
| FullFineTune, LastBlocks, SuperTuning | 1e-5, 1e-4, 1e-3 |
| BitFit, BEFT, DiffFit, NormTuning, NormBias, SSF, RoAd | 1e-3, 3e-3, 1e-2 |
| IA3, VeRA, PVeRA, VBLoRA, TinyLoRA, UniLoRA, FourierFT, WaveFT, prompts and prefixes | 3e-3, 1e-2, 3e-2 |
| LoRA and its kin, bottleneck adapters, all others | 3e-4, 1e-3, 3e-3 |
"""

from __future__ import annotations

from collections.abc import Mapping

_HIGH, _VECTORS, _WHOLE = (3e-3, 1e-2, 3e-2), (1e-3, 3e-3, 1e-2), (1e-5, 1e-4, 1e-3)
_OTHERS = (3e-4, 1e-3, 3e-3)
_NAMES: Mapping[tuple[float, ...], str] = {
    _HIGH: "LinearProbe IA3 VeRA PVeRA VBLoRA TinyLoRA UniLoRA FourierFT WaveFT "
    "VPTShallow VPTDeep PromptTuning PrefixTuning",
    _VECTORS: "BitFit BEFT DiffFit NormTuning NormBias SSF RoAd",
    _WHOLE: "FullFineTune LastBlocks SuperTuning",
}
RATES: Mapping[str, tuple[float, ...]] = {name: rates for rates, names in _NAMES.items() for name in names.split()}
# A linear probe has no other rate than the head's.
_HEAD_ONLY = "LinearProbe"


def rates_of(method: str) -> tuple[float, ...]:
    """Return the rates that a method is offered where nobody says otherwise."""
    return RATES.get(method, _OTHERS)


def takers_of(method: str) -> tuple[str, ...]:
    """Return the options of `graft fit` that take a method's rate."""
    return ("model.optim.head_lr",) if method == _HEAD_ONLY else ("model.optim.lr",)
