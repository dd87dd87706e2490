"""Optuna's own, interactive figures of the searches."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from experiments.comparison.results import Results
from experiments.reporting.figure_data import (
    joint_study,
    losses_of,
    study_importances,
    varied_parameters,
    without_warning_of_few_trials,
)
from experiments.reporting.figures import COLORS, DASHES, OBJECTIVE_TITLE, SYMBOLS
from tracking.text import printable

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from optuna import Study


def optuna_figures(results: Results) -> dict[str, go.Figure]:
    """Return Optuna's plots of the search of a comparison: see `study_figures`."""
    losses = [loss for loss in losses_of(results) if loss in results.studies]
    return study_figures(joint_study(results), {loss: results.studies[loss] for loss in losses})


def study_figures(joint: Study, studies: Mapping[str, Study]) -> dict[str, go.Figure]:
    """Return Optuna's plots: history, importances, parallel coordinates.

    A plot without data is left out. The page sets the colours of texts and lines.

    Args:
        joint: the complete trials of all studies.
        studies: by their names in the history.
    """
    from optuna import visualization

    figures: dict[str, go.Figure] = {}
    if not joint.get_trials(deepcopy=False):
        return figures
    history = visualization.plot_optimization_history(
        list(studies.values()), target_name=OBJECTIVE_TITLE
    )
    _name_traces(history, list(studies))
    history.update_yaxes(tickformat=".0%")
    figures["history"] = history
    if study_importances(joint):
        varied = varied_parameters(joint)
        with without_warning_of_few_trials():
            figures["importances"] = visualization.plot_param_importances(
                joint, params=varied, target_name=OBJECTIVE_TITLE
            )
        figures["importances"].update_traces(marker_color=COLORS[0])
        figures["importances"].update_xaxes(range=(0, 1.1))
        figures["parallel"] = visualization.plot_parallel_coordinate(
            joint, params=varied, target_name=OBJECTIVE_TITLE
        )
        _shade_lines(figures["parallel"])
    for figure in figures.values():
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
    history.update_layout(height=400 + 8 * len(studies))  # for the legend
    return figures


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

    `parallel` has a trace for each trial, with the objective (0 to 1) first, and a colour bar.
    """
    *trials, color_bar = parallel.data
    for trial in trials:
        trial.update(line_color=COLORS[0], opacity=0.15 + 0.85 * trial.y[0])
    color_bar.marker.showscale = False
