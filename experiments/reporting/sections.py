"""What is in the report of a comparison: texts, tables and figures, section by section."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING

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
from experiments.reporting.small_multiples import SmallFigures, panels

if TYPE_CHECKING:
    from experiments.comparison.assessment import Assessment

FIGURES = ("learning_rates", "budget", "learning_curves", "confusions")
TABLES = (
    "table",
    "pairs",
    "best_settings",
    "trials",
    "repeats",
    "curves",
    "budget",
    "learning_curves",
    "importances",
    "confusions",
    "speed",
)

_CONFUSIONS_SHOWN = 3
"""Of each loss."""


def make(results: Results, assessment: Assessment) -> Report:
    """Return the report of results, as far as they have come."""
    tables = {
        "table": assessment.table,
        "pairs": assessment.pairs,
        "best_settings": figure_data.best_settings(results).reset_index(drop=True),
        "trials": results.trials,
        "repeats": results.repeats,
        "curves": results.curves,
        "budget": figure_data.budget(results),
        "learning_curves": figure_data.learning_curves(results),
        "importances": figure_data.importances(results),
        "confusions": figure_data.confusions(results),
        "speed": figure_data.speed(results),
    }
    assert tuple(tables) == TABLES
    return Report(
        name=results.name,
        answer=assessment.statements[:2],
        missing=_missing(results),
        warnings=[caveat.text for caveat in assessment.warnings],
        sections=(
            _result(results, assessment, tables),
            _learning_rates(results),
            _budget(results),
            _learning_curves(results),
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
    sentences = []
    over = results.trials["loss"].value_counts()
    planned = results.plan["trials"]
    behind = [f"{loss} ({over.get(loss, 0)})" for loss in losses if over.get(loss, 0) < planned]
    if behind:
        sentences.append(f"The search is not over: of {planned} trials, {', '.join(behind)}.")
    best = figure_data.best_settings(results)
    without = [loss for loss in losses if over.get(loss, 0) >= planned and loss not in best.index]
    if without:
        sentences.append(f"No trial of {', '.join(without)} completed: there is no best setting.")
    repeats = results.plan["repeats"]
    if results.repeats.empty:
        sentences.append(
            "No setting is confirmed yet: there are no repeats on fresh seeds, and accuracies are "
            "those that the settings were chosen by, so they look better than they are."
        )
        return sentences
    done = results.repeats["loss"].value_counts()
    short = [f"{loss} ({done.get(loss, 0)})" for loss in best.index if done.get(loss, 0) < repeats]
    if short:
        sentences.append(f"Of {repeats} repeats, some are not there: {', '.join(short)}.")
    if not results.repeats["test_accuracy"].notna().any():
        sentences.append("The test split was not looked at yet.")
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
    rows = [
        [
            row["loss"],
            str(row["n"]),
            interval(row, "accuracy", 100, ".2f"),
            number(100 * row["accuracy_sd"], ".2f"),
            *(interval(row, measure, 1, ".3f") for measure in ("nll", "brier", "ece")),
            number(100 * row["val_accuracy"], ".2f"),
            str(row["diverged"]),
            str(row["failed"]),
        ]
        for row in table.to_dict("records")
    ]
    return Table(
        caption=f"Each loss at its best setting, over n repeats with fresh seeds: means, in "
        f"brackets with their 95 % interval, on {results.sizes['test']:,} test images; sorted by "
        "validation accuracy",
        heads=(
            "loss",
            "n",
            "accuracy, %",
            "sd",
            "negative log-likelihood",
            "Brier score",
            "calibration error",
            "validation accuracy, %",
            "diverged",
            "failed",
        ),
        rows=rows,
        data="table",
    )


def _differences(assessment: Assessment) -> Table:
    rows = [
        [
            row["loss"],
            row["verdict"],
            lead(row),
            str(row["n"]),
            str(row["ahead"]) + (f" ({row['ties']} equal)" if row["ties"] else ""),
            interval(row, "probability", 1, ".2f"),
            number(row["p_holm"], ".2g"),
            number(row["repeats_needed"], ",.0f"),
        ]
        for row in assessment.differences.to_dict("records")
    ]
    return Table(
        caption=f"How far {assessment.winner} is ahead of each other loss on the test split, in "
        "points of accuracy, seed by seed; p is corrected over all pairs of losses (Holm); the "
        "last column is how many repeats would find half a point",
        heads=(
            "loss",
            "it is",
            "points ahead (95 % interval)",
            "n",
            "times ahead",
            "probability to be better",
            "p",
            "repeats needed",
        ),
        rows=rows,
        data="pairs",
    )


def _best_settings(results: Results, best: pd.DataFrame) -> Table:
    found = best.set_index("loss")
    outcomes = results.trials.groupby(["loss", "outcome"]).size()
    rows = []
    for loss in figure_data.losses_of(results):
        setting = ["–", "–", "–"]
        if loss in found.index:
            row = found.loc[loss]
            setting = [
                f"{row['learning_rate']:.3g}",
                f"{row['batch_size']:.0f}",
                f"{100 * row['val_accuracy']:.2f}",
            ]
        counts = (outcomes.get((loss, what), 0) for what in ("complete", "diverged", "failed"))
        rows.append([loss, *setting, *map(str, counts)])
    return Table(
        caption="The search: the best setting of each loss, by the validation accuracy of one "
        "training, which looks better than it is; and how many trials came to what",
        heads=(
            "loss",
            "learning rate",
            "batch size",
            "validation accuracy, %",
            "complete",
            "diverged",
            "failed",
        ),
        rows=rows,
        data="best_settings",
    )


def _learning_rates(results: Results) -> Section:
    small = figures.LearningRates(results)
    return _gallery(
        results,
        small,
        "learning_rates",
        "trials",
        title="Accuracy against learning rate",
        text="Validation accuracy of the last epoch, for each loss and batch size; one point is "
        "one training. All losses are on the same axes, over the whole range that was searched.",
    )


def _budget(results: Results) -> Section:
    title = "Accuracy against budget"
    if not figure_data.draws_are_independent(results):
        return Section(
            id="budget",
            title=title,
            texts=[
                "Expected validation performance is defined for settings that are drawn "
                f"independently of each other, and the sampler {results.plan['sampler']} draws "
                "none so: it is not shown. How the search went is below."
            ],
        )
    small = figures.Budget(results)
    return _gallery(
        results,
        small,
        "budget",
        "budget",
        title=title,
        text="The best validation accuracy that is to be expected of so many trials with settings "
        "drawn at random (expected validation performance, Dodge et al. 2019, with the unbiased "
        "estimator of Tang et al. 2020): thick the loss, thin the others. Diverged trials count "
        "with the accuracy that they had. At the right end is the best of all trials, which looks "
        "better here than it is.",
    )


def _learning_curves(results: Results) -> Section:
    small = figures.LearningCurves(results)
    return _gallery(
        results,
        small,
        "learning_curves",
        "learning_curves",
        title="Learning curves",
        text="Validation accuracy of each loss at its best setting, epoch by epoch: thick the "
        "mean, the band from the lowest to the highest seed, dashed the mean training accuracy, "
        "thin the means of the other losses.",
    )


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
            "Parallel coordinates: a line is a trial of any loss; the better, the stronger.",
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
        rows = [
            [loss, *(number(wide.loc[loss, name], ".2f") for name in wide.columns)]
            for loss in (figure_data.ALL_LOSSES, *figure_data.losses_of(results))
            if loss in wide.index
        ]
        heads = [name.replace("_", " ") for name in wide.columns]
        items.append(
            Table(
                caption="Importance of the parameters (PED-ANOVA), for each loss, too",
                heads=["loss", *heads],
                rows=rows,
                data="importances",
            )
        )
    texts = [] if items else ["No trial has finished yet."]
    return Section(id="search", title="The search", texts=texts, items=items)


def _confusions(results: Results) -> Section:
    small = figures.Confusions(results)
    title = "Confusion matrices"
    if not small.losses:
        return Section(id="confusions", title=title, texts=["The test split was not looked at."])
    section = _gallery(
        results,
        small,
        "confusions",
        "confusions",
        title=title,
        text="Of a true class' test images, how many percent each class was predicted for, over "
        "all repeats; shaded by the square root, so that a confusion of some percent is seen.",
    )
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
    return Section(id=section.id, title=title, texts=section.texts, items=[*section.items, table])


def _speed(tables: Mapping[str, pd.DataFrame]) -> Section:
    rows = [
        [
            row["loss"],
            f"{row['batch_size']:.0f}",
            f"{row['trainings']}",
            f"{row['seconds']:,.1f}",
            f"{row['seconds_in_all'] / 60:,.1f}",
            f"{row['images_per_second']:,.0f}",
        ]
        for row in tables["speed"].to_dict("records")
    ]
    if not rows:
        return Section(id="speed", title="Time", texts=["No training is over yet."])
    table = Table(
        caption="Time of training and validation, search and repeats together: mean of a training, "
        "sum of all, and the median of training images a second. A training that diverged "
        "ended early",
        heads=("loss", "batch size", "trainings", "s each", "min in all", "images/s"),
        rows=rows,
        data="speed",
    )
    return Section(id="speed", title="Time", items=[table])


def _provenance(results: Results) -> Section:
    made = [[key, value] for key, value in results.provenance.items()]
    made.append(["this report", f"python -m experiments.report {shlex.quote(results.name)}"])
    plan = [[key.replace("_", " "), plain(value)] for key, value in results.plan.items()]
    plan += [[f"{split} images", f"{number:,}"] for split, number in results.sizes.items()]
    return Section(
        id="made",
        title="How it was made",
        texts=[
            f"Each figure and table has its data as CSV; all of it is in the folder data beside "
            f"this file: {', '.join(f'{name}.csv' for name in TABLES)}. In each, text that a "
            "spreadsheet might take for a formula has an apostrophe before it."
        ],
        items=[
            Table(caption="Provenance", heads=("what", "value"), rows=made, kind="facts"),
            Table(caption="The plan", heads=("what", "value"), rows=plan, kind="facts"),
        ],
    )


def _gallery(
    results: Results, small: SmallFigures, name: str, data: str, *, title: str, text: str
) -> Section:
    if not small.losses:
        return Section(id=name, title=title, texts=["There is nothing to be shown yet."])
    losses = figure_data.losses_of(results)
    return Section(
        id=name,
        title=title,
        items=[
            Gallery(
                name=name,
                caption=text,
                small=small,
                panels=panels(small, losses, title),
                data=data,
            )
        ],
    )
