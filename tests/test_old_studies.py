"""A study that an old version began is continued, and its model is loaded.

`fixtures/study_of_7a5dd7e.tar.xz` was made in /tmp/old, at commit 7a5dd7e, by

    python -m experiments.sweep --trials 1 --epochs 3 --losses mse --batch-sizes 64 --workers 1 \\
        --learning-rate-min 0.1 --learning-rate-max 0.2 --study old
"""

from __future__ import annotations

import re
import sqlite3
import tarfile
from contextlib import closing
from pathlib import Path

import pytest
from fake_pool import script_of_ten, use_pool
from mlflow import MlflowClient
from optuna.trial import TrialState, create_trial

from experiments.comparison.loading import Found, _Histories
from experiments.study.recorded import read_trial
from experiments.sweep import main
from tracking import load_best
from tracking.predict import main as predict

ARCHIVE = Path(__file__).parent / "fixtures" / "study_of_7a5dd7e.tar.xz"
OF_PATHS = {
    "runs": "artifact_uri",
    "logged_models": "artifact_location",
    "experiments": "artifact_location",
    "model_versions": "storage_location",
}
COMMAND = ["--epochs", "3", "--losses", "mse", "--batch-sizes", "64", "--study", "old"]
COMMAND += ["--learning-rate-min", "0.1", "--learning-rate-max", "0.2"]


@pytest.fixture(autouse=True)
def old(mlflow_store: str, digits_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working folder is that of the old study."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(".", filter="data")
    with closing(sqlite3.connect("mlflow.db")) as database, database:
        for table, column in OF_PATHS.items():
            database.execute(
                f"UPDATE {table} SET {column} = replace({column}, '/tmp/old', ?)", [str(Path.cwd())]
            )
    Path("data").symlink_to(digits_cache)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")


def test_it_is_continued(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_pool(monkeypatch, script_of_ten)
    assert main(["--trials", "2", *COMMAND]) == 0
    assert "2 trials of 3 epochs, 1 already finished" in capsys.readouterr().out
    runs = MlflowClient().search_runs(["1"], "tags.role = 'trial'", order_by=["start_time"])
    assert [run.data.tags["trial"] for run in runs] == ["0", "1"]
    before, after = (run.data.params for run in runs)
    assert before["dataset_digest"] == after["dataset_digest"]


def test_the_earlier_names_of_its_metrics_are_read() -> None:
    (run,) = MlflowClient().search_runs(["1"], "tags.role = 'trial'")
    assert {"learning_rate", "time/epoch_seconds"} <= set(run.data.metrics)
    curve = read_trial(run.info.run_id).curve
    assert list(curve) == [1, 2, 3]
    for metrics in curve.values():
        assert set(metrics) == {
            *("train/loss", "train/accuracy", "train/learning_rate", "val/loss", "val/accuracy")
        }


def test_a_trial_with_both_names_of_a_metric_has_all_its_epochs() -> None:
    client = MlflowClient()
    (run,) = client.search_runs(["1"], "tags.role = 'trial'")
    before = client.get_metric_history(run.info.run_id, "time/epoch_seconds")
    client.log_metric(run.info.run_id, "worker/epoch_seconds", 0.25, step=4)
    trial = create_trial(state=TrialState.FAIL, user_attrs={"run_id": run.info.run_id})
    row = _Histories(client).row(Found(trial, {}))
    assert row["seconds"] == pytest.approx(sum(entry.value for entry in before) + 0.25)
    assert row["images_per_second"] > 0


def test_its_model_predicts(capsys: pytest.CaptureFixture[str]) -> None:
    assert predict(["digits:test"]) == 0
    (accuracy,) = re.findall(r"^accuracy ([0-9.]+) %", capsys.readouterr().out, re.M)
    assert float(accuracy) > 80
    assert load_best().classes == tuple("0123456789")
