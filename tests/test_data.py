"""What `cnn.data` reads, how it splits it, what it keeps, and what it refuses."""

import gc
import hashlib
import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from file_server import FileServer
from PIL import Image

from cnn import cache, data, datasets, downloads
from cnn.data import load, notes_on_choosing, open_cached
from cnn.datasets import DATASETS, is_known

ROOT = Path(__file__).parents[1]


def make_folder(root, counts, *, size=(32, 32), seed=0):
    """Write `counts[part]` images of noise into each folder `part`, such as train/cat."""
    generator = np.random.default_rng(seed)
    for part, count in counts.items():
        (root / part).mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / part / f"{i:03}.bmp")
    return root


def rows(dataset):
    return [split.rows.tolist() for split in (dataset.train, dataset.validation, dataset.test)]


def counts(split, num_classes):
    return torch.bincount(split.labels, minlength=num_classes).tolist()


def refusal(name, data_dir, seed=0):
    """Return the one line with which `load` refuses."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 -- the callers look at the message
        load(str(name), data_dir=data_dir, seed=seed)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def forbid_decoding(monkeypatch):
    def refuse(source, image_size):
        raise AssertionError(f"decodes {source}")

    monkeypatch.setattr(datasets, "decode", refuse)


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "images", {"cat": 10, "dog": 5})


@pytest.fixture
def data_dir(tmp_path):
    return tmp_path / "data"


@pytest.fixture(scope="module")
def digits_dir(tmp_path_factory):
    """A data folder in which the digits are in the cache already."""
    data_dir = tmp_path_factory.mktemp("digits")
    load("digits", data_dir=data_dir, seed=0)
    return data_dir


# Digits


def test_digits_are_1797_images_of_ten_classes(digits_dir):
    digits = load("digits", data_dir=digits_dir, seed=0)
    assert digits.name == "digits"
    assert digits.classes == tuple("0123456789")
    assert digits.train.all_images.shape == (1797, 32, 32, 3)
    assert digits.train.all_images.dtype == torch.uint8
    assert digits.train.all_labels.dtype == torch.int64
    assert [len(split) for split in (digits.train, digits.validation, digits.test)] == [
        1079,
        359,
        359,
    ]


def test_the_first_digit_has_the_scanned_pixels(digits_dir):
    scan = [  # the first image of sklearn.datasets.load_digits(), a zero
        [0, 0, 5, 13, 9, 1, 0, 0],
        [0, 0, 13, 15, 10, 15, 5, 0],
        [0, 3, 15, 2, 0, 11, 8, 0],
        [0, 4, 12, 0, 0, 8, 8, 0],
        [0, 5, 8, 0, 0, 9, 8, 0],
        [0, 4, 11, 0, 1, 12, 7, 0],
        [0, 2, 14, 5, 10, 12, 0, 0],
        [0, 0, 6, 13, 10, 0, 0, 0],
    ]
    grey = [[round(value * 255 / 16) for value in line] for line in scan]
    image = Image.fromarray(np.array(grey, np.uint8)).convert("RGB")
    expected = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR))
    digits = load("digits", data_dir=digits_dir, seed=0)
    np.testing.assert_array_equal(digits.train.all_images[0], expected)
    assert digits.train.all_labels[0] == 0
    assert digits.train.all_images.max() == 255


# Folders


def test_a_folder_without_a_test_split_is_split_60_20_20_in_each_class(folder, data_dir):
    dataset = load(str(folder), data_dir=data_dir, seed=0)
    assert dataset.name == "images"
    assert dataset.source == str(folder)
    assert dataset.classes == ("cat", "dog")
    assert counts(dataset.train, 2) == [6, 3]
    assert counts(dataset.validation, 2) == [2, 1]
    assert counts(dataset.test, 2) == [2, 1]


def test_a_given_test_split_is_the_test_split_and_10_percent_of_train_validate(tmp_path, data_dir):
    parts = {"train/cat": 30, "train/dog": 14, "test/cat": 3, "test/dog": 4}
    folder = make_folder(tmp_path / "images", parts)
    dataset = load(str(folder), data_dir=data_dir, seed=0)
    assert counts(dataset.train, 2) == [27, 13]
    assert counts(dataset.validation, 2) == [3, 1]
    assert counts(dataset.test, 2) == [3, 4]
    files = sorted((folder / "test").rglob("*.bmp"))
    for image, label, file in zip(dataset.test.images, dataset.test.labels, files, strict=True):
        np.testing.assert_array_equal(image, np.asarray(Image.open(file)))
        assert dataset.classes[label] == file.parent.name


def test_train_alone_is_split_like_a_folder_without_a_test_split(tmp_path, data_dir):
    folder = make_folder(tmp_path / "images", {"train/a": 5, "train/b": 5})
    dataset = load(str(folder), data_dir=data_dir, seed=0)
    assert rows(dataset) == rows(load(str(folder / "train"), data_dir=data_dir, seed=0))


def test_images_of_any_size_and_mode_are_read_with_their_class(tmp_path, data_dir):
    folder = tmp_path / "images"
    exif = Image.Exif()
    exif[0x0112] = 6
    colours = {"red": (255, 0, 0), "white": (255, 255, 255)}
    for name, colour in colours.items():
        (folder / name / "deeper").mkdir(parents=True)
        image = Image.new("RGB", (50, 7), colour)
        image.save(folder / name / "a.jpg", exif=exif, quality=100, subsampling=0)
        image.convert("RGBA").save(folder / name / "b.png")
        image.convert("P").save(folder / name / "deeper" / "c.gif")
    Image.new("L", (3, 3), 255).save(folder / "white" / "d.png")
    Image.new("I;16", (80, 80), 65535).save(folder / "white" / "e.png")
    Image.new("1", (32, 32), 1).save(folder / "white" / "f.png")
    dataset = load(str(folder), data_dir=data_dir, seed=0)
    assert dataset.train.all_labels.tolist() == [0] * 3 + [1] * 6
    for image, label in zip(dataset.train.all_images, dataset.train.all_labels, strict=True):
        expected = torch.tensor(colours[dataset.classes[label]])
        assert (image.int() - expected).abs().max() <= 2


def test_a_folder_is_known_by_its_path_and_not_by_where_one_stands(folder, data_dir, monkeypatch):
    monkeypatch.chdir(folder)
    assert load(".", data_dir=data_dir, seed=0).source == str(folder)
    (data_dir / "link").symlink_to(folder)
    assert load(str(data_dir / "link"), data_dir=data_dir, seed=0).source == str(folder)


def test_every_image_gets_its_own_row_with_its_label(tmp_path, data_dir):
    folder = make_folder(tmp_path / "images", {"a": 70, "b": 33})
    dataset = load(str(folder), data_dir=data_dir, seed=0)
    expected = np.stack([np.asarray(Image.open(file)) for file in sorted(folder.rglob("*.bmp"))])
    np.testing.assert_array_equal(dataset.train.all_images, expected)
    assert dataset.train.all_labels.tolist() == [0] * 70 + [1] * 33


# Splits


@pytest.mark.parametrize("count", [3, 4, 7, 8, 13, 100])
def test_the_sizes_of_the_splits_are_the_rounded_shares(count):
    labels = np.repeat(np.arange(3), count)
    expected = max(1, int(count * 0.2 + 0.5))
    train, validation, test = data._split_rows(labels, given_test=0, seed=1)
    assert np.bincount(labels[validation]).tolist() == [expected] * 3
    assert np.bincount(labels[test]).tolist() == [expected] * 3
    assert np.bincount(labels[train]).tolist() == [count - 2 * expected] * 3


@pytest.mark.parametrize("given_test", [0, 7])
def test_splits_are_disjoint_and_cover_everything(given_test):
    labels = np.random.default_rng(0).integers(0, 4, 200)
    for seed in range(5):
        drawn = data._split_rows(labels, given_test=given_test, seed=seed)
        assert sorted(np.concatenate(drawn)) == list(range(200))


def test_the_seed_alone_decides_on_the_split(folder, tmp_path):
    first, again = (load(str(folder), data_dir=tmp_path / name, seed=3) for name in "ab")
    other = load(str(folder), data_dir=tmp_path / "a", seed=4)
    assert rows(first) == rows(again)
    assert sorted(rows(first)[2]) != sorted(rows(other)[2])


def test_the_split_of_a_seed_is_the_same_on_every_machine():
    labels = np.arange(20) % 2
    drawn = data._split_rows(labels, given_test=0, seed=7)
    assert [part.tolist() for part in drawn] == [
        [17, 6, 7, 2, 5, 3, 9, 0, 19, 16, 14, 12],
        [8, 4, 11, 13],
        [10, 1, 18, 15],
    ]


def test_global_random_state_plays_no_part(folder, data_dir):
    np.random.seed(0)  # noqa: NPY002 -- the state that must not matter
    torch.manual_seed(0)
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = load(str(folder), data_dir=data_dir, seed=3)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    np.random.seed(1)  # noqa: NPY002
    assert rows(first) == rows(load(str(folder), data_dir=data_dir, seed=3))


def test_a_given_test_split_is_the_same_for_all_seeds(tmp_path, data_dir):
    parts = {"train/cat": 20, "train/dog": 20, "test/cat": 3, "test/dog": 4}
    folder = make_folder(tmp_path / "images", parts)
    datasets = [load(str(folder), data_dir=data_dir, seed=seed) for seed in range(5)]
    assert all(dataset.test.rows.tolist() == list(range(40, 47)) for dataset in datasets)
    assert len({tuple(sorted(dataset.validation.rows.tolist())) for dataset in datasets}) == 5


def test_the_first_rows_of_a_drawn_split_are_not_of_one_class(digits_dir):
    digits = load("digits", data_dir=digits_dir, seed=0)
    for split in (digits.train, digits.validation, digits.test):
        assert len(split.labels[:100].unique()) == 10


# Batches


def test_a_batch_is_the_images_and_labels_at_these_positions(digits_dir):
    split = load("digits", data_dir=digits_dir, seed=0).validation
    positions = [5, 0, 358, 5]
    images, labels = split.batch(torch.tensor(positions))
    for i, position in enumerate(positions):
        row = split.rows[position]
        assert torch.equal(images[i], split.all_images[row])
        assert labels[i] == split.all_labels[row]
    everything = split.batch(torch.arange(len(split)))
    assert torch.equal(everything[0], split.images)
    assert torch.equal(everything[1], split.labels)


def test_writing_into_a_batch_or_the_pool_leaves_the_cache_as_it_is(folder, data_dir):
    dataset = load(str(folder), data_dir=data_dir, seed=0)
    kept = dataset.train.all_images.clone()
    dataset.train.batch(torch.arange(3))[0].zero_()
    assert torch.equal(dataset.train.all_images, kept)
    dataset.train.all_images.zero_()
    assert torch.equal(load(str(folder), data_dir=data_dir, seed=0).train.all_images, kept)


def test_on_the_cpu_a_split_is_mapped_not_copied(digits_dir):
    digits = load("digits", data_dir=digits_dir, seed=0)
    assert digits.train.to("cpu") is digits.train
    assert digits.train.to(torch.device("cpu")) is digits.train
    assert digits.train.all_images.data_ptr() == digits.test.all_images.data_ptr()
    mapped = Path("/proc/self/maps")
    if mapped.exists():
        assert f"{digits.digest}/images.npy" in mapped.read_text()


def test_on_another_device_a_split_holds_its_own_images_alone(digits_dir):
    split = load("digits", data_dir=digits_dir, seed=0).test
    moved = split.to("meta")
    assert moved.all_images.shape == (len(split), 32, 32, 3)
    assert moved.all_images.is_contiguous()
    assert moved.all_labels.shape == (len(split),)
    assert {moved.all_images.device.type, moved.all_labels.device.type, moved.rows.device.type} == {
        "meta"
    }


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_on_a_gpu_equal_those_on_the_cpu(digits_dir):
    split = load("digits", data_dir=digits_dir, seed=0).train
    positions = torch.tensor([7, 0, 1078])
    images, labels = split.to("cuda").batch(positions.to("cuda"))
    expected = split.batch(positions)
    assert torch.equal(images.cpu(), expected[0])
    assert torch.equal(labels.cpu(), expected[1])


# The digest


def test_the_digest_is_over_all_bytes(folder, data_dir):
    dataset = load(str(folder), data_dir=data_dir, seed=0)
    content = json.dumps([["cat", "dog"], [15, 32, 32, 3], 0]).encode()
    for file in sorted(folder.rglob("*.bmp")):
        content += np.asarray(Image.open(file)).tobytes()
    content += np.array([0] * 10 + [1] * 5, "<i8").tobytes()
    assert dataset.digest == hashlib.sha256(content).hexdigest()[:32]


def test_the_digest_does_not_depend_on_place_seed_or_file_format(folder, data_dir, tmp_path):
    digest = load(str(folder), data_dir=data_dir, seed=0).digest
    copy = tmp_path / "elsewhere" / "other name"
    shutil.copytree(folder, copy)
    for file in list(copy.rglob("*.bmp")):
        Image.open(file).save(file.with_suffix(".png"))
        file.unlink()
    assert load(str(copy), data_dir=tmp_path / "other", seed=9).digest == digest
    assert load(str(copy), data_dir=data_dir, seed=9).source == str(copy)


def last_bit_of_last_pixel(folder):
    file = max(folder.rglob("*.bmp"))
    pixels = np.array(Image.open(file))
    pixels[-1, -1, -1] ^= 1
    Image.fromarray(pixels).save(file)


@pytest.mark.parametrize(
    "change",
    [
        last_bit_of_last_pixel,
        lambda folder: (folder / "cat").rename(folder / "bat"),
        lambda folder: (folder / "cat/009.bmp").rename(folder / "dog/000a.bmp"),
        lambda folder: (folder / "cat/009.bmp").unlink(),
    ],
)
def test_the_digest_changes_with_pixels_labels_names_and_number(folder, data_dir, change):
    before = load(str(folder), data_dir=data_dir, seed=0).digest
    change(folder)
    assert load(str(folder), data_dir=data_dir, seed=0).digest != before


def test_the_digest_tells_a_given_test_split_from_the_same_images_without(tmp_path, data_dir):
    images = np.zeros((8, 32, 32, 3), np.uint8)
    labels = np.array([0, 0, 1, 1, 0, 0, 1, 1])
    digests = {
        cache._digest(
            cache.ImagePool(images=images, labels=labels, classes=("a", "b"), given_test=given)
        )
        for given in (0, 4, 5)
    }
    assert len(digests) == 3


# The cache


def test_a_warm_start_decodes_nothing(folder, data_dir, monkeypatch):
    cold = load(str(folder), data_dir=data_dir, seed=0)
    forbid_decoding(monkeypatch)
    warm = load(str(folder), data_dir=data_dir, seed=0)
    assert warm.digest == cold.digest
    assert warm.classes == cold.classes
    assert rows(warm) == rows(cold)
    assert torch.equal(warm.train.images, cold.train.images)


def test_a_warm_start_writes_nothing(folder, data_dir, monkeypatch):
    load(str(folder), data_dir=data_dir, seed=0)
    before = sorted((file, file.stat().st_mtime_ns) for file in data_dir.rglob("*"))
    load(str(folder), data_dir=data_dir, seed=1)
    assert sorted((file, file.stat().st_mtime_ns) for file in data_dir.rglob("*")) == before


def test_a_warm_start_imports_neither_scikit_learn_nor_torchvision(digits_dir, data_dir, cifar):
    cifar10 = load("cifar10", data_dir=data_dir, seed=0)
    script = (
        "import sys; from pathlib import Path; from cnn.data import load, open_cached\n"
        "digits, cifar, digest = sys.argv[1:]\n"
        "load('digits', data_dir=Path(digits), seed=0)\n"
        "print(load('cifar10', data_dir=Path(cifar), seed=0).test.rows.tolist())\n"
        "print(open_cached(digest, Path(cifar), 0).train.rows.tolist())\n"
        "heavy = {'sklearn', 'torchvision', 'scipy', 'pandas', 'mlflow', 'optuna'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    arguments = [str(digits_dir), str(data_dir), cifar10.digest]
    command = [sys.executable, "-W", "error", "-c", script, *arguments]
    done = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f"{cifar10.test.rows.tolist()}\n{cifar10.train.rows.tolist()}\n"


def test_a_worker_opens_the_same_splits_without_the_source(folder, data_dir):
    dataset = load(str(folder), data_dir=data_dir, seed=5)
    shutil.rmtree(folder)
    opened = open_cached(dataset.digest, data_dir, 5)
    assert rows(opened) == rows(dataset)
    assert torch.equal(opened.test.images, dataset.test.images)
    assert (opened.name, opened.source, opened.classes, opened.digest) == (
        dataset.name,
        dataset.source,
        dataset.classes,
        dataset.digest,
    )


@pytest.mark.parametrize("digest", ["0" * 32, "../cache", ""])
def test_a_worker_that_finds_nothing_says_so(data_dir, digest):
    with pytest.raises(ValueError, match="no undamaged data set"):
        open_cached(digest, data_dir, 0)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("name", ["images.npy", "labels.npy", "meta.json"])
@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(bytes(file.stat().st_size)),
        lambda file: file.write_bytes(file.read_bytes() + b"more"),
        lambda file: file.unlink(),
        lambda file: shutil.rmtree(file.parent),
        lambda file: (shutil.rmtree(file.parent), file.parent.touch()),
    ],
)
def test_a_damaged_cache_is_built_again(folder, data_dir, name, damage):
    whole = load(str(folder), data_dir=data_dir, seed=0)
    expected = whole.train.images
    files = {file.name: file.read_bytes() for file in cache_of(whole, data_dir).iterdir()}
    damage(cache_of(whole, data_dir) / name)
    with pytest.raises(ValueError, match="no undamaged data set"):
        open_cached(whole.digest, data_dir, 0)
    again = load(str(folder), data_dir=data_dir, seed=0)
    assert again.digest == whole.digest
    assert torch.equal(again.train.images, expected)
    rebuilt = {file.name: file.read_bytes() for file in cache_of(whole, data_dir).iterdir()}
    assert rebuilt == files
    assert_nothing_is_left_over(data_dir)


def cache_of(dataset, data_dir):
    return data_dir / "cache" / dataset.digest


def assert_nothing_is_left_over(data_dir):
    assert list(data_dir.rglob(".*")) == []


def test_meta_data_of_another_shape_is_damage(folder, data_dir):
    dataset = load(str(folder), data_dir=data_dir, seed=0)
    file = cache_of(dataset, data_dir) / "meta.json"
    meta = json.loads(file.read_text())
    for wrong in ({**meta, "images": 14}, {**meta, "classes": None}, [], {}):
        file.write_text(json.dumps(wrong))
        load(str(folder), data_dir=data_dir, seed=0)
        assert json.loads(file.read_text()) == meta


def overwrite(file, position, content):
    with file.open("r+b") as stream:
        stream.seek(position, os.SEEK_SET if position >= 0 else os.SEEK_END)
        stream.write(content)


def edit_meta(entry, **changes):
    file = entry / "meta.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: overwrite(entry / "images.npy", 5000, bytes(40)),
        lambda entry: overwrite(entry / "images.npy", -1, b"\x7f"),
        lambda entry: overwrite(entry / "labels.npy", -8, (10**9).to_bytes(8, "little")),
        lambda entry: overwrite(entry / "labels.npy", -8, (0).to_bytes(8, "little")),
        lambda entry: edit_meta(entry, classes=["cat", "dig"]),
        lambda entry: edit_meta(entry, given_test=1),
        lambda entry: edit_meta(entry, given_test=False),
        lambda entry: edit_meta(entry, name="else"),
        lambda entry: edit_meta(entry, copies=[[3, 0]]),
        lambda entry: (entry / "meta.json").write_text("[" * 100_000),
        lambda entry: overwrite(entry / "images.npy", 10, b"{(((((((((((("),
    ],
)
def test_a_changed_cache_is_found_out_and_read_again_and_said(folder, data_dir, damage):
    whole = load(str(folder), data_dir=data_dir, seed=0)
    expected = whole.train.images, whole.train.labels
    assert not any("damaged" in note for note in whole.notes)
    entry = cache_of(whole, data_dir)
    damage(entry)
    with pytest.raises(ValueError, match="no undamaged data set"):
        open_cached(whole.digest, data_dir, 0)
    again = load(str(folder), data_dir=data_dir, seed=0)
    (note,) = (note for note in again.notes if "damaged" in note)
    assert note == f"{str(entry)!r} was damaged: its images were read again from {folder}"
    assert again.digest == whole.digest
    assert again.classes == whole.classes
    assert torch.equal(again.train.images, expected[0])
    assert torch.equal(again.train.labels, expected[1])
    assert load(str(folder), data_dir=data_dir, seed=0).notes == whole.notes
    assert_nothing_is_left_over(data_dir)


def make_earlier(entry):
    """Let an entry be as those that were written before there was a checksum."""
    file = entry / "meta.json"
    meta = json.loads(file.read_text())
    del meta["checksum"], meta["copies"]
    file.write_text(json.dumps(meta, indent=2))


def test_an_entry_of_an_earlier_version_is_checked_by_its_digest_too(folder, data_dir, monkeypatch):
    shutil.copy(folder / "cat/000.bmp", folder / "cat/000b.bmp")
    dataset = load(str(folder), data_dir=data_dir, seed=0)
    entry = cache_of(dataset, data_dir)
    now = (entry / "meta.json").read_bytes()
    make_earlier(entry)
    opened = open_cached(dataset.digest, data_dir, 0)
    assert torch.equal(opened.train.images, dataset.train.images)
    with monkeypatch.context() as patch:
        forbid_decoding(patch)
        assert load(str(folder), data_dir=data_dir, seed=0).notes == dataset.notes
    assert (entry / "meta.json").read_bytes() == now  # the copies are noted
    make_earlier(entry)
    overwrite(entry / "labels.npy", -8, (0).to_bytes(8, "little"))
    assert "was damaged" in load(str(folder), data_dir=data_dir, seed=0).notes[0]
    assert_nothing_is_left_over(data_dir)


def test_an_entry_of_an_earlier_version_may_be_read_only(folder, data_dir, monkeypatch):
    dataset = load(str(folder), data_dir=data_dir, seed=0)
    make_earlier(cache_of(dataset, data_dir))

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", refuse)
    assert load(str(folder), data_dir=data_dir, seed=0).digest == dataset.digest


def test_an_entry_that_was_removed_is_no_damage(folder, data_dir):
    whole = load(str(folder), data_dir=data_dir, seed=0)
    shutil.rmtree(cache_of(whole, data_dir))
    assert load(str(folder), data_dir=data_dir, seed=0).notes == whole.notes


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"digest": "../../x"}', '{"digest": 5}', "\xff"]
)
def test_a_damaged_index_is_written_again(folder, data_dir, content):
    load(str(folder), data_dir=data_dir, seed=0)
    (entry,) = (data_dir / "cache" / "index").iterdir()
    good = entry.read_text()
    entry.write_text(content, encoding="latin1")
    load(str(folder), data_dir=data_dir, seed=0)
    assert entry.read_text() == good


def test_a_changed_file_is_seen_even_with_its_old_size_and_time(folder, data_dir):
    before = load(str(folder), data_dir=data_dir, seed=0)
    file = folder / "cat" / "000.bmp"
    status = file.stat()
    Image.new("RGB", (32, 32), "red").save(file)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    after = load(str(folder), data_dir=data_dir, seed=0)
    assert after.digest != before.digest
    assert after.train.all_images[0].flatten(0, 1).unique(dim=0).tolist() == [[255, 0, 0]]


def test_another_pillow_decodes_again(folder, data_dir, monkeypatch):
    load(str(folder), data_dir=data_dir, seed=0)
    monkeypatch.setattr("PIL.__version__", "99")
    forbid_decoding(monkeypatch)
    with pytest.raises(AssertionError, match="decodes"):
        load(str(folder), data_dir=data_dir, seed=0)


def test_several_may_fill_the_cache_at_once(folder, data_dir, monkeypatch):
    barrier = threading.Barrier(6, timeout=10)
    publish = cache._publish

    def publish_together(new, final):
        barrier.wait()
        return publish(new, final)

    monkeypatch.setattr(cache, "_publish", publish_together)
    with ThreadPoolExecutor(6) as executor:
        futures = [executor.submit(load, str(folder), data_dir=data_dir, seed=0) for _ in range(6)]
    datasets = [future.result() for future in futures]
    for dataset in datasets:
        assert torch.equal(dataset.train.images, datasets[0].train.images)
    monkeypatch.undo()
    forbid_decoding(monkeypatch)
    load(str(folder), data_dir=data_dir, seed=0)
    assert_nothing_is_left_over(data_dir)


def test_another_process_may_be_faster_by_a_moment(folder, data_dir, tmp_path, monkeypatch):
    other = load(str(folder), data_dir=tmp_path / "other", seed=0)
    map_pool = cache._map_pool

    def map_late(path):
        if path.parent.name.startswith(".writing-"):  # the last step before the final name
            shutil.copytree(cache_of(other, tmp_path / "other"), data_dir / "cache" / path.name)
        return map_pool(path)

    monkeypatch.setattr(cache, "_map_pool", map_late)
    dataset = load(str(folder), data_dir=data_dir, seed=0)
    assert torch.equal(dataset.train.images, other.train.images)
    assert_nothing_is_left_over(data_dir)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("no space left on device")])
def test_what_is_cut_off_while_writing_leaves_nothing(folder, data_dir, monkeypatch, error):
    write, calls = cache._write, []

    def write_one_file(file, content):
        calls.append(file)
        if len(calls) == 2:
            raise error
        write(file, content)

    monkeypatch.setattr(cache, "_write", write_one_file)
    expected = KeyboardInterrupt if error is KeyboardInterrupt else ValueError
    with pytest.raises(expected):
        load(str(folder), data_dir=data_dir, seed=0)
    assert sorted(path.name for path in data_dir.rglob("*")) == ["cache", "index"]


def test_files_are_made_where_they_will_stay(folder, data_dir, monkeypatch):
    """A file can't be renamed from one file system, such as that of /tmp, to another."""
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    load(str(folder), data_dir=data_dir, seed=0)


