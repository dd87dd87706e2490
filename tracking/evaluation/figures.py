"""The two figures of a report, as PNG, drawn without pyplot and without a user's matplotlibrc."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tracking.plotting import BLUE, GREY, plain_style, save
from tracking.text import shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from tracking.evaluation.metrics import Measures

# With up to so many classes, the cells of the confusion matrix have numbers, and all classes names.
_MOST_NUMBERS, _MOST_NAMES = 30, 120
_LARGEST_INCHES = 20.0


def draw_confusion(measures: Measures, file: Path) -> None:
    """Draw the confusion matrix: the shade is the share of the true class's images."""
    import numpy as np
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    size = len(measures.classes)
    inches = min(2 + size * (0.4 if size <= _MOST_NUMBERS else 0.18), _LARGEST_INCHES)
    with plain_style():
        figure = Figure(figsize=(inches, inches))
        axes = figure.add_axes((0, 0, 1, 1))
        with np.errstate(invalid="ignore"):
            shares = measures.confusion / measures.confusion.sum(axis=1, keepdims=True)
        # The square root makes a confusion of 2 % visible.
        shown = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1))
        axes.set_facecolor("lightgrey")  # classes without images
        if size <= _MOST_NUMBERS:
            _write_numbers(axes, measures, shares**0.5 > 0.6)
        _name_classes(axes, measures)
        axes.set_title(
            f"{measures.labelled:,} images, {100 * measures.accuracy[0]:.2f} % on the diagonal"
        )
        bar = figure.add_axes((1 + 0.25 / inches, 0, 0.2 / inches, 1))
        figure.colorbar(
            shown, cax=bar, label="share of the true class", ticks=(0, 0.01, 0.05, 0.2, 0.5, 1)
        )
        save(figure, file)


def _write_numbers(axes: Axes, measures: Measures, is_dark: object) -> None:
    import numpy as np

    dark = np.asarray(is_dark)
    fontsize = min(10.0, 36 / len(str(measures.confusion.max())))
    for (true, predicted), count in np.ndenumerate(measures.confusion):
        if count:
            axes.text(
                predicted,
                true,
                str(count),
                color="white" if dark[true, predicted] else "black",
                fontsize=fontsize,
                ha="center",
                va="center",
            )


def _name_classes(axes: Axes, measures: Measures) -> None:
    size = len(measures.classes)
    positions = range(0, size, math.ceil(size / _MOST_NAMES))
    names = [shortened(measures.classes[k]) for k in positions]
    fontsize = 10 if size <= _MOST_NUMBERS else 6
    turned = 90 if max(map(len, names)) > 3 else 0
    # Matplotlib would read text between dollar signs as mathematics.
    axes.set_xticks(positions, names, rotation=turned, fontsize=fontsize, parse_math=False)
    axes.set_yticks(positions, names, fontsize=fontsize, parse_math=False)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")


def draw_reliability(measures: Measures, file: Path) -> None:
    """Draw the accuracy and the images of each bin of the confidence."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    bins = measures.per_bin()
    bins = bins[bins["images"] > 0]
    width = 1 / len(measures.bin_images)
    with plain_style():
        figure = Figure(figsize=(5.5, 7), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        upper.bar(
            bins["above"], bins["accuracy"], width, align="edge", color=BLUE, alpha=0.35,
            edgecolor=BLUE, label="accuracy of the bin",
        )  # fmt: skip
        upper.errorbar(
            bins["confidence"],
            bins["accuracy"],
            (bins["accuracy"] - bins["accuracy_low"], bins["accuracy_high"] - bins["accuracy"]),
            fmt="o", color=BLUE, markersize=4, capsize=2,
            label="at its mean confidence, 95 % interval",
        )  # fmt: skip
        upper.plot((0, 1), (0, 1), "--", color=GREY, label="calibrated: accuracy = confidence")
        upper.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="accuracy")
        figure.legend(loc="outside lower center", frameon=False, fontsize=9)
        upper.set_title(
            f"expected calibration error {measures.calibration_error:.4f}, "
            f"{measures.labelled:,} images"
        )
        lower.bar(
            bins["above"], bins["images"] / measures.labelled, width, align="edge", color=BLUE,
            edgecolor="white",
        )  # fmt: skip
        lower.set(xlabel="confidence: probability of the predicted class", ylabel="images")
        for axis in (upper.yaxis, lower.yaxis, lower.xaxis):
            axis.set_major_formatter(PercentFormatter(1, decimals=0))
        save(figure, file)


FIGURES: dict[str, Callable[[Measures, Path], None]] = {
    "confusion.png": draw_confusion,
    "reliability.png": draw_reliability,
}
