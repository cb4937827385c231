"""Protein sets: out of installed packages, and the user's own."""

from __future__ import annotations

from domains.protein.data._dataset import collate, sequence_loader
from domains.protein.data._reading import read_fasta
from domains.protein.data._records import IGNORE, ProteinBatch, ProteinFacts, Record
from domains.protein.data.base import ProteinData
from domains.protein.data.own import FLIP, PairCSV, ProteinCSV, ProteinFASTA, ResidueCSV, Unlabelled
from domains.protein.data.peptides import AntimicrobialPeptides, UnlabelledPeptides
from domains.protein.data.sites import SumoWindows
from domains.protein.data.uniprot import EnzymeClass, Superkingdom, UniProtFragments

__all__ = [
    "FLIP",
    "IGNORE",
    "AntimicrobialPeptides",
    "EnzymeClass",
    "PairCSV",
    "ProteinBatch",
    "ProteinCSV",
    "ProteinData",
    "ProteinFASTA",
    "ProteinFacts",
    "Record",
    "ResidueCSV",
    "SumoWindows",
    "Superkingdom",
    "UniProtFragments",
    "Unlabelled",
    "UnlabelledPeptides",
    "collate",
    "read_fasta",
    "sequence_loader",
]
