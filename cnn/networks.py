"""The networks by name, and the classifier that is stored: raw images in.

A factory takes `num_classes` and, if it has such a parameter, `image_size`. It returns a module
from normalised images (N, 3, H, W) float to outputs (N, K).
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from cnn.references import did_you_mean, is_reference, resolve

Factory = Callable[..., nn.Module]


class CNN(nn.Module):
    """A small CNN: N images (N, H, W, 3) uint8 → outputs (N, K).

    Three 5×5 convolutions, each followed by max-pooling, and two linear layers. Max-pooling is the
    only non-linearity, unless `activation` names another. With K = 10 classes and images of 32×32
    pixels it has 145,578 parameters and takes 12.35 million multiply-adds per image.

    Images are height × width × channel, which becomes PyTorch's `channels_last` without a copy.
    """

    def __init__(
        self,
        num_classes: int,
        image_size: int = 32,
        *,
        activation: Callable[[], nn.Module] | None = None,
    ) -> None:
        super().__init__()

        def activated(layer: nn.Module) -> list[nn.Module]:
            return [layer] if activation is None else [layer, activation()]

        # The comments are for images of 32×32 pixels.
        self.features = nn.Sequential(
            *activated(nn.Conv2d(3, 32, 5, padding=2)),  # (N, 32, 32, 32)
            nn.MaxPool2d(2),  # (N, 32, 16, 16)
            *activated(nn.Conv2d(32, 32, 5, padding=2)),
            nn.MaxPool2d(2),  # (N, 32, 8, 8)
            *activated(nn.Conv2d(32, 64, 5, padding=2)),
            nn.MaxPool2d(2),  # (N, 64, 4, 4)
        )
        self.head = nn.Sequential(
            nn.Flatten(),  # (N, 1024)
            *activated(nn.Linear(64 * (image_size // 8) ** 2, 64)),
            nn.Linear(64, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return outputs (N, K) of images (N, H, W, 3) uint8, in the precision of the weights."""
        outputs: Tensor = self.head(self.features(_normalised(images, _precision(self))))
        return outputs


class ResNet(nn.Module):
    """ResNet-20 for small images (N, 3, H, W): 272,474 parameters for ten classes.

    He et al. 2016 (arXiv:1512.03385), section 4.2, with shortcuts by 1×1 convolutions where the
    shape changes (their option B). They report 91.25 % on CIFAR-10, after 164 epochs with flips and
    crops.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        widths = [16, *(width for width in (16, 32, 64) for _ in range(3))]
        self.stem = nn.Sequential(_convolution(3, 16), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.Sequential(*map(_Residual, widths[:-1], widths[1:]))
        self.head = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # He et al. 2015 (arXiv:1502.01852), equation 10
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, pixels: Tensor) -> Tensor:
        """Return outputs (N, K)."""
        outputs: Tensor = self.head(self.blocks(self.stem(pixels)).mean((2, 3)))
        return outputs


class _Residual(nn.Module):
    """Two convolutions beside a shortcut; twice as many channels at half the size, or the same."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        stride = width // width_in
        self.layers = nn.Sequential(
            _convolution(width_in, width, stride=stride),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            _convolution(width, width),
            nn.BatchNorm2d(width),
        )
        self.shortcut = (
            nn.Sequential()
            if stride == 1
            else nn.Sequential(
                nn.Conv2d(width_in, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width)
            )
        )

    def forward(self, pixels: Tensor) -> Tensor:
        outputs: Tensor = self.layers(pixels) + self.shortcut(pixels)
        return outputs.relu()


