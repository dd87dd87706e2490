"""The first figure of a comparison's report, and what stands around it."""

from __future__ import annotations

import html
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from planted_results import planted_results

from experiments.comparison.assessment import Assessment, assess
from experiments.comparison.caveats import Caveat
from experiments.comparison.results import Results
from experiments.reporting import rendering, sections
from experiments.reporting.parts import Table
from experiments.reporting.result_figure import ACCURACY, DIFFERENCE, ResultFigure, result_rows
from experiments.reporting.small_multiples import PAPER, draw_panels

pytestmark = pytest.mark.usefixtures("quiet_optuna")

CLOSE = ("cross_entropy", "mse", "label_smoothing", "squentropy")


def staged(**changes: Any) -> Results:
    changed: dict[str, Any] = {"losses": CLOSE, "searches": 4, "trials": 8} | changes
    return planted_results(search="staged", **changed)


@pytest.fixture(scope="module")
def close() -> tuple[Results, Assessment]:
    """Four losses that are about as good."""
    results = staged()
    return results, with_images(assess(results))


def with_images(assessment: Assessment) -> Assessment:
    """Return an assessment with intervals over new images, twice as wide as the others."""
    table, pairs = assessment.table.copy(), assessment.pairs.copy()
    for frame, mean, prefix in ((table, "accuracy_mean", "accuracy_"), (pairs, "difference", "")):
        for end in ("low", "high"):
            frame[f"images_{end}"] = frame[mean] + 2 * (frame[f"{prefix}{end}"] - frame[mean])
    return replace(assessment, table=table, pairs=pairs)


def drawn(figure: ResultFigure, panel: str) -> Axes:
    axes = Figure().add_subplot()
    figure.draw(axes, panel, PAPER)
    return axes


def ends(line: Line2D) -> tuple[list[float], list[float]]:
    return np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


# Its data


def test_the_rows_are_the_means_of_the_table_sorted_by_test_accuracy(
    close: tuple[Results, Assessment],
) -> None:
    results, assessment = close
    rows = result_rows(results, assessment)
    means = rows[rows["seed"].isna() & (rows["panel"] == ACCURACY)].set_index("loss")
    assert list(means["value"]) == sorted(means["value"], reverse=True)
    table = assessment.table.set_index("loss").loc[means.index]
    for name, column in (
        ("value", "accuracy_mean"),
        ("low", "accuracy_low"),
        ("images_high", "images_high"),
    ):
        np.testing.assert_array_equal(means[name], table[column])
    repeats = rows[rows["seed"].notna() & (rows["panel"] == ACCURACY)]
    merged = repeats.merge(results.repeats, on=["loss", "seed"])
    np.testing.assert_array_equal(merged["value"], merged["test_accuracy"])
    assert len(merged) == len(repeats)
    assert len(repeats) == len(results.repeats) == 16


def test_a_difference_is_what_a_loss_has_more_than_the_winner(
    close: tuple[Results, Assessment],
) -> None:
    results, assessment = close
    rows = result_rows(results, assessment)
    rows = rows[rows["panel"] == DIFFERENCE]
    accuracy = results.repeats.pivot_table(index="seed", columns="loss", values="test_accuracy")
    pairs: list[dict[Any, Any]] = assessment.differences.to_dict("records")
    for row in pairs:
        of_loss = rows[rows["loss"] == row["loss"]]
        lead = accuracy[row["loss"]] - accuracy[assessment.winner]
        repeats = of_loss[of_loss["seed"].notna()].set_index("seed")["value"]
        assert dict(repeats) == dict(lead)
        mean = of_loss[of_loss["seed"].isna()].iloc[0]
        assert mean["value"] == pytest.approx(lead.mean())
        assert (mean["low"], mean["high"]) == (-row["high"], -row["low"])
        assert mean["images_low"] < mean["low"] < mean["high"] < mean["images_high"]
    assert assessment.winner not in set(rows["loss"])


# What is drawn


def test_intervals_are_thick_over_trainings_and_thin_over_images(
    close: tuple[Results, Assessment],
) -> None:
    results, assessment = close
    figure = ResultFigure(results, assessment)
    lines = drawn(figure, ACCURACY).get_lines()
    for place, loss in enumerate(figure.order):
        row = assessment.table.set_index("loss").loc[loss]
        spans = {
            line.get_linewidth(): ends(line)[0]
            for line in lines
            if ends(line)[1] == [place, place] and line.get_linestyle() == "-"
        }
        widths = sorted(spans)
        assert spans[widths[1]] == [100 * row["accuracy_low"], 100 * row["accuracy_high"]]
        assert spans[widths[0]] == [
            100 * row["images_low"],
            100 * row["images_high"],
        ]
    assert "thin, over new trainings and new images" in figure.caption
    assert [entry.get_label() for entry in figure.legend(PAPER)][-1] == "and new images"


