"""Read the images of a Parquet file in a process with limited memory.

A file of kilobytes can unpack to gigabytes without declaring it, so the operating system sets the
limit. `inputs` starts this process, which writes an Arrow stream of `COLUMNS`. It imports nothing
of `tracking`, so that it starts quickly.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from typing import Any

MAX_MEMORY = 2 * 10**9
"""The most bytes that the process may use."""
MAX_CELL = 2**28
"""The most bytes of one encoded image: for a larger one, only the size is passed on."""
TOO_MUCH = 3
"""The exit code if the memory is not enough; 2 is a damaged file, with a line on standard error."""

COLUMNS = ("image", "path", "label", "number", "size")
"""An image's bytes or its path; its label as name or position; the size of one that is too large.
"""

_AT_ONCE = 2**25


def main(argv: list[str]) -> int:
    """Write rows to standard output.

    Args:
        argv: MAX_MEMORY, then the arguments of `_batches`.
    """
    most = int(argv[0])
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import pyarrow as pa

    pa.set_cpu_count(1)
    schema = _schema(pa)
    try:
        with pa.ipc.new_stream(sys.stdout.buffer, schema) as sink:
            for batch in _batches(*argv[1:]):
                for part in _parts(batch):
                    sink.write_batch(part)
                sys.stdout.buffer.flush()
    except MemoryError:
        return TOO_MUCH
    except BrokenPipeError:  # the reader has stopped
        return 0
    except Exception as error:  # a damaged file may raise anything
        print(" ".join(str(error).split()) or type(error).__name__, file=sys.stderr)
        return 2
    return 0


def _schema(pa: Any) -> Any:
    kinds = (pa.large_binary(), pa.large_binary(), pa.large_binary(), pa.int64(), pa.int64())
    return pa.schema(list(zip(COLUMNS, kinds, strict=True)))


def _batches(
    file: str, column: str, label: str, first_group: str, skipped: str, at_once: str, max_cell: str
) -> Iterator[Any]:
    """Yield rows from a group on, after some that are skipped, without `label` if it is ""."""
    import os

    import pyarrow as pa
    import pyarrow.parquet as pq

    skip = int(skipped)
    with (
        pa.OSFile(os.fsencode(file)) as stream,
        pq.ParquetFile(stream, buffer_size=2**20, pre_buffer=False) as opened,
    ):
        for batch in opened.iter_batches(
            int(at_once),
            row_groups=range(int(first_group), opened.num_row_groups),
            columns=[column, label] if label else [column],
            use_threads=False,
        ):
            rest = batch.slice(min(skip, batch.num_rows))
            skip -= batch.num_rows - rest.num_rows
            if rest.num_rows:
                yield _plain(rest, column, label, int(max_cell))


def _plain(batch: Any, column: str, label: str, max_cell: int) -> Any:
    """Return rows with the columns `COLUMNS`, for any types in the file."""
    import pyarrow as pa
    from pyarrow import compute

    images, paths = _images(batch.column(column))
    sizes = compute.binary_length(images)
    is_large = compute.fill_null(compute.greater(sizes, max_cell), False)
    names, numbers = _labels(batch.column(label) if label else pa.nulls(batch.num_rows))
    small, large = compute.if_else(is_large, None, images), compute.if_else(is_large, sizes, None)
    columns = [small, paths, names, numbers, large]
    schema = _schema(pa)
    columns = [each.cast(kind) for each, kind in zip(columns, schema.types, strict=True)]
    return pa.record_batch(columns, schema=schema)


def _images(column: Any) -> tuple[Any, Any]:
    """Return bytes and paths of images; one of the two is null."""
    import pyarrow as pa
    from pyarrow import compute

    nothing = pa.nulls(len(column), pa.large_binary())
    kind = column.type
    if not pa.types.is_struct(kind):
        values = column.cast(pa.large_binary())
        return (nothing, values) if _is_text(kind) else (values, nothing)
    fields = {kind.field(k).name: k for k in range(kind.num_fields)}
    images = compute.struct_field(column, [fields["bytes"]]).cast(pa.large_binary())
    if "path" not in fields or not _is_text(kind.field(fields["path"]).type):
        return images, nothing
    return images, compute.struct_field(column, [fields["path"]]).cast(pa.large_binary())


def _labels(column: Any) -> tuple[Any, Any]:
    """Return labels as names and as positions; other labels are null."""
    import pyarrow as pa
    from pyarrow import compute

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    names, numbers = pa.nulls(len(column), pa.large_binary()), pa.nulls(len(column), pa.int64())
    if _is_text(column.type):
        return column.cast(pa.large_binary()), numbers
    if pa.types.is_uint64(column.type):
        column = compute.if_else(compute.less(column, pa.scalar(2**62, pa.uint64())), column, None)
    if pa.types.is_integer(column.type) or pa.types.is_boolean(column.type):
        return names, column.cast(pa.int64())
    return names, numbers


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _parts(batch: Any) -> Iterator[Any]:
    """Yield rows together, or one by one if they are large."""
    step = batch.num_rows if batch.nbytes <= _AT_ONCE else 1
    for row in range(0, batch.num_rows, step):
        yield batch.slice(row, step)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
