"""From features to text: Whisper's decoder with teacher forcing, and free-running through transformers' generate."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import GraftError
from domains.speech.backbones._backbone import SpeechBackbone, bare
from domains.speech.backbones._tokens import WhisperTokens

LONGEST_LOOP = 32
"""Most ids of a phrase that the loop guard looks for."""
_LOOP_IDS, _LOOP_TIMES = 12, 3


def decode(built: SpeechBackbone, model: nn.Module, features: Tensor, tokens: Tensor) -> Tensor:
    """Run the decoder with teacher forcing.

    Args:
        built: What `build` returned, of kind `seq2seq`.
        model: Its model, bare or with adapters.
        features: (B, F, width), of `encode`.
        tokens: (B, U), what the decoder reads: the start ids, then the text, then anything where a text is shorter.

    Returns:
        Logits of the id behind each one, (B, U, V).

    Raises:
        GraftError: A backbone without a decoder, or more ids than the decoder has positions for.
    """
    _written_by(built)
    network = bare(model)
    most = network.config.max_target_positions
    if tokens.shape[1] > most:
        raise GraftError(
            f"A text has {tokens.shape[1]} ids with its start, and the decoder of '{built.name}' has positions for "
            f"{most}. Cut the utterance, or leave it out."
        )
    hidden = network.model.decoder(input_ids=tokens, encoder_hidden_states=features, use_cache=False)
    return network.proj_out(hidden.last_hidden_state)


def generate(
    built: SpeechBackbone,
    model: nn.Module,
    features: Tensor,
    *,
    beams: int = 1,
    max_tokens: int | None = None,
    timestamps: bool = False,
    language: str = "",
) -> list[list[int]]:
    """Write what was said, through `generate` of transformers.

    The checkpoint's own lists of suppressed ids hold. A loop guard ends a text once a phrase of 1 to `LONGEST_LOOP` ids
    stands at least 3 times in a row, in 12 ids or more (so a single id 12 times, a pair 6 times, four or more ids
    3 times); of the repeats one is kept. Times are no part of a phrase.

    Args:
        built: What `build` returned, of kind `seq2seq`.
        model: Its model, bare or with adapters, in eval mode.
        features: (B, F, width), of `encode`.
        beams: Width of the beam search; 1 is greedy.
        max_tokens: Most ids to write; None for as many as the decoder has positions.
        timestamps: Whether times are written between the words; `tokens.segments` reads them.
        language: Language of the audio (`es`), for a model of many languages.

    Returns:
        Ids of each text, without start and end.

    Raises:
        GraftError: A backbone without a decoder, numbers out of range, or a language that it does not know.
    """
    from transformers import GenerationMixin
    from transformers.modeling_outputs import BaseModelOutput

    tokens, network = _written_by(built), bare(model)
    start = tokens.start(language, timestamps=timestamps)
    room = network.config.max_target_positions - len(start)
    most = room if max_tokens is None else max_tokens
    if beams < 1 or not 1 <= most <= room:
        raise GraftError(
            f"beams is {beams} (at least 1) and max_tokens {most} (1 to {room}). Mend the one out of range."
        )
    settings = _settings(network, tokens, beams, len(start) + most)
    written = torch.tensor(start, device=features.device).repeat(len(features), 1)
    with torch.no_grad():
        # Whisper's own `generate` is made for whole files: it wants 30 s at a time and stitches them itself.
        found = GenerationMixin.generate(
            network,
            generation_config=settings,
            logits_processor=_processors(network, tokens, len(start), timestamps=timestamps),
            encoder_outputs=BaseModelOutput(last_hidden_state=features),
            attention_mask=torch.ones(features.shape[:2], dtype=torch.long, device=features.device),
            decoder_input_ids=written,
        )
    return [_text(row[len(start) :], tokens, timestamps=timestamps) for row in found.tolist()]


def _settings(network: Any, tokens: WhisperTokens, beams: int, longest: int) -> Any:  # noqa: ANN401
    """Return transformers' settings of a text of at most `longest` ids, its start included."""
    from transformers import GenerationConfig

    return GenerationConfig(
        max_length=longest,
        num_beams=beams,
        do_sample=False,
        decoder_start_token_id=network.config.decoder_start_token_id,
        bos_token_id=tokens.eos,
        eos_token_id=tokens.eos,
        pad_token_id=tokens.pad,
        use_cache=True,
        suppress_tokens=network.generation_config.suppress_tokens,
        begin_suppress_tokens=network.generation_config.begin_suppress_tokens,
    )


def _written_by(built: SpeechBackbone) -> WhisperTokens:
    if built.kind != "seq2seq" or not isinstance(built.tokens, WhisperTokens):
        raise GraftError(
            f"'{built.name}' has no decoder here. Take a Whisper, whole, such as whisper-tiny-en; or write with CTC."
        )
    return built.tokens


def _processors(network: Any, tokens: WhisperTokens, begin: int, *, timestamps: bool) -> Any:  # noqa: ANN401
    """Return what is done to the logits at each step, beyond the ids that the settings suppress."""
    from transformers import LogitsProcessorList, WhisperTimeStampLogitsProcessor

    steps: list[Any] = []
    if timestamps:
        rules = _times_of(network.generation_config, tokens)
        steps.append(WhisperTimeStampLogitsProcessor(rules, begin_index=begin))
    return LogitsProcessorList([*steps, _LoopGuard(tokens, begin, timestamps=timestamps)])


def _times_of(config: Any, tokens: WhisperTokens) -> Any:  # noqa: ANN401
    """Return the generation settings that the rules of times read."""
    rules = copy.copy(config)
    rules.no_timestamps_token_id, rules.eos_token_id = tokens.no_timestamps, tokens.eos
    return rules


class _LoopGuard:
    """Lets nothing but the end follow a text that loops."""

    def __init__(self, tokens: WhisperTokens, begin: int, *, timestamps: bool) -> None:
        self.tokens, self.begin, self.timestamps = tokens, begin, timestamps

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Change the scores (B, V) of the next id where the ids so far (B, U) loop."""
        texts = [row[self.begin :] for row in input_ids.tolist()]
        places = [_places(ids, self.tokens, timestamps=self.timestamps) for ids in texts]
        rows = [row for row, ids in enumerate(texts) if looped([ids[place] for place in places[row]])]
        if rows:
            scores = scores.clone()
            scores[rows] = float("-inf")
            scores[rows, self.tokens.eos] = 0.0
        return scores


def _places(ids: list[int], tokens: WhisperTokens, *, timestamps: bool) -> list[int]:
    """Return where ids of words stand: everywhere, unless times were asked for."""
    return [place for place, index in enumerate(ids) if not (timestamps and index > tokens.no_timestamps)]


def looped(ids: Sequence[int]) -> int:
    """Return how many ids at the end are repeats of a phrase that loops by `generate`'s rule; 0 where none does."""
    for size in range(1, LONGEST_LOOP + 1):
        needed = max(_LOOP_TIMES, -(-_LOOP_IDS // size)) * size
        if len(ids) < needed:
            if size >= _LOOP_IDS // _LOOP_TIMES:
                return 0
            continue
        if all(ids[-place] == ids[-place - size] for place in range(1, needed - size + 1)):
            return needed - size
    return 0


def _text(ids: list[int], tokens: WhisperTokens, *, timestamps: bool) -> list[int]:
    """Cut generated ids at the end, and a loop down to one phrase."""
    if tokens.eos in ids:
        ids = ids[: ids.index(tokens.eos)]
    places = _places(ids, tokens, timestamps=timestamps)
    repeats = looped([ids[place] for place in places])
    return ids[: places[-repeats]] if repeats else ids
