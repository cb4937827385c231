"""What a speech backbone is, and how its encoder is run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from common.errors import GraftError
from common.task import Backbone
from domains.speech.backbones._augment import SpecAugment
from domains.speech.backbones._tokens import TextTokens

Kind = Literal["seq2seq", "ctc", "encoder"]


class Front(Protocol):
    """How a kind of encoder is run."""

    def frames(self, lengths: Tensor) -> Tensor:
        """Return how many features audio of these lengths (B,), samples, has (B,); 0 or less for too short a one."""
        ...

    def __call__(
        self, model: nn.Module, audio: Tensor, lengths: Tensor, *, full: bool, augment: SpecAugment | None, every: bool
    ) -> tuple[Tensor, Tensor]:
        """Run the network without PEFT's wrapper; see `encode`."""
        ...


@dataclass(frozen=True, kw_only=True)
class SpeechBackbone(Backbone):
    """A recogniser or an encoder of speech, and what is known of it.

    Attributes:
        kind: `seq2seq`, a Whisper with its decoder; `ctc`, an encoder that brings an output layer and a vocabulary of
            its own; `encoder`, one without.
        width: Channels of the encoder's features.
        layers: Number of the encoder's blocks.
        rate: Sampling rate that it reads, Hz.
        hop: Samples from one feature to the next.
        context: Longest audio that it takes, in seconds; None where any length will do.
        tokens: How it writes; None for `encoder`.
        ctc_head: The output layer of `ctc`, (..., width) to (..., tokens.size); None otherwise.
        front: How its encoder is run.
    """

    kind: Kind
    width: int
    layers: int
    rate: int
    hop: int
    context: float | None
    tokens: TextTokens | None
    ctc_head: nn.Module | None
    front: Front


def bare(model: nn.Module) -> Any:  # noqa: ANN401  (networks of several libraries)
    """Return the network itself, with whatever adapters stand in it, out of PEFT's wrapper around it."""
    unwrap = getattr(model, "get_base_model", None)
    return model if unwrap is None else unwrap()


def encode(
    built: SpeechBackbone,
    model: nn.Module,
    audio: Tensor,
    lengths: Tensor,
    *,
    full_context: bool = False,
    spec_augment: SpecAugment | None = None,
    all_layers: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run the encoder.

    A Whisper reads the batch up to its longest utterance, with as many of its positions; the silence behind a shorter
    one is read as such, since Whisper was trained without a mask of its input.

    Args:
        built: What `build` returned.
        model: Its model, bare or with adapters.
        audio: (B, T) in [-1, 1] at `built.rate`, zeros behind the end.
        lengths: (B,), samples.
        full_context: Whisper: read zeros up to the 30 seconds that it was trained with. Of no effect on networks
            without a context.
        spec_augment: What to hide, for training; None hides nothing.
        all_layers: Return what goes into the first block and what comes out of each, the last one normalised as ever.

    Returns:
        Features (B, F, width), or (B, layers + 1, F, width) with `all_layers`; and mask (B, F) bool, True at speech.

    Raises:
        GraftError: Audio longer than the context, or too short for a single feature.
    """
    longest = int(lengths.max())
    if built.context is not None and longest > built.context * built.rate:
        raise GraftError(
            f"An utterance lasts {longest / built.rate:.2f} s, and '{built.name}' hears at most {built.context:g} s. "
            "Cut the audio, or lower the data's max_seconds."
        )
    shortest = int(lengths.min())
    if int(built.front.frames(lengths.min())) < 1:
        raise GraftError(
            f"An utterance lasts {shortest} samples at {built.rate} Hz, too short for a single feature of "
            f"'{built.name}'. Leave it out."
        )
    return built.front(
        bare(model), audio[:, :longest], lengths, full=full_context, augment=spec_augment, every=all_layers
    )
