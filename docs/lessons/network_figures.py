"""The table and the figures of the page on the network, as Markdown and HTML."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from cnn.losses import LOSSES, softmax
from lessons.drawing import Panel, number, svg, text
from lessons.network import SIZE, layers

SCORES = Path(__file__).parent / "scores.json"
ROW_HEIGHT = 19
TIMES = "\xa0×\xa0"


def layers_table() -> Iterator[str]:
    """Yield a table of the layers, in Markdown."""
    found = layers()
    cost = sum(layer.multiply_adds for layer in found)
    yield "| Layer | Shape of its output | Parameters | Multiply-adds | Share | Receptive field |"
    yield "| --- | --- | ---: | ---: | ---: | ---: |"
    yield f"| image | {TIMES.join(('3', str(SIZE), str(SIZE)))} | | | | 1{TIMES}1 |"
    for layer in found:
        shape = TIMES.join(f"{size:,}" for size in layer.shape)
        field = f"{layer.field}{TIMES}{layer.field}" if layer.field else "whole\xa0image"
        share = f"{layer.multiply_adds / cost * 100:.2g}\xa0%" if layer.multiply_adds else ""
        counts = [
            f"{count:,}" if count else "" for count in (layer.parameters, layer.multiply_adds)
        ]
        yield f"| {layer.what} | {shape} | {' | '.join(counts)} | {share} | {field} |"
    parameters = sum(layer.parameters for layer in found)
    yield f"| **all** | | **{parameters:,}** | **{cost:,}** | | |"


def three_images() -> list[dict[str, Any]]:
    """Return the three test images of digits, as `train.py` has stored them."""
    images: list[dict[str, Any]] = json.loads(SCORES.read_text())
    return images


def field_figure() -> str:
    """Return an image with the squares that a number sees after each convolution."""
    zoom, top = 8, 8
    edge = SIZE * zoom
    parts = [
        f'<image href="data:image/png;base64,{three_images()[0]["png"]}" x="2" y="{top}" '
        f'width="{edge}" height="{edge}" class="pixels"/>'
    ]
    convolutions = [layer for layer in layers() if layer.what.startswith("convolution")]
    for name, layer in zip(("first", "second", "third"), convolutions, strict=True):
        field = layer.field or SIZE
        side = field * zoom
        x, y = (2 + (SIZE - field) / 2 * zoom, top + (SIZE - field) / 2 * zoom)
        size = f'width="{side}" height="{side}"'
        parts.append(f'<rect x="{x:g}" y="{y:g}" {size} class="field"/>')
        ends = f'x1="{x + side:g}" x2="{edge + 14}" y1="{y:g}" y2="{y:g}"'
        parts.append(f'<line {ends} class="field"/>')
        parts.append(text(edge + 20, y + 5, f"{name}: {field}{TIMES}{field}"))
    label = "Squares on an image: what a number sees after each convolution"
    return f"""<figure class="lesson field">{svg(480, edge + top + 4, label, parts)}
<figcaption>The pixels that one number in the middle sees, after each of the three convolutions.
</figcaption></figure>"""


def scores_figure() -> str:
    """Return three images, each with its outputs and probabilities beside its target."""
    blocks = "".join(_scores(image) for image in three_images())
    return f"""<figure class="lesson">
<div class="legend"><span class="key bar">probability</span>
<span class="key target">target</span></div>
<div class="panels">{blocks}</div>
<figcaption>Three test images of scikit-learn’s digits. The number after each bar is the raw output.
</figcaption></figure>"""


def _scores(image: dict[str, Any]) -> str:
    outputs = torch.tensor([image["outputs"]], dtype=torch.float64)
    label = image["label"]
    probabilities = softmax(outputs)[0].tolist()
    loss = LOSSES["cross_entropy"](outputs, torch.tensor([label])).item()
    classes = len(probabilities)
    panel = Panel(left=24, top=8, width=190, height=ROW_HEIGHT * classes, x=(0, 1), y=(classes, 0))
    parts = []
    for k, (probability, output) in enumerate(zip(probabilities, image["outputs"], strict=True)):
        y = panel.up(k) + 3
        is_target = k == label
        parts.append(text(8, y + 11, str(k), "tick right" if is_target else "tick"))
        if is_target:
            parts.append(
                f'<rect x="{panel.left}" y="{y - 1}" width="{panel.width}" '
                f'height="{ROW_HEIGHT - 4}" class="bar-target"/>'
            )
        length = round(probability * panel.width, 1)
        parts.append(
            f'<rect x="{panel.left}" y="{y + 2}" width="{length}" '
            f'height="{ROW_HEIGHT - 10}" class="bar"/>'
        )
        parts.append(text(panel.left + panel.width + 50, y + 11, number(output, 1), "tick end"))
    drawing = svg(280, panel.height + 20, f"Scores of {image['what']}", parts)
    return f"""<div><div class="title">{image["what"].capitalize()}</div>
<div class="image">
<img class="pixels dark-light" alt="a digit {label}" src="data:image/png;base64,{image["png"]}">
<div>class {label}, predicted {probabilities.index(max(probabilities))}<br>
probability of its class: {probabilities[label]:.4f}<br>cross-entropy: {loss:.4f}</div>
</div>
{drawing}</div>"""
