"""The network that is studied, and the form of it that is stored: raw images in."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class CNN(nn.Module):
    """A small CNN for images of 32×32 pixels: N images (N, 32, 32, 3) uint8 → outputs (N, K).

    Three 5×5 convolutions, each followed by max-pooling, and two linear layers; no activation but
    the max-pools. With K = 10 classes it has 145,578 parameters and takes 12.35 million
    multiply-adds an image.

    Images come as they lie in memory, height × width × channel, and become what PyTorch calls
    `channels_last` without a copy. Pixels 0..255 are mapped to −1..1; 0..255 are exact in bfloat16.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 32, 5, padding=2),  # (N, 32, 32, 32)
            nn.MaxPool2d(2),  # (N, 32, 16, 16)
            nn.Conv2d(32, 32, 5, padding=2),
            nn.MaxPool2d(2),  # (N, 32, 8, 8)
            nn.Conv2d(32, 64, 5, padding=2),
            nn.MaxPool2d(2),  # (N, 64, 4, 4)
        )
        self.head = nn.Sequential(
            nn.Flatten(),  # (N, 1024)
            nn.Linear(1024, 64),
            nn.Linear(64, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return outputs (N, K) of images (N, 32, 32, 3) uint8, in the precision of the weights."""
        dtype = next(self.parameters()).dtype
        pixels = images.permute(0, 3, 1, 2).to(dtype)  # (N, 3, 32, 32), channels last in memory
        outputs: Tensor = self.head(self.features(pixels / 127.5 - 1))
        return outputs


class Classifier(nn.Module):
    """A network with what makes probabilities of its outputs: the model that is stored."""

    def __init__(self, network: nn.Module, to_probabilities: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network = network
        self.to_probabilities = to_probabilities

    def forward(self, images: Tensor) -> Tensor:
        """Return class probabilities (N, K) float32 of images (N, H, W, C) uint8."""
        return self.to_probabilities(self.network(images).float())


def build_cnn(num_classes: int, *, seed: int) -> CNN:
    """Return a CNN with PyTorch's default initial weights, the same for the same seed.

    PyTorch's layers draw from the global generator only: it is set aside meanwhile.
    """
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed seeds the GPUs as well
        return CNN(num_classes).to(memory_format=torch.channels_last)
