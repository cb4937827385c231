"""FastSpeech2Conformer as a voice: its loss, speech, targets, roles and methods, against transformers and formulas."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from common.attach import attach
from common.errors import GraftError
from common.methods import METHODS, LoRA
from common.roles import resolve
from domains.speech.backbones._backbone import bare
from domains.speech.voices import _fastspeech2, build_mel_voice, build_voice, say
from domains.speech.voices._fastspeech2 import LINES, FastSpeech2Teacher
from domains.speech.voices._mel_voice import Target
from domains.speech.voices._objective import Lines
from domains.speech.voices._scales import Line, Scales
from tests.domains.speech.voices.mel_nets import (
    BANDS,
    HOP,
    PHONEMES,
    RATE,
    Tones,
    toy_fastspeech2,
    toy_fastspeech2_vocoder,
    toy_speecht5,
    toy_vocoder,
)
from tests.domains.speech.voices.toy_data import hum
from tests.domains.speech.voices.trying import merge_without_a_trace, small, train_and_reload
from tests.toy import SMALL

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
TEXTS = Lines(torch.tensor([[4, 60, 5, 77], [20, 7, 77, 0]]), torch.tensor([4, 3]))


def target(*durations):
    """A random target of a line."""
    draw = torch.Generator().manual_seed(sum(durations))
    curves = torch.randn(2, len(durations), generator=draw)
    return Target(torch.randn(sum(durations), BANDS, generator=draw), torch.tensor(durations), *curves)


TARGETS = [target(3, 2, 0, 4), target(1, 4, 2)]
SPEAKER = torch.randn(6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny FastSpeech2Conformer and its vocoder, saved once."""
    folder = tmp_path_factory.mktemp("fastspeech2")
    return toy_fastspeech2(folder / "voice"), toy_fastspeech2_vocoder(folder / "vocoder")


@pytest.fixture
def voice(folders):
    """The voice, built anew."""
    return build_mel_voice(*folders)


def run(voice, model, speaker=None):
    return voice.talker.everything(bare(model), TEXTS, [], speaker)


def loss(voice, model, speaker=None):
    return sum(voice.talker.loss(bare(model), TEXTS, TARGETS, speaker).values())


# ---- loss and speech


@pytest.mark.parametrize("masking", ["masked", "weighted", "none"])
def test_the_loss_is_that_of_the_formula(folders, tmp_path, masking):
    options = {"use_masking": masking == "masked", "use_weighted_masking": masking == "weighted"}
    voice = build_mel_voice(toy_fastspeech2(tmp_path / "voice", **options), folders[1])
    seen = {}
    for part in ("speech_decoder_postnet", "duration_predictor", "pitch_predictor", "energy_predictor"):
        getattr(voice.model, part).register_forward_hook(lambda m, i, out, part=part: seen.update({part: out}))
    found = loss(voice, voice.model)
    rows = []  # of each row the errors of frames, durations, pitch and energy
    for row, (mel, durations, pitch, energy) in enumerate(TARGETS):
        sides = [(side[row, : len(mel)] - mel).abs() for side in seen["speech_decoder_postnet"]]
        curves = [(seen["duration_predictor"][row], (durations + 1).float().log())]
        curves += [(seen[f"{n}_predictor"][row, :, 0], w) for n, w in (("pitch", pitch), ("energy", energy))]
        rows.append([sides[0] + sides[1], *((made[: len(wanted)] - wanted) ** 2 for made, wanted in curves)])
    if masking == "weighted":  # each row counts alike
        expected = sum(part.mean() for row in rows for part in row) / len(rows)
    else:  # without a mask it would learn the padding
        expected = sum(torch.cat(parts).mean() for parts in zip(*rows, strict=True))
    torch.testing.assert_close(found, expected)
    assert not any(module.training for module in voice.model.modules())


