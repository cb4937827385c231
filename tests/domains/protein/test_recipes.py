"""Every shipped protein recipe parses through the real command line, and its method lives on its backbone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common._yaml import load_yaml
from common.attach import probe
from domains.protein import _task
from domains.protein.data import ProteinData, ProteinFacts
from domains.protein.residue_tasks import MaskedLM
from tests.domains.protein.conftest import NAMES

ROOT = Path(__file__).parents[3]
RECIPES = sorted((ROOT / "configs" / "protein").glob("*.yaml"))
PUBLISHED = [path for path in RECIPES if path.stem.startswith("esm2")]


def test_there_are_recipes():
    names = {path.stem for path in RECIPES}
    assert names >= {"amp", "enzyme_class", "superkingdom", "own_csv", "own_residues", "own_pairs", "adapt_fasta"}
    sizes = {load_yaml(path)["model"]["init_args"]["backbone"].split("_")[2] for path in PUBLISHED}
    assert sizes == {"8M", "35M", "150M", "650M"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_what_it_is_for_and_its_command_runs(path, run_command):
    task, data = run_command(path)
    assert isinstance(data, ProteinData)
    assert (task.seed, data.seed) == (0, 0)


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_a_published_protocol_names_its_figure_and_its_source(path):
    header = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert "# Expected: not run by us" in header
    assert "Source: " in header
    assert "github.com/" in header


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipes_method_lives_on_its_backbone(path, fit, monkeypatch):
    """The real architecture with random weights; large ones are cut to two layers, and names of layers with them."""
    task, *_ = fit("--config", path, "--model.pretrained", "false")
    build = _task.build

    def shallow(name, *, pretrained, weights, layers):
        assert not pretrained
        with torch.device("meta"):
            cut = build(name, pretrained=False, weights=weights, layers=2)
        cut.model.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in cut.model.parameters():
                parameter.normal_(std=0.02)
            for name, buffer in cut.model.named_buffers():
                buffer.copy_(torch.arange(buffer.numel()).view_as(buffer) if "position" in name else torch.ones(()))
        return cut

    if path in PUBLISHED:
        monkeypatch.setattr(_task, "build", shallow)
        if task.peft.target_modules is not None:
            names = [name.replace("layer.25", "layer.0") for name in task.peft.target_modules if "layer.25" in name]
            task.peft = type(task.peft)(**{**vars(task.peft), "target_modules": names})
    names = NAMES[task.kind] or ()
    task.facts = ProteinFacts(
        kind=task.kind, class_names=names, max_length=64, long="truncate", name="", digest="", counts={}
    )
    if isinstance(task, MaskedLM):
        assert task.primary == ("perplexity", "min")
    task.assemble()
    probe(task.attached, lambda: task.features(task.example_batch()))
    assert any(parameter.requires_grad for parameter in task.backbone.parameters())
