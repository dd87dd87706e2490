"""The numbers of the figures of losses: values and gradients, by `cnn.losses` and autograd."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cnn.losses import LOSSES, PROBABILITIES

OUTPUTS = (0.1, 0.2, 0.3)
LABEL = 1
"""The worked example: three outputs of an image of class 1."""

STEPS = tuple(round(-4 + step / 10, 1) for step in range(81))
"""Where a figure moves an output to, from −4 to 4."""

MOVED = {"right": 1, "wrong": 2}
"""Which output of the example a figure moves: that of the right class, or that of a wrong one."""

ALIKE = 20
"""How many images look alike in the figure of these."""

SHARES = tuple(count / ALIKE for count in range(1, ALIKE))
"""The share of the first class among images that look alike."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A loss at the outputs of one image."""

    outputs: tuple[float, ...]
    value: float
    gradient: tuple[float, ...]
    """The derivatives of the value by each output."""
    probabilities: tuple[float, ...]
    """What a model that is trained with this loss would report."""


def point(name: str, outputs: Sequence[float] = OUTPUTS, label: int = LABEL) -> Point:
    """Return a loss and its gradient for one image, in float64."""
    loss = LOSSES[name]
    row = torch.tensor([outputs], dtype=torch.float64, requires_grad=True)
    value = loss(row, torch.tensor([label]))
    (gradient,) = torch.autograd.grad(value, row)
    probabilities = PROBABILITIES[loss.outputs_to_probabilities](row.detach())
    return Point(
        outputs=tuple(outputs),
        value=value.item(),
        gradient=tuple(gradient[0].tolist()),
        probabilities=tuple(probabilities[0].tolist()),
    )


def slices(name: str) -> dict[str, list[Point]]:
    """Return a loss along one output of the example, by a key of `MOVED`; the others stay."""
    return {
        key: [point(name, [*OUTPUTS[:moved], step, *OUTPUTS[moved + 1 :]]) for step in STEPS]
        for key, moved in MOVED.items()
    }


def descent(name: str, *, learning_rate: float, steps: int) -> list[Point]:
    """Return the way of the example's outputs under gradient steps, as if they were the weights."""
    points = [point(name)]
    for _ in range(steps):
        last = points[-1]
        pairs = zip(last.outputs, last.gradient, strict=True)
        points.append(point(name, [output - learning_rate * slope for output, slope in pairs]))
    return points


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The mean loss of images that look alike, by the answer that they all get."""

    answers: tuple[float, ...]
    means: tuple[float, ...]

    @property
    def best(self) -> tuple[float, float]:
        """The first and the last of the best answers."""
        lowest = min(self.means)
        pairs = zip(self.answers, self.means, strict=True)
        best = [answer for answer, mean in pairs if mean - lowest < 1e-9]
        return best[0], best[-1]


def alike(name: str, share: float) -> Curve:
    """Return the mean loss of `ALIKE` images of which a share has class 0.

    All have the same outputs. The answer is output 0, with 0 for the other outputs; for
    cross-entropy it is the probability of class 0, which the others share equally.
    """
    first = round(share * ALIKE)
    labels = torch.tensor([0] * first + [1 + i % 2 for i in range(ALIKE - first)])
    answers, rows = zip(*_answers(name), strict=True)
    means = [LOSSES[name](row.expand(ALIKE, -1), labels).item() for row in rows]
    return Curve(answers=answers, means=tuple(means))


def _answers(name: str) -> Iterator[tuple[float, Tensor]]:
    if name == "cross_entropy":
        for percent in (1, 2, *range(5, 100, 5), 98, 99):
            rest = (100 - percent) / 200
            row = [math.log(percent / 100), math.log(rest), math.log(rest)]
            yield percent / 100, torch.tensor([row], dtype=torch.float64)
    else:
        for percent in range(-20, 125, 5):
            yield percent / 100, torch.tensor([[percent / 100, 0, 0]], dtype=torch.float64)
