"""SpeechT5 as a voice: its vocabulary, spectrograms, loss, roles and methods, against transformers and formulas."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import SpeechT5FeatureExtractor

from common.attach import attach
from common.errors import GraftError
from common.methods import METHODS, FullFineTune
from common.roles import resolve
from domains.speech.backbones._backbone import bare
from domains.speech.voices import build_mel_voice, build_voice, say
from domains.speech.voices._characters import read_characters
from domains.speech.voices._mel_voice import Target, draws
from domains.speech.voices._objective import Lines
from tests.domains.speech.voices.mel_nets import CHARACTERS, HOP, RATE, character_model, toy_speecht5, toy_vocoder
from tests.domains.speech.voices.trying import merge_without_a_trace, small, train_and_reload
from tests.toy import SMALL

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
CPU = torch.device("cpu")
LINES = Lines(torch.tensor([[4, 6, 5, 18, 2], [4, 7, 2, 0, 0]]), torch.tensor([5, 3]))
MELS = [torch.randn(length, 20, generator=torch.Generator().manual_seed(length)) for length in (9, 6)]
TARGETS = [Target(mel) for mel in MELS]
SPEAKER = torch.randn(6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny SpeechT5 and its vocoder, saved once."""
    folder = tmp_path_factory.mktemp("speecht5")
    return toy_speecht5(folder / "voice"), toy_vocoder(folder / "vocoder")


@pytest.fixture
def voice(folders):
    """The voice, built anew."""
    return build_mel_voice(*folders)


def run(voice, model):
    with draws(0, CPU):
        return voice.talker.everything(bare(model), LINES, MELS, SPEAKER)


# ---- reading


def test_characters_are_those_of_the_vocabulary(voice):
    symbols = voice.symbols
    ids = [CHARACTERS.index(letter) for letter in "\u2581twelve\u2581cats,"]
    assert symbols.encode(symbols.spell("12 (cats),")) == [*ids, CHARACTERS.index("</s>")]
    assert symbols.spell("  Thé  ".replace("é", "e").upper()) == "The"  # E and H have no capitals here, T has
    with pytest.raises(GraftError, match=r"has no letter 'ж', and 'a жb' has"):
        symbols.spell("a жb")
    for text in ("?!", "", " () "):
        with pytest.raises(GraftError, match="nothing to pronounce"):
            symbols.spell(text)


def test_characters_are_those_of_transformers(folders, voice):
    pytest.importorskip("sentencepiece")
    from transformers import SpeechT5Tokenizer

    tokenizer = SpeechT5Tokenizer(f"{folders[0]}/spm_char.model")
    for text in ("the cat", "To  be, or not", " i ", "it's"):
        assert voice.symbols.encode(voice.symbols.spell(text)) == tokenizer(text).input_ids


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (character_model(kind=1), "its pieces are no single characters"),
        (character_model(("</s>", "a")), "it has no space"),
        (character_model()[:-1] + b"\x7f", "no SentencePiece model"),
        (b"no model", "no SentencePiece model of single characters"),
    ],
)
def test_what_is_no_vocabulary_of_characters_is_refused(tmp_path, data, named):
    (tmp_path / "spm_char.model").write_bytes(data)
    with pytest.raises(GraftError, match=named):
        read_characters(tmp_path / "spm_char.model")


@pytest.mark.parametrize("samples", [700, 1280, 5001])
def test_spectrograms_are_those_of_the_feature_extractor(folders, voice, samples):
    audio = torch.randn(samples, generator=torch.Generator().manual_seed(samples))
    extractor = SpeechT5FeatureExtractor.from_pretrained(folders[0])
    expected = extractor(audio_target=audio.numpy(), sampling_rate=RATE, return_tensors="pt")["input_values"][0]
    torch.testing.assert_close(voice.front(audio), expected, atol=1e-5, rtol=1e-5)
    assert voice.front.frames(samples) == len(expected)


# ---- loss and speech


