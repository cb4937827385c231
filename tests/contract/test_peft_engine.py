"""What Graft takes for granted of PEFT and of torch, and the defects that it goes around.

A test of the second kind fails when the library is mended: then the detour it names can go.
"""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from peft import (
    IA3Config,
    LNTuningConfig,
    LNTuningModel,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    mapping,
)
from peft.utils import PeftType
from peft.utils.peft_types import register_peft_method
from timm.layers import StdConv2d
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from common.methods._base import exact
from common.tuners import OWN, CopiesConfig, CopiesModel
from common.tuners.copies import COPIES, CopiesLayer
from tests.toy import toy_backbone


def adapted(model):
    """Names of the modules that PEFT has replaced."""
    return {name.removeprefix("base_model.model.") for name, m in model.named_modules() if hasattr(m, "base_layer")}


def inputs():
    return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))


def run(model):
    with torch.no_grad():
        return model.eval()(inputs())


# ---- assumptions: a type of tuner that is a plain string -------------------------------------------------------------


def copies(names=("embed", "blocks.0.fc1")):
    pattern = exact(list(names))
    return CopiesConfig(target_modules=pattern, bias_of=pattern)


def shifted(model, adapter="default", by=1.0):
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, CopiesLayer):
                module.copied_bias[adapter] += by
    return model


def test_a_string_type_is_registered_in_the_three_mappings():
    for config, model in OWN.items():
        assert config.own_type not in PeftType.__members__
        assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING[config.own_type] is config
        assert mapping.PEFT_TYPE_TO_TUNER_MAPPING[config.own_type] is model
        assert mapping.PEFT_TYPE_TO_PREFIX_MAPPING[config.own_type] == model.prefix


def test_a_string_type_wraps_saves_and_loads(tmp_path):
    model = shifted(get_peft_model(toy_backbone(), copies()))
    assert adapted(model) == {"embed", "blocks.0.fc1"}
    assert len(get_peft_model_state_dict(model)) == 2
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(toy_backbone(), str(tmp_path))
    assert loaded.peft_config["default"].peft_type == COPIES
    assert torch.equal(run(loaded), run(model))
    assert not torch.equal(run(loaded), run(toy_backbone()))


def test_a_string_type_can_be_disabled_and_merged():
    model = shifted(get_peft_model(toy_backbone(), copies()))
    expected, bare = run(model), run(toy_backbone().requires_grad_(False))
    with model.disable_adapter():
        assert torch.equal(run(model), bare)
    plain = model.merge_and_unload()
    assert not adapted(plain)
    torch.testing.assert_close(run(plain), expected)


def test_a_string_type_takes_several_adapters(tmp_path):
    model = shifted(get_peft_model(toy_backbone(), copies()))
    first = run(model)
    model.add_adapter("second", copies())
    shifted(model, "second", 2.0)
    model.set_adapter("second")
    second = run(model)
    assert not torch.equal(first, second)
    model.set_adapter("default")
    assert torch.equal(run(model), first)
    model.save_pretrained(tmp_path, selected_adapters=["second"], save_embedding_layers=False)
    model.delete_adapter("second")
    assert list(model.peft_config) == ["default"]
    model.load_adapter(str(tmp_path / "second"), "third")
    model.set_adapter("third")
    assert torch.equal(run(model), second)


def test_a_string_type_is_injected_in_place():
    model = inject_adapter_in_model(copies(), toy_backbone())
    assert adapted(model) == {"embed", "blocks.0.fc1"}
    assert type(model) is type(toy_backbone())


def test_public_registration_still_refuses_new_names():
    """When it takes them, `common/tuners/__init__.py` can use it."""
    with pytest.raises(ValueError, match="Unknown PEFT type"):
        register_peft_method(name="graft_test", config_cls=CopiesConfig, model_cls=CopiesModel, prefix="copied_")


# ---- assumptions: targets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [LoraConfig, IA3Config, LNTuningConfig, CopiesConfig])
def test_a_pattern_matches_in_full(config):
    names = ["blocks.0.fc1", "norm"]
    if config is IA3Config:
        names = ["blocks.0.fc1", "embed"]
        made = config(target_modules=exact(names), feedforward_modules=exact(["embed"]))
    elif config is LoraConfig:
        names = ["blocks.0.fc1", "embed"]
        made = config(target_modules=exact(names))
    elif config is CopiesConfig:
        made = copies(names)
    else:
        made = config(target_modules=exact(names))
    assert adapted(get_peft_model(toy_backbone(), made)) == set(names)


