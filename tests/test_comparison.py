from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pytest
from fake_pool import FakePool, Script, diverges, trains
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.tracking._tracking_service.utils import _get_store
from small_sweep import changed, small_settings
from tracking_helpers import new_store

from cnn.config import TrainConfig
from cnn.data import Dataset
from experiments.comparison import testing
from experiments.comparison.assessment import assess
from experiments.comparison.loading import load_results
from experiments.comparison.plan import ComparisonEnded, Event, ModelTested, Plan, StageStarted
from experiments.comparison.record import open_record
from experiments.comparison.results import (
    CURVE_COLUMNS,
    REPEAT_COLUMNS,
    TRIAL_COLUMNS,
    Results,
)
from experiments.comparison.stages import compare
from experiments.engine.base import EpochEnded
from experiments.interrupts import Interrupts
from experiments.reporting.figure_data import best_settings
from experiments.study.events import TrialProgressed
from experiments.study.opening import open_checked_storage
from tracking.runs import Run as TrackedRun
from tracking.selection import load_run

LOSSES = ("mse", "cross_entropy")
BY_TIME = ["run_id", "seconds", "images_per_second"]


@pytest.fixture(scope="module")
def data(coloured_noise: Dataset) -> Dataset:
    return coloured_noise


def plan_in(folder: Path) -> Plan:
    settings = small_settings(
        f"sqlite:///{folder / 'optuna.db'}", losses=LOSSES, trials=2, epochs=2, seed=7, study="c"
    )
    return Plan(settings=settings, repeats=2)


@pytest.fixture
def plan(mlflow_store: str, tmp_path: Path) -> Plan:
    return plan_in(tmp_path)


