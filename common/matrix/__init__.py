"""The proof: every method on every kind of network, cell by cell, over fresh objects."""

from __future__ import annotations

from common.matrix.cell import Cell, run_cell
from common.matrix.grid import chosen, columns_of, covering, run_grid, whole
from common.matrix.specimen import Specimen

__all__ = ["Cell", "Specimen", "chosen", "columns_of", "covering", "run_cell", "run_grid", "whole"]
