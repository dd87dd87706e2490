"""A user's own network or loss: tried before anything starts, in one line if it can't be used."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from small_sweep import small_settings

from cnn.data import Dataset
from experiments.study.preflight import check_trainable
from experiments.study.settings import Settings

CODE = """
import torch
from torch import nn

def fine(num_classes, image_size):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(),
        nn.Linear(4 * image_size ** 2, num_classes),
    )

def flat(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, num_classes))

def other_parameters(classes):
    return flat(classes)

def number(num_classes):
    return 3

def nothing_to_train(num_classes):
    return nn.Flatten()

def wrong_shape(num_classes):
    return flat(num_classes + 1)

def two_outputs(num_classes):
    class Two(nn.Linear):
        def forward(self, images):
            return super().forward(images.flatten(1)), images
    return Two(3072, num_classes)

def nan_at_once(num_classes):
    network = flat(num_classes)
    network[1].bias.data.fill_(float("nan"))
    return network

def raises(num_classes):
    raise KeyError("oh no")

def wrong_input(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(7, num_classes))

def half(num_classes):
    return flat(num_classes).half()

def numpy_seeded(num_classes):
    import numpy
    network = flat(num_classes)
    network[1].bias.data = torch.from_numpy(numpy.random.default_rng().random(num_classes)).float()
    return network

def sorts(num_classes):
    class Sorting(nn.Linear):
        def forward(self, images):
            return super().forward(images.flatten(1).sort(1).values)
    return Sorting(3072, num_classes)

def fine_loss(outputs, labels):
    return nn.functional.cross_entropy(outputs, labels)

def each_image(outputs, labels):
    return nn.functional.cross_entropy(outputs, labels, reduction="none")

def no_gradient(outputs, labels):
    return torch.tensor(1.0)

def infinite(outputs, labels):
    return outputs.sum() / 0

def python_number(outputs, labels):
    return 1.0
"""


@pytest.fixture(autouse=True)
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(CODE)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return small_settings(f"sqlite:///{tmp_path / 'optuna.db'}", losses=("cross_entropy",))


def test_a_network_and_a_loss_that_are_fine_pass(
    settings: Settings, coloured_noise: Dataset
) -> None:
    own = replace(settings, training={"network": "own.py:fine", "precision": "bfloat16"})
    check_trainable(own, coloured_noise)
    check_trainable(small_settings(settings.storage, losses=("own.py:fine_loss",)), coloured_noise)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("other_parameters", "takes (classes): it must take num_classes"),
        ("number", "returns int: it must return a torch.nn.Module"),
        ("nothing_to_train", "has no parameters to train"),
        ("wrong_shape", "returns outputs (4, 4): it must return (4, 3)"),
        ("two_outputs", "returns tuple: it must return (4, 3)"),
        ("nan_at_once", "returns NaN or infinity with its initial weights"),
        ("raises", "can't be built for 3 classes: KeyError: 'oh no'"),
        ("wrong_input", "can't be applied to images (4, 3, 32, 32): RuntimeError: "),
        ("half", "in torch.float16 on cpu: its parameters must be torch.float32"),
        ("numpy_seeded", "has other initial values of network.1.bias"),
        ("sorts", "calls sort (torch.ops.aten.sort.default)"),
        ("missing", "there is no 'missing' in it"),
    ],
)
def test_a_network_that_cannot_be_used_is_one_line(
    settings: Settings, coloured_noise: Dataset, name: str, message: str
) -> None:
    with pytest.raises(ValueError, match="own.py:") as info:
        check_trainable(replace(settings, training={"network": f"own.py:{name}"}), coloured_noise)
    assert message in str(info.value)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("each_image", "it returns shape (4,), and must return a scalar tensor"),
        ("python_number", "it returns 1.0, and must return a scalar tensor"),
        ("no_gradient", "has no gradient: it must depend on the outputs"),
        ("infinite", "or its gradient is NaN or infinite"),
        ("missing", "there is no 'missing' in it"),
    ],
)
def test_a_loss_that_cannot_be_used_is_one_line(
    settings: Settings, coloured_noise: Dataset, name: str, message: str
) -> None:
    with pytest.raises(ValueError, match="own.py:") as info:
        check_trainable(
            small_settings(settings.storage, losses=(f"own.py:{name}",)), coloured_noise
        )
    assert message in str(info.value)
    assert "\n" not in str(info.value)
