"""Random changes of training images, on the device, a batch at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (F is its name everywhere)
from torch import Tensor

AUGMENTATIONS = ("none", "flip", "flip_crop")


class Augmentation:
    """The changes of an epoch's images, drawn at its start.

    `flip` mirrors half of the images, left to right. `flip_crop` also shifts each by up to an
    eighth of its size in both directions, and fills with black: the pad-and-crop of He et al. 2016
    (arXiv:1512.03385), section 4.2.

    Args:
        name: one of `AUGMENTATIONS`.
        size: the number of the epoch's images.
        image_size: height and width, in pixels.
        seed: of the changes, in 0 .. 2⁶³ − 1. They depend on an image's position in the epoch, not
            on the batch size.
    """

    def __init__(self, name: str, *, size: int, image_size: int, seed: int) -> None:
        self.name = name
        self.padding = image_size // 8 if name == "flip_crop" else 0
        if name == "none":
            return
        generator = torch.Generator().manual_seed(seed)
        flips = torch.rand(size, 1, generator=generator) < 0.5
        shifts = torch.randint(0, 2 * self.padding + 1, (2, size, 1), generator=generator)
        line = torch.arange(image_size)
        # Positions (size, H) and (size, W) in the padded images.
        self.rows = line + shifts[0]
        self.columns = torch.where(flips, line.flip(0), line) + shifts[1]

    def to(self, device: torch.device) -> Augmentation:
        """Move the changes to the device of the images."""
        if self.name != "none":
            self.rows, self.columns = self.rows.to(device), self.columns.to(device)
        return self

    def __call__(self, images: Tensor, start: int) -> Tensor:
        """Return a batch (B, H, W, 3), changed, whose first image is the epoch's `start`-th."""
        if self.name == "none":
            return images
        part = slice(start, start + len(images))
        each = torch.arange(len(images), device=images.device)[:, None, None]
        padded = F.pad(images, (0, 0, *[self.padding] * 4))
        return padded[each, self.rows[part, :, None], self.columns[part, None, :]]
