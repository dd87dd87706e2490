"""The formats of predictions, by the ending of the file's name: CSV, Parquet, JSON Lines.

A format turns tables into bytes that are appended to a draft. So a draft can be cut after any table
and resumed; `finish` turns it into the file. Files are read in parts.
"""

from __future__ import annotations

import io
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracking.files import create
from tracking.prediction.drafts import whole_file
from tracking.text import escape_formulas

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa

    from tracking.prediction.chunks import Chunk

_ROW_GROUP = 65536


class Format(ABC):
    """Writes tables one after the other, and reads them."""

    @abstractmethod
    def begin(self, schema: pa.Schema) -> bytes:
        """Return the bytes before the first rows."""

    @abstractmethod
    def rows(self, table: pa.Table) -> bytes:
        """Return the bytes to append for some rows."""

    def finish(self, draft: Path) -> Path:
        """Return the finished file of a draft, by default the draft itself."""
        return draft

    @abstractmethod
    def heads(self, file: Path) -> list[str]:
        """Return the names of a file's columns."""

    @abstractmethod
    def read(self, file: Path, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        """Yield some rows at a time with the columns of the schema; texts are unescaped."""


def table(chunk: Chunk, probabilities: npt.NDArray[np.float32], classes: Sequence[str]) -> pa.Table:
    """Return a row for each image of a chunk, with its prediction or its error.

    Args:
        chunk: N names, labels and errors.
        probabilities: (M, K), of the images that could be read.
        classes: the K class names.

    Returns:
        Columns `source`, `prediction`, `probability`, `p(<class>)`, `label` if there are labels,
        and `error`, which is missing if the image could be read.
    """
    import numpy as np
    import pyarrow as pa

    size = len(chunk.names)
    failed = np.zeros(size, bool)
    failed[list(chunk.errors)] = True
    spread = np.zeros((size, len(classes)), np.float32)
    spread[~failed] = probabilities
    best = spread.argmax(axis=1)
    numbers = [spread[np.arange(size), best], *spread.T]
    predictions = pa.DictionaryArray.from_arrays(pa.array(best, mask=failed), _texts(classes))
    columns: dict[str, Any] = {
        "source": _texts(chunk.names),
        "prediction": predictions.dictionary_decode(),
    }
    heads = ["probability", *(f"p({name})" for name in classes)]
    for head, values in zip(_texts(heads).to_pylist(), numbers, strict=True):
        columns[head] = pa.array(values, mask=failed)
    if chunk.labels is not None:
        columns["label"] = _texts(chunk.labels)
    columns["error"] = _texts([chunk.errors.get(index) for index in range(size)])
    return pa.table(columns)


def _texts(values: Sequence[str | None]) -> pa.Array:
    """Return texts as Arrow has them; bytes that are not UTF-8 are escaped (file names)."""
    import pyarrow as pa

    def utf8(text: str) -> str:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")

    try:
        return pa.array(values, pa.string())
    except UnicodeEncodeError:
        return pa.array([value and utf8(value) for value in values], pa.string())


def _opened(file: Path) -> pa.NativeFile:
    import pyarrow as pa

    # As bytes: PyArrow rejects names that are not UTF-8.
    return pa.OSFile(os.fsencode(file))


def to_csv(table: pa.Table) -> bytes:
    """Return a table as a CSV file, with formulas escaped."""
    return _Csv().begin(table.schema) + _Csv().rows(table)


class _Csv(Format):
    """CSV. An apostrophe precedes text that a spreadsheet may run, or that begins with one.

    So a reader always drops a leading apostrophe.
    """

    def begin(self, schema: pa.Schema) -> bytes:
        return self._written(schema.empty_table(), header=True)

    def rows(self, table: pa.Table) -> bytes:
        import pyarrow as pa

        for index, column in enumerate(table.columns):
            if pa.types.is_string(column.type):
                table = table.set_column(index, table.schema.names[index], escape_formulas(column))
        return self._written(table, header=False)

    def _written(self, table: pa.Table, *, header: bool) -> bytes:
        # Ten times as fast as pandas, and as exact: the shortest digits that restore the number.
        import pyarrow.csv

        stream = io.BytesIO()
        options = pyarrow.csv.WriteOptions(include_header=header)
        pyarrow.csv.write_csv(table, stream, options)
        return stream.getvalue()

    def heads(self, file: Path) -> list[str]:
        with self._open(file) as reader:
            return list(reader.schema.names)

    def read(self, file: Path, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        import pyarrow as pa
        from pyarrow import compute

        with self._open(file, include_columns=schema.names, column_types=schema) as reader:
            for batch in reader:
                columns = [
                    compute.replace_substring_regex(column, "^'", "")
                    if pa.types.is_string(column.type)
                    else column
                    for column in batch.columns
                ]
                yield pa.record_batch(columns, schema=schema)

    def _open(self, file: Path, **columns: Any) -> Any:
        import pyarrow.csv

        parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
        # A class may be called NA, or have an empty name, which is in quotes.
        convert = pyarrow.csv.ConvertOptions(
            null_values=[""], strings_can_be_null=True, quoted_strings_can_be_null=False, **columns
        )
        return pyarrow.csv.open_csv(_opened(file), parse_options=parse, convert_options=convert)


class _JsonLines(Format):
    """One JSON object a line. NaN and missing values are null."""

    def begin(self, schema: pa.Schema) -> bytes:
        del schema  # each line has the names
        return b""

    def rows(self, table: pa.Table) -> bytes:
        from pyarrow import compute

        parts: list[Any] = []
        for name, column in zip(table.schema.names, table.columns, strict=True):
            parts += [f"{', ' if parts else '{'}{json.dumps(name)}: ", _as_json(column)]
        lines = compute.binary_join_element_wise(*parts, "}\n", "")
        return "".join(lines.to_pylist()).encode()

    def heads(self, file: Path) -> list[str]:
        with file.open("rb") as stream:
            first = json.loads(stream.readline() or "{}")
        return list(first) if isinstance(first, dict) else []

    def read(self, file: Path, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        import pyarrow.json

        parse = pyarrow.json.ParseOptions(
            explicit_schema=schema, unexpected_field_behavior="ignore"
        )
        with pyarrow.json.open_json(_opened(file), parse_options=parse) as reader:
            yield from reader


def _as_json(column: pa.ChunkedArray) -> pa.Array:
    import pyarrow as pa
    from pyarrow import compute

    if pa.types.is_string(column.type):
        coded = column.combine_chunks().dictionary_encode()
        words = pa.array([json.dumps(text) for text in coded.dictionary.to_pylist()], pa.string())
        texts = words.take(coded.indices)
    else:
        finite = compute.is_finite(column)
        texts = compute.if_else(finite, compute.cast(column, pa.string()), None).combine_chunks()
    return compute.fill_null(texts, "null")


class _Parquet(Format):
    """Parquet. Such a file can't be appended to: the draft is an Arrow stream until the end."""

    def begin(self, schema: pa.Schema) -> bytes:
        return bytes(schema.serialize())

    def rows(self, table: pa.Table) -> bytes:
        (batch,) = table.combine_chunks().to_batches()
        return bytes(batch.serialize())

    def finish(self, draft: Path) -> Path:
        import pyarrow as pa
        import pyarrow.parquet as pq

        whole = whole_file(draft)
        whole.unlink(missing_ok=True)  # a killed process may have left it
        try:
            with (
                pa.memory_map(os.fsencode(draft)) as stream,
                pa.ipc.open_stream(stream) as batches,
                create(whole) as sink,
                pq.ParquetWriter(sink, batches.schema) as writer,
            ):
                self._regroup(batches, writer)
        except BaseException:
            whole.unlink(missing_ok=True)
            raise
        return whole

    def _regroup(self, batches: pa.RecordBatchReader, writer: Any) -> None:
        import pyarrow as pa

        kept: list[pa.RecordBatch] = []
        for batch in batches:
            kept.append(batch)
            if sum(map(len, kept)) >= _ROW_GROUP:
                writer.write_table(pa.Table.from_batches(kept), row_group_size=2**30)
                kept = []
        if kept:
            writer.write_table(pa.Table.from_batches(kept), row_group_size=2**30)

    def heads(self, file: Path) -> list[str]:
        import pyarrow.parquet as pq

        with _opened(file) as stream:
            return list(pq.read_schema(stream).names)

    def read(self, file: Path, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        import pyarrow.parquet as pq

        with _opened(file) as stream, pq.ParquetFile(stream) as stored:
            for batch in stored.iter_batches(columns=schema.names):
                yield batch.select(schema.names).cast(schema)


FORMATS: dict[str, Format] = {".csv": _Csv(), ".parquet": _Parquet(), ".jsonl": _JsonLines()}


def format_of(path: Path, what: str = "--out") -> Format:
    """Return the format for the ending of a file's name, or raise ValueError."""
    known = FORMATS.get(path.suffix.lower())
    if known is None:
        raise ValueError(
            f"{what} must end in {', '.join(FORMATS)}, which is the format: {str(path)!r}"
        )
    return known
