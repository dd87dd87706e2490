"""How this CNN is usually trained: what the benchmarks measure the project beside.

`seed` is the way of the script that this project began with, `tutorial` that of PyTorch's own
classifier tutorial. Both take images one by one through a DataLoader, in float32, with PyTorch's
defaults for threads and memory. Network, loss and split are those of the project.

Where torchvision and Pillow are not installed, PyTorch alone makes the same tensors of the images,
without the way through Pillow's images, which is faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from cnn.data import Split
from cnn.losses import get_loss
from cnn.optimizers import SCHEDULES

Transform = Callable[[Any], Tensor]


def plain_to_tensor(image: Any) -> Tensor:
    """Return an image (H, W, 3) uint8 as torchvision's `ToTensor` does: (3, H, W), 0 to 1."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return pixels.float().div(255)


def plain_normalised(image: Any) -> Tensor:
    """Return an image as `Normalize` after `ToTensor` does: −1 to 1."""
    mean = torch.tensor((0.5,) * 3)[:, None, None]
    return plain_to_tensor(image).sub_(mean).div_(mean)


try:
    from PIL import Image
    from torchvision import transforms
except (ImportError, RuntimeError):  # the latter of a torchvision for another PyTorch
    HAS_TORCHVISION = False
    TO_TENSOR: Transform = plain_to_tensor
    NORMALISED: Transform = plain_normalised
else:
    HAS_TORCHVISION = True
    TO_TENSOR = transforms.ToTensor()
    NORMALISED = transforms.Compose([TO_TENSOR, transforms.Normalize((0.5,) * 3, (0.5,) * 3)])

SEED_RATE = 0.003
"""Learning rate at batch size 1: better than 0.001, and 0.01 is no better."""


class Images(Dataset[tuple[Tensor, int]]):
    """Images in memory, as torchvision's CIFAR10 keeps and hands them out."""

    def __init__(self, split: Split, transform: Transform) -> None:
        self.images, self.labels = split.images.numpy(), split.labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        if HAS_TORCHVISION:
            image = Image.fromarray(image)
        return self.transform(image), self.labels[index]


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
    device: str = "cpu",
) -> Trained:
    """Train as the tutorial does: two loading processes, normalised images, momentum.

    With Nesterov's momentum and the one-cycle schedule of this project, so that the accuracies can
    be compared.
    """
    images = Images(training, NORMALISED)
    loader = DataLoader(images, batch_size=batch_size, shuffle=True, num_workers=2, timeout=60)
    model = network(num_classes).to(device)
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
    transform: Transform,
    epochs: int,
) -> Trained:
    loss_function, device = get_loss("cross_entropy"), next(model.parameters()).device
    rates, step, accuracy = [], 0, 0.0
    start = time.perf_counter()
    for _ in range(epochs):
        model.train()
        running_loss, num_images = 0.0, 0
        epoch_start = time.perf_counter()
        for inputs, labels in loader:
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            inputs, labels = inputs.to(device), labels.to(device)
            optimizer.zero_grad()
            loss = loss_function(model(inputs), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            running_loss += loss.item()
            step, num_images = step + 1, num_images + len(labels)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # its last step
        rates.append(num_images / (time.perf_counter() - epoch_start))
        accuracy = _accuracy(model, validation, transform)
    return Trained(
        images_per_second=float(np.mean(rates[1:] or rates)),
        seconds=time.perf_counter() - start,
        accuracy=accuracy,
    )


@torch.no_grad()
def _accuracy(model: nn.Module, split: Split, transform: Transform) -> float:
    model.eval()
    correct, device = 0, next(model.parameters()).device
    for inputs, labels in DataLoader(Images(split, transform), batch_size=256):
        correct += int((model(inputs.to(device)).argmax(1) == labels.to(device)).sum())
    return correct / len(split)
