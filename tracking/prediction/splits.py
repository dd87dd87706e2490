"""Find the data set that images belong to, and open a split of a data set."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tracking.prediction.chunks import ARRAYS, TABLES, Chunk, Source, is_list, known_labels, parts
from tracking.prediction.prefetch import prefetch

SPLITS = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}


@dataclass(frozen=True, kw_only=True)
class KnownData:
    """A data set that runs on this machine may have been trained on."""

    name: str
    """The value of their param `dataset`."""
    digests: tuple[str, ...]
    """Values of their param `dataset_digest`, the latest first."""


def dataset_of(text: str, data_dir: Path) -> KnownData | None:
    """Return the data set of a source, None if it is unknown.

    `NAME:SPLIT` belongs to NAME. A folder or a file belongs to the innermost folder around it that
    the cache in `data_dir` knows. Lists, arrays, tables and other folders are unknown.

    Raises:
        ValueError: there is no such data set, or it can't be read.
    """
    if is_list(text):
        return None
    if not os.path.lexists(text):
        from cnn import data, datasets

        name = split_named(text)[0]
        source = datasets.find_source(name, data_dir)
        if known := _digests_by_address(data_dir).get(source.address):  # of any image size
            return KnownData(name=source.name, digests=known)
        dataset = data.load(name, data_dir=data_dir, seed=0)
        return KnownData(name=dataset.name, digests=(dataset.digest,))
    place = Path(text).resolve()
    if not place.is_dir() and place.suffix.lower() in (*ARRAYS, *TABLES):
        return None  # it may lie among images, and hold others
    digests = _digests_by_address(data_dir)
    for folder in map(str, (place, *place.parents)):
        if folder in digests:
            return KnownData(name=Path(folder).name, digests=digests[folder])
    return None


def _digests_by_address(data_dir: Path) -> dict[str, tuple[str, ...]]:
    """Return the folders and other sources that `cnn.data` has read, with their digests.

    The latest digest comes first. A source has one of each state and image size.
    """
    entries: list[tuple[float, str, str]] = []
    for file in (data_dir / "cache" / "index").glob("*.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):  # damaged: `cnn.data` mends it
            entry = json.loads(file.read_text("utf-8"))
            entries.append((-file.stat().st_mtime, str(entry["source"]), str(entry["digest"])))
    found: dict[str, dict[str, None]] = {}
    for _, address, digest in sorted(entries):
        found.setdefault(address, {})[digest] = None
    return {address: tuple(digests) for address, digests in found.items()}


def split_named(text: str) -> tuple[str, str]:
    """Return data set and split of `NAME:SPLIT`, or raise ValueError with all kinds of sources."""
    name, colon, split = text.rpartition(":")
    if not colon or not name:
        raise ValueError(
            f"there is no {text!r}: give a folder, an image, a list of paths (@FILE, or - for "
            "standard input), an .npy, .npz or .parquet file, or a split, say digits:test"
        )
    if split not in SPLITS:
        raise ValueError(
            f"there is no {text!r}; if {name!r} is a data set, its splits are {', '.join(SPLITS)}"
        )
    return name, SPLITS[split]


def open_split(
    name: str,
    split: str,
    classes: Sequence[str],
    metadata: Mapping[str, Any],
    data_dir: Path,
    image_size: int,
) -> Source:
    """Open a split of the model's training, drawn by the same seed."""
    import torch

    from cnn import data

    if "seed" not in metadata:
        raise ValueError(f"can't draw the split {split}: the model has no seed in its metadata")
    dataset = data.load(name, data_dir=data_dir, seed=metadata["seed"], image_size=image_size)
    images: data.Split = getattr(dataset, split)
    names = [dataset.classes[label] for label in images.labels.tolist()]
    labels, notes = known_labels(names, classes)
    notes = (*dataset.notes, *notes)
    if dataset.digest != metadata.get("dataset_digest"):
        notes += (
            f"the model was trained on other data (digest {metadata.get('dataset_digest')}) than "
            f"{name} is now ({dataset.digest}): its splits may overlap with what it has seen",
        )

    def chunk(part: slice) -> Chunk:
        positions = torch.arange(part.start, part.stop)
        return Chunk(
            images=images.batch(positions)[0].numpy(),
            names=[f"{name}:{split}[{index}]" for index in positions.tolist()],
            labels=labels and labels[part],
        )

    return Source(
        size=len(images),
        read=lambda size, start: prefetch(chunk, parts(len(images), size, start), threads=1),
        fingerprint=f"{dataset.digest} {split} {metadata['seed']}",
        has_labels=labels is not None,
        files=lambda: _files_below(name),
        notes=notes,
        split=split,
    )


def _files_below(name: str) -> list[str]:
    from cnn.folders import find_images

    folder = Path(name)
    return [str(file) for file in find_images(folder)] if folder.is_dir() else []
