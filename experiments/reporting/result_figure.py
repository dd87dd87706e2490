"""The first figure of a report: each loss' accuracy, and its difference to the winner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from experiments.comparison.results import Results
from experiments.reporting.figures import percent
from experiments.reporting.parts import number
from experiments.reporting.small_multiples import FONT_SIZE, Palette, SmallMultiples
from tracking.text import shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

    from experiments.comparison.assessment import Assessment

ACCURACY, DIFFERENCE = "test accuracy", "difference"
"""The panels."""
COLUMNS = ["panel", "loss", "seed", "value", "low", "high", "images_low", "images_high"]

_NEAR = 2
"""As many losses must have a place, or all have one."""

Row = Mapping[Any, Any]
"""Of a table."""

_ROW_HEIGHT = 30
_LONGEST_NAME = 18
_CHARACTER = {FONT_SIZE: 6.4, FONT_SIZE - 2: 5.4}
"""The width of an average character, by the size of the font; an upper bound for most fonts."""
_FAR = 8
"""A loss this many median widths of an interval behind the best has an arrow instead of a place."""


def result_rows(results: Results, assessment: Assessment) -> pd.DataFrame:
    """Return what the figure shows: a row for each mean, and one for each repeat.

    - `panel`: test accuracy (a share), or difference (to the winner, of shares).
    - `loss`, the highest mean test accuracy first.
    - `seed`: of a repeat; missing for the mean of all.
    - `low`, `high`: the 95 % interval of a mean over new trainings; `images_low`, `images_high`:
      over new trainings and new images.
    """
    rows: list[dict[str, Any]] = []
    table = assessment.table.sort_values("accuracy_mean", ascending=False, kind="stable")
    accuracies = results.repeats.sort_values("seed").pivot(  # noqa: PD010 (each seed once)
        index="seed", columns="loss", values="test_accuracy"
    )
    differences: Mapping[str, Row] = {
        row["loss"]: row for row in assessment.differences.to_dict("records")
    }
    for row in table.to_dict("records"):
        loss = row["loss"]
        ends = _ends(row, "accuracy_", 1)
        rows.append({"panel": ACCURACY, "loss": loss, "value": row["accuracy_mean"], **ends})
        if loss in accuracies:
            rows += _repeats(ACCURACY, loss, accuracies[loss])
    for loss in table["loss"]:
        if loss in differences:
            pair = differences[loss]
            mean = {"value": -pair["difference"], **_ends(pair, "", -1)}
            rows.append({"panel": DIFFERENCE, "loss": loss, **mean})
            if {loss, assessment.winner} <= set(accuracies):
                lead = accuracies[loss] - accuracies[assessment.winner]
                rows += _repeats(DIFFERENCE, loss, lead)
    return pd.DataFrame(rows, columns=COLUMNS).astype({"seed": "Int64"})


def _ends(row: Row, prefix: str, sign: int) -> dict[str, float]:
    """Return the ends of both intervals; of the opposite, with −1."""
    found: dict[str, float] = {}
    for which, start in (("", prefix), ("images_", "images_")):
        ends = [sign * row[f"{start}{end}"] for end in ("low", "high")]
        found |= zip((f"{which}low", f"{which}high"), ends[::sign], strict=True)
    return found


def _repeats(panel: str, loss: str, values: pd.Series[float]) -> list[dict[str, Any]]:
    return [
        {"panel": panel, "loss": loss, "seed": seed, "value": value}
        for seed, value in values.dropna().items()
    ]


class ResultFigure(SmallMultiples):
    """A row a loss: means, intervals and repeats; beside it the differences to the winner."""

    name = data = "result"
    title = "The result"
    has_legend = True

    def __init__(self, results: Results, assessment: Assessment) -> None:
        self.rows = result_rows(results, assessment)
        self.winner = assessment.winner
        is_split_anew = results.plan.get("given_test") is False
        self.on = "and new splits of these images" if is_split_anew else "on these test images"
        self.table: Mapping[str, Row] = {
            row["loss"]: row for row in assessment.table.to_dict("records")
        }
        of_means = self.rows[self.rows["seed"].isna()]
        self.means: dict[str, dict[str, Row]] = {ACCURACY: {}, DIFFERENCE: {}}
        for row in of_means.dropna(subset="value").to_dict("records"):
            self.means[row["panel"]][row["loss"]] = row
        self.has_images = bool(of_means["images_low"].notna().any())
        self.losses = [panel for panel in (ACCURACY, DIFFERENCE) if self.means[panel]]
        self.order = list(dict.fromkeys(of_means["loss"]))
        self.reach, self.far = _reach(of_means[of_means["panel"] == ACCURACY])
        self.height = _ROW_HEIGHT * len(self.order) + 46
        self.margins = (self._margin(), 40)
        self.caption = self._caption()

    def _caption(self) -> str:
        """Return what dots and lines are."""
        images = ""
        if self.has_images:
            images = "; thin, over new trainings and new images"
        left = " An arrow: the loss lies farther to the left." if self.far else ""
        return (
            "Large dots are means over the repeats, small dots the repeats. Lines are 95 % "
            f"intervals: thick, over new trainings {self.on}{images}. The highest mean test "
            f"accuracy is at the top.{left}"
        )

    def draw(self, axes: Axes, panel: str, palette: Palette) -> None:
        """Draw a panel."""
        left, right = self._limits(panel)
        for place, loss in enumerate(self.order):
            if loss in self.far and loss in self.means[panel]:
                axes.plot(100 * left, place, color=palette.accent, marker="<", clip_on=False)
            elif loss in self.means[panel]:
                self._draw_row(axes, place, self.means[panel][loss], palette)
        axes.set_xlim(100 * left, 100 * right)
        axes.set_ylim(len(self.order) - 0.4, -0.6)
        self._name_rows(axes, panel, palette)
        self._name_values(axes, panel, palette)

    def _draw_row(self, axes: Axes, place: int, row: Row, palette: Palette) -> None:
        for ends, width in ((("images_low", "images_high"), 1.3), (("low", "high"), 4.0)):
            span = [100 * row[end] for end in ends]
            if not np.isnan(span).any():
                axes.plot(span, [place, place], color=palette.accent, linewidth=width)
        axes.plot(100 * row["value"], place, **_large(palette))
        rows = self.rows[self.rows["seed"].notna()]
        repeats = rows[(rows["panel"] == row["panel"]) & (rows["loss"] == row["loss"])]
        heights = np.full(len(repeats), place + 0.3)
        axes.plot(100 * repeats["value"], heights, **_small(palette))

    def _name_rows(self, axes: Axes, panel: str, palette: Palette) -> None:
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        to_the_axes = axes.get_yaxis_transform()
        for place, loss in enumerate(self.order):
            lines = (
                (shortened(loss, _LONGEST_NAME), FONT_SIZE, -0.05, "bottom"),
                (self._note(panel, loss), FONT_SIZE - 2, 0.0, "top"),
            )
            for text, size, shift, side in lines:
                words = axes.text(
                    -0.03, place + shift, text, transform=to_the_axes, fontsize=size,
                    color=palette.ink, parse_math=False,
                )  # fmt: skip
                words.set(ha="right", va=side)
        for place in range(1, len(self.order)):
            axes.axhline(place - 0.5, color=palette.grid, linewidth=0.6)

    def _name_values(self, axes: Axes, panel: str, palette: Palette) -> None:
        from matplotlib.ticker import MaxNLocator

        low, high = axes.get_xlim()
        inside = low + 0.95 * (high - low)  # the label of a tick at the right end would be cut
        ticks = [float(tick) for tick in MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high)]
        axes.set_xticks([tick for tick in ticks if low <= tick <= inside])
        axes.grid(visible=True, axis="x")
        if panel == ACCURACY:
            axes.set_xlabel(f"{ACCURACY}, %")
            return
        axes.axvline(0, color=palette.ink, linewidth=1)
        winner = shortened(str(self.winner), _LONGEST_NAME)
        axes.set_xlabel(f"points more than {winner}", parse_math=False)

    def _note(self, panel: str, loss: str) -> str:
        """Return what stands below the name of a loss."""
        row = self.means[panel].get(loss)
        if panel == ACCURACY:
            mean = f"{100 * row['value']:.2f} %" if row else ""
            return ", ".join(filter(None, (mean, self._lost(loss))))
        if row:
            return number(100 * row["value"], "+.2f") + " points"
        return "the reference" if loss == self.winner else "not compared"

    def _lost(self, loss: str) -> str:
        """Return how many repeats of a loss have no test accuracy, and why."""
        row = self.table[loss]
        parts = [f"{row[what]} {what}" for what in ("diverged", "failed") if row[what]]
        if not parts:
            return "" if row["repeats"] else "no repeat"
        return f"{' and '.join(parts)} of {row['repeats']}"

    def _limits(self, panel: str) -> tuple[float, float]:
        """Return the range of values that the axis has."""
        rows = self.rows[(self.rows["panel"] == panel) & ~self.rows["loss"].isin(self.far)]
        values = rows[["value", "low", "high", "images_low", "images_high"]].to_numpy(float)
        found = [*values[~np.isnan(values)], *([0.0] if panel == DIFFERENCE else [])]
        low, high = min(found, default=0.0), max(found, default=0.0)
        low = max(low, high - 1.2 * self.reach)  # an interval may be very wide
        margin = max(0.04 * (high - low), 0.0005)
        return low - margin, high + margin

    def _margin(self) -> int:
        """Return the space that the names of rows need."""
        widths = [10.0]
        for panel in self.losses:
            for loss in self.order:
                name = shortened(loss, _LONGEST_NAME)
                note = self._note(panel, loss)
                widths.append(_CHARACTER[FONT_SIZE] * len(name))
                widths.append(_CHARACTER[FONT_SIZE - 2] * len(note))
        return min(round(max(widths)) + 14, 170)

    def describe(self, panel: str) -> str:
        """Describe a panel in words."""
        if panel == DIFFERENCE:
            return (
                f"to {self.winner}, which has the highest validation accuracy, seed by seed; left "
                "of the line, a loss is worse than it"
            )
        means = [(percent(row["value"]), loss) for loss, row in self.means[panel].items()]
        text = " for ".join(means[0])
        if len(means) > 1:
            text = f"from {' for '.join(means[-1])} to {text}"
        rows = self.table.items()
        lost = [loss for loss, row in rows if row["diverged"] or row["failed"]]
        return "; ".join([text, *(f"{loss}: {self._lost(loss)} repeats" for loss in lost)])

    def legend(self, palette: Palette) -> list[Line2D]:
        """Return an entry for each kind of mark."""
        from matplotlib.lines import Line2D

        thin = Line2D([], [], color=palette.accent, linewidth=1.3, label="and new images")
        return [
            Line2D([], [], label="mean", **_large(palette)),
            Line2D([], [], label="a repeat", **_small(palette)),
            Line2D([], [], color=palette.accent, linewidth=4, label="new trainings"),
            *([thin] if self.has_images else []),
        ]


def _large(palette: Palette) -> dict[str, Any]:
    return {"linestyle": "none", "marker": "o", "markersize": 7, "color": palette.ink}


def _small(palette: Palette) -> dict[str, Any]:
    edge = {"markersize": 4, "markerfacecolor": "none", "markeredgecolor": palette.ink}
    return {"linestyle": "none", "marker": "o", "markeredgewidth": 0.7, **edge}


def _reach(means: pd.DataFrame) -> tuple[float, Sequence[str]]:
    """Return how far below the best the axis may reach, and the losses that lie beyond it.

    Their places would squeeze the intervals of the others.
    """
    widths = (means["images_high"] - means["images_low"]).fillna(means["high"] - means["low"])
    width = float(widths.median())
    reach = _FAR * width if width > 0 else np.inf
    is_far = means["value"] < means["value"].max() - reach
    if len(means) - is_far.sum() < _NEAR:
        return np.inf, []
    return reach, list(means.loc[is_far, "loss"])
