"""What every method must do on a network of convolutions of every kind, in 2D and 3D (see `tests/zoo.py`)."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from peft import PeftModel
from torch import nn

from common.attach import attach, probe, tuner_layers
from common.errors import GraftError
from common.exchange import merged_backbone
from common.methods import LoRA, VeRA
from common.roles import NORMS
from tests.cases import ALIKE, CASES
from tests.zoo import CONV, FAMILY, ZooTask, volumes, zoo


def method(name):
    """The method of a case."""
    return type(CASES[name].zoo).__name__


SPECS = {name: case.zoo for name, case in CASES.items() if case.zoo is not None}
# Methods that differ by their formula alone see three dimensions with `--slow`.
EACH = pytest.mark.parametrize(
    ("name", "dims"),
    [
        pytest.param(
            name, dims, id=f"{name}-{dims}d", marks=[pytest.mark.slow] if dims == 3 and method(name) in ALIKE else []
        )
        for name in SPECS
        for dims in (2, 3)
    ],
)
SEEDS = (0, 1)


def attached(name, dims, seed=0):
    return attach(zoo(dims, seed), SPECS[name], FAMILY, seed=seed, name="zoo")


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@functools.cache
def trained_state(name, dims, seed):
    """Take a few large steps towards a fixed target."""
    result = attached(name, dims, seed)
    result.train(True)
    if parameters := list(trainable(result.model).values()):
        optimizer = torch.optim.AdamW(parameters, lr=0.05)
        torch.manual_seed(seed)
        target = torch.randn(2, *(6,) * dims, 5)
        for _ in range(3):
            optimizer.zero_grad()
            (result.model(volumes(dims)) - target).square().mean().backward()
            optimizer.step()
    return result.model.state_dict()


def trained(name, dims, seed=0):
    result = attached(name, dims, seed)
    result.model.load_state_dict(trained_state(name, dims, seed))
    result.train(False)
    return result


def run(model, dims):
    with torch.no_grad():
        return model(volumes(dims))


def bare(name, dims, seed=0):
    return run(zoo(dims, seed).requires_grad_(name == "FullFineTune").eval(), dims)


@EACH
def test_a_fresh_method_changes_no_output(name, dims):
    for seed in SEEDS:
        result = attached(name, dims, seed)
        result.train(False)
        if CASES[name].starts_elsewhere:
            assert not torch.equal(run(result.model, dims), bare(name, dims, seed))
        elif CASES[name].exact_start:
            assert torch.equal(run(result.model, dims), bare(name, dims, seed))
        else:
            torch.testing.assert_close(run(result.model, dims), bare(name, dims, seed), atol=1e-5, rtol=1e-5)


@EACH
def test_only_the_intended_parameters_move_and_all_of_them(name, dims):
    result = attached(name, dims)
    before = {key: value.clone() for key, value in result.model.state_dict().items()}
    after = trained(name, dims).model.state_dict()
    moved = {key for key, value in after.items() if not torch.equal(value, before[key])}
    buffers = {key for key, _ in result.model.named_buffers()}
    # All names of what several layers share.
    own = {key for key, p in result.model.named_parameters(remove_duplicate=False) if p.requires_grad}
    # A bias before a norm of each sample changes nothing; its gradient is zero but for rounding.
    idle = {key for key in own if "blocks.0.down" in key and ("bias" in key or "shift" in key)}
    assert moved - buffers <= own
    assert own - moved <= idle
    assert (moved & buffers != set()) == (result.plan.mode == "full" or CASES[name].statistics)


@EACH
def test_the_number_of_trainable_parameters_is_the_documented_one(name, dims):
    result = attached(name, dims)
    expected = CASES[name].count(SPECS[name], zoo(dims), result.plan.targets)
    assert sum(p.numel() for p in trainable(result.model).values()) == expected


@EACH
def test_the_chosen_layers_are_all_there_are(name, dims):
    modules, targets = dict(zoo(dims).named_modules()), set(attached(name, dims).plan.targets)
    convolutions = {n for n, m in modules.items() if isinstance(m, CONV)}
    norms = {n for n, m in modules.items() if isinstance(m, NORMS)}
    expected = {
        "LoRA": convolutions - {"stem"} | {"fc1", "fc2"},
        "IA3": convolutions - {"stem"} | {"fc1", "fc2"},
        "SSF": convolutions - {"stem"} | {"fc1", "fc2"} | norms,
        "ConvAdapter": convolutions - {"stem"},
        "Houlsby": convolutions - {"stem"} | {"fc1", "fc2"},
        "Houlsby-scaled": {n for n in convolutions if n.startswith("blocks.1.")} | {"fc2"},
        "Pfeiffer": {"fc2"},
        "NormTuning": norms,
        "BitFit": {n for n, m in modules.items() if getattr(m, "bias", None) is not None},
        "NormBias": {n for n, m in modules.items() if getattr(m, "bias", None) is not None}
        | {n for n, m in modules.items() if isinstance(m, nn.PReLU)},
    }
    if name in expected:
        assert targets == expected[name]


@EACH
def test_a_saved_adapter_computes_the_same_in_a_fresh_build(name, dims, tmp_path):
    for seed in SEEDS:
        result = trained(name, dims, seed)
        if not isinstance(result.model, PeftModel):
            fresh = zoo(dims, seed=7)
            fresh.load_state_dict(result.model.state_dict())
            assert torch.equal(run(fresh.requires_grad_(name == "FullFineTune").eval(), dims), run(result.model, dims))
            continue
        result.model.save_pretrained(tmp_path / str(seed), save_embedding_layers=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            loaded = PeftModel.from_pretrained(zoo(dims, seed).requires_grad_(False), str(tmp_path / str(seed))).eval()
        assert not torch.allclose(run(loaded, dims), bare(name, dims, seed), atol=1e-3)
        torch.testing.assert_close(run(loaded, dims), run(result.model, dims), atol=1e-6, rtol=1e-6)


@EACH
def test_disabled_adapters_leave_the_bare_network(name, dims):
    result = trained(name, dims)
    if not isinstance(result.model, PeftModel):
        pytest.skip("no adapter")
    own = run(result.model, dims)
    with result.model.disable_adapter():
        assert torch.equal(run(result.model, dims), bare(name, dims))
    assert torch.equal(run(result.model, dims), own)


@EACH
@pytest.mark.filterwarnings("ignore:Unmerge result can be inaccurate:UserWarning")
def test_merging_computes_the_same_and_unmerging_gives_the_weights_back(name, dims):
    if not CASES[name].mergeable:
        pytest.skip("cannot be merged; see below")
    for seed in SEEDS:
        result = trained(name, dims, seed)
        if not isinstance(result.model, PeftModel):
            pytest.skip("no adapter")
        own = run(result.model, dims)
        layers = tuner_layers(result.model).values()
        for layer in layers:
            layer.merge(safe_merge=True)
        torch.testing.assert_close(run(result.model, dims), own, atol=1e-5, rtol=1e-5)
        for layer in layers:
            layer.unmerge()
        torch.testing.assert_close(run(result.model, dims), own, atol=1e-5, rtol=1e-5)
        plain = zoo(dims, seed).state_dict()
        state = result.model.get_base_model().state_dict()
        frozen = {key.replace(".base_layer.", "."): value for key, value in state.items()}
        assert plain.keys() <= frozen.keys()
        for key, value in plain.items():  # PEFT adds the change and takes it off again, rounding twice
            torch.testing.assert_close(frozen[key], value, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", SPECS)
def test_a_merged_backbone_is_plain_weights(name):
    task = ZooTask(SPECS[name])
    task.facts = type("Facts", (), {"classes": 2})()
    task.assemble()
    task.attached = trained(name, 3)
    task.backbone = task.attached.model
    expected = run(task.backbone, 3)
    if not CASES[name].mergeable:
        with pytest.raises(GraftError, match=rf"\w+ cannot be merged on zoo: .*{CASES[name].reason}"):
            merged_backbone(task)
        return
    merged = merged_backbone(task).eval()
    torch.testing.assert_close(run(merged, 3), expected, atol=1e-5, rtol=1e-5)
    assert merged.state_dict().keys() == zoo(3).state_dict().keys()
    assert [type(m) for m in merged.modules()] == [type(m) for m in zoo(3).modules()]
    fresh = zoo(3, seed=7).eval()
    fresh.load_state_dict(merged.state_dict())
    torch.testing.assert_close(run(fresh, 3), expected, atol=1e-5, rtol=1e-5)


@EACH
def test_every_adapter_passes_the_probe(name, dims):
    result = attached(name, dims)
    probe(result, lambda: result.model(volumes(dims)))


def test_the_engine_is_told():
    def notes(name, dims):
        return " ".join(attached(name, dims).plan.notes)

    assert notes("LoRA-peft", 3) == "LoRA runs in PEFT's own tuner."
    assert notes("LoRA", 3).startswith("LoRA runs in Graft's own tuner, since PEFT's cannot do 8 of 11 layers: ")
    assert "blocks.0.line (kernel (1, 1, 3)), blocks.0.dilated (dilation (2, 2, 2))" in notes("LoRA", 3)
    assert "cannot do 6 of 11 layers" in notes("LoRA", 2)  # (1, 3) is no trap
    assert "lowered to the layer's own size in 6 layers: stem (4), blocks.1.grouped (4), " in notes("LoRA-thin", 3)
    assert "Graft's own tuner" in notes("IA3", 3)
    assert "PEFT's own tuner" in notes("IA3-peft", 3)


def test_vera_takes_linear_layers_alone():
    with pytest.raises(
        GraftError, match=r"VeRA cannot act on 'blocks.0.down' \(Conv3d, role conv\) and .* more; it takes Linear"
    ):
        attach(zoo(3), VeRA(), FAMILY)


def test_what_weight_space_lacks_is_refused():
    with pytest.raises(
        GraftError, match=r"LoRA dropout is 0.1, but PEFT's own tuner cannot do 'blocks.0.dilated' \(dilation"
    ):
        attach(zoo(2), LoRA(dropout=0.1), FAMILY)
    with pytest.raises(GraftError, match=r"LoRA init is 'pissa', but .*'default' or 'gaussian'"):
        attach(zoo(2), LoRA(init="pissa"), FAMILY)
