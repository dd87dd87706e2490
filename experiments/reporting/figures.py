"""The figures of a comparison's report that are small multiples, a panel for each loss."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from experiments.comparison.results import Results
from experiments.reporting.figure_data import best_settings, budget, learning_curves
from experiments.reporting.search_data import chosen_trainings, ranges
from experiments.reporting.small_multiples import FONT_SIZE, Palette, SmallMultiples
from tracking.text import shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

# Okabe and Ito's colours, which colour-blind readers can distinguish, without yellow (too faint on
# white) and black (invisible in dark mode). Each has a marker or a dash.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "star")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")

OBJECTIVE_TITLE = "validation accuracy"
_BLUE = (0.0, 0x72 / 255, 0xB2 / 255)
"""The first of the colours."""


_LIGHT = 0.4
"""The opacity of trainings that explore."""


class LearningRates(SmallMultiples):
    """Accuracy against learning rate, a marker a batch size; hollow where training diverged."""

    name = "learning_rates"
    data = "trials"
    title = "Accuracy against learning rate"
    caption = (
        "Validation accuracy of the last epoch, for each loss and batch size; one point is one "
        "training. All losses have the same axes. Shaded: the range of learning rates at the start "
        "of a search. Ringed: the configuration that it chose."
    )
    has_legend = True

    def __init__(self, results: Results) -> None:
        self.is_staged = results.is_staged
        if self.is_staged:
            self.caption = f"{self.caption} Light: the trainings that explore; later ones are dark."
        self.all_trials = results.trials
        self.trials = results.trials.dropna(subset=["val_accuracy"])
        self.sizes = sorted(
            {*results.plan["batch_sizes"], *self.trials["batch_size"].dropna().astype(int)}
        )
        self.ranges = ranges(results).set_index("loss").astype(float)
        self.chosen = chosen_trainings(results).dropna(subset="val_accuracy")
        self.best = best_settings(results)
        self.losses = _present(results, self.trials["loss"])
        self._limits = _limits(self.trials["val_accuracy"])

    def draw(self, axes: Axes, loss: str, palette: Palette) -> None:
        """Draw the panel of a loss."""
        start, end = (float(each) for each in self.ranges.loc[[loss], ["low", "high"]].iloc[0])
        axes.axvspan(start, end, color=palette.others, alpha=0.25, linewidth=0)
        trials = self.trials[self.trials["loss"] == loss]
        for size, color, marker in self._looks():
            of_size = trials[trials["batch_size"] == size]
            for rows, look in self._by_look(of_size, color, palette):
                axes.plot(rows["learning_rate"], rows["val_accuracy"], marker=marker, **look)
        chosen = self.chosen[self.chosen["loss"] == loss]
        axes.plot(chosen["learning_rate"], chosen["val_accuracy"], **_ring(palette))
        rates = self.ranges.to_numpy(float)
        low, high = float(np.nanmin(rates)), float(np.nanmax(rates))
        axes.set_xscale("log")
        axes.set_xlim(low / 1.3, high * 1.3)
        ticks = _decades(low, high)
        axes.set_xticks(ticks, [f"{rate:.2g}" for rate in ticks])
        axes.xaxis.set_minor_formatter(lambda _value, _position: "")
        axes.set_xlabel("learning rate")
        _accuracy_axis(axes, self._limits)

    @staticmethod
    def _by_look(
        trials: pd.DataFrame, color: str, palette: Palette
    ) -> Iterator[tuple[pd.DataFrame, dict[str, Any]]]:
        is_complete = trials["outcome"] == "complete"
        is_first = trials["stage"] == "explore"
        light = {"alpha": _LIGHT}
        yield trials[is_complete & is_first], _filled(color, palette) | light
        yield trials[~is_complete & is_first], _hollow(color) | light
        yield trials[is_complete & ~is_first], _filled(color, palette)
        yield trials[~is_complete & ~is_first], _hollow(color)

    def describe(self, loss: str) -> str:
        """Describe the panel of a loss in words."""
        outcomes = self.all_trials.loc[self.all_trials["loss"] == loss, "outcome"]
        counts = outcomes.value_counts()
        words = [f"{counts[what]} {what}" for what in ("diverged", "failed") if what in counts]
        text = _counted(len(outcomes), "trial") + (f" ({', '.join(words)})" if words else "")
        if loss not in self.best.index:
            return f"{text}, none of which completed" if len(outcomes) else text
        row = self.best.loc[[loss]].iloc[0]
        return (
            f"{text}, the best {percent(row['val_accuracy'])} at learning rate "
            f"{row['learning_rate']:.3g}, batch size {row['batch_size']:.0f}"
        )

    def legend(self, palette: Palette) -> list[Line2D]:
        """Return an entry for each batch size, and one for trials that diverged."""
        from matplotlib.lines import Line2D

        sizes = [
            Line2D([], [], marker=marker, label=f"batch size {size}", **_filled(color, palette))
            for size, color, marker in self._looks()
        ]
        light = {**_filled(palette.ink, palette), "alpha": _LIGHT}
        stages = [Line2D([], [], marker="o", label="light: explores", **light)]
        return [
            *sizes,
            Line2D([], [], marker="o", label="hollow: diverged", **_hollow(palette.ink)),
            Line2D([], [], label="ringed: chosen", **_ring(palette)),
            *(stages if self.is_staged else []),
        ]

    def _looks(self) -> list[tuple[int, str, str]]:
        """Return the batch sizes, each with its colour and marker."""
        return [
            (size, COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)])
            for number, size in enumerate(self.sizes)
        ]


def _filled(color: str, palette: Palette) -> dict[str, Any]:
    edge = {"markersize": 7, "markeredgecolor": palette.ink, "markeredgewidth": 0.6}
    return {"linestyle": "none", "color": color, **edge}


def _ring(palette: Palette) -> dict[str, Any]:
    edge = {"markersize": 13, "markeredgecolor": palette.ink, "markeredgewidth": 1.2}
    return {"linestyle": "none", "marker": "o", "markerfacecolor": "none", **edge}


def _hollow(color: str) -> dict[str, Any]:
    edge = {"markersize": 7, "markeredgecolor": color, "markeredgewidth": 1.4}
    return {"linestyle": "none", "markerfacecolor": "none", **edge}


class Budget(SmallMultiples):
    """The best accuracy to expect of a number of trials."""

    name = data = "budget"
    title = "Accuracy against budget"

    def __init__(self, results: Results) -> None:
        self.table = budget(results)
        self.caption = _OF_SEARCHES if results.is_staged else _OF_RANDOM_TRIALS
        self.losses = _present(results, self.table["loss"])
        shown = ["val_accuracy", "val_accuracy_low", "val_accuracy_high"]
        self._limits = _limits(self.table[shown].to_numpy(float).ravel())

    def draw(self, axes: Axes, loss: str, palette: Palette) -> None:
        """Draw the panel of a loss: its own curve, with those of the others behind it."""
        rows = self.table[self.table["loss"] == loss]
        _draw_band(axes, rows, "trials", palette)
        _draw_among_others(axes, self.table, "trials", loss, palette)
        _count_axis(axes, self.table["trials"].max(), "trials")
        _accuracy_axis(axes, self._limits)

    def describe(self, loss: str) -> str:
        """Describe the panel of a loss in words."""
        rows = self.table[self.table["loss"] == loss]
        if rows.empty:
            return "no trial has an accuracy"
        first, last = rows.iloc[0], rows.iloc[-1]
        text = f"{percent(first['val_accuracy'])} expected of one trial"
        if len(rows) == 1:
            return text
        text += f", {percent(last['val_accuracy'])} of the best of {last['trials']}"
        if last["searches"] == 1:
            return text
        ends = (percent(last[f"val_accuracy_{end}"]) for end in ("low", "high"))
        return f"{text}; {' to '.join(ends)} in {last['searches']} searches"


_OF_RANDOM_TRIALS = (
    "The expected best validation accuracy of a number of trials with random configurations "
    "(expected validation performance, Dodge et al. 2019, with the unbiased estimator of Tang "
    "et al. 2020): thick the loss, thin the others. Diverged trials count with their last "
    "accuracy. The right end is the best of all trials, which is too high."
)
_OF_SEARCHES = (
    "The best validation accuracy of the first trainings of a search, which explore and refine: "
    "thick the mean over the searches of the loss, the band from the lowest to the highest search, "
    "thin the means of the other losses. Each search is an independent repeat, so the mean is an "
    "unbiased estimate of what the next search would find. The best of several trainings is itself "
    "too high; the test accuracies above are not."
)


class LearningCurves(SmallMultiples):
    """Accuracies against epochs, at the best configuration, with a band over the seeds."""

    name = data = "learning_curves"
    title = "Learning curves"
    caption = (
        "Validation accuracy of each loss, epoch by epoch, {at}: thick the mean, the band from the "
        "lowest to the highest seed, dashed the mean training accuracy, thin the means of the "
        "other losses."
    )

    def __init__(self, results: Results) -> None:
        self.table = learning_curves(results)
        self.caption = self.caption.format(
            at="in its repeats, each at the configuration that its search chose"
            if results.is_staged
            else "at its best configuration"
        )
        self.repeats = results.repeats["loss"].value_counts()
        self.epochs = results.plan["epochs"]
        self.losses = _present(results, self.table["loss"])
        shown = ["val_accuracy_low", "val_accuracy_high", "train_accuracy"]
        self._limits = _limits(self.table[shown].to_numpy(float).ravel())

    def draw(self, axes: Axes, loss: str, palette: Palette) -> None:
        """Draw the panel of a loss: its own curves, with the means of the others behind them."""
        rows = self.table[self.table["loss"] == loss]
        _draw_band(axes, rows, "epoch", palette)
        _draw_among_others(axes, self.table, "epoch", loss, palette)
        axes.plot(
            rows["epoch"], rows["train_accuracy"], color=palette.ink, linewidth=1.2, linestyle="--"
        )
        _count_axis(axes, self.epochs, "epoch")
        _accuracy_axis(axes, self._limits)

    def describe(self, loss: str) -> str:
        """Describe the panel of a loss in words."""
        rows = self.table[self.table["loss"] == loss]
        if rows.empty:
            return "no training of the best configuration"
        last = rows.iloc[-1]
        if last["stage"] == "search":
            of = "of one training of the search"
        else:
            of = f"in the mean of {_counted(last['trainings'], 'seed')}"
            if last["trainings"] < self.repeats[loss]:
                of += f" of {self.repeats[loss]} (the others ended early)"
        return (
            f"{percent(last['val_accuracy'])} after {_counted(last['epoch'], 'epoch')} {of}; "
            f"in training {percent(last['train_accuracy'])}"
        )


class Confusions(SmallMultiples):
    """Confusion matrices; each row is in percent of its true class' images."""

    name = data = "confusions"
    title = "Confusion matrices"
    caption = (
        "The predictions for each true class, in percent of its test images, over all repeats; "
        "shaded by the square root, so that a confusion of a few percent is visible."
    )
    height = 340
    # With more classes, cells have no numbers, and axes no names.
    most_numbers: ClassVar[int] = 12
    most_names: ClassVar[int] = 30
    longest_name: ClassVar[int] = 16

    def __init__(self, results: Results) -> None:
        self.counts = {loss: counts for loss, counts in results.confusions.items() if counts.sum()}
        self.losses = _present(results, self.counts)
        self.names: list[str] = []
        if len(results.classes) <= self.most_names:
            self.names = [shortened(name, self.longest_name) for name in results.classes]
        margin = 30 + 6 * max(map(len, self.names), default=0)
        self.margins = (margin, margin)

    def draw(self, axes: Axes, loss: str, palette: Palette) -> None:
        """Draw the panel of a loss."""
        counts = self.counts[loss]
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        # The square root makes a confusion of a few percent visible. Transparent cells have the
        # page's colour.
        shades = np.empty((*shares.shape, 4))
        shades[..., :3], shades[..., 3] = _BLUE, np.sqrt(shares)
        axes.imshow(shades, interpolation="none", aspect="auto")
        has_numbers = len(shares) <= self.most_numbers
        for (true, predicted), share in np.ndenumerate(shares):
            if has_numbers and share >= 0.005:
                color = "white" if share > 0.6 else palette.ink
                text = axes.text(predicted, true, f"{100 * share:.0f}", color=color, fontsize=9)
                text.set(ha="center", va="center")
        places, size = range(len(self.names)), FONT_SIZE - 2 if has_numbers else 7
        # Matplotlib would read mathematics between dollar signs in a name.
        axes.set_xticks(places, self.names, rotation=90, fontsize=size, parse_math=False)
        axes.set_yticks(places, self.names, fontsize=size, parse_math=False)
        axes.set_xlabel("predicted class")
        axes.set_ylabel("true class")

    def describe(self, loss: str) -> str:
        """Describe the panel of a loss in words."""
        if loss not in self.counts:
            return "none of its models has seen the test split"
        counts = self.counts[loss]
        right = percent(np.trace(counts) / counts.sum())
        return f"{right} of {counts.sum():,} images right, over all repeats"


