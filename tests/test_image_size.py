"""Images of another size than 32×32: read, kept apart in the cache, and predicted."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from small_sweep import small_settings
from tracking_helpers import COLOURS, ColourModel

from cnn import cache, images
from cnn.data import load, open_cached
from cnn.datasets import find_source
from cnn.images import decode, resize
from experiments.engine.ray_worker import DatasetMeta
from experiments.study.settings import Settings
from tracking import predict
from tracking.models.predictor import Predictor
from tracking.prediction.pipeline import chunk_size
from tracking.prediction.splits import dataset_of

SIZES = (8, 48, 512)


def noise(*shape: int) -> Any:
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def png(pixels: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def resized(pixels: Any, size: int) -> Any:
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR))


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Six images in a folder for each colour; return their paths, sorted."""
    monkeypatch.chdir(tmp_path)
    paths = [f"photos/{colour}/{k}.png" for colour in sorted(COLOURS) for k in range(6)]
    for index, path in enumerate(paths):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(png(noise(50, 40 + index, 3)))
    return paths


# Reading


@pytest.mark.parametrize("size", SIZES)
def test_files_and_arrays_get_the_size(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = noise(45, 17, 3)
    expected = resized(pixels, size)
    np.testing.assert_array_equal(decode(png(pixels), size), expected)
    np.testing.assert_array_equal(resize(pixels[None], size), expected[None])
    monkeypatch.setattr(images, "_LARGE", 100)  # decoded by the confined process
    np.testing.assert_array_equal(decode(png(pixels), size), expected)


def test_images_of_the_size_keep_their_very_pixels() -> None:
    pixels = noise(2, 48, 48, 3)
    assert resize(pixels, 48) is pixels
    np.testing.assert_array_equal(decode(png(pixels[0]), 48), pixels[0])


def test_more_images_than_memory_are_refused_with_both_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(images.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}.get)
    assert len(images.empty_images(20, 256)) == 20
    line = r"21 images of 256×256 pixels take 0.0 GB, and this machine has 0.0 GB of memory: give a"
    with pytest.raises(ValueError, match=line):
        images.empty_images(21, 256)


def test_a_data_set_has_the_size_and_the_splits_of_any_other(photos: list[str]) -> None:
    small, large = (
        load("photos", data_dir=Path("data"), seed=3, image_size=size) for size in (32, 48)
    )
    assert (small.image_size, large.image_size) == (32, 48)
    assert torch.equal(large.train.rows, small.train.rows)
    for path, image in zip(photos, large.train.all_images, strict=True):
        np.testing.assert_array_equal(image, resized(np.asarray(Image.open(path)), 48))


def test_the_digits_can_have_their_own_size(tmp_path: Path) -> None:
    digits = load("digits", data_dir=tmp_path, seed=0, image_size=8)
    assert digits.train.all_images[0, 0, :, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]


@pytest.mark.parametrize("size", [7, 513, 0, -32])
def test_a_size_out_of_the_range_is_refused(tmp_path: Path, size: int) -> None:
    with pytest.raises(ValueError, match=f"must be from 8 to 512 pixels: {size}$"):
        load("digits", data_dir=tmp_path, seed=0, image_size=size)


# The cache


def test_each_size_is_an_entry_of_its_own(photos: list[str]) -> None:
    digests = {
        size: load("photos", data_dir=Path("data"), seed=0, image_size=size).digest
        for size in (32, 48, 32)
    }
    assert digests[32] != digests[48]
    assert len(list(Path("data/cache/index").iterdir())) == 2
    again = load("photos", data_dir=Path("data"), seed=0, image_size=48)
    assert (again.digest, again.notes) == (digests[48], ())
    known = dataset_of("photos", Path("data"))
    assert known is not None
    assert set(known.digests) == set(digests.values())


def test_a_worker_opens_the_size_that_was_stored(photos: list[str]) -> None:
    dataset = load("photos", data_dir=Path("data"), seed=5, image_size=48)
    opened = open_cached(dataset.digest, Path("data"), 5)
    assert opened.image_size == 48
    assert torch.equal(opened.validation.images, dataset.validation.images)