@dataclass
class Whole:
    """A comparison that is over, for tests that only look at it."""

    plan: Plan
    events: list[Event]
    seeds: list[int]
    """Of the trainings, in order."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: Dataset) -> Iterator[Whole]:
    folder = tmp_path_factory.mktemp("whole")
    seeds: list[int] = []

    def script(job: int, config: TrainConfig) -> Iterator[object]:
        seeds.append(config.seed)
        yield from trains(good)(job, config)

    with new_store(folder):
        plan = plan_in(folder)
        yield Whole(plan, run(plan, data, script), seeds)


def good(job: int, config: TrainConfig) -> float:
    return 0.5 + 0.1 * LOSSES.index(config.loss) + config.batch_size / 100


class Stop(Interrupts):
    """A request to stop that comes with an event."""

    def __init__(self) -> None:
        super().__init__()
        self.wanted = False

    def __call__(self) -> bool:
        return self.wanted


def run(
    plan: Plan,
    data: Dataset,
    script: Script | None = None,
    *,
    stop_when: Callable[[Event], bool] = lambda _: False,
    retest: bool = False,
) -> list[Event]:
    """Run a comparison, up to an event at which it is to be stopped, and return its events."""
    stop, events = Stop(), []
    for event in compare(
        plan,
        data,
        FakePool(script or trains(good)),  # type: ignore[arg-type]
        stop,
        open_data=lambda seed: data,
        retest=retest,
    ):
        events.append(event)
        stop.wanted |= stop_when(event)
    return events


def results(plan: Plan) -> Results:
    return load_results("c", plan.settings.storage)


def runs(role: str) -> list[Run]:
    client = MlflowClient()
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], f"tags.role = '{role}'")
    return sorted(found, key=lambda each: each.info.start_time)


def test_each_loss_has_a_search_with_the_same_draws(whole: Whole) -> None:
    table = results(whole.plan).trials
    assert list(table.columns) == list(TRIAL_COLUMNS)
    numbers = table.groupby("loss")["trial"].apply(list).to_dict()
    assert numbers == {loss: [0, 1] for loss in LOSSES}
    draws = table.pivot_table(index="trial", columns="loss", values=["learning_rate", "batch_size"])
    for column in ("learning_rate", "batch_size"):
        assert all(len(set(row)) == 1 for row in draws[column].to_numpy())
    assert table["learning_rate"].nunique() == 2


def test_the_best_configuration_of_each_loss_is_trained_again_on_fresh_seeds(whole: Whole) -> None:
    table = results(whole.plan).repeats
    assert list(table.columns) == list(REPEAT_COLUMNS)
    found = {*zip(table["loss"], table["seed"], strict=True)}
    assert found == {(loss, seed) for loss in LOSSES for seed in (8, 9)}
    assert whole.seeds == [7, 7, 7, 7, 8, 8, 9, 9]
    ranked = results(whole.plan).trials.sort_values(["val_accuracy", "val_loss"])
    best = ranked.groupby("loss").last()
    for column in ("learning_rate", "batch_size"):
        tried = table.groupby("loss")[column].apply(set).to_dict()
        assert tried == {loss: {value} for loss, value in best[column].items()}


def test_of_equal_configurations_the_one_that_is_confirmed_is_the_best_in_every_table(
    plan: Plan, data: Dataset
) -> None:
    def script(job: int, config: TrainConfig) -> Iterator[Event]:
        for event in trains(lambda *_: 0.5)(job, config):
            if isinstance(event, EpochEnded):
                event.metrics["val/loss"] = 1.0 - job / 10
            yield event

    run(plan, data, script, stop_when=before_the_confirmation)
    record = optuna.load_study(study_name="c", storage=plan.settings.storage)
    winners = {each["loss"]: each["learning_rate"] for each in record.user_attrs["winners"]}

    def check() -> None:
        found = results(plan)
        assert best_settings(found)["learning_rate"].to_dict() == winners
        assert best_settings(found)["trial"].to_list() == [1, 1]
        table = assess(found).table.set_index("loss")
        assert table["learning_rate"].to_dict() == winners

    check()
    for run_id in best_settings(results(plan))["run_id"]:  # as `mlflow gc` does
        MlflowClient().delete_run(run_id)
        _get_store()._hard_delete_run(run_id)
    check()


def test_the_test_split_is_measured_with_the_recorded_model(whole: Whole, data: Dataset) -> None:
    row = results(whole.plan).repeats.iloc[0]
    probabilities = load_run(row["run_id"]).probabilities(data.test.images.numpy())
    labels = data.test.labels.numpy()
    truth = probabilities[np.arange(len(labels)), labels]
    assert row["test_accuracy"] == (probabilities.argmax(axis=1) == labels).mean()
    assert row["test_nll"] == pytest.approx(-np.log(np.maximum(truth, 1e-6)).mean())
    confusion = results(whole.plan).confusions[row["loss"]]
    assert (confusion.sum(axis=1) == 2 * np.bincount(labels, minlength=3)).all()


def test_the_test_split_is_opened_only_after_the_configurations_are_fixed(
    plan: Plan, data: Dataset
) -> None:
    at: list[int] = []
    events: list[Event] = []

    def open_data(seed: int) -> Dataset:
        at.append(len(events))
        return data

    pool = FakePool(trains(good))
    for event in compare(plan, data, pool, Interrupts(), open_data=open_data):  # type: ignore[arg-type]
        events += [event]
    begun = max(i for i, event in enumerate(events) if isinstance(event, StageStarted))
    assert events[begun].title == "the test split"  # type: ignore[union-attr]
    assert at
    assert min(at) > begun


def test_what_is_measured_is_linked_to_the_model_and_its_data(whole: Whole, data: Dataset) -> None:
    run = MlflowClient().get_run(results(whole.plan).repeats["run_id"].iloc[0])
    (output,) = run.outputs.model_outputs
    metrics = MlflowClient().get_logged_model(output.model_id).metrics
    assert {"train/accuracy", "val/accuracy", "test/accuracy", "test/ece"} <= {
        m.key for m in metrics
    }
    assert {(m.dataset_name, m.dataset_digest) for m in metrics} == {(data.name, data.digest)}


def test_curves_are_of_every_training(whole: Whole) -> None:
    curves = results(whole.plan).curves
    assert list(curves.columns) == list(CURVE_COLUMNS)
    counts = curves.groupby(["stage", "loss", "trial"])["epoch"].apply(list)
    assert counts.to_list() == [[1, 2]] * 8
    assert not curves.isna().any().any()


def test_all_runs_hang_under_one_parent_stage_by_stage(whole: Whole) -> None:
    (top,) = runs("comparison")
    sweeps, trials = runs("sweep"), runs("trial")
    names = [each.data.tags["mlflow.runName"] for each in sweeps]
    assert names == ["search mse", "search cross_entropy", "confirm"]
    assert {each.data.tags["mlflow.parentRunId"] for each in sweeps} == {top.info.run_id}
    ids = {each.info.run_id for each in sweeps}
    assert {each.data.tags["mlflow.parentRunId"] for each in trials} == ids
    stages = [each.data.tags["stage"] for each in trials]
    assert (stages.count("search"), stages.count("confirm")) == (4, 4)
    assert {each.info.status for each in (top, *sweeps, *trials)} == {"FINISHED"}


def is_stage(event: Event, title: str) -> bool:
    return isinstance(event, StageStarted) and event.title.startswith(title)


def at_the_first_search(event: Event) -> bool:
    return isinstance(event, TrialProgressed)


def between_two_searches(event: Event) -> bool:
    return is_stage(event, "search for the best configuration of cross_entropy")


def before_the_confirmation(event: Event) -> bool:
    return is_stage(event, "confirmation")


def before_the_test_split(event: Event) -> bool:
    return is_stage(event, "the test split")


def between_two_models(event: Event) -> bool:
    return isinstance(event, ModelTested)


@pytest.mark.parametrize(
    "when",
    [
        pytest.param(at_the_first_search, marks=pytest.mark.slow),
        pytest.param(between_two_searches, marks=pytest.mark.slow),
        pytest.param(before_the_confirmation, marks=pytest.mark.slow),
        pytest.param(before_the_test_split, marks=pytest.mark.slow),
        between_two_models,
    ],
)
def test_a_comparison_that_is_stopped_goes_on_and_comes_to_the_same(
    when: Callable[[Event], bool], whole: Whole, data: Dataset, tmp_path: Path
) -> None:
    with new_store(tmp_path):
        plan = plan_in(tmp_path)
        ended = run(plan, data, stop_when=when)[-1]
        assert isinstance(ended, ComparisonEnded)
        assert ended.outcome == "interrupted"
        ended = run(plan, data)[-1]
        assert isinstance(ended, ComparisonEnded)
        assert ended.outcome == "complete"
        mine = results(plan)
    straight = results(whole.plan)
    for table in ("trials", "repeats", "curves"):
        frames = [
            getattr(each, table).drop(columns=BY_TIME, errors="ignore") for each in (mine, straight)
        ]
        pd.testing.assert_frame_equal(*frames)
    for loss in LOSSES:
        np.testing.assert_array_equal(mine.confusions[loss], straight.confusions[loss])
    assert (mine.repeats["test_evaluations"] == 1).all()


def num_tested(events: list[Event]) -> int:
    return sum(isinstance(event, ModelTested) for event in events)


@pytest.mark.slow
def test_the_test_split_is_looked_at_once_unless_a_second_time_is_asked_for(
    plan: Plan, data: Dataset
) -> None:
    assert num_tested(run(plan, data)) == 4
    assert num_tested(run(plan, data)) == 0
    assert (results(plan).repeats["test_evaluations"] == 1).all()
    more = replace(plan, repeats=3)
    with pytest.raises(
        ValueError, match="were shown the test split already: with --repeats 3 .*--retest"
    ):
        run(more, data)
    assert len(results(plan).repeats) == 4
    cut_off = run(more, data, retest=True, stop_when=between_two_models)
    assert num_tested(cut_off) == 1  # of the new ones
    assert num_tested(run(more, data)) == 1  # the rest of the same round
    assert list(results(plan).repeats["test_evaluations"]) == [1] * 6
    assert results(plan).test_rounds == 2
    assert results(plan).provenance["test split looked at"] == "2 times"
    assert num_tested(run(more, data, retest=True)) == 0
    assert results(plan).test_rounds == 2


def test_a_run_that_is_deleted_while_the_test_split_is_shown_is_passed_over(
    plan: Plan, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, deleted = testing.test_model, []

    def test_model(run: TrackedRun, *args: Any, **kwargs: Any) -> float:
        if not deleted:
            deleted.append(run.run_id)
            MlflowClient().delete_run(run.run_id)
        return real(run, *args, **kwargs)

    monkeypatch.setattr("experiments.comparison.stages.test_model", test_model)
    events = run(plan, data)
    ended = events[-1]
    assert isinstance(ended, ComparisonEnded)
    assert (ended.outcome, ended.reason) == ("complete", "")
    assert sum(isinstance(event, ModelTested) for event in events) == 3  # of four


@pytest.mark.slow
def test_there_can_be_more_repeats_before_it_was_looked_at(plan: Plan, data: Dataset) -> None:
    run(plan, data, stop_when=before_the_test_split)
    assert num_tested(run(replace(plan, repeats=3), data)) == 6


def test_another_plan_under_the_same_name_is_refused(whole: Whole, data: Dataset) -> None:
    other = replace(whole.plan, settings=replace(whole.plan.settings, trials=3))
    with pytest.raises(ValueError, match="made with other settings .trials 2 → 3.: choose another"):
        run(other, data)


def test_losses_and_repeats_that_diverge_are_left_out(plan: Plan, data: Dataset) -> None:
    def script(job: int, config: TrainConfig) -> Iterator[object]:
        bad = config.loss == "l1" or (config.loss == "mse" and config.seed == 9)
        yield from (diverges if bad else trains(good))(job, config)

    run(replace(plan, settings=changed(plan.settings, losses=("l1", *LOSSES))), data, script)
    assert set(results(plan).trials["loss"]) == {"l1", *LOSSES}
    table = results(plan).repeats.set_index(["loss", "seed"])
    assert table["outcome"].to_dict() == {
        ("mse", 8): "complete",
        ("cross_entropy", 8): "complete",
        ("mse", 9): "diverged",
        ("cross_entropy", 9): "complete",
    }
    assert table["test_accuracy"].isna().to_list() == [False, False, True, False]


def test_where_no_loss_ends_there_is_nothing_to_confirm(plan: Plan, data: Dataset) -> None:
    ended = run(plan, data, diverges)[-1]
    assert isinstance(ended, ComparisonEnded)
    assert (ended.outcome, ended.reason) == ("failed", "no loss has a complete trial")


def test_a_comparison_that_is_not_there_is_told_from_those_that_are(whole: Whole) -> None:
    with pytest.raises(ValueError, match="no comparison 'x' .*, only c$"):
        load_results("x", whole.plan.settings.storage)
    with pytest.raises(ValueError, match="the storage 'sqlite:///x.db' does not exist"):
        load_results("c", "sqlite:///x.db")
    assert not Path("x.db").exists()


def test_a_plan_says_what_is_wrong_with_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--repeats must be ≥ 1, not 0"):
        replace(plan_in(tmp_path), repeats=0)


def test_the_seeds_of_a_plan_are_those_that_a_training_takes(tmp_path: Path) -> None:
    settings = replace(plan_in(tmp_path).settings, seed=2**32 - 3)
    assert Plan(settings=settings, repeats=2).seeds[-1] == 2**32 - 1
    with pytest.raises(ValueError, match="--seed 4294967293 is too high for these --repeats"):
        Plan(settings=settings, repeats=3)


def test_a_plan_without_a_name_has_one_that_follows_from_it(tmp_path: Path, data: Dataset) -> None:
    plan = plan_in(tmp_path)
    nameless = replace(plan, settings=replace(plan.settings, study=None))
    other = replace(nameless, settings=replace(nameless.settings, seed=8))
    storage = open_checked_storage(plan.settings, bool)
    names = [
        open_record(each, data, storage, retest=False).study_name
        for each in (nameless, replace(nameless, repeats=5), other)
    ]
    assert all(name.startswith(f"compare-{data.name}-") for name in names)
    assert names[0] == names[1] != names[2]


def test_the_plan_is_in_the_parents_params(whole: Whole) -> None:
    params = runs("comparison")[0].data.params
    assert json.loads(params["compare/losses"].replace("'", '"')) == list(LOSSES)
    assert params["compare/trials"] == "2"
