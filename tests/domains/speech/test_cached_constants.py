"""Constants that are made once: a validation may be the first to ask for them, and training goes through them."""

from __future__ import annotations

import pytest
import torch

from domains.speech.backbones import _mel
from domains.speech.voices import _spectrum


@pytest.mark.parametrize(
    ("cached", "arguments"),
    [
        (_mel._filters, (80,)),
        (_spectrum._window, (16, torch.device("cpu"))),
        (_spectrum._mel_filters, (9, 4, 16_000, torch.device("cpu"))),
    ],
)
def test_what_a_validation_made_first_can_be_trained_through(cached, arguments):
    cached.cache_clear()
    with torch.inference_mode():
        made = cached(*arguments)
    heard = torch.ones(made.shape[-1], requires_grad=True)
    (made * heard).sum().backward()
    torch.testing.assert_close(heard.grad, made if made.ndim == 1 else made.sum(dim=0))
