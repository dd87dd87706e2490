"""Predicted images to look at: the surest right ones, the surest wrong ones, the least sure."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tracking.plotting import BLUE, GREY, ORANGE, plain_style, save
from tracking.text import shortened

if TYPE_CHECKING:
    from pathlib import Path
    from typing import BinaryIO

    import numpy as np
    import numpy.typing as npt
    from matplotlib.axes import Axes

RIGHT, WRONG, SURE, UNSURE = "surest right", "surest wrong", "surest", "least sure"

EACH = 4
"""Examples of a group, in a row of the sheet."""

EXPLANATION = (
    "The surest right ones, the surest wrong ones, and the least sure of all. Bars are the "
    "probabilities of the most probable classes, with that of the true class. The outline is the "
    "target: 1 for the true class."
)
"""What a sheet shows."""

_CLASSES = 5
"""The classes of which an example shows the scores: the highest, and the target."""

_NAME_LENGTH = 28


ImageReader = Callable[[int], "npt.NDArray[np.uint8] | None"]
"""Returns the image (H, W, C) at a position of a source, None if it can't be read."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """A prediction."""

    row: int
    """The image's position in its source."""
    name: str
    label: int
    """The position of the true class, −1 if it is not known."""
    probabilities: npt.NDArray[np.float32]
    """(K,)"""

    @property
    def prediction(self) -> int:
        """The position of the class with the highest probability, the first of equal ones."""
        return int(self.probabilities.argmax())


class ExamplePicker:
    """Picks examples from predictions that come in parts.

    Of equally sure ones, the first is picked. Memory is that of the examples alone.
    """

    def __init__(self, each: int = EACH) -> None:
        self.each = each
        self._picked: dict[str, list[Example]] = {RIGHT: [], WRONG: [], SURE: [], UNSURE: []}
        self._has_labels = False

    def add(
        self,
        rows: npt.NDArray[np.int64],
        names: Sequence[str],
        labels: npt.NDArray[np.int64],
        probabilities: npt.NDArray[np.float32],
    ) -> None:
        """Add predictions.

        Args:
            rows: (N,), the images' positions in their source.
            names: N names.
            labels: (N,), the positions of the true classes, −1 where not known.
            probabilities: (N, K).
        """
        import numpy as np

        if not len(rows):
            return
        sure = probabilities.max(axis=1)
        is_right, is_known = probabilities.argmax(axis=1) == labels, labels >= 0
        self._has_labels |= bool(is_known.any())
        for group, of_group, score in (
            (RIGHT, is_right & is_known, sure),
            (WRONG, ~is_right & is_known, sure),
            (SURE, np.ones(len(rows), bool), sure),
            (UNSURE, np.ones(len(rows), bool), -sure),
        ):
            found = np.flatnonzero(of_group)
            best = found[np.lexsort((rows[found], -score[found]))][: self.each]
            self._picked[group] = self._merged(
                self._picked[group],
                [
                    Example(
                        row=int(rows[at]),
                        name=names[at],
                        label=int(labels[at]),
                        probabilities=probabilities[at].copy(),
                    )
                    for at in best
                ],
                -1 if group == UNSURE else 1,
            )

    def _merged(self, some: list[Example], others: list[Example], sign: int) -> list[Example]:
        key = lambda each: (-sign * float(each.probabilities.max()), each.row)  # noqa: E731
        return sorted([*some, *others], key=key)[: self.each]

    def groups(self) -> dict[str, list[Example]]:
        """Return the examples of each group that has some; without labels, sure and not sure."""
        wanted = (RIGHT, WRONG, UNSURE) if self._has_labels else (SURE, UNSURE)
        return {group: self._picked[group] for group in wanted if self._picked[group]}

    def examples(self, classes: Sequence[str], read_image: ImageReader) -> Examples:
        """Return the examples with their images; each image is read once."""
        groups = self.groups()
        rows = sorted({each.row for group in groups.values() for each in group})
        read = {row: read_image(row) for row in rows}
        images = {row: image for row, image in read.items() if image is not None}
        return Examples(classes=tuple(classes), groups=groups, images=images)


@dataclass(frozen=True, kw_only=True, eq=False)
class Examples:
    """Examples with their images."""

    classes: tuple[str, ...]
    groups: Mapping[str, Sequence[Example]]
    """By the title of the group."""
    images: Mapping[int, npt.NDArray[np.uint8]]
    """(H, W, C) by row. An example without an image is not drawn."""

    def records(self) -> dict[str, list[dict[str, Any]]]:
        """Return the examples of each group in JSON's types, without their images."""
        return {
            title: [
                {
                    "source": each.name,
                    "label": self.classes[each.label] if each.label >= 0 else None,
                    "prediction": self.classes[each.prediction],
                    "probability": float(each.probabilities.max()),
                }
                for each in group
            ]
            for title, group in self.groups.items()
        }

    def as_dict(self) -> dict[str, Any]:
        """Return them in JSON's types, for `from_dict`; images are reduced to `LARGEST` pixels."""
        return {
            "classes": list(self.classes),
            "groups": {
                title: [
                    {
                        "row": each.row,
                        "name": each.name,
                        "label": each.label,
                        "probabilities": each.probabilities.tolist(),
                    }
                    for each in group
                ]
                for title, group in self.groups.items()
            },
            "images": {str(row): _packed(image) for row, image in self.images.items()},
        }

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> Examples:
        """Return the examples of `as_dict`. Bad content is a ValueError."""
        import numpy as np

        try:
            classes = tuple(map(str, told["classes"]))
            groups = {
                str(title): [
                    Example(
                        row=int(each["row"]),
                        name=str(each["name"]),
                        label=int(each["label"]),
                        probabilities=np.array(each["probabilities"], np.float32),
                    )
                    for each in group
                ]
                for title, group in told["groups"].items()
            }
            images = {int(row): _unpacked(packed) for row, packed in told["images"].items()}
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise ValueError(f"these are no examples: {error!r}") from error
        for each in (each for group in groups.values() for each in group):
            if each.probabilities.shape != (len(classes),) or not -1 <= each.label < len(classes):
                raise ValueError(f"these are no examples of {len(classes)} classes")
        return cls(classes=classes, groups=groups, images=images)


