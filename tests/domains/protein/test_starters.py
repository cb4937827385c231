"""Starter files: what goes in comes out, in half precision, and builds the network that was trained."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from common import artifacts
from common.errors import GraftError
from common.starters import load_starter, save_starter
from domains.protein import backbones
from domains.protein.backbones import build, lm_logits
from domains.protein.starters import STARTERS, Starter, starter_from_export
from tests.domains.protein.nets import proteins

SMALL = Starter(name="esm2-graft", layers=2, width=16, heads=4)


@pytest.fixture
def trained(monkeypatch):
    """A starter of two thin blocks with random weights under the name of the real one."""
    monkeypatch.setattr(backbones, "STARTERS", {"esm2-graft": SMALL})
    torch.manual_seed(0)
    built = build("esm2-graft", pretrained=False)
    for module in (built.model, built.lm_head):
        for parameter in module.parameters():
            parameter.data = torch.randn_like(parameter).mul_(0.3).half().float()  # what a file can hold
    return built


def export(built, folder, method="FullFineTune"):
    """What `graft export` writes after a full training."""
    folder.mkdir()
    save_file(built.lm_head.state_dict(), folder / "head.safetensors")
    if method == "FullFineTune":
        save_file(built.model.state_dict(), folder / "model.safetensors")
    record = {"task": "MaskedLM", "settings": {"backbone": "esm2-graft"}, "optim": {"lr": 1e-3}, "seed": 0, "facts": {}}
    (folder / "graft.json").write_text(json.dumps(record | {"method": {"class_path": method, "init_args": {}}}))
    return folder


def test_an_export_becomes_a_starter_that_computes_the_same(trained, tmp_path):
    starter_from_export(export(trained, tmp_path / "export"), tmp_path / "s.safetensors")
    loaded = build("esm2-graft", weights=str(tmp_path / "s.safetensors"))
    residues, mask = proteins((60, 5))
    with torch.no_grad():
        expected, found = (lm_logits(built, built.model, residues, mask) for built in (trained, loaded))
    assert torch.equal(found[mask], expected[mask])
    recipe = json.loads(load_starter(tmp_path / "s.safetensors").metadata["recipe"])
    assert recipe["task"] == "MaskedLM"
    assert recipe["method"]["class_path"] == "FullFineTune"
    stored = load_file(tmp_path / "s.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert not any(name.endswith("inv_freq") for name in stored)


def test_a_cut_starter_is_its_first_blocks(trained, tmp_path):
    starter_from_export(export(trained, tmp_path / "export"), tmp_path / "s.safetensors")
    cut = build("esm2-graft", weights=str(tmp_path / "s.safetensors"), layers=1)
    assert (cut.layers, cut.has_lm) == (1, False)
    assert cut.model.state_dict().keys() < trained.model.state_dict().keys()


def test_a_starter_of_another_size_is_refused(trained, tmp_path):
    path = tmp_path / "s.safetensors"
    save_starter(path, trained.model.state_dict(), trained.lm_head.state_dict(), {"recipe": "x"})
    backbones.STARTERS["esm2-graft"] = Starter(name="esm2-graft", layers=2, width=24, heads=4)
    with pytest.raises(
        GraftError, match=r"does not fit: \d+ tensors differ, such as .*\(33, 16\) in the file, \(33, 24\) here"
    ):
        build("esm2-graft", weights=str(path))


@pytest.mark.parametrize("name", STARTERS)
def test_the_catalog_and_the_starters_agree(name):
    assert artifacts.row(name).backbone == "transformers:EsmModel"
    built = build(name, weights=str(artifacts.DATA_FOLDER / "starters" / f"{name}.safetensors"))
    assert built.has_lm
    assert built.layers == STARTERS[name].layers
