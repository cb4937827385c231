"""Medical starters: what an export becomes, and that the catalog's files are networks that there are."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from common import artifacts
from common.errors import GraftError
from common.methods import FullFineTune
from common.starters import save_starter
from domains.medical.backbones import NETS
from domains.medical.starters import STARTERS, classes_of, load_segmenter, starter_from_export, stated
from tests.domains.medical.conftest import data_of, task_of


def test_a_segmentation_task_becomes_a_starter_under_monais_names(tmp_path):
    """The head's names and the facts are those that a starter is made of."""
    task, folder = task_of(FullFineTune(), data_of()), tmp_path / "export"
    folder.mkdir()
    record = {"task": "Segmentation", "facts": task.describe_facts(), "method": {"class_path": "FullFineTune"}}
    (folder / "graft.json").write_text(json.dumps(record))
    save_file(task.head.state_dict(), folder / "head.safetensors")
    save_file(task.backbone.state_dict(), folder / "model.safetensors")
    starter_from_export(folder, tmp_path / "s.safetensors")
    file = load_segmenter(tmp_path / "s.safetensors")
    assert classes_of(file) == task.facts.class_names
    assert tuple(json.loads(file.metadata["spacing"])) == task.facts.spacing
    again = task_of(FullFineTune(), data_of(), weights=str(tmp_path / "s.safetensors"), seed=9)
    assert again.head.from_checkpoint
    with torch.no_grad():
        batch = task.example_batch()
        torch.testing.assert_close(again(batch), task(batch), atol=1e-2, rtol=1e-2)


def test_a_file_has_to_state_its_classes_and_spacing(tmp_path):
    path = tmp_path / "s.safetensors"
    save_starter(path, {"w": torch.zeros(1)}, {}, {"recipe": "x"})
    with pytest.raises(GraftError, match="does not state its classes, spacing"):
        load_segmenter(path)
    save_starter(path, {"w": torch.zeros(1)}, {}, stated(("background", "noyau caudé"), (2, 1.5), "x"))
    assert classes_of(load_segmenter(path)) == ("background", "noyau caudé")


@pytest.mark.parametrize("name", STARTERS)
def test_every_starter_names_a_network_that_there_is_and_the_catalog_the_same(name):
    starter = STARTERS[name]
    assert starter.name == name
    assert starter.arch in NETS
    assert artifacts.row(name).backbone == f"monai:{starter.arch}"
    assert classes_of(load_segmenter(artifacts.DATA_FOLDER / "starters" / f"{name}.safetensors"))[0] == "background"
