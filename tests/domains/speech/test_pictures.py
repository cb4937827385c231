"""Pictures of utterances: the spectrogram by its definition, lines of words, a readable PNG."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from domains.speech.metrics import align
from domains.speech.pictures import lines_of, log_mel, picture_of
from tests.domains.speech.toy import beeps

RATE = 16000


def test_a_tone_is_brightest_in_its_band():
    time = torch.arange(RATE) / RATE
    for hertz in (300.0, 1000.0, 3000.0):
        found = log_mel(torch.sin(2 * torch.pi * hertz * time), RATE)
        assert found.shape == (80, 101)
        mel = 2595 * np.log10(1 + hertz / 700)
        expected = 81 * mel / (2595 * np.log10(1 + RATE / 2 / 700)) - 1  # centres of 80 triangles between 0 and 8 kHz
        assert abs(int(found.mean(axis=1).argmax()) - expected) <= 1
        assert found.max() - found.min() <= 8.0 + 1e-4


def test_words_are_broken_into_lines_that_fit():
    text = "one two three four five six seven"
    lines = lines_of(align(text, text), columns=12)
    assert [" ".join(step[1] for step in line) for line in lines] == ["one two", "three four", "five six", "seven"]
    assert [len(line) for line in lines_of(align("a" * 30, "b c"), columns=12)] == [1, 1]
    assert lines_of(align("", "")) == [[]]


@pytest.mark.parametrize("reference", ["the cat sat " * 12, "", None])
def test_a_picture_is_a_png_that_grows_with_its_text(reference):
    drawn = picture_of(torch.from_numpy(beeps("low mid")), RATE, reference, "a cat $\\frac{1$ sat", title="t" * 200)
    image = Image.open(io.BytesIO(drawn))
    assert image.width == 880
    small = Image.open(io.BytesIO(picture_of(torch.zeros(10), RATE, "a", "a")))
    assert image.height >= small.height - 25
    again = picture_of(torch.from_numpy(beeps("low mid")), RATE, reference, "a cat $\\frac{1$ sat", title="t" * 200)
    assert again == drawn
