"""A cell tells exact from broken: each check fails on a method that breaks just what it looks at."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from peft import LoraConfig, PeftModel, VeraConfig
from peft.tuners.lora.layer import Linear as LoraLinear

from common import methods
from common.errors import GraftError
from common.matrix import checks, run_cell
from common.matrix.settings import CHANGES_AT_START, ROLES, TINY
from common.methods import METHODS, OnModules, Plan
from common.methods._base import exact
from common.tuners import CopiesConfig
from common.tuners.copies import CopiesLayer
from tests.common.matrix.toy_specimens import toy, with_a_dead_layer


@dataclass(frozen=True, kw_only=True)
class Odd(OnModules):
    """A method for these tests; a subclass builds its configuration."""

    def config(self, pattern):
        return LoraConfig(r=2, target_modules=pattern)

    def plan(self, model, roles):
        targets = self.select(model, roles)
        return Plan(peft_config=self.config(exact(list(targets))), targets=targets)


@pytest.fixture
def cell(monkeypatch):
    """Run a method that is no part of the registry."""

    def run(spec, build=toy):
        monkeypatch.setitem(methods.METHODS, "Odd", spec)
        return run_cell("Odd", "toy", build)

    return run


def test_the_tables_name_methods_that_there_are():
    assert {*TINY, *CHANGES_AT_START} <= METHODS.keys()


@pytest.mark.parametrize("method", ["LoRA", "BitFit", "LastBlocks", "FullFineTune", "LinearProbe"])
def test_a_method_that_does_all_is_exact(method):
    cell = run_cell(method, "toy", toy)
    assert (cell.verdict, cell.reason, cell.remarks) == ("exact", "", ())
    assert cell.own == (method == "BitFit")


def test_what_cannot_be_merged_is_a_remark(cell):
    found = run_cell("Houlsby", "toy", toy)
    assert found.verdict == "exact"
    assert [remark.partition(": its")[0] for remark in found.remarks] == ["not mergeable"]


def test_a_method_is_tried_on_other_roles_where_its_own_are_missing():
    cell = run_cell("ConvAdapter", "toy", toy)
    assert cell.verdict == "refused"  # no role of the toy is made of convolutions alone
    assert cell.reason.startswith("Role 'conv' matches no module of this toy backbone.")
    assert ["stem"] in list(ROLES)


def test_the_first_roles_that_fit_are_remarked(cell):
    @dataclass(frozen=True, kw_only=True)
    class Picky(Odd):
        def plan(self, model, roles):
            if self.on != ["ffn"]:
                raise GraftError("Picky takes ffn alone.")
            return super().plan(model, roles)

    found = cell(Picky)
    assert (found.verdict, found.remarks) == ("exact", ("with `on: [ffn]`",))


def test_a_refusal_needs_a_reason_of_ours(cell):
    @dataclass(frozen=True, kw_only=True)
    class Crashing(Odd):
        def plan(self, model, roles):
            raise KeyError("nowhere")

    found = cell(Crashing)
    assert (found.verdict, found.reason) == ("FAIL", "attach: KeyError: 'nowhere'")


def test_a_dead_adapter_is_refused_before_training(cell):
    found = cell(Odd, with_a_dead_layer)
    assert found.verdict == "refused"
    assert "adapters are dead in train mode" in found.reason


def test_a_start_that_changes_the_output_fails(cell, monkeypatch):
    class Jump(Odd):
        def config(self, pattern):
            return LoraConfig(r=2, target_modules=pattern, init_lora_weights=False)

    found = cell(Jump)
    assert found.verdict == "FAIL"
    assert found.reason.startswith("identity at the start: a fresh method changes the output by ")
    monkeypatch.setattr(checks, "CHANGES_AT_START", {"Jump": "it jumps"})
    found = cell(Jump)
    assert found.remarks == ("changes the output from the start: it jumps",)


def test_parameters_that_never_move_fail(cell):
    class Idle(Odd):
        def config(self, pattern):
            return LoraConfig(r=2, target_modules=pattern, lora_alpha=0)

    found = cell(Idle)
    assert found.verdict == "refused"  # the probe sees that no adapter gets a gradient
    assert "dead" in found.reason


def test_frozen_parameters_that_move_fail(cell, monkeypatch):
    forward = CopiesLayer.forward

    def drifting(self, x, *args, **kwargs):
        if torch.is_grad_enabled():
            self.base_layer.bias.data += 1e-3
        return forward(self, x, *args, **kwargs)

    class Drift(Odd):
        def config(self, pattern):
            return CopiesConfig(target_modules=pattern, bias_of=pattern)

    monkeypatch.setattr(CopiesLayer, "forward", drifting)
    found = cell(Drift)
    assert found.verdict == "FAIL"
    assert found.reason.startswith("only intended parameters move: frozen ones move: blocks.0.fc1.base_layer.bias, ")


def test_a_step_that_depends_on_more_than_its_state_fails(cell):
    count = iter(range(100))

    class Fickle(Odd):
        def config(self, pattern):
            return VeraConfig(r=4, target_modules=pattern, projection_prng_key=next(count), save_projection=True)

    found = cell(Fickle)
    assert found.verdict == "FAIL"
    assert found.reason.startswith("exact resume: ")


def test_a_base_that_trains_along_fails_when_disabled(cell):
    class Biased(Odd):
        def config(self, pattern):
            return LoraConfig(r=2, target_modules=pattern, bias="all")

    found = cell(Biased)
    assert found.verdict == "FAIL"
    assert found.reason.startswith("disabled: disabled, outputs differ by ")


def test_what_a_folder_leaves_out_fails_on_reload(cell, monkeypatch):
    save = PeftModel.save_pretrained

    def forgetful(self, *args, **kwargs):
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(0.5)
            save(self, *args, **kwargs)
            for name, parameter in self.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(2.0)

    monkeypatch.setattr(PeftModel, "save_pretrained", forgetful)
    found = cell(Odd)
    assert found.verdict == "FAIL"
    assert found.reason.startswith("save and reload: reloaded, outputs differ by ")


def test_a_merge_that_changes_outputs_fails(cell, monkeypatch):
    delta = LoraLinear.get_delta_weight
    monkeypatch.setattr(LoraLinear, "get_delta_weight", lambda self, adapter: 1.1 * delta(self, adapter))
    found = cell(Odd)
    assert found.verdict == "FAIL"
    assert found.reason.startswith("merge: merged, outputs differ by ")


def test_a_second_adapter_that_spoils_the_first_fails(cell, monkeypatch):
    load = PeftModel.load_adapter

    def spoiling(self, folder, adapter_name, *args, **kwargs):
        result = load(self, folder, adapter_name, *args, **kwargs)
        if adapter_name == "second":
            with torch.no_grad():
                for name, parameter in self.named_parameters():
                    if "lora_B.first" in name:
                        parameter.zero_()
        return result

    monkeypatch.setattr(PeftModel, "load_adapter", spoiling)
    found = cell(Odd)
    assert found.verdict == "FAIL"
    assert found.reason.startswith("two adapters: switched to the first, outputs differ by ")


def test_what_half_precision_breaks_fails(cell, monkeypatch):
    forward = LoraLinear.forward

    def broken(self, x, *args, **kwargs):
        output = forward(self, x, *args, **kwargs)
        return output * float("nan") if torch.is_autocast_enabled("cpu") else output

    monkeypatch.setattr(LoraLinear, "forward", broken)
    found = cell(Odd)
    assert found.verdict == "FAIL"
    assert found.reason == "bfloat16: in bfloat16 outputs are not finite"


def test_a_cell_leaves_the_random_state_and_the_registry_of_peft_alone():
    from peft import mapping

    before, types = torch.get_rng_state(), dict(mapping.PEFT_TYPE_TO_TUNER_MAPPING)
    run_cell("LoRA", "toy", toy)
    assert torch.equal(torch.get_rng_state(), before)
    assert types == mapping.PEFT_TYPE_TO_TUNER_MAPPING


def test_a_specimen_keeps_what_it_was_given():
    assert replace(toy(), engine=3).engine == 3
