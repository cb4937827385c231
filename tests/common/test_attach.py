"""Modes by policy, the liveness probe, and the digest of the base."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from common.attach import attach, probe, state_digest, tuner_layers
from common.errors import GraftError
from common.methods import BitFit, FullFineTune, LinearProbe, LoRA, NormTuning
from tests.cases import ON_TOY
from tests.toy import FAMILY, spec_of, toy_backbone


def inputs(batch=4):
    return torch.randn(batch, 3, 4)


def on_toy(spec, **kwargs):
    return attach(toy_backbone(**kwargs), spec, FAMILY)


def statistics(model):
    return {n: b.clone() for n, b in model.named_buffers() if "running" in n or "tracked" in n}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# ---- modes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ON_TOY)
def test_the_statistics_of_norms_move_in_full_fine_tuning_alone(name):
    attached = on_toy(spec_of(name))
    before = statistics(attached.model)
    assert before
    attached.train(True)
    attached.model(inputs())
    assert same(before, statistics(attached.model)) == (name != "FullFineTune")


@pytest.mark.parametrize("name", ON_TOY)
def test_dropout_is_on_while_training_but_not_in_a_frozen_backbone(name):
    attached = on_toy(spec_of(name))
    attached.train(True)
    drops = [module.training for module in attached.model.modules() if isinstance(module, nn.Dropout)]
    assert drops
    assert set(drops) == {name != "LinearProbe"}
    attached.train(False)
    assert not any(module.training for module in attached.model.modules())


def test_the_policy_does_not_depend_on_the_mode_before():
    def modes(start):
        attached = on_toy(LoRA(rank=2, dropout=0.1))
        attached.model.train(start)
        attached.train(True)
        return [module.training for module in attached.model.modules()]

    assert modes(True) == modes(False)


def test_a_norm_without_running_statistics_trains():
    net = nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 4))
    attached = attach(net, LoRA(rank=2, target_modules=["1"]), None)
    attached.train(True)
    assert attached.model.get_submodule("base_model.model.0").training


def test_norm_tuning_trains_the_scale_of_batch_norm_and_not_its_statistics():
    attached = on_toy(NormTuning())
    assert "input_norm" in attached.plan.targets
    attached.train(True)
    before = statistics(attached.model)
    attached.model(inputs()).square().mean().backward()
    trained = {n for n, p in attached.model.named_parameters() if p.grad is not None and p.grad.any()}
    assert any(".input_norm." in name for name in trained)
    assert same(before, statistics(attached.model))


def test_features_of_a_frozen_backbone_need_no_graph():
    frozen, adapted = on_toy(LinearProbe()), on_toy(LoRA(rank=2))
    with frozen.grad_mode():
        assert not frozen.model(inputs()).requires_grad
    with adapted.grad_mode():
        assert adapted.model(inputs()).requires_grad


# ---- what attaching does -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ON_TOY)
def test_nothing_is_trainable_but_by_the_methods_will(name):
    """A backbone may arrive frozen in part, or not at all."""
    counts = set()
    for start in (True, False):
        backbone = toy_backbone().requires_grad_(start)
        attached = attach(backbone, spec_of(name), FAMILY)
        counts.add(sum(p.numel() for p in attached.model.parameters() if p.requires_grad))
    assert len(counts) == 1


def test_plain_peft_will_know_the_base_by_name(tmp_path):
    import json

    attached = attach(toy_backbone(), LoRA(rank=2), FAMILY, name="a/b")
    attached.model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "a/b"


@pytest.mark.parametrize("name", ON_TOY)
def test_the_digest_is_of_the_bare_backbone(name):
    assert on_toy(spec_of(name)).base_digest == state_digest(toy_backbone())


def test_the_digest_sees_values_names_shapes_types_and_buffers():
    def digest(change):
        model = toy_backbone()
        change(model)
        return state_digest(model)

    def rename(model):
        model.stem = model.embed
        del model.embed

    def nudge(model):
        with torch.no_grad():
            model.embed.weight[0, 0] += 1e-7

    def widen(model):
        model.double()

    def reshape(model):
        model.embed.weight = nn.Parameter(model.embed.weight.detach().reshape(4, 8))

    def count(model):
        model.input_norm.num_batches_tracked += 1

    digests = [digest(change) for change in (lambda model: None, rename, nudge, widen, reshape, count)]
    assert len(set(digests)) == len(digests)
    assert digest(lambda model: model.requires_grad_(False).eval()) == digests[0]
    assert (
        digest(lambda model: setattr(model.embed.weight, "data", model.embed.weight.data.t().clone().t())) == digests[0]
    )


# ---- liveness ------------------------------------------------------------------------------------------------------


class Fused(nn.Module):
    """Computes `dead` from its weight without calling it: always, or in one mode only, as fused kernels do."""

    def __init__(self, when="always"):
        super().__init__()
        self.alive, self.dead = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm, self.drop, self.when = nn.BatchNorm1d(4), nn.Dropout(0.5), when

    def forward(self, x):
        x = self.drop(self.norm(self.alive(x)))
        if self.when == "always" or self.when == ("train" if self.training else "eval"):
            return nn.functional.linear(x, self.dead.weight, self.dead.bias)
        return self.dead(x)


SPECS = {
    "LoRA": LoRA(target_modules=["alive", "dead"], rank=2),
    "BitFit": BitFit(),
    "IA3": spec_of("IA3", target_modules=["alive", "dead"]),
    "VeRA": spec_of("VeRA", target_modules=["alive", "dead"]),
}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(("when", "mode"), [("always", "train"), ("train", "train"), ("eval", "eval")])
def test_a_dead_adapter_is_refused_by_name(name, when, mode):
    attached = attach(Fused(when), SPECS[name], None)
    adapters = len(tuner_layers(attached.model))
    with pytest.raises(GraftError, match=rf"1 of {adapters} adapters are dead in {mode} mode.*\(dead\).*'on'"):
        probe(attached, lambda: attached.model(torch.randn(5, 4)))


@pytest.mark.parametrize("name", SPECS)
def test_living_adapters_pass(name):
    attached = attach(Fused("never"), SPECS[name], None)
    probe(attached, lambda: attached.model(torch.randn(5, 4)))


def test_an_adapter_whose_output_is_dropped_is_dead():
    class Ignores(Fused):
        def forward(self, x):
            self.dead(x)
            return self.alive(x)

    attached = attach(Ignores(), SPECS["LoRA"], None)
    with pytest.raises(GraftError, match=r"dead in train mode.*\(dead\)"):
        probe(attached, lambda: attached.model(torch.randn(5, 4)))


def test_many_dead_adapters_are_counted_and_three_are_named():
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    attached = attach(net, LoRA(rank=2, target_modules=[str(i) for i in range(5)]), None)
    with pytest.raises(GraftError, match=r"5 of 5 adapters.*\(0, 1, 2, \.\.\.\)"):
        probe(attached, lambda: torch.randn(2, 4, requires_grad=True))


def test_a_layer_that_is_skipped_at_random_is_not_called_dead():
    class Skipping(Fused):
        def forward(self, x):
            x = self.alive(x)
            return x if self.training and torch.rand(()) < 0.5 else x + self.dead(x)

    attached = attach(Skipping(), SPECS["LoRA"], None)
    probe(attached, lambda: attached.model(torch.randn(5, 4)))


def everything(model):
    return {**{n: p.clone() for n, p in model.named_parameters()}, **{n: b.clone() for n, b in model.named_buffers()}}


@pytest.mark.parametrize("when", ["never", "always", "eval"])
@pytest.mark.parametrize("training", [True, False])
def test_the_probe_leaves_no_trace(when, training):
    attached = attach(Fused(when), SPECS["LoRA"], None)
    attached.train(training)
    modes = [module.training for module in attached.model.modules()]
    before, attributes = everything(attached.model), [set(vars(m)) for m in attached.model.modules()]
    x, state = torch.randn(5, 4), torch.get_rng_state()
    try:
        probe(attached, lambda: attached.model(x))
    except GraftError:
        assert when != "never"
    assert same(before, everything(attached.model))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in attached.model.parameters())
    assert [module.training for module in attached.model.modules()] == modes
    assert [set(vars(m)) for m in attached.model.modules()] == attributes


def test_the_probe_leaves_no_trace_when_the_forward_fails():
    attached = attach(Fused("never"), SPECS["LoRA"], None)
    attached.train(True)
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError):
        probe(attached, lambda: attached.model(torch.randn(5, 3)))
    assert torch.equal(torch.get_rng_state(), state)
    assert not any("forward" in vars(m) for m in attached.model.modules())


def test_a_backbone_may_make_a_buffer_while_it_runs():
    class Cached(Fused):
        def forward(self, x):
            if not hasattr(self, "cache"):
                self.register_buffer("cache", torch.arange(len(x)), persistent=False)
            return super().forward(x)

    attached = attach(Cached("never"), SPECS["LoRA"], None)
    probe(attached, lambda: attached.model(torch.randn(5, 4)))


@pytest.mark.parametrize("spec", [LinearProbe(), FullFineTune()])
def test_without_adapters_there_is_nothing_to_probe(spec):
    attached = on_toy(spec)
    probe(attached, lambda: pytest.fail("ran"))


def test_the_fused_path_of_torchs_encoder_is_caught():
    """In eval mode, where no gradient is wanted, it computes all in one kernel and calls none of its layers."""
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    attached = attach(encoder, LoRA(rank=2, target_modules=["linear1", "linear2"]), None)

    def check():
        probe(attached, lambda: attached.model(torch.randn(2, 3, 8)))

    with pytest.raises(GraftError, match=r"2 of 2 adapters are dead in eval mode.*\(linear1, linear2\)"):
        check()
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        check()
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def test_a_deep_copy_keeps_its_policy():
    attached = on_toy(LoRA(rank=2))
    clone = copy.deepcopy(attached)
    clone.train(True)
    before = statistics(clone.model)
    clone.model(inputs())
    assert same(before, statistics(clone.model))
