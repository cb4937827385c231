"""Proteins: classification, regression and residues with protein language models."""

from __future__ import annotations

from common.domain import Domain

_DATA = "domains.protein.data"
_TASKS = "domains.protein.tasks"
_RESIDUE_TASKS = "domains.protein.residue_tasks"

DOMAIN = Domain(
    name="protein",
    summary="proteins and peptides: classes, labels, values, residues and pairs with ESM-2, UniRep and other encoders",
    tasks={
        "SequenceClassification": _TASKS,
        "SequenceRegression": _TASKS,
        "MultiLabel": _TASKS,
        "PairClassification": _TASKS,
        "ResidueClassification": _RESIDUE_TASKS,
        "MaskedLM": _RESIDUE_TASKS,
        "Distillation": "domains.protein.distillation",
    },
    data=dict.fromkeys(
        (
            "AntimicrobialPeptides",
            "EnzymeClass",
            "Superkingdom",
            "SumoWindows",
            "UniProtFragments",
            "ProteinCSV",
            "ProteinFASTA",
            "ResidueCSV",
            "PairCSV",
            "FLIP",
            "Unlabelled",
            "UnlabelledPeptides",
        ),
        _DATA,
    ),
    predict="domains.protein.predict:predict",
    embed="domains.protein.embed:embed",
    baselines={
        "MajorityClass": "domains.protein.baselines:majority_class",
        "Composition": "domains.protein.baselines:composition",
        "KmerNearest": "domains.protein.baselines:kmer_nearest",
    },
    specimens={
        "HF ESM-2 + head": "domains.protein.specimens:esm2",
        "fair-esm ESM-2": "domains.protein.specimens:fair_esm2",
        "UniRep": "domains.protein.specimens:unirep",
    },
)
