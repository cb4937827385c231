"""Tuner types that PEFT lacks, written as PEFT tuners and registered in one place.

Importing this package makes them loadable by `peft.PeftModel.from_pretrained` like PEFT's own. PEFT's public
registration refuses names outside its enum, so the three mappings of `peft.mapping` are extended here; a contract test
guards that against a change of PEFT.
"""

from __future__ import annotations

from typing import Any, cast

from peft import mapping
from peft.tuners.tuners_utils import BaseTuner

from common.tuners._base import OwnConfig
from common.tuners._upstream import MENDED
from common.tuners.behind_block import PostAdapterConfig, PostAdapterModel, ReftConfig, ReftModel
from common.tuners.bottleneck import BottleneckConfig, BottleneckModel
from common.tuners.compacter import CompacterConfig, CompacterModel
from common.tuners.conv_adapter import ConvAdapterConfig, ConvAdapterModel
from common.tuners.conv_lora import ConvLoraConfig, ConvLoraModel
from common.tuners.copies import CopiesConfig, CopiesModel
from common.tuners.fact import FactConfig, FactModel
from common.tuners.fusion import FusionConfig, FusionModel
from common.tuners.gated_lora import GatedLoraConfig, GatedLoraModel
from common.tuners.invertible import InvertibleConfig, InvertibleModel, halves
from common.tuners.ladder import LadderConfig, LadderModel
from common.tuners.mixture import MixtureConfig, MixtureModel
from common.tuners.parallel import ParallelConfig, ParallelModel, parallel_fits
from common.tuners.prefix import PrefixConfig, PrefixModel
from common.tuners.prompt_tokens import PromptTokensConfig, PromptTokensModel, uniform_bound
from common.tuners.rep_adapter import RepAdapterConfig, RepAdapterModel, has_biases
from common.tuners.salient import SalientConfig, SalientModel
from common.tuners.scale_shift import ScaleShiftConfig, ScaleShiftModel
from common.tuners.sparse import SparseConfig, SparseModel
from common.tuners.stack import StackConfig, StackModel
from common.tuners.unipelt import UniPeltConfig, UniPeltModel
from common.tuners.weight_form import WeightFormConfig, WeightFormModel
from common.tuners.weight_lora import WeightLoraConfig, WeightLoraModel, matrix_shape

__all__ = [
    "MENDED",
    "OWN",
    "BottleneckConfig",
    "BottleneckModel",
    "CompacterConfig",
    "CompacterModel",
    "ConvAdapterConfig",
    "ConvAdapterModel",
    "ConvLoraConfig",
    "ConvLoraModel",
    "CopiesConfig",
    "CopiesModel",
    "FactConfig",
    "FactModel",
    "FusionConfig",
    "FusionModel",
    "GatedLoraConfig",
    "GatedLoraModel",
    "InvertibleConfig",
    "InvertibleModel",
    "LadderConfig",
    "LadderModel",
    "MixtureConfig",
    "MixtureModel",
    "OwnConfig",
    "ParallelConfig",
    "ParallelModel",
    "PostAdapterConfig",
    "PostAdapterModel",
    "ReftConfig",
    "ReftModel",
    "RepAdapterConfig",
    "RepAdapterModel",
    "SalientConfig",
    "SalientModel",
    "ScaleShiftConfig",
    "ScaleShiftModel",
    "SparseConfig",
    "SparseModel",
    "StackConfig",
    "StackModel",
    "UniPeltConfig",
    "UniPeltModel",
    "WeightFormConfig",
    "WeightFormModel",
    "WeightLoraConfig",
    "WeightLoraModel",
    "halves",
    "has_biases",
    "is_own",
    "matrix_shape",
    "parallel_fits",
    "uniform_bound",
]

OWN: dict[type[OwnConfig], type[BaseTuner]] = {
    BottleneckConfig: BottleneckModel,
    ConvAdapterConfig: ConvAdapterModel,
    ConvLoraConfig: ConvLoraModel,
    CopiesConfig: CopiesModel,
    MixtureConfig: MixtureModel,
    PrefixConfig: PrefixModel,
    PromptTokensConfig: PromptTokensModel,
    CompacterConfig: CompacterModel,
    InvertibleConfig: InvertibleModel,
    LadderConfig: LadderModel,
    ParallelConfig: ParallelModel,
    PostAdapterConfig: PostAdapterModel,
    ReftConfig: ReftModel,
    RepAdapterConfig: RepAdapterModel,
    ScaleShiftConfig: ScaleShiftModel,
    WeightFormConfig: WeightFormModel,
    FactConfig: FactModel,
    FusionConfig: FusionModel,
    GatedLoraConfig: GatedLoraModel,
    SalientConfig: SalientModel,
    SparseConfig: SparseModel,
    StackConfig: StackModel,
    UniPeltConfig: UniPeltModel,
    WeightLoraConfig: WeightLoraModel,
}


def is_own(peft_type: object) -> bool:
    """Whether plain `peft` knows this type of tuner only once `common.tuners` is imported."""
    return peft_type in {config.own_type for config in OWN}


def _register() -> None:
    for config, model in OWN.items():
        key = cast("Any", config.own_type)
        mapping.PEFT_TYPE_TO_CONFIG_MAPPING[key] = config
        mapping.PEFT_TYPE_TO_TUNER_MAPPING[key] = cast("Any", model)
        mapping.PEFT_TYPE_TO_PREFIX_MAPPING[key] = model.prefix
    mapping.PEFT_TYPE_TO_TUNER_MAPPING.update(MENDED)


_register()
