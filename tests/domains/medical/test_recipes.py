"""Every shipped medical recipe parses through the real command line, and its method lives on its backbone."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import timm

from common.attach import probe
from common.compare import load_studies
from domains import DOMAINS
from domains.medical.data import VolumeData, VolumeFacts

ROOT = Path(__file__).parents[3]
RECIPES = sorted((ROOT / "configs" / "medical").glob("*.yaml"))
STUDIES = ["configs/demo.yaml", *(f"configs/studies/macaque_k{slices}.yaml" for slices in (1, 2, 4, 8))]


def test_there_are_recipes():
    names = {path.stem for path in RECIPES}
    assert names >= {"human_to_macaque", "colin_hemisphere", "pretrain_unet3d_colin", "own_decathlon", "own_masks"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_what_it_is_for_and_its_command_runs(path, run_command):
    _, data = run_command(path)
    assert isinstance(data, VolumeData)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipes_method_lives_on_its_backbone(path, fit):
    """The real architecture at a small patch, a ViT cut to two blocks, with random weights."""
    task, data, *_ = fit("--config", path, "--model.pretrained", "false")
    create = timm.create_model

    def shallow(name, **options):
        return create(name, **options, **({"depth": 2} if "vit" in name else {}))

    axes = len(data.patch_size)
    task.facts = VolumeFacts(
        spatial_dims=axes,
        channels=1,
        class_names=("background", "a", "b"),
        spacing=(1.0,) * axes,
        patch_size=(28,) * 2 if axes == 2 else (32,) * 3,
        preprocessing={},
        name="",
        digest="",
        counts={},
    )
    with mock.patch.object(timm, "create_model", shallow):
        if path.stem == "pretrain_unet3d_colin":
            task.settings["class_weights"] = "none"  # those of the recipe are for its own classes
        task.assemble()
    probe(task.attached, lambda: task.features(task.example_batch()))
    assert any(parameter.requires_grad for parameter in task.backbone.parameters())


@pytest.mark.parametrize("path", STUDIES)
def test_a_study_parses_and_its_trials_do(path, fit):
    (study,) = [one for one in load_studies(Path(path)) if one.recipes[0].startswith("configs/medical/")]
    assert set(study.baselines) <= set(DOMAINS["medical"].baselines)
    for trial in study.tuning():
        if trial.lr == next(m for m in study.methods if m.name == trial.method).lrs[0]:
            task, data, *_ = fit(*trial.fit[1:])
            assert data.labelled == study.overrides["data.labelled"]
            assert trial.lr in (task.optim.lr, task.optim.head_lr)
