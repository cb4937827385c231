"""Defects of PEFT's other tuners, why Graft runs its own or has none; a test fails when upstream mends its defect."""

from __future__ import annotations

import copy
import warnings

import pytest
import setuptools  # noqa: F401  (BOFT asks torch for it late, and it stumbles over what other tests have imported)
import torch
from peft import (
    AdaLoraConfig,
    AdamssConfig,
    BOFTConfig,
    C3AConfig,
    DeftConfig,
    DeloraConfig,
    FourierFTConfig,
    FrodConfig,
    GraloraConfig,
    HiraConfig,
    HRAConfig,
    LilyConfig,
    LoHaConfig,
    LoKrConfig,
    MissConfig,
    OFTConfig,
    OSFConfig,
    PolyConfig,
    PsoftConfig,
    ShadowConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from torch import nn

ZEROS = {"target_modules": "0"}


def wrap(layer, config, seed=0):
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(nn.Sequential(layer), config).eval()


def stirred(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape)
    return model


def stored(model):
    return {key.split("model.0.")[1] for key in get_peft_model_state_dict(model, save_embedding_layers=False)}


# The detour around what these do with convolutions: `common.methods.reparameterised._layers.WeightChange`, which hands
# every model with a convolution among the targets to `common.tuners.weight_form`.

CONFIGS = {
    "LoHa": LoHaConfig(r=2, **ZEROS),
    "LoKr": LoKrConfig(r=2, **ZEROS),
    "HiRA": HiraConfig(r=2, **ZEROS),
    "HRA": HRAConfig(r=2, **ZEROS),
    "OFT": OFTConfig(oft_block_size=4, **ZEROS),
    "MiSS": MissConfig(r=2, **ZEROS),
    "DeLoRA": DeloraConfig(r=2, **ZEROS),
    "DEFT": DeftConfig(r=2, **ZEROS),
    "FourierFT": FourierFTConfig(n_frequency=8, **ZEROS),
    "C3A": C3AConfig(block_size=2, **ZEROS),
}


def right(config, layer, x):
    """Whether the tuner takes a layer, runs on it, and merges into what it ran."""
    try:
        model = stirred(wrap(copy.deepcopy(layer), copy.deepcopy(config)))
        with torch.no_grad():
            before = model(x)
            model.merge_adapter()
            return torch.allclose(model(x), before, atol=1e-4)
    except (ValueError, TypeError, NotImplementedError, RuntimeError, AttributeError, IndexError, KeyError):
        return False


@pytest.mark.parametrize("name", CONFIGS)
def test_defect_no_tuner_is_right_on_transposed_and_pointwise_3d_convolutions(name):
    assert right(CONFIGS[name], nn.Linear(8, 8), torch.randn(2, 8))
    assert not right(CONFIGS[name], nn.ConvTranspose2d(8, 8, 2, stride=2), torch.randn(2, 8, 4, 4))
    assert not right(CONFIGS[name], nn.Conv3d(8, 8, 1), torch.randn(2, 8, 3, 3, 3))


@pytest.mark.parametrize("name", ["LoHa", "LoKr", "HiRA"])
def test_defect_tuners_drop_the_padding_mode_of_a_convolution(name):
    layer = nn.Conv2d(8, 8, 3, padding=1, padding_mode="replicate")
    assert not right(CONFIGS[name], layer, torch.randn(2, 8, 4, 4))


def test_defect_oft_takes_four_axes_for_images_on_linear_layers():
    """Detour: `OFT.misfit`."""
    model = wrap(nn.Linear(8, 8), OFTConfig(oft_block_size=4, **ZEROS))
    assert model(torch.randn(2, 3, 8)).shape == (2, 3, 8)
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 3, 3, 8))


def test_defect_ofts_series_is_not_orthogonal():
    """Graft's own solves instead of cutting a series off."""
    model = stirred(wrap(nn.Linear(4, 4, bias=False), OFTConfig(oft_block_size=4, **ZEROS)))
    base = model.base_model.model[0].base_layer.weight
    turned = model(torch.eye(4)).T
    assert not torch.allclose(turned.norm(dim=1), base.norm(dim=1), atol=1e-3)


def test_defect_gralora_reads_inputs_of_three_axes_alone():
    """Detour: `GraLoRA.misfit`."""
    model = wrap(nn.Linear(8, 8), GraloraConfig(r=4, **ZEROS))
    assert model(torch.randn(2, 3, 8)).shape == (2, 3, 8)
    with pytest.raises(ValueError, match="too many values to unpack"):
        model(torch.randn(2, 3, 3, 8))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the extension may build here")
def test_defect_boft_takes_one_factor_where_its_extension_does_not_build():
    """Detour: `BOFT.misfit`."""
    model = wrap(nn.Linear(8, 8), BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=2, **ZEROS))
    assert len(model.base_model.model[0].boft_R["default"]) == 1


def test_defect_psofts_file_lacks_the_subspace():
    """Detour: `PSOFT.misfit`."""
    model = wrap(nn.Linear(8, 8), PsoftConfig(r=2, **ZEROS))
    assert stored(model) == {"psoft_R.weight", "psoft_R.vector_a", "psoft_R.vector_b"}


# ---- types that Graft leaves out -----------------------------------------------------------------------------------


def test_defect_lilys_output_for_an_item_depends_on_its_batch():
    model = stirred(wrap(nn.Linear(8, 8), LilyConfig(r=2, num_B=2, **ZEROS)))
    x = 5 * torch.randn(4, 8)
    assert not torch.allclose(model(x)[:1], model(x[:1]), atol=1e-3)
    with pytest.raises(NotImplementedError, match="not supported for Lily"):
        model.merge_adapter()


def test_defect_adamss_keeps_no_clusters_in_its_file():
    """They come out of a spectrum and a clustering at each load."""
    model = wrap(nn.Linear(8, 8), AdamssConfig(r=4, num_subspaces=2, **ZEROS))
    assert model.base_model.model[0].seg_result["default"]
    assert {key.split(".")[0] for key in stored(model)} == {"adamss_A", "adamss_B", "adamss_newB"}


def test_defect_frod_keeps_no_u_in_its_file():
    model = wrap(nn.Linear(8, 8), FrodConfig(progressbar=False, **ZEROS))
    assert "frod_U" in dict(model.base_model.model[0].named_children())
    assert not any("frod_U" in key for key in get_peft_model_state_dict(model, save_embedding_layers=False))


def test_defect_osf_keeps_no_frozen_subspace_in_its_file():
    model = wrap(nn.Linear(8, 8), OSFConfig(effective_rank=2, **ZEROS))
    assert not any("high" in key for key in stored(model))


def test_poly_and_shadow_do_not_act_on_a_plain_module():
    model = wrap(nn.Linear(8, 8), PolyConfig(r=2, **ZEROS))
    with pytest.raises(ValueError, match="task_ids"):
        model(torch.randn(2, 8))
    with pytest.raises(AttributeError, match="transformer backbone"):
        wrap(nn.Linear(8, 8), ShadowConfig())


# ---- AdaLoRA -------------------------------------------------------------------------------------------------------


def test_defect_adalora_adds_its_penalty_to_the_loss_of_transformers_models_alone():
    """Detour: `AdaLoRA.penalty`, `AdaLoRA.after_step`."""
    model = wrap(nn.Linear(8, 8), AdaLoraConfig(init_r=3, target_r=2, total_step=10, orth_reg_weight=1e6, **ZEROS))
    assert model(torch.randn(2, 8)).abs().max() < 100
    with pytest.raises(ValueError, match="total_step"):
        AdaLoraConfig(**ZEROS)
