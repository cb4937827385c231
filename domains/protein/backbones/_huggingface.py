"""Encoders of the Hugging Face hub or a local folder: ESM, BERT and T5 networks that read proteins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from common.errors import GraftError, unknown
from common.roles import Family
from domains.protein.backbones._backbone import ProteinBackbone
from domains.protein.backbones._esm import VOCABULARY, EsmSize, random_esm, take_apart
from domains.protein.backbones._families import BERT, ESM, T5
from domains.protein.backbones._tokens import LanguageModelHead, TokenMap, esm_tokens, map_vocabulary


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A network of transformers, taken apart.

    Attributes:
        model: The encoder.
        output: Its language model's output layer, or None.
        family: Its roles.
        tokens: How it spells.
        config: Its configuration.
    """

    model: nn.Module
    output: nn.Module | None
    family: Family
    tokens: TokenMap
    config: Any

    def backbone(self, name: str) -> ProteinBackbone:
        """Return the backbone of this name."""
        config = self.config
        learned = self.family is BERT or getattr(config, "position_embedding_type", "") == "absolute"
        # ESM counts positions from behind the padding's id; start and stop take two.
        used = 2 + (config.pad_token_id + 1 if self.family is ESM else 0)
        return ProteinBackbone(
            name=name,
            model=self.model,
            family=self.family,
            width=config.hidden_size,
            layers=config.num_hidden_layers,
            tokenizer=self.tokens,
            lm_head=LanguageModelHead(self.output, self.tokens) if self.output is not None else None,
            max_length=config.max_position_embeddings - used if learned and self.family is not T5 else None,
        )


def esm_encoder(config: Any) -> Encoder:  # noqa: ANN401
    """Build an ESM network with random weights."""
    model, output = random_esm(config)
    return Encoder(model=model, output=output, family=ESM, tokens=esm_tokens(), config=config)


def load_encoder(source: str, *, pretrained: bool, size: EsmSize | None = None) -> Encoder:
    """Load an encoder.

    Args:
        source: A local folder, or a name of the hub.
        pretrained: Take its weights; False takes its architecture alone.
        size: The ESM size that it has to be of, if any.

    Raises:
        GraftError: It cannot be had, is no ESM, BERT or T5, or does not spell proteins letter by letter.
    """
    from transformers import AutoConfig

    config = _from(source, AutoConfig)
    if config.model_type not in _LOADERS:
        raise unknown(f"kind of network in '{source}'", str(config.model_type), _LOADERS)
    if size is not None:
        _check_size(source, config, size)
    return _LOADERS[config.model_type](source, config, pretrained)


def _check_size(source: str, config: Any, size: EsmSize) -> None:  # noqa: ANN401
    has = (getattr(config, "num_hidden_layers", None), getattr(config, "hidden_size", None))
    if has != (size.layers, size.width):
        raise GraftError(
            f"'{source}' has {has[0]} layers of width {has[1]}, and the named backbone {size.layers} of width "
            f"{size.width}. Give the weights of this backbone, or the folder itself as the backbone's name."
        )


def _load_esm(source: str, config: Any, pretrained: bool) -> Encoder:  # noqa: ANN401
    from transformers import EsmForMaskedLM

    if config.vocab_size != VOCABULARY or config.is_folding_model:
        raise GraftError(
            f"'{source}' is an ESM network of {config.vocab_size} symbols that does not spell proteins as ESM-2 does. "
            "Take a protein language model, such as esm2_t6_8M_UR50D."
        )
    if not pretrained:
        return esm_encoder(config)
    whole, has_output = _weights(source, EsmForMaskedLM, "lm_head.")
    model, output = take_apart(whole)
    return Encoder(
        model=model, output=output if has_output else None, family=ESM, tokens=esm_tokens(), config=whole.config
    )


def _load_bert(source: str, config: Any, pretrained: bool) -> Encoder:  # noqa: ANN401
    from transformers import BertForMaskedLM

    if pretrained:
        whole, has_output = _weights(source, BertForMaskedLM, "cls.")
    else:
        whole, has_output = BertForMaskedLM(config).eval(), True
    layer = whole.cls.predictions
    for name in ("weight", "bias"):  # tied to the embedding, and to a bias that nothing reads
        setattr(layer.decoder, name, nn.Parameter(getattr(layer.decoder, name).detach().clone()))
    layer.bias = None
    output = whole.cls if has_output else None
    return Encoder(model=whole.bert, output=output, family=BERT, tokens=_tokens(source), config=whole.config)


def _load_t5(source: str, config: Any, pretrained: bool) -> Encoder:  # noqa: ANN401
    from transformers import T5EncoderModel

    model = _weights(source, T5EncoderModel, "")[0] if pretrained else T5EncoderModel(config).eval()
    _use_torch_norms(model)
    return Encoder(model=model, output=None, family=T5, tokens=_tokens(source), config=model.config)


_LOADERS = {"esm": _load_esm, "bert": _load_bert, "t5": _load_t5}


def _use_torch_norms(model: Any) -> None:  # noqa: ANN401
    """Exchange T5's norm for torch's of the same formula and names, which the methods on norms know."""
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, T5LayerNorm):
                norm = nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(module, name, norm)


def _tokens(source: str) -> TokenMap:
    """Read how a network spells off its tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = _from(source, AutoTokenizer)
    stop = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    return map_vocabulary(
        source,
        tokenizer.get_vocab(),
        pad=tokenizer.pad_token_id,
        start=tokenizer.cls_token_id,
        stop=stop,
        mask=tokenizer.mask_token_id,
    )


def _weights(source: str, kind: Any, head: str) -> tuple[Any, bool]:  # noqa: ANN401
    """Load a network in single precision; tell whether the tensors under the prefix `head` were all there."""
    model, info = _from(source, kind, dtype=torch.float32, output_loading_info=True)
    missing = sorted(info["missing_keys"])
    lost = [name for name in missing if not name.startswith(head or "\0") and ".contact_head." not in name]
    if lost:
        raise GraftError(f"'{source}' lacks {len(lost)} of its weights, such as {lost[0]}. Fetch it again.")
    return model.eval(), bool(head) and not any(name.startswith(head) for name in missing)


def _from(source: str, kind: Any, **options: Any) -> Any:  # noqa: ANN401
    try:
        return kind.from_pretrained(source, **options)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split()).split(". ")[0]
        raise GraftError(
            f"'{source}' could not be had or read ({type(error).__name__}: {reason}). Connect to the hub, give a local "
            "folder with 'weights', or take unirep-256."
        ) from error
