"""Parquet files, where pyarrow is installed (`graft[parquet]`)."""

from __future__ import annotations

import importlib
import importlib.util
import io
from typing import Any

from common.errors import GraftError


def need_parquet(what: str) -> None:
    """Refuse where Parquet files cannot be written.

    Args:
        what: What was asked for, as the user wrote it.

    Raises:
        GraftError: pyarrow is not installed.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise GraftError(f"{what} needs pyarrow, which is not installed. Run: pip install 'graft[parquet]'.")


def arrow() -> Any:  # noqa: ANN401  (pyarrow is optional)
    """Return pyarrow, after `need_parquet`."""
    return importlib.import_module("pyarrow")


def packed(table: Any) -> bytes:  # noqa: ANN401
    """Return a pyarrow table as the bytes of a Parquet file."""
    buffer = io.BytesIO()
    importlib.import_module("pyarrow.parquet").write_table(table, buffer)
    return buffer.getvalue()
