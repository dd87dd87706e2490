"""The content of a comparison's report: texts, tables and figures, section by section."""

from __future__ import annotations

import io
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pandas as pd

from experiments.comparison.results import Results
from experiments.reporting import figure_data, figures, search_data
from experiments.reporting.figures import percent
from experiments.reporting.parts import (
    Columns,
    Gallery,
    Note,
    Picture,
    Report,
    Section,
    Table,
    interval,
    lead,
    make_table,
    number,
    plain,
)
from experiments.reporting.result_figure import ResultFigure, result_rows
from experiments.reporting.search_data import (
    planned_repeats,
    planned_trainings,
)
from experiments.reporting.search_section import parameter_columns, search_section
from experiments.reporting.small_multiples import SmallMultiples, draw_panels

if TYPE_CHECKING:
    from experiments.comparison.assessment import Assessment

FIGURES = ("result", "learning_rates", "budget", "learning_curves", "confusions", "examples")
TABLES: Mapping[str, Callable[[Results, Assessment], pd.DataFrame]] = {
    "result": result_rows,
    "table": lambda _, assessment: assessment.table,
    "pairs": lambda _, assessment: assessment.pairs,
    "to_use": lambda _, assessment: pd.DataFrame(
        [assessment.to_use] if assessment.to_use else [],
        columns=list(assessment.to_use or ["loss"]),
    ),
    "searches": lambda results, _: search_data.searches(results),
    "ranges": lambda results, _: search_data.ranges(results),
    "best_settings": lambda results, _: figure_data.best_settings(results).reset_index(drop=True),
    "trials": lambda results, _: results.trials,
    "repeats": lambda results, _: results.repeats,
    "confirmed": lambda results, _: results.confirmed,
    "curves": lambda results, _: results.curves,
    "budget": lambda results, _: figure_data.budget(results),
    "learning_curves": lambda results, _: figure_data.learning_curves(results),
    "importances": lambda results, _: figure_data.importances(results),
    "confusions": lambda results, _: figure_data.confusions(results),
    "speed": lambda results, _: figure_data.speed(results),
}
"""The CSV files of a report."""

_CONFUSIONS_SHOWN = 3
"""Of each loss."""
_WARNINGS_SHOWN = 3
"""The others are folded."""
_UNTESTED = "No model has seen the test split yet."


def make(results: Results, assessment: Assessment) -> Report:
    """Return the report of results, finished or not."""
    tables = {name: table(results, assessment) for name, table in TABLES.items()}
    figure = ResultFigure(results, assessment)
    warnings = _warnings(assessment)
    return Report(
        name=results.name,
        answer=assessment.statements[:2],
        figure=Gallery(multiples=figure, panels=draw_panels(figure, figure.losses))
        if figure.losses
        else None,
        missing=missing(results),
        warnings=warnings[:_WARNINGS_SHOWN],
        more_warnings=warnings[_WARNINGS_SHOWN:],
        sections=(
            _result(results, assessment, tables),
            _gallery(results, figures.LearningRates(results)),
            _budget(results),
            _gallery(results, figures.LearningCurves(results)),
            search_section(results, tables),
            _confusions(results),
            *_examples(results, assessment),
            _speed(tables),
            _provenance(results),
        ),
        tables=tables,
    )


def _warnings(assessment: Assessment) -> Sequence[Note]:
    """Return the caveats, each once, in the order of the assessment."""
    notes = [Note(text=caveat.text, command=caveat.command) for caveat in assessment.warnings]
    return list(dict.fromkeys(notes))


def missing(results: Results) -> list[str]:
    """Return what the results don't have yet, a sentence each."""
    losses = results.losses
    planned, repeats = planned_trainings(results), planned_repeats(results)
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
        return [*sentences, _UNTESTED]
    trained, wanted = len(results.confirmed), results.plan["repeats"]
    if results.is_staged and trained < wanted:
        sentences.append(
            f"The configuration to use has {trained} of {wanted} trainings on fresh seeds."
        )
    return sentences


def _result(
    results: Results, assessment: Assessment, tables: Mapping[str, pd.DataFrame]
) -> Section:
    items = []
    if assessment.winner is not None:
        items.append(_ranking(results, assessment.table))
    if len(assessment.differences):
        items.append(_differences(assessment))
    if len(tables["to_use"]):
        items.append(_to_use(results, tables["to_use"]))
    return Section(id="tables", title="The numbers", texts=assessment.statements[2:], items=items)


def _ranking(results: Results, table: pd.DataFrame) -> Table:
    has_images = table["images_low"].notna().any()
    median: Columns = {"median": lambda row: number(100 * row["accuracy_median"], ".2f")}
    columns: Columns = {
        "loss": lambda row: row["loss"],
        "n": lambda row: str(row["n"]),
        "accuracy, %": lambda row: interval(row, "accuracy", 100, ".2f"),
        **({_NEW_IMAGES: lambda row: _over_images(row, ".2f")} if has_images else {}),
        **(median if table["outliers"].any() else {}),
        "sd": lambda row: number(100 * row["accuracy_sd"], ".2f"),
        "negative log-likelihood": lambda row: interval(row, "nll", 1, ".3f"),
        "Brier score": lambda row: interval(row, "brier", 1, ".3f"),
        "calibration error": lambda row: interval(row, "ece", 1, ".3f"),
        "validation accuracy, %": lambda row: number(100 * row["val_accuracy"], ".2f"),
        "diverged": lambda row: str(row["diverged"]),
        "failed": lambda row: str(row["failed"]),
    }
    tuned = "Each loss at its best configuration, over n repeats with fresh seeds"
    if results.is_staged:
        tuned = "Each loss, tuned anew in each of n searches"
    caption = (
        f"{tuned}: means on {results.sizes['test']:,} test images, with 95 % intervals in "
        "brackets; sorted by validation accuracy"
    )
    return make_table(caption, columns, table.to_dict("records"), "table")