def test_the_network_reads_the_targets_whatever_mode_its_layers_are_in(voice, monkeypatch):
    modes = []
    layer = voice.model.encoder.conformer_layers[0]
    monkeypatch.setattr(layer.dropout, "forward", lambda x: modes.append(layer.dropout.training) or x)
    loss(voice, voice.model)
    assert set(modes) == {False}
    louder = [one._replace(pitch=one.pitch + 1) for one in TARGETS]
    assert float(loss(voice, voice.model)) != float(voice.talker.loss(voice.model, TEXTS, louder, None)["network"])
    voice.model.train()
    loss(voice, voice.model)
    assert modes[-1]
    assert all(module.training for module in voice.model.modules())


def test_what_is_spoken_is_what_transformers_speaks(voice):
    ids = torch.tensor(voice.symbols.encode(voice.symbols.spell("a big bad bee")))
    with torch.no_grad():
        out = voice.model(ids[None])
        wave = say(voice, voice.model, ids)
        torch.testing.assert_close(wave, voice.vocoder(out.spectrogram[0]))
    assert len(wave) == int(out.duration_outputs.sum()) * HOP
    assert torch.equal(say(voice, voice.model, ids, seed=5), wave)  # nothing is drawn
    nn.init.constant_(voice.model.duration_predictor.linear.bias, 50.0)  # e^50 frames a symbol
    cut = say(voice, voice.model, ids, longest=2)
    assert 0.8 * 2 * len(ids) * HOP < len(cut) <= 2 * len(ids) * HOP
    nn.init.constant_(voice.model.duration_predictor.linear.bias, -50.0)
    assert len(say(voice, voice.model, ids)) == len(ids) * HOP  # transformers makes a frame of each then


def test_the_normalisation_of_the_vocoder_is_applied(folders, tmp_path):
    voice = build_mel_voice(folders[0], toy_fastspeech2_vocoder(tmp_path / "vocoder", normalize_before=True))
    voice.vocoder.mean.fill_(0.5)
    voice.vocoder.scale.fill_(2.0)
    mel = torch.randn(9, BANDS, generator=torch.Generator().manual_seed(0))
    plain = build_mel_voice(*folders)
    plain.vocoder.config.normalize_before = False
    torch.testing.assert_close(voice.sound(mel), plain.sound((mel - 0.5) / 2.0))


# ---- targets


def test_a_teacher_measures_the_voice_and_follows_its_own_speech(voice, monkeypatch):
    monkeypatch.setattr(_fastspeech2, "LINES", LINES[:2])
    with pytest.raises(GraftError, match="could not be measured on its own sound"):
        voice.talker.teacher(voice, voice.model, None)  # its vocoder is random
    voice = replace(voice, vocoder=Tones(voice.vocoder.config))
    with pytest.warns(UserWarning, match="writes (pitch|energy) could not be measured") as caught:
        teacher = voice.talker.teacher(voice, voice.model, None)  # random predictors move nothing that is heard
    assert len(caught) == 2
    assert teacher.figures["kept"] == ["pitch", "energy"]
    # A tone's magnitude is 10^(0.15 m + shift).
    assert float(teacher.figures["mel_r2"]) > 0.7
    assert float(teacher.scales.mel.slope.median()) == pytest.approx(1 / 0.15, rel=0.2)
    ids = torch.tensor(voice.symbols.encode(voice.symbols.spell("the quick brown fox")))
    with torch.no_grad():
        own = voice.model(ids[None])
    audio = voice.sound(own.spectrogram[0].repeat_interleave(2, dim=0))
    found = teacher(ids, audio)
    assert len(found.mel) == int(found.durations.sum()) == 1 + len(audio) // HOP
    assert int(found.durations.min()) >= 0
    assert int((found.durations - 2 * own.duration_outputs[0]).abs().max()) <= 3
    assert torch.equal(found.pitch, own.pitch_outputs[0, :, 0])  # kept
    assert torch.equal(found.energy, own.energy_outputs[0, :, 0])
    error = (found.mel[:-1] - own.spectrogram[0].repeat_interleave(2, dim=0)).abs().mean()
    assert float(error) < 0.3 * float(own.spectrogram.std())