def test_without_intervals_over_images_none_is_promised() -> None:
    results = planted_results(losses=CLOSE[:2], trials=4, repeats=3, given_test=True)
    results = replace(results, hits={})
    figure = ResultFigure(results, assess(results))
    assert "images." in figure.caption
    assert "thin" not in figure.caption
    assert len(figure.legend(PAPER)) == 3


@pytest.mark.parametrize(
    ("given", "says"),
    [(True, "trainings on these test images"), (False, "trainings and new splits of these images")],
)
def test_the_caption_says_which_images_an_interval_is_about(given: bool, says: str) -> None:
    results = planted_results(losses=CLOSE[:2], trials=4, repeats=3, given_test=given)
    assert f"thick, over new {says}; thin," in ResultFigure(results, assess(results)).caption


def test_each_repeat_is_a_dot(close: tuple[Results, Assessment]) -> None:
    axes = drawn(ResultFigure(*close), ACCURACY)
    dots = [line for line in axes.get_lines() if line.get_markersize() == 4]
    assert [len(np.asarray(line.get_xdata())) for line in dots] == [4] * 4
    assert all(line.get_linestyle() == "None" for line in dots)


def test_the_differences_have_a_line_at_zero_and_the_same_rows(
    close: tuple[Results, Assessment],
) -> None:
    figure = ResultFigure(*close)
    axes = drawn(figure, DIFFERENCE)
    assert any(ends(line)[0] == [0, 0] for line in axes.get_lines())
    assert texts(axes)[::2] == texts(drawn(figure, ACCURACY))[::2] == figure.order
    assert texts(axes)[1::2].count("the reference") == 1
    low, high = axes.get_xlim()
    assert low < 0 < high


def test_a_loss_that_diverged_is_marked_in_words() -> None:
    results = staged(losses=("cross_entropy", "mse"))
    outcome = results.repeats["outcome"].where(results.repeats["loss"] != "mse", "diverged")
    one = results.repeats["seed"] == results.repeats["seed"].max()
    lost = one & (results.repeats["loss"] == "mse")
    repeats = results.repeats.assign(outcome=outcome.where(lost, "complete"))
    repeats.loc[lost, "test_accuracy"] = np.nan
    made = replace(results, repeats=repeats, hits={})
    figure = ResultFigure(made, assess(made))
    (words,) = [text for text in texts(drawn(figure, ACCURACY)) if "diverged" in text]
    assert words.endswith("%, 1 diverged of 4")
    assert "mse: 1 diverged of 4 repeats" in figure.describe(ACCURACY)
    assert "1 diverged of 4" in draw_panels(figure, figure.losses)[0].svg


def test_a_loss_far_behind_does_not_squeeze_the_others(close: tuple[Results, Assessment]) -> None:
    results = staged(losses=(*CLOSE, "l1"))
    figure = ResultFigure(results, assess(results))
    assert figure.far == ["l1"]
    for panel in (ACCURACY, DIFFERENCE):
        axes = drawn(figure, panel)
        low, high = axes.get_xlim()
        assert high - low < 8
        (arrow,) = [line for line in axes.get_lines() if line.get_marker() == "<"]
        assert ends(arrow)[0] == [low]
    assert "An arrow" in figure.caption
    assert "An arrow" not in ResultFigure(*close).caption


def test_of_two_losses_each_has_its_place() -> None:
    results = staged(losses=("cross_entropy", "l1"))
    assert ResultFigure(results, assess(results)).far == []


def test_labels_of_ticks_are_the_places_of_the_ticks(close: tuple[Results, Assessment]) -> None:
    axes = drawn(ResultFigure(*close), ACCURACY)
    axes.figure.canvas.draw()
    labels = [float(label.get_text()) for label in axes.get_xticklabels()]
    np.testing.assert_allclose(labels, axes.get_xticks(), rtol=1e-9)
    assert len(labels) >= 2


def test_a_comparison_of_one_loss_has_no_differences() -> None:
    results = staged(losses=("mse",))
    assert ResultFigure(results, assess(results)).losses == [ACCURACY]


