"""Frozen weights in fewer bits: the adapter is trained, saved and loaded as on whole weights, and nothing is merged."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from common.attach import attach, probe
from common.errors import GraftError
from common.exchange import export, load, merged_backbone
from common.methods import LoRA
from common.quantise import installed, quantise
from common.run import fit, read_record
from tests.toy import DOMAINS, FAMILY, ToyData, ToyTask, toy_backbone

needs_bitsandbytes = pytest.mark.skipif(
    not installed(), reason="bitsandbytes is an extra: pip install graft[quantised]"
)
BITS = pytest.mark.parametrize("bits", ["int8", "nf4"])


def wide(seed=0):
    """A backbone of layers wide enough for blocks of 64 weights."""
    return toy_backbone(seed, width=64)


def attached(bits, **settings):
    return attach(wide(), LoRA(rank=2, quantize=bits, **settings), FAMILY, name="toy")


def run(model):
    with torch.no_grad():
        return model.eval()(torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(1)))


def test_without_bitsandbytes_it_is_refused(monkeypatch):
    monkeypatch.setattr("common.quantise.installed", lambda: False)
    with pytest.raises(GraftError, match="needs bitsandbytes, which is not installed"):
        attached("int8")


def test_other_layers_and_shared_weights_are_refused(monkeypatch):
    monkeypatch.setattr("common.quantise.installed", lambda: True)
    net = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1), nn.Linear(4, 4))
    with pytest.raises(GraftError, match="takes linear layers, and '1' is a Conv1d"):
        quantise(net, {"1": "int8"})
    net[2].weight = net[0].weight
    with pytest.raises(GraftError, match="cannot take '2', whose weight another layer shares"):
        quantise(net, {"2": "nf4"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dora": True}, "goes with neither dora"),
        ({"init": "pissa"}, "neither dora nor the starts"),
    ],
)
def test_what_needs_the_whole_weight_is_refused(settings, message):
    with pytest.raises(GraftError, match=message):
        attached("nf4", **settings)


@needs_bitsandbytes
@BITS
def test_only_the_adapter_trains_on_weights_in_fewer_bits(bits):
    result = attached(bits)
    probe(result, lambda: result.model(torch.randn(2, 3, 4)))
    assert all("lora_" in name for name, p in result.model.named_parameters() if p.requires_grad)
    kinds = {type(module.get_base_layer()).__name__ for module in result.model.modules() if hasattr(module, "lora_A")}
    assert kinds == {{"int8": "Linear8bitLt", "nf4": "Linear4bit"}[bits]}
    held = {name: p.numel() * p.element_size() for name, p in result.model.named_parameters() if "fc1.base" in name}
    whole = 2 * 64 * 128 * 4  # two blocks
    assert sum(size for name, size in held.items() if name.endswith("weight")) == whole // {"int8": 4, "nf4": 8}[bits]


@needs_bitsandbytes
@BITS
def test_a_fresh_one_is_the_backbone_up_to_rounding(bits):
    bare, close = run(wide()), {"int8": 0.05, "nf4": 0.25}[bits]
    error = (run(attached(bits).model) - bare).norm() / bare.norm()
    assert 0 < error < close


@needs_bitsandbytes
@BITS
def test_a_run_is_exported_reloads_exactly_and_is_not_merged(bits, tmp_path):
    spec = LoRA(rank=2, quantize=bits)
    fit(ToyTask(spec), ToyData(), tmp_path / "run", max_epochs=1)
    certificate = export(tmp_path / "run", tmp_path / "adapter", read_record(tmp_path / "run"), DOMAINS)
    assert certificate["reload_max_abs_error"] <= 1e-5
    assert f"held in {bits}" in certificate["not_mergeable"]
    with pytest.raises(GraftError, match="merge there"):
        merged_backbone(load(tmp_path / "adapter", DOMAINS))