def test_all_that_is_kept_is_on_the_disk_before_it_counts(folder, data_dir, monkeypatch):
    synced = set()
    monkeypatch.setattr(os, "fsync", lambda stream: synced.add(os.fstat(stream).st_ino))
    load(str(folder), data_dir=data_dir, seed=0)
    kept = {file.stat().st_ino for file in data_dir.rglob("*") if file.is_file()}
    assert len(kept) == 4
    assert kept <= synced


# What is refused


def test_the_table_of_names_is_what_is_known():
    assert sorted(DATASETS) == [
        *("cifar10", "cifar100", "digits", "fashion_mnist", "kmnist", "mnist", "stl10", "svhn")
    ]
    assert is_known("digits")
    assert not is_known("./digits")


@pytest.mark.parametrize("name", ["minst", "no/such/folder", "", "a\nb"])
def test_an_unknown_name_is_refused_with_what_is_allowed(data_dir, name):
    message = refusal(name, data_dir)
    assert message == (
        f"unknown data set {name!r}: choose cifar10, cifar100, digits, fashion_mnist, kmnist, "
        "mnist, stl10, svhn, the path of a folder, or a function (package.module:function or "
        "file.py:function)"
    )
    assert not data_dir.exists()


def test_a_negative_seed_is_refused(digits_dir):
    assert refusal("digits", digits_dir, seed=-1) == "the seed must be 0 or more: -1"