def test_without_a_test_there_is_no_figure() -> None:
    results = staged(losses=CLOSE[:1], is_tested=False, repeats=0)
    assert sections.make(results, assess(results)).figure is None


# The order of the page


def caveat(text: str, command: str = "") -> Caveat:
    return Caveat(kind="epochs", loss=None, text=text, command=command)


HARMFUL = "python -m experiments.compare --name '</code><b>```\n# x'"


@pytest.fixture(scope="module")
def cautious(close: tuple[Results, Assessment]) -> tuple[str, str]:
    """The page and the Markdown of a report with five caveats, one of them twice."""
    results, assessment = close
    warnings = (
        caveat("First.", HARMFUL),
        *(caveat(f"Caveat {number}.") for number in (2, 2, 3, 4, 5)),
    )
    report = sections.make(results, replace(assessment, warnings=warnings))
    return rendering.html(report), rendering.markdown(report)


def test_the_verdict_comes_first_then_the_figure_then_three_caveats(
    cautious: tuple[str, str], close: tuple[Results, Assessment]
) -> None:
    page, text = cautious
    verdict = close[1].statements[0].split("`")[-1].strip()[-30:]
    order = (
        (verdict, 'aria-label="The result: test accuracy"', "First.", "Caveat 2.", "Caveat 3."),
        ("<details>", "Caveat 4.", "Caveat 5.", "</details>", "The numbers", "<table"),
    )
    body = page[page.index("<body>") :]
    places = [body.index(part) for part in (*order[0], *order[1])]
    assert places == sorted(places)
    assert "<summary>2 more</summary>" in page
    order_of_text = ("figures/result.png", "First.", "Caveat 3.", "**More caveats**", "Caveat 4.")
    places = [text.index(part) for part in (*order_of_text, "## The numbers")]
    assert places == sorted(places)


def test_each_caveat_is_there_once(cautious: tuple[str, str]) -> None:
    for made in cautious:
        assert made.count("Caveat 2.") == 1


def test_the_command_of_a_caveat_is_code_and_does_no_harm(cautious: tuple[str, str]) -> None:
    page, text = cautious
    (block,) = re.findall(r'<pre class="command"><code>(.*)</code></pre>', page)
    assert "<span>--name</span> <span>" in block  # no line ends within a flag
    assert "&lt;/code&gt;&lt;b&gt;```\\n#</span> <span>x" in block
    plain = html.unescape(re.sub("</?span>", "", block))
    assert plain == HARMFUL.replace("\n", "\\n")
    from markdown_it import MarkdownIt

    (code,) = [token for token in MarkdownIt().parse(text) if token.type == "fence"]
    assert code.content == HARMFUL.replace("\n", "\\n") + "\n"
    assert code.info == "sh"


def test_the_table_has_both_intervals(close: tuple[Results, Assessment]) -> None:
    results, assessment = close
    report = sections.make(results, assessment)
    ranking, differences = report.sections[0].items[:2]
    row = assessment.table.iloc[0]
    ends = f"{100 * row['images_low']:.2f} to {100 * row['images_high']:.2f}"
    assert isinstance(ranking, Table)
    assert isinstance(differences, Table)
    assert ranking.rows[0][list(ranking.heads).index("with new images")] == ends
    verdicts = assessment.differences[["verdict", "images_verdict"]].to_numpy().tolist()
    columns = [list(differences.heads).index(head) for head in ("it is", "it is then")]
    assert [[row[column] for column in columns] for row in differences.rows] == verdicts
    assert "median" not in ranking.heads


def test_the_median_stands_beside_the_mean_where_a_repeat_is_outlying(
    close: tuple[Results, Assessment],
) -> None:
    results, assessment = close
    made = replace(assessment, table=assessment.table.assign(outliers=[1, 0, 0, 0]))
    (ranking, *_) = sections.make(results, made).sections[0].items
    assert isinstance(ranking, Table)
    medians = [row[list(ranking.heads).index("median")] for row in ranking.rows]
    assert medians == [f"{100 * median:.2f}" for median in assessment.table["accuracy_median"]]


def test_numbers_of_the_figure_are_in_its_csv(close: tuple[Results, Assessment]) -> None:
    results, assessment = close
    table = sections.TABLES["result"](results, assessment)
    pd.testing.assert_frame_equal(table, result_rows(results, assessment))
