"""What the benchmarks share: the machine, a small data set, and how figures are written."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cnn.data import Dataset

REPOSITORY = Path(__file__).parents[1]


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


def small_data(source: str, folder: Path, num_images: int, data_dir: Path) -> Dataset:
    """Return a data set of the first training images of another one, written to a folder.

    As PNG, which loses nothing; as many of each class, a tenth of them for validation.
    """
    import torch
    from PIL import Image

    from cnn.data import load

    whole = load(source, data_dir=data_dir, seed=0)
    of_a_class = num_images // len(whole.classes)
    for split, part, count in (
        ("train", whole.train, of_a_class),
        ("test", whole.test, max(1, of_a_class // 10)),
    ):
        labels = part.labels
        for label, name in enumerate(whole.classes):
            (folder / split / name).mkdir(parents=True)
            rows = torch.nonzero(labels == label).flatten()[:count]
            images, _ = part.batch(rows)
            for number, image in enumerate(images.numpy()):
                Image.fromarray(image).save(folder / split / name / f"{number:05d}.png")
    return load(str(folder), data_dir=data_dir, seed=0)
