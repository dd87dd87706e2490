"""Optuna's own, interactive figures of the searches."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from experiments.comparison.results import Results
from experiments.reporting.figure_data import (
    importances,
    joint_study,
    study_importances,
    varied_parameters,
    without_warning_of_few_trials,
)
from experiments.reporting.figures import COLORS, DASHES, OBJECTIVE_TITLE, SYMBOLS
from tracking.text import printable

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
    from optuna import Study


def optuna_figures(results: Results) -> dict[str, go.Figure]:
    """Return the plots of the searches of a comparison: history, importances, parallel coordinates.

    A plot without data is left out. The importances are those of `importances`: per loss.
    """
    losses = [loss for loss in results.losses if loss in results.studies]
    figures = _plots(joint_study(results), {loss: results.studies[loss] for loss in losses})
    shares = importances(results)
    if len(shares):
        bars = figures["importances"] = styled(_importances_of_each(shares))
        bars.update_layout(height=160 + 40 * shares["loss"].nunique())
    return figures


def study_figures(joint: Study, studies: Mapping[str, Study]) -> dict[str, go.Figure]:
    """Return Optuna's plots: history, importances, parallel coordinates.

    A plot without data is left out. The page sets the colours of texts and lines.

    Args:
        joint: the complete trials of all studies.
        studies: by their names in the history.
    """
    from optuna import visualization

    figures = _plots(joint, studies)
    if "parallel" in figures:
        with without_warning_of_few_trials():
            shares = visualization.plot_param_importances(
                joint, params=varied_parameters(joint), target_name=OBJECTIVE_TITLE
            )
        shares.update_traces(marker_color=COLORS[0])
        shares.update_xaxes(range=(0, 1.1))
        figures = {"history": figures["history"], "importances": styled(shares), **figures}
    return figures


def _plots(joint: Study, studies: Mapping[str, Study]) -> dict[str, go.Figure]:
    """Return the history, and the parallel coordinates."""
    from optuna import visualization

    if not joint.get_trials(deepcopy=False):
        return {}
    history = visualization.plot_optimization_history(
        list(studies.values()), target_name=OBJECTIVE_TITLE
    )
    _name_traces(history, list(studies))
    history.update_yaxes(tickformat=".0%")
    most = max(len(study.get_trials(deepcopy=False)) for study in studies.values())
    history.update_xaxes(tick0=0, dtick=_whole_step(most), tickformat="d")
    figures = {"history": styled(history)}
    history.update_layout(height=400 + 8 * len(studies))  # for the legend
    if study_importances(joint):
        parallel = visualization.plot_parallel_coordinate(
            joint, params=varied_parameters(joint), target_name=OBJECTIVE_TITLE
        )
        _shade_lines(parallel)
        _clear_labels(parallel)
        figures["parallel"] = styled(parallel)
        longest = max(len(label.text) for label in parallel.layout.annotations)
        parallel.update_layout(margin={"r": 24 + 3 * longest})  # for the names of losses
    return figures


def styled(figure: go.Figure) -> go.Figure:
    """Give a figure the looks of the page."""
    figure.update_layout(
        template="none",
        title=None,
        plot_bgcolor="rgba(0,0,0,0)",
        paper_bgcolor="rgba(0,0,0,0)",
        margin={"l": 60, "r": 24, "t": 24, "b": 48},
        height=400,
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": -0.2, "yanchor": "top"},
    )
    figure.update_xaxes(automargin=True)
    figure.update_yaxes(automargin=True)
    figure.update_annotations(font_color=None)
    return figure


def _whole_step(most: int) -> int:
    """Return a step of at least 1 that makes about ten ticks: 1, 2 or 5 times a power of ten."""
    power = 1
    while 50 * power < most:
        power *= 10
    return next(factor * power for factor in (1, 2, 5) if 10 * factor * power >= most)


def _importances_of_each(shares: pd.DataFrame) -> go.Figure:
    """Return bars: a group for each loss, a bar for each parameter."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for number, (parameter, rows) in enumerate(shares.groupby("parameter", sort=True)):
        figure.add_bar(
            name=str(parameter).replace("_", " "),
            x=rows["importance"],
            y=[html.escape(printable(loss)) for loss in rows["loss"]],
            orientation="h",
            marker_color=COLORS[number % len(COLORS)],
        )
    figure.update_layout(barmode="group")
    figure.update_xaxes(range=(0, 1), title=f"importance for the {OBJECTIVE_TITLE}")
    figure.update_yaxes(autorange="reversed", type="category", showgrid=False, ticksuffix="  ")
    return figure


def _name_traces(history: go.Figure, losses: Sequence[str]) -> None:
    """Make a loss' trials and its best so far one entry of the legend, with a style of its own.

    `history` has three traces for each loss: trials, best so far, infeasible trials (none).
    """
    for number, loss in enumerate(losses):
        color = COLORS[number % len(COLORS)]
        trials, best, infeasible = history.data[3 * number : 3 * number + 3]
        name = html.escape(printable(loss))  # Plotly reads some HTML
        trials.update(
            name=name,
            legendgroup=name,
            marker={"color": color, "symbol": SYMBOLS[number % len(SYMBOLS)], "size": 8},
        )
        best.update(
            name=f"{name}, best so far",
            legendgroup=name,
            showlegend=False,
            line={"color": color, "dash": DASHES[number % len(DASHES)]},
        )
        infeasible.update(legendgroup=name, hoverinfo="skip")


def _shade_lines(parallel: go.Figure) -> None:
    """Draw better trials as stronger lines; some of Optuna's blues are too faint.

    `parallel` has a trace for each trial, with the objective (0 to 1) first, and a colour bar. With
    many trials, all but the best are faint: else their lines fill the plot.
    """
    *trials, color_bar = parallel.data
    faint = min(0.15, 6 / len(trials))
    steep = 1 + len(trials) / 50
    for trial in trials:
        trial.update(line_color=COLORS[0], opacity=faint + (1 - faint) * trial.y[0] ** steep)
    color_bar.marker.showscale = False


def _clear_labels(parallel: go.Figure) -> None:
    """Keep the labels of values apart from each other, and legible over the lines.

    They are annotations left of their axes, from the lowest value of an axis to the highest. The
    ends stay. The page gives labels its background.
    """
    last = len(parallel.layout.xaxis.tickvals) - 1
    kept: list[Any] = []
    for _, group in groupby(parallel.layout.annotations, key=lambda label: label.x):
        labels = list(group)
        inner = [
            label
            for label in labels[1:-1]
            if min(label.y - labels[0].y, labels[-1].y - label.y) > _LABEL_HEIGHT
        ]
        kept += [labels[0], *inner, labels[-1]] if len(labels) > 1 else labels
    for label in kept:
        label.update(name="value", bgcolor="rgba(0,0,0,0)", borderpad=1)
        if label.x == last:
            label.update(xanchor="left", xshift=4)
    parallel.layout.annotations = kept
    names = [name.replace("_", " ") for name in parallel.layout.xaxis.ticktext]
    parallel.update_xaxes(ticktext=names)


_LABEL_HEIGHT = 0.05
"""Of the height of the axes."""
