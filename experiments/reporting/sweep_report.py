"""The content of a sweep's report: the best trials, accuracy against learning rate, the search."""

from __future__ import annotations

import html
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import optuna
import pandas as pd
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from experiments.reporting.figure_data import ENOUGH_TRIALS, complete_trials
from experiments.reporting.figures import COLORS, OBJECTIVE_TITLE, SYMBOLS
from experiments.reporting.optuna_figures import study_figures, styled
from experiments.reporting.parts import (
    Columns,
    Note,
    Plot,
    Report,
    Section,
    Table,
    make_table,
    number,
    plain,
)
from experiments.study.domains import Domain
from experiments.study.parameter_types import Parameter
from experiments.study.parameters import BY_NAME, searched
from experiments.study.storage import open_storage, storage_errors
from experiments.study.trials import trials_table
from tracking.errors import without_passwords
from tracking.store import sqlite_file
from tracking.text import listed, printable
from tracking.wording import counted, percent

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from optuna import Study

QUESTION = "Which configuration is best?"

_NUM_BEST = 10
_MOST_LINES = 300
"""Trials in parallel coordinates: more lines fill the plot, and make the page slow."""
_ID_CHARACTERS = 8


def find_study(name: str, storage: str) -> Study:
    """Return the study of a sweep or a comparison.

    Raises:
        ValueError: the storage has none of this name, or can't be read.
    """
    file = sqlite_file(storage)
    if file is not None and not file.exists():
        raise ValueError(f"there are no studies here: the storage {storage!r} does not exist")
    with storage_errors(storage):
        opened = open_storage(storage)
        try:
            study = optuna.load_study(study_name=name, storage=opened)
        except KeyError:
            study = None
        if study is None or not {"plan", "settings"} & set(study.user_attrs):
            known = [each.study_name for each in optuna.get_all_study_summaries(opened)]
            whole = [each for each in known if not any(each.startswith(f"{n}/") for n in known)]
            raise ValueError(
                f"there is no sweep or comparison {name!r} in {without_passwords(storage)}, only "
                f"{listed(whole) if whole else 'none'}"
            )
        return study


def make(study: Study) -> Report:
    """Return the report of a sweep, finished or not."""
    sweep = _Sweep(study)
    return Report(
        name=study.study_name,
        question=QUESTION,
        answer=sweep.answer(),
        figure=None,
        missing=[] if len(sweep.complete) else ["No trial is complete yet."],
        warnings=sweep.caveats(),
        more_warnings=(),
        sections=(sweep.rates(), sweep.best(), sweep.search(), sweep.provenance()),
        tables={"trials": sweep.trials, "best_settings": sweep.best_of_each_loss()},
    )