def _convolution(width_in: int, width: int, *, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(width_in, width, 3, stride=stride, padding=1, bias=False)


class Normalised(nn.Module):
    """A network that takes normalised pixels, with raw images in."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Return outputs (N, K) of images (N, H, W, 3) uint8."""
        outputs: Tensor = self.network(_normalised(images, _precision(self)))
        return outputs


def _normalised(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Return pixels (N, 3, H, W) in −1 .. 1, channels last in memory, of images (N, H, W, 3) uint8.

    0 .. 255 are exact in bfloat16.
    """
    return images.permute(0, 3, 1, 2).to(dtype) / 127.5 - 1


def _precision(network: nn.Module) -> torch.dtype:
    """Return the precision of a network: the lowest one of its weights, as some may stay higher."""
    dtypes = {weight.dtype for weight in network.parameters()}
    return min(dtypes, key=lambda dtype: dtype.itemsize)


class Classifier(nn.Module):
    """A network whose outputs become probabilities: the model that is stored."""

    def __init__(self, network: nn.Module, to_probabilities: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network = network
        self.to_probabilities = to_probabilities

    def forward(self, images: Tensor) -> Tensor:
        """Return class probabilities (N, K) float32 of images (N, H, W, C) uint8."""
        return self.to_probabilities(self.network(images).float())


NETWORKS: dict[str, Factory] = {
    "cnn": CNN,
    "cnn_relu": partial(CNN, activation=nn.ReLU),
    "resnet": ResNet,
}

TORCHVISION = "torchvision:"


def build_network(
    num_classes: int, *, seed: int, name: str = "cnn", image_size: int = 32
) -> nn.Module:
    """Return a network with initial weights that the seed determines.

    It takes images (N, H, W, 3) uint8. PyTorch's layers draw from the global generator only, so its
    state is saved and restored.

    Raises:
        ValueError: there is no such network, or what its factory returns can't be trained.
    """
    factory = get_factory(name)
    sizes = {"image_size": image_size} if _takes_image_size(name, factory) else {}
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed seeds the GPUs as well
        network = factory(num_classes=num_classes, **sizes)
    if name not in NETWORKS:
        _check_trainable(name, network)
    if not isinstance(network, CNN):
        network = Normalised(network)
    return network.to(memory_format=torch.channels_last)


@lru_cache
def get_factory(name: str) -> Factory:
    """Return the factory of a network.

    Args:
        name: one of `NETWORKS`, `torchvision:MODEL`, `package.module:factory` or `file.py:factory`.

    Raises:
        ValueError: there is no such network.
    """
    if name in NETWORKS:
        return NETWORKS[name]
    if isinstance(name, str) and name.startswith(TORCHVISION):
        return _torchvision_factory(name.removeprefix(TORCHVISION))
    if isinstance(name, str) and is_reference(name):
        factory: Factory = resolve(name)
        _check_parameters(name, factory)
        return factory
    hint = did_you_mean(str(name), NETWORKS)
    raise ValueError(
        f"unknown network {name!r}{hint}: choose one of {', '.join(NETWORKS)}, "
        "torchvision:MODEL, package.module:factory or file.py:factory"
    )


def _torchvision_factory(model: str) -> Factory:
    from torchvision import models  # slow to import

    known = models.list_models(module=models)
    if model not in known:
        close = difflib.get_close_matches(model, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(known)}"
        raise ValueError(f"torchvision has no image classifier {model!r}: {hint}")
    return partial(models.get_model, model, weights=None)


def _takes_image_size(name: str, factory: Factory) -> bool:
    if name.startswith(TORCHVISION):  # they pass on what they are given: only these know it
        return name.removeprefix(TORCHVISION).startswith("vit_")
    return "image_size" in inspect.signature(factory).parameters


def _check_parameters(name: str, factory: Factory) -> None:
    """Raise ValueError unless a factory can be called as `build_network` does."""
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):
        return  # of a builtin: calling it will tell
    given = {"num_classes": 10}
    if "image_size" in signature.parameters:
        given["image_size"] = 32
    try:
        signature.bind(**given)
    except TypeError as error:
        raise ValueError(
            f"network {name!r} takes {signature}: it must take num_classes, and image_size if it "
            f"needs it ({error})"
        ) from error


def _check_trainable(name: str, network: object) -> None:
    """Raise ValueError unless this is a module with weights to train, in float32 on the CPU."""
    if not isinstance(network, nn.Module):
        raise ValueError(  # noqa: TRY004 - the user's input, not our type error
            f"network {name!r} returns {type(network).__name__}: it must return a torch.nn.Module"
        )
    if not any(weight.requires_grad for weight in network.parameters()):
        raise ValueError(f"network {name!r} has no parameters to train")
    for each, weight in network.named_parameters():
        if weight.dtype != torch.float32 or weight.device.type != "cpu":
            raise ValueError(
                f"network {name!r} has {each} in {weight.dtype} on {weight.device}: its parameters "
                "must be torch.float32 on cpu; --precision and --device say how it is trained"
            )