def test_a_file_that_is_no_image_is_named_and_nothing_kept(folder, data_dir):
    (folder / "dog" / "labels.csv").write_text("a,b\n")
    message = refusal(folder, data_dir)
    assert message.startswith(f"{str(folder / 'dog' / 'labels.csv')!r} is no image")
    assert sorted(path.name for path in data_dir.rglob("*")) == ["cache", "index"]


def test_of_many_bad_files_the_first_is_named(tmp_path, data_dir):
    folder = make_folder(tmp_path / "images", {"a": 200, "b": 3})
    for i in range(40, 200):
        truncate(folder / "a" / f"{i:03}.bmp")
        (folder / "a" / f"{i:03}.bmp").write_bytes(b"BM")
    assert "040.bmp" in refusal(folder, data_dir)


def test_a_bad_file_ends_the_decoding_of_the_others(monkeypatch):
    seen = []

    def fail_at_first(file, image_size):
        seen.append(file)
        if file.name == "0":
            raise ValueError("bad")
        time.sleep(0.001)
        return np.zeros((32, 32, 3), np.uint8)

    monkeypatch.setattr(datasets, "decode", fail_at_first)
    with pytest.raises(ValueError, match="bad"):
        datasets._decode_all([Path(str(i)) for i in range(3200)], 32)
    assert len(seen) < 1600