def _present(results: Results, losses: Iterable[str]) -> list[str]:
    """Return those of the losses that are compared, in the order of the plan."""
    there = set(losses)
    return [loss for loss in results.losses if loss in there]


def _draw_among_others(
    axes: Axes, table: pd.DataFrame, over: str, loss: str, palette: Palette
) -> None:
    """Draw the accuracy of a loss thick, and those of the others thin behind it."""
    for other, rows in table.groupby("loss"):
        if other != loss:
            axes.plot(rows[over], rows["val_accuracy"], color=palette.others, linewidth=1)
    rows = table[table["loss"] == loss]
    (line,) = axes.plot(rows[over], rows["val_accuracy"], color=palette.accent, linewidth=2.5)
    line.set(marker="o", markersize=4)


def _draw_band(axes: Axes, rows: pd.DataFrame, over: str, palette: Palette) -> None:
    """Draw the band from the lowest to the highest accuracy."""
    low, high = rows["val_accuracy_low"], rows["val_accuracy_high"]
    axes.fill_between(rows[over], low, high, color=palette.accent, alpha=0.3, linewidth=0)


def _accuracy_axis(axes: Axes, limits: tuple[float, float]) -> None:
    axes.set_ylim(*limits)
    axes.yaxis.set_major_formatter(lambda share, _position: f"{round(100 * share, 6):g} %")
    axes.set_ylabel(OBJECTIVE_TITLE)
    axes.grid(visible=True)


def _count_axis(axes: Axes, last: int, label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    margin = 0.03 * last
    axes.set_xlim(1 - margin, last + margin)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_xlabel(label)


def _limits(shares: Iterable[float]) -> tuple[float, float]:
    """Return the limits of the axis that all panels share."""
    values = pd.Series(list(shares), dtype=float).dropna()
    if values.empty:
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    margin = max(0.05 * (high - low), 0.002)
    return low - margin, high + margin


def _decades(low: float, high: float) -> list[float]:
    """Return the powers of ten in a range, or its ends if there are fewer than two."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    powers = [float(f"1e{exponent}") for exponent in range(first, last + 1)]
    return powers if len(powers) > 1 else [low, high]


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def percent(share: float) -> str:
    """Return a share in percent, with one decimal."""
    return f"{100 * share:.1f} %"
