"""Which run `tracking.best` chooses, and what it says where there is none."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow.tracking._tracking_service.utils import _get_store
from tracking_helpers import add_model_entry, new_store, record

from tracking import run_search
from tracking.best import main
from tracking.errors import one_line, without_passwords
from tracking.ranking import Entry, best_first
from tracking.run_search import first_with_model, model_uri
from tracking.runs import Run
from tracking.selection import best_run, choose
from tracking.store import reading
from tracking.tracker import Tracker


@pytest.fixture
def mlflow_store(tmp_path: Path) -> Iterator[str]:
    with new_store(tmp_path) as uri:
        yield uri


@pytest.fixture
def tracker(mlflow_store: str) -> Tracker:
    return Tracker.open("study")


def best_id(metric: str = "val/accuracy") -> str:
    return str(best_run("study", metric=metric).info.run_id)


def one_line_of(info: pytest.ExceptionInfo[ValueError]) -> str:
    message = str(info.value)
    assert "\n" not in message
    return message


# Choosing


def test_the_highest_accuracy_is_best(tracker: Tracker) -> None:
    record(tracker, accuracy=0.5)
    high = record(tracker, accuracy=0.9)
    record(tracker, accuracy=0.7)
    assert best_id() == high


def test_the_last_value_counts_not_the_highest(tracker: Tracker) -> None:
    record(tracker, accuracy=[0.99, 0.5])
    steady = record(tracker, accuracy=[0.5, 0.6])
    assert best_id() == steady


@pytest.mark.parametrize("outcome", ["pruned", "diverged", "failed", "interrupted", None])
def test_a_run_that_is_not_complete_is_never_chosen(tracker: Tracker, outcome: str | None) -> None:
    complete = record(tracker, accuracy=0.5)
    record(tracker, accuracy=0.9, outcome=outcome)
    assert best_id() == complete


def test_a_complete_run_that_was_opened_again_is_not_chosen(tracker: Tracker) -> None:
    complete = record(tracker, accuracy=0.5)
    again = record(tracker, accuracy=0.9)
    tracker.client.update_run(again, status="RUNNING")
    assert best_id() == complete


def test_a_run_without_a_model_is_never_chosen(tracker: Tracker) -> None:
    with_model = record(tracker, accuracy=0.5)
    record(tracker, accuracy=0.9, has_model=False)
    assert best_id() == with_model


@pytest.mark.parametrize("accuracy", [math.nan, None])
def test_a_run_whose_metric_is_no_number_is_never_chosen(
    tracker: Tracker, accuracy: float | None
) -> None:
    number = record(tracker, accuracy=0.01)
    record(tracker, accuracy=accuracy, loss=0.0)
    assert best_id() == number


def test_a_deleted_run_is_never_chosen(tracker: Tracker) -> None:
    kept = record(tracker, accuracy=0.5)
    tracker.client.delete_run(record(tracker, accuracy=0.9))
    assert best_id() == kept


def test_among_equals_the_lower_loss_wins(tracker: Tracker) -> None:
    record(tracker, accuracy=0.5, loss=0.3)
    lower = record(tracker, accuracy=0.5, loss=0.2)
    record(tracker, accuracy=0.5, loss=math.nan)
    record(tracker, accuracy=0.5, loss=None)
    assert best_id() == lower


@pytest.mark.parametrize("starts", [(1000, 2000), (2000, 1000)])
def test_among_equals_in_both_the_earlier_start_wins(
    tracker: Tracker, starts: tuple[int, int]
) -> None:
    runs = {start: record(tracker, accuracy=0.5, loss=0.2, start=start) for start in starts}
    assert best_id() == runs[1000]


def test_another_metric_can_decide(tracker: Tracker) -> None:
    record(tracker, accuracy=0.9, metrics={"train/accuracy": 0.1})
    other = record(tracker, accuracy=0.5, metrics={"train/accuracy": 0.2})
    assert best_id("train/accuracy") == other


def test_of_a_loss_the_lowest_is_best(tracker: Tracker) -> None:
    low = record(tracker, accuracy=0.5, loss=0.1)
    record(tracker, accuracy=0.9, loss=0.2)
    assert best_id("val/loss") == low


def test_it_agrees_with_a_plain_search_through_all_runs(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_search, "_PAGE", 4)  # several pages
    monkeypatch.setattr(run_search, "_NEXT_PAGE", 4)
    random = np.random.default_rng(0)
    usable = {}
    for start in range(1, 25):
        accuracy, loss = random.integers(3) / 2, random.integers(2) / 2
        outcome = str(random.choice(["complete", "pruned"]))
        has_model = bool(random.integers(2))
        run_id = record(
            tracker,
            accuracy=accuracy,
            loss=loss,
            outcome=outcome,
            has_model=has_model,
            start=start,
        )
        if has_model and outcome == "complete":
            usable[run_id] = (-accuracy, loss, start)
    assert best_id() == min(usable, key=lambda run_id: usable[run_id])


def test_a_best_run_on_a_later_page_is_found(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_search, "_PAGE", 2)
    for _ in range(4):
        record(tracker, accuracy=0.9, has_model=False)
    only = record(tracker, accuracy=0.5)
    assert best_id() == only


def test_no_more_pages_are_read_than_it_takes(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_search, "_PAGE", 2)
    pages = []
    search_runs = mlflow.MlflowClient.search_runs

    def counted(*args: object, **options: object) -> object:
        pages.append(search_runs(*args, **options))
        return pages[-1]

    monkeypatch.setattr(mlflow.MlflowClient, "search_runs", counted)
    searches = []
    for accuracies in ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6, 0.7)):
        for accuracy in accuracies:
            record(tracker, accuracy=accuracy)
        pages.clear()
        assert "best of more than 2 finished runs" in str(choose("study"))
        searches.append([len(page) for page in pages])
    # Whatever it takes to find which runs can be compared: of these, a page.
    assert searches[0] == searches[1]
    assert max(searches[0]) == 2


def test_it_says_which_run_and_why(tracker: Tracker) -> None:
    record(tracker, accuracy=0.5)
    record(tracker, accuracy=0.9, outcome="pruned")
    run_id = record(tracker, "012 mse lr=0.031 bs=64", accuracy=0.98607)
    assert str(choose("study")) == (
        "best of 2 finished runs of experiment 'study' by val/accuracy = 0.9861: "
        f"run 012 mse lr=0.031 bs=64 ({run_id})"
    )


def test_without_a_name_it_is_the_experiment_of_the_environment(
    mlflow_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(Tracker.open("cnn-sweep"), "default")
    record(Tracker.open("other"), "named")
    assert best_run().info.run_name == "default"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "other")
    assert best_run().info.run_name == "named"


# Equal ones


def entry(
    start: int, *, value: float = 1.0, loss: str | None = "mse", val_loss: float | None = 0.5
) -> Entry:
    return Entry(value=value, loss=loss, val_loss=val_loss, start=start)


@pytest.mark.parametrize(
    ("entries", "order"),
    [
        ([entry(0, value=0.5), entry(1, value=0.9)], [1, 0]),
        ([entry(0, val_loss=0.3), entry(1, val_loss=0.2)], [1, 0]),
        ([entry(0, val_loss=0.3), entry(1, val_loss=0.2, loss="l1")], [0, 1]),
        ([entry(1, val_loss=0.3), entry(0, val_loss=0.4, loss="l1")], [1, 0]),
        # The loss that was first is so with all its runs, in the order of their val/loss.
        ([entry(0, val_loss=0.3), entry(1, loss="l1"), entry(2, val_loss=0.2)], [2, 0, 1]),
        ([entry(0, val_loss=None), entry(1, val_loss=math.nan), entry(2)], [2, 0, 1]),
        ([entry(0, value=math.nan), entry(1, value=0.1)], [1, 0]),
        ([entry(1), entry(0)], [1, 0]),
        ([], []),
    ],
)
def test_the_order_settles_by_val_loss_only_what_is_of_one_loss(
    entries: list[Entry], order: list[int]
) -> None:
    assert best_first(entries) == order


def test_the_order_of_one_loss_is_the_same_beside_others() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        entries = [
            entry(
                start,
                value=random.integers(2) / 2,
                loss=str(random.choice(["l1", "mse", "bce"])),
                val_loss=random.integers(3) / 2,
            )
            for start in random.permutation(8)
        ]
        in_all = [entries[i] for i in best_first(entries)]
        alone = [each for each in entries if each.loss == "mse"]
        assert [e for e in in_all if e.loss == "mse"] == [alone[i] for i in best_first(alone)]


def test_equal_runs_of_different_losses_are_not_settled_by_val_loss(tracker: Tracker) -> None:
    first = tried(tracker, 0.9, loss="l1", val_loss=0.5)
    tried(tracker, 0.9, loss="mse", val_loss=0.01)
    assert best_id() == first
    assert str(choose("study")).endswith("; of 2 equal ones, it was started first")


def test_of_the_loss_that_was_first_the_lowest_val_loss_is_best(tracker: Tracker) -> None:
    tried(tracker, 0.9, loss="l1", val_loss=0.5)
    tried(tracker, 0.9, loss="mse", val_loss=0.01)
    lower = tried(tracker, 0.9, loss="l1", val_loss=0.4)
    assert best_id() == lower == best_run("study", loss="l1").info.run_id
    assert str(choose("study")).endswith(
        "; of 3 equal ones, one of loss 'l1' was started first, and of the 2 with that loss, its "
        "val/loss, 0.4, is the lowest"
    )


def test_equal_runs_are_settled_though_they_fill_more_than_a_page(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_search, "_PAGE", 2)
    monkeypatch.setattr(run_search, "_NEXT_PAGE", 2)
    for val_loss in (0.5, 0.4, 0.3):
        tried(tracker, 0.9, val_loss=val_loss)
    lowest = tried(tracker, 0.9, val_loss=0.2)
    tried(tracker, 0.8, val_loss=0.1)
    assert best_id() == lowest


def test_it_notes_that_losses_of_different_kinds_are_not_comparable(tracker: Tracker) -> None:
    tried(tracker, 0.9, loss="l1")
    assert choose("study", metric="val/loss").notes() == []
    tried(tracker, 0.9, loss="mse")
    (note,) = choose("study", metric="val/loss").notes()
    assert note == "val/loss of different losses can't be compared: --loss NAME chooses one"


# Data sets and their splits

DIGESTS = {"digits": "d1" * 16, "photos": "ab" * 16}


def on(
    tracker: Tracker,
    dataset: str,
    accuracy: float,
    *,
    seed: int = 0,
    stage: str | None = None,
    digest: str | None = None,
) -> str:
    """Record a run on a data set, as sweeps do, and, with a stage, comparisons."""
    run_id = record(tracker, f"{dataset} {seed} {accuracy}", accuracy=accuracy)
    run = Run(tracker.client, run_id, tracker.experiment_id)
    digest = digest or DIGESTS[dataset]
    run.log_params({"dataset": dataset, "dataset_digest": digest, "seed": seed})
    if stage:
        run.set_tags({"stage": stage})
    return run_id


def chosen(**options: str | list[str]) -> str:
    return str(choose("study", **options).run.info.run_name)  # type: ignore[arg-type]


def test_runs_on_another_data_set_are_not_ranked_but_named(tracker: Tracker) -> None:
    on(tracker, "digits", 0.99)
    on(tracker, "digits", 0.98)
    run_id = on(tracker, "photos", 0.5)
    on(tracker, "photos", 0.4)
    choice = choose("study")
    assert str(choice) == (
        "best of 2 finished runs of experiment 'study' on 'photos' by val/accuracy = 0.5: "
        f"run photos 0 0.5 ({run_id})"
    )
    assert choice.notes() == [
        "not among them: 2 runs on 'digits' (digest d1d1d1d1): accuracies on other images can't be "
        "compared; --dataset digits chooses those"
    ]


def test_of_one_data_set_there_is_nothing_to_note(tracker: Tracker) -> None:
    on(tracker, "digits", 0.9)
    choice = choose("study")
    assert "best of 1 finished run of experiment 'study' on 'digits' by" in str(choice)
    assert choice.notes() == []


@pytest.mark.parametrize("dataset", ["digits", DIGESTS["digits"], "d1d1d1d1", "some/digits/"])
def test_a_data_set_is_chosen_by_name_folder_or_digest(tracker: Tracker, dataset: str) -> None:
    on(tracker, "digits", 0.6)
    on(tracker, "photos", 0.5)
    choice = choose("study", dataset=dataset)
    assert choice.run.info.run_name == "digits 0 0.6"
    assert choice.notes() == []


def test_a_folder_can_be_called_like_a_digest(tracker: Tracker) -> None:
    on(tracker, "20260131", 0.6, digest="cd" * 16)
    on(tracker, "photos", 0.5)
    assert chosen(dataset="20260131") == "20260131 0 0.6"


def test_of_a_data_set_that_has_changed_the_latest_state_is_chosen(tracker: Tracker) -> None:
    on(tracker, "photos", 0.9, digest="cd" * 16)
    on(tracker, "photos", 0.5)
    assert chosen() == chosen(dataset="photos") == "photos 0 0.5"
    (note,) = choose("study").notes()
    assert "1 run on 'photos' (digest cdcdcdcd)" in note
    assert f"--dataset {'cd' * 16} chooses" in note
    assert chosen(dataset="cd" * 16) == "photos 0 0.9"


def test_a_data_set_that_no_run_is_on_is_told_from_those_that_are(tracker: Tracker) -> None:
    on(tracker, "digits", 0.9)
    with pytest.raises(ValueError, match="dataset 'photo' has a model; .* data sets 'digits'$"):
        choose("study", dataset="photo")


@pytest.mark.parametrize(
    ("prefer", "name"),
    [
        ([DIGESTS["digits"], "photos"], "digits 0 0.6"),
        (["cd" * 16, "digits"], "digits 0 0.6"),
        (["unknown"], "photos 0 0.5"),
    ],
)
def test_a_data_set_that_is_preferred_is_chosen_if_there_is_one(
    tracker: Tracker, prefer: list[str], name: str
) -> None:
    on(tracker, "digits", 0.6)
    on(tracker, "photos", 0.5)
    assert chosen(prefer=prefer) == name


@pytest.mark.parametrize("stages", [("confirm", "confirm"), ("repeat", "confirm")])
def test_repeats_on_other_seeds_are_not_ranked_with_the_search(
    tracker: Tracker, stages: tuple[str, str]
) -> None:
    on(tracker, "digits", 0.7, seed=7, stage="search")
    on(tracker, "digits", 0.8, seed=7, stage="search")
    for seed, stage in zip((8, 9), stages, strict=True):
        on(tracker, "digits", 0.9, seed=seed, stage=stage)
    choice = choose("study")
    assert choice.run.info.run_name == "digits 7 0.8"
    assert "best of 2 finished runs of experiment 'study' on 'digits', split by seed 7, by" in str(
        choice
    )
    assert choice.notes() == [
        "not among them: 2 runs on 'digits' split by other seeds: accuracies on other images can't "
        "be compared; --where \"params.seed = '9'\" chooses those"
    ]
    assert chosen(where="params.seed = '9'") == "digits 9 0.9"


def test_of_two_sweeps_on_other_splits_the_later_one_is_ranked(tracker: Tracker) -> None:
    on(tracker, "digits", 0.9, seed=0)
    on(tracker, "digits", 0.7, seed=1)
    assert chosen() == "digits 1 0.7"


def test_a_metric_that_only_repeats_have_is_ranked_among_those(tracker: Tracker) -> None:
    on(tracker, "digits", 0.7, seed=7, stage="search")
    repeat = on(tracker, "digits", 0.9, seed=8, stage="confirm")
    Run(tracker.client, repeat, tracker.experiment_id).log_metrics({"test/accuracy": 0.6}, step=1)
    assert chosen(metric="test/accuracy") == "digits 8 0.9"


def test_runs_that_name_no_data_set_are_ranked_apart(tracker: Tracker) -> None:
    record(tracker, "by hand", accuracy=0.99)
    on(tracker, "digits", 0.5)
    choice = choose("study")
    assert choice.run.info.run_name == "digits 0 0.5"
    (note,) = choice.notes()
    assert "1 run that name no data set" in note
    assert chosen(where="params.dataset_digest IS NULL") == "by hand"


def test_a_data_set_whose_models_were_all_deleted_is_passed_over(tracker: Tracker) -> None:
    on(tracker, "digits", 0.5)
    gone = tracker.client.get_run(on(tracker, "photos", 0.9))
    tracker.client.delete_logged_model(gone.outputs.model_outputs[0].model_id)
    assert chosen() == "digits 0 0.5"
    with pytest.raises(ValueError, match="no finished run with dataset 'photos' with a model"):
        choose("study", prefer=["photos"])


def test_many_runs_on_another_data_set_are_counted_up_to_a_page(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_search, "_PAGE", 2)
    for accuracy in (0.1, 0.2, 0.3):
        on(tracker, "digits", accuracy)
    on(tracker, "photos", 0.5)
    assert "more than 2 runs on 'digits'" in choose("study").notes()[0]


def test_best_run_warns_of_runs_on_other_data_sets_unless_one_is_asked_for(
    tracker: Tracker,
) -> None:
    on(tracker, "digits", 0.9)
    on(tracker, "photos", 0.5)
    message = "on 'photos'; not among those .* 1 run on 'digits' .*; dataset= chooses"
    with pytest.warns(UserWarning, match=message) as caught:
        best_run("study")
    assert caught[0].filename == __file__
    assert best_run("study", dataset="digits").info.run_name == "digits 0 0.9"


def test_the_command_counts_the_others_and_a_flag_chooses_them(
    tracker: Tracker, capsys: pytest.CaptureFixture[str]
) -> None:
    on(tracker, "digits", 0.9)
    on(tracker, "photos", 0.5)
    why, note, _, row = printed(capsys).splitlines()
    assert "'photos'" in why
    assert note.startswith("note: not among them: 1 run on 'digits'")
    assert "photos 0 0.5" in row
    why, _, row = printed(capsys, "--dataset", "digits").splitlines()
    assert "digits 0 0.9" in row


# Runs that are gone


def delete(tracker: Tracker, run_id: str) -> None:
    tracker.client.delete_run(run_id)


def delete_for_good(tracker: Tracker, run_id: str) -> None:
    """Do what `mlflow gc` does."""
    tracker.client.delete_run(run_id)
    _get_store()._hard_delete_run(run_id)  # type: ignore[no-untyped-call]


def delete_model(tracker: Tracker, run_id: str) -> None:
    run = tracker.client.get_run(run_id)
    tracker.client.delete_logged_model(run.outputs.model_outputs[0].model_id)


@pytest.mark.parametrize("deleted", [delete, delete_for_good, delete_model])
def test_the_first_run_that_is_there_with_its_model(
    tracker: Tracker, deleted: Callable[[Tracker, str], None]
) -> None:
    gone, there, _ = (record(tracker) for _ in range(3))
    without_model = record(tracker, has_model=False)
    deleted(tracker, gone)
    run_ids = [None, gone, without_model, there]
    assert first_with_model(tracker.client, run_ids) == there
    assert first_with_model(tracker.client, [gone]) is None


# Among some of the runs


def tried(
    tracker: Tracker,
    accuracy: float,
    *,
    study: str = "a",
    loss: str = "mse",
    batch_size: int = 64,
    val_loss: float = 0.25,
) -> str:
    run_id = record(tracker, f"{loss} {batch_size}", accuracy=accuracy, loss=val_loss)
    run = Run(tracker.client, run_id, tracker.experiment_id)
    run.log_params({"loss": loss, "batch_size": batch_size, "learning_rate": 0.03125})
    run.set_tags({"study": study, "trial": "7"})
    return run_id


@pytest.mark.parametrize(
    ("filters", "name"),
    [
        ({}, "l1 64"),
        ({"study": "it's b"}, "mse 128"),
        ({"loss": "mse"}, "mse 32"),
        ({"loss": "mse", "study": "it's b"}, "mse 128"),
        ({"study": "", "loss": "", "where": " "}, "l1 64"),
    ],
)
def test_a_study_and_a_loss_are_the_best_of_only_its_runs(
    tracker: Tracker, filters: dict[str, str], name: str
) -> None:
    tried(tracker, 0.9, loss="l1")
    tried(tracker, 0.8, batch_size=32)
    tried(tracker, 0.7, study="it's b", batch_size=128)
    assert best_run("study", **filters).info.run_name == name


@pytest.mark.parametrize(
    ("where", "name"),
    [
        ("params.batch_size = '128'", "mse 128"),
        ("params.batch_size != '64' and metrics.`val/accuracy` > 0.75", "mse 32"),
        ("tags.study LIKE '%b'", "mse 128"),
    ],
)
def test_a_condition_excludes_the_others(tracker: Tracker, where: str, name: str) -> None:
    tried(tracker, 0.9)
    tried(tracker, 0.8, batch_size=32)
    tried(tracker, 0.7, study="b", batch_size=128)
    assert best_run("study", where=where).info.run_name == name


def test_no_condition_brings_back_a_run_that_is_never_chosen(tracker: Tracker) -> None:
    record(tracker, outcome="pruned")
    for where in ("tags.outcome = 'pruned'", "tags.outcome = 'x' or tags.outcome = 'pruned'"):
        with pytest.raises(ValueError, match=r"no finished run|can't search"):
            best_run("study", where=where)


@pytest.mark.parametrize(
    "where",
    ["batch 64", "params.batch_size = 64", "params.a = '1' or params.b = '2'", "'", "a = '1'; --"],
)
def test_a_condition_that_mlflow_cannot_read_is_one_line_with_an_example(
    tracker: Tracker, where: str
) -> None:
    tried(tracker, 0.9)
    with pytest.raises(ValueError, match=r"params\.batch_size = '64'") as info:
        best_run("study", where=where)
    assert f"MLflow can't search for {where!r} (" in one_line_of(info)


def test_filters_that_exclude_all_are_named_with_what_there_is(tracker: Tracker) -> None:
    tried(tracker, 0.9)
    tried(tracker, 0.8, loss="l1", study="b")
    with pytest.raises(ValueError, match="with loss 'hinge' has a model") as info:
        best_run("study", loss="hinge")
    assert one_line_of(info).endswith("those that have: losses 'l1', 'mse'; studies 'a', 'b'")


def test_a_run_whose_model_was_deleted_is_passed_over(tracker: Tracker) -> None:
    kept = record(tracker, accuracy=0.5)
    gone = tracker.client.get_run(record(tracker, accuracy=0.9))
    tracker.client.delete_logged_model(gone.outputs.model_outputs[0].model_id)
    assert best_id() == kept


@pytest.mark.parametrize(
    ("losses", "why"),
    [
        ((0.3, 0.2, 0.4), "; of 3 equal ones, its val/loss, 0.2, is the lowest"),
        (
            (0.4, 0.2, 0.2),
            "; of 3 equal ones, its val/loss, 0.2, is the lowest, and of 2 with that, it was "
            "started first",
        ),
        ((0.2, 0.2), "; of 2 equal ones, it was started first"),
        ((None, None), "; of 2 equal ones, it was started first"),
    ],
)
def test_it_says_how_a_tie_was_settled(
    tracker: Tracker, losses: tuple[float | None, ...], why: str
) -> None:
    record(tracker, accuracy=0.1)
    for loss in losses:
        record(tracker, accuracy=0.5, loss=loss)
    assert str(choose("study")).endswith(why)


def test_it_says_what_it_was_chosen_among(tracker: Tracker) -> None:
    tried(tracker, 0.9)
    choice = choose("study", study="a", loss="mse", where="params.batch_size = '64'")
    assert (
        "1 finished run of experiment 'study' with study 'a' and loss 'mse' and "
        "params.batch_size = '64' by val/accuracy = 0.9: run mse 64"
    ) in str(choice)


def test_as_many_runners_up_are_found_as_are_asked_for(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_search, "_PAGE", 2)
    monkeypatch.setattr(run_search, "_NEXT_PAGE", 2)
    runs = {accuracy: record(tracker, accuracy=accuracy) for accuracy in (0.1, 0.5, 0.3, 0.4, 0.2)}
    ranked = [run.info.run_id for run in choose("study", top=4).ranked[:4]]
    assert ranked == [runs[accuracy] for accuracy in (0.5, 0.4, 0.3, 0.2)]


# The command line


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["--experiment", "study", *argv]) == 0
    return capsys.readouterr().out


def test_it_prints_the_best_and_its_runners_up(
    tracker: Tracker, capsys: pytest.CaptureFixture[str]
) -> None:
    for accuracy in (0.7, 0.9, 0.8):
        run_id = tried(tracker, accuracy)
    why, header, *rows = printed(capsys, "--top", "2").splitlines()
    assert why.startswith("best of 3 finished runs of experiment 'study' by val/accuracy = 0.9")
    assert header.split()[:4] == ["rank", "run", "run_id", "study"]
    assert [row.split()[0] for row in rows] == ["1", "2"]
    assert run_id in rows[1]
    assert rows[1].split()[-4:] == ["0.03125", "64", "0.8", "0.25"]


def test_flags_filter_as_the_function_does(
    tracker: Tracker, capsys: pytest.CaptureFixture[str]
) -> None:
    tried(tracker, 0.9, loss="l1")
    tried(tracker, 0.8, study="b")
    run_id = tried(tracker, 0.7)
    flags = ["--study", "a", "--loss", "mse", "--where", "params.batch_size = '64'"]
    why, _, row = printed(capsys, *flags).splitlines()
    assert "with study 'a' and loss 'mse' and params.batch_size = '64'" in why
    assert run_id in row


def test_csv_is_read_back_with_all_digits(
    tracker: Tracker, capsys: pytest.CaptureFixture[str]
) -> None:
    run_id = tried(tracker, 0.1 + 0.2, study='with "quotes", and commas')
    assert main(["--experiment", "study", "--format", "csv"]) == 0
    out, err = capsys.readouterr()
    (row,) = csv.DictReader(io.StringIO(out))
    assert float(row["val/accuracy"]) == 0.1 + 0.2
    assert row["study"] == 'with "quotes", and commas'
    assert row["run_id"] == run_id
    assert row["model"] == model_uri(tracker.client.get_run(run_id))
    assert err.startswith("best of 1 finished run")


def test_names_that_a_terminal_or_a_spreadsheet_would_obey_are_escaped(
    tracker: Tracker, capsys: pytest.CaptureFixture[str]
) -> None:
    forged = "=1+1\x1b[2J\nbest of 9\x9b"
    run_id = record(tracker, forged, accuracy=0.9)
    why, header, row = printed(capsys).splitlines()
    assert main(["--experiment", "study", "--format", "csv"]) == 0
    as_csv, why_again = capsys.readouterr()
    as_json = printed(capsys, "--format", "json")
    assert r"=1+1\x1b[2J\nbest of 9\x9b" in why
    for text in (why, header, row, why_again, as_csv, as_json):
        assert text.replace("\n", "").isprintable()
    assert json.loads(as_json)[0]["run"] == forged
    (record_,) = csv.DictReader(io.StringIO(as_csv))
    assert record_["run"] == r"'=1+1\x1b[2J\nbest of 9\x9b"
    assert record_["run_id"] == run_id


def test_json_is_read_back_with_null_for_what_is_no_number(
    tracker: Tracker, capsys: pytest.CaptureFixture[str]
) -> None:
    run_id = record(tracker, accuracy=0.1 + 0.2, loss=math.nan, start=1_700_000_000_000)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    (row,) = json.loads(printed(capsys, "--format", "json"), parse_constant=refuse)
    assert row == {
        "rank": 1,
        "run": "run",
        "run_id": run_id,
        "study": None,
        "trial": None,
        "loss": None,
        "learning_rate": None,
        "batch_size": None,
        "val/accuracy": 0.1 + 0.2,
        "val/loss": None,
        "started": "2023-11-14T22:13:20+00:00",
        "model": model_uri(tracker.client.get_run(run_id)),
    }


def test_another_metric_has_a_column(tracker: Tracker, capsys: pytest.CaptureFixture[str]) -> None:
    record(tracker, metrics={"train/loss": 0.125})
    (row,) = json.loads(printed(capsys, "--metric", "train/loss", "--format", "json"))
    assert row["train/loss"] == 0.125


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--top", "0"], "--top must be ≥ 1, not 0"),
        (["--top", "x"], "argument --top: invalid int value: 'x'"),
        (["--format", "xml"], "argument --format: invalid choice: 'xml'"),
        (["--where", "nonsense"], "MLflow can't search for 'nonsense'"),
        (["--loss", "hinge"], "with loss 'hinge' has a model; those that have: losses 'mse'"),
        (["--study", "'\""], "holds both kinds of quotes"),
        (["--metric", "val/acc"], "choose one of 'val/accuracy', 'val/loss'"),
        (["--experiment", "studdy"], "there is no experiment 'studdy'"),
        (["surplus"], "unrecognized arguments: surplus"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tracker: Tracker, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    tried(tracker, 0.9)
    assert main(["--experiment", "study", *argv]) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith("python -m tracking.best: error: ")
    assert message in line
    assert out == ""


# The model of a run


def test_the_uri_is_that_of_the_last_model(tracker: Tracker) -> None:
    run = Run(tracker.client, record(tracker, has_model=False), tracker.experiment_id)
    later = add_model_entry(run, step=2)
    add_model_entry(run, step=1)
    assert model_uri(tracker.client.get_run(run.run_id)) == f"models:/{later}"


def test_a_run_without_a_model_has_no_uri(tracker: Tracker) -> None:
    run_id = record(tracker, "003 l1", outcome="pruned", has_model=False)
    with pytest.raises(ValueError, match=rf"run 003 l1 \({run_id}\) has no model: it is pruned"):
        model_uri(tracker.client.get_run(run_id))


# Nothing to choose


def test_an_unknown_experiment_is_named_with_those_that_exist(tracker: Tracker) -> None:
    with pytest.raises(ValueError, match="no experiment 'studdy'") as info:
        best_run("studdy")
    message = one_line_of(info)
    assert "'study'" in message
    assert message.endswith("python -m experiments.sweep --experiment studdy")


def test_the_command_that_would_help_is_quoted_for_a_shell(tracker: Tracker) -> None:
    with pytest.raises(ValueError, match=r"--experiment 'my study; ls'$"):
        best_run("my study; ls")


def test_of_many_experiments_some_are_named(mlflow_store: str) -> None:
    for number in range(12):
        Tracker.open(f"e{number:02}")
    with pytest.raises(ValueError, match="'e00', .* and 5 more; "):
        best_run("none of them")


def test_a_deleted_experiment_is_said_to_be_deleted(tracker: Tracker) -> None:
    tracker.client.delete_experiment(tracker.experiment_id)
    with pytest.raises(ValueError, match="'study' is deleted: restore it by"):
        best_run("study")


def test_without_a_finished_run_it_says_what_runs_there_are(tracker: Tracker) -> None:
    record(tracker, outcome="pruned")
    record(tracker, outcome="pruned")
    record(tracker, outcome=None)
    with pytest.raises(ValueError, match="'study' has no finished run") as info:
        best_run("study")
    message = one_line_of(info)
    assert "2 pruned, 1 running" in message
    assert message.endswith("python -m experiments.sweep --experiment study")


def test_an_empty_experiment_has_no_runs(tracker: Tracker) -> None:
    with pytest.raises(ValueError, match=r"no finished run .* \(runs: none\)"):
        best_run("study")


def test_an_unknown_metric_is_named_with_those_that_exist(tracker: Tracker) -> None:
    record(tracker, accuracy=0.5, loss=0.1)
    with pytest.raises(ValueError, match="metric 'val/acc': .* 'val/accuracy', 'val/loss'"):
        best_run("study", metric="val/acc")


def test_where_all_are_nan_none_is_best(tracker: Tracker) -> None:
    record(tracker, accuracy=math.nan)
    with pytest.raises(ValueError, match="no finished run with a model and a number as"):
        best_run("study")


def test_a_metric_that_mlflow_cannot_parse_is_one_clear_line(tracker: Tracker) -> None:
    with pytest.raises(ValueError, match="Invalid clause") as info:
        best_run("study", metric="a`b")
    one_line_of(info)


# A store that can't be opened


def test_a_missing_database_is_named_and_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ValueError, match="no runs here: .*/mlflow.db' does not exist"):
        best_run()
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_a_missing_database_is_not_made_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/nonexistent/x.db")
    with pytest.raises(ValueError, match="nonexistent/x.db' does not exist"):
        best_run("study")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_database_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes.txt").write_text("not a database, but long enough to be looked at\n" * 50)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/notes.txt")
    with pytest.raises(ValueError, match=r"can't open .*notes.txt: file is not a database$"):
        best_run("study")


def test_a_server_that_is_away_is_named_without_its_password(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ValueError, match=r"server http://me:\*\*\*@127.0.0.1:9 doesn't") as info:
        best_run("study")
    assert "secret" not in one_line_of(info)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:secret@host:5000/x", "http://me:***@host:5000/x"),
        (
            "'http://me:secret@host/x' and ftp://a:secret@b",
            "'http://me:***@host/x' and ftp://a:***@b",
        ),
        ("postgresql+psycopg://me:secret/or:secret@host/db", "postgresql+psycopg://me:***@host/db"),
        ("postgresql://me:secret@secret@host/db", "postgresql://me:***@host/db"),
        ("postgresql://:secret@host/db", "postgresql://:***@host/db"),
        (
            "postgresql://host/db?user=me&password=secret&x=1",
            "postgresql://host/db?user=me&password=***&x=1",
        ),
        (
            "no user: http://host:5000, models:/cnn@champion",
            "no user: http://host:5000, models:/cnn@champion",
        ),
        ("sqlite:////a/b:c@d.db", "sqlite:////a/b:c@d.db"),
    ],
)
def test_passwords_in_addresses_are_hidden(text: str, shown: str) -> None:
    assert without_passwords(text) == shown
    assert one_line(ValueError(text)) == shown


def test_a_registry_of_its_own_that_is_away_is_named_at_once(
    mlflow_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "postgresql+psycopg://me:secret@127.0.0.1:9/models")
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"open the database postgresql\+psycopg://me:\*\*\*@"):
        best_run("study")
    assert time.monotonic() - start < 10  # MLflow itself tries for 100 seconds


def test_a_missing_database_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql+pg8000://me:secret@127.0.0.1:9/db")
    with pytest.raises(ValueError, match=r"postgresql\+pg8000://me:\*\*\*@.*No module named"):
        best_run("study")


def test_retries_are_bounded_unless_the_user_says_otherwise(
    mlflow_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    retries = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
    monkeypatch.delenv(retries, raising=False)
    with reading():
        assert os.environ[retries] == "2"
    assert retries not in os.environ
    monkeypatch.setenv(retries, "5")
    with reading():
        assert os.environ[retries] == "5"
    assert os.environ[retries] == "5"