LARGEST = 96
"""Height and width of an image that is recorded with its example."""


def _packed(image: npt.NDArray[np.uint8]) -> dict[str, Any]:
    from PIL import Image

    if max(image.shape[:2]) > LARGEST:
        import numpy as np

        small = Image.fromarray(image if image.shape[-1] == 3 else image[..., 0])
        small.thumbnail((LARGEST, LARGEST))
        image = np.asarray(small).reshape(small.height, small.width, -1)
    return {"shape": list(image.shape), "pixels": base64.b64encode(image.tobytes()).decode()}


def _unpacked(packed: Mapping[str, Any]) -> npt.NDArray[np.uint8]:
    import numpy as np

    height, width, channels = map(int, packed["shape"])
    if not (0 < height <= LARGEST and 0 < width <= LARGEST and channels in (1, 3)):
        raise ValueError(f"an image of {height}×{width} with {channels} channels")
    pixels = np.frombuffer(base64.b64decode(packed["pixels"]), np.uint8)
    return pixels.reshape(height, width, channels)


def draw_examples(examples: Examples, file: Path | BinaryIO) -> None:
    """Draw a sheet of examples as PNG: each image, and beside it its scores and its target."""
    from matplotlib.figure import Figure

    shown = {
        title: kept
        for title, group in examples.groups.items()
        if (kept := [each for each in group if each.row in examples.images])
    }
    lines = sum(_num_lines(group) for group in shown.values())
    with plain_style():
        figure = Figure(figsize=(12.8, 0.2 + 2.05 * lines))
        grid = figure.add_gridspec(
            max(1, lines), 2 * EACH, width_ratios=(1, 0.8) * EACH, wspace=1.0, hspace=0.6
        )
        line = 0
        for title, group in shown.items():
            for place, example in enumerate(group):
                row, column = line + place // EACH, 2 * (place % EACH)
                picture = figure.add_subplot(grid[row, column])
                _draw_image(picture, example, examples.images[example.row], examples.classes)
                if place == 0:
                    picture.text(
                        0, 1.42, title, transform=picture.transAxes, fontsize=12, fontweight="bold"
                    )
                _draw_scores(figure.add_subplot(grid[row, column + 1]), example, examples.classes)
            line += _num_lines(group)
        save(figure, file)


def _num_lines(group: Sequence[Example]) -> int:
    return -(-len(group) // EACH)


def _draw_image(
    axes: Axes, example: Example, image: npt.NDArray[np.uint8], classes: Sequence[str]
) -> None:
    axes.imshow(image if image.shape[-1] == 3 else image[..., 0], cmap="gray", vmin=0, vmax=255)
    axes.set_anchor("NW")  # its title is then above the scores, which begin at the same height
    axes.set_xticks([])
    axes.set_yticks([])
    predicted = shortened(classes[example.prediction], 16)
    truth = "" if example.label < 0 else f"is {shortened(classes[example.label], 16)}, "
    text = f"{truth}predicted {predicted}"
    axes.set_title(text, fontsize=8.5, loc="left", parse_math=False, pad=4)
    axes.set_xlabel(shortened(example.name, _NAME_LENGTH), fontsize=7, color=GREY, parse_math=False)


def _draw_scores(axes: Axes, example: Example, classes: Sequence[str]) -> None:
    """Draw a bar for the probability of each shown class, and the target as an outline."""
    import numpy as np

    order = np.argsort(-example.probabilities, kind="stable")
    shown = [int(k) for k in order[:_CLASSES]]
    if example.label >= 0 and example.label not in shown:
        shown[-1] = example.label
    places = range(len(shown))
    is_right = example.label in (-1, example.prediction)
    colours = [
        (BLUE if is_right else ORANGE) if k == example.prediction else "#bbbbbb" for k in shown
    ]
    axes.barh(places, example.probabilities[shown], color=colours, height=0.62)
    if example.label >= 0:
        target = [float(k == example.label) for k in shown]
        axes.barh(places, target, fill=False, edgecolor="black", linewidth=1.1, height=0.8)
    for place, k in zip(places, shown, strict=True):
        axes.text(1.04, place, f"{100 * example.probabilities[k]:.0f} %", va="center", fontsize=7)
    axes.set_yticks(
        places, [shortened(classes[k], 12) for k in shown], fontsize=7, parse_math=False
    )
    axes.set(xlim=(0, 1), ylim=(_CLASSES - 0.4, -0.6), xticks=())
    axes.tick_params(length=0)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