@dataclass
class _Sweep:
    """A sweep, as its study records it."""

    study: Study
    trials: pd.DataFrame = field(init=False)
    """See `trials_table`."""
    complete: pd.DataFrame = field(init=False)

    def __post_init__(self) -> None:
        self.trials = trials_table(self.study)
        self.complete = self.trials[self.trials["outcome"] == "complete"]
        self.settings: Mapping[str, Any] = self.study.user_attrs["settings"]
        self.parameters: Sequence[Parameter] = [BY_NAME[name] for name in searched(self.settings)]

    def answer(self) -> list[str]:
        """Return the answer in at most two sentences."""
        counts = self.trials["outcome"].value_counts()
        ended = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        how_many = f"{counted(len(self.trials), 'trial')} ended: {ended}." if ended else ""
        if not len(self.complete):
            return [how_many] if how_many else []
        best = self.complete.iloc[0].to_dict()
        values = ", ".join(f"{each.label} {_shown(each, best)}" for each in self.parameters)
        return [
            f"The best trial is number {best['trial']}, with {values}: its {OBJECTIVE_TITLE} is "
            f"{percent(best['val_accuracy'])}.",
            how_many,
        ]

    def caveats(self) -> list[Note]:
        """Return what to know of the answer, and what to type."""
        if not len(self.complete):
            return []
        data = self.settings["dataset"]
        source = shlex.quote(f"{data}:test")
        return [
            Note(
                text="The accuracy is the best of several on the validation split, so it is too "
                "high. The test split gives an accuracy without this error, once:",
                command=f"python -m tracking.predict {source} --run-id "
                f"{self.complete.iloc[0]['run_id']} --report test-report",
            ),
            Note(
                text="A sweep finds a good configuration. It does not say which loss is better: "
                "that takes the same search for each loss, several times:",
                command=f"python -m experiments.compare --dataset {shlex.quote(str(data))}",
            ),
        ]

    def rates(self) -> Section:
        """Return accuracy against learning rate, and the best trial of each loss."""
        title, items = "Accuracy against learning rate", []
        drawn = self.trials.dropna(subset=["learning_rate", "val_accuracy"])
        if len(drawn):
            caption = (
                "Validation accuracy of the last epoch against learning rate: a point is a trial, "
                "a colour a loss, a shape a batch size. Hollow: the trial is not complete. A click "
                "on a loss hides it, a double click hides the others."
            )
            losses = searched(self.settings)["loss"]
            figure = _rates(drawn, self.parameters, losses)
            items.append(_plot("rates", caption, figure))
        texts = [] if items else ["No trial has an accuracy yet."]
        return Section(id="rates", title=title, texts=texts, items=items)

    def best(self) -> Section:
        """Return the best trials, and the best of each loss."""
        columns: Columns = {
            "trial": lambda row: str(row["trial"]),
            "validation accuracy, %": lambda row: number(100 * row["val_accuracy"], ".2f"),
            **self._columns(),
            "epochs": lambda row: str(row["epochs"]),
            "run": lambda row: str(row["run_id"])[:_ID_CHARACTERS],
        }
        rows = self.complete.head(_NUM_BEST)
        caption = (
            "The complete trials with the highest validation accuracy. A run is named by the "
            f"first {_ID_CHARACTERS} characters of its id"
        )
        ten = make_table(caption, columns, rows.to_dict("records"), "trials")
        items = [ten, self._losses()] if len(rows) else []
        return Section(id="best", title="The best trials", items=items)

    def best_of_each_loss(self) -> pd.DataFrame:
        """Return the best trial of each loss: a complete one, if there is one."""
        return self.trials.dropna(subset="loss").drop_duplicates("loss").reset_index(drop=True)

    def _losses(self) -> Table:
        counts = self.trials.groupby(["loss", "outcome"]).size()

        def count(outcome: str, row: Mapping[Any, Any]) -> str:
            return str(counts.get((row["loss"], outcome), 0))

        outcomes = self.trials["outcome"].unique()
        columns: Columns = {
            "loss": lambda row: row["loss"],
            "its best trial, %": lambda row: number(100 * row["val_accuracy"], ".2f"),
            "outcome": lambda row: row["outcome"],
            **{head: text for head, text in self._columns().items() if head != "loss"},
            **{f"trials {outcome}": partial(count, outcome) for outcome in outcomes},
        }
        caption = "The best trial of each loss, and how the trials of that loss ended"
        rows = self.best_of_each_loss().to_dict("records")
        return make_table(caption, columns, rows, "best_settings")

    def _columns(self) -> Columns:
        return {each.label: partial(_shown, each) for each in self.parameters}

    def search(self) -> Section:
        """Return Optuna's plots of the search."""
        captions = {
            "history": "Optimisation history: the trials that no pruner stopped, in the order of "
            "the search, and the best so far.",
            "importances": "Importance of each parameter for being among the best tenth of the "
            "trials (PED-ANOVA, Optuna's default).",
            "parallel": "Parallel coordinates: a line is a trial that no pruner stopped; better "
            f"ones have stronger lines. Of more than {_MOST_LINES} trials, these are the best.",
        }
        figures = _figures(self.study)
        ended = complete_trials(self.study)
        plots = [
            _plot(name, caption, figures[name])
            for name, caption in captions.items()
            if name in figures
        ]
        texts = []
        if ended < ENOUGH_TRIALS:
            texts.append(
                f"The importance of parameters needs {ENOUGH_TRIALS} trials that no pruner "
                f"stopped: there are {ended}."
            )
        return Section(id="search", title="The search", texts=texts, items=plots)

    def provenance(self) -> Section:
        """Return the settings, and the code that made the study."""
        attributes = self.study.user_attrs
        made = {**attributes.get("environment", {}), "run": attributes.get("parent_run_id", "")}
        made["this report"] = f"python -m experiments.report {shlex.quote(self.study.study_name)}"
        tables = [
            Table(
                caption=caption,
                heads=("what", "value"),
                rows=[[key.replace("_", " "), plain(value)] for key, value in facts.items()],
                kind="facts",
            )
            for caption, facts in (("Provenance", made), ("Settings", self.settings))
        ]
        return Section(id="made", title="How it was made", items=tables)