def test_dots_in_names_are_no_wildcards():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.ModuleDict({"b": nn.Linear(2, 2)})
            self.axb = nn.Linear(2, 2)

    assert adapted(get_peft_model(Net(), LoraConfig(target_modules=exact(["a.b"])))) == {"a.b"}


def test_layer_copy_tuning_takes_any_module_and_trains_a_copy():
    model = get_peft_model(toy_backbone(), LNTuningConfig(target_modules=exact(["blocks.1", "embed"])))
    assert adapted(model) == {"blocks.1", "embed"}
    copied = sum(p.numel() for p in model.parameters() if p.requires_grad)
    bare = toy_backbone()
    assert copied == sum(p.numel() for module in (bare.blocks[1], bare.embed) for p in module.parameters())
    with torch.no_grad():
        model.base_model.model.blocks[1].ln_tuning_layers["default"].fc2.bias += 1.0
    assert not torch.equal(run(model), run(bare))
    with model.disable_adapter():
        torch.testing.assert_close(run(model), run(bare))


def test_defect_copies_of_blocks_load_under_their_first_name_alone(monkeypatch, tmp_path):
    """Detour: `common.tuners._upstream.NestedCopiesModel`."""
    model = get_peft_model(toy_backbone(), LNTuningConfig(target_modules=exact(["blocks.1"])))
    with torch.no_grad():
        model.base_model.model.blocks[1].ln_tuning_layers["default"].fc2.bias += 1.0
    model.save_pretrained(tmp_path, save_embedding_layers=False)

    def loaded():
        return run(PeftModel.from_pretrained(toy_backbone(), str(tmp_path), adapter_name="other"))

    torch.testing.assert_close(loaded(), run(model))
    monkeypatch.setitem(mapping.PEFT_TYPE_TO_TUNER_MAPPING, PeftType.LN_TUNING, LNTuningModel)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        torch.testing.assert_close(loaded(), run(toy_backbone()))
    torch.testing.assert_close(run(PeftModel.from_pretrained(toy_backbone(), str(tmp_path))), run(model))


def test_a_configuration_cannot_have_any_module_imported():
    config = LoraConfig(target_modules=exact(["embed"]), megatron_config={"x": 1}, megatron_core="this")
    with pytest.raises(ValueError, match="security risk"):
        get_peft_model(toy_backbone(), config)
    assert "this" not in sys.modules


# ---- defects that Graft goes around --------------------------------------------------------------------------------


def test_defect_a_list_of_names_matches_by_suffix():
    """Detour: `common.methods._base.exact`."""
    taken = adapted(get_peft_model(toy_backbone(), LNTuningConfig(target_modules=["norm", "norm1"])))
    assert "blocks.0.norm1" in taken
    assert taken != {"norm"}
    nested = nn.ModuleDict({"proj": nn.Linear(2, 2), "stem": nn.ModuleDict({"proj": nn.Linear(2, 2)})})
    assert adapted(get_peft_model(nested, LoraConfig(target_modules=["proj"]))) == {"proj", "stem.proj"}


def test_defect_merge_and_unload_needs_a_weight():
    """Detour: `common.exchange.merged_backbone`."""
    model = get_peft_model(toy_backbone(), LNTuningConfig(target_modules=exact(["blocks.1"])))
    with pytest.raises(AttributeError, match="weight"):
        model.merge_and_unload()


# The detour around all of LoRA's defects on convolutions: `_what_the_engine_gets_wrong` in
# `common.methods.reparameterised._lora`, which hands such layers to `common.tuners.weight_lora`.


def lora(layer, **settings):
    """PEFT's LoRA on one layer, with random factors."""
    config = LoraConfig(target_modules=exact(["0"]), r=2, lora_alpha=4, init_lora_weights=False, **settings)
    return get_peft_model(nn.Sequential(layer), config).eval()


def unmerged_and_merged(model, x):
    with torch.no_grad():
        before = model(x)
        model.merge_adapter()
        return before, model(x)


