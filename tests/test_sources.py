"""Sources of images: lists, folders, Parquet; prefetched, read from any image on."""

from __future__ import annotations

import io
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cnn import data
from cnn.images import decode
from tracking.prediction import chunks, inputs, sources
from tracking.prediction.chunks import Chunk, Source
from tracking.prediction.prefetch import prefetch
from tracking.prediction.sources import open_source
from tracking.prediction.splits import KnownData, dataset_of

CLASSES = ("red", "green", "blue")


def source(text: str, **options: Any) -> Source:
    return open_source(
        text, classes=CLASSES, metadata={}, data_dir=Path("data"), image_size=32, **options
    )


def whole(opened: Source, *, size: int = 4, start: int = 0) -> tuple[list[str], Any, list[Any]]:
    """Read a source in chunks; return all names, images and labels."""
    chunks = list(opened.read(size, start))
    assert [len(chunk.names) for chunk in chunks[:-1]] == [size] * (len(chunks) - 1)
    assert 0 < len(chunks[-1].names) <= size
    names = [name for chunk in chunks for name in chunk.names]
    labels = [label for chunk in chunks for label in chunk.labels or []]
    return names, np.concatenate([chunk.images for chunk in chunks]), labels


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Seventeen images in three folders; return their paths, sorted."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    names = [f"photos/{('red', 'blue', 'azure')[k % 3]}/{k:02}.png" for k in range(17)]
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (9, 9, 3)).astype(np.uint8)).save(name)
    return sorted(names)


def pixels(names: Sequence[str]) -> Any:
    return np.stack([decode(Path(name)) for name in names])


# Files


@pytest.mark.parametrize("size", [1, 4, 16, 17, 100])
@pytest.mark.parametrize("block", [1, 3, 32])
def test_a_folder_is_read_in_chunks_of_any_size(
    photos: list[str], size: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "_BLOCK", block)
    names, images, labels = whole(source("photos"), size=size)
    assert names == photos
    np.testing.assert_array_equal(images, pixels(photos))
    folders = [name.split("/")[1] for name in photos]
    assert labels == [name if name in CLASSES else None for name in folders]


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\0", "\n\n"])
@pytest.mark.parametrize("last", [True, False])
def test_a_list_names_files_in_any_order(photos: list[str], ends: str, last: bool) -> None:
    order = photos[::-1] + photos[:2]
    Path("list.txt").write_bytes((ends.join(order) + ends * last).encode())
    opened = source("@list.txt")
    assert opened.size == 19
    names, images, _ = whole(opened)
    assert names == order
    np.testing.assert_array_equal(images, pixels(order))


def test_standard_input_is_a_list(photos: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(photos).encode())))
    assert whole(source("-"))[0] == photos


def test_with_nul_between_them_names_may_hold_newlines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    odd = [b"a\nb.png", b"\xe9\xff.png", b" c .png ", b"@d"]
    for name in odd:
        Image.new("RGB", (2, 2)).save(os.fsdecode(name), "PNG")
    Path("list").write_bytes(b"\0".join(odd))
    (chunk,) = source("@list").read(9, 0)
    assert [os.fsencode(name) for name in chunk.names] == odd
    assert chunk.errors == {}


def test_a_list_may_be_a_pipe_that_is_named(photos: list[str]) -> None:
    reading, writing = os.pipe()
    os.write(writing, "\n".join(photos).encode())
    os.close(writing)
    assert whole(source(f"@/dev/fd/{reading}"))[0] == photos
    os.close(reading)


