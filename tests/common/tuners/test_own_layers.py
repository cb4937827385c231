"""What all own tuners share: several adapters, merging, deleting, saving, half precision and autocast."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from common.tuners import (
    OWN,
    BottleneckConfig,
    CompacterConfig,
    ConvAdapterConfig,
    ConvLoraConfig,
    CopiesConfig,
    FactConfig,
    FusionConfig,
    GatedLoraConfig,
    InvertibleConfig,
    LadderConfig,
    MixtureConfig,
    ParallelConfig,
    PostAdapterConfig,
    PrefixConfig,
    PromptTokensConfig,
    ReftConfig,
    RepAdapterConfig,
    SalientConfig,
    ScaleShiftConfig,
    SparseConfig,
    StackConfig,
    UniPeltConfig,
    WeightFormConfig,
    WeightLoraConfig,
    is_own,
)
from common.tuners._base import ExchangedLayer


def form(name, **settings):
    return lambda: WeightFormConfig(target_modules="layer", form=name, settings=settings)


CONFIGS = {
    "lora": lambda: WeightLoraConfig(target_modules="layer", r=2),
    "dora": lambda: WeightLoraConfig(target_modules="layer", r=2, dora=True),
    "scale": lambda: ScaleShiftConfig(target_modules="layer"),
    "copies": lambda: CopiesConfig(target_modules="layer", weight_of="layer", bias_of="layer"),
    "low-rank form": form("hadamard", rank=2, scale=1.0),
    "rotation form": form("block_rotation", block=6),
    "form with buffers": form("subspace_rotation", rank=3),
    "spectral form": form("spectrum", entries=9, scale=20.0, seed=0),
    "branch": lambda: CopiesConfig(target_modules="layer", bias_of="layer", scale_of="layer"),
    "sparse": lambda: SparseConfig(target_modules="layer", amount=0.2),
    "channels": lambda: SalientConfig(target_modules="layer", channels=3),
    "tensor train": lambda: FactConfig(target_modules="layer", r=2, tile_rows=6, tile_columns=36),
    "tucker": lambda: FactConfig(target_modules="layer", r=2, tile_rows=4, tile_columns=20, form="tk"),
    "beside": lambda: ConvAdapterConfig(target_modules="layer", reduction=2),
    "behind": lambda: BottleneckConfig(target_modules="layer", width=3),
    "compacter": lambda: CompacterConfig(target_modules="layer", width=4, division=2),
    "invertible": lambda: InvertibleConfig(target_modules="layer"),
    "reparameterised": lambda: RepAdapterConfig(target_modules="layer", width=4),
    # As blocks whose hidden states have the last axis as channels.
    "post": lambda: PostAdapterConfig(target_modules="layer", channels={"layer": 5}, width=2),
    "reft": lambda: ReftConfig(target_modules="layer", channels={"layer": 5}, width=2),
    "ladder": lambda: LadderConfig(target_modules="layer", channels={"layer": 5}, width=2, previous={"layer": None}),
}
UNMERGED = ("beside", "behind")
OF_TOKENS = {PrefixConfig, PromptTokensConfig, GatedLoraConfig}  # act on no convolution; they have tests of their own
WEIGHTLESS = ("behind", "compacter", "invertible", "post", "reft", "ladder")  # ask for the layer's output alone
UNMERGED = ("beside", *WEIGHTLESS)
EACH = pytest.mark.parametrize("kind", CONFIGS)
EXCHANGED = pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind not in UNMERGED])


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args, **kwargs):
        return self.layer(*args, **kwargs)


def conv(**kwargs):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Conv2d(4, 6, 3, padding=1, **kwargs)


def x(dtype=torch.float32):
    return torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(1)).to(dtype)


def randomise(model, adapter="default", seed=0):
    """Move an adapter's parameters away from their start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.layer.named_parameters():
            if f".{adapter}" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def wrap(kind, layer=None, adapter="default"):
    return get_peft_model(Net(layer or conv()), CONFIGS[kind](), adapter_name=adapter)


def run(model, dtype=torch.float32):
    with torch.no_grad():
        return model.eval()(x(dtype))


def two(kind):
    """One convolution with the adapters `one` and `two`."""
    model = wrap(kind, adapter="one")
    model.add_adapter("two", CONFIGS[kind]())
    randomise(model, "one", 1)
    return randomise(model, "two", 2)


def test_all_types_are_own():
    """Those that act on no single convolution have modules of their own: compositions, pairs, linear layers, tokens."""
    elsewhere = {MixtureConfig, StackConfig, UniPeltConfig, FusionConfig, ParallelConfig, ConvLoraConfig} | OF_TOKENS
    assert {type(make()) for make in CONFIGS.values()} | elsewhere == OWN.keys()
    assert all(is_own(config().peft_type) for config in OWN)
    assert not any(is_own(other) for other in (None, "LORA", "BITFIT"))


