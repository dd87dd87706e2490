from __future__ import annotations

import json
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from fake_pool import FakePool, Script, diverges, epoch, fails, trains, weights
from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun
from mlflow.entities import ViewType
from mlflow.exceptions import MlflowException
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState
from small_sweep import changed, small_settings

from cnn.config import TrainConfig
from cnn.data import Dataset
from experiments.engine.base import CheckpointLost, Event, JobMoved
from experiments.interrupts import Interrupts
from experiments.study.controller import sweep
from experiments.study.domains import Choices
from experiments.study.events import (
    SweepEnded,
    SweepEvent,
    SweepStarted,
    TrialEnded,
    TrialNote,
    TrialProgressed,
    TrialStarted,
)
from experiments.study.identity import _digest_of_network, training_digest
from experiments.study.opening import open_study
from experiments.study.settings import Settings
from experiments.study.trials import trials_table
from tracking.errors import is_transient
from tracking.runs import Run

METRICS = {
    "train/loss",
    "train/accuracy",
    "val/loss",
    "val/accuracy",
    "train/learning_rate",
    "worker/epoch_seconds",
    "worker/images_per_second",
}


@pytest.fixture(scope="module")
def data(coloured_noise: Dataset) -> Dataset:
    return coloured_noise


@pytest.fixture
def settings(mlflow_store: str, tmp_path: Path) -> Settings:
    return small_settings(f"sqlite:///{tmp_path / 'optuna.db'}")


def run_sweep(
    settings: Settings, data: Dataset, script: Script, **options: Any
) -> list[SweepEvent]:
    return list(sweep(settings, data, FakePool(script, settings.workers), **options))


def good(job: int, config: Any) -> float:
    return 0.9 - job / 100


def client_runs() -> list[MlflowRun]:
    client = MlflowClient()
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id], order_by=["start_time ASC"]))


def trial_runs() -> dict[int, MlflowRun]:
    runs = [run for run in client_runs() if run.data.tags["role"] == "trial"]
    by_trial = {int(run.data.tags["trial"]): run for run in runs}
    assert len(by_trial) == len(runs), "a trial has two runs"
    return by_trial


def parent_run() -> MlflowRun:
    (parent,) = (run for run in client_runs() if run.data.tags["role"] == "sweep")
    return parent


def trials(settings: Settings, data: Dataset) -> list[FrozenTrial]:
    return open_study(settings, data).get_trials()


def history(run: MlflowRun, metric: str) -> dict[int, float]:
    entries = MlflowClient().get_metric_history(run.info.run_id, metric)
    steps = {entry.step: entry.value for entry in entries}
    assert len(steps) == len(entries), "a step is there twice"
    return steps


class StopAfter(Interrupts):
    """A Ctrl-C that comes once so many events of a kind were seen."""

    def __init__(self, seen: list[SweepEvent], wanted: type, number: int) -> None:
        super().__init__()
        self.seen, self.wanted, self.number = seen, wanted, number

    def __call__(self) -> bool:
        return sum(isinstance(event, self.wanted) for event in self.seen) >= self.number


def stop_after(wanted: type, number: int = 1) -> tuple[list[SweepEvent], Interrupts]:
    """Return a list to put events into, and what says stop once it holds so many of a kind."""
    seen: list[SweepEvent] = []
    return seen, StopAfter(seen, wanted, number)


def test_a_complete_trial_is_recorded_alike_in_optuna_and_mlflow(
    settings: Settings, data: Dataset
) -> None:
    run_sweep(settings, data, trains(good))
    for trial in trials(settings, data):
        run = trial_runs()[trial.number]
        assert trial.state == TrialState.COMPLETE
        assert trial.value == pytest.approx(0.9 - trial.number / 100)
        assert run.info.status == "FINISHED"
        assert run.data.tags["outcome"] == trial.user_attrs["outcome"] == "complete"
        assert trial.user_attrs["run_id"] == run.info.run_id
        assert run.data.tags["study"] == open_study(settings, data).study_name
        assert run.data.metrics["val/accuracy"] == trial.value
        for name in ("loss", "learning_rate", "batch_size"):
            assert run.data.params[name] == str(trial.params[name])


def test_every_metric_is_logged_at_every_epoch(settings: Settings, data: Dataset) -> None:
    run_sweep(settings, data, trains(good))
    run = trial_runs()[0]
    assert set(run.data.metrics) == METRICS
    for metric in METRICS:
        assert list(history(run, metric)) == [1, 2, 3]
    assert list(history(run, "val/accuracy").values()) == pytest.approx([0.3, 0.6, 0.9])


