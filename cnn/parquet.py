"""Data sets in Parquet files, as Hugging Face has them: columns `image` (bytes) and `label`."""

import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cnn.arrays import Labelled, labelled
from cnn.cache import DatasetSource, ImagePool
from cnn.devices import num_cores
from cnn.folders import is_system_name, role_of, state_of
from cnn.images import decode, empty_images

_ROWS_AT_ONCE = 64

LAYOUT = "train-*.parquet, and test-*.parquet if there is a test split"


def source_in(folder: Path) -> DatasetSource | None:
    """Return the source of the Parquet files in a folder, or in its folder `data`; None if none.

    A folder with a folder `train` is one of images, whatever else is in it.
    Raises ValueError for a validation split, and for splits without one for training.
    """
    if any(role_of(path.name) == "train" and path.is_dir() for path in folder.iterdir()):
        return None
    for place in (folder, folder / "data"):
        names = sorted(path.name for path in place.glob("*.parquet"))
        roles = {name: _role(name) for name in names if not is_system_name(name)}
        if any(roles.values()):
            return _source(folder, place, roles)
    return None


def _role(name: str) -> str | None:
    """Return the split of a file: `train-00000-of-00002.parquet` belongs to `train`."""
    return role_of(re.split("[-.]", name)[0])


def _source(folder: Path, place: Path, roles: dict[str, str | None]) -> DatasetSource:
    of_role: dict[str | None, list[Path]] = {}
    for name, role in roles.items():
        of_role.setdefault(role, []).append(place / name)
    if "validation" in of_role:
        raise ValueError(
            f"{str(folder)!r} has a file {of_role['validation'][0].name!r}, which would not be "
            "used (validation images are drawn from train): call it train-*.parquet as well, or "
            "move it away"
        )
    if "train" not in of_role:
        raise ValueError(f"{str(folder)!r} has no Parquet files for training: it needs {LAYOUT}")
    train, test = of_role["train"], of_role.get("test", [])
    others = of_role.get(None, [])
    shown = ", ".join(repr(file.name) for file in others)
    return DatasetSource(
        name=folder.name,
        address=str(folder),
        fingerprint=lambda: [state_of(str(file)) for file in (*train, *test)],
        read=lambda image_size: _read(train, test, image_size),
        notes=(f"not used, next to the splits: {shown}",) if others else (),
    )


def _read(train: Sequence[Path], test: Sequence[Path], image_size: int) -> ImagePool:
    # First, because it is quick: what is wrong with them is said before images are decoded.
    labels = _labels(train, test)
    images = empty_images(len(labels.train) + len(labels.test), image_size)
    row = 0
    with ThreadPoolExecutor(num_cores()) as executor:
        for file in (*train, *test):
            for first, cells in _images(file):
                tasks = [(file, first + k, cell, image_size) for k, cell in enumerate(cells)]
                for pixels in executor.map(_decode, tasks):
                    images[row] = pixels
                    row += 1
    return ImagePool(
        images=images,
        labels=np.concatenate([labels.train, labels.test]),
        classes=labels.classes,
        given_test=len(labels.test),
    )


def _decode(task: tuple[Path, int, bytes | None, int]) -> npt.NDArray[np.uint8]:
    file, row, cell, image_size = task
    if cell is None:
        raise ValueError(f"row {row} of {str(file)!r} has no image")
    try:
        return decode(cell, image_size)
    except ValueError as error:
        raise ValueError(f"row {row} of {str(file)!r}: {error}") from error


def _labels(train: Sequence[Path], test: Sequence[Path]) -> Labelled:
    parts = [[_labels_of(file) for file in files] for files in (train, test) if files]
    for files, columns in zip((train, test), parts, strict=False):
        for file, column in zip(files, columns, strict=True):
            if (column.dtype.kind == "U") != (parts[0][0].dtype.kind == "U"):
                raise ValueError(
                    f"column 'label' of {str(file)!r} and that of {str(train[0])!r} are of two "
                    "types"
                )
    joined = [np.concatenate(columns) for columns in parts]
    names = _class_names(train[0]) if joined[0].dtype.kind == "i" else None
    try:
        return labelled(joined[0], joined[1] if test else None, names)
    except ValueError as error:
        raise ValueError(f"column 'label' in {str(train[0].parent)!r}: {error}") from error


def _labels_of(file: Path) -> npt.NDArray[Any]:
    """Return the column `label` of a file: integers or texts."""
    with _opened(file) as opened:
        column = opened.read(columns=["label"], use_threads=False).column(0).combine_chunks()
    import pyarrow as pa
    from pyarrow import types

    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if column.null_count:
        raise ValueError(f"{column.null_count:,} labels in {str(file)!r} are missing")
    if types.is_integer(column.type) and not types.is_uint64(column.type):
        return np.asarray(column.cast(pa.int64()))
    if types.is_string(column.type) or types.is_large_string(column.type):
        return np.array(column.to_pylist(), np.str_)
    raise ValueError(
        f"column 'label' of {str(file)!r} is {column.type}: it must be integers or strings"
    )


def _class_names(file: Path) -> list[str] | None:
    """Return the names of integer labels, from the metadata that Hugging Face writes."""
    with _opened(file) as opened:
        metadata = opened.schema_arrow.metadata or {}
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return names if is_list else None


def _images(file: Path) -> Iterator[tuple[int, list[bytes | None]]]:
    """Yield encoded images, with the row of the first of them."""
    from pyarrow import compute, types

    first = 0
    with _opened(file) as opened:
        for batch in opened.iter_batches(_ROWS_AT_ONCE, columns=["image"], use_threads=False):
            column = batch.column(0)
            if types.is_struct(column.type):
                column = compute.struct_field(column, "bytes")
            yield first, column.to_pylist()
            first += len(column)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Open a Parquet file whose columns are checked. An error in it is a ValueError of one line."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{str(file)!r} can't be read without the package pyarrow: pip install pyarrow"
        ) from error
    try:
        with pq.ParquetFile(file, buffer_size=2**20, pre_buffer=False) as opened:
            _check_columns(opened.schema_arrow, file)
            yield opened
    except (OSError, pa.ArrowException) as error:
        message = " ".join(str(error).split())
        raise ValueError(f"can't read the Parquet file {str(file)!r}: {message}") from error


def _check_columns(schema: Any, file: Path) -> None:
    from pyarrow import types

    for name in ("image", "label"):
        if schema.names.count(name) != 1:
            there = ", ".join(map(repr, schema.names[:20])) or "none"
            raise ValueError(f"{str(file)!r} must have one column {name!r}: it has {there}")
    kind = schema.field("image").type
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (types.is_binary(kind) or types.is_large_binary(kind)):
        raise ValueError(
            f"column 'image' of {str(file)!r} is {kind}: it must be bytes (binary), or a struct "
            "with bytes"
        )
