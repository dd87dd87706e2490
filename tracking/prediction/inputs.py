"""Read lists of image files, and images in Parquet files."""

from __future__ import annotations

import io
import os
import select
import stat
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracking.errors import one_line
from tracking.prediction import parquet_reader

if TYPE_CHECKING:
    import pyarrow as pa

Item = str | bytes | ValueError | None
"""An image: a path, its encoded bytes, the reason of its refusal, or None if a row has none."""

MAX_LIST, MAX_NAMES = 2**29, 10**7
"""The most bytes and paths of a list of paths."""

# For a Parquet file: rows that are read at once, the time for them, and the bytes of the footer.
_ROWS_AT_ONCE = (256, 16, 1)
_SECONDS = 60.0
_LARGEST_FOOTER = 2**24
# Arrow's own allocators reserve much more address space than they use.
_READER_ENVIRONMENT = {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1"}

COLUMNS = ("image", "bytes", "path")
"""The columns that may have the images, unless the user names one: the first that exists."""


class Paths(Sequence[str]):
    """Paths, kept as one text: 60 bytes each, where a `Path` takes 300."""

    def __init__(self, text: bytes, separator: bytes, *, prefix: str = "") -> None:
        import numpy as np

        self.text = text
        self.prefix = prefix
        cuts = np.flatnonzero(np.frombuffer(text, np.uint8) == separator[0])
        starts = np.concatenate([[0], cuts + 1])
        ends = np.concatenate([cuts, [len(text)]])
        is_full = ends > starts  # empty lines are no paths
        self.starts, self.ends = starts[is_full], ends[is_full]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        return self.prefix + os.fsdecode(self.text[self.starts[index] : self.ends[index]])


def listed_paths(names: Iterable[str], *, prefix: str) -> Paths:
    """Return names as paths with a common prefix."""
    return Paths(b"\0".join(os.fsencode(name) for name in names), b"\0", prefix=prefix)


def read_list(text: str) -> Paths:
    """Read the paths in `@FILE`, or in `-` for standard input, one a line, or raise ValueError.

    The file may be a pipe, `@<(find …)`, but no device. If there is a NUL, NULs end the paths
    (`find -print0`), which may hold newlines then.
    """
    try:
        if text == "-":
            content = sys.stdin.buffer.read(MAX_LIST + 1)
        else:
            with open(text[1:], "rb") as stream:  # noqa: PTH123 -- a pipe may be named: @<(find …)
                if stat.S_ISCHR(mode := os.fstat(stream.fileno()).st_mode) or stat.S_ISBLK(mode):
                    raise ValueError(f"can't read the list {text!r}: it is a device")
                content = stream.read(MAX_LIST + 1)
    except OSError as error:
        raise ValueError(f"can't read the list {text!r}: {error.strerror}") from error
    if len(content) > MAX_LIST:
        raise ValueError(
            f"the list {text!r} is refused: it has more than {MAX_LIST:,} bytes (split it)"
        )
    separator = b"\0" if b"\0" in content else b"\n"
    if content.count(separator) > MAX_NAMES:
        raise ValueError(f"the list {text!r} is refused: it has more than {MAX_NAMES:,} paths")
    if separator == b"\0":
        return Paths(content, b"\0")
    return Paths(content.replace(b"\r\n", b"\n"), b"\n")


# Parquet


class Table:
    """A Parquet file with one image a row: its bytes, or the path of a file."""

    def __init__(self, file: Path, column: str | None) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.file = file
        try:
            _check_footer(file)
            with pa.OSFile(os.fsencode(file)) as stream, pq.ParquetFile(stream) as opened:
                schema, about = opened.schema_arrow, opened.metadata
                self.groups = [about.row_group(k).num_rows for k in range(about.num_row_groups)]
        except (OSError, ValueError, MemoryError, pa.ArrowException) as error:
            raise self._error(one_line(error)) from error
        if any(rows < 0 for rows in self.groups):
            raise self._error(f"it has a row group of {min(self.groups)} rows")
        self.num_rows = sum(self.groups)
        self.column = _image_column(schema, column, file)
        self.has_labels = "label" in schema.names and self.column != "label"
        self._may_have_paths = not _is_binary(schema.field(self.column).type)
        if self.has_labels:
            _check_once("label", schema, file)

    def _error(self, reason: str) -> ValueError:
        return ValueError(f"can't read the Parquet file {str(self.file)!r}: {reason}")

    def rows(self, start: int) -> Iterator[tuple[Item, str | int | None]]:
        """Yield image and label of each row from `start` on; pages are read when needed.

        Raises ValueError if the file is damaged, takes more memory or time than is allowed, or has
        another number of rows than it declares.
        """
        done = start
        for at_once in _ROWS_AT_ONCE:  # fewer rows need less memory
            try:
                for pair in self._read(done, at_once):
                    done += 1
                    yield pair
                break
            except MemoryError as error:
                if at_once == _ROWS_AT_ONCE[-1]:
                    most = f"{parquet_reader.MAX_MEMORY:,} bytes"
                    raise self._error(f"row {done} takes more than {most} to unpack") from error
        if done != self.num_rows:
            raise self._error(f"it says that it has {self.num_rows:,} rows, and has {done:,}")

    def _read(self, start: int, at_once: int) -> Iterator[tuple[Item, str | int | None]]:
        """Yield rows that another process reads; MemoryError if it has too little memory."""
        first, group = start, 0
        while group < len(self.groups) and start >= self.groups[group]:
            start -= self.groups[group]
            group += 1
        label = "label" if self.has_labels else ""
        numbers = map(str, (group, start, at_once, parquet_reader.MAX_CELL))
        process = subprocess.Popen(
            [sys.executable, "-P", parquet_reader.__file__, str(parquet_reader.MAX_MEMORY),
             str(self.file.absolute()), self.column, label, *numbers],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=os.environ | _READER_ENVIRONMENT,
        )  # fmt: skip
        with process:
            try:
                for batch in _batches(process):
                    yield from _pairs(batch)
                self._check_end(process)
            except TimeoutError as error:
                line = f"row {first} and those after it take more than {_SECONDS:.0f} s to unpack"
                raise self._error(line) from error
            finally:
                process.kill()

    def _check_end(self, process: subprocess.Popen[bytes]) -> None:
        """Raise if the process has not read everything."""
        _, message = process.communicate()
        if process.returncode == 2:
            raise self._error(one_line(ValueError(message.decode(errors="replace"))))
        if process.returncode:  # TOO_MUCH, or killed at the limit
            raise MemoryError

    def paths(self) -> Iterator[str]:
        """Yield the paths in the table; none if it has encoded images."""
        if not self._may_have_paths:
            return
        for item, _ in self.rows(0):
            if isinstance(item, str):
                yield item
            elif item is not None:
                return


def _check_footer(file: Path) -> None:
    """Raise ValueError if the footer of a Parquet file is too large."""
    if not file.is_file():  # opening a named pipe would wait forever
        raise ValueError("it is no regular file")
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - 8))
        size = int.from_bytes(stream.read(4), "little")
        if stream.read(4) == b"PAR1" and size > _LARGEST_FOOTER:
            raise ValueError(f"its footer has {size:,} bytes, more than {_LARGEST_FOOTER:,}")


