"""`experiments.clean`: what it lists, what it removes, and what it must leave."""

from __future__ import annotations

import errno
import sqlite3
from contextlib import closing
from pathlib import Path

import optuna
import pytest
from fake_pool import FakePool, trains
from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun
from mlflow.entities import ViewType
from small_sweep import small_settings
from tracking_helpers import type_at_a_terminal

import experiments.inventory.runs
from cnn.cache import DatasetSource, ImagePool, add_entry
from cnn.config import TrainConfig
from cnn.data import Dataset
from experiments.clean import main
from experiments.engine.checkpoints import Checkpoints
from experiments.interrupts import Interrupts
from experiments.study.controller import sweep
from experiments.study.storage import study_lock

STORAGE = "sqlite:///optuna.db"


@pytest.fixture(scope="module")
def data(coloured_noise: Dataset) -> Dataset:
    return coloured_noise


@pytest.fixture(autouse=True)
def store(mlflow_store: str, quiet_optuna: None) -> None:
    """A store, and a working folder, of the test's own."""


class Stopping(Interrupts):
    """A Ctrl-C after so many questions."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def run(study: str, data: Dataset, trials: int = 2, interrupts: Interrupts | None = None) -> None:
    settings = small_settings(STORAGE, study=study, trials=trials, losses=("mse",))
    pool = FakePool(trains(lambda job, _: 0.9 - job / 100))
    list(sweep(settings, data, pool, interrupts=interrupts or Interrupts()))


def runs_of(study: str) -> list[MlflowRun]:
    """Return the runs of a study, deleted ones as well."""
    client = MlflowClient()
    ids = [each.experiment_id for each in client.search_experiments()]
    return list(client.search_runs(ids, f"tags.study = '{study}'", ViewType.ALL))


def trial_runs(study: str) -> list[MlflowRun]:
    return [run for run in runs_of(study) if run.data.tags["role"] == "trial"]


def studies() -> set[str]:
    return set(optuna.get_all_study_names(STORAGE))


def files_in(folder: str) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in Path(folder).rglob("*") if file.is_file()}


def models_of(study: str) -> list[str]:
    return [each.outputs.model_outputs[0].model_id for each in trial_runs(study)]


# What there is


def test_all_that_is_stored_is_listed_with_its_size(
    data: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    run("one", data, trials=3)
    capsys.readouterr()
    assert main([]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("one "))
    assert line.split()[:5] == ["one", "sweep", "3", "4", "3"]
    size, unit = line.split()[5:7]
    expected = sum(map(len, files_in("mlruns").values()))
    assert float(size) * {"kB": 1e3, "MB": 1e6}[unit] == pytest.approx(expected, rel=0.05)


def test_where_nothing_is_recorded_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mlflow.db").unlink()
    assert main([]) == 2
    assert "there are no runs here" in capsys.readouterr().err


# A study


def test_a_study_goes_whole_and_another_stays_as_it_was(
    data: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    run("two", data)
    before = files_in("mlruns")
    run("one", data)
    removed = models_of("one")
    assert main(["one", "--yes"]) == 0
    assert studies() == {"two"}
    assert runs_of("one") == []
    assert files_in("mlruns") == before
    assert len(runs_of("two")) == 3
    client = MlflowClient()
    for model in removed:
        with pytest.raises(Exception, match="not found"):
            client.get_logged_model(model)
    assert "sweep one: 2 trials\n3 runs with 2 models in MLflow" in capsys.readouterr().out


def test_the_view_of_a_study_goes_with_it(data: Dataset) -> None:
    def tags() -> dict[str, str]:
        experiment = MlflowClient().get_experiment_by_name("tests")
        assert experiment is not None
        return dict(experiment.tags)

    run("two", data)
    kept = {each for each in tags() if "sharedViewState" in each}
    run("one", data)
    assert "sweep one, the best first" in tags()["mlflow.note.content"]
    assert main(["one", "--yes"]) == 0
    assert {each for each in tags() if "sharedViewState" in each} == kept
    assert "viewStateShareKey" not in tags()["mlflow.note.content"]
    assert tags()["mlflow.note.content"].startswith("Trainings of a CNN")


def test_a_comparison_goes_with_its_stages(data: Dataset) -> None:
    run("cmp/1/explore", data)
    run("cmp-2", data)
    record = optuna.create_study(study_name="cmp", storage=STORAGE)
    record.set_user_attr("plan", {})
    record.set_user_attr("id", "0")
    assert main(["cmp", "--yes"]) == 0
    assert studies() == {"cmp-2"}
    assert runs_of("cmp/1/explore") == []
    assert len(runs_of("cmp-2")) == 3


def test_a_run_that_another_study_links_to_stays(
    data: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    run("one", data)
    run("two", data, trials=1)
    linked, other = sorted(trial_runs("one"), key=lambda each: each.data.tags["trial"])
    two = optuna.load_study(study_name="two", storage=STORAGE)
    two.add_trial(optuna.trial.create_trial(value=0.5, user_attrs={"run_id": linked.info.run_id}))
    assert main(["one", "--yes"]) == 0
    assert [each.info.run_id for each in runs_of("one")] == [linked.info.run_id]
    assert "stays: 1 run, which study 'two' links to" in capsys.readouterr().out
    MlflowClient().get_logged_model(linked.outputs.model_outputs[0].model_id)
    assert not Path(other.info.artifact_uri.removeprefix("file://")).exists()


def test_the_run_of_a_registered_model_stays_unless_that_is_named(
    data: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    run("one", data)
    of_best = trial_runs("one")[0]
    client = MlflowClient()
    client.create_registered_model("best")
    client.create_model_version(
        "best", f"models:/{models_of('one')[0]}", run_id=of_best.info.run_id
    )
    client.set_registered_model_alias("best", "champion", "1")
    assert main(["one", "--yes"]) == 0
    assert "stays: the run of best version 1 (champion): name models:/best/1" in (
        capsys.readouterr().out
    )
    assert [each.info.run_id for each in runs_of("one")] == [of_best.info.run_id]
    # What is left of the study is still found by its name.
    assert main(["one", "models:/best/1", "--yes"]) == 0
    assert runs_of("one") == []
    assert list(client.search_registered_models()) == []


def test_a_study_that_is_being_run_stays_whole(
    data: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    run("one", data)
    run("two", data, trials=1)
    with study_lock(STORAGE, "one"):
        assert main(["two", "one", "--yes"]) == 2
    assert "study 'one' is being run by process" in capsys.readouterr().err
    assert studies() == {"one", "two"}
    assert len(runs_of("one")) == 3
    assert len(runs_of("two")) == 2


def test_on_a_server_the_runs_are_marked_as_deleted(
    data: Dataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("one", data)
    before = files_in("mlruns")
    monkeypatch.setattr(experiments.inventory.runs, "_own_store", lambda: None)
    assert main(["one", "--yes"]) == 0
    assert "`mlflow gc`, where the server is, frees the disk" in capsys.readouterr().out
    assert {each.info.lifecycle_stage for each in runs_of("one")} == {"deleted"}
    assert files_in("mlruns") == before


@pytest.mark.parametrize("column", ["artifact_uri", "model"])
def test_a_folder_that_is_not_that_of_the_run_stays(
    column: str, data: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    run("one", data)
    run_id = trial_runs("one")[0].info.run_id
    Path("photos").mkdir()
    with closing(sqlite3.connect("mlflow.db")) as database, database:
        if column == "artifact_uri":
            statement = "UPDATE runs SET artifact_uri = ? WHERE run_uuid = ?"
            place = str(Path("photos").absolute())
        else:
            statement = "UPDATE inputs SET destination_id = ? WHERE source_id = ?"
            place = "../../../photos"
        assert database.execute(statement, (place, run_id)).rowcount
    assert main(["one", "--yes"]) == 2
    assert f"nothing was removed: run {run_id} has its files at" in capsys.readouterr().err
    assert Path("photos").exists()
    assert len(runs_of("one")) == 3
    assert studies() == {"one"}


def test_a_file_that_cannot_be_removed_is_named(
    data: Dataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("one", data, trials=1)
    folder = decoded(data, "old")

    def refuse(_: Path, __: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "rename", refuse)
    assert main(["--cache", "old", "--yes"]) == 1
    assert f"can't remove '{folder}': Read-only file system" in capsys.readouterr().err
    assert folder.exists()


def test_a_study_of_another_storage_is_said_to_be_one(
    data: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    run("one", data, trials=1)
    assert main(["one", "--yes", "--storage", "sqlite:///other.db"]) == 0
    assert "study one is not in this storage: only its runs are removed" in capsys.readouterr().out
    assert runs_of("one") == []
    assert studies() == {"one"}


# What nothing refers to


def test_only_checkpoints_that_no_trial_resumes_from_are_unused(data: Dataset) -> None:
    run("one", data, trials=1, interrupts=Stopping(4))
    (unfinished,) = trial_runs("one")
    assert unfinished.data.tags["outcome"] == "interrupted"
    checkpoints = Checkpoints(digest=data.digest, data_dir=Path("data"))
    config = TrainConfig.from_params(unfinished.data.params)
    checkpoints.write(config, b"needed")
    checkpoints.write(TrainConfig(loss="l1", learning_rate=0.1, batch_size=3), b"forgotten")
    assert main(["--unused", "--yes"]) == 0
    assert files_in("data") == {checkpoints.file(config): b"needed"}
    assert main(["one", "--yes"]) == 0
    assert files_in("data") == {}


def test_no_checkpoint_goes_while_one_may_be_that_of_a_users_network(
    data: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    run("one", data, trials=1, interrupts=Stopping(4))
    (unfinished,) = trial_runs("one")
    other = MlflowClient().create_run(
        unfinished.info.experiment_id, tags={"role": "trial", "study": "x"}
    )
    MlflowClient().log_param(other.info.run_id, "network", "net.py:make")
    Path("data/checkpoints").mkdir(parents=True)
    Path("data/checkpoints/0.pt").write_bytes(b"whose?")
    assert main(["--unused", "--yes"]) == 0
    assert "no checkpoint is removed" in capsys.readouterr().out
    assert list(files_in("data").values()) == [b"whose?"]


def test_what_was_deleted_in_mlflow_is_unused(data: Dataset) -> None:
    run("one", data)
    MlflowClient().delete_run(trial_runs("one")[0].info.run_id)
    assert main(["--unused", "--yes"]) == 0
    assert len(runs_of("one")) == 2


# Decoded images


def decoded(data: Dataset, name: str) -> Path:
    """Put a data set into the cache, and return its folder."""
    images = data.train.images[:4].numpy() + (name == "new")
    pool = ImagePool(
        images=images, labels=data.train.labels[:4].numpy(), classes=("a", "b", "c"), given_test=0
    )
    source = DatasetSource(
        name=name, address=f"/images/{name}", fingerprint=list, read=lambda _: pool
    )
    digest, _ = add_entry(Path("data/cache"), name, source)
    return Path("data/cache") / digest


def test_decoded_images_go_by_name_or_where_no_start_finds_them(
    data: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = decoded(data, "old"), decoded(data, "new")
    Path("data/cache/index/old.json").unlink()
    assert main([]) == 0
    out = capsys.readouterr().out
    assert [line.split()[3] for line in out.splitlines() if " images, from " in line] == [
        *("yes", "no")
    ]
    assert main(["--unused", "--yes"]) == 0
    assert not old.exists()
    assert new.exists()
    assert main(["--cache", "new", "--yes"]) == 0
    assert not new.exists()
    assert main(["--cache", "new", "--yes"]) == 2
    assert "there are no decoded images of 'new'" in capsys.readouterr().err


# Asking


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("onne", "there is nothing named 'onne' here (did you mean one?)"),
        ("models:/x", "there is no registered model 'models:/x'"),
    ],
)
def test_an_unknown_name_removes_nothing(
    name: str, expected: str, data: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    run("one", data, trials=1)
    assert main(["one", name, "--yes"]) == 2
    assert expected in capsys.readouterr().err
    assert len(runs_of("one")) == 2


def test_without_a_terminal_it_asks_for_yes(
    data: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    run("one", data, trials=1)
    assert main(["one"]) == 2
    assert "--yes removes without asking" in capsys.readouterr().err
    assert len(runs_of("one")) == 2


@pytest.mark.parametrize(("answer", "is_removed"), [("y", True), ("", False), ("no", False)])
def test_it_removes_after_a_yes(
    answer: str, is_removed: bool, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("one", data, trials=1)
    type_at_a_terminal(monkeypatch, answer)
    assert main(["one"]) == (0 if is_removed else 1)
    assert (runs_of("one") == []) == is_removed
