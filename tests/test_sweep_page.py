"""What MLflow's pages say of a sweep: description, best so far, report, the list of its trials."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_pool import FakePool, diverges, script_of_ten, trains, use_pool
from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException
from small_sweep import changed, small_settings

from cnn.data import Dataset
from experiments.study import parent
from experiments.study.controller import sweep
from experiments.study.events import SweepEnded, SweepEvent, SweepStarted, TrialEnded
from experiments.study.opening import open_study
from experiments.study.parent import BEST_METRIC, Parent
from experiments.study.settings import Settings
from experiments.study.summary import LONGEST, Summary, study_view
from experiments.sweep import main
from tracking.tracker import Tracker

NOTE = "mlflow.note.content"
ACCURACIES = (0.5, 0.75, 0.625, 0.875)


@pytest.fixture
def settings(mlflow_store: str, tmp_path: Path) -> Settings:
    storage = f"sqlite:///{tmp_path / 'optuna.db'}"
    return small_settings(storage, trials=3, epochs=1, study="pages", losses=("mse", "l1"))


@pytest.fixture(autouse=True)
def at_each_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the page whenever something has changed."""
    monkeypatch.setattr(parent, "INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr(parent, "SHARE_OF_TIME", 1e9)


def run_sweep(settings: Settings, data: Dataset, **options: Any) -> list[SweepEvent]:
    return list(sweep(settings, data, FakePool(script), **options))


def script(job: int, config: Any) -> Any:
    return trains(lambda job, _: ACCURACIES[job])(job, config)


def page() -> MlflowRun:
    (run,) = MlflowClient().search_runs(["1"], "tags.role = 'sweep'")
    return run


def curve() -> list[tuple[int, float]]:
    history = MlflowClient().get_metric_history(page().info.run_id, BEST_METRIC)
    return [(entry.step, entry.value) for entry in history]


def experiment_tags() -> dict[str, str]:
    return dict(MlflowClient().get_experiment("1").tags)


def view_tags() -> dict[str, str]:
    tags = experiment_tags()
    return {key: tags[key] for key in tags if key.startswith("mlflow.sharedViewState.")}


# The sweep's own run


def test_the_description_has_the_answer_first_then_all_else(
    settings: Settings, coloured_noise: Dataset
) -> None:
    options = '# python -m experiments.sweep --trials 3\ndataset = "some photos"\n'
    run_sweep(replace(settings, options=options), coloured_noise)
    run = page()
    text, best = run.data.tags[NOTE], run.data.tags["best.run_id"]
    link = f"#/experiments/1/runs/{best}"
    assert text.startswith(f"**Best: trial [1]({link}), loss ")
    assert ": validation accuracy 75.00%.**\n\n3 of 3 trials ended (3 complete)" in text
    assert "The sweep is complete." in text
    for line in (
        "- loss: mse, l1",
        "- learning rate: 0.001 to 1, log-uniform",
        "- batch size: 2, 4",
        "- trials: 3 of 1 epoch; sampler random, pruner none, seed 0",
        f"python -m tracking.predict 'some photos:test' --run-id {best}",
        f"python -m experiments.rerun {best}",
        "python -m experiments.sweep --trials 3",
    ):
        assert f"{line}\n" in text
    assert re.search(r"python -m experiments\.report pages --storage sqlite:\S+optuna\.db", text)
    table = [line for line in text.splitlines() if line.startswith("| [")]
    assert [re.findall(r"\[(\d)\]|([\d.]+)%", line) for line in table] == [
        [(number, ""), ("", accuracy)]
        for number, accuracy in (("1", "75.00"), ("2", "62.50"), ("0", "50.00"))
    ]


def test_the_best_is_on_the_page_while_the_sweep_runs(
    settings: Settings, coloured_noise: Dataset
) -> None:
    said = []
    for event in sweep(settings, coloured_noise, FakePool(script)):
        if isinstance(event, SweepStarted | TrialEnded):
            run = page()
            said.append((run.data.tags.get("best.trial"), run.data.metrics.get(BEST_METRIC)))
            assert "The sweep is running." in run.data.tags[NOTE]
    # It is written before the next event is waited for.
    assert said == [(None, None), (None, None), ("0", 0.5), ("1", 0.75)]
    run = page()
    params = MlflowClient().get_run(run.data.tags["best.run_id"]).data.params
    for name in ("loss", "learning_rate", "batch_size"):
        assert run.data.tags[f"best.{name}"] == params[name]
    assert curve() == [(1, 0.5), (2, 0.75), (3, 0.75)]


def test_a_resumed_sweep_repairs_what_a_kill_left(
    settings: Settings, coloured_noise: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Parent, "update", lambda *_: None)
        run_sweep(settings, coloured_noise)
    client = MlflowClient()
    client.set_tag(page().info.run_id, NOTE, "**Best: trial 99, of a process that was killed.**")
    client.set_tag(page().info.run_id, "best.trial", "99")
    run_sweep(replace(settings, trials=4), coloured_noise)
    assert curve() == [(1, 0.5), (2, 0.75), (3, 0.75), (4, 0.875)]
    assert page().data.tags["best.trial"] == "3"
    assert "trial [3]" in page().data.tags[NOTE]


def test_two_processes_with_one_study_say_the_same(
    settings: Settings, coloured_noise: Dataset
) -> None:
    run_sweep(settings, coloured_noise)
    before, values = page().data.tags, curve()
    study = open_study(settings, coloured_noise)
    run = Tracker.open("tests").find_run(page().info.run_id)
    assert run is not None
    view = study_view("pages", study.user_attrs["id"], settings)
    summary = Summary(
        study="pages",
        settings=settings,
        data=coloured_noise,
        experiment_id="1",
        run_id=run.run_id,
        all_trials=view.link("1"),
    )
    Parent(run, study, summary).update("The sweep is complete.")
    assert page().data.tags == before
    assert curve() == values


def test_one_run_is_marked_as_the_best(settings: Settings, coloured_noise: Dataset) -> None:
    client = MlflowClient()

    def marked() -> list[str]:
        return [run.data.tags["trial"] for run in client.search_runs(["1"], "tags.best = 'yes'")]

    for event in sweep(settings, coloured_noise, FakePool(script)):
        assert len(marked()) <= 1, event
    assert marked() == ["1"]
    for run in client.search_runs(["1"], "tags.trial = '0'"):  # as a kill may leave it
        client.set_tag(run.info.run_id, "best", "yes")
    run_sweep(settings, coloured_noise)
    assert marked() == ["1"]


def test_a_best_run_that_a_user_deleted_is_no_failure(
    settings: Settings, coloured_noise: Dataset
) -> None:
    run_sweep(settings, coloured_noise)
    MlflowClient().delete_run(page().data.tags["best.run_id"])
    *_, ended = run_sweep(replace(settings, trials=4), coloured_noise)
    assert isinstance(ended, SweepEnded)
    assert ended.outcome == "complete"
    assert page().data.tags["best.trial"] == "3"


def test_an_interrupted_sweep_says_so(settings: Settings, coloured_noise: Dataset) -> None:
    events = sweep(settings, coloured_noise, FakePool(script))
    next(event for event in events if isinstance(event, TrialEnded))
    events.close()
    assert (
        "1 of 3 trials ended (1 complete). The sweep was interrupted: the same command"
        in (page().data.tags[NOTE])
    )


def test_a_sweep_without_a_complete_trial_has_no_answer(
    settings: Settings, coloured_noise: Dataset
) -> None:
    list(sweep(replace(settings, trials=1), coloured_noise, FakePool(diverges)))
    text = page().data.tags[NOTE]
    assert text.startswith("**No trial is complete.**\n\n1 of 1 trial ended (1 diverged)")
    assert not curve()


def test_a_description_that_a_user_wrote_stays(settings: Settings, coloured_noise: Dataset) -> None:
    run_sweep(settings, coloured_noise)
    MlflowClient().set_tag(page().info.run_id, NOTE, "our own words")
    run_sweep(replace(settings, trials=4), coloured_noise)
    assert page().data.tags[NOTE] == "our own words"
    assert page().data.tags["best.trial"] == "3"


def test_foreign_texts_do_no_harm_in_the_description(
    settings: Settings, coloured_noise: Dataset
) -> None:
    name = "a|b*<img src=x>[c](d)`"
    options = f"# python -m experiments.sweep --dataset '{name}' ```\ndataset = '{name}'\n"
    run_sweep(replace(settings, options=options), replace(coloured_noise, name=name))
    text, fence, *_ = page().data.tags[NOTE].partition("````sh\n")
    assert fence
    assert name not in text
    assert r"a\|b\*&lt;img src=x&gt;\[c\](d)\`, 3 classes" in text


def test_the_longest_texts_fit(settings: Settings, coloured_noise: Dataset) -> None:
    losses = tuple(f"losses.py:{letter * 200}" for letter in "abcdefghijk")
    options = f"# python {'x' * 5000}\ndataset = '{'d' * 4000}'\n"
    trials = [
        {
            "trial": number, "outcome": "complete", "loss": loss, "learning_rate": 0.1,
            "batch_size": 4, "val_accuracy": 0.5, "run_id": 32 * "f",
        }
        for number, loss in enumerate(losses)
    ]  # fmt: skip
    import pandas as pd

    summary = Summary(
        study="s" * 400, settings=replace(settings, options=options), all_trials="#" * 100,
        data=replace(coloured_noise, name="n" * 4000), experiment_id="1", run_id="1",
    )  # fmt: skip
    text = summary.text(pd.DataFrame(trials), "state " * 100, has_report=True)
    assert len(text) <= LONGEST
    assert text.endswith("```")


def test_the_page_is_written_every_few_seconds_at_most(
    settings: Settings, coloured_noise: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_sweep(settings, coloured_noise)
    study = open_study(settings, coloured_noise)
    now, written = [100.0], []
    monkeypatch.setattr(parent, "INTERVAL_SECONDS", 5.0)
    monkeypatch.setattr(parent.time, "monotonic", lambda: now[0])

    class Run:
        def last_step(self, _: str) -> int:
            return 0

        def tags(self) -> dict[str, str]:
            return {}

        client = MlflowClient()
        experiment_id = "1"

        def log_history(self, *_: object) -> None:
            written.append(now[0])

    class Text:
        settings = small_settings("sqlite:///")

        def text(self, *_: object, **__: object) -> str:
            return f"at {now[0]}"

    its: Any = Parent(Run(), study, Text())  # type: ignore[arg-type]
    for now[0] in range(100, 116):
        its.update_if_due()
    assert written == [100, 105, 110, 115]
    # A slow update is followed by a longer pause.
    monkeypatch.setattr(parent, "SHARE_OF_TIME", 0.01)
    monkeypatch.setattr(Text, "text", lambda *_, **__: now.__setitem__(0, now[0] + 1) or "slow")
    now[0] = 120.0
    its.update_if_due()
    assert its.due == 121 + 100


def test_a_page_that_can_not_be_written_is_a_note(
    settings: Settings, coloured_noise: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise MlflowException("403 != 200: Permission denied")

    monkeypatch.setattr("tracking.runs.Run.log_history", refuse)
    started, *_, ended = run_sweep(settings, coloured_noise)
    assert isinstance(started, SweepStarted)
    assert isinstance(ended, SweepEnded)
    assert ended.outcome == "complete"
    assert any("can't keep the sweep's description: the MLflow" in n for n in started.notes)


# The report


def write(study: Any, folder: Path) -> None:
    folder.mkdir()
    (folder / "report.html").write_text(f"{len(study.trials)} trials")


def test_the_report_is_stored_once_and_linked(settings: Settings, coloured_noise: Dataset) -> None:
    written: list[int] = []

    def noted(study: Any, folder: Path) -> None:
        written.append(len(study.trials))
        write(study, folder)

    for number in (3, 3, 4):
        run_sweep(replace(settings, trials=number), coloured_noise, write_report=noted)
    assert written == [3, 4]
    run_id = page().info.run_id
    file = MlflowClient().download_artifacts(run_id, "report/report.html")
    assert Path(file).read_text() == "4 trials"
    link = f"[report with figures](#/experiments/1/runs/{run_id}/artifacts/report/report.html)"
    assert link in page().data.tags[NOTE]


def test_a_report_that_fails_is_a_note(settings: Settings, coloured_noise: Dataset) -> None:
    def breaks(*_: object) -> None:
        raise ZeroDivisionError("in a figure")

    *_, ended = run_sweep(settings, coloured_noise, write_report=breaks)
    assert isinstance(ended, SweepEnded)
    assert ended.outcome == "complete"
    (note,) = ended.notes
    assert "the report is not stored in MLflow: ZeroDivisionError: in a figure" in note
    assert note.endswith("python -m experiments.report pages writes it")
    assert "report with figures" not in page().data.tags[NOTE]


def test_the_command_stores_the_report_and_prints_the_link_to_its_trials(
    mlflow_store: str,
    digits_cache: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_pool(monkeypatch, script_of_ten)
    Path("data").symlink_to(digits_cache)
    small = ["--trials", "2", "--epochs", "1", "--study", "pages", "--register", "none"]
    assert main([*small, "--workers", "1"]) == 0
    out, err = capsys.readouterr()
    assert not err
    run = page()
    key = run.data.tags["study_id"][:8]
    assert f"then open http://127.0.0.1:5000/#/experiments/1/runs?viewStateShareKey={key}\n" in out
    assert f"mlflow.sharedViewState.{key}" in view_tags()
    file = Path(MlflowClient().download_artifacts(run.info.run_id, "report/report.html"))
    assert "The best trial is number 0, with loss " in file.read_text()
    assert "\npython -m experiments.sweep --trials 2 --epochs 1" in run.data.tags[NOTE]


# The list of its trials


def test_the_view_shows_the_trials_of_the_study_the_best_first(
    settings: Settings, coloured_noise: Dataset
) -> None:
    started, *_ = run_sweep(settings, coloured_noise)
    assert isinstance(started, SweepStarted)
    ((tag, value),) = view_tags().items()
    key = tag.rpartition(".")[2]
    assert started.runs_page == f"#/experiments/1/runs?viewStateShareKey={key}"
    envelope = json.loads(value)
    assert envelope["name"] == "sweep pages, the best first"
    state = json.loads(envelope["state"])
    study_id = page().data.tags["study_id"]
    assert state["searchFilter"] == f"tags.study_id = '{study_id}' and tags.role = 'trial'"
    assert (state["orderByKey"], state["orderByAsc"]) == ("metrics.`val/accuracy`", False)
    assert state["selectedColumns"] == [
        "tags.`best`",
        "metrics.`val/accuracy`",
        *(f"params.`{name}`" for name in ("loss", "learning_rate", "batch_size")),
        "tags.`outcome`",
    ]
    found = MlflowClient().search_runs(["1"], state["searchFilter"])
    assert {run.data.tags["trial"] for run in found} == {"0", "1", "2"}


def test_a_view_that_is_there_is_not_written_again(
    settings: Settings, coloured_noise: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_sweep(settings, coloured_noise)
    monkeypatch.setattr(MlflowClient, "set_experiment_tag", None)
    run_sweep(settings, coloured_noise)


def test_without_a_view_the_link_opens_all_runs(
    settings: Settings, coloured_noise: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise MlflowException("403 != 200: Permission denied")

    monkeypatch.setattr(MlflowClient, "set_experiment_tag", refuse)
    started, *_, ended = run_sweep(settings, coloured_noise)
    assert isinstance(started, SweepStarted)
    assert started.runs_page == "#/experiments/1/runs"
    assert any("can't keep the view 'sweep pages, the best first'" in n for n in started.notes)
    assert isinstance(ended, SweepEnded)
    assert ended.outcome == "complete"


def test_the_experiment_names_its_latest_sweep(settings: Settings, coloured_noise: Dataset) -> None:
    for study in ("pages", "o*ther"):
        run_sweep(replace(settings, study=study, trials=1), coloured_noise)
    first, *_ = experiment_tags()[NOTE].splitlines()
    assert first.startswith("Trainings of a CNN with different losses, learning rates and batch")
    assert r"The latest: [sweep o\*ther, the best first](#/experiments/1/runs?viewState" in first
    assert len(view_tags()) == 2


def test_an_experiments_own_description_stays(settings: Settings, coloured_noise: Dataset) -> None:
    MlflowClient().create_experiment("tests", tags={NOTE: "ours"})
    run_sweep(settings, coloured_noise)
    assert experiment_tags()[NOTE] == "ours"


def test_another_searched_parameter_is_a_column_and_a_tag(
    settings: Settings, coloured_noise: Dataset
) -> None:
    settings = changed(settings, vary_momentum="0.5,0.9")
    run_sweep(settings, coloured_noise)
    assert "params.`momentum`" in next(iter(view_tags().values()))
    assert page().data.tags["best.momentum"] in ("0.5", "0.9")
    assert "| momentum |" in page().data.tags[NOTE]
