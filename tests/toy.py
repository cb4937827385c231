"""A tiny backbone, task and datamodule: everything the core does, in milliseconds and without a domain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import lightning as L
import torch
from torch import nn
from torch.utils.data import Dataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from common.domain import Domain
from common.loading import eval_loader, item_rng, train_loader
from common.methods import METHODS
from common.roles import NORMS, Family, Grid, Pattern, TokenStream
from common.task import AdaptedTask, Backbone, OptimSpec

FAMILY = Family(
    name="toy",
    block=r"blocks\.\d+",
    stream=r"blocks\.\d+",
    grid=lambda model, layer: Grid(sides=(0,)),
    roles={
        "stem": (Pattern(r"embed", (nn.Linear,)), Pattern(r"mix", (nn.Conv1d,))),
        "attention_qkv": (Pattern(r"blocks\.\d+\.qkv", (nn.Linear,)),),
        "attention_out": (Pattern(r"blocks\.\d+\.out", (nn.Linear,)),),
        "ffn_in": (Pattern(r"blocks\.\d+\.fc1", (nn.Linear,)),),
        "ffn_out": (Pattern(r"blocks\.\d+\.fc2", (nn.Linear,)),),
        "norm": (Pattern(r".*norm\d?", NORMS),),
    },
    tokens=TokenStream(blocks=r"blocks\.\d+", attention=Pattern(r"blocks\.\d+", (nn.Module,))),
    fused=r"blocks\.\d+\.qkv",
)


def _block(method, **settings):
    """A method as a recipe gives it."""
    return {"class_path": method, "init_args": settings}


SMALL = {
    "LoRA": {"rank": 2},
    "AdaLoRA": {"rank": 2, "start_rank": 3},
    "LoHa": {"rank": 2},
    "LoKr": {"rank": 2},
    "HiRA": {"rank": 2},
    "GraLoRA": {"rank": 4},
    "GLoRA": {"rank": 2},
    "DeLoRA": {"rank": 2},
    "MiSS": {"rank": 2},
    "DEFT": {"rank": 2},
    "PEANuT": {"rank": 2},
    "OFT": {"block": 4},
    "HRA": {"rank": 2},
    "PSOFT": {"rank": 3},
    "RoAd": {"group": 8},
    "FourierFT": {"entries": 10},
    "WaveFT": {"entries": 10},
    "C3A": {"block": 4},
    "VeRA": {"rank": 4},
    "PVeRA": {"rank": 4},
    "RandLoRA": {"rank": 2},
    "VBLoRA": {"rank": 2, "vectors": 8, "length": 4},
    "TinyLoRA": {"parameters": 4},
    "UniLoRA": {"rank": 2, "length": 16},
    "SuperTuning": {"sparsity": 0.9},
    "ConvAdapter": {"target_modules": ["mix"]},
    "Houlsby": {"width": 3},
    "Pfeiffer": {"width": 3},
    "Mixture": {"parts": [_block("LoRA", on=["attention"], rank=2), _block("NormTuning")]},
    "PerGroup": {
        "groups": [
            [_block("LoRA", on=["attention"], rank=2)],
            [_block("Pfeiffer", width=3), _block("SSF", on=["norm"])],
        ]
    },
    "AtBudget": {"method": _block("LoRA", on=["ffn"]), "share": 0.1, "most": 8, "tolerance": 9.0},
    "FishMask": {"density": 0.1, "batches": 2},
    "GPS": {"batches": 2},
    "SHiRA": {"rank": 2, "batches": 2},
    "MagnitudeMask": {"density": 0.1},
    "SCT": {"channels": 3, "batches": 2},
    "FacTTT": {"rank": 2, "scale": 0.5},
    "FacTTK": {"rank": 2, "scale": 0.5},
    **{name: {"length": 2} for name in ("VPTShallow", "VPTDeep", "PromptTuning", "PrefixTuning")},
    "Compacter": {"width": 4},
    "ParallelAdapter": {"width": 3},
    "AdaptFormer": {"width": 3},
    "UniPELT": {"rank": 2, "length": 2, "width": 3},
    "Convpass": {"width": 3},
    "ConvLoRA": {"rank": 2, "experts": 2},
    **{name: {"rank": 2} for name in ("AdapterPlus", "LoReFT", "NoReFT", "DiReFT")},
    "LST": {"reduction": 4},
    "InvertibleAdapter": {"on": ["stem"]},
    "RepAdapter": {"width": 4},
}


def spec_of(method, **settings):
    """A method of the registry at toy size; a method that is new runs with its defaults."""
    return METHODS[method](**(SMALL.get(method, {}) | settings))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v))
        return x + self.drop(self.fc2(torch.relu(self.fc1(self.norm2(x)))))


class ToyBackbone(nn.Module):
    """(B, T, 4) -> (B, T, width); a BatchNorm on the input and a convolution in the stem, for what acts on them."""

    def __init__(self, width=8, depth=2):
        super().__init__()
        self.input_norm = nn.BatchNorm1d(4)
        self.embed = nn.Linear(4, width)
        self.mix = nn.Conv1d(width, width, 3, padding=1)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        x = self.embed(self.input_norm(x.transpose(1, 2)).transpose(1, 2))
        x = x + self.mix(x.transpose(1, 2)).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def toy_backbone(seed=0, **kwargs):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ToyBackbone(**kwargs)


class Batch(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


class ToySet(Dataset):
    def __init__(self, size, seed):
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(size, 3, 4, generator=generator)
        self.y = (self.x.sum((1, 2)) > 0).long()
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        with item_rng(self.seed, self.epoch, index):
            return self.x[index] + 0.1 * torch.randn(3, 4), self.y[index]


@dataclass(frozen=True)
class Facts:
    classes: int = 2


class ToyData(L.LightningDataModule):
    def __init__(self, size: int = 20, batch_size: int = 4, seed: int = 0):
        super().__init__()
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.facts = Facts()

    def records(self, split):
        return range(self.size if split == "train" else 8)

    def train_dataloader(self):
        return train_loader(ToySet(self.size, self.seed), self.batch_size, seed=self.seed)

    def val_dataloader(self):
        return eval_loader(ToySet(8, self.seed), 4)

    test_dataloader = val_dataloader


class ToyTask(AdaptedTask):
    domain = "toy"
    primary = ("accuracy", "max")

    def __init__(self, peft, optim=OptimSpec(), base_seed=0, seed=0, gradient_checkpointing=False):  # noqa: B008
        super().__init__(
            peft=peft,
            optim=optim,
            settings={"base_seed": base_seed},
            seed=seed,
            gradient_checkpointing=gradient_checkpointing,
        )

    def build_backbone(self):
        return Backbone(name="toy", model=toy_backbone(self.settings["base_seed"]), family=FAMILY)

    def build_head(self):
        return nn.Linear(8, self.facts.classes)

    def build_loss(self):
        return nn.CrossEntropyLoss()

    def build_metrics(self):
        return MetricCollection({"accuracy": MulticlassAccuracy(2, average="micro")})

    def features(self, batch):
        return self.backbone(batch[0]).mean(dim=1)

    def targets(self, batch):
        return batch[1]

    def example_batch(self):
        generator = torch.Generator().manual_seed(0)
        return Batch(torch.randn(3, 3, 4, generator=generator), torch.tensor([0, 1, 0]))

    def describe_facts(self):
        return {"classes": self.facts.classes}

    def load_facts(self, facts):
        self.facts = Facts(**facts)

    def describe_data(self, data):
        return {"name": "toy", "digest": "none", "train": data.size, "val": 8, "test": 8}

    def predictions(self, outputs, data, folder):
        return [{"id": str(i), "prediction": int(row.argmax())} for i, row in enumerate(torch.cat(outputs))]

    def usage(self):
        return "import torch"


def most_frequent(task, data):
    """The most frequent class, whatever the input."""
    labels = torch.tensor([int(y) for _, y in data.train_dataloader().dataset])
    logits = torch.nn.functional.one_hot(labels.mode().values, task.facts.classes)
    return lambda batch: logits.expand(len(batch[0]), -1)


def untrained(task, data):
    """The backbone and the head as they are before training."""
    task.assemble()
    return task.infer


DOMAINS = {
    "toy": Domain(
        name="toy",
        summary="tests",
        tasks={"ToyTask": "tests.toy"},
        data={"ToyData": "tests.toy"},
        baselines={"MostFrequent": "tests.toy:most_frequent", "Untrained": "tests.toy:untrained"},
    )
}
