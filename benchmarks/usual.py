"""How this CNN is usually trained: what the benchmarks measure the project beside.

`seed` is the way of the script that this project began with, `tutorial` that of PyTorch's own
classifier tutorial. Both take images one by one through a DataLoader, in float32, with PyTorch's
defaults for threads and memory. Network, loss and split are those of the project.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from cnn.data import Split
from cnn.losses import get_loss
from cnn.training import SCHEDULES

TO_TENSOR = transforms.ToTensor()
NORMALISED = transforms.Compose([TO_TENSOR, transforms.Normalize((0.5,) * 3, (0.5,) * 3)])
SEED_RATE = 0.003
"""Learning rate at batch size 1: better than 0.001, and 0.01 is no better."""


class Images(Dataset[tuple[torch.Tensor, int]]):
    """Images in memory, as torchvision's CIFAR10 keeps and hands them out."""

    def __init__(self, split: Split, transform: Callable[[Any], torch.Tensor]) -> None:
        self.images, self.labels = split.images.numpy(), split.labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a training came to."""

    images_per_second: float
    """Of training alone, over all epochs but the first, or that one if there is no other."""
    seconds: float
    """Until the end, validation included."""
    accuracy: float
    """On the validation split."""


def network(num_classes: int) -> nn.Module:
    """Return the CNN as a list of PyTorch's layers, images (N, 3, 32, 32) float32 in."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 5, padding=2),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 5, padding=2),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(1024, 64),
        nn.Linear(64, num_classes),
    )


def seed(training: Split, validation: Split, *, num_classes: int, epochs: int) -> Trained:
    """Train as the first script did: batch size 1, plain SGD at a constant rate."""
    loader = DataLoader(Images(training, TO_TENSOR), batch_size=1, shuffle=True)
    model = network(num_classes)
    optimizer = torch.optim.SGD(model.parameters(), lr=SEED_RATE)
    return _train(model, loader, optimizer, lambda _: SEED_RATE, validation, TO_TENSOR, epochs)


def tutorial(
    training: Split,
    validation: Split,
    *,
    num_classes: int,
    batch_size: int,
    learning_rate: float,
    epochs: int,
) -> Trained:
    """Train as the tutorial does: two loading processes, normalised images, momentum.

    With Nesterov's momentum and the one-cycle schedule of this project, so that the accuracies can
    be compared.
    """
    images = Images(training, NORMALISED)
    loader = DataLoader(images, batch_size=batch_size, shuffle=True, num_workers=2)
    model = network(num_classes)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9, nesterov=True)
    steps = epochs * len(loader)
    one_cycle = SCHEDULES["one_cycle"]
    return _train(
        model,
        loader,
        optimizer,
        lambda step: learning_rate * one_cycle((step + 0.5) / steps),
        validation,
        NORMALISED,
        epochs,
    )


def _train(
    model: nn.Module,
    loader: DataLoader[Any],
    optimizer: torch.optim.Optimizer,
    rate: Callable[[int], float],
    validation: Split,
    transform: Callable[[Any], torch.Tensor],
    epochs: int,
) -> Trained:
    loss_function = get_loss("cross_entropy")
    rates, step, accuracy = [], 0, 0.0
    start = time.perf_counter()
    for _ in range(epochs):
        model.train()
        running_loss, num_images = 0.0, 0
        epoch_start = time.perf_counter()
        for inputs, labels in loader:
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            optimizer.zero_grad()
            loss = loss_function(model(inputs), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            running_loss += loss.item()
            step, num_images = step + 1, num_images + len(labels)
        rates.append(num_images / (time.perf_counter() - epoch_start))
        accuracy = _accuracy(model, validation, transform)
    return Trained(
        images_per_second=float(np.mean(rates[1:] or rates)),
        seconds=time.perf_counter() - start,
        accuracy=accuracy,
    )


@torch.no_grad()
def _accuracy(model: nn.Module, split: Split, transform: Callable[[Any], torch.Tensor]) -> float:
    model.eval()
    correct = 0
    for inputs, labels in DataLoader(Images(split, transform), batch_size=256):
        correct += int((model(inputs).argmax(1) == labels).sum())
    return correct / len(split)