def test_the_loss_is_that_of_the_formula(voice):
    with draws(0, CPU):
        found = sum(voice.talker.loss(voice.model, LINES, TARGETS, SPEAKER).values())
    whole = [mel[: len(mel) // 2 * 2] for mel in MELS]  # steps of two frames
    longest = max(map(len, whole))
    with draws(0, CPU):
        before = torch.zeros(2, longest // 2, 20)
        for row, mel in enumerate(whole):
            before[row, 1 : len(mel) // 2] = mel[1:-1:2]
        mask = (torch.arange(5) < LINES.lengths[:, None]).long()
        out = voice.model.speecht5(
            input_values=LINES.ids, attention_mask=mask, decoder_input_values=before,
            speaker_embeddings=SPEAKER.expand(2, -1), output_attentions=True,
        )  # fmt: skip
    made = voice.model.speech_decoder_postnet(out.last_hidden_state)
    total = sum(
        torch.cat([(side[row, : len(mel)] - mel).abs().flatten() for row, mel in enumerate(whole)]).mean()
        for side in made[:2]
    )
    ends = torch.cat([torch.tensor([0.0] * (len(mel) - 1) + [1.0]) for mel in whole])
    logits = torch.cat([made[2][row, : len(mel)] for row, mel in enumerate(whole)])
    chance = logits.sigmoid()
    total = total - (5 * ends * chance.log() + (1 - ends) * (1 - chance).log()).mean()
    guided = []
    for weights in out.cross_attentions:  # (B, heads, steps, symbols)
        for row, mel in enumerate(whole):
            steps, symbols = len(mel) // 2, int(LINES.lengths[row])
            place = torch.arange(symbols) / symbols - torch.arange(steps)[:, None] / steps
            guided.append((weights[row, :, :steps, :symbols] * (1 - (-(place**2) / 0.32).exp())).flatten())
    total = total + 10 * torch.cat(guided).mean()
    torch.testing.assert_close(found, total, atol=1e-4, rtol=1e-4)


def test_what_is_spoken_depends_on_seed_speaker_and_vocoder_alone(folders, voice):
    ids = torch.tensor(voice.symbols.encode("be"))
    wave = say(voice, voice.model, ids, SPEAKER, longest=4, seed=1)
    before = torch.get_rng_state()
    assert torch.equal(say(voice, voice.model, ids, 2 * SPEAKER, longest=4, seed=1), wave)  # its direction counts
    assert torch.equal(torch.get_rng_state(), before)
    assert len(wave) == 4 * len(ids) // 2 * 2 * HOP  # cut at the longest
    for other in (say(voice, voice.model, ids, SPEAKER.flip(0), longest=4, seed=1),
                  say(voice, voice.model, ids, SPEAKER, longest=4, seed=2)):  # fmt: skip
        assert not torch.allclose(other, wave, atol=1e-4)
    with draws(1, CPU):
        mel = voice.model.generate(ids[None], speaker_embeddings=SPEAKER[None], maxlenratio=4, vocoder=voice.vocoder)
    torch.testing.assert_close(mel, wave)
    nn.init.constant_(voice.model.speech_decoder_postnet.prob_out.bias, 100.0)
    assert len(say(voice, voice.model, ids, SPEAKER)) == 2 * HOP  # it ends where the network says so


# ---- roles and methods

ROLES = {
    "stem": 4, "attention_qkv": 3 * (2 + 2 * 2), "attention_out": 2 + 2 * 2, "ffn_in": 4, "ffn_out": 4, "conv": 3,
    "norm": 1 + 2 * 2 + 2 * 3 + 3, "embed": 1, "head": 2,
}  # fmt: skip


def test_roles_are_counted_and_every_layer_but_positions_has_one(voice):
    roles = resolve(voice.model, voice.family)
    assert roles.count() == ROLES
    kinds = (nn.Linear, nn.Conv1d, nn.Embedding, nn.LayerNorm, nn.BatchNorm1d)
    layers = {name for name, module in voice.model.named_modules() if isinstance(module, kinds)}
    assert layers - set(roles.role_of) == {"speecht5.encoder.wrapped_encoder.embed_positions.pe_k"}
    parts = [set(roles.select([f"{role}@{part}" for role in has])) for part, has in PARTS.items()]
    assert set.union(*parts) == set(roles.role_of)
    assert len(roles.select(["attention@decoder@last:1"])) == 8


PARTS = {
    "text": ["attention", "ffn", "norm", "embed"],
    "decoder": ["attention", "ffn", "norm", "stem"],
    "postnet": ["conv", "norm", "head"],
}


ON = {"VeRA": ["attention"], "ConvAdapter": ["conv@postnet"]}
# One of each kind; the matrix tries all methods on a SpeechT5.
OF_EACH_KIND = ("FullFineTune", "BitFit", "NormTuning", "LastBlocks", "LoRA", "VeRA", "IA3", "SSF", "ConvAdapter")
OF_EACH_KIND += ("Houlsby", "Pfeiffer", "LoKr", "FishMask", "LoReFT")


@pytest.mark.parametrize("method", OF_EACH_KIND)
def test_a_method_of_each_kind_trains_and_reloads(folders, voice, method, tmp_path):
    def loss(model):
        return sum(voice.talker.loss(bare(model), LINES, TARGETS, SPEAKER).values())

    build = lambda: build_mel_voice(*folders)  # noqa: E731
    train_and_reload(build, lambda model: run(voice, model), loss, small(method, ON), tmp_path)


@pytest.mark.parametrize(
    ("method", "named"),
    [
        ("VPTShallow", "nothing is said of how its blocks take tokens"),
        ("PrefixTuning", "nothing is said of how its blocks take tokens"),
        ("AdaLoRA", r"cannot act on 'speech_decoder_postnet.layers.0.conv' .* it takes Linear"),
        ("Convpass", "needs the grid in which the tokens lie"),
    ],
)
def test_a_method_that_cannot_act_says_why(voice, method, named):
    with pytest.raises(GraftError, match=named):
        attach(voice.model, METHODS[method](**SMALL[method]), voice.family)


def test_lora_merges_without_a_trace_and_disabled_it_is_the_base(voice):
    merge_without_a_trace(voice, lambda model: run(voice, model), ["all", "stem", "head"])


# ---- what is refused


def test_what_does_not_fit_is_refused_by_name(folders, tmp_path):
    voice, vocoder = folders
    with pytest.raises(GraftError, match=r"has samples a frame 64 instead of 128\. Take the vocoder of this voice"):
        build_mel_voice(voice, toy_vocoder(tmp_path / "short", upsample_rates=(8, 8)))
    with pytest.raises(GraftError, match=r"could not be had or read .* Give a SpeechT5HifiGan as 'vocoder'"):
        build_mel_voice(voice, str(tmp_path / "none"))
    with pytest.raises(GraftError, match=r"is a speecht5\. Give a SpeechT5HifiGan as 'vocoder'"):
        build_mel_voice(voice, voice)
    with pytest.raises(GraftError, match=r"is a SpeechT5HifiGan\. Give a SpeechT5ForTextToSpeech or a FastSpeech2Conf"):
        build_mel_voice(vocoder, vocoder)
    with pytest.raises(GraftError, match=r"is a speecht5, .* Take the task SpectrogramVoice"):
        build_voice(voice)
    bare_folder = tmp_path / "bare"
    toy_speecht5(bare_folder)
    (bare_folder / "spm_char.model").unlink()
    with pytest.raises(GraftError, match=r"has no spm_char\.model that could be had"):
        build_mel_voice(str(bare_folder), vocoder)


def test_full_fine_tuning_moves_every_part(voice):
    attached = attach(voice.model, FullFineTune(), voice.family)
    attached.train(True)
    sum(voice.talker.loss(bare(attached.model), LINES, TARGETS, SPEAKER).values()).backward()
    still = {name for name, p in attached.model.named_parameters() if p.grad is None or not bool(p.grad.any())}
    assert still == set()
