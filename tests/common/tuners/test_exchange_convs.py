"""Runs on a network of convolutions of every kind, shared: exact after reload, merged to plain weights, and told so."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from common.errors import GraftError
from common.exchange import ADAPTER, HEAD, MODEL, export, load, merge, restore
from common.run import fit, read_record
from common.task import OptimSpec
from tests.toy import Batch, Facts, ToyData
from tests.zoo import DOMAINS, ZooTask, zoo, zoo_spec

SPECS = {
    "LoRA": zoo_spec("LoRA", rank=6),
    "LoRA-dora": zoo_spec("LoRA", dora=True),
    "LoRA-peft-thin": zoo_spec("LoRA", rank=9, target_modules=["stem", "fc1"]),
    "LoRA-pissa-thin": zoo_spec("LoRA", rank=7, target_modules=["fc1", "fc2"], init="pissa"),
    "IA3": zoo_spec("IA3"),
    "SSF": zoo_spec("SSF"),
    "NormBias": zoo_spec("NormBias"),
    "BitFit": zoo_spec("BitFit"),
    "ConvAdapter": zoo_spec("ConvAdapter"),
    "Houlsby": zoo_spec("Houlsby"),
}
NOT_MERGEABLE = ("ConvAdapter", "Houlsby")
EACH = pytest.mark.parametrize("name", SPECS)
EXACT = 1e-6


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Build (run folder, adapter folder, certificate, record) of a method once, when it is first asked for."""
    done = {}

    def build(name):
        if name not in done:
            place = tmp_path_factory.mktemp(name)
            fit(ZooTask(SPECS[name], OptimSpec(lr=0.05)), ToyData(), place / "run", max_epochs=1)
            record = read_record(place / "run")
            certificate = export(place / "run", place / "adapter", record, DOMAINS)
            done[name] = place / "run", place / "adapter", certificate, record
        return done[name]

    return build


def logits(task):
    x = torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        return task(Batch(x, torch.zeros(4).long()))


@EACH
def test_reload_and_merge_are_exact(shared, name, tmp_path):
    run, adapter, certificate, record = shared(name)
    task = restore(run, record, DOMAINS)
    expected = logits(task)
    bare = ZooTask(SPECS[name])
    bare.facts = Facts()
    bare.assemble()
    bare.head = task.head
    assert (logits(bare.eval()) - expected).abs().max() > 1e-2  # the adapter has learned something to lose
    assert certificate["reload_max_abs_error"] <= EXACT
    torch.testing.assert_close(logits(load(adapter, DOMAINS)), expected, atol=EXACT, rtol=0)
    if name in NOT_MERGEABLE:
        with pytest.raises(GraftError, match=f"{name} cannot be merged on zoo: its bottlenecks run be.* the layers"):
            merge(adapter, tmp_path / "merged", DOMAINS)
        assert not list(tmp_path.iterdir())
        return
    assert certificate["merge_max_abs_error"] <= 1e-5
    assert merge(adapter, tmp_path / "merged", DOMAINS) <= 1e-5
    plain, head = zoo(3, seed=5).eval(), nn.Linear(5, 2)
    plain.load_state_dict(load_file(tmp_path / "merged" / MODEL))
    head.load_state_dict(load_file(tmp_path / "merged" / HEAD))
    task.backbone, task.head = plain, head
    torch.testing.assert_close(logits(task), expected, atol=1e-5, rtol=0)


@EACH
def test_plain_peft_loads_the_adapter_once_the_tuners_are_imported(shared, name):
    run, adapter, _, record = shared(name)
    task = restore(run, record, DOMAINS)
    expected = logits(task)
    task.backbone = PeftModel.from_pretrained(zoo(3), str(adapter)).eval()
    torch.testing.assert_close(logits(task), expected, atol=EXACT, rtol=0)
    assert not any("base_layer" in key for key in load_file(adapter / ADAPTER))


def test_the_notes_are_in_the_record_and_on_the_card(shared):
    run, adapter, _, record = shared("LoRA")
    assert json.loads((run / "metrics.json").read_text())["notes"] == record["notes"]
    assert [note.split(",")[0].split(" to ")[0] for note in record["notes"]] == [
        "LoRA runs in Graft's own tuner",
        "Rank 6 is lowered",
    ]
    card = (adapter / "README.md").read_text()
    assert all(f"- {note}\n" in card for note in record["notes"])
    assert shared("BitFit")[3]["notes"] == []
