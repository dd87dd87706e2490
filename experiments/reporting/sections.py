"""The content of a comparison's report: texts, tables and figures, section by section."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pandas as pd

from experiments.comparison.results import Results
from experiments.reporting import figure_data, figures, optuna_figures
from experiments.reporting.figures import percent
from experiments.reporting.parts import (
    Gallery,
    Plot,
    Report,
    Section,
    Table,
    interval,
    lead,
    number,
    plain,
)
from experiments.reporting.small_multiples import SmallMultiples, draw_panels
from experiments.study.parameter_types import Parameter
from experiments.study.parameters import BY_NAME, searched

if TYPE_CHECKING:
    from experiments.comparison.assessment import Assessment

FIGURES = ("learning_rates", "budget", "learning_curves", "confusions")
TABLES: Mapping[str, Callable[[Results, Assessment], pd.DataFrame]] = {
    "table": lambda _, assessment: assessment.table,
    "pairs": lambda _, assessment: assessment.pairs,
    "best_settings": lambda results, _: figure_data.best_settings(results).reset_index(drop=True),
    "trials": lambda results, _: results.trials,
    "repeats": lambda results, _: results.repeats,
    "curves": lambda results, _: results.curves,
    "budget": lambda results, _: figure_data.budget(results),
    "learning_curves": lambda results, _: figure_data.learning_curves(results),
    "importances": lambda results, _: figure_data.importances(results),
    "confusions": lambda results, _: figure_data.confusions(results),
    "speed": lambda results, _: figure_data.speed(results),
}
"""The CSV files of a report."""

Columns = Mapping[str, Callable[[Mapping[Any, Any]], str]]
"""Of a table: the head of each column, and the text of a row in it."""

_CONFUSIONS_SHOWN = 3
"""Of each loss."""
_UNTESTED = "No model has seen the test split yet."


def make(results: Results, assessment: Assessment) -> Report:
    """Return the report of results, finished or not."""
    tables = {name: table(results, assessment) for name, table in TABLES.items()}
    return Report(
        name=results.name,
        answer=assessment.statements[:2],
        missing=_missing(results),
        warnings=[caveat.text for caveat in assessment.warnings],
        sections=(
            _result(results, assessment, tables),
            _gallery(results, figures.LearningRates(results)),
            _budget(results),
            _gallery(results, figures.LearningCurves(results)),
            _search(results, tables),
            _confusions(results),
            _speed(tables),
            _provenance(results),
        ),
        tables=tables,
    )


def _missing(results: Results) -> list[str]:
    """Return what the results don't have yet, a sentence each."""
    losses = figure_data.losses_of(results)
    planned, repeats = results.plan["trials"], results.plan["repeats"]
    over = results.trials["loss"].value_counts()
    best = figure_data.best_settings(results)
    sentences = []
    if behind := [
        f"{loss} ({over.get(loss, 0)})" for loss in losses if over.get(loss, 0) < planned
    ]:
        sentences.append(
            f"The search is not over. Losses with fewer than {planned} trials: {', '.join(behind)}."
        )
    without = [loss for loss in losses if over.get(loss, 0) >= planned and loss not in best.index]
    if without:
        sentences.append(
            f"No trial of {', '.join(without)} completed: there is no best configuration."
        )
    if results.repeats.empty:
        sentences.append(
            "No configuration is confirmed yet: there are no repeats on fresh seeds. The "
            "accuracies are those that chose the configurations, so they are too high."
        )
        return sentences
    done = results.repeats["loss"].value_counts()
    short = [f"{loss} ({done.get(loss, 0)})" for loss in best.index if done.get(loss, 0) < repeats]
    if short:
        sentences.append(f"Losses with fewer than {repeats} repeats: {', '.join(short)}.")
    if not results.repeats["test_accuracy"].notna().any():
        sentences.append(_UNTESTED)
    return sentences


def _result(
    results: Results, assessment: Assessment, tables: Mapping[str, pd.DataFrame]
) -> Section:
    items = [_best_settings(results, tables["best_settings"])]
    if len(assessment.differences):
        items.insert(0, _differences(assessment))
    if assessment.winner is not None:
        items.insert(0, _ranking(results, assessment.table))
    return Section(id="result", title="The result", texts=assessment.statements[2:], items=items)


