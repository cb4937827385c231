"""A small network with one convolution of every kind, in 2D and 3D, as medical networks have them."""

from __future__ import annotations

import torch
from torch import nn

from common.domain import Domain
from common.methods import METHODS, LoRA, NormTuning
from common.roles import NORMS, Family, Pattern
from common.task import Backbone
from tests.toy import ToyTask

CONV = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
FAMILY = Family(
    name="zoo",
    block=r"blocks\.\d+",
    roles={
        "stem": (Pattern(r"stem", CONV),),
        "conv": (Pattern(r"blocks\.\d+\.\w+", CONV),),
        "ffn_in": (Pattern(r"fc1", (nn.Linear,)),),
        "ffn_out": (Pattern(r"fc2", (nn.Linear,)),),
        "norm": (Pattern(r".*", NORMS),),
    },
    tokens="its blocks are convolutions and read no tokens",
)
_FFN = {"on": ["ffn"]}  # its linear layers, 4 -> 8 -> 5
SMALL = {
    "LoRA": {"rank": 2},
    "AdaLoRA": {"rank": 2, "start_rank": 3, **_FFN},
    "LoHa": {"rank": 2},
    "LoKr": {"rank": 2},
    "HiRA": {"rank": 2},
    "GraLoRA": {"rank": 4},
    "GLoRA": {"rank": 2, **_FFN},
    "DeLoRA": {"rank": 2},
    "MiSS": {"rank": 3},
    "DEFT": {"rank": 2},
    "PEANuT": {"rank": 2, **_FFN},
    "OFT": {"block": 4},
    "BOFT": {"block": 4, "target_modules": ["blocks.0.down", "blocks.0.point", "blocks.1.up", "fc1"]},
    "HRA": {"rank": 2},
    "PSOFT": {"rank": 3},
    "RoAd": {"group": 8, "target_modules": ["fc1"]},
    "FourierFT": {"entries": 10},
    "WaveFT": {"entries": 10, **_FFN},
    "C3A": {"block": 4},
    "VeRA": {"rank": 4, **_FFN},
    "PVeRA": {"rank": 4, **_FFN},
    "RandLoRA": {"rank": 2, **_FFN},
    "VBLoRA": {"rank": 2, "vectors": 8, "length": 4, "target_modules": ["fc1"]},
    "TinyLoRA": {"parameters": 4, **_FFN},
    "UniLoRA": {"rank": 2, "length": 16, **_FFN},
    "SuperTuning": {"sparsity": 0.8, **_FFN},
    "BEFT": _FFN,
    "Houlsby": {"on": ["all"], "width": 5},
    "Mixture": {"parts": [LoRA(on=["conv"], rank=2), NormTuning()]},
    "AtBudget": {"method": LoRA(on=["conv"]), "share": 0.2, "most": 3, "tolerance": 9.0},
    "DiffFit": {"on": ["conv", "ffn_out"]},
    "FishMask": {"density": 0.2},
    "GPS": {"per_neuron": 2},
    "SHiRA": {"rank": 2},
    "MagnitudeMask": {"density": 0.2},
    "SCT": {"on": ["conv@first:1", "ffn"], "channels": 5},
    "FacTTT": {"rank": 2},
    "FacTTK": {"rank": 2},
    "Compacter": {"on": ["conv"], "width": 5},
    "ParallelAdapter": {"width": 6},
    "AdaptFormer": {"width": 6},
    "InvertibleAdapter": {"on": ["stem", "ffn_in"], "reduction": 1},
    "RepAdapter": {"target_modules": ["stem", "blocks.0.down", "blocks.0.line", "blocks.0.dilated", "blocks.1.up"]},
}


def zoo_spec(method, **settings):
    """A method of the registry as it fits this network."""
    return METHODS[method](**(SMALL.get(method, {}) | settings))


class Wide(nn.Module):
    """Strided, pointwise, of one side only, dilated, and padded with copies."""

    def __init__(self, dims, conv, norm):
        super().__init__()
        self.down = conv(4, 8, 2, stride=2)
        self.norm = norm(8, affine=True)
        self.slope = nn.PReLU(8)
        self.point = conv(8, 6, 1)
        self.line = conv(6, 6, (*(1,) * (dims - 1), 3), padding=(*(0,) * (dims - 1), 1), bias=False)
        self.dilated = conv(6, 6, 3, padding=2, dilation=2)
        self.copied = conv(6, 6, 3, padding=1, padding_mode="replicate")

    def forward(self, x):
        x = self.slope(self.norm(self.down(x)))
        return self.copied(self.dilated(self.line(self.point(x))))


class Narrow(nn.Module):
    """Grouped, by channel, transposed and transposed in groups."""

    def __init__(self, conv, transposed):
        super().__init__()
        self.grouped = conv(6, 4, 3, padding=1, groups=2)
        self.norm = nn.GroupNorm(2, 4)
        self.slope = nn.PReLU()
        self.channelwise = conv(4, 4, 3, padding=1, groups=4)
        self.up = transposed(4, 6, 2, stride=2)
        self.grouped_up = transposed(6, 4, 3, stride=1, padding=1, groups=2, bias=False)

    def forward(self, x):
        x = self.channelwise(self.slope(self.norm(self.grouped(x))))
        return self.grouped_up(self.up(x))


class Zoo(nn.Module):
    """(B, 1, *spatial) -> (B, *spatial, 5), spatial sides even."""

    def __init__(self, dims):
        super().__init__()
        conv, transposed = ((nn.Conv2d, nn.ConvTranspose2d), (nn.Conv3d, nn.ConvTranspose3d))[dims - 2]
        instance, batch = ((nn.InstanceNorm2d, nn.BatchNorm2d), (nn.InstanceNorm3d, nn.BatchNorm3d))[dims - 2]
        self.dims = dims
        self.stem = conv(1, 4, 3, padding=1)
        self.norm = batch(4)
        self.drop = nn.Dropout(0.1)
        self.blocks = nn.ModuleList((Wide(dims, conv, instance), Narrow(conv, transposed)))
        self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.drop(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.fc2(torch.relu(self.fc1(x.movedim(1, -1))))


def zoo(dims, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Zoo(dims)
        with torch.no_grad():
            net.norm.running_mean.normal_()
            net.norm.running_var.uniform_(0.5, 1.5)
            for module in net.modules():  # trained norms are not the identity, and signals come through
                if isinstance(module, (*CONV, nn.Linear)):
                    module.weight.mul_(2)
                if isinstance(module, NORMS):
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_()
        return net


def volumes(dims, batch=2):
    return torch.randn(batch, 1, *(6,) * dims, generator=torch.Generator().manual_seed(1))


class ZooTask(ToyTask):
    """The toy task on the zoo in 3D: each toy example, made a volume."""

    def build_backbone(self):
        return Backbone(name="zoo", model=zoo(3, self.settings["base_seed"]), family=FAMILY)

    def build_head(self):
        return nn.Linear(5, self.facts.classes)

    def features(self, batch):
        x = batch[0].repeat(1, 2, 1)  # (B, 6, 4)
        volume = x[:, None, :, :, None] * torch.linspace(1, 2, 4)  # (B, 1, 6, 4, 4)
        return self.backbone(volume).flatten(1, -2).mean(dim=1)


DOMAINS = {"toy": Domain(name="toy", summary="tests", tasks={"ZooTask": "tests.zoo"}, data={"ToyData": "tests.toy"})}
