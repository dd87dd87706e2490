"""The command that says which version of a registered model is the champion."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from tracking_helpers import new_store, record, type_at_a_terminal

from tracking.promote import main
from tracking.registry import Registry
from tracking.runs import Run
from tracking.tracker import Tracker

Train = Callable[..., Any]


@pytest.fixture
def tracker(tmp_path: Path) -> Iterator[Tracker]:
    with new_store(tmp_path):
        yield Tracker.open("study")


@pytest.fixture
def train(tracker: Tracker) -> Train:
    """Record a run with a model, as a sweep does."""

    def trained(accuracy: float = 0.5, digest: str = "d1", *, register: bool = True) -> Any:
        run_id = record(tracker, accuracy=accuracy)
        run = Run(tracker.client, run_id, tracker.experiment_id)
        run.log_params({"dataset_digest": digest, "seed": 0})
        recorded = tracker.client.get_run(run_id)
        if register:
            Registry(client=tracker.client, name="colours").register_best(recorded)
        return recorded

    return trained


def champion() -> int | None:
    number = MlflowClient().get_registered_model("colours").aliases.get("champion")
    return None if number is None else int(number)


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["colours", *argv]) == 0
    return capsys.readouterr().out


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Return the one line of an exit with code 2."""
    assert main(list(argv)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m tracking.promote: error: ")
    return line


def test_a_version_is_promoted_though_it_is_no_better(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    train(0.5)
    train(0.4)
    assert champion() == 1
    first, second = printed(capsys, "--version", "2").splitlines()
    assert first == (
        "version 2 of colours, registered before: the champion, by hand, though its val/accuracy "
        "0.4 is not above that of the champion, version 1: 0.5"
    )
    assert second.endswith("--model models:/colours@champion")
    assert champion() == 2


def test_without_a_version_it_is_the_best_and_not_the_newest(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    for accuracy in (0.5, 0.7, 0.3):
        train(accuracy)
    printed(capsys, "--rollback")
    assert champion() == 1
    present, best, result, _ = printed(capsys).splitlines()
    assert present.startswith("champion:   version 1: val/accuracy 0.5")
    assert best.startswith("best:       version 2: val/accuracy 0.7")
    assert result.endswith("the champion, by hand, its val/accuracy 0.7 beats version 1's 0.5")
    assert champion() == 2


def test_without_a_version_a_champion_stays_that_no_other_beats(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    for accuracy in (0.5, 0.4, 0.5):
        train(accuracy)
    assert "version 1 of colours, registered before: the champion, as it was before" in printed(
        capsys
    )
    assert champion() == 1


def test_of_versions_on_other_images_none_is_the_best(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    train(0.5)
    train(0.9, "d2")
    assert "not compared: 1 on other images" in printed(capsys)
    assert champion() == 1


@pytest.fixture
def unknown_champion(train: Train) -> None:
    """The champion is a version of which no accuracy is known."""
    train(0.5)
    train(0.4)
    client = MlflowClient()
    client.delete_run(client.get_model_version("colours", "1").run_id)
    version = client.create_model_version("colours", "models:/colours/1")
    client.set_registered_model_alias("colours", "champion", version.version)


@pytest.mark.usefixtures("unknown_champion")
def test_where_the_best_may_be_worse_a_script_is_refused_without_force(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    error = error_of(capsys, "colours")
    assert "not promoted, as version 3's data set is not known" in error
    assert error.endswith("so version 1 may be worse: --force promotes it anyway")
    assert champion() == 3
    assert "version 1 of colours" in printed(capsys, "--force")
    assert champion() == 1


@pytest.mark.usefixtures("unknown_champion")
@pytest.mark.parametrize(("answer", "becomes"), [("y", 1), ("", 3), (None, 3)])
def test_where_the_best_may_be_worse_a_user_at_a_terminal_is_asked(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    answer: str | None,
    becomes: int,
) -> None:
    type_at_a_terminal(monkeypatch, answer)
    out = printed(capsys)
    assert "version 1 may be worse than version 3" in out
    assert ("not promoted" in out) == (becomes == 3)
    assert champion() == becomes


def test_a_model_without_an_accuracy_is_not_chosen(
    tracker: Tracker, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tracker.client.get_run(record(tracker, accuracy=None))
    Registry(client=tracker.client, name="colours").register(run)
    assert "colours has no version with a val/accuracy" in error_of(capsys, "colours")


def test_to_promote_the_champion_does_nothing(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    train(0.5)
    assert "nothing was done" in printed(capsys, "--version", "1")
    error = error_of(capsys, "colours", "--rollback")
    assert error.endswith("can't roll back: only version 1 of colours was champion")


def test_a_run_is_registered_and_promoted(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    train(0.5)
    run = train(0.4, register=False)
    out = printed(capsys, "--run-id", run.info.run_id)
    assert out.startswith("version 2 of colours: the champion, by hand, though")
    assert MlflowClient().get_model_version("colours", "2").run_id == run.info.run_id
    assert "version 2 of colours" in printed(capsys, "--run-id", run.info.run_id)
    assert len(MlflowClient().search_model_versions("name = 'colours'")) == 2


def test_the_first_run_makes_the_registered_model(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(0.5, register=False)
    assert "version 1 of colours: the champion, by hand" in printed(
        capsys, "--run-id", run.info.run_id
    )
    assert champion() == 1


def test_other_data_take_force(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    train(0.5)
    train(0.9, "d2")
    error = error_of(capsys, "colours", "--version", "2")
    assert "version 1, is of another data set (d1, not d2)" in error
    assert "--force promotes it anyway" in error
    assert champion() == 1
    assert "version 2" in printed(capsys, "--version", "2", "--force")
    assert champion() == 2


def test_a_run_of_other_data_is_not_even_registered(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    train(0.5)
    run = train(0.9, "d2", register=False)
    assert "another data set" in error_of(capsys, "colours", "--run-id", run.info.run_id)
    assert len(MlflowClient().search_model_versions("name = 'colours'")) == 1


def test_it_goes_back_step_by_step_and_forth_again(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    for accuracy in (0.5, 0.6, 0.7):
        train(accuracy)
    assert champion() == 3
    out = printed(capsys, "--rollback")
    assert "version 2 of colours, registered before: the champion, after version 3 was" in out
    printed(capsys, "--rollback")
    assert champion() == 1
    printed(capsys, "--version", "3")
    printed(capsys, "--rollback")
    assert champion() == 1


def test_a_version_that_was_deleted_is_passed_over(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    for accuracy in (0.5, 0.6, 0.7):
        train(accuracy)
    MlflowClient().delete_model_version("colours", "2")
    printed(capsys, "--rollback")
    assert champion() == 1


def test_after_the_champion_was_deleted_it_goes_back_to_the_one_before(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    train(0.5)
    train(0.6)
    MlflowClient().delete_model_version("colours", "2")
    assert champion() is None
    assert "after its alias was removed" in printed(capsys, "--rollback")
    assert champion() == 1


def test_an_alias_that_was_set_in_mlflows_pages_is_gone_back_from(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    for accuracy in (0.5, 0.4, 0.3):
        train(accuracy)
    MlflowClient().set_registered_model_alias("colours", "champion", "3")
    printed(capsys, "--rollback")
    assert champion() == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: NAME"),
        (["a/b"], "'a/b' can't be a registered model's name"),
        (["nobody"], "there is no registered model 'nobody', only 'colours'"),
        (["nobody", "--rollback"], "there is no registered model 'nobody'"),
        (["colours", "--version", "9"], "colours has no version 9: there are 1"),
        (["colours", "--version", "x"], "argument --version: invalid int value: 'x'"),
        (["colours", "--version", "1", "--rollback"], "not allowed with argument --version"),
        (["colours", "--rollback", "--force"], "--force is for promoting"),
        (["colours", "--run-id", "0" * 32], "Run with id=0000"),
        (["colours", "--run-id", "a'b"], "a'b"),
        (["colours", "--frob"], "unrecognized arguments: --frob"),
    ],
)
def test_bad_input_is_one_line(
    train: Train, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    train(0.5)
    assert message in error_of(capsys, *argv)
    assert champion() == 1


def test_a_deleted_run_and_one_without_a_model_are_refused(
    train: Train, tracker: Tracker, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(0.5, register=False)
    tracker.client.delete_run(run.info.run_id)
    assert "is deleted" in error_of(capsys, "colours", "--run-id", run.info.run_id)
    pruned = record(tracker, outcome="pruned", has_model=False)
    assert "has no model: it is pruned" in error_of(capsys, "colours", "--run-id", pruned)


def test_a_full_disk_is_another_exit_code(
    train: Train, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise MlflowException("database or disk is full")

    train(0.5)
    train(0.4)
    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", full)
    assert main(["colours", "--version", "2"]) == 1
    assert "disk is full" in capsys.readouterr().err