def test_a_worker_on_a_cluster_gets_the_size_with_the_images() -> None:
    meta = DatasetMeta(
        name="", source="", digest="", labels=np.arange(12) % 2, classes=("a", "b"), given_test=0
    )
    assert meta.split(noise(12, 48, 48, 3), 0).image_size == 48


def test_entries_of_32_pixels_are_those_of_earlier_versions(tmp_path: Path) -> None:
    parts = ["2", PIL.__version__, "digits", importlib.metadata.version("scikit-learn")]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    source = find_source("digits", tmp_path)
    assert cache.key_of(source) == cache.key_of(source, 32) == key
    assert cache.key_of(source, 48) != key
    digest = load("digits", data_dir=tmp_path, seed=0).digest
    assert set(json.loads((tmp_path / "cache" / digest / "meta.json").read_text())) == {
        *("name", "source", "classes", "images", "given_test", "copies", "checksum")
    }


def test_an_entry_of_another_size_than_it_says_is_damaged(photos: list[str]) -> None:
    digest = load("photos", data_dir=Path("data"), seed=0, image_size=48).digest
    file = Path("data/cache") / digest / "meta.json"
    meta = json.loads(file.read_text())
    del meta["image_size"], meta["checksum"]
    file.write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="no undamaged data set"):
        open_cached(digest, Path("data"), 0)


def test_only_another_size_is_among_the_settings_of_a_study(photos: list[str]) -> None:
    def fingerprint(size: int) -> dict[str, Any]:
        data = load("photos", data_dir=Path("data"), seed=0, image_size=size)
        return small_settings("sqlite:///optuna.db").fingerprint(data)

    assert "image_size" not in fingerprint(32)
    assert fingerprint(48)["image_size"] == 48
    assert "image_size" not in Settings.__dataclass_fields__


# Prediction


class Watched(ColourModel):
    """Keeps the images that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(images)
        return super().forward(images)


def predictor_of(model: Watched, image_shape: Sequence[int] = (48, 48, 3)) -> Predictor:
    height, width, channels = image_shape
    return Predictor(
        model=model.eval(), classes=tuple(COLOURS), image_shape=(height, width, channels),
        uri="models:/m-0", run_id=None, metadata={"seed": 0},
    )  # fmt: skip


@pytest.mark.parametrize("source", ["photos", "photos.npy", "photos.parquet", "photos:train"])
def test_images_get_the_size_that_the_model_takes(
    photos: list[str], source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = [np.asarray(Image.open(path)) for path in photos]
    expected = np.stack([resized(each, 48) for each in pixels])
    if source == "photos.npy":
        np.save(source, noise(5, 20, 30, 3))
        expected = np.stack([resized(each, 48) for each in np.load(source)])
    if source == "photos.parquet":
        pq.write_table(pa.table({"image": [Path(path).read_bytes() for path in photos]}), source)
    if source == "photos:train":
        data = load("photos", data_dir=Path("data"), seed=0, image_size=48)
        expected = data.train.images.numpy()
    model = Watched()
    monkeypatch.setattr(predict, "_choose_model", lambda _: (predictor_of(model), "the model"))
    assert predict.main([source]) == 0
    np.testing.assert_array_equal(torch.cat(model.seen).numpy(), expected)


@pytest.mark.parametrize("shape", [(48, 32, 3), (48, 48, 1)])
def test_a_model_of_other_shapes_is_refused_in_one_line(
    photos: list[str],
    shape: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    predictor = predictor_of(Watched(), shape)
    monkeypatch.setattr(predict, "_choose_model", lambda _: (predictor, "the model"))
    assert predict.main(["photos"]) == 2
    line = f"the model takes images of {shape[0]}×{shape[1]} pixels and {shape[2]} channels"
    assert line in capsys.readouterr().err


def test_large_images_are_read_in_smaller_chunks() -> None:
    assert chunk_size(128, (32, 32, 3)) == chunk_size(128, (147, 147, 3)) == 1024
    assert chunk_size(128, (224, 224, 3)) == 384
    assert chunk_size(128, (512, 512, 3)) == 128


def test_a_split_has_the_digests_of_the_sizes_that_were_read(photos: list[str]) -> None:
    digest = load("photos", data_dir=Path("data"), seed=0, image_size=48).digest
    known = dataset_of("photos:test", Path("data"))
    assert known is not None
    assert known.digests == (digest,)  # nothing is read for 32×32
