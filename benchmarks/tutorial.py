"""The baseline of training speed: the way of PyTorch's classifier tutorial.

It takes images one by one through a DataLoader with two processes, in float32, with PyTorch's
defaults for threads and memory. Network, loss and split are those of the project.

Without torchvision and Pillow, PyTorch alone makes the same tensors of the images. That skips
Pillow's images, so it is faster.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from cnn.data import Split
from cnn.losses import get_loss
from cnn.optimizers import SCHEDULES


def plain_normalised(image: Any) -> Tensor:
    """Return an image (H, W, 3) uint8 as `ToTensor` and `Normalize` do: (3, H, W), −1 to 1."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    mean = torch.tensor((0.5,) * 3)[:, None, None]
    return pixels.float().div(255).sub_(mean).div_(mean)


try:
    from PIL import Image
    from torchvision import transforms
except (ImportError, RuntimeError):  # the latter of a torchvision for another PyTorch
    HAS_TORCHVISION = False
    NORMALISED: Any = plain_normalised
else:
    HAS_TORCHVISION = True
    NORMALISED = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)]
    )


class Images(Dataset[tuple[Tensor, int]]):
    """Images in memory, as torchvision's CIFAR10 keeps them and hands them out."""

    def __init__(self, split: Split) -> None:
        self.images, self.labels = split.images.numpy(), split.labels.tolist()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        if HAS_TORCHVISION:
            image = Image.fromarray(image)
        return NORMALISED(image), self.labels[index]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Speed and result of a training."""

    images_per_second: float
    """Of training alone, the mean over all epochs but the first, unless it is the only one."""
    accuracy: float
    """On the validation split."""


def build_network(num_classes: int) -> nn.Module:
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


def train(
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

    With Nesterov's momentum and the one-cycle schedule of this project, so that accuracies can be
    compared.
    """
    loader = DataLoader(
        Images(training), batch_size=batch_size, shuffle=True, num_workers=2, timeout=60
    )
    model = build_network(num_classes).to(device)
    loss_function, schedule = get_loss("cross_entropy"), SCHEDULES["one_cycle"]
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9, nesterov=True)
    rates, step, steps = [], 0, epochs * len(loader)
    for _ in range(epochs):
        running_loss = 0.0
        start = time.perf_counter()
        for inputs, labels in loader:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * schedule((step + 0.5) / steps)
            inputs, labels = inputs.to(device), labels.to(device)
            optimizer.zero_grad()
            loss = loss_function(model(inputs), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            running_loss += loss.item()  # as the tutorial does, which waits for the device
            step += 1
        rates.append(len(training) / (time.perf_counter() - start))
    return Trained(
        images_per_second=float(np.mean(rates[1:] or rates)),
        accuracy=_accuracy(model, validation, device),
    )


@torch.no_grad()
def _accuracy(model: nn.Module, split: Split, device: str) -> float:
    correct = 0
    for inputs, labels in DataLoader(Images(split), batch_size=256):
        correct += int((model(inputs.to(device)).argmax(1) == labels.to(device)).sum())
    return correct / len(split)