def _ranking(results: Results, table: pd.DataFrame) -> Table:
    columns: Columns = {
        "loss": lambda row: row["loss"],
        "n": lambda row: str(row["n"]),
        "accuracy, %": lambda row: interval(row, "accuracy", 100, ".2f"),
        "sd": lambda row: number(100 * row["accuracy_sd"], ".2f"),
        "negative log-likelihood": lambda row: interval(row, "nll", 1, ".3f"),
        "Brier score": lambda row: interval(row, "brier", 1, ".3f"),
        "calibration error": lambda row: interval(row, "ece", 1, ".3f"),
        "validation accuracy, %": lambda row: number(100 * row["val_accuracy"], ".2f"),
        "diverged": lambda row: str(row["diverged"]),
        "failed": lambda row: str(row["failed"]),
    }
    caption = (
        "Each loss at its best configuration, over n repeats with fresh seeds: means on "
        f"{results.sizes['test']:,} test images, with 95 % intervals in brackets; sorted by "
        "validation accuracy"
    )
    return _table(caption, columns, table.to_dict("records"), "table")


def _differences(assessment: Assessment) -> Table:
    def times_ahead(row: Mapping[Any, Any]) -> str:
        return f"{row['ahead']} ({row['ties']} equal)" if row["ties"] else str(row["ahead"])

    columns: Columns = {
        "loss": lambda row: row["loss"],
        "it is": lambda row: row["verdict"],
        "points ahead (95 % interval)": lead,
        "n": lambda row: str(row["n"]),
        "times ahead": times_ahead,
        "probability to be better": lambda row: interval(row, "probability", 1, ".2f"),
        "p": lambda row: number(row["p_holm"], ".2g"),
        "repeats needed": lambda row: number(row["repeats_needed"], ",.0f"),
    }
    caption = (
        f"The lead of {assessment.winner} over each other loss on the test split, in points of "
        "accuracy, seed by seed; p is corrected over all pairs of losses (Holm); the last column "
        "is how many repeats would find half a point"
    )
    return _table(caption, columns, assessment.differences.to_dict("records"), "pairs")


def _best_settings(results: Results, best: pd.DataFrame) -> Table:
    rows = pd.DataFrame({"loss": figure_data.losses_of(results)})
    rows = rows.merge(best, how="left", on="loss")
    outcomes = results.trials.groupby(["loss", "outcome"]).size()

    def counted(outcome: str) -> Callable[[Mapping[Any, Any]], str]:
        return lambda row: str(outcomes.get((row["loss"], outcome), 0))

    def value_of(parameter: Parameter) -> Callable[[Mapping[Any, Any]], str]:
        return lambda row: number(row[parameter.name], parameter.form)

    parameters = [BY_NAME[name] for name in searched(results.plan) if name != "loss"]
    columns: Columns = {
        "loss": lambda row: row["loss"],
        **{each.label: value_of(each) for each in parameters},
        "validation accuracy, %": lambda row: number(100 * row["val_accuracy"], ".2f"),
        **{outcome: counted(outcome) for outcome in ("complete", "diverged", "failed")},
    }
    caption = (
        "The search: the best configuration of each loss, by the validation accuracy of one "
        "training, which is too high because it was chosen; and the number of trials by outcome"
    )
    return _table(caption, columns, rows.to_dict("records"), "best_settings")


def _budget(results: Results) -> Section:
    budget = figures.Budget
    if figure_data.draws_are_independent(results):
        return _gallery(results, budget(results))
    text = (
        "Expected validation performance needs independent draws of configurations. Those of the "
        f"sampler {results.plan['sampler']} depend on each other: this figure is left out. The "
        "optimisation history is below."
    )
    return Section(id=budget.name, title=budget.title, texts=[text])


