"""Vision: image classification with ViTs and CNNs."""

from __future__ import annotations

from common.domain import Domain

_DATA = "domains.vision.data"

DOMAIN = Domain(
    name="vision",
    summary="image classification: timm ViTs and CNNs, images in folders or a CSV",
    tasks={"ImageClassification": "domains.vision.tasks"},
    data=dict.fromkeys(
        (
            "OpenClipart",
            "OpenClipartStars",
            "TuxPaintPhotos",
            "ImageFolder",
            "ImageCSV",
            "Cifar100",
            "Flowers102",
            "VTAB1k",
        ),
        _DATA,
    ),
    predict="domains.vision.predict:predict",
    baselines={"MajorityClass": "domains.vision.baselines:majority_class"},
    specimens={
        "timm ViT": "domains.vision.specimens:vit",
        "timm ConvNeXt": "domains.vision.specimens:convnext",
        "timm ResNet": "domains.vision.specimens:resnet",
    },
)