@pytest.mark.parametrize(
    ("parts", "complaint"),
    [
        ({}, "no images in"),
        ({"a": 0, "b": 0}, "no images in"),
        ({"train": 3, "test": 3}, "no images in"),
        ({"train/a": 3, "train/b": 3, "test": 0}, "differ in classes: ['a', 'b']"),
        ({"train/a": 3, "train/b": 3, "test/a": 0, "test/b": 0}, "no images in"),
        ({"a": 5}, "only one class in"),
        ({"train/a": 5, "test/a": 5}, "only one class in"),
        ({"a": 5, "b": 2}, "class 'b'"),
        ({"a": 5, "b": 0}, "has 0 images: at least 3"),
        ({"train/a": 5, "train/b": 1, "test/a": 1, "test/b": 1}, "has 1 images: at least 2"),
        ({"train/a": 5, "train/b": 2, "test/a": 1, "test/b": 0}, "has 0 images: at least 1"),
        ({"train/a": 5, "train/b": 5, "test/a": 1, "test/c": 1}, "differ in classes: ['b', 'c']"),
        ({"test/a": 5, "test/b": 5}, "none that is called train"),
        ({"Train/a": 5, "Train/b": 5, "Val/a": 5}, "a folder 'Val', which would not be used"),
    ],
)
def test_folders_that_cannot_be_split_are_refused_by_name(tmp_path, data_dir, parts, complaint):
    folder = tmp_path / "images"
    folder.mkdir()
    message = refusal(make_folder(folder, parts), data_dir)
    assert complaint in message
    assert str(folder) in message


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Training", "Testing"),
        ("TRAIN", "test"),
        ("train2017", "test2017"),
        ("train_images", "test_images"),
        ("trainset", "hold-out"),
        ("seg_train", "seg_test"),
        ("seg_train/seg_train", "seg_test/seg_test"),
        ("asl_alphabet_Train", "aslTest"),
        ("train", None),
        ("my_train", None),
    ],
)
def test_folders_with_the_names_of_splits_are_splits(tmp_path, data_dir, train, test):
    counts = {f"{train}/a": 6, f"{train}/b": 5}
    if test:
        counts |= {f"{test}/a": 2, f"{test}/b": 1}
    dataset = load(str(make_folder(tmp_path / "images", counts)), data_dir=data_dir, seed=0)
    assert dataset.classes == ("a", "b")
    assert dataset.given_test == (test is not None)
    assert len(dataset.test) == (3 if test else 2)
    assert not any("not used" in note for note in dataset.notes)


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (["Train/a", "Train/b", "train/a", "train/b"], "2 folders for train, ['Train', 'train']"),
        (["train/a", "train/b", "Test/a", "test/a"], "2 folders for test, ['Test', 'test']"),
        (["trainA", "trainB", "testA", "testB"], "2 folders for train, ['trainA', 'trainB']"),
        (["train_old/a", "my_train/a"], "only one class"),
        (["steam_train", "electric_train"], "2 folders for train"),
        (["cats", "dogs", "test"], "a folder 'test', but none that is called train"),
        (["cats", "dogs", "val2"], "a folder 'val2', but none that is called train"),
        (["cats", "dogs", "holdout"], "a folder 'holdout', but none"),
        (["cats", "train"], "no images in"),
        (["train/a", "train/b", "dev/a"], "a folder 'dev', which would not be used"),
        (["seg_train/a", "seg_train/b", "seg_val/a"], "a folder 'seg_val', which would not be"),
        (["train", "test"], "no images in"),
        (["train/a", "train/b", "test/a", "test/B"], "differ in classes: ['B', 'b']"),
    ],
)
def test_splits_that_are_not_understood_are_refused_by_name(tmp_path, data_dir, names, complaint):
    folder = make_folder(tmp_path / "images", dict.fromkeys(names, 3))
    assert complaint in refusal(folder, data_dir)