RIGHT = {
    "Conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "Conv1d pointwise": (nn.Conv1d(4, 6, 1), (2, 4, 9)),
    "Conv2d": (nn.Conv2d(4, 6, 3, padding="same"), (2, 4, 5, 5)),
    "Conv2d pointwise": (nn.Conv2d(4, 6, 1, bias=False), (2, 4, 5, 5)),
    "Conv2d line": (nn.Conv2d(4, 6, (1, 3)), (2, 4, 5, 5)),
    "Conv3d": (nn.Conv3d(4, 6, 3, padding=1, stride=2), (2, 4, 5, 5, 5)),
    "Conv3d lines": (nn.Conv3d(4, 6, (3, 1, 1)), (2, 4, 3, 3, 3)),
    "Conv3d plane": (nn.Conv3d(4, 6, (1, 3, 3)), (2, 4, 3, 3, 3)),
}


@pytest.mark.parametrize("kind", RIGHT)
@pytest.mark.parametrize("dora", [False, True])
def test_lora_is_right_on_plain_convolutions_merged_too(kind, dora):
    layer, shape = RIGHT[kind]
    bare = copy.deepcopy(layer)
    model = lora(copy.deepcopy(layer), use_dora=dora)
    adapted = model.base_model.model[0]
    a, b = adapted.lora_A["default"].weight.flatten(1), adapted.lora_B["default"].weight.flatten(1)
    changed = bare.weight + 2.0 * (b @ a).view_as(bare.weight)
    if dora:
        norm = changed.flatten(1).norm(dim=1).view(-1, *(1,) * (changed.ndim - 1))
        changed = adapted.lora_magnitude_vector["default"].weight.view_as(norm) * changed / norm
    x = torch.randn(shape)
    expected = torch.func.functional_call(bare, {"weight": changed}, (x,))
    for output in unmerged_and_merged(model, x):
        torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_defect_lora_drops_the_dilation_of_a_convolution(dora):
    model = lora(nn.Conv1d(4, 4, 3, dilation=2, padding=2), use_dora=dora)
    assert model.base_model.model[0].lora_A["default"].dilation == (1,)
    with pytest.raises(RuntimeError, match="size of tensor"):
        model(torch.randn(1, 4, 9))


@pytest.mark.parametrize("dora", [False, True])
def test_defect_lora_drops_the_padding_mode_of_a_convolution(dora):
    model = lora(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), use_dora=dora)
    assert model.base_model.model[0].lora_A["default"].padding_mode == "zeros"
    before, after = unmerged_and_merged(model, torch.randn(1, 4, 5, 5))
    assert not torch.allclose(after, before, atol=1e-3)  # merged, the change is padded as the layer is


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kernel", [(1, 1, 1), (1, 1, 3)])
def test_defect_lora_cannot_merge_a_kernel_that_begins_with_ones(kernel, dora):
    """It takes every weight whose third and fourth side are one for a pointwise 2D kernel."""
    model = lora(nn.Conv3d(4, 6, kernel), use_dora=dora)
    assert model(torch.randn(1, 4, 3, 3, 3)).shape[1] == 6
    with pytest.raises(RuntimeError, match="size of tensor"):
        model.merge_adapter()


@pytest.mark.parametrize("dora", [False, True])
def test_defect_lora_cannot_merge_grouped_convolutions(dora):
    model = lora(nn.Conv2d(4, 8, 3, groups=2), use_dora=dora)
    with pytest.raises(NotImplementedError, match="groups > 1"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="rank is divisible by groups"):
        lora(nn.Conv2d(4, 8, 3, groups=4))