@EACH
def test_only_the_adapter_trains_and_all_of_it_gets_a_gradient(kind):
    model = randomise(wrap(kind))
    model(x()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("base_layer" not in name)
        assert (parameter.grad is not None and bool(parameter.grad.any())) == parameter.requires_grad, name


@EACH
def test_one_of_several_adapters_is_active(kind):
    model = two(kind)
    outputs = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        outputs[name] = run(model)
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained
        assert all(f".{name}" in n for n in trained)
    assert not torch.allclose(outputs["one"], outputs["two"], atol=1e-2)
    model.set_adapter("one")
    assert torch.equal(run(model), outputs["one"])
    alone = randomise(wrap(kind, adapter="one"), "one", 1)
    if kind in ("scale", "copies", "rotation form"):  # the others draw their start
        assert torch.equal(run(alone), outputs["one"])


@EACH
def test_two_active_adapters_are_refused(kind):
    model = two(kind)
    model.base_model.set_adapter(["one", "two"])
    with pytest.raises(ValueError, match=r"One adapter can be active at a time, not \['one', 'two'\]"):
        run(model)


@EXCHANGED
def test_two_adapters_cannot_be_merged_into_one_layer(kind):
    with pytest.raises(ValueError, match="One adapter can be merged at a time"):
        two(kind).merge_adapter(["one", "two"])


@EACH
def test_an_adapter_can_be_deleted(kind):
    model = two(kind)
    model.set_adapter("two")
    expected = run(model)
    model.delete_adapter("one")
    assert not any(".one" in name for name, _ in model.named_parameters())
    assert torch.equal(run(model), expected)


@EXCHANGED
def test_merged_and_unmerged_to_the_bit(kind):
    model = two(kind)
    layer, bare = model.layer, conv()
    for name in ("one", "two"):
        model.set_adapter(name)
        expected = run(model)
        model.merge_adapter([name])
        assert torch.equal(run(model), expected)
        assert torch.equal(run(Net(copy.deepcopy(layer.base_layer))), expected)  # plain weights
        model.unmerge_adapter()
        assert torch.equal(layer.base_layer.weight, bare.weight)
        assert torch.equal(layer.base_layer.bias, bare.bias)
        assert torch.equal(run(model), expected)


@EXCHANGED
def test_disabling_or_adding_to_a_merged_layer_unmerges_it(kind):
    model = two(kind)
    model.merge_adapter(["one"])
    with model.disable_adapter():
        assert torch.equal(run(model), run(Net(conv().requires_grad_(False))))
    model.merge_adapter(["one"])
    model.add_adapter("three", CONFIGS[kind]())
    model.set_adapter("three")
    assert torch.equal(run(model), run(Net(conv().requires_grad_(False))))


@EXCHANGED
@pytest.mark.filterwarnings("ignore:.*already.*:UserWarning")
def test_a_safe_merge_refuses_values_that_are_not_finite(kind):
    model = two(kind)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".one" in name:
                parameter.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        model.merge_adapter(["one"], safe_merge=True)
    assert not model.layer.merged_adapters
    assert torch.equal(model.layer.base_layer.weight, conv().weight)


def test_unmerging_twice_warns():
    with pytest.warns(UserWarning, match="Already unmerged"):
        two("scale").layer.unmerge()


@EXCHANGED
def test_merge_and_unload_leaves_the_plain_layer(kind):
    model = two(kind)
    model.set_adapter("two")
    expected = run(model)
    plain = model.merge_and_unload()
    assert type(plain.layer) is nn.Conv2d
    assert torch.equal(run(plain), expected)


@EACH
def test_saving_keeps_the_adapter_alone_and_loads_again(kind, tmp_path):
    model = two(kind)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    for name in ("one", "two"):
        model.set_adapter(name)
        stored = load_file(tmp_path / name / "adapter_model.safetensors")
        assert not any("base_layer" in key or name in key for key in stored)
        loaded = PeftModel.from_pretrained(Net(conv()), str(tmp_path / name))
        assert torch.equal(run(loaded), run(model))
        assert not any(p.requires_grad for p in loaded.parameters())
    loaded.load_adapter(str(tmp_path / "one"), "other", is_trainable=True)
    loaded.set_adapter("other")
    model.set_adapter("one")
    assert torch.equal(run(loaded), run(model))


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_layers(kind, dtype):
    model = wrap(kind, conv().to(dtype))
    bare = run(Net(conv().to(dtype).requires_grad_(False)), dtype)
    assert torch.equal(run(model, dtype), bare)
    randomise(model)
    output = run(model, dtype)
    assert output.dtype == dtype
    assert not torch.equal(output, bare)
    assert {p.dtype for n, p in model.named_parameters() if "base_layer" not in n} == {torch.float32}
    if kind not in UNMERGED:
        model.merge_adapter()
        assert torch.equal(run(model, dtype), output)
        assert model.layer.base_layer.weight.dtype == dtype


@EACH
def test_autocast_trains_in_full_precision_and_computes_the_weights_so(kind):
    model = randomise(wrap(kind))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x())
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    own = [p for n, p in model.named_parameters() if "base_layer" not in n]
    assert {p.grad.dtype for p in own} == {torch.float32}
    if kind in UNMERGED:
        return
    model.merge_adapter()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x()), output)  # B A in half precision would be another weight


@EACH
def test_an_unbatched_input_and_a_copy_work(kind):
    model = randomise(wrap(kind)).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x()[0]), model(x())[0])
        assert torch.equal(copy.deepcopy(model)(x()), model(x()))


@EXCHANGED
def test_the_layer_shows_its_base_layers_attributes(kind):
    layer = wrap(kind).layer
    assert isinstance(layer, ExchangedLayer)
    assert layer.weight is layer.base_layer.weight
    assert layer.bias is layer.base_layer.bias


NORMED = [kind for kind in CONFIGS if kind not in WEIGHTLESS]


@pytest.mark.parametrize("kind", NORMED)
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_weight_that_is_computed_at_each_call_is_refused(kind, norm):
    with pytest.raises(TypeError, match=r"holds no parameter 'weight' itself|is no plain convolution"):
        wrap(kind, norm(conv()))


@EACH
def test_an_adapted_layer_answers_for_the_layers_own_facts(kind):
    model = get_peft_model(Net(conv(stride=2)), CONFIGS[kind]())
    layer = model.base_model.model.layer
    assert (layer.stride, layer.kernel_size, layer.out_channels) == ((2, 2), (3, 3), 6)
    with pytest.raises(AttributeError, match="in_features"):
        _ = layer.in_features
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        _ = layer.nothing_of_this_name
