"""Which modules of the protein networks carry which role, and their blocks in the order in which they run."""

from __future__ import annotations

from torch import nn

from common.roles import NORMS, Family, Pattern, TokenStream

LINEAR = (nn.Linear,)
EMBEDDING = (nn.Embedding,)


def _bert(name: str) -> Family:
    layer = r"encoder\.layer\.\d+"
    return Family(
        name=name,
        block=layer,
        stream=layer,
        roles={
            "attention_qkv": (Pattern(rf"{layer}\.attention\.self\.(query|key|value)", LINEAR),),
            "attention_out": (Pattern(rf"{layer}\.attention\.output\.dense", LINEAR),),
            "ffn_in": (Pattern(rf"{layer}\.intermediate\.dense", LINEAR),),
            "ffn_out": (Pattern(rf"{layer}\.output\.dense", LINEAR),),
            "norm": (Pattern(r".*", NORMS),),
            "embed": (Pattern(r"embeddings\.\w+_embeddings", EMBEDDING),),
        },
        tokens=TokenStream(
            blocks=layer,
            attention=Pattern(rf"{layer}\.attention", (nn.Module,)),
            mask=("attention_mask", 0),
            rotary=("position_embeddings", "pair"),  # of ESM-2
        ),
        projections={
            f"attention_{part[0]}": rf"{layer}\.attention\.self\.{part}" for part in ("query", "key", "value")
        },
    )


ESM = _bert("esm")
BERT = _bert("bert")

_T5_LAYER = r"encoder\.block\.\d+\.layer"
T5 = Family(
    name="t5",
    block=r"encoder\.block\.\d+",
    stream=r"encoder\.block\.\d+",
    roles={
        "attention_qkv": (Pattern(rf"{_T5_LAYER}\.0\.SelfAttention\.[qkv]", LINEAR),),
        "attention_out": (Pattern(rf"{_T5_LAYER}\.0\.SelfAttention\.o", LINEAR),),
        "ffn_in": (Pattern(rf"{_T5_LAYER}\.1\.DenseReluDense\.wi(_[01])?", LINEAR),),
        "ffn_out": (Pattern(rf"{_T5_LAYER}\.1\.DenseReluDense\.wo", LINEAR),),
        "norm": (Pattern(r".*", NORMS),),
        # The embedding stands under two names, of which the first is not the one that is called: it has no role.
    },
    tokens=TokenStream(
        blocks=r"encoder\.block\.\d+",
        attention=Pattern(rf"{_T5_LAYER}\.0\.SelfAttention", (nn.Module,)),
        key_mask="mask",
        fixed="it scores tokens by their distance, which a prompt has not",
    ),
    projections={f"attention_{part}": rf"{_T5_LAYER}\.0\.SelfAttention\.{part}" for part in "qkv"},
)

UNIREP = Family(
    name="unirep",
    block=r"layers\.\d+",
    roles={
        "recurrent": (Pattern(r"layers\.\d+\.(wx|wh|wmx|wmh)", LINEAR),),
        "embed": (Pattern(r"embedding", EMBEDDING),),
    },
    tokens="it reads residues one after another and attends to none",
)