@pytest.mark.parametrize("layer", [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
@pytest.mark.parametrize("config", [LoraConfig, IA3Config])
def test_defect_transposed_convolutions_are_refused(layer, config):
    """IA3's detour: `common.methods.additive.IA3.plan`."""
    extra = {"feedforward_modules": []} if config is IA3Config else {}
    with pytest.raises(ValueError, match="is not supported"):
        get_peft_model(nn.Sequential(layer(4, 4, 2)), config(target_modules=exact(["0"]), **extra))


def test_defect_ia3_refuses_conv1d():
    """Detour: `common.methods.additive.IA3.plan`."""
    with pytest.raises(ValueError, match="is not supported"):
        get_peft_model(nn.Sequential(nn.Conv1d(4, 4, 2)), IA3Config(target_modules="0", feedforward_modules=[]))


def test_defect_lora_takes_a_convolution_of_a_class_of_its_own_for_a_plain_one():
    """A layer that standardises its weight would also standardise A, and what is merged into the raw weight."""
    model = lora(StdConv2d(4, 4, 3))
    assert isinstance(model.base_model.model[0].lora_A["default"], StdConv2d)
    before, after = unmerged_and_merged(model, torch.randn(1, 4, 5, 5))
    assert not torch.allclose(after, before, atol=1e-3)


def test_defect_a_rank_pattern_matches_by_suffix():
    """Detour: `common.methods.reparameterised._lora.LoRA._engine_config` begins each pattern with a caret."""

    def ranks(pattern):
        net = nn.ModuleDict({"proj": nn.Linear(4, 4), "stem": nn.ModuleDict({"proj": nn.Linear(4, 4)})})
        config = LoraConfig(
            target_modules=r"proj|stem\.proj", r=3, rank_pattern={pattern: 1}, alpha_pattern={pattern: 1}
        )
        model = get_peft_model(net, config).base_model.model
        return model["proj"].r["default"], model["stem"]["proj"].r["default"]

    assert ranks("proj") == (1, 1)
    assert ranks("^proj") == (1, 3)


def test_defect_rslora_with_ranks_by_layer_cannot_be_converted(tmp_path):
    """Detour: `common.methods.reparameterised._lora.LoRA._engine_config` refuses the three together."""
    config = LoraConfig(target_modules="0", r=3, use_rslora=True, init_lora_weights="pissa", rank_pattern={"0": 2})
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
    model.save_pretrained(tmp_path / "start", save_embedding_layers=False)
    with pytest.raises(ValueError, match="rank_pattern"):
        model.save_pretrained(
            tmp_path / "out",
            save_embedding_layers=False,
            path_initial_model_for_weight_conversion=str(tmp_path / "start"),
        )


def test_defect_missing_keys_only_warn(tmp_path):
    """Detour: `common.exchange._compare_keys`."""
    from safetensors.torch import load_file, save_file

    model = get_peft_model(toy_backbone(), LoraConfig(target_modules=exact(["embed"]), r=2))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    path = tmp_path / "adapter_model.safetensors"
    state = load_file(path)
    state.pop(sorted(state)[0])
    save_file(state, path)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        PeftModel.from_pretrained(toy_backbone(), str(tmp_path))


def test_defect_dora_with_a_start_from_the_spectrum_cannot_be_converted(tmp_path):
    """Detour: `common.methods.reparameterised._lora.LoRA.plan` refuses the pair."""
    config = LoraConfig(target_modules=exact(["embed"]), r=2, use_dora=True, init_lora_weights="pissa")
    model = get_peft_model(toy_backbone(), config)
    model.save_pretrained(tmp_path / "start", save_embedding_layers=False)
    model.save_pretrained(
        tmp_path / "out", save_embedding_layers=False, path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    from safetensors.torch import load_file

    assert not any("magnitude" in key for key in load_file(tmp_path / "out" / "adapter_model.safetensors"))


def test_defect_the_flop_counter_has_no_attention_kernel_of_the_cpu():
    """Detour: `common.cost._FORMULAS`."""
    q = torch.randn(1, 2, 8, 4, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
    assert counter.get_total_flops() == 0


def test_defect_the_flop_counter_overcounts_the_weight_gradient_of_grouped_convolutions():
    """Detour: `common.cost._convolution_backward`."""

    def flops(groups):
        conv = nn.Conv2d(4, 4, 3, groups=groups)
        with FlopCounterMode(display=False) as counter:
            conv(torch.randn(1, 4, 8, 8)).sum().backward()
        return counter.get_total_flops()

    assert flops(4) > flops(1) / 4


def test_defect_a_hook_turns_torchs_fused_encoder_off():
    """Detour: `common.attach._calls` notes calls without hooks."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval().requires_grad_(False)
    called = []
    layer.linear1.forward = lambda x: called.append("plain") or nn.functional.linear(x, layer.linear1.weight)
    with torch.no_grad():
        layer(torch.randn(1, 3, 8))
        assert not called
        layer.linear1.register_forward_hook(lambda *args: None)
        layer(torch.randn(1, 3, 8))
    assert called == ["plain"]
