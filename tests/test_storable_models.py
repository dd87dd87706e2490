"""Networks of torchvision and of others: stored, loaded safely, and the same probabilities."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from cnn.networks import Classifier
from tracking.models import recording
from tracking.models.predictor import load_model
from tracking.models.recording import check_storable, save_model

CLASSES = {"classes": [f"class {k}" for k in range(10)]}


class Normalized(nn.Module):
    """Takes images (N, H, W, 3) uint8 for a network of pixels (N, 3, H, W) in −1..1."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        pixels: Tensor = self.network(images.permute(0, 3, 1, 2).float() / 127.5 - 1)
        return pixels


def classifier(network: nn.Module) -> nn.Module:
    return Classifier(Normalized(network), lambda outputs: torch.softmax(outputs, 1)).eval()


def images_of(size: int, number: int = 2) -> np.ndarray[Any, Any]:
    return np.random.default_rng(number).integers(0, 256, (number, size, size, 3), np.uint8)


def stored_and_loaded(network: nn.Module, folder: Path, size: int = 32) -> None:
    """Check the probabilities of a network after it was stored and loaded."""
    model = classifier(network)
    with torch.no_grad():  # those of new networks differ little from image to image
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.1, 0.1)  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    save_model(model, folder / "model", input_example=images_of(size), metadata=CLASSES)
    predictor = load_model(str(folder / "model"))
    for number in (1, 3):
        images = images_of(size, number)
        with torch.inference_mode():
            expected = model(torch.from_numpy(images)).numpy()
        np.testing.assert_allclose(predictor.probabilities(images), expected, rtol=0, atol=1e-5)


# torchvision

FAMILIES = [
    "resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large",
    "efficientnet_b0", "convnext_tiny", "regnet_y_400mf", "densenet121", "shufflenet_v2_x1_0",
    "swin_t", "vision_transformer",
]  # fmt: skip


def build(name: str, size: int = 32) -> nn.Module:
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    if name == "vision_transformer":
        network: nn.Module = models.VisionTransformer(
            image_size=size, patch_size=8, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128,
            num_classes=10,
        )  # fmt: skip
        nn.init.normal_(network.heads.head.weight)  # type: ignore[union-attr, arg-type]
    else:
        network = models.get_model(name, weights=None, num_classes=10)
    return network


