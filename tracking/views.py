"""Saved views of MLflow's list of runs: which runs, in what order, with which columns and charts.

MLflow keeps a view in a tag of the experiment, and a link opens it. The format is that of its pages
in version 3.17, which its API does not know. Pages that read another format show an error message,
and then the experiment.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass

from tracking.text import escaped_in_notes, shortened

PREFIX = "mlflow.sharedViewState."
"""Of the tag; the view's key follows."""

ABOUT = "Trainings of a CNN with different losses, learning rates and batch sizes."
"""The first words of an experiment's description, unless a user wrote another."""

_LONGEST_NAME = 60

_RUN_NAME, _CREATED, _DURATION = (
    f"attributes.`{name}`" for name in ("Run Name", "Created", "Duration")
)


_WIDTHS = {_RUN_NAME: 280, "tags.`best`": 70}
"""In pixels: a trial's name with three parameters, and a `yes`."""


@dataclass(frozen=True, kw_only=True)
class View:
    """Runs of an experiment in a flat list, those with the highest value of a metric first."""

    study_id: str
    """Of the study or comparison that it shows."""
    name: str
    """In the menu of views."""
    condition: str
    """Which runs, in MLflow's search syntax."""
    metric: str
    """The metric to sort by."""
    columns: tuple[str, ...]
    """In this order, such as `metrics.val/accuracy`, `params.loss` and `tags.outcome`."""

    @property
    def tag(self) -> str:
        """The name of the experiment's tag that keeps it."""
        return view_tag(self.study_id)

    def link(self, experiment_id: str) -> str:
        """Return the address of the view, after that of the server."""
        return f"{runs_link(experiment_id)}?viewStateShareKey={self.tag.removeprefix(PREFIX)}"

    def value(self, before: str) -> str:
        """Return the value of the tag: the one that it has, if that keeps this view."""
        name, state = shortened(self.name, _LONGEST_NAME), json.dumps(self._state())
        try:
            kept = json.loads(before)
        except ValueError:
            kept = None
        if isinstance(kept, Mapping) and (kept.get("name"), kept.get("state")) == (name, state):
            return before
        now = int(1000 * time.time())
        return json.dumps({"name": name, "createdAt": now, "updatedAt": now, "state": state})

    def _state(self) -> dict[str, object]:
        columns = [
            f"{kind}.`{name}`" for kind, _, name in (each.partition(".") for each in self.columns)
        ]
        return {
            "searchFilter": self.condition,
            "orderByKey": f"metrics.`{self.metric}`",
            "orderByAsc": False,
            "selectedColumns": columns,
            "columnOrder": [_RUN_NAME, *columns, _CREATED, _DURATION],
            "columnWidths": _WIDTHS,
            **self._charts(),
        }

    def _charts(self) -> dict[str, object]:
        """Return the charts that precede those that MLflow makes of each metric."""
        section = {"uuid": "results", "name": "Results", "display": True, "isReordered": True}
        of_section = {"metricSectionId": "results", "runsCountToCompare": 100}
        params = [each[len("params.") :] for each in self.columns if each.startswith("params.")]
        axes = {"selectedParams": params, "selectedMetrics": [self.metric]}
        parallel = {"uuid": "parallel", "type": "PARALLEL", **axes, "showAllRuns": True}
        curves = {
            "uuid": "curves",
            "type": "LINE",
            "metricKey": self.metric,
            "selectedMetricKeys": [self.metric],
            "useGlobalXaxisKey": True,
            "useGlobalLineSmoothing": True,
        }
        return {
            "compareRunSections": [section],
            "compareRunCharts": [each | of_section for each in (parallel, curves)],
            "isAccordionReordered": True,
        }


def view_tag(study_id: str) -> str:
    """Return the name of an experiment's tag that keeps the view of a study or comparison."""
    return f"{PREFIX}{study_id[:8]}"


def runs_link(experiment_id: str, run_id: str = "", page: str = "") -> str:
    """Return the address of an experiment's runs, or of a page of one of them."""
    parts = ("#", "experiments", experiment_id, "runs", run_id, page)
    return "/".join(part for part in parts if part)


def experiment_note(latest: View | None, experiment_id: str, before: str) -> str:
    """Return the description of an experiment, in Markdown, with its latest view, if it has one.

    A description that a user wrote stays as it is. MLflow's pages show the first line, and fold the
    others.
    """
    if before and not before.startswith(ABOUT):
        return before
    first = ABOUT
    if latest is not None:
        name = escaped_in_notes(shortened(latest.name, _LONGEST_NAME))
        first += f" The latest: [{name}]({latest.link(experiment_id)})."
    return (
        f"{first}\n\n"
        "Each sweep and each comparison is a run, and its trials are the runs below it. Its "
        "description has the answer. The menu *Views* lists the trials of each, those with the "
        "highest accuracy first."
    )
