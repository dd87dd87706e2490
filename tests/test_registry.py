"""What becomes of a run's model in the model registry, and what a kill or a lost answer leaves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import requests
from fake_pool import FakePool, Script, diverges, epoch, fails, trains, weights
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from tracking_helpers import log_model, new_store, record

import experiments.engine.processes
from cnn.config import TrainConfig
from cnn.data import Dataset
from experiments.engine.base import Event
from experiments.study.controller import sweep
from experiments.study.domains import Choices, Range
from experiments.study.events import BestRegistered, SweepEnded, SweepEvent
from experiments.study.settings import Settings
from experiments.sweep import build_parser, main
from tracking.registry import Registry, _agreed, check_name, default_name, register_best
from tracking.retries import RetryingClient, RetryPolicy, TrackingAwayError
from tracking.runs import Run
from tracking.tracker import Tracker

DATA = {"dataset": "colours", "dataset_digest": "d1", "seed": 0, "loss": "mse"}


@pytest.fixture
def tracker(tmp_path: Path) -> Iterator[Tracker]:
    with new_store(tmp_path):
        yield Tracker.open("study")


@pytest.fixture
def registry(tracker: Tracker) -> Registry:
    return Registry(client=tracker.client, name="colours")


def trained(tracker: Tracker, accuracy: float | None = 0.5, **params: object) -> Any:
    """Record a run with a model, as a sweep does, and return it."""
    run_id = record(tracker, accuracy=accuracy, loss=0.25)
    run = Run(tracker.client, run_id, tracker.experiment_id)
    run.log_params(DATA | params)
    run.set_tags({"study": "a study", "trial": "7", "mlflow.source.git.commit": "c0ffee"})
    return tracker.client.get_run(run_id)


def champion() -> int | None:
    number = MlflowClient().get_registered_model("colours").aliases.get("champion")
    return None if number is None else int(number)


def versions() -> dict[int, ModelVersion]:
    found = MlflowClient().search_model_versions("name = 'colours'")
    return {int(version.version): version for version in found}


# A run's model becomes a version


def test_a_version_says_where_its_model_is_from(tracker: Tracker, registry: Registry) -> None:
    run = trained(tracker, 0.9861)
    registry.register_best(run)
    (version,) = versions().values()
    assert version.run_id == run.info.run_id
    assert version.source == f"models:/{run.outputs.model_outputs[0].model_id}"
    assert (
        version.tags.items()
        >= {
            "run": f"run run ({run.info.run_id})",
            "study": "a study",
            "trial": "7",
            "git_commit": "c0ffee",
            "dataset": "colours",
            "dataset_digest": "d1",
            "seed": "0",
            "loss": "mse",
            "val/accuracy": "0.9861",
            "val/loss": "0.25",
        }.items()
    )


def test_the_model_shows_its_version_as_mlflows_own_registering_has_it(
    tracker: Tracker, registry: Registry
) -> None:
    run = trained(tracker)
    registry.register_best(run)
    registry.register_best(run)
    model = tracker.client.get_logged_model(run.outputs.model_outputs[0].model_id)
    assert model.tags["mlflow.modelVersions"] == '[{"name": "colours", "version": 1}]'


def test_a_version_and_its_model_say_what_they_are(tracker: Tracker, registry: Registry) -> None:
    registry.register_best(trained(tracker, 0.9861, learning_rate=0.125, dataset="a|b"))
    model = MlflowClient().get_registered_model("colours")
    assert model.description.startswith("Classifies images like those of a\\|b.")
    assert "--model models:/colours@champion" in model.description
    (version,) = versions().values()
    first, *_ = version.description.splitlines()
    assert first.startswith(
        "val/accuracy 0.9861, loss mse, learning rate 0.125, trained on a\\|b, trial 7 of study a "
        "study. It is the model of run run ("
    )
    assert "python -m tracking.predict SOURCE --model models:/colours/1" in version.description


def test_a_description_that_a_user_wrote_stays(tracker: Tracker, registry: Registry) -> None:
    run, client = trained(tracker), MlflowClient()
    client.create_registered_model("colours", description="ours")
    model = run.outputs.model_outputs[0].model_id
    source = f"models:/{model}"
    client.create_model_version(
        "colours", source, run.info.run_id, description="mine", model_id=model
    )
    registry.register_best(run)
    assert client.get_registered_model("colours").description == "ours"
    assert versions()[1].description == "mine"


def test_a_registry_that_takes_no_descriptions_is_no_failure(
    tracker: Tracker, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise MlflowException("403 != 200: Permission denied")

    monkeypatch.setattr(MlflowClient, "update_registered_model", refuse)
    monkeypatch.setattr(MlflowClient, "update_model_version", refuse)
    assert registry.register_best(trained(tracker)).is_champion


def test_the_same_run_is_registered_once(tracker: Tracker, registry: Registry) -> None:
    run = trained(tracker)
    first, second = registry.register_best(run), registry.register_best(run)
    assert (first.version, first.is_new) == (1, True)
    assert (second.version, second.is_new) == (1, False)
    assert list(versions()) == [1]
    assert "version 1 of colours, registered before: the champion" in str(second)


def test_a_version_that_was_made_by_hand_is_taken_and_gets_the_tags(
    tracker: Tracker, registry: Registry
) -> None:
    run = trained(tracker)
    client = MlflowClient()
    client.create_registered_model("colours")
    uri = f"models:/{run.outputs.model_outputs[0].model_id}"
    client.create_model_version("colours", uri, run_id=run.info.run_id)
    assert registry.register_best(run).version == 1
    assert versions()[1].tags["dataset_digest"] == "d1"


def test_a_run_without_a_model_is_not_registered(tracker: Tracker) -> None:
    run_id = record(tracker, has_model=False, outcome="pruned")
    assert "has no model: it is pruned" in register_best(tracker.client, run_id, "colours")
    assert MlflowClient().search_registered_models() == []


def test_the_champion_is_loaded_by_its_alias(tracker: Tracker, registry: Registry) -> None:
    from tracking.models.predictor import load_model

    run = tracker.start_run("real", params=DATA)
    run.log_metrics({"val/accuracy": 0.9}, step=1)
    log_model(run)
    run.end("complete")
    registry.register_best(tracker.client.get_run(run.run_id))
    predictor = load_model("models:/colours@champion")
    assert predictor.run_id == run.run_id
    assert predictor.classes == ("red", "green", "blue")


def with_files(tracker: Tracker) -> tuple[Run, Path]:
    """Record a run with a model that has files, and return it with the folder that they are in."""
    run = tracker.start_run("real", params=DATA)
    run.log_metrics({"val/accuracy": 0.9}, step=1)
    model_id = log_model(run).removeprefix("models:/")
    run.end("complete")
    return run, Path(tracker.client.get_logged_model(model_id).artifact_location)


def test_a_version_carries_the_digests_of_its_files(tracker: Tracker, registry: Registry) -> None:
    run, folder = with_files(tracker)
    registry.register_best(tracker.client.get_run(run.run_id))
    tags = versions()[1].tags
    for file in ("MLmodel", "data/model.pt2"):
        assert tags[f"sha256/{file}"] == sha256((folder / file).read_bytes()).hexdigest()


def test_a_model_that_was_changed_in_the_store_is_not_made_champion(
    tracker: Tracker, registry: Registry
) -> None:
    run, folder = with_files(tracker)
    with (folder / "MLmodel").open("a") as stream:
        stream.write("# changed\n")
    line = register_best(tracker.client, run.run_id, "colours")
    assert line.startswith("not as colours: models:/colours/1 can't be used as a model: ")
    assert "its MLmodel was changed since it was recorded: its SHA-256 is " in line
    assert champion() is None
    with pytest.raises(ValueError, match="its MLmodel was changed since"):
        registry.promote(1, force=True)


# Who is champion


def test_the_first_is_champion(tracker: Tracker, registry: Registry) -> None:
    standing = registry.register_best(trained(tracker))
    assert champion() == 1
    assert str(standing) == "version 1 of colours: the champion, as there was none before"


def test_a_better_one_takes_its_place(tracker: Tracker, registry: Registry) -> None:
    registry.register_best(trained(tracker, 0.5))
    standing = registry.register_best(trained(tracker, 0.6))
    assert champion() == 2
    assert str(standing) == (
        "version 2 of colours: the champion, as its val/accuracy 0.6 beats version 1's 0.5"
    )
    assert versions()[1].tags["verdict"] == "as version 2 took its place"


@pytest.mark.parametrize("accuracy", [0.4, 0.5])
def test_one_that_is_no_better_does_not(
    tracker: Tracker, registry: Registry, accuracy: float
) -> None:
    registry.register_best(trained(tracker, 0.5))
    standing = registry.register_best(trained(tracker, accuracy))
    assert champion() == 1
    assert not standing.is_champion
    assert "is not above that of the champion, version 1: 0.5" in str(standing)


@pytest.mark.parametrize(
    ("params", "why"),
    [
        ({"dataset_digest": "d2"}, "version 1, is of another data set (d1, not d2)"),
        ({"seed": 1}, "version 1, is of another split seed (0, not 1)"),
    ],
)
def test_what_is_measured_on_other_images_is_not_compared(
    tracker: Tracker, registry: Registry, params: Mapping[str, object], why: str
) -> None:
    registry.register_best(trained(tracker, 0.5))
    standing = registry.register_best(trained(tracker, 0.9, **params))
    assert champion() == 1
    assert why in str(standing)


@pytest.mark.parametrize("accuracy", [None, math.nan])
def test_one_without_an_accuracy_does_not_beat_any(
    tracker: Tracker, registry: Registry, accuracy: float | None
) -> None:
    registry.register_best(trained(tracker, 0.5))
    assert "it has no val/accuracy" in registry.register_best(trained(tracker, accuracy)).why
    assert champion() == 1


def test_a_champion_of_which_nothing_is_known_is_not_compared(
    tracker: Tracker, registry: Registry
) -> None:
    client = MlflowClient()
    client.create_registered_model("colours")
    client.create_model_version("colours", "s3://elsewhere")
    client.set_registered_model_alias("colours", "champion", "1")
    standing = registry.register_best(trained(tracker))
    assert "version 1's data set is not known" in standing.why
    assert champion() == 1


def test_of_a_champion_without_tags_its_run_tells(tracker: Tracker, registry: Registry) -> None:
    run = trained(tracker, 0.5)
    client = MlflowClient()
    client.create_registered_model("colours")
    client.create_model_version("colours", "s3://elsewhere", run_id=run.info.run_id)
    client.set_registered_model_alias("colours", "champion", "1")
    assert registry.register_best(trained(tracker, 0.6)).is_champion


def test_a_version_is_judged_once(tracker: Tracker, registry: Registry) -> None:
    registry.register_best(trained(tracker, 0.5))
    better = trained(tracker, 0.6)
    registry.register_best(better)
    registry.rollback()
    standing = registry.register_best(better)  # the same sweep again
    assert champion() == 1
    assert "not the champion, rolled back to version 1" in str(standing)


def test_a_registry_that_refuses_is_no_failure_of_the_sweep(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise MlflowException("Permission denied", error_code=1)

    monkeypatch.setattr(MlflowClient, "create_registered_model", refuse)
    run = trained(tracker)
    assert (
        register_best(tracker.client, run.info.run_id, "colours")
        == "not as colours: Permission denied"
    )


def test_what_another_sweep_wrote_at_the_same_moment_is_no_refusal(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = '(psycopg.errors.UniqueViolation) duplicate key … "model_version_tag_pk"'
    set_tag, raised = MlflowClient.set_model_version_tag, []

    def at_the_same_moment(self: Any, *args: Any, **kwargs: Any) -> None:
        set_tag(self, *args, **kwargs)
        if not raised:
            raised.append(True)
            raise MlflowException(message)

    monkeypatch.setattr(MlflowClient, "set_model_version_tag", at_the_same_moment)
    line = register_best(tracker.client, trained(tracker).info.run_id, "cnn-digits")
    assert raised
    assert line.startswith("version 1 of cnn-digits, registered before: the champion")


def test_a_full_disk_is_raised_for_it_may_be_otherwise_later(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise MlflowException("(sqlite3.OperationalError) database or disk is full")

    monkeypatch.setattr(MlflowClient, "create_registered_model", refuse)
    run = trained(tracker)
    with pytest.raises(MlflowException, match="disk is full"):
        register_best(tracker.client, run.info.run_id, "colours")


# Killed, or with a server that is away

WRITES = (
    "create_registered_model",
    "create_model_version",
    "set_logged_model_tags",
    "update_model_version",
    "update_registered_model",
    "set_registered_model_tag",
    "set_model_version_tag",
    "set_registered_model_alias",
)


NUM_WRITES = 8
"""Writes that it takes to register a better model, and to make it champion."""


class KilledError(Exception):
    """The process is no more."""


def mortal(client: Any, life: int) -> Any:
    """Return a client whose process is killed when it comes to its write number `life`."""

    class Mortal:
        writes = 0

        def __getattr__(self, name: str) -> Any:
            call = getattr(client, name)
            return (
                (lambda *args, **kwargs: self.write(call, args, kwargs)) if name in WRITES else call
            )

        def write(self, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            done, self.writes = self.writes, self.writes + 1
            if done == life:
                raise KilledError
            return call(*args, **kwargs)

    return Mortal()


@pytest.mark.parametrize("life", range(9))
def test_a_kill_at_any_write_leaves_nothing_that_a_new_start_does_not_mend(
    tracker: Tracker, registry: Registry, life: int
) -> None:
    registry.register_best(trained(tracker, 0.5))
    better = trained(tracker, 0.6)
    dying = mortal(tracker.client, life)
    with pytest.raises(KilledError) if life < NUM_WRITES else nullcontext():
        Registry(client=dying, name="colours").register_best(better)
    standing = registry.register_best(better)
    assert (standing.version, champion(), sorted(versions())) == (2, 2, [1, 2])
    assert versions()[2].description
    assert registry.rollback().version == 1
    assert champion() == 1


@pytest.mark.parametrize("life", range(4))
def test_a_rollback_that_is_killed_leaves_a_history_that_agrees_with_the_alias(
    tracker: Tracker, registry: Registry, life: int
) -> None:
    for accuracy in (0.5, 0.6, 0.7):
        registry.register_best(trained(tracker, accuracy))
    with pytest.raises(KilledError):
        Registry(client=mortal(tracker.client, life), name="colours").rollback()
    went_back = champion() == 2
    assert registry.rollback().version == (1 if went_back else 2)


def test_an_answer_that_is_lost_makes_no_second_version(tracker: Tracker) -> None:
    class Server:
        """Makes the version, and goes away before it can say so."""

        lost = 0

        def __getattr__(self, name: str) -> Any:
            return getattr(MlflowClient(), name)

        def create_model_version(self, *args: Any, **kwargs: Any) -> ModelVersion:
            made = MlflowClient().create_model_version(*args, **kwargs)
            self.lost += 1
            if self.lost == 1:
                raise requests.ConnectionError("reset by peer")
            return made

    server: Any = Server()
    client = RetryingClient(server, RetryPolicy(seconds=30))
    run = trained(tracker)
    assert register_best(client, run.info.run_id, "colours").startswith("version 1 of colours")
    assert server.lost == 2
    assert list(versions()) == [1]
    assert champion() == 1


def test_of_two_processes_that_register_the_same_run_one_gives_way(
    tracker: Tracker, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(tracker)
    create = MlflowClient.create_model_version

    def first_the_other(*args: Any, **kwargs: Any) -> ModelVersion:
        monkeypatch.setattr(MlflowClient, "create_model_version", create)
        registry.register_best(run)
        return create(*args, **kwargs)

    monkeypatch.setattr(MlflowClient, "create_model_version", first_the_other)
    assert registry.register_best(run).version == 1
    assert list(versions()) == [1]


def test_a_second_version_that_a_user_has_made_is_left_alone(
    tracker: Tracker, registry: Registry
) -> None:
    run = trained(tracker)
    registry.register_best(run)
    MlflowClient().create_model_version("colours", "s3://elsewhere", run_id=run.info.run_id)
    registry.register_best(run)
    assert sorted(versions()) == [1, 2]


def test_a_server_that_stays_away_is_raised(tracker: Tracker) -> None:
    class Away:
        def get_run(self, _: str) -> None:
            raise requests.ConnectionError("refused")

    away: Any = Away()
    with pytest.raises(TrackingAwayError):
        register_best(RetryingClient(away, RetryPolicy()), "0" * 32, "colours")


# Names


@pytest.mark.parametrize(
    ("dataset", "name"),
    [
        ("digits", "cnn-digits"),
        ("my photos: 2024/05", "cnn-my-photos-2024-05"),
        ("Bäume", "cnn-B-ume"),
        ("...", "cnn-images"),
        ("x" * 500, "cnn-" + "x" * 252),
    ],
)
def test_a_data_set_gives_its_models_a_name_that_can_be_used(dataset: str, name: str) -> None:
    assert default_name(dataset) == name
    check_name(name)


@pytest.mark.parametrize("name", ["", " ", "a/b", "a:b", "a@b", "a?b", "a\nb", "it's", " a", "a "])
def test_a_name_that_no_uri_could_hold_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="can't be a registered model's name"):
        check_name(name)


def test_history_and_alias_agree_whoever_has_set_the_alias() -> None:
    assert _agreed([1, 2], 2) == [1, 2]
    assert _agreed([1, 2], 1) == [1]  # killed between the two
    assert _agreed([1, 2], 3) == [1, 2, 3]  # set by hand, in MLflow's pages
    assert _agreed([1, 1, 2, 2], 2) == [1, 2]  # a version between them was deleted
    assert _agreed([1, 2], None) == [1, 2]
    assert _agreed([], 1) == [1]


# At the end of a sweep


def settings(**given: Any) -> Settings:
    options = build_parser().parse_args(["--trials", "2", "--epochs", "1", "--workers", "1"])
    names = set(Settings.__dataclass_fields__) & set(vars(options))
    chosen = {name: value for name, value in vars(options).items() if name in names}
    search = {
        "loss": Choices(("mse",)),
        "learning_rate": Range(0.001, 1.0, log=True),
        "batch_size": Choices((2,)),
    }
    return Settings(**chosen | {"search": search, "register": "auto"} | given)


def swept(data: Dataset, script: Script, **given: Any) -> list[SweepEvent]:
    return list(sweep(settings(**given), data, FakePool(script)))  # type: ignore[arg-type]


def reports(events: list[SweepEvent]) -> list[str]:
    return [event.report for event in events if isinstance(event, BestRegistered)]


def good(job: int, config: object) -> float:
    return 0.9 - job / 100


def test_a_sweep_registers_its_best_model_once(tracker: Tracker, coloured_noise: Dataset) -> None:
    assert reports(swept(coloured_noise, trains(good))) == [
        "version 1 of cnn-coloured-noise: the champion, as there was none before"
    ]
    (again,) = reports(swept(coloured_noise, trains(good)))
    assert again.startswith("version 1 of cnn-coloured-noise, registered before: the champion")
    (version,) = MlflowClient().search_model_versions("name = 'cnn-coloured-noise'")
    run = tracker.client.get_run(version.run_id)
    assert run.data.tags["trial"] == "0"
    assert version.tags["dataset_digest"] == coloured_noise.digest
    assert version.tags["seed"] == "0"
    assert float(version.tags["val/accuracy"]) == run.data.metrics["val/accuracy"]


def test_a_sweep_that_goes_on_registers_its_new_best(
    tracker: Tracker, coloured_noise: Dataset
) -> None:
    swept(coloured_noise, trains(good))
    (report,) = reports(swept(coloured_noise, trains(lambda job, _: 0.95), trials=3))
    assert "version 2 of cnn-coloured-noise: the champion, as its val/accuracy 0.95" in report


def test_a_sweep_without_a_registry_registers_nothing(
    tracker: Tracker, coloured_noise: Dataset
) -> None:
    assert reports(swept(coloured_noise, trains(good), register="none")) == []
    assert MlflowClient().search_registered_models() == []


@pytest.mark.parametrize("script", [diverges, fails])
def test_a_sweep_without_a_complete_trial_registers_nothing(
    tracker: Tracker, coloured_noise: Dataset, script: Script
) -> None:
    events = swept(coloured_noise, script, epochs=3)
    assert reports(events) == []
    assert MlflowClient().search_registered_models() == []


def test_a_sweep_that_cannot_reach_the_registry_says_that_it_is_to_be_continued(
    tracker: Tracker, coloured_noise: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise MlflowException("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "create_registered_model", full)
        events = swept(coloured_noise, trains(good))
    assert events[-1] == SweepEnded(outcome="interrupted", reason="database or disk is full")
    assert len(reports(swept(coloured_noise, trains(good)))) == 1


def test_a_bad_name_is_refused_before_anything_starts() -> None:
    with pytest.raises(ValueError, match="'a/b' can't be a registered model's name"):
        settings(register="a/b")


def test_the_command_prints_what_came_of_it(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def script(job: int, config: TrainConfig) -> Iterator[Event]:
        yield epoch(job, 1, good(job, config))
        yield weights(job, num_classes=10)

    monkeypatch.setattr(
        experiments.engine.processes, "ProcessPool", lambda *_, **__: FakePool(script)
    )
    arguments = ["--trials", "2", "--epochs", "1", "--workers", "1"]
    assert main([*arguments, "--register", "my model"]) == 0
    line = "  registered:        version 1 of my model: the champion, as there was none before\n"
    assert line in capsys.readouterr().out
    assert main([*arguments, "--register", "none"]) == 0
    assert "registered:" not in capsys.readouterr().out


def test_a_sweep_whose_best_run_was_deleted_registers_the_best_that_is_there(
    tracker: Tracker, coloured_noise: Dataset
) -> None:
    swept(coloured_noise, trains(good), register="none")
    client = MlflowClient()
    everywhere = [each.experiment_id for each in client.search_experiments()]
    (best,) = client.search_runs(everywhere, "tags.trial = '0'")
    client.delete_run(best.info.run_id)
    (report,) = reports(swept(coloured_noise, trains(good)))
    assert report.startswith("version 1 of cnn-coloured-noise: the champion")
    (version,) = client.search_model_versions("name = 'cnn-coloured-noise'")
    assert tracker.client.get_run(version.run_id).data.tags["trial"] == "1"
