"""What the page on the network shows of trained ones: `python docs/lessons/train.py`.

It trains the CNN on CIFAR-10, for the pictures of its first filters, and on scikit-learn's digits,
for the outputs of three test images. The files are committed: no page trains.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from cnn.config import TrainConfig  # noqa: E402
from cnn.data import Dataset, load  # noqa: E402
from cnn.networks import build_network  # noqa: E402
from cnn.training import train  # noqa: E402

IMAGES = ROOT / "docs" / "images"
SCORES = Path(__file__).parent / "scores.json"

# The best of a search's first configurations: 70.3 % of the validation images right.
FILTERS = TrainConfig(
    loss="cross_entropy",
    learning_rate=0.037839867483071776,
    batch_size=128,
    epochs=5,
    seed=1000,
    precision="bfloat16",
)
DIGITS = TrainConfig(loss="cross_entropy", learning_rate=0.01, batch_size=32, epochs=5)
COLUMNS, GAP, ZOOM = 8, 1, 8


def main() -> None:
    """Train both networks, and write their files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="cifar10", help="for the filters (default: cifar10)")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="(default: data)")
    options = parser.parse_args()
    torch.set_num_threads(1)  # as a worker does
    digits = load("digits", data_dir=options.data_dir, seed=DIGITS.seed)
    scores = three_images(trained(DIGITS, digits), digits)
    SCORES.write_text("[\n" + ",\n".join(map(json.dumps, scores)) + "\n]\n")
    data = load(options.dataset, data_dir=options.data_dir, seed=FILTERS.seed)
    before = first_filters(build_network(len(data.classes), seed=FILTERS.seed))
    after = first_filters(trained(FILTERS, data))
    largest = after.abs().max()
    for name, filters in {"before": before, "after": after}.items():
        picture(filters / largest).save(IMAGES / f"filters-{name}.png", optimize=True)


def trained(config: TrainConfig, data: Dataset) -> nn.Module:
    """Return the network after its last epoch."""
    for epoch in train(config, data):
        print(f"{data.name}: epoch {epoch.number}, validation accuracy {epoch.val_accuracy:.2%}")
    return epoch.model


def first_filters(network: nn.Module) -> Tensor:
    """Return a copy of the weights of the first convolution (32, 3, 5, 5)."""
    first = next(layer for layer in network.modules() if isinstance(layer, nn.Conv2d))
    return first.weight.detach().clone()


def picture(filters: Tensor) -> Image.Image:
    """Return filters (N, 3, H, W) in −1 .. 1 as tiles: 0 is grey, what is between is clear."""
    count, _, height, width = filters.shape
    step_y, step_x = height + GAP, width + GAP
    rows = -(-count // COLUMNS)
    pixels = np.zeros((rows * step_y - GAP, COLUMNS * step_x - GAP, 4), dtype=np.uint8)
    colours = ((filters.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    for number, colour in enumerate(colours):
        y, x = number // COLUMNS * step_y, number % COLUMNS * step_x
        pixels[y : y + height, x : x + width] = np.dstack([colour, np.full((height, width), 255)])
    size = (pixels.shape[1] * ZOOM, pixels.shape[0] * ZOOM)
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


@torch.inference_mode()
def three_images(network: nn.Module, data: Dataset) -> list[dict[str, Any]]:
    """Return three test images with their outputs: the surest right, the least sure, a wrong one.

    The wrong one is the surest of those.
    """
    images, labels = data.test.images, data.test.labels
    outputs = network(images)
    sure, predicted = outputs.softmax(dim=1).max(dim=1)
    right = predicted == labels
    wrong = torch.where(right, 0, sure).argmax()
    assert not right[wrong], "no test image is wrong: train for fewer epochs"
    chosen = {
        "the surest right one": torch.where(right, sure, 0).argmax(),
        "the least sure one": sure.argmin(),
        "the surest wrong one": wrong,
    }
    return [
        {
            "what": what,
            "label": int(labels[i]),
            "outputs": [round(float(output), 3) for output in outputs[i]],
            "png": as_png(images[i]),
        }
        for what, i in chosen.items()
    ]


def as_png(image: Tensor) -> str:
    """Return an image (H, W, 3) uint8 as a PNG in base 64, in grey."""
    file = io.BytesIO()
    Image.fromarray(image.numpy()).convert("L").save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


if __name__ == "__main__":
    main()