@pytest.mark.parametrize(
    "classes",
    [
        ("bus", "car", "train"),
        ("bullet_train", "bus", "car"),
        ("train_station", "bus_stop"),
        ("test_tube", "flask"),
        ("invalid", "valid"),
        ("Restaurant", "contest", "trainer"),
    ],
)
def test_classes_may_have_names_that_hold_a_split_s(tmp_path, data_dir, classes):
    folder = make_folder(tmp_path / "images", dict.fromkeys(classes, 3))
    assert load(str(folder), data_dir=data_dir, seed=0).classes == tuple(sorted(classes))


def test_folders_beside_the_splits_are_told_of(tmp_path, data_dir):
    parts = dict.fromkeys(["train/a", "train/b", "test/a", "test/b", "extra", "train_old/c"], 3)
    dataset = load(str(make_folder(tmp_path / "images", parts)), data_dir=data_dir, seed=0)
    assert "not used, next to the splits: 'extra', 'train_old'" in dataset.notes


def test_splits_within_the_classes_are_told_of(tmp_path, data_dir):
    parts = dict.fromkeys(["a/train", "a/test", "b/train", "b/test"], 3)
    dataset = load(str(make_folder(tmp_path / "images", parts)), data_dir=data_dir, seed=0)
    assert dataset.classes == ("a", "b")
    assert any("folders 'test', 'train': they are read as one" in note for note in dataset.notes)


