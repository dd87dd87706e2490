"""What goes in through the command line comes out as through Python, whatever it is.

Hypothesis makes the images, the arrays, the tables, the names and the classes; each example runs
`python -m tracking.predict` in this process, with a model made on the spot, reads what it wrote by
other means than the project's own, and compares it with `Predictor.predict` of the same pixels.

    python -m pytest --slow tests/test_properties.py            # four times as many
    EXAMPLES=1000 python -m pytest tests/test_properties.py     # so many, and others each time
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from cnn.images import decode, resize
from tracking import predict
from tracking.models.predictor import Predictor
from tracking.predict import main
from tracking.prediction.formats import format_of

EXAMPLES = os.environ.get("EXAMPLES")

property_test = settings(
    max_examples=int(EXAMPLES or settings.default.max_examples),  # see conftest.py
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)

OUTPUTS = st.sampled_from([".csv", ".parquet", ".jsonl"])
BATCH_SIZES = st.sampled_from([1, 2, 3, 128])
SEEDS = st.integers(0, 2**32 - 1)
SIDES = st.one_of(st.sampled_from([1, 2, 31, 32, 33]), st.integers(1, 80))

# Texts, with what CSV, JSON, spreadsheets and terminals take for something else.
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=("Cs",)), max_size=6),
    st.lists(
        st.sampled_from(
            [
                "=",
                "+",
                "-",
                "@",
                "'",
                '"',
                ",",
                ";",
                "\n",
                "\r",
                "\t",
                "\x0b",
                "\u2028",
                " ",
                "0",
                "a",
            ]
        ),
        max_size=4,
    ).map("".join),
    st.sampled_from(
        ["null", "NaN", "nan", "", "true", "1", "0x1", "p(a)", "source", "ü", "u\u0308"]
    ),
)
CLASSES = st.lists(TEXTS, min_size=2, max_size=120, unique=True)
FEW_CLASSES = st.lists(TEXTS, min_size=2, max_size=5, unique=True)


def is_file_name(name: str) -> bool:
    return bool(name) and not name.startswith(".") and "/" not in name and "\0" not in name


# Those of files may be no UTF-8 as well.
FILE_NAMES = st.one_of(
    TEXTS.filter(is_file_name),
    st.binary(min_size=1, max_size=4).map(os.fsdecode).filter(is_file_name),
)


class Remainders(torch.nn.Module):
    """Of each image (H, W, C), K probabilities that any pixel changes, and nothing else does.

    They are quotients of integers, so that they are the same bits in any batch.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.factors = 2 * torch.arange(num_classes) + 3  # (K,)

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.flatten(1).long()
        sums = (pixels * (1 + torch.arange(pixels.shape[1]))).sum(1, keepdim=True)  # (N, 1)
        parts = (sums * self.factors) % 9973 + 1  # (N, K)
        return (parts.double() / parts.sum(1, keepdim=True)).float()