_NEW_IMAGES = "with new images"


def _over_images(row: Mapping[Any, Any], digits: str) -> str:
    """Return the interval over new images in percent, or in points."""
    ends = [number(100 * row[f"images_{end}"], digits) for end in ("low", "high")]
    return "–" if pd.isna(row["images_low"]) else " to ".join(ends)


def _differences(assessment: Assessment) -> Table:
    def times_ahead(row: Mapping[Any, Any]) -> str:
        return f"{row['ahead']} ({row['ties']} equal)" if row["ties"] else str(row["ahead"])

    has_images = assessment.differences["images_low"].notna().any()
    of_new_images: Columns = {
        _NEW_IMAGES: lambda row: _over_images(row, "+.2f"),
        "it is then": lambda row: row["images_verdict"],
    }
    columns: Columns = {
        "loss": lambda row: row["loss"],
        "it is": lambda row: row["verdict"],
        "points ahead (95 % interval)": lead,
        **(of_new_images if has_images else {}),
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
    return make_table(caption, columns, assessment.differences.to_dict("records"), "pairs")


def _to_use(results: Results, table: pd.DataFrame) -> Table:
    columns: Columns = {
        "loss": lambda row: row["loss"],
        **parameter_columns(results),
        "trainings": lambda row: str(row["repeats"]),
        "diverged": lambda row: str(row["diverged"]),
        "failed": lambda row: str(row["failed"]),
        "measured": lambda row: str(row["n"]),
        "images": lambda row: row["split"],
        "accuracy, %": lambda row: interval(row, "accuracy", 100, ".2f"),
    }
    chosen = "the best one of the winner"
    if results.is_staged:
        chosen = "the best of those that all searches of the winner chose"
    caption = (
        f"The configuration to use: {chosen}, trained on fresh seeds. Its accuracy is a mean, with "
        "the 95 % interval over new trainings in brackets"
    )
    return make_table(caption, columns, table.to_dict("records"), "to_use")


def _budget(results: Results) -> Section:
    budget = figures.Budget
    kind = results.search
    if kind in ("staged", "random"):
        return _gallery(results, budget(results))
    text = (
        "Expected validation performance needs independent draws of configurations. Those of the "
        f"sampler {kind} depend on each other: this figure is left out. The "
        "optimisation history is below."
    )
    return Section(id=budget.name, title=budget.title, texts=[text])


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


def _examples(results: Results, assessment: Assessment) -> Iterator[Section]:
    """Yield the section of images, if examples of the configuration to use are recorded."""
    to_use = assessment.to_use or {}
    examples = results.examples.get(str(to_use.get("run_id")))
    if examples is None:
        return
    from tracking.examples import EXPLANATION, draw_examples

    sheet = io.BytesIO()
    draw_examples(examples, sheet)
    text = (
        f"Test images, and what a model of the configuration to use predicts, that of run "
        f"`{to_use['run_id']}` with `{to_use['loss']}`. They were picked when this model was shown "
        "the test split."
    )
    counts = ", ".join(f"{len(group)} {title}" for title, group in examples.groups.items())
    picture = Picture(
        name="examples",
        caption=EXPLANATION,
        description=f"Test images with their probabilities: {counts}",
        png=sheet.getvalue(),
    )
    yield Section(id="examples", title="Images", texts=[text], items=[picture])


def _speed(tables: Mapping[str, pd.DataFrame]) -> Section:
    columns: Columns = {
        "loss": lambda row: row["loss"],
        "batch size": lambda row: f"{row['batch_size']:.0f}",
        "trainings": lambda row: f"{row['trainings']}",
        "of these reused": lambda row: f"{row['reused']}",
        "s each": lambda row: f"{row['seconds']:,.1f}",
        "min in all": lambda row: f"{row['seconds_in_all'] / 60:,.1f}",
        "images/s": lambda row: f"{row['images_per_second']:,.0f}",
    }
    caption = (
        "Time of training and validation, search and repeats together: mean of a training, sum of "
        "all that were not reused, and the median of training images a second. A training that "
        "diverged ended early. A reused training was found among earlier studies, and not made "
        "again"
    )
    if not len(tables["speed"]):
        return Section(id="speed", title="Time", texts=["No training is over yet."])
    table = make_table(caption, columns, tables["speed"].to_dict("records"), "speed")
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


def _gallery(
    results: Results, multiples: SmallMultiples, otherwise: str = "There is nothing to show yet."
) -> Section:
    name, title = multiples.name, multiples.title
    if not multiples.losses:
        return Section(id=name, title=title, texts=[otherwise])
    panels = draw_panels(multiples, results.losses)
    return Section(id=name, title=title, items=[Gallery(multiples=multiples, panels=panels)])
