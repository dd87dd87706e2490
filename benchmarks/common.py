"""What all benchmarks share: the command line, tables in Markdown, median and range, a data set."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cnn.data import Dataset

REPOSITORY = Path(__file__).parents[1]


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Leaves the description as it is, and adds each option's default to its help."""


def make_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return the parser of `python -m benchmarks.NAME`; its help begins with the description."""
    prog = f"python -m benchmarks.{name}"
    return argparse.ArgumentParser(prog=prog, description=description, formatter_class=_Help)


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Return the median of some values, their range, and how many they are."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:,.{digits}f} ({low:,.{digits}f}–{high:,.{digits}f}, n = {len(values)})"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def matrix_product_rate(size: int = 2048, seconds: float = 1.0) -> float:
    """Return the rate of a bfloat16 matrix product on all cores, in FLOP/s: the best of a second.

    A product of two matrices of n rows and columns takes 2n³ operations.
    """
    import torch

    matrix = torch.randn(size, size).bfloat16()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


@cache
def made_up(num_training: int, num_validation: int, *, contrast: float, tint: float) -> Dataset:
    """Return a data set of ten classes: each has a pattern and a tint, shifted, with noise."""
    import numpy as np
    import torch

    from cnn.data import Dataset, Split

    generator = np.random.default_rng(0)
    coarse = generator.standard_normal((10, 8, 8, 3), np.float32)
    tints = generator.standard_normal((10, 1, 1, 3), np.float32)
    patterns = contrast * coarse.repeat(4, axis=1).repeat(4, axis=2) + tint * tints
    count = num_training + num_validation
    labels = np.arange(count) % 10
    y, x = (np.arange(32) + generator.integers(16, size=(2, count, 1))) % 32
    images = patterns[labels[:, None, None], y[:, :, None], x[:, None, :]]  # (N, 32, 32, 3)
    images += 127 + 50 * generator.standard_normal(images.shape, np.float32)
    pool = torch.from_numpy(images.clip(0, 255).astype(np.uint8))
    rows = torch.arange(count)
    train, validation = (
        Split(all_images=pool, all_labels=torch.from_numpy(labels), rows=part)
        for part in (rows[:num_training], rows[num_training:])
    )
    return Dataset(
        name="made up",
        classes=tuple("0123456789"),
        train=train,
        validation=validation,
        test=validation,
        digest="0" * 32,
        source="benchmarks.common.made_up",
    )
