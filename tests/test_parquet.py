"""Data sets in Parquet files: which files are read, what they may hold, and what is refused."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cnn.data import Dataset, load
from cnn.images import decode

LABELS = [k % 2 for k in range(10)]


def encoded(seed: int) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 9, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


IMAGES = [encoded(seed) for seed in range(15)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a folder `images` for a data set."""
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    return Path("images")


def write(
    file: str,
    images: Sequence[Any] = IMAGES[:10],
    labels: Any = LABELS,
    *,
    kind: str = "struct",
    names: Any = None,
) -> None:
    """Write a Parquet file as `datasets` does, or with plain bytes."""
    rows = {
        "struct": lambda: pa.array([{"bytes": image, "path": None} for image in images]),
        "bytes": lambda: pa.array(images, pa.binary()),
        "large": lambda: pa.array(images, pa.large_binary()),
    }[kind]()
    table = pa.table({"image": rows, "label": labels})
    if names is not None:
        feature = {"names": names, "_type": "ClassLabel"}
        about = json.dumps({"info": {"features": {"label": feature}}})
        table = table.replace_schema_metadata({"huggingface": about})
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file, row_group_size=4)


def loaded(**options: Any) -> Dataset:
    return load("images", data_dir=Path("cached"), seed=0, **options)


def refusal() -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 -- the callers look at the message
        loaded()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def decoded(images: Sequence[bytes], size: int = 32) -> Any:
    return np.stack([decode(image, size) for image in images])


@pytest.mark.parametrize("kind", ["struct", "bytes", "large"])
@pytest.mark.parametrize("size", [32, 16])
def test_images_are_bytes_or_a_struct_with_bytes(kind: str, size: int) -> None:
    write("images/train.parquet", kind=kind)
    dataset = loaded(image_size=size)
    np.testing.assert_array_equal(dataset.train.all_images, decoded(IMAGES[:10], size))
    assert dataset.train.all_labels.tolist() == LABELS
    assert (dataset.name, dataset.classes, dataset.given_test) == ("images", ("0", "1"), False)


@pytest.mark.parametrize("place", ["images", "images/data"])
def test_files_of_a_split_are_read_in_order_and_a_test_split_is_given(place: str) -> None:
    write(f"{place}/train-00001-of-00002.parquet", IMAGES[6:10], LABELS[6:])
    write(f"{place}/train-00000-of-00002-a5bb01.parquet", IMAGES[:6], LABELS[:6])
    write(f"{place}/test-00000-of-00001.parquet", IMAGES[10:], [1, 0, 1, 0, 1])
    write(f"{place}/unlabelled-00000-of-00001.parquet", IMAGES[10:], [0] * 5)
    dataset = loaded()
    np.testing.assert_array_equal(dataset.train.all_images, decoded(IMAGES))
    assert dataset.given_test
    assert dataset.test.labels.tolist() == [1, 0, 1, 0, 1]
    assert dataset.notes == ("not used, next to the splits: 'unlabelled-00000-of-00001.parquet'",)


def test_a_changed_file_is_read_again_and_an_unchanged_one_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write("images/train.parquet")
    digest = loaded().digest
    with monkeypatch.context() as patch:
        patch.setattr("cnn.parquet._read", lambda *_: pytest.fail("it is read again"))
        assert loaded().digest == digest
    write("images/train.parquet", IMAGES[1:11])
    assert loaded().digest != digest


@pytest.mark.parametrize(
    ("labels", "names", "classes", "first"),
    [
        (LABELS, ["cat", "dog"], ("cat", "dog"), [0, 1]),
        ([k + 5 for k in LABELS], None, ("5", "6"), [0, 1]),
        (LABELS, "cat", ("0", "1"), [0, 1]),  # no list of names
        (["dog", "cat"] * 5, None, ("cat", "dog"), [1, 0]),
        (pa.array(["dog", "cat"] * 5).dictionary_encode(), None, ("cat", "dog"), [1, 0]),
        (pa.array(LABELS, pa.int8()), None, ("0", "1"), [0, 1]),
    ],
)
def test_classes_are_named_by_the_metadata_or_by_the_labels(
    labels: Any, names: Any, classes: tuple[str, ...], first: list[int]
) -> None:
    write("images/train.parquet", labels=labels, names=names)
    dataset = loaded()
    assert dataset.classes == classes
    assert dataset.train.all_labels[:2].tolist() == first