def test_a_list_has_a_bound(photos: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("list").write_bytes(b"a\n" * 5)
    with pytest.raises(ValueError, match="can't read the list '@/dev/zero': it is a device"):
        source("@/dev/zero")
    monkeypatch.setattr(inputs, "MAX_LIST", 9)
    for text in ("@list", "-"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\n" * 5)))
        with pytest.raises(ValueError, match=f"list '{text}' is refused: it has more than 9 bytes"):
            source(text)
    monkeypatch.setattr(inputs, "MAX_LIST", 10)
    assert source("@list").size == 5
    monkeypatch.setattr(inputs, "MAX_NAMES", 4)
    with pytest.raises(ValueError, match="it has more than 4 paths"):
        source("@list")


def test_a_name_that_is_too_long_is_an_error_of_its_row(photos: list[str]) -> None:
    long = "x" * 300 + ".png"
    Path("list").write_text(f"{long}\n{photos[0]}\n{'y/' * 3000}\n")
    pq.write_table(pa.table({"path": [long, photos[0], "y/" * 3000]}), "t.parquet")
    for text in ("@list", "t.parquet"):
        (chunk,) = source(text).read(9, 0)
        assert set(chunk.errors) == {0, 2}
        assert chunk.errors[0] == "can't be read: File name too long"
    for text in (long, f"{long}:test", f"@{long}"):
        with pytest.raises(ValueError, match="^(there is no|unknown data set|can't)"):
            source(text)


def test_what_is_listed_and_not_there_is_an_error_of_its_row(photos: list[str]) -> None:
    Path("list").write_text(f"none.png\n{photos[0]}\nphotos\n")
    (chunk,) = source("@list").read(9, 0)
    assert len(chunk.images) == 1
    assert chunk.errors == {
        0: "is no image: it is not there, or not a regular file",
        2: "is no image: it is not there, or not a regular file",
    }


def test_odd_files_are_rows_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos/below").mkdir(parents=True)
    Path("photos/below/up").symlink_to("..")
    Path("photos/loop.png").symlink_to("loop.png")
    Path("photos/gone.png").symlink_to("nowhere")
    os.mkfifo("photos/pipe.png")
    Path("photos/zero.png").touch()
    Path("photos/line\nbreak.png").write_text("text")
    Image.new("RGB", (64, 64)).save("photos/cut.png")
    Path("photos/cut.png").write_bytes(Path("photos/cut.png").read_bytes()[:60])
    (chunk,) = source("photos").read(9, 0)
    assert len(chunk.errors) == len(chunk.names) == 6
    assert all("\n" not in error and "photos" not in error for error in chunk.errors.values())


def test_millions_of_names_take_little_memory(tmp_path: Path) -> None:
    paths = inputs.listed_paths((f"{k:07}.png" for k in range(1000)), prefix="some/folder/")
    assert paths[999] == "some/folder/0000999.png"
    assert paths[-1] == paths[999]
    assert paths[3:5] == ["some/folder/0000003.png", "some/folder/0000004.png"]
    assert len(paths.text) + paths.starts.nbytes + paths.ends.nbytes < 30 * 1000


# Parquet


def write_table(photos: Sequence[str], kind: str) -> None:
    encoded = [Path(name).read_bytes() for name in photos]
    columns: dict[str, Any] = {
        "bytes": {"image": encoded},
        "large": {"bytes": pa.array(encoded, pa.large_binary())},
        "paths": {"path": list(photos)},
        "struct": {"image": [{"bytes": data, "path": None} for data in encoded]},
    }[kind]
    columns["label"] = [k % 3 for k in range(len(photos))]
    pq.write_table(pa.table(columns), "t.parquet", row_group_size=5)


@pytest.mark.parametrize("kind", ["bytes", "large", "paths", "struct"])
@pytest.mark.parametrize("start", [0, 4, 12, 16])
def test_parquet_is_read_from_any_row_on(photos: list[str], kind: str, start: int) -> None:
    write_table(photos, kind)
    names, images, labels = whole(source("t.parquet"), start=start)
    numbered = [f"t.parquet[{index}]" for index in range(17)]
    assert names == (photos if kind == "paths" else numbered)[start:]
    np.testing.assert_array_equal(images, pixels(photos)[start:])
    assert labels == [CLASSES[k % 3] for k in range(start, 17)]


def test_of_a_long_row_group_no_row_is_skipped_twice(photos: list[str]) -> None:
    pq.write_table(pa.table({"path": [str(k) for k in range(100)]}), "t.parquet")
    chunks = list(source("t.parquet").read(7, 40))
    assert [name for chunk in chunks for name in chunk.names] == [str(k) for k in range(40, 100)]


def test_a_column_can_be_named(photos: list[str]) -> None:
    pd.DataFrame({"image": ["none"] * 2, "other": photos[:2]}).to_parquet("t.parquet")
    assert whole(source("t.parquet", column="other"))[0] == photos[:2]
    with pytest.raises(ValueError, match=r"no column 'x' \(--column names it\), but 'image', 'oth"):
        source("t.parquet", column="x")


def test_cells_without_an_image_and_unknown_labels(photos: list[str]) -> None:
    encoded = Path(photos[0]).read_bytes()
    table = {"image": [None, encoded, b"junk"], "label": ["red", "pink", None]}
    pq.write_table(pa.table(table), "t.parquet")
    (chunk,) = source("t.parquet").read(9, 0)
    assert chunk.labels == ["red", None, None]
    assert chunk.errors[0] == "there is no image"
    assert chunk.errors[2].startswith("4 bytes is no image")
    assert len(chunk.images) == 1


# From the middle on, and what changes


@pytest.mark.parametrize("kind", ["folder", "list", "npy", "npz"])
@pytest.mark.parametrize("start", [0, 4, 16])
def test_every_source_is_read_from_any_image_on(photos: list[str], kind: str, start: int) -> None:
    batch = pixels(photos)
    Path("list").write_text("\n".join(photos))
    np.save("a.npy", batch)
    np.savez("a.npz", images=batch)
    text = {"folder": "photos", "list": "@list", "npy": "a.npy", "npz": "a.npz"}[kind]
    np.testing.assert_array_equal(whole(source(text), start=start)[1], batch[start:])


def test_an_npy_stays_on_the_disk(photos: list[str]) -> None:
    np.save("a.npy", pixels(photos))
    opened = source("a.npy")
    with Path("a.npy").open("r+b") as stream:  # were it in memory, nobody would see this
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\x2a")
    assert whole(opened)[1][-1, -1, -1, -1] == 42


def test_of_an_npy_with_large_images_little_is_mapped_at_a_time(
    photos: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = np.stack([np.full((40, 50, 3), k, np.uint8) for k in range(17)])
    np.save("a.npy", batch)
    expected = whole(source("a.npy"))[1]
    monkeypatch.setattr(sources, "BYTES_AHEAD", 3 * batch[0].nbytes)
    mapped = []
    part = sources._part

    def watched(images: Any, rows: slice) -> Any:
        mapped.append(len(part(images, rows)))
        return part(images, rows)

    monkeypatch.setattr(sources, "_part", watched)
    np.testing.assert_array_equal(whole(source("a.npy"), size=10)[1], expected)
    assert mapped == [3, 3, 3, 1, 3, 3, 1]


@pytest.mark.parametrize("kind", ["folder", "list", "npy", "parquet"])
def test_the_fingerprint_is_that_of_the_images(photos: list[str], kind: str) -> None:
    def make(names: list[str]) -> None:
        Path("list").write_text("\n".join(names))
        np.save("a.npy", pixels(names))
        write_table(names, "bytes")
        for file in ("a.npy", "t.parquet"):
            os.utime(file, ns=(0, 0))

    text = {"folder": "photos", "list": "@list", "npy": "a.npy", "parquet": "t.parquet"}[kind]
    make(photos)
    before = source(text).fingerprint
    make(photos)
    assert source(text).fingerprint == before
    Path(photos[-1]).unlink()
    make(photos[:-1])
    assert source(text).fingerprint != before


# Which data set it is of


def test_a_split_is_of_its_data_set(digits_cache: Path) -> None:
    digest = data.load("digits", data_dir=digits_cache, seed=0).digest
    assert dataset_of("digits:test", digits_cache) == KnownData(name="digits", digests=(digest,))
    with pytest.raises(ValueError, match="unknown data set 'dogits'"):
        dataset_of("dogits:test", digits_cache)


def test_a_folder_is_of_the_data_set_that_it_lies_in(photos: list[str]) -> None:
    known = KnownData(
        name="photos", digests=(data.load("photos", data_dir=Path("d"), seed=0).digest,)
    )
    Path("link").symlink_to("photos/red")
    for text in (
        "photos",
        "photos/",
        "photos/red",
        photos[0],
        f"../{Path.cwd().name}/photos",
        "link",
    ):
        assert dataset_of(text, Path("d")) == known, text
    Path("else").mkdir()
    np.save("photos/a.npy", pixels(photos))
    for text in ("else", ".", "photos/a.npy", "@photos", "-"):
        assert dataset_of(text, Path("d")) is None, text
    assert dataset_of("photos", Path("other")) is None


def test_of_a_folder_that_has_changed_the_latest_digest_comes_first(photos: list[str]) -> None:
    first = data.load("photos", data_dir=Path("d"), seed=0).digest
    for file in Path("d/cache/index").iterdir():
        os.utime(file, (1, 1))
    Path("d/cache/index/damaged.json").write_text("{")
    Path(photos[0]).unlink()
    second = data.load("photos", data_dir=Path("d"), seed=0).digest
    assert dataset_of("photos", Path("d")) == KnownData(name="photos", digests=(second, first))


def test_where_no_folder_is_a_class_the_note_names_both(photos: list[str]) -> None:
    opened = open_source(
        "photos", classes=("0", "1"), metadata={}, data_dir=Path("d"), image_size=32
    )
    assert opened.notes == (
        "the model may be of another data set: its classes are '0', '1', and none of the images' "
        "folders is called so, but 'azure', 'blue', 'red'",
    )
    for text in ("photos/red", photos[0]):  # one folder may be called anything
        assert not open_source(
            text, classes=("0",), metadata={}, data_dir=Path("d"), image_size=32
        ).notes


@pytest.mark.parametrize("text", ["photos", "photos/red", "photos/red/00.png"])
def test_that_the_model_is_of_other_data_than_a_folder_is_noted(
    photos: list[str], text: str
) -> None:
    digest = data.load("photos", data_dir=Path("d"), seed=0).digest

    def notes(trained_on: str | None, data_dir: str = "d") -> tuple[str, ...]:
        metadata = {"dataset": "digits", "dataset_digest": trained_on} if trained_on else {}
        classes = ("red", "blue", "azure")
        options: Any = {"metadata": metadata, "data_dir": Path(data_dir), "image_size": 32}
        return open_source(text, classes=classes, **options).notes

    assert notes("f00") == (
        "the model was trained on other data ('digits', digest f00) than this is of ('photos', "
        f"digest {digest})",
    )
    assert notes(digest) == notes(None) == notes("f00", "elsewhere") == ()


# Ahead


def test_results_come_in_order_and_errors_where_they_belong() -> None:
    def work(number: int) -> int:
        time.sleep(0.002 * (number % 3))
        return 100 // (7 - number)

    results = prefetch(work, ((number, 0.2) for number in range(20)), threads=4)
    assert [next(results) for _ in range(7)] == [100 // (7 - number) for number in range(7)]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_no_more_is_read_ahead_than_weighs_as_much_as_allowed() -> None:
    taken = []

    def pieces() -> Iterator[tuple[int, float]]:
        for number in range(100):
            taken.append(number)
            yield number, 0.25

    for number, result in enumerate(prefetch(lambda piece: piece, pieces(), threads=2)):
        assert result == number
        assert len(taken) <= number + 4


def test_large_encoded_images_are_not_piled_up(
    photos: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_table(photos, "bytes")
    monkeypatch.setattr(chunks, "_BLOCK", 1)
    monkeypatch.setattr(chunks, "BYTES_AHEAD", 1)
    taken = []
    rows = inputs.Table.rows

    def watched(self: inputs.Table, start: int) -> Iterator[Any]:
        for row in rows(self, start):
            taken.append(row)
            yield row

    monkeypatch.setattr(inputs.Table, "rows", watched)
    opened: Iterator[Chunk] = source("t.parquet").read(1, 0)
    next(opened)
    assert len(taken) == 1
    opened.close()  # type: ignore[attr-defined]


def test_who_wants_no_more_leaves_no_thread_behind() -> None:
    results = prefetch(lambda piece: piece, ((number, 0.1) for number in range(100)), threads=3)
    next(results)
    assert threading.active_count() > 1
    results.close()  # type: ignore[attr-defined]
    assert not [t for t in threading.enumerate() if t.name.startswith("ThreadPoolExecutor")]


def test_decoding_goes_on_while_the_model_is_busy(
    photos: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = threading.Event()
    decoded = []
    work = chunks._decode

    def watched(block: Any, image_size: int) -> Any:
        result = work(block, image_size=image_size)
        decoded.append(block)
        if len(decoded) == 3:
            done.set()
        return result

    monkeypatch.setattr(chunks, "_decode", watched)
    monkeypatch.setattr(chunks, "_BLOCK", 2)
    opened = source("photos").read(2, 0)
    next(opened)
    assert done.wait(10)  # the second and third chunk, though only the first was asked for
