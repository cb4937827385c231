"""An adapter folder is verified by what it computes, not by what it says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.cli import run
from common.errors import GraftError
from common.exchange import ADAPTER, CERTIFICATE, GRAFT, PROBE, export, probe_values
from common.run import fit, read_record
from common.verify import verify
from tests.toy import DOMAINS, ToyData, ToyTask, spec_of


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Adapter folders by method, each exported once."""
    done = {}

    def build(name):
        if name not in done:
            place = tmp_path_factory.mktemp(name)
            fit(ToyTask(spec_of(name)), ToyData(), place / "run", max_epochs=1)
            export(place / "run", place / "adapter", read_record(place / "run"), DOMAINS)
            done[name] = place / "adapter"
        return done[name]

    return build


@pytest.fixture
def adapter(exported, tmp_path):
    """A copy to be damaged."""
    return Path(shutil.copytree(exported("LoRA"), tmp_path / "adapter"))


@pytest.mark.parametrize("name", ["LoRA", "Houlsby", "LinearProbe", "FullFineTune"])
def test_what_was_exported_verifies(exported, name, capsys):
    folder = exported(name)
    found = verify(folder, DOMAINS)
    assert found.output_error == 0.0
    assert (found.merge_error is None) == (name == "Houlsby")
    assert found.not_mergeable.startswith("Houlsby cannot be merged on toy" if name == "Houlsby" else "")
    certificate = json.loads((folder / CERTIFICATE).read_text())
    assert found.base_digest == certificate["base_digest"]
    assert found.versions["torch"] == torch.__version__
    assert run(["verify", str(folder)], DOMAINS) == 0
    said = capsys.readouterr().out
    assert f"base {found.base_digest[:12]} fits, outputs within 0.0e+00, " in said


def test_an_adapter_that_computes_something_else_is_refused(adapter, capsys):
    state = load_file(adapter / ADAPTER)
    name = next(key for key in state if "lora_B" in key)
    save_file({**state, name: state[name] + 0.1}, adapter / ADAPTER)
    assert run(["verify", str(adapter)], DOMAINS) == 2
    assert "does not compute what it was exported with: outputs differ by " in capsys.readouterr().err


def test_values_that_are_not_numbers_are_refused(adapter):
    state = load_file(adapter / ADAPTER)
    save_file({key: tensor * float("nan") for key, tensor in state.items()}, adapter / ADAPTER)
    with pytest.raises(GraftError, match="outputs differ by nan"):
        verify(adapter, DOMAINS)


def test_another_base_is_refused(adapter):
    record = json.loads((adapter / GRAFT).read_text())
    record["settings"]["base_seed"] = 5
    (adapter / GRAFT).write_text(json.dumps(record))
    with pytest.raises(GraftError, match="trained on other weights of 'toy'"):
        verify(adapter, DOMAINS)


def test_a_folder_without_its_outputs_is_refused(adapter):
    save_file({"outputs": torch.zeros(2)}, adapter / PROBE)
    with pytest.raises(GraftError, match="gives 6 values and 2 are stored"):
        verify(adapter, DOMAINS)
    (adapter / PROBE).unlink()
    with pytest.raises(GraftError, match=f"no readable {PROBE}"):
        verify(adapter, DOMAINS)


@pytest.mark.parametrize("size", [1, 4096, 4097, 10_000])
def test_few_values_are_kept_evenly_spread(size):
    outputs = torch.arange(size, dtype=torch.float32).reshape(1, size)
    kept = probe_values(outputs)
    assert len(kept) <= 4096
    assert len(kept) > min(size, 4096) // 2
    assert len(set(torch.diff(kept).tolist())) <= 1
    assert kept[0] == 0