def test_a_trial_logs_its_whole_configuration_and_data(settings: Settings, data: Dataset) -> None:
    events = run_sweep(settings, data, trains(good))
    config = next(event.config for event in events if isinstance(event, TrialStarted))
    run = trial_runs()[0]
    expected = {name: str(value) for name, value in config.as_params().items()}
    assert run.data.params == expected | {
        "dataset": "coloured noise",
        "dataset_digest": "0" * 32,
        "network_digest": _digest_of_network("cnn", 3, 32),
        "training_digest": training_digest(config.loss, config.optimizer, config.schedule),
    }
    (logged,) = run.inputs.dataset_inputs
    assert (logged.dataset.name, logged.dataset.digest) == ("coloured noise", "0" * 32)
    assert json.loads(logged.dataset.profile)["validation"] == 40


def test_nothing_of_the_test_split_is_looked_at(settings: Settings, data: Dataset) -> None:
    class Untouchable:
        def __len__(self) -> int:
            return 30

        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"the test split's {name} is looked at")

    run_sweep(settings, replace(data, test=Untouchable()), trains(good))  # type: ignore[arg-type]
    assert not any(name.startswith("test") for name in trial_runs()[0].data.metrics)


def test_the_model_of_a_complete_trial_answers_with_probabilities(
    settings: Settings, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    run_sweep(replace(settings, trials=1), data, trains(good))
    (output,) = trial_runs()[0].outputs.model_outputs
    model = mlflow.pyfunc.load_model(f"models:/{output.model_id}", model_config={"device": "cpu"})
    images, _ = data.test.batch(torch.arange(5))
    answers = model.predict(images.numpy())
    assert answers.shape == (5, 3)
    np.testing.assert_allclose(answers.sum(1), 1, atol=1e-6)
    assert model.metadata.metadata["classes"] == ["red", "green", "blue"]
    assert model.metadata.signature is not None
    assert "uint8" in str(model.metadata.signature.inputs)


def test_trials_hang_under_one_parent_that_says_how_the_sweep_was_made(
    settings: Settings, data: Dataset
) -> None:
    (started, *_) = run_sweep(settings, data, trains(good))
    assert isinstance(started, SweepStarted)
    parent = parent_run()
    assert parent.info.run_id == started.parent_run_id
    assert parent.info.status == "FINISHED"
    assert parent.data.params["sweep/losses"] == "['l1', 'mse', 'cross_entropy']"
    for run in trial_runs().values():
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id


def test_a_diverged_trial_counts_as_finished_with_its_accuracy(
    settings: Settings, data: Dataset
) -> None:
    run_sweep(replace(settings, trials=1), data, diverges)
    (trial,) = trials(settings, data)
    run = trial_runs()[0]
    assert trial.state == TrialState.COMPLETE
    assert trial.value == pytest.approx(1 / 3)
    assert run.info.status == "FINISHED"
    assert run.data.tags["outcome"] == trial.user_attrs["outcome"] == "diverged"
    assert run.data.tags["reason"] == "not finite in epoch 2"
    assert not run.outputs.model_outputs
    assert np.isnan(run.data.metrics["val/loss"])


def test_a_pruned_trial_is_pruned_in_both_and_its_later_epochs_are_not_recorded(
    settings: Settings, data: Dataset
) -> None:
    settings = replace(settings, trials=6, epochs=5, pruner="median")
    pool = FakePool(trains(good))
    list(sweep(settings, data, pool))
    last = trials(settings, data)[-1]
    run = trial_runs()[last.number]
    assert pool.stopped == [last.number]
    assert last.state == TrialState.PRUNED
    assert run.info.status == "KILLED"
    assert run.data.tags["outcome"] == last.user_attrs["outcome"] == "pruned"
    assert not run.outputs.model_outputs
    assert list(history(run, "val/accuracy")) == list(last.intermediate_values) != [1, 2, 3, 4, 5]


def test_a_failed_trial_keeps_its_traceback_and_the_sweep_continues(
    settings: Settings, data: Dataset
) -> None:
    run_sweep(
        settings, data, lambda job, config: (fails if job == 0 else trains(good))(job, config)
    )
    states = [trial.state for trial in trials(settings, data)]
    assert states == [TrialState.FAIL, TrialState.COMPLETE, TrialState.COMPLETE]
    run = trial_runs()[0]
    assert run.info.status == "FAILED"
    assert run.data.tags["outcome"] == "failed"
    assert run.data.tags["reason"] == "RuntimeError: no luck"
    text = MlflowClient().download_artifacts(run.info.run_id, "traceback.txt")
    assert "no luck" in Path(text).read_text()


def test_a_trial_that_failed_once_is_tried_again_and_nothing_is_recorded_twice(
    settings: Settings, data: Dataset
) -> None:
    tries: list[int] = []

    def script(job: int, config: Any) -> Iterator[Any]:
        tries.append(job)
        return iter((fails if tries == [0] else trains(good))(job, config))

    run_sweep(replace(settings, trials=1), data, script)
    (trial,) = trials(settings, data)
    assert tries == [0, 0]
    assert trial.state == TrialState.COMPLETE
    assert trial.user_attrs["failures"] == 1
    assert list(history(trial_runs()[0], "val/accuracy")) == [1, 2, 3]


def test_a_trial_is_tried_twice_in_all_though_its_process_dies_in_between(
    settings: Settings, data: Dataset
) -> None:
    tries: list[int] = []

    def script(job: int, config: Any) -> Iterator[Any]:
        tries.append(job)
        return iter(fails(job, config))

    events = sweep(replace(settings, trials=1), data, FakePool(script))
    while not tries[1:]:
        next(events)
    events.close()
    run_sweep(replace(settings, trials=1), data, script)
    assert len(tries) == 3  # the second was cut off
    assert trials(settings, data)[0].state == TrialState.FAIL


def test_a_trial_that_moved_to_another_worker_says_so_and_is_recorded_once(
    settings: Settings, data: Dataset
) -> None:
    reason = "the worker on node 10.0.0.7 was lost"

    def moves(job: int, config: TrainConfig) -> Iterator[Event]:
        first, *others = trains(good)(job, config)
        yield from (first, JobMoved(job=job, reason=reason), first, *others)

    events = run_sweep(replace(settings, trials=1), data, moves)
    assert TrialNote(trial=0, text=f"resumes on another worker: {reason}") in events
    (run,) = trial_runs().values()
    assert run.data.tags["moved"] == reason
    assert run.data.tags["outcome"] == "complete"
    assert list(history(run, "val/accuracy")) == [1, 2, 3]


def test_a_trial_whose_checkpoint_was_damaged_says_so_and_is_recorded_once(
    settings: Settings, data: Dataset
) -> None:
    reason = "its checkpoint can't be used (its digest does not fit)"

    def begins_again(job: int, config: TrainConfig) -> Iterator[Event]:
        yield from list(trains(good)(job, config))[:2]
        yield CheckpointLost(job=job, reason=reason)
        yield from trains(good)(job, config)

    events = run_sweep(replace(settings, trials=1), data, begins_again)
    assert TrialNote(trial=0, text=reason) in events
    (run,) = trial_runs().values()
    assert run.data.tags["checkpoint_lost"] == reason
    assert list(history(run, "val/accuracy")) == [1, 2, 3]


def test_a_sweep_that_only_fails_is_stopped(settings: Settings, data: Dataset) -> None:
    *_, ended = run_sweep(replace(settings, trials=9, max_failures=2), data, fails)
    assert isinstance(ended, SweepEnded)
    assert ended.outcome == "failed"
    assert ended.reason.startswith("2 trials failed in a row: their runs in MLflow say")
    assert [trial.state for trial in trials(settings, data)] == [TrialState.FAIL] * 2
    assert parent_run().info.status == "FAILED"


def test_failures_between_others_do_not_stop_a_sweep(settings: Settings, data: Dataset) -> None:
    def script(job: int, config: Any) -> Iterator[Any]:
        return iter((fails if job % 2 else diverges)(job, config))

    *_, ended = run_sweep(replace(settings, trials=6, max_failures=2), data, script)
    assert ended == SweepEnded(outcome="complete", reason="")


class Killed(BaseException):
    """What no code of ours survives."""


@pytest.mark.parametrize(
    ("where", "times"),
    [
        ("mlflow.MlflowClient.create_run", 2),
        pytest.param("tracking.runs.Run.log_params", 2, marks=pytest.mark.slow),
        pytest.param("optuna.trial.Trial.set_user_attr", 1, marks=pytest.mark.slow),
        pytest.param("optuna.trial.Trial._suggest", 2, marks=pytest.mark.slow),
        ("optuna.trial.Trial.report", 2),
        ("mlflow.MlflowClient.log_batch", 4),
        pytest.param("mlflow.MlflowClient.log_inputs", 2, marks=pytest.mark.slow),
        ("mlflow.MlflowClient.create_logged_model", 1),
        pytest.param("mlflow.MlflowClient.log_model_artifacts", 1, marks=pytest.mark.slow),
        ("mlflow.MlflowClient.finalize_logged_model", 1),
        pytest.param("mlflow.MlflowClient.log_outputs", 1, marks=pytest.mark.slow),
        ("mlflow.MlflowClient.set_terminated", 1),
        ("optuna.study.Study.tell", 1),
    ],
)
@pytest.mark.parametrize("moment", [pytest.param("before", marks=pytest.mark.slow), "after"])
def test_a_sweep_killed_anywhere_ends_as_the_undisturbed_one(
    settings: Settings,
    data: Dataset,
    where: str,
    times: int,
    moment: str,
) -> None:
    settings = replace(settings, trials=2, epochs=2)
    call = pkgutil.resolve_name(where)
    calls: list[str] = []

    def killing(*args: Any, **kwargs: Any) -> Any:
        calls.append(where)
        if len(calls) >= times and moment == "before":
            raise Killed
        result = call(*args, **kwargs)
        if len(calls) >= times:
            raise Killed
        return result

    # From there on each call kills, as those of a dead process do not come.
    with pytest.MonkeyPatch.context() as dying:
        dying.setattr(where, killing)
        with pytest.raises(Killed):
            run_sweep(settings, data, trains(good))
    run_sweep(settings, data, trains(good))
    after = trials(settings, data)
    assert [trial.state for trial in after] == [TrialState.COMPLETE] * 2
    assert [trial.value for trial in after] == [0.9, 0.89]
    assert {run.info.status for run in client_runs()} == {"FINISHED"}
    assert sorted(trial_runs()) == [0, 1]
    for number, run in trial_runs().items():
        assert after[number].user_attrs["run_id"] == run.info.run_id
        assert after[number].user_attrs["outcome"] == run.data.tags["outcome"] == "complete"
        assert run.data.params["loss"] == after[number].params["loss"]
        assert len(run.data.params) == len(TrainConfig.__dataclass_fields__) + 4
        assert [each.dataset.digest for each in run.inputs.dataset_inputs] == [data.digest]
        for metric in METRICS:
            assert list(history(run, metric)) == [1, 2]
    models = MlflowClient().search_logged_models([client_runs()[0].info.experiment_id])
    linked = [output.model_id for run in client_runs() for output in run.outputs.model_outputs]
    assert sorted(model.model_id for model in models) == sorted(linked)
    assert len(linked) == 2


def test_stopping_closes_what_runs_as_interrupted(settings: Settings, data: Dataset) -> None:
    seen, interrupts = stop_after(TrialProgressed, 2)
    for event in sweep(settings, data, FakePool(trains(good)), interrupts=interrupts):
        seen.append(event)
    *_, trial_ended, sweep_ended = seen
    assert isinstance(trial_ended, TrialEnded)
    assert trial_ended.outcome == "interrupted"
    assert sweep_ended == SweepEnded(outcome="interrupted", reason="")
    assert trial_runs()[0].info.status == parent_run().info.status == "KILLED"
    assert trial_runs()[0].data.tags["outcome"] == "interrupted"


@pytest.mark.parametrize("after", [SweepStarted, TrialStarted, TrialProgressed, TrialEnded])
def test_closing_the_iteration_anywhere_leaves_no_run_running(
    settings: Settings, data: Dataset, after: type
) -> None:
    events = sweep(settings, data, FakePool(trains(good)))
    while not isinstance(next(events), after):
        pass
    events.close()
    assert "RUNNING" not in {run.info.status for run in client_runs()}


def test_an_interrupted_trial_resumes_under_its_number_in_its_run(
    settings: Settings, data: Dataset
) -> None:
    seen, interrupts = stop_after(TrialProgressed, 5)
    for event in sweep(settings, data, FakePool(trains(good)), interrupts=interrupts):
        seen.append(event)
    before = {number: run.info.run_id for number, run in trial_runs().items()}
    params = [trial.params for trial in trials(settings, data)]
    run_sweep(settings, data, trains(good))
    after = trials(settings, data)
    assert [trial.state for trial in after] == [TrialState.COMPLETE] * 3
    assert [trial.params for trial in after][: len(params)] == params
    assert before.items() <= {n: run.info.run_id for n, run in trial_runs().items()}.items()
    for run in trial_runs().values():
        assert run.info.status == "FINISHED"
        assert list(history(run, "val/accuracy")) == [1, 2, 3]
    assert parent_run().info.status == "FINISHED"


@pytest.mark.parametrize(
    "sampler",
    ["tpe", *(pytest.param(name, marks=pytest.mark.slow) for name in ("random", "qmc", "gp"))],
)
def test_a_resumed_study_goes_the_way_of_the_undisturbed_one(
    settings: Settings, data: Dataset, sampler: str
) -> None:
    settings = replace(settings, trials=12, epochs=1, sampler=sampler)
    whole, parts = replace(settings, study="whole"), replace(settings, study="parts")

    def suits(job: int, config: Any) -> float:
        return 1 - abs(np.log10(config.learning_rate) + 1.5) / 4

    script = trains(suits)
    run_sweep(whole, data, without_models(script))
    for stop in (1, 5):
        seen, interrupts = stop_after(TrialStarted, stop)
        pool = FakePool(without_models(script))
        for event in sweep(parts, data, pool, interrupts=interrupts):
            seen.append(event)
    run_sweep(parts, data, without_models(script))
    expected = [trial.params for trial in trials(whole, data)]
    assert [trial.params for trial in trials(parts, data)] == expected
    assert len(expected) == 12


def without_models(script: Script) -> Script:
    """Return a script of trials that fail once trained: to record a model takes a while."""

    def failing(job: int, config: Any) -> Iterator[Any]:
        *epochs, _ = script(job, config)
        yield from (replace(event, diverged=True) for event in epochs)
        yield weights(job)

    return failing


def test_trials_is_the_total_that_a_study_is_brought_to(settings: Settings, data: Dataset) -> None:
    run_sweep(replace(settings, trials=1), data, diverges)
    run_sweep(replace(settings, trials=3), data, diverges)
    assert len(trials(settings, data)) == 3
    started, ended = run_sweep(replace(settings, trials=2), data, diverges)
    assert isinstance(started, SweepStarted)
    assert started.num_before == 3
    assert ended == SweepEnded(outcome="complete", reason="")


def test_several_workers_have_trials_at_the_same_time(settings: Settings, data: Dataset) -> None:
    events = run_sweep(replace(settings, workers=3), data, diverges)
    kinds = [type(event) for event in events]
    assert kinds[:4] == [SweepStarted, TrialStarted, TrialStarted, TrialStarted]
    assert {run.info.status for run in trial_runs().values()} == {"FINISHED"}


def test_the_first_trials_train_before_mlflow_is_opened(
    settings: Settings, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = FakePool(trains(good), num_workers=2)
    monkeypatch.setattr("tracking.tracker.Tracker.open", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(sweep(replace(settings, workers=2), data, pool))
    assert sorted(pool.jobs) == [0, 1]


def test_trials_that_began_before_mlflow_could_not_be_opened_are_resumed(
    settings: Settings, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "sqlite:////proc/nowhere/mlflow.db")
        with pytest.raises(ValueError, match="/proc/nowhere"):
            run_sweep(settings, data, trains(good))
    run_sweep(settings, data, trains(good))
    assert [trial.state for trial in trials(settings, data)] == [TrialState.COMPLETE] * 3
    assert sorted(trial_runs()) == [0, 1, 2]


def test_after_the_timeout_no_trial_is_started(settings: Settings, data: Dataset) -> None:
    events = run_sweep(replace(settings, timeout=1e-9), data, trains(good))
    assert [type(event) for event in events] == [SweepStarted, SweepEnded]


def test_the_name_of_a_study_follows_from_its_settings(settings: Settings, data: Dataset) -> None:
    name = open_study(settings, data).study_name
    assert open_study(replace(settings, trials=9, timeout=5), data).study_name == name
    for other in (
        replace(settings, seed=1),
        replace(settings, epochs=4),
        changed(settings, losses=("mse",)),
        changed(settings, learning_rate_max=0.5),
        replace(settings, sampler="tpe"),
    ):
        assert open_study(other, data).study_name != name
    assert open_study(settings, replace(data, digest="e" * 32)).study_name != name


def test_a_study_made_with_other_settings_is_refused(settings: Settings, data: Dataset) -> None:
    open_study(replace(settings, study="mine"), data)
    with pytest.raises(ValueError, match=r"'mine' was made with other settings \(epochs 3 → 4\)"):
        open_study(replace(settings, study="mine", epochs=4), data)


def test_a_study_of_another_tool_is_refused(settings: Settings, data: Dataset) -> None:
    foreign = optuna.create_study(study_name="theirs", storage=settings.storage)
    foreign.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    with pytest.raises(ValueError, match="'theirs' .* was not made by this tool"):
        open_study(replace(settings, study="theirs"), data)


def test_two_sweeps_of_one_study_at_a_time_are_refused(settings: Settings, data: Dataset) -> None:
    first = sweep(settings, data, FakePool(trains(good)))
    next(first)
    with pytest.raises(ValueError, match=f"is being run by process {os.getpid()}"):
        run_sweep(settings, data, trains(good))
    first.close()
    assert run_sweep(settings, data, trains(good))


@pytest.mark.parametrize(
    "storage", ["sqlite:////proc/nowhere/optuna.db", "nonsense", "nosuch://localhost/db"]
)
def test_a_storage_that_cannot_be_opened_is_named(
    settings: Settings, data: Dataset, storage: str
) -> None:
    with pytest.raises(ValueError, match=storage) as error:
        run_sweep(replace(settings, storage=storage), data, trains(good))
    assert "\n" not in str(error.value)


def test_a_storage_that_is_no_database_is_named(
    settings: Settings, data: Dataset, tmp_path: Path
) -> None:
    (tmp_path / "text.db").write_text("this is no database, however long one looks at it" * 99)
    with pytest.raises(ValueError, match="file is not a database"):
        run_sweep(replace(settings, storage=f"sqlite:///{tmp_path}/text.db"), data, trains(good))


def test_a_batch_larger_than_the_training_split_is_refused_before_anything_is_recorded(
    settings: Settings, data: Dataset, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="batch size 131 .* 130 images"):
        run_sweep(
            replace(settings, search={**settings.search, "batch_size": Choices((2, 131))}),
            data,
            trains(good),
        )
    assert not (tmp_path / "optuna.db").exists()


def test_the_run_that_mlflow_run_opened_is_the_parent(
    settings: Settings, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = MlflowClient()
    experiment_id = client.create_experiment("tests")
    opened = client.create_run(experiment_id, tags={"role": "of mlflow run"})
    client.log_param(opened.info.run_id, "losses", "'l1 mse'")
    monkeypatch.setenv("MLFLOW_RUN_ID", opened.info.run_id)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", experiment_id)
    run_sweep(replace(settings, trials=1, experiment=None), data, diverges)
    assert trial_runs()[0].data.tags["mlflow.parentRunId"] == opened.info.run_id
    assert parent_run().info.run_id == opened.info.run_id
    with pytest.raises(ValueError, match="mlflow run --experiment-name other"):
        run_sweep(replace(settings, experiment="other"), data, diverges)


def test_a_deleted_experiment_is_refused(settings: Settings, data: Dataset) -> None:
    client = MlflowClient()
    client.delete_experiment(client.create_experiment("tests"))
    with pytest.raises(ValueError, match="'tests' is deleted"):
        run_sweep(settings, data, diverges)


def test_the_table_ranks_complete_trials_first_and_ties_by_validation_loss(
    settings: Settings, data: Dataset
) -> None:
    def script(job: int, config: Any) -> Iterator[Any]:
        if job == 1:
            return iter(diverges(job, config))
        accuracy = {0: 0.5, 2: 0.8, 3: 0.8}[job]
        tied = epoch(job, 1, accuracy)
        tied.metrics["val/loss"] = 10.0 - job
        return iter([tied, weights(job)])

    settings = changed(settings, losses=("mse",), trials=4, epochs=1)
    run_sweep(settings, data, script)
    table = trials_table(open_study(settings, data))
    assert table["trial"].tolist() == [3, 2, 0, 1]
    assert table["outcome"].tolist() == ["complete", "complete", "complete", "diverged"]


def test_the_table_does_not_settle_ties_by_the_validation_loss_of_different_losses() -> None:
    study = optuna.create_study(direction="maximize")
    losses = CategoricalDistribution(["l1", "mse"])
    for loss, val_loss in (("mse", 0.9), ("l1", 0.1), ("mse", 0.8)):
        study.add_trial(
            optuna.trial.create_trial(
                value=0.5,
                params={"loss": loss},
                distributions={"loss": losses},
                user_attrs={"outcome": "complete", "val_loss": val_loss},
                intermediate_values={1: 0.5},
            )
        )
    assert trials_table(study)["trial"].tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"losses": ("mes",)}, "unknown loss 'mes'"),
        ({"losses": ()}, "--losses needs at least one value"),
        ({"losses": ("mse", "mse")}, "--losses has a value twice: mse mse"),
        ({"learning_rate_min": 0.0}, "--learning-rate-min must be finite and > 0, not 0.0"),
        ({"learning_rate_max": float("inf")}, "--learning-rate-max must be finite and > 0"),
        ({"learning_rate_min": float("nan")}, "--learning-rate-min must be finite and > 0"),
        ({"learning_rate_min": 1.0}, "must be smaller than --learning-rate-max 1.0"),
        ({"batch_sizes": (0,)}, "batch_size must be an integer ≥ 1, not 0"),
        ({"epochs": 0}, "epochs must be an integer ≥ 1, not 0"),
        ({"seed": -1}, "seed must be an integer from 0"),
        ({"trials": 0}, "--trials must be ≥ 1, not 0"),
        ({"timeout": -1.0}, "--timeout must be seconds ≥ 0"),
        ({"sampler": "cma"}, "unknown --sampler 'cma': choose one of tpe, random, qmc, gp"),
        (
            {"pruner": "no"},
            "unknown --pruner 'no': choose one of none, median, hyperband, asha, one_epoch",
        ),
        ({"device": "tpu"}, "device 'tpu' is not here"),
        ({"study": " "}, "--study takes up to 400 printable characters, not ' '"),
        ({"study": "a\x1b[2J"}, "--study takes up to 400 printable characters"),
        ({"study": "x" * 401}, "--study takes up to 400 printable characters"),
        ({"study": "a'b\"c"}, "with both kinds of quotes: choose another --study"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(
    settings: Settings, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match="^") as error:
        changed(settings, **change)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_killed_process_holds_a_study_no_longer(
    settings: Settings, data: Dataset, tmp_path: Path
) -> None:
    holding = (
        "import sys, time; from experiments.study.storage import study_lock\n"
        "with study_lock(sys.argv[1], sys.argv[2]):\n print('held', flush=True); time.sleep(60)"
    )
    name = open_study(settings, data).study_name
    with subprocess.Popen(
        [sys.executable, "-c", holding, settings.storage, name],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=f"is being run by process {holder.pid}"):
            run_sweep(settings, data, diverges)
        holder.kill()
    assert run_sweep(settings, data, diverges)


def test_many_idle_workers_do_not_all_get_a_trial_before_anything_else(
    settings: Settings, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.study.dispatch.MAX_DISPATCH", 2)
    dispatched: list[int] = []

    class Noting(FakePool):
        def wait(self, timeout: float) -> list[Event]:
            dispatched.append(len(self.configs))
            return super().wait(timeout)

    list(sweep(replace(settings, workers=6, trials=6), data, Noting(diverges, num_workers=6)))
    assert dispatched[:2] == [4, 6]  # two of them while MLflow was being opened
    assert len(trial_runs()) == 6


def test_a_stop_is_heard_between_the_events_of_many_workers(
    settings: Settings, data: Dataset
) -> None:
    seen, interrupts = stop_after(TrialProgressed)
    pool = FakePool(trains(good), num_workers=3)
    for event in sweep(replace(settings, workers=3), data, pool, interrupts):
        seen.append(event)
    assert sum(isinstance(event, TrialProgressed) for event in seen) == 1
    assert sum(isinstance(event, TrialEnded) for event in seen) == 3


# Starts that are refused, and what is deleted while a sweep runs


def deleted_experiment(_: pytest.MonkeyPatch) -> None:
    client = MlflowClient()
    client.delete_experiment(client.create_experiment("tests"))


def stale_run_id(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("MLFLOW_RUN_ID", "0" * 32)


def deleted_run_id(patch: pytest.MonkeyPatch) -> None:
    client = MlflowClient()
    run = client.create_run(client.create_experiment("tests"))
    client.delete_run(run.info.run_id)
    patch.setenv("MLFLOW_RUN_ID", run.info.run_id)


def param_that_is_otherwise(patch: pytest.MonkeyPatch) -> None:
    client = MlflowClient()
    run = client.create_run(client.create_experiment("tests"))
    client.log_param(run.info.run_id, "sweep/epochs", "99")
    patch.setenv("MLFLOW_RUN_ID", run.info.run_id)


@pytest.mark.parametrize(
    "refuse", [deleted_experiment, stale_run_id, deleted_run_id, param_that_is_otherwise]
)
def test_a_start_that_mlflow_refuses_leaves_nothing_running(
    settings: Settings, data: Dataset, monkeypatch: pytest.MonkeyPatch, refuse: Any
) -> None:
    settings = replace(settings, workers=3)
    with monkeypatch.context() as patch:
        refuse(patch)
        with pytest.raises(ValueError, match="^[^\n]+$") as error:
            run_sweep(settings, data, trains(good))
    assert not is_transient(error.value)  # none of these is mended by waiting
    assert TrialState.RUNNING not in {trial.state for trial in trials(settings, data)}
    client = MlflowClient()
    for experiment in client.search_experiments(ViewType.ALL):
        runs = client.search_runs([experiment.experiment_id], run_view_type=ViewType.ALL)
        assert "RUNNING" not in {r.info.status for r in runs if r.data.tags.get("role") == "sweep"}
    # Numbers and draws are as if it had not been tried.
    settings = replace(settings, experiment="others")
    run_sweep(settings, data, trains(good))
    after = trials(settings, data)
    assert [(trial.number, trial.state) for trial in after] == [
        (number, TrialState.COMPLETE) for number in range(3)
    ]


def test_a_start_that_is_refused_draws_what_it_would_have_drawn(
    settings: Settings, data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_sweep(settings, data, trains(good))
    undisturbed = [trial.params for trial in trials(settings, data)]
    other = replace(settings, storage=f"sqlite:///{tmp_path / 'other.db'}", experiment="others")
    with monkeypatch.context() as patch:
        stale_run_id(patch)
        with pytest.raises(ValueError, match="no run '0+': unset MLFLOW_RUN_ID"):
            run_sweep(other, data, trains(good))
    run_sweep(other, data, trains(good))
    assert [trial.params for trial in trials(other, data)] == undisturbed


def test_a_run_that_is_deleted_ends_its_trial_alone(settings: Settings, data: Dataset) -> None:
    settings = replace(settings, workers=3)
    events = sweep(settings, data, FakePool(trains(good), num_workers=3))
    seen: list[SweepEvent] = []
    for event in events:
        seen.append(event)
        if isinstance(event, TrialProgressed) and event.trial == 2 and event.number == 1:
            MlflowClient().delete_run(trial_runs()[1].info.run_id)
    ended = {event.trial: event for event in seen if isinstance(event, TrialEnded)}
    assert {number: event.outcome for number, event in ended.items()} == {
        0: "complete",
        1: "failed",
        2: "complete",
    }
    assert ended[1].reason == "its run in MLflow was deleted"
    assert seen[-1] == SweepEnded(outcome="complete", reason="")
    assert {run.info.status for run in client_runs()} == {"FINISHED"}
    assert trials(settings, data)[1].state == TrialState.FAIL


def test_an_experiment_that_is_deleted_ends_a_sweep_for_good(
    settings: Settings, data: Dataset
) -> None:
    seen: list[SweepEvent] = []
    for event in sweep(settings, data, FakePool(trains(good))):
        seen.append(event)
        if isinstance(event, TrialProgressed) and len(seen) < 5:
            client = MlflowClient()
            experiment = client.get_experiment_by_name("tests")
            assert experiment is not None
            client.delete_experiment(experiment.experiment_id)
    ended = seen[-1]
    assert isinstance(ended, SweepEnded)
    assert ended.outcome == "failed"
    assert "active" in ended.reason or "deleted" in ended.reason
    # Restored, it goes on where it was.
    assert TrialState.FAIL not in {trial.state for trial in trials(settings, data)}
    assert experiment is not None
    client.restore_experiment(experiment.experiment_id)
    run_sweep(settings, data, trains(good))
    assert {trial.state for trial in trials(settings, data)} == {TrialState.COMPLETE}
    assert {run.info.status for run in client_runs()} == {"FINISHED"}
    assert len(trial_runs()) == settings.trials


def test_what_can_not_be_closed_keeps_nothing_else_open(
    settings: Settings, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(settings, workers=3)
    events = sweep(settings, data, FakePool(trains(good), num_workers=3))
    progressed = 0
    for event in events:
        progressed += isinstance(event, TrialProgressed)
        if progressed == 3:
            break
    end, broken = Run.end, trial_runs()[0].info.run_id

    def failing(run: Any, *args: Any, **kwargs: Any) -> None:
        if run.run_id == broken:
            raise MlflowException("no")
        end(run, *args, **kwargs)

    monkeypatch.setattr(Run, "end", failing)
    events.close()
    statuses = {run.info.run_id: run.info.status for run in client_runs()}
    assert statuses.pop(broken) == "RUNNING"
    assert set(statuses.values()) == {"KILLED"}


def test_an_error_that_waiting_does_not_mend_is_told_as_such(
    settings: Settings, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise MlflowException("params can't be changed")

    monkeypatch.setattr(Run, "log_params", refuse)
    with pytest.raises(ValueError, match="params can't be changed") as error:
        run_sweep(settings, data, trains(good))
    assert not is_transient(error.value)


# Patience


@pytest.mark.parametrize(
    ("patience", "min_delta", "ended"), [(2, 0.0, 7), (2, 0.05, 4), (9, 0.0, 9)]
)
def test_a_sweep_ends_when_more_trials_would_not_help(
    settings: Settings, data: Dataset, patience: int, min_delta: float, ended: int
) -> None:
    reached = [0.5, 0.6, 0.55, 0.62, 0.63, 0.6, 0.6, 0.9, 0.9]
    chosen = replace(settings, trials=9, patience=patience, min_delta=min_delta)
    script = trains(lambda job, _: reached[job])
    *_, last = run_sweep(chosen, data, script)
    assert isinstance(last, SweepEnded)
    assert last.outcome == "complete"
    assert len(trials(settings, data)) == ended
    assert last.reason == (f"no gain in accuracy, --patience {patience}" if ended < 9 else "")
    again = run_sweep(chosen, data, script)
    assert not any(isinstance(event, TrialStarted) for event in again)
