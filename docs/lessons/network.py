"""The numbers of the page on the network, from the network itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from cnn.networks import CNN

CLASSES, SIZE = 10, 32


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer of the CNN, for an image of 32×32 pixels."""

    what: str
    shape: tuple[int, ...]
    """Of what it returns for one image."""
    parameters: int
    multiply_adds: int
    field: int | None
    """How many pixels wide a square each of its numbers sees; None: the whole image."""


def layers() -> list[Layer]:
    """Return the layers of the CNN, in their order."""
    network = CNN(CLASSES, SIZE).eval()
    shapes: dict[str, tuple[int, ...]] = {}
    names = [name for name, module in network.named_modules() if not list(module.children())]

    def note(name: str) -> None:
        def hook(_module: nn.Module, _arguments: object, returned: torch.Tensor) -> None:
            shapes[name] = tuple(returned.shape[1:])

        network.get_submodule(name).register_forward_hook(hook)

    for name in names:
        note(name)
    with torch.inference_mode():
        network(torch.zeros(1, SIZE, SIZE, 3, dtype=torch.uint8))
    found, field, step = [], 1, 1
    for name in names:
        module = network.get_submodule(name)
        if isinstance(module, nn.Conv2d | nn.MaxPool2d):
            field, step = widened(module, field, step)
        found.append(
            Layer(
                what=described(module),
                shape=shapes[name],
                parameters=sum(weight.numel() for weight in module.parameters()),
                multiply_adds=multiply_adds(module, shapes[name]),
                field=field if len(shapes[name]) == 3 else None,
            )
        )
    return found


def multiply_adds(module: nn.Module, shape: tuple[int, ...]) -> int:
    """Return the products of a layer: each of its weights, at each place of what it returns."""
    weights = [weight for weight in module.parameters() if weight.ndim > 1]  # biases are added only
    return sum(weight.numel() for weight in weights) * math.prod(shape[1:])


def widened(module: nn.Conv2d | nn.MaxPool2d, field: int, step: int) -> tuple[int, int]:
    """Return the receptive field after a layer, and how many pixels apart its numbers are."""
    width, stride = (
        size if isinstance(size, int) else size[0] for size in (module.kernel_size, module.stride)
    )
    return field + (width - 1) * step, step * stride


def described(module: nn.Module) -> str:
    """Return what a layer is, in words."""
    match module:
        case nn.Conv2d(out_channels=channels, kernel_size=(height, width)):
            return f"convolution, {channels} filters of {height}×{width}"
        case nn.MaxPool2d(kernel_size=size):
            return f"max-pooling, {size}×{size}"
        case nn.Linear(in_features=inputs, out_features=outputs):
            return f"linear, {inputs} → {outputs}"
        case nn.Flatten():
            return "flatten"
    raise NotImplementedError(module)