def test_numbered_folders_with_the_same_folders_in_each_are_told_of(tmp_path, data_dir):
    parts = dict.fromkeys(["fold1/cat", "fold1/dog", "fold2/cat", "fold2/dog"], 3)
    dataset = load(str(make_folder(tmp_path / "images", parts)), data_dir=data_dir, seed=0)
    assert dataset.classes == ("fold1", "fold2")
    assert any("in each are folders 'cat', 'dog': if those" in note for note in dataset.notes)


@pytest.mark.parametrize(
    "parts",
    [
        ("cat/front", "cat/back", "dog/front", "dog/back"),  # other names
        ("class1", "class2"),
        ("0", "1", "10"),
        ("1/a", "1/b", "2/c", "2/d"),
        ("1/all", "2/all"),
    ],
)
def test_ordinary_folders_are_not_told_of(tmp_path, data_dir, parts):
    folder = make_folder(tmp_path / "images", dict.fromkeys(parts, 3))
    notes = load(str(folder), data_dir=data_dir, seed=0).notes
    assert not any("if those are the classes" in note for note in notes)


def test_what_systems_leave_behind_is_no_class_and_no_image(folder, data_dir):
    before = load(str(folder), data_dir=data_dir, seed=0)
    for name in ("@eaDir", "__MACOSX", "$RECYCLE.BIN", "lost+found", "#recycle", ".cache"):
        shutil.copytree(folder / "cat", folder / name / "cat")
    for name in ("ehthumbs.db", "Icon\r", ".DS_Store", "desktop.ini", "._000.bmp"):
        (folder / "cat" / name).write_text("no image")
    shutil.copytree(folder / "dog", folder / "cat" / "@eaDir")
    after = load(str(folder), data_dir=data_dir, seed=0)
    assert after.digest == before.digest
    (note,) = set(after.notes) - set(before.notes)
    assert note.startswith("skipped 12 hidden or system files or folders: '@eaDir' (2), ")