def test_labels_of_pitch_and_energy_are_means_of_the_recording_at_the_voices_scale(voice):
    one = torch.ones(1, dtype=torch.float64)
    same = Line(torch.ones(BANDS, dtype=torch.float64), torch.zeros(BANDS, dtype=torch.float64), one)
    scales = Scales(same, Line(2 * one, -one, one), Line(0.1 * one, 3 * one, one), {"kept": []})
    teacher = FastSpeech2Teacher(voice, voice.model, None, scales)
    ids = torch.tensor(voice.symbols.encode(voice.symbols.spell("a bad cab")))
    audio = torch.from_numpy(hum("a bad cab", 1))
    found = teacher(ids, audio)
    spectrum = voice.front.magnitudes(audio)
    start, seen = 0, 0
    for place, length in enumerate(found.durations.tolist()):
        part = spectrum[start : start + length]
        start += length
        if length == 0:
            with torch.no_grad():
                assert found.energy[place] == voice.model(ids[None]).energy_outputs[0, place, 0]
            continue
        seen += 1
        torch.testing.assert_close(found.energy[place], 0.1 * part.square().sum(1).sqrt().mean() + 3)
        assert 150 * 0.97 < ((float(found.pitch[place]) + 1) / 2 * one).exp() < 180 * 1.03
    assert seen > 3


# ---- roles and methods

ROLES = {
    "stem": 2, "attention_qkv": 3 * 4, "attention_out": 4, "ffn_in": 2 * 4, "ffn_out": 2 * 4,
    "conv": 3 * 4 + (2 + 2 + 2) + 3, "norm": 6 * 4 + (2 + 2 + 2) + 3, "embed": 1, "head": 4,
}  # fmt: skip
PARTS = {
    "text": ["attention", "ffn", "conv", "norm", "embed"],
    "durations": ["conv", "norm", "head"],
    "pitch": ["conv", "norm", "head", "stem"],
    "energy": ["conv", "norm", "head", "stem"],
    "decoder": ["attention", "ffn", "conv", "norm"],
    "postnet": ["conv", "norm", "head"],
}


def test_roles_are_counted_and_every_layer_but_positions_has_one(voice):
    roles = resolve(voice.model, voice.family)
    assert roles.count() == ROLES
    kinds = (nn.Linear, nn.Conv1d, nn.Embedding, nn.LayerNorm, nn.BatchNorm1d)
    layers = {name for name, module in voice.model.named_modules() if isinstance(module, kinds)}
    assert {name.rpartition(".")[2] for name in layers - set(roles.role_of)} == {"linear_pos"}
    parts = [set(roles.select([f"{role}@{part}" for role in has])) for part, has in PARTS.items()]
    assert set.union(*parts) == set(roles.role_of)
    assert sum(map(len, parts)) == len(roles.role_of)


OF_EACH_KIND = ("FullFineTune", "BitFit", "LastBlocks", "LoRA", "IA3", "SSF", "ConvAdapter", "Houlsby", "LoReFT")


@pytest.mark.parametrize("method", OF_EACH_KIND)
def test_a_method_of_each_kind_trains_and_reloads(folders, voice, method, tmp_path):
    build = lambda: build_mel_voice(*folders)  # noqa: E731
    spec = small(method, {"ConvAdapter": ["conv@postnet"]})
    train_and_reload(build, lambda model: run(voice, model), lambda model: loss(voice, model), spec, tmp_path, steps=3)


@pytest.mark.parametrize("method", ["VPTShallow", "PrefixTuning"])
def test_a_method_that_cannot_act_says_why(voice, method):
    with pytest.raises(GraftError, match="nothing is said of how its blocks take tokens"):
        attach(voice.model, METHODS[method](**SMALL[method]), voice.family)


