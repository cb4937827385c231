"""Reading image files: one rule for every format, and a bounded memory of what was read."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from common.errors import GraftError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
Fit = Literal["crop", "squash"]

# A strip of 4:1 holds all that a centre crop or a random crop can ask for; a 1x2000 line must not become gigabytes.
_MAX_ASPECT = 4
_UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def progress_bar(*, disable: bool = False) -> Progress:
    """Return a bar on standard error that vanishes when it is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=disable)


def on_white(image: Image.Image) -> Image.Image:
    """Turn any image into 8-bit RGB, transparent parts white.

    Raises:
        ValueError: The image holds floating-point values, whose range nothing tells.
    """
    if image.mode == "F":
        raise ValueError("it holds floating-point values; save it with 8 bits a channel")
    if image.mode.startswith("I"):
        # Pillow would clip 16-bit grey to white instead of scaling it.
        grey = np.asarray(image).astype(np.int64) // 257
        image = Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    layered = image.convert("RGBA")
    canvas = Image.new("RGB", layered.size, "white")
    canvas.paste(layered, mask=layered.getchannel("A"))
    return canvas


def read_image(path: str | Path, shorter: int, fit: Fit = "crop") -> Tensor:
    """Read an image file, upright, on white, at a given size.

    Args:
        path: The file.
        shorter: Shorter side of the result, in pixels.
        fit: `"crop"` keeps the aspect ratio (longer than 4:1 is cut to its middle); `"squash"` makes a square of it.

    Returns:
        uint8 (3, H, W).

    Raises:
        GraftError: The file is missing, damaged, or no image.
    """
    try:
        with Image.open(path) as opened:
            # JPEG files decode several times faster at a fraction of their size; other formats ignore this.
            opened.draft(None, (shorter, shorter))
            image = on_white(ImageOps.exif_transpose(opened))
        width, height = image.size
        if fit == "crop":
            longest = _MAX_ASPECT * min(width, height)
            if max(width, height) > longest:
                image = ImageOps.fit(image, (min(width, longest), min(height, longest)))
                width, height = image.size
            scale = shorter / min(width, height)
            size = (max(shorter, round(width * scale)), max(shorter, round(height * scale)))
        else:
            size = (shorter, shorter)
        if size != image.size:
            image = image.resize(size, Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    except _UNREADABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise GraftError(
            f"Cannot read the image '{path}': {reason}. Replace the file, or set skip_bad: true to leave it out."
        ) from error


class ImageStore:
    """Decoded images, kept in memory up to a number of bytes and read again from disk beyond it.

    Args:
        max_bytes: How much to keep.
        fit: How an image is brought to its size (see `read_image`).
    """

    def __init__(self, max_bytes: int, fit: Fit) -> None:
        self.max_bytes = max_bytes
        self.fit: Fit = fit
        self.bytes = 0
        self._kept: dict[tuple[Path, int], Tensor] = {}

    def get(self, path: Path, shorter: int) -> Tensor:
        """Return an image, (3, H, W) uint8, from memory where it is there.

        Raises:
            GraftError: The file cannot be read.
        """
        kept = self._kept.get((path, shorter))
        return read_image(path, shorter, self.fit) if kept is None else kept

    def fill(self, wanted: Sequence[tuple[Path, int]], *, check_all: bool) -> dict[Path, GraftError]:
        """Read images into memory, on all cores, before workers are forked (they then share them).

        Args:
            wanted: Files and the shorter sides they are wanted at.
            check_all: Read every file, also what no longer fits into memory, to find those that cannot be read.

        Returns:
            The files that cannot be read.
        """
        missing = [key for key in wanted if key not in self._kept]
        bad: dict[Path, GraftError] = {}

        def read(key: tuple[Path, int]) -> Tensor | GraftError | None:
            if self.bytes >= self.max_bytes and not check_all:
                return None
            try:
                return read_image(*key, self.fit)
            except GraftError as error:
                return error

        quiet = len(missing) < 500 or rank_zero_only.rank != 0
        threads = min(8, os.cpu_count() or 1)
        with ThreadPoolExecutor(threads) as pool, progress_bar(disable=quiet) as bar:
            results = bar.track(pool.map(read, missing), total=len(missing), description="Reading images")
            for key, found in zip(missing, results, strict=True):
                if isinstance(found, GraftError):
                    bad[key[0]] = found
                elif found is not None and self.bytes + found.nbytes <= self.max_bytes:
                    self._kept[key] = found
                    self.bytes += found.nbytes
        return bad
