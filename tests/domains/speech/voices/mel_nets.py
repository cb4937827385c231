"""A tiny SpeechT5 and a tiny FastSpeech2Conformer with their vocabularies and vocoders, as transformers saves them."""

from __future__ import annotations

import json

import torch
from torch import nn
from torch.nn import functional
from transformers import (
    FastSpeech2ConformerConfig,
    FastSpeech2ConformerHifiGan,
    FastSpeech2ConformerHifiGanConfig,
    FastSpeech2ConformerModel,
    SpeechT5Config,
    SpeechT5FeatureExtractor,
    SpeechT5ForTextToSpeech,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
)

BANDS, RATE, HOP = 20, 8000, 128
CHARACTERS = ("<s>", "<pad>", "</s>", "<unk>", "\u2581", *"etaonishrdlumwcfgypbvkxjqz'.,?TI")
CONTROL = {"<s>": 3, "<pad>": 3, "</s>": 3, "<unk>": 2}
SIZE = {
    "vocab_size": len(CHARACTERS),
    "hidden_size": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 24,
    "num_mel_bins": BANDS,
    "speech_decoder_prenet_units": 12,
    "speaker_embedding_dim": 6,
    "speech_decoder_postnet_layers": 3,
    "speech_decoder_postnet_units": 12,
    "speech_decoder_postnet_dropout": 0.0,
    "positional_dropout": 0.0,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "encoder_max_relative_position": 8,
    "max_speech_positions": 200,
    "max_text_positions": 60,
}


def field(number, value):
    """A field of a protocol buffer's message: a number or bytes."""
    size = value if isinstance(value, int) else len(value)
    head = bytes([number << 3 | (0 if isinstance(value, int) else 2)])
    coded = b""
    while size >= 0x80:
        coded, size = coded + bytes([size & 0x7F | 0x80]), size >> 7
    return head + coded + bytes([size]) + (b"" if isinstance(value, int) else value)


def character_model(characters=CHARACTERS, kind=4):
    """The bytes of a SentencePiece model; kind 4 is one of characters."""
    score = b"\x15\x00\x00\x00\x00"  # field 2, four bytes
    pieces = [field(1, piece.encode()) + score + field(3, CONTROL.get(piece, 1)) for piece in characters]
    return b"".join(field(1, piece) for piece in pieces) + field(2, field(3, kind)) + field(3, field(3, 1))


def toy_speecht5(folder, *, seed=0, **options):
    """Save a tiny SpeechT5 that speaks; return the folder's name."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SpeechT5ForTextToSpeech(SpeechT5Config(**{**SIZE, **options}))
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.3)
            elif name.endswith("prob_out.bias"):
                nn.init.constant_(parameter, -6.0)  # it hardly ever ends of itself
    model.save_pretrained(str(folder))
    extractor = SpeechT5FeatureExtractor(sampling_rate=RATE, num_mel_bins=options.get("num_mel_bins", BANDS), fmax=3800)
    extractor.save_pretrained(str(folder))
    (folder / "spm_char.model").write_bytes(character_model())
    return str(folder)


def toy_vocoder(folder, *, kind=SpeechT5HifiGan, kind_config=SpeechT5HifiGanConfig, **options):
    """Save a tiny HiFi-GAN; return the folder's name."""
    size = {
        "model_in_dim": BANDS,
        "sampling_rate": RATE,
        "upsample_initial_channel": 8,
        "upsample_rates": (8, 16),
        "upsample_kernel_sizes": (16, 32),
        "resblock_kernel_sizes": (3,),
        "resblock_dilation_sizes": ((1, 3),),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(kind_config(**{**size, **options}))
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(str(folder))
    return str(folder)


VOWELS = "AA AE AH AO AW AY EH ER EY IH IY OW OY UH UW".split()
CONSONANTS = "B CH D DH F G HH JH K L M N NG P R S SH T TH V W Y Z ZH".split()
PHONEMES = (
    "<blank>", "<unk>", *(f"{vowel}{stress}" for vowel in VOWELS for stress in "012"), *CONSONANTS, ",", ".", "'", "?",
    "!", "..", "<sos/eos>",
)  # fmt: skip
FAST_SIZE = {
    "vocab_size": len(PHONEMES),
    "hidden_size": 16,
    "num_mel_bins": BANDS,
    "encoder_layers": 2,
    "encoder_linear_units": 24,
    "decoder_layers": 2,
    "decoder_linear_units": 24,
    "decoder_kernel_size": 7,
    "duration_predictor_channels": 12,
    "energy_predictor_channels": 12,
    "pitch_predictor_layers": 2,
    "pitch_predictor_channels": 12,
    "speech_decoder_postnet_layers": 3,
    "speech_decoder_postnet_units": 12,
    **{
        name: 0.0
        for name in (
            "duration_predictor_dropout_rate", "energy_predictor_dropout", "pitch_predictor_dropout",
            "encoder_dropout_rate", "encoder_positional_dropout_rate", "encoder_attention_dropout_rate",
            "decoder_dropout_rate", "decoder_positional_dropout_rate", "decoder_attention_dropout_rate",
            "speech_decoder_postnet_dropout",
        )
    },
}  # fmt: skip


def toy_fastspeech2(folder, *, seed=0, **options):
    """Save a tiny FastSpeech2Conformer whose symbols last some eight frames; return the folder's name."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FastSpeech2ConformerModel(FastSpeech2ConformerConfig(**{**FAST_SIZE, **options}))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.3)
        nn.init.constant_(model.duration_predictor.linear.bias, 2.2)
        nn.init.normal_(model.duration_predictor.linear.weight, std=0.1)
    model.save_pretrained(str(folder))
    (folder / "vocab.json").write_text(json.dumps({symbol: place for place, symbol in enumerate(PHONEMES)}))
    return str(folder)


def toy_fastspeech2_vocoder(folder, **options):
    """Save its tiny HiFi-GAN; return the folder's name."""
    kinds = {"kind": FastSpeech2ConformerHifiGan, "kind_config": FastSpeech2ConformerHifiGanConfig}
    return toy_vocoder(folder, **kinds, **options)


class Tones(nn.Module):
    """A vocoder with a known scale: a tone in the middle of each band, of magnitude 10^(slope m + shift)."""

    def __init__(self, config, slope=0.15, shift=-2.0):
        super().__init__()
        from torchaudio.functional import melscale_fbanks

        self.config, self.slope, self.shift = config, slope, shift
        filters = melscale_fbanks(4097, 80.0, RATE / 2, BANDS, RATE, norm="slaney", mel_scale="slaney")
        self.hertz = filters.argmax(0) * RATE / 8192

    def forward(self, mel):
        """Return the sound (F * HOP,) of a spectrogram (F, bands); frame f lies on sample f * HOP."""
        level = torch.cat([mel, mel[-1:]]).T[None]
        level = functional.interpolate(level, len(mel) * HOP + 1, mode="linear", align_corners=True)[0, :, :-1]
        time = torch.arange(len(mel) * HOP) / RATE
        phases = torch.arange(BANDS)[:, None] ** 2 + 2 * torch.pi * self.hertz[:, None] * time
        return (10 ** (self.slope * level + self.shift) * phases.sin()).sum(0)