def _batches(process: subprocess.Popen[bytes]) -> Iterator[pa.RecordBatch]:
    """Yield the batches that a process writes, until it ends."""
    import pyarrow as pa

    assert process.stdout is not None
    with suppress(pa.ArrowException), _Pipe(process.stdout.fileno()) as pipe:
        yield from pa.ipc.open_stream(pipe)


class _Pipe(io.RawIOBase):
    """The output of another process; TimeoutError if it does not write for `_SECONDS`."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        parts = []
        while size > 0:
            if not select.select([self.descriptor], [], [], _SECONDS)[0]:
                raise TimeoutError
            parts.append(os.read(self.descriptor, min(size, 2**20)))
            size -= len(parts[-1])
            if not parts[-1]:
                break
        return b"".join(parts)


def _pairs(batch: pa.RecordBatch) -> Iterator[tuple[Item, str | int | None]]:
    columns = (batch.column(name).to_pylist() for name in parquet_reader.COLUMNS)
    for image, path, name, number, size in zip(*columns, strict=True):
        item: Item = image
        if size is not None:
            most = f"{parquet_reader.MAX_CELL:,}"
            item = ValueError(f"is refused: it has {size:,} bytes, more than {most}")
        elif image is None and path is not None:
            item = os.fsdecode(path)
        yield item, number if name is None else name.decode(errors="surrogateescape")


def _is_binary(kind: pa.DataType) -> bool:
    from pyarrow import types

    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _check_once(name: str, schema: pa.Schema, file: Path) -> None:
    if (count := schema.names.count(name)) > 1:
        raise ValueError(f"{str(file)!r} has {count} columns {name!r}: one is allowed")


def _image_column(schema: pa.Schema, wanted: str | None, file: Path) -> str:
    from pyarrow import types

    names = [wanted] if wanted else [name for name in COLUMNS if name in schema.names]
    if not names or names[0] not in schema.names:
        there = ", ".join(map(repr, schema.names[:20])) or "none"
        missing = repr(wanted) if wanted else " or ".join(map(repr, COLUMNS))
        raise ValueError(f"{str(file)!r} has no column {missing} (--column names it), but {there}")
    _check_once(names[0], schema, file)
    kind = schema.field(names[0]).type
    if types.is_struct(kind) and "bytes" in [kind.field(k).name for k in range(kind.num_fields)]:
        kind = kind.field("bytes").type
    if not (_is_binary(kind) or types.is_string(kind) or types.is_large_string(kind)):
        raise ValueError(
            f"column {names[0]!r} of {str(file)!r} is {kind}: images must be bytes (binary, or a "
            "struct of bytes and path) or paths (string)"
        )
    return str(names[0])
