"""Image sets: starter sets out of Debian packages, standard benchmarks, and the user's own images."""

from __future__ import annotations

from domains.vision.data._images import read_image
from domains.vision.data._records import ImageBatch, ImageFacts, Record
from domains.vision.data.base import ImageData
from domains.vision.data.openclipart import OpenClipart, OpenClipartStars
from domains.vision.data.own import ImageCSV, ImageFolder
from domains.vision.data.standard import Cifar100, Flowers102, VTAB1k
from domains.vision.data.tuxpaint import TuxPaintPhotos

__all__ = [
    "Cifar100",
    "Flowers102",
    "ImageBatch",
    "ImageCSV",
    "ImageData",
    "ImageFacts",
    "ImageFolder",
    "OpenClipart",
    "OpenClipartStars",
    "Record",
    "TuxPaintPhotos",
    "VTAB1k",
    "read_image",
]