def test_lora_merges_without_a_trace_and_disabled_it_is_the_base(voice):
    merge_without_a_trace(voice, lambda model: run(voice, model), ["all", "stem", "head"])


def test_a_speaker_vector_is_read_where_there_is_one(folders, tmp_path):
    voice = build_mel_voice(toy_fastspeech2(tmp_path / "voice", speaker_embed_dim=6), folders[1])
    assert voice.speaker_width == 6
    assert resolve(voice.model, voice.family).select(["stem@speaker"]) == {"projection": "stem"}
    speaker = SPEAKER.clone().requires_grad_()
    loss(voice, voice.model, speaker).backward()
    assert bool(speaker.grad.any())
    ids = TEXTS.ids[0]
    one, two, three = (say(voice, voice.model, ids, vector) for vector in (SPEAKER, 2 * SPEAKER, -SPEAKER))
    torch.testing.assert_close(one, two)
    assert one.shape != three.shape or not torch.allclose(one, three, atol=1e-4)
    attach(voice.model, LoRA(rank=2, on=["stem@speaker"]), voice.family)


# ---- what is refused


def test_every_line_of_the_measurement_can_be_said(voice):
    assert all(len(voice.symbols.encode(voice.symbols.spell(line))) > 30 for line in LINES)
    said = {place for line in LINES for place in voice.symbols.encode(voice.symbols.spell(line))}
    sounds = {PHONEMES[place].rstrip("012") for place in said}
    assert sounds >= {symbol.rstrip("012") for symbol in PHONEMES[2:-7]}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"reduction_factor": 2}, "has reduction_factor 2. Give a FastSpeech2ConformerModel of one language"),
        ({"speaking_speed": 1.5, "num_speakers": 3}, "has speaking_speed 1.5, num_speakers 3"),
        ({"vocab_size": 70}, r"vocab.json of '.*' has more symbols than its network \(70\)"),
    ],
)
def test_a_network_that_cannot_be_trained_is_refused(folders, tmp_path, options, named):
    with pytest.raises(GraftError, match=named):
        build_mel_voice(toy_fastspeech2(tmp_path / "voice", **options), folders[1])


def test_what_does_not_fit_is_refused_by_name(folders, tmp_path):
    voice, vocoder = folders
    with pytest.raises(GraftError, match=r"is a speecht5_hifigan\. Give a FastSpeech2ConformerHifiGan as 'vocoder'"):
        build_mel_voice(voice, toy_vocoder(tmp_path / "other"))
    with pytest.raises(GraftError, match=r"has bands 8 instead of 20\. Take the vocoder of this voice"):
        build_mel_voice(voice, toy_fastspeech2_vocoder(tmp_path / "narrow", model_in_dim=8))
    with pytest.raises(GraftError, match=r"Give a SpeechT5HifiGan as 'vocoder'"):
        build_mel_voice(toy_speecht5(tmp_path / "speecht5"), vocoder)
    with pytest.raises(GraftError, match=r"is a fastspeech2_conformer, .* Take the task SpectrogramVoice"):
        build_voice(voice)
    wordless = toy_fastspeech2(tmp_path / "wordless")
    (tmp_path / "wordless" / "vocab.json").unlink()
    with pytest.raises(GraftError, match=r"has no vocab\.json that could be had"):
        build_mel_voice(wordless, vocoder)


def test_rate_and_hop_are_the_vocoders(folders, tmp_path):
    voice = build_mel_voice(*folders)
    assert (voice.rate, voice.front.hop, voice.bands) == (RATE, HOP, BANDS)
    silent = toy_fastspeech2_vocoder(tmp_path / "silent", upsample_rates=(8, 8))
    config = tmp_path / "silent" / "config.json"
    config.write_text(config.read_text().replace('"sampling_rate": 8000,', ""))
    assert (build_mel_voice(folders[0], silent).rate, build_mel_voice(folders[0], silent).front.hop) == (22_050, 64)
