"""Rows and figures of a set of utterances."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from common.errors import GraftError
from domains.speech.voice_metrics import (
    CHEAP,
    SpeakerEncoder,
    _score,
    _speaker,
    acoustics,
    heard,
    intervals,
    score,
    score_rows,
    spectrum_distance,
    summary,
    word_errors,
)
from tests.domains.speech.sounds import buzz, hiss, nothing, syllables

RATE = 16_000


@pytest.fixture
def encoder(monkeypatch):
    torch.manual_seed(0)
    model = SpeakerEncoder().eval()
    for module in (_speaker, _score):
        monkeypatch.setattr(module, "speaker_encoder", lambda: model)
    return model


def test_words_are_compared_in_one_spelling():
    found = word_errors(["Press one, please.", "It's twenty!"], ["press 1 please", "it is thirty"])
    assert found == [(0, 3), (1, 3)]


def test_the_error_rate_is_over_all_words_together():
    rows = [{"errors": 1, "words": 1, "wer": 1.0}, {"errors": 0, "words": 9, "wer": 0.0}]
    assert summary(rows) == {"wer": pytest.approx(0.1)}


def test_figures_of_a_set_are_those_of_its_utterances():
    pairs = [(buzz(200.0, 1.0), buzz(100.0, 0.8)), (buzz(180.0, 0.5), buzz(90.0, 0.7)), (hiss(0.4), hiss(0.5, seed=1))]
    generated, reference = ([pair[side] for pair in pairs] for side in (0, 1))
    rows = [acoustics(one, other, RATE) for one, other in pairs]
    found = score(generated, reference, ["a", "b", "c"], RATE, parts=CHEAP)
    assert found["mcd"] == pytest.approx(sum(row.mcd for row in rows) / 3)
    assert found["f0_rmse"] == pytest.approx((rows[0].f0_rmse + rows[1].f0_rmse) / 2)  # the third has no pitch
    assert found["f0_gap"] == pytest.approx(12.0, abs=0.2)
    assert found["duration_ratio"] == pytest.approx(1.9 / 2.0, abs=0.05)
    assert set(found) == {
        "mcd",
        "f0_rmse",
        "voicing_error",
        "duration_error",
        "f0_median",
        "f0_median_reference",
        "f0_gap",
        "duration_ratio",
    }


def test_an_interval_is_as_wide_as_the_error_of_a_mean():
    values = torch.randn(200, generator=torch.Generator().manual_seed(0)).double() + 5
    rows = [{"speaker_similarity": value, "errors": int(value > 6), "words": 4} for value in values.tolist()]
    found = intervals(rows)
    low, high = found["speaker_similarity"]
    middle, error = float(values.mean()), float(values.std()) / math.sqrt(200)
    assert (low, high) == pytest.approx((middle - 1.96 * error, middle + 1.96 * error), abs=0.2 * error)
    assert found["wer"][0] < summary(rows)["wer"] < found["wer"][1]
    assert found == intervals(rows)


def test_nothing_voiced_leaves_no_pitch():
    found = score([hiss(0.5)], [hiss(0.5)], ["a"], RATE, parts=CHEAP)
    assert math.isnan(found["f0_gap"])
    assert math.isnan(found["f0_rmse"])


def test_the_speaker_is_measured_against_the_centroid(encoder):
    generated, reference = [syllables(200.0), hiss(0.8)], [syllables(110.0), syllables(120.0)]
    rows = score_rows(generated, reference, ["a", "b"], RATE, parts=["speaker"])
    centre = sum(encoder.embed(one, RATE) for one in reference)
    wanted = [float(encoder.embed(one, RATE) @ centre / centre.norm()) for one in generated]
    assert [row["speaker_similarity"] for row in rows] == pytest.approx(wanted, abs=1e-5)
    found = score(generated, reference, ["a", "b"], RATE, parts=["speaker"])
    assert found["speaker_similarity"] == pytest.approx(sum(wanted) / 2, abs=1e-5)
    assert found["spectrum_distance"] == spectrum_distance(generated, reference, RATE)


def test_a_row_has_all_measures(encoder, whisper):
    (row,) = score_rows([syllables()], [syllables()], ["a b"], RATE, recogniser=whisper)
    fields = {field.name for field in dataclasses.fields(acoustics(syllables(), syllables(), RATE))}
    assert set(row) == fields | {"hypothesis", "errors", "words", "wer", "speaker_similarity"}
    assert row["words"] == 2
    assert row["wer"] == row["errors"] / 2


def test_what_is_longer_than_the_recogniser_hears_is_heard_in_pieces(whisper):
    one, other = syllables(count=6), syllables(300.0, count=6)  # 1.7 s each, the context is 2 s
    assert heard(nothing(1.0), RATE, name=whisper) == ""
    whole = heard(torch.cat([one, nothing(0.4), other]), RATE, name=whisper)
    assert len(whole.split()) >= len(heard(one, RATE, name=whisper).split())


def test_lists_that_do_not_fit_and_unknown_parts_are_refused():
    with pytest.raises(GraftError, match="1 utterances, 2 recordings and 1 texts"):
        score([hiss(0.2)], [hiss(0.2)] * 2, ["a"], RATE)
    with pytest.raises(GraftError, match="at least one"):
        score([], [], [], RATE)
    with pytest.raises(GraftError, match="Did you mean 'speaker'"):
        score([hiss(0.2)], [hiss(0.2)], ["a"], RATE, parts=["speakers"])  # type: ignore[list-item]
