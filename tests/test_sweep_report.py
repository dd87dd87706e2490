"""The report of a sweep: its answer, its figures, and what it does with odd studies."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.study import Study
from optuna.trial import TrialState, create_trial

from experiments import report
from experiments.reporting.figure_data import ENOUGH_TRIALS
from experiments.reporting.parts import Plot, Report, Table
from experiments.reporting.rendering import html, markdown
from experiments.reporting.sweep_report import _MOST_LINES, make

HARMFUL = "<img src=x onerror=alert(1)>"
STATES = {
    "complete": TrialState.COMPLETE,
    "diverged": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}


def study_of(
    outcomes: Sequence[str],
    *,
    losses: Sequence[str] = ("l1", "mse"),
    storage: str | None = None,
    name: str = "swept",
) -> Study:
    """Return a study of a sweep; of two trials, the later one has the higher accuracy."""
    study = optuna.create_study(storage=storage, study_name=name, direction="maximize")
    settings = {
        "dataset": "digits",
        "losses": list(losses),
        "learning_rate_min": 0.001,
        "learning_rate_max": 1.0,
        "batch_sizes": [16, 32],
        "epochs": 3,
    }
    environment = {"commit": "c0ffee", "torch": "2.15.0"}
    for key, value in {"settings": settings, "environment": environment, "id": "0" * 32}.items():
        study.set_user_attr(key, value)
    space = {
        "loss": CategoricalDistribution(list(losses)),
        "learning_rate": FloatDistribution(0.001, 1.0, log=True),
        "batch_size": CategoricalDistribution([16, 32]),
    }
    rates = np.random.default_rng(0).uniform(-3, 0, len(outcomes))
    for number, (outcome, rate) in enumerate(zip(outcomes, rates, strict=True)):
        accuracy = (number + 1) / (len(outcomes) + 1)
        params = {
            "loss": losses[number % len(losses)],
            "learning_rate": float(10**rate),
            "batch_size": (16, 32)[number // 2 % 2],
        }
        study.add_trial(
            create_trial(
                state=STATES[outcome],
                value=accuracy if STATES[outcome] == TrialState.COMPLETE else None,
                params=params,
                distributions=space,
                user_attrs={"outcome": outcome, "val_loss": 0.5, "run_id": f"{number:032x}"},
                intermediate_values={} if outcome == "failed" else {1: accuracy},
            )
        )
    return study


def plots(made: Report) -> dict[str, Any]:
    items = [item for section in made.sections for item in section.items]
    return {item.name: item.figure for item in items if isinstance(item, Plot)}


def tables(made: Report) -> list[Table]:
    items = [item for section in made.sections for item in section.items]
    return [item for item in items if isinstance(item, Table)]


def test_the_best_complete_trial_is_the_answer() -> None:
    made = make(study_of(["complete", "failed", "complete", "pruned", "diverged"]))
    first, second = made.answer
    assert first.startswith("The best trial is number 2, with loss l1, learning rate ")
    assert first.endswith("batch size 32: its validation accuracy is 50.00%.")
    assert second == "5 trials ended: 2 complete, 1 diverged, 1 pruned, 1 failed."
    ten, losses, *_ = tables(made)
    assert [row[0] for row in ten.rows] == ["2", "0"]
    assert [row[:3] for row in losses.rows] == [
        ["l1", "50.00", "complete"],
        ["mse", "66.67", "pruned"],
    ]
    commands = [note.command for note in made.warnings]
    assert commands[0].startswith(f"python -m tracking.predict digits:test --run-id {2:032x}")
    assert made.tables["trials"]["trial"].tolist() == [2, 0, 4, 3, 1]


def test_a_point_is_a_trial_a_colour_a_loss_a_shape_a_batch_size() -> None:
    study = study_of(["complete", "complete", "complete", "pruned", "failed"])
    of_l1, name_of_l1, of_mse, name_of_mse, *sizes = plots(make(study))["rates"]["data"]
    assert [trace["name"] for trace in (name_of_l1, name_of_mse)] == ["l1", "mse"]
    assert of_l1["marker"]["color"] == name_of_l1["marker"]["color"] != of_mse["marker"]["color"]
    assert [trace["name"] for trace in sizes] == ["batch size 16", "batch size 32"]
    shapes = [trace["marker"]["symbol"] for trace in sizes]
    assert of_l1["marker"]["symbol"] == [shapes[1], shapes[0]]  # the best first
    assert of_mse["marker"]["symbol"] == [shapes[0], f"{shapes[1]}-open"]
    assert "trial 2: 50.00%" in of_l1["text"][0]


@pytest.mark.parametrize("number", [ENOUGH_TRIALS - 1, ENOUGH_TRIALS])
def test_importances_need_enough_trials(number: int) -> None:
    made = make(study_of(["complete"] * number))
    has_importances = number >= ENOUGH_TRIALS
    assert set(plots(made)) == {
        *("rates", "history", "parallel"),
        *(["importances"] if has_importances else []),
    }
    (search,) = (section for section in made.sections if section.id == "search")
    assert bool(search.texts) != has_importances


def test_the_history_has_the_numbers_of_the_trials() -> None:
    figure = plots(make(study_of(["pruned", "complete", "failed", "complete"])))["history"]
    points = next(trace for trace in figure["data"] if trace["mode"] == "markers")
    assert list(points["x"]) == [1, 3]


def test_of_many_trials_the_best_have_lines() -> None:
    made = make(study_of(["complete"] * (_MOST_LINES + 20)))
    assert len(plots(made)["parallel"]["data"]) == _MOST_LINES + 1  # and a colour bar
    assert len(plots(made)["rates"]["data"][0]["text"]) == (_MOST_LINES + 20) / 2


@pytest.mark.parametrize("outcomes", [[], ["failed"], ["pruned", "pruned"], ["diverged"]])
def test_a_study_without_a_complete_trial_is_reported(outcomes: list[str]) -> None:
    made = make(study_of(outcomes))
    assert made.missing == ["No trial is complete yet."]
    assert "best trial is number" not in html(made)
    assert markdown(made).startswith("# Which configuration is best? swept")


def test_names_do_no_harm() -> None:
    name = "a&b|<c>"
    made = make(study_of(["complete"] * 3, losses=(HARMFUL, "mse"), name=name))
    page = html(made)
    assert HARMFUL not in page
    for figure in plots(made).values():
        assert HARMFUL not in json.dumps(figure)
    assert "<title>a&amp;b|&lt;c&gt;: Which configuration is best?</title>" in page
    assert HARMFUL not in markdown(made)


def test_the_page_has_all_scripts_once_and_loads_nothing() -> None:
    page = html(make(study_of(["complete"] * 3)))
    assert page.count("plotly.js v") == 1
    assert "default-src 'none'" in page
    assert "src=" not in page.partition("</head>")[0]
    assert len(page) < 6_000_000


# The command


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return "sqlite:///optuna.db"


@pytest.mark.parametrize("out", [None, "elsewhere"])
def test_the_command_reports_a_sweep(
    storage: str, out: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    study_of(["complete"] * 2, storage=storage, name="my sweep/1")
    arguments = [] if out is None else ["--out", out]
    folder = Path(out or "reports/my-sweep-1")
    assert report.main(["my sweep/1", *arguments]) == 0
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith("The best trial is number 1, with ")
    assert last == f"report: {folder}/report.html"
    assert {each.name for each in folder.iterdir()} == {"report.html", "report.md", "data"}
    assert pd.read_csv(folder / "data/trials.csv")["trial"].tolist() == [1, 0]


def test_what_is_neither_a_sweep_nor_a_comparison_is_one_line(
    storage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    study_of([], storage=storage)
    study_of([], storage=storage, name="c")
    study_of([], storage=storage, name="c/stage")
    optuna.create_study(storage=storage, study_name="foreign")
    for name in ("other", "foreign"):
        assert report.main([name]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"there is no sweep or comparison {name!r} in sqlite:///optuna.db, only" in line
        assert "'swept', 'c', 'foreign'" in line
    assert not Path("reports").exists()


def test_a_reports_folder_that_can_not_be_made_is_one_line(
    storage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    study_of(["complete"], storage=storage)
    Path("reports").write_text("a file")
    assert report.main(["swept"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "can't write --out" in line