def test_hidden_files_are_counted_in_splits_once(tmp_path, data_dir):
    parts = dict.fromkeys(["train/a", "train/b", "test/a", "test/b"], 3)
    folder = make_folder(tmp_path / "images", parts)
    for part in ("", "train", "test", "train/a", "test/b"):
        (folder / part / ".DS_Store").touch()
    dataset = load(str(folder), data_dir=data_dir, seed=0)
    assert "skipped 5 hidden or system files or folders: '.DS_Store' (5)" in dataset.notes


# What people should know of a split


def notes_of(dataset, word):
    return [note for note in dataset.notes if word in note]


def test_equal_images_in_two_splits_are_counted(tmp_path, data_dir):
    parts = {"train/a": 10, "train/b": 10, "test/a": 5, "test/b": 5}
    folder = make_folder(tmp_path / "images", parts)
    assert notes_of(load(str(folder), data_dir=data_dir, seed=0), "same pixels") == []
    for i in range(3):  # of another format, and another class
        Image.open(folder / f"train/a/00{i}.bmp").save(folder / f"test/b/copy{i}.png")
    dataset = load(str(folder), data_dir=data_dir, seed=0)
    assert notes_of(dataset, "same pixels") == [
        "3 of 13 test images have the same pixels as an image in train or validation: accuracy on "
        "them says nothing about new images"
    ]


def test_copies_within_a_drawn_data_set_are_counted_slowly_and_fast_alike(tmp_path, data_dir):
    folder = make_folder(tmp_path / "images", {"a": 20, "b": 20})
    for i in range(20):
        shutil.copy(folder / f"a/{i:03}.bmp", folder / f"a/{i:03} (1).bmp")
    dataset = load(str(folder), data_dir=data_dir, seed=0)
    train, validation = (
        {image.numpy().tobytes() for image in split.images}
        for split in (dataset.train, dataset.validation)
    )
    count = sum(image.numpy().tobytes() in train for image in dataset.validation.images)
    assert 0 < count < len(dataset.validation)
    (note,) = notes_of(dataset, "validation images have the same pixels")
    assert note.startswith(f"{count} of {len(dataset.validation)} validation images")
    assert len(validation) + len(train) < 60


def test_digits_have_no_notes(digits_dir):
    digits = load("digits", data_dir=digits_dir, seed=0)
    assert (digits.notes, [*notes_on_choosing(digits)]) == ((), [])


def test_a_small_validation_split_is_told_of_with_its_resolution(tmp_path, data_dir):
    folder = make_folder(tmp_path / "images", {"a": 40, "b": 20}, size=(2, 2))
    assert tuple(notes_on_choosing(load(str(folder), data_dir=data_dir, seed=0))) == (
        "the validation split has 12 images, fewer than 100: one image is 8.3 points of accuracy, "
        "so smaller differences between configurations can't be seen",
    )


def test_a_validation_split_of_nearly_one_class_is_told_of(tmp_path, data_dir):
    folder = make_folder(tmp_path / "images", {"a": 500, "b": 20}, size=(4, 4))
    (note,) = notes_on_choosing(load(str(folder), data_dir=data_dir, seed=0))
    assert note == (
        "100 of 104 validation images are of class 'a': a network that always answers so has "
        "96.2 % accuracy"
    )


def test_images_beside_the_class_folders_do_not_make_a_data_set(tmp_path, data_dir):
    folder = make_folder(tmp_path, {"images": 5}) / "images"
    assert "a folder for each class" in refusal(folder, data_dir)


def test_three_of_a_class_are_enough_without_a_test_split_and_two_with_one(tmp_path, data_dir):
    alone = make_folder(tmp_path / "alone", {"a": 3, "b": 3})
    assert [len(part) for part in rows(load(str(alone), data_dir=data_dir, seed=0))] == [2, 2, 2]
    parts = {"train/a": 2, "train/b": 2, "test/a": 1, "test/b": 1}
    given = make_folder(tmp_path / "given", parts)
    assert [len(part) for part in rows(load(str(given), data_dir=data_dir, seed=0))] == [2, 2, 2]


def test_a_broken_link_among_the_images_is_named(folder, data_dir):
    (folder / "cat" / "x.png").symlink_to("nowhere")
    assert str(folder / "cat" / "x.png") in refusal(folder, data_dir)


def test_a_data_folder_that_cannot_be_written_is_named_before_decoding(
    folder, tmp_path, monkeypatch
):
    forbid_decoding(monkeypatch)
    (tmp_path / "file").touch()
    message = refusal(folder, tmp_path / "file")
    assert message.startswith(f"can't use the data folder {str(tmp_path / 'file')!r}: ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_data_folder_is_named(folder, data_dir):
    data_dir.mkdir(mode=0o500)
    assert "Permission denied" in refusal(folder, data_dir)


def test_a_warm_cache_may_be_read_only(folder, data_dir, monkeypatch):
    load(str(folder), data_dir=data_dir, seed=0)
    monkeypatch.setattr(data, "add_entry", None)
    load(str(folder), data_dir=data_dir, seed=0)


# CIFAR-10, from a server on this machine


def cifar_archive(folder):
    """Write an archive in the layout of the real one, of 4 + 4 + … and 3 images; return sums."""
    generator = np.random.default_rng(0)
    sums = {}

    def add(name, content):
        file = folder / "cifar-10-batches-py" / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5(file.read_bytes()).hexdigest()

    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        count = 3 if name == "test_batch" else 4
        pixels = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
        add(name, {"data": pixels, "labels": [i % 2 for i in range(count)]})
    add("batches.meta", {"label_names": ["cat", "dog"]})
    archive = folder / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder / "cifar-10-batches-py", "cifar-10-batches-py")
    shutil.rmtree(folder / "cifar-10-batches-py")
    return archive, sums


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Let torchvision's CIFAR10 be a small archive, served on this machine; yield its server."""
    from torchvision.datasets import CIFAR10

    (tmp_path / "served").mkdir()
    archive, sums = cifar_archive(tmp_path / "served")
    server = FileServer(tmp_path / "served")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(CIFAR10, "url", server.url + archive.name)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    batches = [[f"data_batch_{i}", sums[f"data_batch_{i}"]] for i in range(1, 6)]
    monkeypatch.setattr(CIFAR10, "train_list", batches)
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
    server.archive = archive
    yield server
    server.close()