def test_a_folder_of_images_may_have_a_table_beside_it() -> None:
    for name in ("a", "b"):
        Path(f"images/train/{name}").mkdir(parents=True)
        for index in range(4):
            Path(f"images/train/{name}/{index}.png").write_bytes(IMAGES[index])
    pq.write_table(pa.table({"x": [1]}), "images/train.parquet")
    assert len(loaded().train.all_images) == 8


# What is refused


@pytest.mark.parametrize("name", ["validation-00000-of-00001", "val", "dev-0"])
def test_a_validation_split_is_refused(name: str, tmp_path: Path) -> None:
    write("images/train.parquet")
    write(f"images/{name}.parquet")
    assert refusal() == (
        f"{str(tmp_path / 'images')!r} has a file '{name}.parquet', which would not be used "
        "(validation images are drawn from train): call it train-*.parquet as well, or move it "
        "away"
    )


def test_a_test_split_alone_is_refused() -> None:
    write("images/test.parquet")
    assert refusal().endswith(
        "images' has no Parquet files for training: it needs train-*.parquet, and test-*.parquet "
        "if there is a test split"
    )


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"labels": [0.5] * 10}, "train.parquet' is double: it must be integers or strings"),
        ({"labels": [0, None] * 5}, "5 labels in '"),
        ({"labels": [0] * 10}, "images': there is only one class, '0': there must be two or more"),
        ({"labels": [0] * 9 + [1]}, "class '1' has 1 images: at least 3 are needed"),
        ({"names": ["a", "b", "c"]}, "class 'c' has 0 images: at least 3 are needed"),
        ({"names": ["a"]}, "there is only one class, 'a'"),
        ({"images": [*IMAGES[:9], None], "kind": "bytes"}, "row 9 of '"),
        ({"images": [*IMAGES[:9], b"no image"]}, "train.parquet': 8 bytes is no image (known: "),
        ({"images": ["a.png"] * 10}, "train.parquet' is string: it must be bytes (binary), or a"),
    ],
)
def test_what_cannot_be_used_is_named(options: dict[str, Any], reason: str) -> None:
    write("images/train.parquet", **options)
    assert reason in refusal()


def test_labels_of_a_test_split_are_those_of_training() -> None:
    write("images/train.parquet")
    write("images/test.parquet", labels=[-1] * 10)
    assert "test labels has -1, which is no class: 0, 1" in refusal()
    write("images/test.parquet", labels=["0", "1"] * 5)
    assert "'label' of '" in refusal()


@pytest.mark.parametrize("missing", ["image", "label"])
def test_a_missing_column_is_named_with_those_that_are_there(missing: str) -> None:
    columns = {"image": IMAGES[:10], "label": LABELS}
    columns["x"] = columns.pop(missing)
    pq.write_table(pa.table(columns), "images/train.parquet")
    assert f"train.parquet' must have one column {missing!r}: it has '" in refusal()


@pytest.mark.parametrize("content", [b"", b"PAR1 no table PAR1"])
def test_a_damaged_file_is_named(content: bytes) -> None:
    Path("images/train.parquet").write_bytes(content)
    assert refusal().startswith("can't read the Parquet file '")


def test_a_truncated_column_is_named() -> None:
    write("images/train.parquet")
    content = bytearray(Path("images/train.parquet").read_bytes())
    content[100:2000] = bytes(1900)
    Path("images/train.parquet").write_bytes(content)
    assert "train.parquet'" in refusal()


def test_without_pyarrow_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    write("images/train.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert refusal().endswith("can't be read without the package pyarrow: pip install pyarrow")