def predictor_of(classes: Sequence[str]) -> Predictor:
    return Predictor(
        model=Remainders(len(classes)),
        classes=tuple(classes),
        image_shape=(32, 32, 3),
        uri="models:/m-0",
        run_id=None,
        metadata={"seed": 0},
    )


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the command line did."""

    code: int
    printed: str
    heads: list[str]
    rows: list[list[Any]]


def ask(predictor: Predictor, source: str, out: Path, batch_size: int, *options: str) -> Answer:
    """Run the command line, and read what it wrote."""
    command = [source, "--out", str(out), "--batch-size", str(batch_size), *options]
    terminal = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch, io.TextIOWrapper(terminal, "utf-8") as stream:
        patch.setattr(predict, "_choose_model", lambda _: (predictor, "the model of the test"))
        with redirect_stdout(stream), redirect_stderr(stream):
            code = main(command)
        stream.flush()
        printed = terminal.getvalue().decode()
    note(printed)
    assert [file.name for file in out.parent.iterdir() if ".partial" in file.name] == []
    heads, rows = READERS[out.suffix](out) if out.exists() else ([], [])
    if out.exists():
        check_as_read_again(out, heads, rows)
    return Answer(code=code, printed=printed, heads=heads, rows=rows)


def check_as_read_again(out: Path, heads: list[str], rows: list[list[Any]]) -> None:
    """Compare with what a report reads, for which a missing text is an empty one in CSV."""
    assert format_of(out).heads(out) == heads
    schema = pa.schema([("prediction", pa.string()), ("probability", pa.float32())])
    batches = format_of(out).read(out, schema)
    again = [row for batch in batches for row in zip(*map(pa.Array.to_pylist, batch), strict=True)]
    assert [text or None for text, _ in again] == [row[1] or None for row in rows]
    numbers = [None if row[2] is None else np.float32(row[2]) for row in rows]
    assert [number for _, number in again] == numbers


def read_csv(file: Path) -> tuple[list[str], list[list[Any]]]:
    with file.open(newline="", encoding="utf-8") as stream:
        heads, *rows = csv.reader(stream)
    return heads, [[None if cell == "" else cell.removeprefix("'") for cell in row] for row in rows]


def read_jsonl(file: Path) -> tuple[list[str], list[list[Any]]]:
    lines = file.read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""
    rows = [json.loads(line, object_pairs_hook=list) for line in lines]
    return [key for key, _ in rows[0]], [[value for _, value in row] for row in rows]


def read_parquet(file: Path) -> tuple[list[str], list[list[Any]]]:
    table = pq.read_table(io.BytesIO(file.read_bytes()))
    columns = [column.to_pylist() for column in table.columns]
    return table.schema.names, [list(row) for row in zip(*columns, strict=True)]


READERS = {".csv": read_csv, ".jsonl": read_jsonl, ".parquet": read_parquet}


def check(
    answer: Answer,
    predictor: Predictor,
    names: Sequence[str],
    images: Sequence[Any],
    labels: Sequence[str | None] | None,
    suffix: str,
) -> None:
    """Compare what the command line wrote with what Python says; None is no image."""
    read = [k for k, image in enumerate(images) if image is not None]
    frame = predictor.predict([images[k] for k in read])
    heads = [*frame.columns, *(["label"] if labels is not None else []), "error"]
    assert answer.heads == heads
    assert answer.code == (0 if len(read) == len(images) else 3)
    assert len(answer.rows) == len(images)
    expected = iter(frame.itertuples(index=False))
    for k, row in enumerate(answer.rows):
        cells = dict(zip(heads, row, strict=True))
        texts = {"source": shown(names[k])}
        if labels is not None:
            texts["label"] = labels[k]
        numbers: list[Any] = [None] * (1 + len(predictor.classes))
        if images[k] is not None:
            _, texts["prediction"], *numbers = next(expected)
            texts["error"] = None
        else:
            texts["prediction"] = None
            assert cells["error"]
        for head, text in texts.items():
            assert cells[head] == ((text or None) if suffix == ".csv" else text), head
        # To the bit: the digits are those of the same number.
        written = [None if cell is None else np.float32(cell) for cell in row[2 : 2 + len(numbers)]]
        assert written == numbers


def shown(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "backslashreplace")


# Image files

BYTES = {"L": 1, "P": 1, "LA": 2, "I;16": 2, "RGB": 3, "RGBA": 4, "CMYK": 4, "F": 4}


def writable() -> list[tuple[str, str]]:
    """Return the modes and formats in which Pillow writes images."""
    pairs = []
    for mode in ("1", *BYTES):
        for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"):
            try:
                Image.new(mode, (2, 2)).save(io.BytesIO(), kind)
            except (OSError, KeyError, ValueError):
                continue
            pairs.append((mode, kind))
    return pairs


KINDS = writable()


@st.composite
def encoded_images(draw: st.DrawFn) -> bytes:
    """Draw the bytes of an image file, which may be cut off."""
    mode, kind = draw(st.sampled_from(KINDS))
    width, height = draw(SIDES), draw(SIDES)
    random = np.random.default_rng(draw(SEEDS))
    size = (width + 7) // 8 * height if mode == "1" else BYTES[mode] * width * height
    image = Image.frombytes(mode, (width, height), random.bytes(size))
    options: dict[str, Any] = {}
    if mode == "P":
        image.putpalette(random.bytes(768))
        if kind in ("PNG", "GIF"):
            options["transparency"] = draw(st.integers(0, 255))
    if kind in ("PNG", "JPEG", "TIFF", "WEBP") and mode != "F":
        exif = Image.Exif()
        exif[0x0112] = draw(st.integers(0, 9))  # the orientation
        options["exif"] = exif
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    content = stream.getvalue()
    kept = draw(st.one_of(st.none(), st.none(), st.integers(0, len(content))))
    return content[:kept]


def decoded(content: bytes) -> Any:
    try:
        return decode(content)
    except ValueError:
        return None


@property_test
@given(data=st.data(), classes=FEW_CLASSES, suffix=OUTPUTS, batch_size=BATCH_SIZES)
def test_image_files(data: st.DataObject, classes: list[str], suffix: str, batch_size: int) -> None:
    folder_names = st.one_of(FILE_NAMES, *map(st.just, filter(is_file_name, classes)))
    files = data.draw(
        st.dictionaries(
            st.tuples(folder_names, FILE_NAMES), encoded_images(), min_size=1, max_size=5
        )
    )
    predictor = predictor_of(classes)
    with TemporaryDirectory() as scratch:
        root = Path(scratch, "images")
        for (folder, name), content in files.items():
            (root / folder).mkdir(parents=True, exist_ok=True)
            (root / folder / name).write_bytes(content)
        names = [f"{root}/{folder}/{name}" for folder, name in files]
        kinds = ["folder", "NUL"] + ["lines"] * (not any(set("\r\n") & set(n) for n in names))
        kinds += ["file"] * (len(names) == 1)
        if (kind := data.draw(st.sampled_from(kinds))) == "folder":
            source = str(root)
            names.sort()
        elif kind == "file":
            (source,) = names
        else:
            source = f"@{scratch}/list"
            end = "\0" if kind == "NUL" else "\n"
            content = os.fsencode("".join(f"{name}{end}" for name in names))
            Path(scratch, "list").write_bytes(content)
        images = [decoded(Path(name).read_bytes()) for name in names]
        folders = [Path(name).parent.name for name in names]
        labels = [name if name in classes else None for name in folders]
        out = Path(scratch, data.draw(FILE_NAMES) + suffix)
        answer = ask(predictor, source, out, batch_size)
        check(answer, predictor, names, images, labels if any_of(labels) else None, suffix)


def any_of(labels: Sequence[str | None]) -> bool:
    return any(label is not None for label in labels)


@property_test
@given(data=st.data(), classes=FEW_CLASSES, suffix=OUTPUTS, batch_size=BATCH_SIZES)
def test_tables(data: st.DataObject, classes: list[str], suffix: str, batch_size: int) -> None:
    contents = data.draw(st.lists(st.one_of(encoded_images(), st.none()), min_size=1, max_size=6))
    count = len(contents)
    wanted = data.draw(st.sampled_from(["none", "names", "positions"]))
    names_or_none = st.sampled_from([*classes, None, "no class of these"])
    positions = st.sampled_from([*range(len(classes)), None, -1, len(classes)])
    given_labels = data.draw(
        st.lists(
            positions if wanted == "positions" else names_or_none, min_size=count, max_size=count
        )
    )
    labels = [
        (classes[value] if 0 <= value < len(classes) else None)
        if isinstance(value, int)
        else (value if value in classes else None)
        for value in given_labels
    ]
    predictor = predictor_of(classes)
    with TemporaryDirectory() as scratch:
        paths: list[str | None] = []
        for k, content in enumerate(contents):
            paths.append(None if content is None else f"{scratch}/{k}")
            if content is not None:
                Path(scratch, str(k)).write_bytes(content)
        kind = data.draw(st.sampled_from(["bytes", "large", "struct", "paths"]))
        column = {
            "bytes": lambda: pa.array(contents, pa.binary()),
            "large": lambda: pa.array(contents, pa.large_binary()),
            "struct": lambda: pa.array(
                [
                    None if content is None else {"bytes": content, "path": "x"}
                    for content in contents
                ],
                pa.struct({"bytes": pa.binary(), "path": pa.string()}),
            ),
            "paths": lambda: pa.array(paths, pa.string()),
        }[kind]()
        head = data.draw(st.sampled_from(["image", "bytes", "path", "other"]))
        columns = {head: column}
        if wanted != "none":
            columns["label"] = pa.array(given_labels, pa.int64() if wanted == "positions" else None)
        file = Path(scratch, "tables", f"{data.draw(FILE_NAMES)}.parquet")
        file.parent.mkdir()
        with file.open("wb") as stream:
            pq.write_table(pa.table(columns), stream, row_group_size=data.draw(st.integers(1, 6)))
        options = ["--column", head] if head == "other" else []
        answer = ask(predictor, str(file), Path(scratch, f"out{suffix}"), batch_size, *options)
        names = [path or f"{file}[{k}]" for k, path in enumerate(paths)]
        if kind != "paths":
            names = [f"{file}[{k}]" for k in range(count)]
        images = [None if content is None else decoded(content) for content in contents]
        check(answer, predictor, names, images, labels if wanted != "none" else None, suffix)


# Arrays

SHAPES = st.one_of(
    st.tuples(st.integers(1, 4), SIDES, SIDES, st.sampled_from([1, 3])),
    st.tuples(st.integers(1, 4), SIDES, SIDES),
)
WRONG_SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 4, 33]), max_size=5).map(tuple)


@property_test
@given(
    data=st.data(),
    shape=SHAPES,
    seed=SEEDS,
    order=st.sampled_from("CF"),
    kind=st.sampled_from([".npy", ".npz"]),
    classes=FEW_CLASSES,
    suffix=OUTPUTS,
    batch_size=BATCH_SIZES,
)
def test_arrays(
    data: st.DataObject,
    shape: tuple[int, ...],
    seed: int,
    order: Any,
    kind: str,
    classes: list[str],
    suffix: str,
    batch_size: int,
) -> None:
    array = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    # Of three dimensions, the last is colours if it can be.
    images = array[None] if array.ndim == 3 and shape[2] in (1, 3) else array
    positions = st.lists(
        st.integers(0, len(classes) - 1), min_size=len(images), max_size=len(images)
    )
    labels = data.draw(st.one_of(st.none(), positions)) if kind == ".npz" else None
    predictor = predictor_of(classes)
    with TemporaryDirectory() as scratch:
        file = Path(scratch, data.draw(FILE_NAMES) + kind)
        array = np.asarray(array, order=order)
        if kind == ".npy":
            np.save(file, array)
        elif labels is None:
            np.savez(file, images=array)
        else:
            by_name = data.draw(st.booleans()) and not any(c.endswith("\0") for c in classes)
            np.savez(
                file,
                images=array,
                labels=np.array([classes[k] for k in labels] if by_name else labels),
            )
        answer = ask(predictor, str(file), Path(scratch, f"out{suffix}"), batch_size)
        names = [f"{file}[{k}]" for k in range(len(images))]
        expected = labels and [classes[k] for k in labels]
        check(
            answer, predictor, names, list(resize(np.ascontiguousarray(images))), expected, suffix
        )


@property_test
@given(
    shape=WRONG_SHAPES,
    dtype=st.sampled_from(["uint8", "int8", "uint16", "int64", "float32", "bool", "U3"]),
    kind=st.sampled_from([".npy", ".npz"]),
)
def test_arrays_that_are_no_images(shape: tuple[int, ...], dtype: str, kind: str) -> None:
    grey, colours = len(shape) == 3, len(shape) == 4 and shape[-1] in (1, 3)
    is_fine = dtype == "uint8" and (grey or colours) and 0 not in shape
    with TemporaryDirectory() as scratch:
        file = Path(scratch, f"images{kind}")
        array = np.zeros(shape, dtype)
        np.save(file, array) if kind == ".npy" else np.savez(file, images=array)
        answer = ask(predictor_of("ab"), str(file), Path(scratch, "out.csv"), 128)
    if is_fine:
        assert answer.code == 0
        return
    assert (answer.code, answer.rows) == (2, [])
    assert answer.printed.startswith("python -m tracking.predict: error: ")
    assert answer.printed.count("\n") == 1


# Classes and numbers


@property_test
@given(classes=CLASSES, seed=SEEDS, suffix=OUTPUTS, batch_size=BATCH_SIZES)
def test_classes(classes: list[str], seed: int, suffix: str, batch_size: int) -> None:
    random = np.random.default_rng(seed)
    # Of all magnitudes from 0 to 1, those that float32 can hardly hold among them.
    bits = random.integers(0, np.float32(1).view(np.uint32) + 1, (3, len(classes)), np.uint32)
    answers = torch.from_numpy(bits.view(np.float32))
    images = np.arange(3, dtype=np.uint8).repeat(32 * 32 * 3).reshape(3, 32, 32, 3)
    predictor = replace(
        predictor_of(classes), model=lambda images: answers[images[:, 0, 0, 0].long()]
    )
    labels = [classes[k] for k in random.integers(len(classes), size=3)]
    with TemporaryDirectory() as scratch:
        file = Path(scratch, "images.npz")
        np.savez(file, images=images, labels=np.array([classes.index(name) for name in labels]))
        answer = ask(predictor, str(file), Path(scratch, f"out{suffix}"), batch_size)
        names = [f"{file}[{k}]" for k in range(3)]
        check(answer, predictor, names, list(images), labels, suffix)
