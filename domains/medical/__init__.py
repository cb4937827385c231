"""Medical: segmentation and classification of volumes and slices with 2D and 3D networks."""

from __future__ import annotations

from common.domain import Domain

_DATA = "domains.medical.data"

DOMAIN = Domain(
    name="medical",
    summary="medical images: segmentation and classification of volumes and slices, NIfTI and DICOM",
    tasks={"Segmentation": "domains.medical.tasks", "VolumeClassification": "domains.medical.tasks"},
    data=dict.fromkeys(
        (
            "HumanToMacaque",
            "ColinCoarse",
            "ColinHemisphere",
            "DecathlonData",
            "ImageMaskFolder",
            "VolumeCSV",
            "MedMNIST",
        ),
        _DATA,
    ),
    predict="domains.medical.predict:predict",
    baselines={
        "NearestSlice": "domains.medical.baselines:nearest_slice",
        "SignedDistance": "domains.medical.baselines:signed_distance",
        "MirrorCopy": "domains.medical.baselines:mirror_copy",
        "ZeroShot": "domains.medical.baselines:zero_shot",
    },
    specimens={
        "MONAI UNet 3D": "domains.medical.specimens:unet",
        "MONAI SwinUNETR": "domains.medical.specimens:swin_unetr",
    },
)
