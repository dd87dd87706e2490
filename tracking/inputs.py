"""Names of many image files, and images kept in Parquet: what `tracking.sources` decodes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    import pyarrow as pa  # type: ignore[import-untyped]

Item = str | bytes | None
"""An image: a path, its encoded bytes, or nothing where a row has none."""

COLUMNS = ("image", "bytes", "path")
"""Where images are looked for in Parquet, unless a column is named: the first that is there."""


class Paths(Sequence[str]):
    """Paths, kept as the bytes of one text: some 60 bytes each, where a million `Path` take 300."""

    def __init__(self, text: bytes, separator: bytes, *, prefix: str = "") -> None:
        import numpy as np

        self.text = text
        self.prefix = prefix
        cuts = np.flatnonzero(np.frombuffer(text, np.uint8) == separator[0])
        starts = np.concatenate([[0], cuts + 1])
        ends = np.concatenate([cuts, [len(text)]])
        there = ends > starts  # empty lines are none
        self.starts, self.ends = starts[there], ends[there]

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        return self.prefix + os.fsdecode(self.text[self.starts[index] : self.ends[index]])


def listed_paths(names: Iterable[str], *, prefix: str) -> Paths:
    """Keep names, each with the same prefix."""
    return Paths(b"\0".join(os.fsencode(name) for name in names), b"\0", prefix=prefix)


def read_list(text: str) -> Paths:
    """Read the paths that `@FILE`, or `-` for standard input, lists: one a line.

    If there is a NUL, that ends them instead (`find -print0`), and they may hold newlines.
    """
    try:
        content = sys.stdin.buffer.read() if text == "-" else Path(text[1:]).read_bytes()
    except OSError as error:
        raise ValueError(f"can't read the list {text!r}: {error.strerror}") from error
    if b"\0" in content:
        return Paths(content, b"\0")
    return Paths(content.replace(b"\r\n", b"\n"), b"\n")


# Parquet


class Table:
    """A Parquet file with an image a row: its bytes, or the path of a file."""

    def __init__(self, file: Path, column: str | None) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq  # type: ignore[import-untyped]

        self.file = file
        if not file.is_file():  # opening a named pipe would wait for ever
            raise ValueError(f"can't read the Parquet file {str(file)!r}: it is no regular file")
        try:
            with _opened(file) as stream, pq.ParquetFile(stream) as opened:
                schema, about = opened.schema_arrow, opened.metadata
        except (OSError, pa.ArrowException) as error:
            line = " ".join(str(error).split())
            raise ValueError(f"can't read the Parquet file {str(file)!r}: {line}") from error
        self.num_rows: int = about.num_rows
        self.groups = [about.row_group(k).num_rows for k in range(about.num_row_groups)]
        self.column = _image_column(schema, column, file)
        self.has_labels = "label" in schema.names and self.column != "label"

    def rows(self, start: int) -> Iterator[tuple[Item, str | int | None]]:
        """Yield image and label of each row from `start` on; pages are read as they are needed."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        group = 0
        while group < len(self.groups) and start >= self.groups[group]:
            start -= self.groups[group]
            group += 1
        columns = [self.column, "label"] if self.has_labels else [self.column]
        try:
            with (
                _opened(self.file) as stream,
                pq.ParquetFile(stream, buffer_size=2**20, pre_buffer=False) as opened,
            ):
                batches = opened.iter_batches(
                    32, row_groups=range(group, len(self.groups)), columns=columns
                )
                for batch in batches:
                    skipped = min(start, batch.num_rows)
                    start -= skipped
                    yield from self._pairs(batch.slice(skipped))
        except (OSError, pa.ArrowException) as error:
            line = " ".join(str(error).split())
            raise ValueError(f"can't read the Parquet file {str(self.file)!r}: {line}") from error

    def _pairs(self, batch: pa.RecordBatch) -> Iterator[tuple[Item, str | int | None]]:
        labels: list[Any] = [None] * batch.num_rows
        if self.has_labels:
            labels = batch.column("label").to_pylist()
        items = map(_item, batch.column(self.column).to_pylist())
        return zip(items, labels, strict=True)

    def paths(self) -> Iterator[str]:
        """Yield the paths in the table, if it is of paths, without its images."""
        for item, _ in self.rows(0):
            if not isinstance(item, bytes | None):
                yield item
            elif isinstance(item, bytes):
                return


def _opened(file: Path) -> pa.NativeFile:
    import pyarrow as pa

    # By the name's bytes: PyArrow takes no text that is no UTF-8.
    return pa.OSFile(os.fsencode(file))


def _item(value: Any) -> Item:
    """Return a cell's image; a cell of `{bytes, path}` is what Hugging Face writes."""
    if isinstance(value, dict):
        return value["bytes"] if value.get("bytes") is not None else value.get("path")
    item: Item = value
    return item


def _image_column(schema: pa.Schema, wanted: str | None, file: Path) -> str:
    from pyarrow import types

    names = [wanted] if wanted else [name for name in COLUMNS if name in schema.names]
    if not names or names[0] not in schema.names:
        there = ", ".join(map(repr, schema.names[:20])) or "none"
        missing = repr(wanted) if wanted else " or ".join(map(repr, COLUMNS))
        raise ValueError(f"{str(file)!r} has no column {missing} (--column names it), but {there}")
    kind = schema.field(names[0]).type
    if types.is_struct(kind) and "bytes" in [kind.field(k).name for k in range(kind.num_fields)]:
        kind = kind.field("bytes").type
    of_bytes = types.is_binary(kind) or types.is_large_binary(kind)
    if not (of_bytes or types.is_string(kind) or types.is_large_string(kind)):
        raise ValueError(
            f"column {names[0]!r} of {str(file)!r} is {kind}: images must be bytes (binary, or a "
            "struct of bytes and path) or paths (string)"
        )
    return str(names[0])
