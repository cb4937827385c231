"""Tiny speech networks with random weights, saved as transformers saves them, and batches of noise."""

from __future__ import annotations

import json
import warnings

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import nn
from transformers import (
    HubertConfig,
    HubertForCTC,
    HubertModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMForCTC,
    WavLMModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from domains.speech.specimens import spread

SECONDS = 2.0  # the context of the tiny Whisper
POSITIONS = int(SECONDS * 50)
WAVES = {
    "wav2vec2": (Wav2Vec2Config, Wav2Vec2Model, Wav2Vec2ForCTC),
    "hubert": (HubertConfig, HubertModel, HubertForCTC),
    "wavlm": (WavLMConfig, WavLMModel, WavLMForCTC),
}
LETTERS = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "A": 5, "B": 6, "C": 7, "'": 8}


def byte_tokenizer(languages=()):
    """A tokenizer of single bytes that is laid out as Whisper's is."""
    letters = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    marks = ["<|endoftext|>", "<|startoftranscript|>", *(f"<|{language}|>" for language in languages)]
    tokenizer.add_special_tokens([*marks, "<|translate|>", "<|transcribe|>", "<|notimestamps|>"])
    return tokenizer


def tiny_whisper(folder, *, languages=(), layers=(2, 2), seed=0, dropout=0.0):
    """Save a Whisper of a 2 s context whose text is single bytes; return the folder's name.

    Args:
        folder: Where to, a path that need not exist.
        languages: Codes of its languages; none for a Whisper of English.
        layers: Blocks of the encoder and of the decoder.
        seed: Seed of its weights.
        dropout: Share of the features that training drops.
    """
    tokenizer = byte_tokenizer(languages)
    plain, end = tokenizer.token_to_id("<|notimestamps|>"), tokenizer.token_to_id("<|endoftext|>")
    config = WhisperConfig(
        vocab_size=plain + 1 + POSITIONS + 1,
        d_model=16,
        num_mel_bins=80,
        encoder_layers=layers[0],
        decoder_layers=layers[1],
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_source_positions=POSITIONS,
        max_target_positions=64,
        decoder_start_token_id=tokenizer.token_to_id("<|startoftranscript|>"),
        eos_token_id=end,
        pad_token_id=end,
        bos_token_id=end,
        dropout=dropout,
        encoder_layerdrop=0.5,
        decoder_layerdrop=0.5,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = spread(WhisperForConditionalGeneration(config), seed)
    settings = model.generation_config
    settings._from_model_config = False  # otherwise a reload makes it anew and loses what follows
    settings.is_multilingual = bool(languages)
    settings.no_timestamps_token_id = plain
    settings.suppress_tokens, settings.begin_suppress_tokens = [1, plain], [end]
    settings.max_length = 64  # the hub's state theirs too
    model.save_pretrained(str(folder))
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


def tiny_wave(folder, kind, *, norm="layer", ctc=False, seed=0, **options):
    """Save a wav2vec2, HuBERT or WavLM of two blocks; return the folder's name.

    Args:
        folder: Where to, a path that need not exist.
        kind: A name of `WAVES`.
        norm: `layer` or `group`, the norm of its convolutions.
        ctc: Whether it has an output layer and a vocabulary.
        seed: Seed of its weights.
        options: Further settings of its configuration.
    """
    config_class, plain, with_output = WAVES[kind]
    config = config_class(
        vocab_size=len(LETTERS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        conv_dim=(8, 8, 8),
        conv_kernel=(10, 4, 4),
        conv_stride=(5, 4, 4),
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm=norm,
        do_stable_layer_norm=norm == "layer",
        num_feat_extract_layers=3,
        layerdrop=0.9,
        mask_time_prob=0.9,
        **options,
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = spread((with_output if ctc else plain)(config), seed)
    model.save_pretrained(str(folder))
    Wav2Vec2FeatureExtractor(return_attention_mask=norm == "layer").save_pretrained(str(folder))
    if ctc:
        (folder / "vocab.json").write_text(json.dumps(LETTERS))
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Wav2Vec2CTCTokenizer"}))
    return str(folder)


def noise(lengths=(16_000, 9_000, 4_000), seed=0):
    """Audio (B, T), zeros behind the end, and lengths (B,), samples at 16 kHz."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(length, generator=generator).mul(0.1).clamp(-1, 1) for length in lengths]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor(lengths)
