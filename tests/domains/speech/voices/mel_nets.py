"""A tiny SpeechT5 that speaks, with its vocabulary and vocoder, as transformers saves them."""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
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


def toy_vocoder(folder, **options):
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
        model = SpeechT5HifiGan(SpeechT5HifiGanConfig(**{**size, **options}))
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(str(folder))
    return str(folder)