def test_a_small_network_of_torchvision(tmp_path: Path) -> None:
    stored_and_loaded(build("vision_transformer"), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize("name", FAMILIES)
def test_families_of_torchvision(name: str, size: int, tmp_path: Path) -> None:
    if (name, size) == ("swin_t", 224):
        pytest.skip("it takes more memory than is allowed")
    stored_and_loaded(build(name, size), tmp_path, size)


# What networks of others do


class Network(nn.Module):
    """Applies a function to 8 planes (N, 8, 8, 8); its sums are outputs (N, 10)."""

    def __init__(self, function: Callable[[Network, Tensor], Tensor], *layers: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 4, 4)
        self.function, self.layers = function, nn.ModuleList(layers)
        self.position = nn.Parameter(torch.rand(1, 64, 8))
        self.factors: Tensor
        self.register_buffer("factors", torch.rand(8), persistent=False)
        self.last = nn.Linear(8, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        planes = self.function(self, self.first(pixels))
        outputs: Tensor = self.last(planes.reshape(pixels.shape[0], 8, -1).mean(2))
        return outputs


def tokens(planes: Tensor) -> Tensor:
    return planes.flatten(2).transpose(1, 2)  # (N, 64, 8)


def assigned(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 0] = 0
    x[:, 1] += x[:, 2]
    x -= 1
    x *= 2
    return x


def pairs(x: Tensor) -> Tensor:
    return torch.bmm(x, x.mT)


def all_activations(x: Tensor) -> Tensor:
    x = F.relu6(x) + F.selu(x) + F.celu(x) + F.softsign(x) + F.hardsigmoid(x) + F.relu(x)
    return x + F.glu(torch.cat([x, x], 1), 1) + F.prelu(x, torch.tensor([0.1])) + F.mish(x)


IN_PLACE = nn.Sequential(
    nn.LeakyReLU(inplace=True), nn.ELU(inplace=True), nn.SELU(inplace=True), nn.CELU(inplace=True),
    nn.SiLU(inplace=True), nn.Mish(inplace=True), nn.Hardswish(inplace=True),
    nn.Hardsigmoid(inplace=True), nn.ReLU6(inplace=True), nn.ReLU(inplace=True),
    nn.Dropout(inplace=True), nn.Dropout2d(inplace=True),
)  # fmt: skip

TIED = nn.Linear(8, 8)
SHARED = nn.Linear(8, 8)
SHARED.weight = TIED.weight

NETWORKS: dict[str, Network] = {
    "attention": Network(
        lambda s, x: s.layers[1](s.layers[0](*[tokens(x) + s.position] * 3)[0]).transpose(1, 2),
        nn.MultiheadAttention(8, 2, batch_first=True),
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
    ),
    "positions": Network(
        lambda s, x: (tokens(x) + s.layers[0](torch.arange(64))).transpose(1, 2),
        nn.Embedding(64, 8),
    ),
    "weights that two modules share, and one module twice": Network(
        lambda s, x: s.layers[1](s.layers[0](s.layers[0](tokens(x)))).transpose(1, 2), TIED, SHARED
    ),
    "normalisation and dropout": Network(
        lambda s, x: s.layers[0](x),
        nn.Sequential(
            nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8), nn.LayerNorm((8, 8)),
            nn.RMSNorm(8), nn.Dropout(),
        ),
    ),
    "buffers and constants": Network(
        lambda s, x: x * s.factors.view(8, 1, 1) * torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8])
        + torch.cat([x.new_zeros(x.shape[0], 1, 8, 8), torch.ones_like(x)[:, 1:]], 1)
    ),
    "parts": Network(
        lambda s, x: torch.stack(x.unbind(1), 1)
        + torch.cat(x.chunk(2, 1), 1)
        + torch.cat(x.split([3, 5], 1), 1)[:, [1, 0, 3, 2, 5, 4, 7, 6]]
    ),
    "in place": Network(lambda s, x: s.layers[0](assigned(x)), IN_PLACE),
    "activations": Network(lambda s, x: all_activations(x)),
    "shapes": Network(
        lambda s, x: F.pad(x.roll(1, 2).flip(3), (1, 1, 1, 1), mode="reflect")[..., 1:-1, 1:-1]
        + F.interpolate(x, 16).repeat(1, 1, 2, 1)[..., ::4, ::2]
        + F.interpolate(x, scale_factor=2, mode="bilinear")[..., ::2, ::2]
        + F.adaptive_max_pool2d(x, 1)
    ),
    "sizes": Network(lambda s, x: pairs(x.reshape(x.shape[0] * 4, 2, 64)).view(x.shape[0], 8, 2)),
    "reductions": Network(
        lambda s, x: F.normalize(x, dim=1)
        + x.max(1, keepdim=True)[0]
        + x.amin((2, 3), keepdim=True)
        + x.std((2, 3), keepdim=True)
        + x.logsumexp(1, keepdim=True)
        - x.square().mean((1, 2, 3), keepdim=True).rsqrt()
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", NETWORKS)
def test_what_networks_do(what: str, tmp_path: Path) -> None:
    stored_and_loaded(NETWORKS[what], tmp_path)


# What can't be stored


def item(_: Network, x: Tensor) -> Tensor:
    return x * x.mean().item()


def depends_on_numbers(_: Network, x: Tensor) -> Tensor:
    return x if x.mean() > 0 else -x


def by_numpy(_: Network, x: Tensor) -> Tensor:
    return torch.from_numpy(np.sin(x.detach().numpy()))


def of_two_images(_: Network, x: Tensor) -> Tensor:
    return x.view(2, 8, 8, 8)


def raises(_: Network, x: Tensor) -> Tensor:
    raise ValueError("two\nlines")


HERE = r"test_storable_models.py:\d+"


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        (item, rf"its module network.network \(Network\) at {HERE} calls item \(torch.ops.aten"),
        (depends_on_numbers, rf"can't trace it at {HERE}: what it does depends on numbers in a"),
        (by_numpy, rf"can't trace it at {HERE}: .numpy\(\) is not supported"),
        (of_two_images, "its graph is only for some numbers of images .*: len"),
        (raises, rf"can't trace it at {HERE}: two lines"),
    ],
)  # fmt: skip
def test_what_can_not_be_stored_is_a_line(
    function: Callable[[Network, Tensor], Tensor], complaint: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=f"^this model can't be recorded: .*{complaint}") as info:
        check_storable(classifier(Network(function)), images_of(32))
    assert "\n" not in str(info.value)
    assert capfd.readouterr() == ("", "")


def test_a_network_that_changes_its_statistics_is_not_stored() -> None:
    model = classifier(Network(lambda s, x: s.layers[0](x), nn.BatchNorm2d(8)))
    model.train()
    with pytest.raises(ValueError, match=r"changes its .*layers.0.\w+ whenever it predicts"):
        check_storable(model, images_of(32))


@pytest.mark.parametrize(
    ("forward", "complaint"),
    [
        (lambda _, x: {"outputs": x}, "it gives a dict, not a tensor"),
        (lambda _, x: x.double(), r"it gives torch.float64 \(2, 10\), not float32"),
        (lambda _, x: x[:, 0], r"it gives torch.float32 \(2,\), not float32"),
    ],
)
def test_what_gives_no_probabilities_is_a_line(
    forward: Callable[[nn.Module, Tensor], Tensor], complaint: str
) -> None:
    class Odd(nn.Linear):
        def forward(self, images: Tensor) -> Tensor:
            return forward(self, super().forward(images.float().mean((1, 2))))

    with pytest.raises(ValueError, match=f"this model can't be recorded: .*{complaint}"):
        check_storable(Odd(3, 10).eval(), images_of(32))


def test_a_model_that_was_checked_is_not_traced_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = classifier(Network(lambda _, x: x.relu()))
    check_storable(model, images_of(32))
    monkeypatch.setattr(recording, "_exported", lambda *_, **__: pytest.fail("it is traced"))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2)
    save_model(model, tmp_path / "model", input_example=images_of(32), metadata=CLASSES)
    with torch.inference_mode():
        expected = model(torch.from_numpy(images_of(32, 3))).numpy()
    probabilities = load_model(str(tmp_path / "model")).probabilities(images_of(32, 3))
    np.testing.assert_allclose(probabilities, expected, rtol=0, atol=1e-5)
