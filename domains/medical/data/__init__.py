"""Medical image sets: the starter brains, and the user's own volumes and images."""

from __future__ import annotations

from domains.medical.data._records import IGNORE, Case, VolumeBatch, VolumeFacts
from domains.medical.data.atlases import ColinCoarse, HumanToMacaque
from domains.medical.data.base import VolumeData
from domains.medical.data.classification import MedMNIST, VolumeCSV
from domains.medical.data.hemisphere import ColinHemisphere
from domains.medical.data.own import DecathlonData, ImageMaskFolder
from domains.medical.data.prepare import prepare, restore

__all__ = [
    "IGNORE",
    "Case",
    "ColinCoarse",
    "ColinHemisphere",
    "DecathlonData",
    "HumanToMacaque",
    "ImageMaskFolder",
    "MedMNIST",
    "VolumeBatch",
    "VolumeCSV",
    "VolumeData",
    "VolumeFacts",
    "prepare",
    "restore",
]