def test_cifar10_is_downloaded_and_read(cifar, data_dir, tmp_path, capsys):
    dataset = load("cifar10", data_dir=data_dir, seed=0)
    assert dataset.name == "cifar10"
    assert dataset.classes == ("cat", "dog")
    assert counts(dataset.train, 2) == [9, 9]
    assert counts(dataset.validation, 2) == [1, 1]
    assert dataset.test.labels.tolist() == [0, 1, 0]
    with tarfile.open(cifar.archive) as tar:
        batch = pickle.load(tar.extractfile("cifar-10-batches-py/test_batch"))
    for image, flat in zip(dataset.test.images, batch["data"], strict=True):
        for channel in range(3):
            plane = flat[channel * 1024 : (channel + 1) * 1024].reshape(32, 32)
            np.testing.assert_array_equal(image[:, :, channel], plane)
    assert capsys.readouterr().out == ""
    assert_nothing_is_left_over(data_dir)


def test_cifar10_is_downloaded_only_once(cifar, data_dir):
    load("cifar10", data_dir=data_dir, seed=0)
    requests = len(cifar.fetched)  # torchvision asks twice: for redirections, then for the file
    load("cifar10", data_dir=data_dir, seed=1)
    shutil.rmtree(data_dir / "cache")
    load("cifar10", data_dir=data_dir, seed=0)
    assert len(cifar.fetched) == requests > 0


def test_cifar10_that_is_there_already_needs_no_network(cifar, data_dir):
    cifar.close()
    data_dir.mkdir()
    shutil.copy(cifar.archive, data_dir)
    digest = load("cifar10", data_dir=data_dir, seed=0).digest
    with tarfile.open(cifar.archive) as tar:
        tar.extractall(data_dir / "unpacked", filter="data")
    assert load("cifar10", data_dir=data_dir / "unpacked", seed=0).digest == digest


def test_a_truncated_archive_is_downloaded_again(cifar, data_dir):
    data_dir.mkdir()
    truncate(Path(shutil.copy(cifar.archive, data_dir)))
    load("cifar10", data_dir=data_dir, seed=0)
    assert cifar.fetched
    assert (data_dir / cifar.archive.name).read_bytes() == cifar.archive.read_bytes()


def test_a_damaged_unpacked_archive_is_not_used(cifar, data_dir):
    with tarfile.open(cifar.archive) as tar:
        tar.extractall(data_dir, filter="data")
    truncate(data_dir / "cifar-10-batches-py" / "data_batch_3")
    assert len(load("cifar10", data_dir=data_dir, seed=0).train.all_images) == 23
    assert cifar.fetched


def test_a_truncated_archive_without_network_names_both(cifar, data_dir):
    cifar.close()
    data_dir.mkdir()
    archive = Path(shutil.copy(cifar.archive, data_dir))
    truncate(archive)
    left = archive.read_bytes()
    message = refusal("cifar10", data_dir)
    assert message.startswith(f"{str(archive)!r} is damaged, and CIFAR-10 can't be downloaded (")
    assert "Connection refused" in message
    assert archive.read_bytes() == left


def test_without_network_the_refusal_says_what_to_do(cifar, data_dir):
    cifar.close()
    message = refusal("cifar10", data_dir)
    start = r"CIFAR-10 can't be downloaded \(\[Errno \d+\] Connection refused\): put an intact "
    assert re.match(start, message)
    file = "cifar-10-python.tar.gz"
    assert f"put an intact {file} from {cifar.url}{file} into {str(data_dir)!r}" in message
    assert "or use --dataset digits" in message
    assert sorted(path.name for path in data_dir.rglob("*")) == ["cache", "index"]


def test_a_server_that_sends_something_else_is_not_believed(cifar, data_dir):
    truncate(cifar.archive)
    assert "(the server sent another file)" in refusal("cifar10", data_dir)
    assert sorted(path.name for path in data_dir.rglob("*")) == ["cache", "index"]


def test_a_server_without_the_file_is_reported(cifar, data_dir):
    cifar.archive.unlink()
    assert "(HTTP Error 404: File not found)" in refusal("cifar10", data_dir)


@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
def test_a_server_that_never_answers_is_given_up(cifar, data_dir, monkeypatch):
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(downloads, "_NETWORK_TIMEOUT_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{silent.getsockname()[1]}/x.tar.gz")
        assert "timed out" in refusal("cifar10", data_dir)
    assert socket.getdefaulttimeout() is None
    gc.collect()  # while the warning is filtered: http.client leaves the socket to it


def test_files_that_were_checked_are_not_checked_again_unless_they_change(
    tmp_path: Path, digits_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(digits_cache, tmp_path / "data")
    whole = load("digits", data_dir=tmp_path / "data", seed=0)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_digest", lambda _: pytest.fail("it is checked again"))
        again = open_cached(whole.digest, tmp_path / "data", 0, checked=whole.checked)
        assert torch.equal(again.train.images, whole.train.images)
    images = tmp_path / "data" / "cache" / whole.digest / "images.npy"
    status = images.stat()
    content = bytearray(images.read_bytes())
    content[5000] ^= 255
    images.write_bytes(content)
    os.utime(images, ns=(status.st_atime_ns, status.st_mtime_ns))  # as an archive would
    with pytest.raises(ValueError, match="no undamaged data set"):
        open_cached(whole.digest, tmp_path / "data", 0, checked=whole.checked)