def _search(results: Results, tables: Mapping[str, pd.DataFrame]) -> Section:
    captions = {
        "history": (
            "Optimisation history: the trials of each loss in the order of the search, and the "
            "best so far. A click on a loss hides it, a double click hides the others.",
            "trials",
        ),
        "importances": (
            "Importance of each parameter for being among the best tenth of all trials "
            "(PED-ANOVA, Optuna's default), over all losses together.",
            "importances",
        ),
        "parallel": (
            "Parallel coordinates: a line is a trial of any loss; better trials have stronger "
            "lines.",
            "trials",
        ),
    }
    items: list[Table | Gallery | Plot] = [
        Plot(name=name, caption=caption, figure=json.loads(figure.to_json()), data=data)
        for name, figure in optuna_figures.optuna_figures(results).items()
        for caption, data in [captions[name]]
    ]
    shares = tables["importances"]
    if len(shares):
        wide = shares.pivot_table(index="loss", columns="parameter", values="importance")
        order = [figure_data.ALL_LOSSES, *figure_data.losses_of(results)]
        table = Table(
            caption="Importance of the parameters (PED-ANOVA), for each loss, too",
            heads=["loss", *(name.replace("_", " ") for name in wide.columns)],
            rows=[
                [loss, *(number(share, ".2f") for share in wide.loc[loss])]
                for loss in order
                if loss in wide.index
            ],
            data="importances",
        )
        items.append(table)
    texts = [] if items else ["No trial has finished yet."]
    return Section(id="search", title="The search", texts=texts, items=items)


def _confusions(results: Results) -> Section:
    section = _gallery(results, figures.Confusions(results), _UNTESTED)
    if not section.items:
        return section
    rows = [
        [
            loss,
            results.classes[true],
            results.classes[predicted],
            f"{counts[true, predicted]:,}",
            percent(counts[true, predicted] / counts[true].sum()),
        ]
        for loss, counts in results.confusions.items()
        for true, predicted in figure_data.most_confused(counts, _CONFUSIONS_SHOWN)
    ]
    table = Table(
        caption="The most frequent confusions of each loss",
        heads=("loss", "true class", "predicted class", "images", "of the true class"),
        rows=rows,
        data="confusions",
    )
    return replace(section, items=[*section.items, table])


def _speed(tables: Mapping[str, pd.DataFrame]) -> Section:
    columns: Columns = {
        "loss": lambda row: row["loss"],
        "batch size": lambda row: f"{row['batch_size']:.0f}",
        "trainings": lambda row: f"{row['trainings']}",
        "s each": lambda row: f"{row['seconds']:,.1f}",
        "min in all": lambda row: f"{row['seconds_in_all'] / 60:,.1f}",
        "images/s": lambda row: f"{row['images_per_second']:,.0f}",
    }
    caption = (
        "Time of training and validation, search and repeats together: mean of a training, sum of "
        "all, and the median of training images a second. A training that diverged ended early"
    )
    if not len(tables["speed"]):
        return Section(id="speed", title="Time", texts=["No training is over yet."])
    table = _table(caption, columns, tables["speed"].to_dict("records"), "speed")
    return Section(id="speed", title="Time", items=[table])


def _provenance(results: Results) -> Section:
    made = [[key, value] for key, value in results.provenance.items()]
    made.append(["this report", f"python -m experiments.report {shlex.quote(results.name)}"])
    plan = [[key.replace("_", " "), plain(value)] for key, value in results.plan.items()]
    plan += [[f"{split} images", f"{number:,}"] for split, number in results.sizes.items()]
    text = (
        "The data of each figure and table is a CSV file in the folder data beside this file: "
        f"{', '.join(f'{name}.csv' for name in TABLES)}. An apostrophe precedes text that a "
        "spreadsheet might take for a formula."
    )
    return Section(
        id="made",
        title="How it was made",
        texts=[text],
        items=[
            Table(caption="Provenance", heads=("what", "value"), rows=made, kind="facts"),
            Table(caption="The plan", heads=("what", "value"), rows=plan, kind="facts"),
        ],
    )


def _table(
    caption: str, columns: Columns, records: Iterable[Mapping[Any, Any]], data: str
) -> Table:
    rows = [[text(record) for text in columns.values()] for record in records]
    return Table(caption=caption, heads=list(columns), rows=rows, data=data)


def _gallery(
    results: Results, multiples: SmallMultiples, otherwise: str = "There is nothing to show yet."
) -> Section:
    name, title = multiples.name, multiples.title
    if not multiples.losses:
        return Section(id=name, title=title, texts=[otherwise])
    panels = draw_panels(multiples, figure_data.losses_of(results))
    return Section(id=name, title=title, items=[Gallery(multiples=multiples, panels=panels)])