def _plot(name: str, caption: str, figure: go.Figure) -> Plot:
    return Plot(name=name, caption=caption, figure=json.loads(figure.to_json()), data="trials")


def _shown(parameter: Parameter, row: Mapping[Any, Any]) -> str:
    return parameter.text(row[parameter.name])


def _rates(trials: pd.DataFrame, parameters: Sequence[Parameter], losses: Domain) -> go.Figure:
    """Return the plot of accuracy against learning rate."""
    import plotly.graph_objects as go

    sizes = sorted(trials["batch_size"].dropna().unique())
    shapes = dict(zip(sizes, SYMBOLS, strict=False)) if len(sizes) <= len(SYMBOLS) else {}
    figure = go.Figure()
    for position, loss in enumerate(losses.values):
        rows = trials[trials["loss"] == loss]
        symbols = [
            shapes.get(size, SYMBOLS[0]) + ("" if outcome == "complete" else "-open")
            for size, outcome in zip(rows["batch_size"], rows["outcome"], strict=True)
        ]
        figure.add_scatter(
            x=rows["learning_rate"],
            y=rows["val_accuracy"],
            mode="markers",
            legendgroup=str(position),
            showlegend=False,
            text=[_hover(row, parameters) for row in rows.to_dict("records")],
            hovertemplate="%{text}<extra></extra>",
            marker={
                "color": COLORS[position % len(COLORS)],
                "symbol": symbols,
                "size": 9,
            },
        )
        name = html.escape(printable(str(loss)))
        figure.add_scatter(
            **_legend(name, COLORS[position % len(COLORS)]), legendgroup=str(position)
        )
    for size, shape in shapes.items():
        figure.add_scatter(**_legend(f"batch size {size:.0f}", "gray", shape))
    figure.update_xaxes(type="log", title="learning rate", exponentformat="power")
    figure.update_yaxes(title=OBJECTIVE_TITLE, tickformat=".0%")
    return styled(figure).update_layout(height=460, hovermode="closest")


def _legend(name: str, color: str, symbol: str = SYMBOLS[0]) -> dict[str, Any]:
    """Return a trace that is an entry of the legend only."""
    marker = {"symbol": symbol, "color": color, "size": 9}
    return {"x": [None], "y": [None], "mode": "markers", "name": name, "marker": marker}


def _hover(row: Mapping[Any, Any], parameters: Sequence[Parameter]) -> str:
    values = [f"{each.label} {_shown(each, row)}" for each in parameters]
    lines = [f"trial {row['trial']}: {percent(row['val_accuracy'])}", *values, row["outcome"]]
    return "<br>".join(html.escape(printable(line)) for line in lines)


def _figures(study: Study) -> dict[str, go.Figure]:
    """Return Optuna's plots of a study."""
    name, trials = study.study_name, study.get_trials(deepcopy=False)
    complete = [trial for trial in trials if trial.state is TrialState.COMPLETE]
    if not complete:
        return {}
    every = _in_memory(name, trials)
    figures = study_figures(every, {name: every})
    if len(complete) > _MOST_LINES:
        best = sorted(complete, key=lambda trial: -(trial.value or 0))[:_MOST_LINES]
        fewer = _in_memory(name, best)
        figures |= {"parallel": study_figures(fewer, {name: fewer})["parallel"]}
    if len(complete) < ENOUGH_TRIALS:
        figures.pop("importances", None)
    return figures


def _in_memory(name: str, trials: Sequence[FrozenTrial]) -> Study:
    """Return a study of trials, each at its place; texts are escaped: Plotly reads some HTML."""
    study = optuna.create_study(
        storage=optuna.storages.InMemoryStorage(), study_name=name, direction="maximize"
    )
    for trial in trials:
        is_complete = trial.state is TrialState.COMPLETE
        study.add_trial(
            create_trial(
                state=trial.state if is_complete else TrialState.FAIL,
                value=trial.value if is_complete else None,
                params={key: _escaped(value) for key, value in trial.params.items()},
                distributions={
                    key: CategoricalDistribution([_escaped(each) for each in domain.choices])
                    if isinstance(domain, CategoricalDistribution)
                    else domain
                    for key, domain in trial.distributions.items()
                },
            )
        )
    return study


def _escaped(value: Any) -> Any:
    return html.escape(value) if isinstance(value, str) else value
