"""A data set as uint8 tensors, split by a seed into training, validation and test images.

`cnn.datasets` says where images come from, `cnn.cache` stores them decoded. Bad input and bad data
are a ValueError of one line.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cnn.cache import (
    FileStates,
    ImagePool,
    Integers,
    add_entry,
    file_states,
    key_of,
    look_up,
    open_entry,
    read_meta,
    with_copies,
)
from cnn.datasets import find_source
from cnn.images import IMAGE_SIZE, MAX_IMAGE_SIZE, MIN_IMAGE_SIZE

# With fewer validation images, one image is more than a point of accuracy.
MIN_VALIDATION = 100
MAX_SHARE_OF_A_CLASS = 0.95


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """Rows of all images of a data set."""

    all_images: Tensor  # (M, S, S, 3) uint8; on the CPU memory-mapped, shared by processes
    all_labels: Tensor  # (M,) int64
    rows: Tensor  # (N,) int64, which of all images belong to the split

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return images (B, S, S, 3) and labels (B,) of these positions (B,) of the split."""
        rows = self.rows[indices]
        return self.all_images.index_select(0, rows), self.all_labels.index_select(0, rows)

    @property
    def images(self) -> Tensor:
        """All images of the split (N, S, S, 3), copied."""
        return self.all_images.index_select(0, self.rows)

    @property
    def labels(self) -> Tensor:
        """All labels of the split (N,), copied."""
        return self.all_labels.index_select(0, self.rows)

    def to(self, device: torch.device | str) -> "Split":
        """Return the split with only its own images on `device`; on the CPU, the split itself."""
        if torch.device(device).type == "cpu":
            return self
        return Split(
            all_images=self.images.to(device),
            all_labels=self.labels.to(device),
            rows=torch.arange(len(self), device=device),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """A data set: train for learning, validation for choosing, test for the winners."""

    name: str
    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    digest: str  # 32 hex digits of the SHA-256 of pixels, labels, class names, given test split
    source: str  # a path or a function, for display
    given_test: bool = False  # the test split is the same for every seed
    notes: tuple[str, ...] = ()  # from `load`: what the user should know of the data, a line each
    checked: FileStates | None = None  # from `load`, for `open_cached`

    @property
    def image_size(self) -> int:
        """Height and width of the images, in pixels."""
        return self.train.all_images.shape[1]


def load(name: str, *, data_dir: Path, seed: int, image_size: int = IMAGE_SIZE) -> Dataset:
    """Return a data set: by its name (see DATASETS), by the path of a folder, or of a function.

    A function is `package.module:function` or `file.py:function`; see `cnn.functions`. A folder
    has Parquet files (see `cnn.parquet`) or images: `train/<class>/*`, with `test/<class>/*` if
    there is a given test split, or just `<class>/*`. Names like `Training`
    or `seg_test` are recognised as splits. A validation split is refused, and system files are
    skipped. Decoded images are stored in `data_dir`, which is also for downloads. They become
    squares of `image_size` pixels a side.

    A given test split is the same for every seed, and the validation split is 10 % of the rest.
    Without one, validation and test get 20 % each. Both are drawn class by class.
    Raises ValueError.
    """
    _check_seed(seed)
    _check_image_size(image_size)
    source = find_source(name, data_dir)
    cache = data_dir / "cache"
    notes = source.notes
    try:
        key = key_of(source, image_size)
        digest = look_up(cache, key)
        states = None if digest is None else file_states(cache / digest)
        pool = None if digest is None else open_entry(cache / digest)
        if digest is None or pool is None:
            if digest is not None and os.path.lexists(cache / digest):
                notes += (
                    f"{str(cache / digest)!r} was damaged: its images were read again from "
                    f"{source.address}",
                )
            digest, pool = add_entry(cache, key, source, image_size)
            states = file_states(cache / digest)
        else:
            notes += source.notes_if_cached
        if pool.copies is None:
            pool, states = with_copies(pool, cache / digest), None
    except OSError as error:
        raise ValueError(f"can't use the data folder {str(data_dir)!r}: {error}") from error
    dataset = split_pool(pool, digest, seed, name=source.name, source=source.address)
    notes += tuple(_notes_of_copies(dataset, pool))
    return replace(dataset, notes=notes, checked=states)


def open_cached(
    digest: str, data_dir: Path, seed: int, *, checked: FileStates | None = None
) -> Dataset:
    """Return what `load` returned, without its source: for worker processes.

    Name and source are those of the first reading of these images. If the files are still in the
    state `checked`, their digest is not checked again.
    """
    _check_seed(seed)
    folder = data_dir / "cache" / digest
    try:
        is_checked = checked is not None and file_states(folder) == checked
        pool = open_entry(folder, is_checked=is_checked)
    except OSError as error:
        raise ValueError(f"can't use the data folder {str(data_dir)!r}: {error}") from error
    if pool is None:
        raise ValueError(f"no undamaged data set with the digest {digest!r} in {str(data_dir)!r}")
    meta = read_meta(folder)
    return split_pool(pool, digest, seed, name=meta["name"], source=meta["source"])


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise ValueError(f"the seed must be 0 or more: {seed}")


def _check_image_size(image_size: int) -> None:
    if not MIN_IMAGE_SIZE <= image_size <= MAX_IMAGE_SIZE:
        raise ValueError(
            f"the image size must be from {MIN_IMAGE_SIZE} to {MAX_IMAGE_SIZE} pixels: {image_size}"
        )


# Splitting


def split_pool(pool: ImagePool, digest: str, seed: int, *, name: str, source: str) -> Dataset:
    """Return a data set of images in memory, split with a seed."""
    images, labels = torch.from_numpy(pool.images), torch.from_numpy(pool.labels)
    train, validation, test = (
        Split(all_images=images, all_labels=labels, rows=torch.from_numpy(rows))
        for rows in _split_rows(pool.labels, given_test=pool.given_test, seed=seed)
    )
    return Dataset(
        name=name,
        classes=pool.classes,
        train=train,
        validation=validation,
        test=test,
        digest=digest,
        source=source,
        given_test=pool.given_test > 0,
    )


def _split_rows(labels: Integers, *, given_test: int, seed: int) -> list[Integers]:
    """Return the rows of train, validation and test, each shuffled except a given test split."""
    generator = np.random.Generator(np.random.PCG64(seed))
    free = labels[: len(labels) - given_test]
    drawn: list[list[Integers]] = [[], [], []]
    for label in np.unique(free):
        rows = generator.permutation(np.flatnonzero(free == label))
        validation = _share(len(rows), percent=10 if given_test else 20)
        test = 0 if given_test else _share(len(rows), percent=20)
        train = len(rows) - validation - test
        for split, part in zip(drawn, np.split(rows, [train, train + validation]), strict=True):
            split.append(part)
    # Shuffled, so that the first rows of a split are not all of one class.
    splits = [generator.permutation(np.concatenate(parts)) for parts in drawn]
    if given_test:
        splits[2] = np.arange(len(free), len(labels))
    return splits


def _share(count: int, *, percent: int) -> int:
    return max(1, (count * percent + 50) // 100)


# What the user should know of a split


def _notes_of_copies(dataset: Dataset, pool: ImagePool) -> Iterator[str]:
    """Yield a note on images that are in two splits: accuracy on them measures memory."""
    first = np.arange(len(pool.images))
    for row, other in pool.copies or ():
        first[row] = other
    train, validation, test = (
        first[split.rows.numpy()] for split in (dataset.train, dataset.validation, dataset.test)
    )
    for name, part, others, where in (
        ("validation", validation, train, "train"),
        ("test", test, np.concatenate([train, validation]), "train or validation"),
    ):
        count = int(np.isin(part, others).sum())
        if count:
            yield (
                f"{count:,} of {len(part):,} {name} images have the same pixels as an image in "
                f"{where}: accuracy on them says nothing about new images"
            )


def notes_on_choosing(dataset: Dataset) -> Iterator[str]:
    """Yield notes on a validation split that is too small or too uneven to choose by."""
    labels = dataset.validation.labels
    size = len(labels)
    if size < MIN_VALIDATION:
        yield (
            f"the validation split has {size} images, fewer than {MIN_VALIDATION}: one image is "
            f"{100 / size:.1f} points of accuracy, so smaller differences between configurations "
            "can't be seen"
        )
    largest = torch.bincount(labels).max().item()
    if largest > MAX_SHARE_OF_A_CLASS * size:
        name = dataset.classes[int(torch.bincount(labels).argmax())]
        yield (
            f"{largest:,} of {size:,} validation images are of class {name!r}: a network that "
            f"always answers so has {100 * largest / size:.1f} % accuracy"
        )
