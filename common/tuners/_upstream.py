"""PEFT's own tuner types where one method of theirs has to be mended; saved files stay as plain `peft` reads them."""

from __future__ import annotations

import torch
from peft import LNTuningModel, PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

_COPIES = "ln_tuning_layers."


class NestedCopiesModel(LNTuningModel):
    """Layer-copy tuning whose copies of whole blocks load under any adapter name.

    PEFT takes the adapter's name out of a saved key only where it stands before the last part, so that the keys of a
    copied block are saved with the name `default` in them, and are found under that name alone.
    """

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        renamed = {
            key.replace(f"{_COPIES}default.", f"{_COPIES}{adapter_name}."): tensor for key, tensor in state_dict.items()
        }
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, renamed)


MENDED: dict[PeftType, type[BaseTuner]] = {PeftType.LN_TUNING: NestedCopiesModel}
