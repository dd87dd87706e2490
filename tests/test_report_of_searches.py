"""What a comparison's report says about its searches: ranges, budget, importance, time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from planted_results import planted_results, planted_study
from scipy import stats

from experiments.comparison.assessment import assess
from experiments.comparison.ranges import open_ranges
from experiments.comparison.results import Results
from experiments.reporting import figure_data, search_data, sections
from experiments.reporting.figures import Budget, LearningRates
from experiments.reporting.optuna_figures import optuna_figures
from experiments.reporting.parts import Section, Table
from experiments.reporting.search_section import search_section
from experiments.reporting.small_multiples import PAPER

pytestmark = pytest.mark.usefixtures("quiet_optuna")

LOSSES = ("cross_entropy", "mse", "l1")


@pytest.fixture(scope="module")
def staged() -> Results:
    return planted_results(
        search="staged",
        losses=LOSSES,
        searches=4,
        trials=10,
        repeats=3,
        diverging={"l1": 0.3},
        reused=6,
    )


@pytest.fixture(scope="module")
def tables(staged: Results) -> Mapping[str, pd.DataFrame]:
    return tables_of(staged)


def tables_of(results: Results) -> dict[str, pd.DataFrame]:
    assessment = assess(results)
    return {name: make(results, assessment) for name, make in sections.TABLES.items()}


def tables_in(section: Section) -> dict[str, Table]:
    return {item.data: item for item in section.items if isinstance(item, Table)}


def cells(table: Table) -> list[dict[str, str]]:
    return [dict(zip(table.heads, row, strict=True)) for row in table.rows]


# The searches


def test_each_search_has_a_row_with_its_choice(staged: Results) -> None:
    found = search_data.searches(staged)
    assert list(found["loss"]) == [loss for loss in LOSSES for _ in range(4)]
    assert list(found["search"]) == [1, 2, 3, 4] * 3
    for row in found.to_dict("records"):
        repeats, trials = staged.repeats, staged.trials
        repeat = repeats[(repeats["loss"] == row["loss"]) & (repeats["search"] == row["search"])]
        for name in ("seed", "learning_rate", "batch_size", "val_accuracy", "run_id"):
            assert [row[name]] == list(repeat[name])
        own = trials[(trials["loss"] == row["loss"]) & (trials["search"] == row["search"])]
        assert len(own) == 10
        assert (row["tried_low"], row["tried_high"]) == (
            own["learning_rate"].min(),
            own["learning_rate"].max(),
        )


@pytest.mark.parametrize(
    ("chosen", "tried", "ended"),
    [
        (0.1, [0.01, 0.1, 1.0], "closed"),
        (0.01, [0.01, 0.1, 1.0], "open below"),
        (1.0, [0.01, 0.1, 1.0], "open above"),
        (0.1, [0.1, 0.1], "not varied"),
        (0.3, [0.1, 0.1 + 0.2], "open above"),
    ],
)
def test_a_range_is_open_where_the_choice_is_the_most_extreme(
    chosen: float, tried: list[float], ended: str, staged: Results
) -> None:
    of_first = (staged.repeats["loss"] == "mse") & (staged.repeats["search"] == 1)
    repeats = staged.repeats[of_first].assign(learning_rate=chosen, batch_size=64)
    trial = staged.trials[staged.trials["loss"] == "mse"].iloc[:1]
    trials = pd.concat([trial.assign(learning_rate=rate, batch_size=64) for rate in tried])
    made = replace(staged, trials=trials, repeats=repeats)
    found = search_data.searches(made)
    assert list(found["rate_ended"]) == [ended]
    assert list(found["batch_ended"]) == ["not varied"]


def test_the_table_of_searches_agrees_with_the_verdict(staged: Results) -> None:
    """A range that is open in half of the searches is named in the first sentence."""
    found = search_data.searches(staged)
    way = {"lower": "below", "upper": "above"}
    column = {"learning_rate": "rate_ended", "batch_size": "batch_ended"}
    named = open_ranges(staged, assess(staged).table)
    for each in named:
        ended = found.loc[found["loss"] == each.loss, column[each.parameter]]
        assert ended.str.contains(way[each.end]).sum() == each.count
    assert named


def test_the_section_shows_the_searches_and_where_they_began(
    staged: Results, tables: Mapping[str, pd.DataFrame]
) -> None:
    section = search_section(staged, tables)
    found = tables_in(section)
    assert len(cells(found["searches"])) == 12
    ids = [row["run"] for row in cells(found["searches"])]
    assert all(
        whole.startswith(shown) for whole, shown in zip(staged_ids(staged), ids, strict=True)
    )
    (of_mse,) = [row for row in cells(found["ranges"]) if row["loss"] == "mse"]
    low, high = staged.ranges["mse"]
    assert of_mse["range at the start"] == f"{low:.2g} to {high:.2g}"
    assert of_mse["of these reused"] == "6"


def staged_ids(results: Results) -> list[str]:
    return list(search_data.searches(results)["run_id"])


def test_a_diverged_repeat_is_said_in_place_of_its_test_accuracy(
    staged: Results, tables: Mapping[str, pd.DataFrame]
) -> None:
    diverged = staged.repeats.assign(outcome="diverged", test_accuracy=np.nan)
    changed = {**tables, "searches": search_data.searches(replace(staged, repeats=diverged))}
    shown = tables_in(search_section(staged, changed))["searches"]
    assert {row["test, %"] for row in cells(shown)} == {"diverged"}


def test_the_configuration_to_use_has_its_mean_and_interval(staged: Results) -> None:
    (row,) = tables_of(staged)["to_use"].to_dict("records")
    confirmed = staged.confirmed
    values = confirmed["test_accuracy"]
    assert (row["loss"], row["learning_rate"], row["n"], row["split"]) == (
        confirmed["loss"].iloc[0],
        confirmed["learning_rate"].iloc[0],
        3,
        "test",
    )
    low, high = stats.t.interval(0.95, 2, values.mean(), values.std(ddof=1) / np.sqrt(3))
    found = (row["accuracy_mean"], row["accuracy_low"], row["accuracy_high"])
    assert found == pytest.approx((values.mean(), low, high))
    (shown,) = cells(tables_in(sections.make(staged, assess(staged)).sections[0])["to_use"])
    mean, low, high = (f"{100 * each:.2f}" for each in found)
    assert shown["accuracy, %"] == f"{mean} ({low} to {high})"


@pytest.mark.parametrize("search", ["random", "tpe"])
def test_without_stages_the_winners_repeats_confirm_what_to_use(search: str) -> None:
    results = planted_results(search=search, losses=LOSSES[:1], trials=4, repeats=2)
    tables = tables_of(results)
    assert tables["searches"].empty
    assert tables["to_use"]["learning_rate"].iloc[0] in set(results.repeats["learning_rate"])
    assert set(tables_in(search_section(results, tables))) == {"ranges", "best_settings"}


@pytest.mark.parametrize(
    ("plan", "kind"),
    [
        ({"search": "staged"}, "staged"),
        ({"search": "tpe", "sampler": "random"}, "tpe"),
        ({"sampler": "tpe"}, "tpe"),  # older comparisons
        ({}, "random"),
    ],
)
def test_the_kind_of_search_is_read_from_old_plans_too(
    plan: dict[str, str], kind: str, staged: Results
) -> None:
    rest = {name: value for name, value in staged.plan.items() if name != "search"}
    assert replace(staged, plan=rest | plan).search == kind


# Accuracy against learning rate


def drawn(figure: LearningRates | Budget, loss: str) -> Axes:
    axes = Figure().add_subplot()
    figure.draw(axes, loss, PAPER)
    return axes


def test_no_line_joins_two_points(staged: Results) -> None:
    for results in (staged, planted_results(losses=LOSSES[:1])):
        lines = drawn(LearningRates(results), "cross_entropy").get_lines()
        assert {line.get_linestyle() for line in lines} == {"None"}


def test_the_range_at_the_start_is_shaded_and_what_lies_beyond_is_shown(staged: Results) -> None:
    axes = drawn(LearningRates(staged), "mse")
    (span,) = axes.patches
    low, high = staged.ranges["mse"]
    assert (span.get_x(), span.get_x() + span.get_width()) == pytest.approx((low, high))  # type: ignore[attr-defined]
    left, right = axes.get_xlim()
    assert left < staged.trials["learning_rate"].min()
    assert right > staged.trials["learning_rate"].max() > high


def test_batch_sizes_beyond_the_list_have_markers_too(staged: Results) -> None:
    tried = set(staged.trials["batch_size"])
    assert not tried <= set(staged.plan["batch_sizes"])
    labels = [str(entry.get_label()) for entry in LearningRates(staged).legend(PAPER)]
    assert [label for label in labels if label.startswith("batch size")] == [
        f"batch size {size}" for size in sorted(tried)
    ]
    lines = drawn(LearningRates(staged), "mse").get_lines()
    shown = sum(points(line) for line in lines if not is_ring(line))
    assert shown == (staged.trials["loss"] == "mse").sum()


def points(line: Any) -> int:
    return len(np.asarray(line.get_xdata()))


def is_ring(line: Any) -> bool:
    return bool(line.get_markersize() == 13)


def test_trainings_that_explore_are_lighter(staged: Results) -> None:
    lines = [each for each in drawn(LearningRates(staged), "mse").get_lines() if not is_ring(each)]
    light = sum(points(line) for line in lines if line.get_alpha())
    of_mse = staged.trials[staged.trials["loss"] == "mse"]
    assert light == (of_mse["stage"] == "explore").sum() > 0
    random = LearningRates(planted_results(losses=LOSSES[:1]))
    lines = drawn(random, "cross_entropy").get_lines()
    assert not any(points(each) for each in lines if each.get_alpha())


def test_the_choice_of_each_search_is_ringed(staged: Results) -> None:
    (rings,) = filter(is_ring, drawn(LearningRates(staged), "mse").get_lines())
    repeats = staged.repeats[staged.repeats["loss"] == "mse"].sort_values("search")
    assert list(np.asarray(rings.get_xdata())) == list(repeats["learning_rate"])
    assert to_rgba(rings.get_markerfacecolor())[3] == 0


# Accuracy against budget


def test_the_budget_is_the_mean_over_searches_of_the_best_so_far(staged: Results) -> None:
    table = search_data.best_so_far(staged)
    trials = staged.trials
    for row in table.to_dict("records"):
        best = []
        for search in range(1, 5):
            own = trials[(trials["loss"] == row["loss"]) & (trials["search"] == search)]
            own = own[own["stage"] != "choose"].sort_values("trial")
            best.append(max(own["val_accuracy"].iloc[: row["trials"]]))
        found = (row["val_accuracy"], row["val_accuracy_low"], row["val_accuracy_high"])
        assert found == pytest.approx((np.mean(best), min(best), max(best)))
        assert row["searches"] == 4
    assert table["trials"].max() == 8  # of 10, two choose
    pd.testing.assert_frame_equal(figure_data.budget(staged), table)


def test_a_search_that_is_not_over_shortens_the_budget_of_all(staged: Results) -> None:
    trials = staged.trials
    cut = (trials["loss"] == "mse") & (trials["search"] == 2) & (trials["trial"] >= 3)
    table = search_data.best_so_far(replace(staged, trials=trials[~cut]))
    assert dict(table.groupby("loss")["trials"].max()) == {"cross_entropy": 8, "mse": 3, "l1": 8}


def test_a_training_without_an_accuracy_counts_as_zero(staged: Results) -> None:
    first = (staged.trials["loss"] == "mse") & (staged.trials["trial"] == 0)
    trials = staged.trials.assign(val_accuracy=staged.trials["val_accuracy"].mask(first))
    table = search_data.best_so_far(replace(staged, trials=trials))
    assert table.loc[table["loss"] == "mse", "val_accuracy"].iloc[0] == 0


def test_the_caption_of_the_budget_says_what_it_is_an_estimate_of(staged: Results) -> None:
    assert "Each search is an independent repeat" in Budget(staged).caption
    random = Budget(planted_results(losses=LOSSES[:1]))
    assert "Tang et al. 2020" in random.caption
    assert Budget(staged).describe("mse").endswith("in 4 searches")
    assert len(drawn(Budget(staged), "mse").collections) == 1  # the band


# Importance


def test_importances_need_twenty_complete_trials_of_a_loss() -> None:
    results = planted_results(losses=LOSSES[:2], trials=20, repeats=1)
    trials = results.studies["mse"].get_trials()[:19]
    few = optuna.create_study(direction="maximize")
    few.add_trials(trials)
    made = replace(results, studies={**results.studies, "mse": few})
    tables = tables_of(made)
    assert set(tables["importances"]["loss"]) == {"cross_entropy"}
    section = search_section(made, tables)
    assert "fewer: `mse` (19)." in " ".join(section.texts)
    sums = tables["importances"].groupby("loss")["importance"].sum()
    assert dict(sums) == pytest.approx({"cross_entropy": 1.0})
    names = [item.name for item in section.items if item.kind == "plot"]  # type: ignore[union-attr]
    assert names == ["history", "importances", "parallel"]


def test_with_few_trials_no_importance_is_shown() -> None:
    results = planted_results(losses=LOSSES[:2], trials=8, repeats=1)
    section = search_section(results, tables_of(results))
    assert "importances" not in tables_in(section)
    assert "`cross_entropy` (8), `mse` (8)" in section.texts[0]
    assert [item.name for item in section.items if item.kind == "plot"] == ["history", "parallel"]  # type: ignore[union-attr]


# Optuna's plots


def test_trials_have_whole_numbers_and_the_objective_its_name(staged: Results) -> None:
    figures = optuna_figures(staged)
    axis = figures["history"].layout.xaxis
    assert axis.dtick == int(axis.dtick) >= 1
    assert figures["history"].layout.yaxis.title.text == "validation accuracy"
    assert figures["parallel"].layout.xaxis.ticktext[0] == "validation accuracy"
    assert "validation accuracy" in figures["importances"].layout.xaxis.title.text
    assert "Objective" not in str([figure.to_json() for figure in figures.values()])


def test_labels_of_parallel_coordinates_are_apart_and_over_the_lines(staged: Results) -> None:
    labels = optuna_figures(staged)["parallel"].layout.annotations
    for place in range(4):
        heights = [label.y for label in labels if label.x == place]
        assert len(heights) >= 2
        assert all(after - before > 0.05 for before, after in pairwise(heights))
    assert all(label.bgcolor and label.name == "value" for label in labels)
    assert {label.xanchor for label in labels if label.x == 3} == {"left"}


def test_searches_of_two_losses_may_have_widened_to_different_batch_sizes() -> None:
    results = planted_results(search="staged", losses=LOSSES[:2], searches=2, trials=6)
    sizes = results.trials["batch_size"].where(results.trials["loss"] == "mse", 1_024)
    made = replace(results, trials=results.trials.assign(batch_size=sizes))
    studies = {loss: planted_study("widened", loss, made.plan, made.trials) for loss in LOSSES[:2]}
    study = figure_data.joint_study(replace(made, studies=studies))
    choices = study.trials[0].distributions["batch_size"].choices  # type: ignore[attr-defined]
    assert list(choices) == sorted({*made.trials["batch_size"], 32, 64, 128})
    assert "parallel" in optuna_figures(replace(made, studies=studies))


# Time, and what is missing


def test_reused_trainings_are_counted_and_take_no_time(staged: Results) -> None:
    table = figure_data.speed(staged)
    trials = staged.trials
    of_mse = table[table["loss"] == "mse"]
    assert of_mse["reused"].sum() == 6
    made = trials[(trials["loss"] == "mse") & ~trials["reused"].astype(bool)]
    repeats = staged.repeats[staged.repeats["loss"] == "mse"]
    confirmed = staged.confirmed[staged.confirmed["loss"] == "mse"]
    seconds = sum(frame["seconds"].sum() for frame in (made, repeats, confirmed))
    assert of_mse["seconds_in_all"].sum() == pytest.approx(seconds)
    assert of_mse["trainings"].sum() == 40 + len(repeats) + len(confirmed)


def cut_short(results: Results) -> Results:
    trials = results.trials
    return replace(results, trials=trials[(trials["loss"] != "mse") | (trials["search"] < 3)])


def without_a_repeat(results: Results) -> Results:
    repeats = results.repeats
    return replace(
        results, repeats=repeats[(repeats["loss"] != "mse") | (repeats["search"] != 2)], hits={}
    )


def one_confirmed(results: Results) -> Results:
    return replace(results, confirmed=results.confirmed.iloc[:1])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (cut_short, "Losses with fewer than 40 trials: mse (20)."),
        (without_a_repeat, "Losses with fewer than 4 repeats: mse (3)."),
        (one_confirmed, "The configuration to use has 1 of 3 trainings on fresh seeds."),
    ],
)
def test_what_searches_lack_is_said(change: Any, says: str, staged: Results) -> None:
    assert not sections.missing(staged)
    assert says in " ".join(sections.missing(change(staged)))


def test_curves_are_over_the_repeats_whatever_their_numbers(staged: Results) -> None:
    """Repeats of different searches may have the same number of a trial."""
    curves = staged.curves.assign(trial=staged.curves["trial"].where(
        staged.curves["stage"] == "search", 0
    ))  # fmt: skip
    last = figure_data.learning_curves(replace(staged, curves=curves)).groupby("loss").last()
    complete = staged.repeats[staged.repeats["outcome"] == "complete"]
    means = complete.groupby("loss")["val_accuracy"].mean()
    for loss in ("cross_entropy", "mse"):
        assert last.loc[loss, "trainings"] == 4
        assert last.loc[loss, "val_accuracy"] == pytest.approx(means[loss])
