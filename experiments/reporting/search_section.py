"""The section of a comparison's report that shows its searches."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from experiments.comparison.results import Results
from experiments.reporting import figure_data, optuna_figures
from experiments.reporting.parts import Columns, Gallery, Plot, Section, Table, make_table, number
from experiments.reporting.search_data import parameters_of, ranges
from experiments.study.parameter_types import Parameter
from experiments.study.parameters import BY_NAME

_ID_CHARACTERS = 8


def search_section(results: Results, tables: Mapping[str, pd.DataFrame]) -> Section:
    """Return the section: what each search has chosen, Optuna's plots, importances."""
    items: list[Table | Gallery | Plot] = [_outcomes(results)]
    if results.is_staged:
        items.append(_searches(results, tables["searches"]))
    else:
        items.append(_best_settings(results, tables["best_settings"]))
    plots = _plots(results)
    shares = tables["importances"]
    if len(shares):
        plots.append(_importances(results, shares))
    texts = [] if plots else ["No trial has finished yet."]
    if plots:
        texts = _too_few(results)
    return Section(id="search", title="The search", texts=texts, items=[*items, *plots])


def parameter_columns(results: Results) -> Columns:
    """Return the columns of a table that show a configuration."""

    def value_of(parameter: Parameter) -> Callable[[Mapping[Any, Any]], str]:
        return lambda row: number(row[parameter.name], parameter.form)

    return {BY_NAME[name].label: value_of(BY_NAME[name]) for name in parameters_of(results)}


def _outcomes(results: Results) -> Table:
    trials = results.trials
    counts = trials.groupby(["loss", "outcome"]).size()
    found = trials["reused"].eq(True).groupby(trials["loss"]).sum()

    def counted(outcome: str) -> Callable[[Mapping[Any, Any]], str]:
        return lambda row: str(counts.get((row["loss"], outcome), 0))

    columns: Columns = {
        "loss": lambda row: row["loss"],
        **{outcome: counted(outcome) for outcome in ("complete", "diverged", "failed")},
        "of these reused": lambda row: str(found.get(row["loss"], 0)),
        "range at the start": lambda row: _range(row["low"], row["high"]),
        "learning rates tried": lambda row: _range(row["tried_low"], row["tried_high"]),
    }
    caption = (
        "The trainings of the searches, by outcome. A reused one was found among earlier studies, "
        "and not trained again"
    )
    return make_table(caption, columns, ranges(results).to_dict("records"), "ranges")


def _searches(results: Results, found: pd.DataFrame) -> Table:
    columns: Columns = {
        "loss": lambda row: row["loss"],
        "search": lambda row: f"{row['search']}",
        "seed": lambda row: f"{row['seed']}",
        **parameter_columns(results),
        "rates tried": lambda row: _range(row["tried_low"], row["tried_high"]),
        "range of learning rates": lambda row: row["rate_ended"],
        "range of batch sizes": lambda row: row["batch_ended"],
        "validation, %": lambda row: number(100 * row["val_accuracy"], ".2f"),
        "test, %": lambda row: _test(row),
        "run": lambda row: str(row["run_id"])[:_ID_CHARACTERS],
    }
    caption = (
        "Each search: the configuration that it chose, and the seed and the accuracies of its "
        "repeat, the training of that configuration on a fresh seed. A range is open below or "
        "above if the search tried nothing beyond its choice there, else closed; learning rates "
        "are compared at similar batch sizes. A run is named by the first "
        f"{_ID_CHARACTERS} characters of its id"
    )
    return make_table(caption, columns, found.to_dict("records"), "searches")


def _test(row: Mapping[Any, Any]) -> str:
    if row["outcome"] != "complete":
        return str(row["outcome"])
    return number(100 * row["test_accuracy"], ".2f")


def _best_settings(results: Results, best: pd.DataFrame) -> Table:
    rows = pd.DataFrame({"loss": results.losses}).merge(best, how="left", on="loss")
    columns: Columns = {
        "loss": lambda row: row["loss"],
        **parameter_columns(results),
        "validation accuracy, %": lambda row: number(100 * row["val_accuracy"], ".2f"),
    }
    caption = (
        "The best configuration of each loss, by the validation accuracy of one training, which is "
        "too high because it was chosen"
    )
    return make_table(caption, columns, rows.to_dict("records"), "best_settings")


def _range(low: float, high: float) -> str:
    return "–" if pd.isna(low) else f"{low:.2g} to {high:.2g}"


def _plots(results: Results) -> list[Table | Gallery | Plot]:
    order = "search after search" if results.is_staged else "in the order of the search"
    captions = {
        "history": (
            f"Optimisation history: the trials of each loss, {order}, and the best so far. A click "
            "on a loss hides it, a double click hides the others.",
            "trials",
        ),
        "importances": (
            "Importance of each parameter for being among the best tenth of a loss' trials "
            "(PED-ANOVA, Optuna's default), loss by loss.",
            "importances",
        ),
        "parallel": (
            "Parallel coordinates: a line is a trial of any loss; better trials have stronger "
            "lines.",
            "trials",
        ),
    }
    figures = optuna_figures.optuna_figures(results)
    return [
        Plot(name=name, caption=caption, figure=json.loads(figures[name].to_json()), data=data)
        for name, (caption, data) in captions.items()
        if name in figures
    ]


def _importances(results: Results, shares: pd.DataFrame) -> Table:
    wide = shares.pivot_table(index="loss", columns="parameter", values="importance")
    return Table(
        caption="Importance of the parameters (PED-ANOVA), for each loss",
        heads=["loss", *(name.replace("_", " ") for name in wide.columns)],
        rows=[
            [loss, *(number(share, ".2f") for share in wide.loc[loss])]
            for loss in results.losses
            if loss in wide.index
        ],
        data="importances",
    )


def _too_few(results: Results) -> list[str]:
    """Return of which losses there are too few trials for importances."""
    enough = figure_data.ENOUGH_TRIALS
    counts = {
        loss: figure_data.complete_trials(results.studies.get(loss)) for loss in results.losses
    }
    few = [f"`{loss}` ({count})" for loss, count in counts.items() if count < enough]
    if not few:
        return []
    return [
        f"The importance of parameters needs {enough} complete trials of a loss. These losses have "
        f"fewer: {', '.join(few)}."
    ]
