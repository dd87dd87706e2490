"""Data sets that a function returns: what is taken, what is kept, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cnn.data import Dataset, load, open_cached
from cnn.images import resize
from tracking.prediction.splits import dataset_of

START = """
import numpy as np
images = np.arange(30 * 9 * 7 * 3).reshape(30, 9, 7, 3).astype(np.uint8)
labels = np.arange(30) % 3
"""
IMAGES = np.arange(30 * 9 * 7 * 3).reshape(30, 9, 7, 3).astype(np.uint8)
LABELS = np.arange(30) % 3

Returns = Callable[[str], None]


@pytest.fixture(autouse=True)
def returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Returns]:
    """Return a function that writes `own.py`, whose function `make` returns an expression."""
    monkeypatch.chdir(tmp_path)
    path, modules = list(sys.path), set(sys.modules)

    def write(expression: str) -> None:
        Path("own.py").write_text(f"{START}\ndef make():\n    return {expression}\n")

    yield write
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if "own" in name:
            del sys.modules[name]


def loaded(reference: str = "own.py:make", **options: Any) -> Dataset:
    return load(reference, data_dir=Path("data"), seed=0, **options)


def refusal(reference: str = "own.py:make") -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 -- the callers look at the message
        loaded(reference)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "expression",
    [
        "images, labels",
        "{'images': images, 'labels': labels}",
        "{'images': images, 'labels': labels.tolist(), 'test_images': None}",
        "__import__('torch').from_numpy(images), __import__('torch').from_numpy(labels)",
        "list(images), labels.astype(np.uint8)",
    ],
)
def test_images_and_labels_are_taken_in_any_of_these_forms(
    returns: Returns, expression: str
) -> None:
    returns(expression)
    dataset = loaded()
    np.testing.assert_array_equal(dataset.train.all_images, resize(IMAGES))
    np.testing.assert_array_equal(dataset.train.all_labels, LABELS)
    assert (dataset.name, dataset.classes) == ("own.py:make", ("0", "1", "2"))
    assert (dataset.given_test, len(dataset.test), dataset.notes) == (False, 6, ())


@pytest.mark.parametrize(
    "expression",
    [
        "images[:20], labels[:20], images[20:], labels[20:]",
        "dict(images=images[:20], labels=labels[:20], test_images=images[20:], "
        "test_labels=labels[20:])",
    ],
)
def test_a_test_split_can_be_given(returns: Returns, expression: str) -> None:
    returns(expression)
    dataset = loaded()
    assert dataset.given_test
    np.testing.assert_array_equal(dataset.test.images, resize(IMAGES)[20:])
    np.testing.assert_array_equal(dataset.test.labels, LABELS[20:])


def test_grey_images_and_splits_of_two_sizes_become_colour_of_one_size(returns: Returns) -> None:
    returns("images[:20, :, :, 0], labels[:20], images[20:, :4], labels[20:]")
    dataset = loaded(image_size=16)
    np.testing.assert_array_equal(dataset.train.all_images[:20], resize(IMAGES[:20, :, :, 0], 16))
    np.testing.assert_array_equal(dataset.test.images, resize(IMAGES[20:, :4], 16))


@pytest.mark.parametrize(
    ("expression", "classes", "first"),
    [
        ("images, np.array(['b', 'a', 'c'])[labels]", ("a", "b", "c"), [1, 0, 2]),
        ("images, np.array(['b', 'a', 'c'], object)[labels]", ("a", "b", "c"), [1, 0, 2]),
        ("images, 10 - labels", ("8", "9", "10"), [2, 1, 0]),
        (
            "dict(images=images, labels=labels, classes=['x', 'y', 'z'])",
            ("x", "y", "z"),
            [0, 1, 2],
        ),
        (
            "dict(images=images, labels=np.array(['b', 'a', 'c'])[labels], classes=tuple('cab'))",
            ("c", "a", "b"),
            [2, 1, 0],
        ),
    ],
)
def test_classes_are_the_sorted_labels_or_as_given(
    returns: Returns, expression: str, classes: tuple[str, ...], first: list[int]
) -> None:
    returns(expression)
    dataset = loaded()
    assert dataset.classes == classes
    assert dataset.train.all_labels[:3].tolist() == first


def test_a_function_of_a_module_has_the_name_of_the_reference(returns: Returns) -> None:
    Path("own_package").mkdir()
    Path("own_package/sets.py").write_text(f"{START}\ndef make(): return images, labels")
    dataset = loaded("own_package.sets:make")
    assert (dataset.name, dataset.source) == ("own_package.sets:make",) * 2
    returns("images, labels")
    assert loaded().source == f"{Path('own.py').absolute()}:make"
    assert loaded().digest == dataset.digest


# The cache


def test_a_function_is_called_again_when_its_file_changes_and_only_then(returns: Returns) -> None:
    returns("images, labels[: __import__('os').mkdir('called') or 30]")  # fails if called again
    first = loaded()
    second = loaded()
    assert (first.digest, first.notes) == (second.digest, ())
    assert second.notes == (
        "the images are those that 'own.py:make' returned before: they are kept until its file "
        "changes, whatever else it reads",
    )
    returns("images[::-1], labels")
    assert loaded().digest != first.digest


def test_a_worker_needs_neither_the_function_nor_its_file(returns: Returns) -> None:
    returns("images, labels")
    dataset = loaded(image_size=16)
    Path("own.py").unlink()
    opened = open_cached(dataset.digest, Path("data"), 0)
    assert torch.equal(opened.train.images, dataset.train.images)


def test_a_split_of_a_function_has_its_data_set(returns: Returns) -> None:
    returns("images, labels")
    digest = loaded().digest
    known = dataset_of("own.py:make:test", Path("data"))
    assert known is not None
    assert (known.name, known.digests) == ("own.py:make", (digest,))


# What is refused


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("None", "it is a NoneType; allowed is a mapping with 'images' uint8 (N, H, W, 3) or"),
        ("images", "it is a ndarray; allowed is a mapping"),
        ("(images, labels, ['a'])", "it is a tuple of 3; allowed is a mapping"),
        ("{'images': images}", "it has no 'labels'; allowed is a mapping"),
        ("{'labels': labels}", "it has no 'images'; allowed is a mapping"),
        ("{'images': images, 'label': labels}", "it has 'label'; allowed is a mapping"),
        (
            "{'images': images, 'labels': labels, 'test_images': images}",
            "it has one of 'test_images' and 'test_labels' without the other",
        ),
        (
            "images / 255, labels",
            "images is float64 (30, 9, 7, 3): it must be uint8 (0 to 255) and (N, H, W, 3) or",
        ),
        (
            "images.transpose(0, 3, 1, 2), labels",
            "images is uint8 (30, 3, 9, 7): it must be uint8 (0 to 255) and (N, H, W, 3) or (N, H, "
            "W), colours last",
        ),
        ("images[0, 0], labels", "images is uint8 (7, 3): it must be"),
        ("images[:0], labels[:0]", "images has no images or no pixels: its shape is (0, 9, 7, 3)"),
        ("[images[0], images[1, 1:]], labels[:2]", "images is no array: "),
        ("images, labels[:29]", "there are 30 images and 29 labels"),
        ("images, labels[:, None]", "labels is int64 (30, 1): it must be (N,), integers or texts"),
        (
            "images, np.where(labels == 2, np.nan, labels)",
            "labels is float64 (30,), 10 of them NaN: it must be (N,), integers or texts",
        ),
        ("images, labels > 0", "labels is bool (30,): it must be (N,), integers or texts"),
        ("images, ['a', None] * 15", "labels is object (30,) with None: it must be (N,),"),
        ("images, labels * 0", "there is only one class, '0': there must be two or more"),
        (
            "images[:5], labels[:5]",
            "class '0' has 2 images: at least 3 are needed, one for each split",
        ),
        (
            "images, labels, images, labels + 1",
            "test labels has 3, which is no class: 0, 1, 2",
        ),
        (
            "images, labels, images, labels.astype(str)",
            "test labels are texts, and those for training are integers",
        ),
        (
            "dict(images=images, labels=labels, classes=['a', 'b'])",
            "labels has 2, which is no class: 0, 1",
        ),
        (
            "dict(images=images, labels=labels - 1, classes=['a', 'b', 'c'])",
            "labels has -1, which is no class: 0, 1, 2",
        ),
        (
            "dict(images=images, labels=labels, classes=['a', 'b', 'b'])",
            "classes has a name twice: 'a', 'b', 'b'",
        ),
        (
            "dict(images=images, labels=labels, classes=['a', 'b', 'c', 'd'])",
            "class 'd' has 0 images: at least 3 are needed",
        ),
        ("dict(images=images, labels=labels, classes='abc')", "classes is a str: it must be a"),
        ("dict(images=images, labels=labels, classes=[1, 2, 3])", "classes has 1: it must be a"),
    ],
)
def test_what_cannot_be_used_is_refused_with_what_is_allowed(
    returns: Returns, expression: str, reason: str
) -> None:
    returns(expression)
    assert refusal().startswith(f"what 'own.py:make' returned can't be used: {reason}")
    assert not list(Path("data/cache").glob("*/images.npy"))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("def make(): raise OSError('no\\nfile')", "'own.py:make' raised OSError: no file"),
        ("def make(size): pass", "'own.py:make' raised TypeError: make() missing 1 required"),
        ("import sys\ndef make(): sys.exit(4)", "'own.py:make' raised SystemExit: 4"),
        ("def mike(): pass", "'own.py:make': there is no 'make' in it (did you mean 'mike'?)"),
    ],
)
def test_a_function_that_fails_is_named_with_its_error(body: str, reason: str) -> None:
    Path("own.py").write_text(body)
    assert refusal().startswith(reason)
