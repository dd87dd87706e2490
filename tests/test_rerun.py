from __future__ import annotations

import math
import os
import shutil
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from fake_pool import fails, script_of_ten, use_pool
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image
from real_workers import config as real_config
from tracking_helpers import new_store

from cnn.config import TrainConfig
from experiments import rerun, sweep
from experiments.engine.base import EpochEnded, Event
from experiments.study.recorded import compare_curves, read_trial
from tracking import selection
from tracking.run_search import model_uri

SWEEP = ["--trials", "2", "--epochs", "3", "--workers", "1", "--pruner", "none", "--study", "s"]


@pytest.fixture(scope="module")
def swept(
    tmp_path_factory: pytest.TempPathFactory, traced_once: None, digits_cache: Path
) -> Iterator[Path]:
    """A folder in which a sweep of two trials was made."""
    folder = tmp_path_factory.mktemp("swept")
    (folder / "data").symlink_to(digits_cache)
    with new_store(folder), pytest.MonkeyPatch.context() as patch:
        use_pool(patch, script_of_ten)
        assert sweep.main(SWEEP) == 0
    return folder


@pytest.fixture(autouse=True)
def there(swept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work where the sweep was made, with a pool that repeats it."""
    monkeypatch.chdir(swept)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{swept / 'mlflow.db'}")
    use_pool(monkeypatch, script_of_ten)


def runs(role: str) -> list[Run]:
    found = MlflowClient().search_runs(
        ["1"], f"tags.role = '{role}'", order_by=["attributes.start_time DESC"]
    )
    return list(found)


def trial_run(number: int = 0) -> Run:
    return next(run for run in runs("trial") if run.data.tags["trial"] == str(number))


def trial_id(number: int = 0) -> str:
    return str(trial_run(number).info.run_id)


def newest() -> Run:
    return runs("rerun")[0]


def other_script(job: int, config: TrainConfig) -> Iterable[Event]:
    """As `script_of_ten`, but with another loss from the second epoch on."""
    for event in script_of_ten(job, config):
        if isinstance(event, EpochEnded) and event.number >= 2:
            event.metrics["val/loss"] += 0.5 / event.number
        yield event


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Return the one line of an exit with code 2, after which no run is new."""
    before = len(MlflowClient().search_runs(["1"]))
    assert rerun.main(list(argv)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert len(MlflowClient().search_runs(["1"])) == before
    return line.removeprefix("python -m experiments.rerun: error: ")


def test_a_rerun_that_repeats_the_trial_is_equal_bit_for_bit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert rerun.main([trial_id()]) == 0
    out = capsys.readouterr().out
    assert "equal bit for bit in all 3 epochs of the trial\n" in out
    assert "nothing differs: the same code, versions, processor and threads\n" in out
    assert newest().data.tags["rerun_result"].startswith("equal")


def test_a_curve_that_differs_is_told_by_how_much_and_from_which_epoch_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_pool(monkeypatch, other_script)
    assert rerun.main([trial_id()]) == 1
    expected = "differs from epoch 2 of 3 on: val/loss by 0.25 at most (epoch 2)\n"
    assert expected in capsys.readouterr().out


def test_a_rerun_is_recorded_as_a_trial_is_and_linked_to_it() -> None:
    rerun.main([trial_id(1)])
    trial, run = trial_run(1), newest()
    assert run.data.params == trial.data.params
    assert run.data.tags["rerun_of"] == run.data.tags["mlflow.parentRunId"] == trial.info.run_id
    assert run.data.tags["outcome"] == "complete"
    assert run.info.status == "FINISHED"
    assert run.info.run_name == f"rerun of {trial.info.run_name}"
    same = ("code.commit", "code.source", "worker.processor", "worker.threads")
    assert {name: run.data.tags[name] for name in same} == {
        name: trial.data.tags[name] for name in same
    }
    assert model_uri(run) != model_uri(trial)


def test_other_values_make_a_variation(capsys: pytest.CaptureFixture[str]) -> None:
    assert rerun.main([trial_id(), "--seed", "7", "--epochs", "2", "--momentum", "0.5"]) == 0
    out = capsys.readouterr().out
    assert "variation: seed 0 → 7\n" in out
    assert "equal bit for bit" not in out
    run = newest()
    assert run.data.tags["rerun_changes"] == "epochs=2, seed=7, momentum=0.5"
    assert (run.data.params["seed"], run.data.params["momentum"]) == ("7", "0.5")
    assert run.data.params["learning_rate"] == trial_run().data.params["learning_rate"]


def test_a_value_that_is_that_of_the_trial_varies_nothing() -> None:
    assert rerun.main([trial_id(), "--epochs", "3", "--loss", trial_run().data.params["loss"]]) == 0
    assert "rerun_changes" not in newest().data.tags


def test_a_rerun_can_be_repeated_and_finds_the_data_of_the_sweep() -> None:
    rerun.main([trial_id(), "--seed", "3"])
    variation = newest().info.run_id
    assert rerun.main([variation]) == 0
    assert newest().data.tags["rerun_of"] == variation


def test_reruns_are_not_chosen_as_the_best_run() -> None:
    rerun.main([trial_id(), "--weight-decay", "0.1"])
    best = MlflowClient().get_run(newest().info.run_id)
    assert best.data.metrics["val/accuracy"] == trial_run().data.metrics["val/accuracy"]
    # All else alike, the newest data set, the count and the order would show it.
    MlflowClient().log_metric(best.info.run_id, "val/accuracy", 0.99, step=4)
    chosen = selection.choose()
    assert chosen.run.info.run_id == trial_id()
    assert {run.data.tags["role"] for run in chosen.ranked} == {"trial"}
    with pytest.raises(ValueError, match="no finished run"):
        selection.best_run(where="tags.role = 'rerun'")


def test_a_failed_training_ends_its_run_as_failed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_pool(monkeypatch, fails)
    assert rerun.main([trial_id()]) == 1
    assert capsys.readouterr().err == "failed: RuntimeError: no luck\n"
    assert newest().data.tags["outcome"] == "failed"


def test_a_signal_ends_the_run_as_interrupted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def script(job: int, config: TrainConfig) -> Iterable[Event]:
        os.kill(os.getpid(), signal.SIGTERM)
        return script_of_ten(job, config)

    use_pool(monkeypatch, script)
    assert rerun.main([trial_id()]) == 130
    assert capsys.readouterr().err == "interrupted: the same command starts again\n"
    assert newest().data.tags["outcome"] == "interrupted"
    assert newest().info.status == "KILLED"


def test_what_differs_now_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, run_id = MlflowClient(), trial_id(1)
    before = trial_run(1).data.tags
    try:
        client.set_tag(run_id, "code.torch", "1.0")
        client.set_tag(run_id, "worker.threads", "7")
        client.delete_tag(run_id, "worker.processor")
        rerun.main([run_id])
    finally:
        for key in ("code.torch", "worker.threads", "worker.processor"):
            client.set_tag(run_id, key, before[key])
    out = capsys.readouterr().out
    assert "differs now: torch 1.0 → " in out
    assert "differs now: threads 7 → 1\n" in out
    assert "not recorded, and may differ: processor\n" in out


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--momentum", "1.5"], "momentum must be ≥ 0 and < 1, not 1.5"),
        (["--epochs", "0"], "epochs must be an integer ≥ 1, not 0"),
        (["--loss", "no.such:loss"], "'no.such:loss': there is no module 'no'"),
        (["--network", "nets.py:net"], "'nets.py:net': there is no file"),
        (["--batch-size", "5000"], "batch size 5000 is larger than the training split of digits"),
        (["--dataset", "nowhere"], "unknown data set 'nowhere'"),
        (["--device", "cuda:77"], "device 'cuda:77' is not here"),
        (["--momentun", "1"], "unrecognized arguments: --momentun 1 (did you mean --momentum"),
        (["--tracking-timeout", "-1"], "--tracking-timeout must be seconds ≥ 0, not -1.0"),
    ],
)
def test_a_bad_value_is_one_line_and_records_nothing(
    capsys: pytest.CaptureFixture[str], argv: list[str], line: str
) -> None:
    assert error_of(capsys, trial_id(), *argv).startswith(line)


def test_a_run_that_is_no_trial_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    (parent,) = runs("sweep")
    line = error_of(capsys, parent.info.run_id)
    assert line.endswith("is no trial's run, but that of a sweep: choose a trial's")
    assert error_of(capsys, "nope").startswith("there is no run 'nope' at sqlite:")
    run = MlflowClient().create_run("1", run_name="mine")
    assert "not one of this tool" in error_of(capsys, run.info.run_id)
    MlflowClient().delete_run(run.info.run_id)
    assert f"mlflow runs restore --run-id {run.info.run_id}" in error_of(capsys, run.info.run_id)


def test_another_data_set_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for number in range(20):
        file = tmp_path / f"photos/{number % 2}/{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((32, 32, 3), number, np.uint8)).save(file)
    folder = str(tmp_path / "photos")
    line = error_of(capsys, trial_id(), "--dataset", folder, "--data-dir", str(tmp_path / "data"))
    assert line.startswith(f"the data set {folder!r} has the digest ")


def test_a_configuration_is_read_back_from_its_params() -> None:
    config = real_config(warmup=0.25, learning_rate=1 / 3, optimizer="adam", seed=2**32 - 1)
    params = {name: str(value) for name, value in config.as_params().items()}
    assert TrainConfig.from_params(params) == config
    earlier = {name: params[name] for name in ("loss", "learning_rate", "batch_size", "epochs")}
    assert TrainConfig.from_params(earlier) == real_config(learning_rate=1 / 3)
    with pytest.raises(ValueError, match="its param epochs is 'ten': no int"):
        TrainConfig.from_params(params | {"epochs": "ten"})
    with pytest.raises(ValueError, match="have no loss"):
        TrainConfig.from_params({})


def test_curves_are_equal_where_both_are_nan_or_infinite() -> None:
    stored = {1: {"val/loss": math.nan, "train/loss": 1.7976931348623157e308}}
    assert compare_curves(stored, {1: {"val/loss": math.nan, "train/loss": math.inf}}).first is None
    assert compare_curves(stored, {1: {"val/loss": 1.0, "train/loss": math.inf}}).first == 1
    assert compare_curves(stored, {}).first == 1


def test_a_real_worker_repeats_a_trial_bit_for_bit_and_leaves_its_checkpoint(
    swept: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    digits_cache: Path,
) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shutil.copy(swept.parent / "empty-mlflow.db", tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    (tmp_path / "data").symlink_to(digits_cache)
    arguments = ["--trials", "1", "--epochs", "2", "--losses", "mse", "--batch-sizes", "128"]
    assert sweep.main([*arguments, "--workers", "1"]) == 0
    trial = read_trial(trial_id())
    checkpoint = tmp_path / "data/checkpoints"
    checkpoint.mkdir(exist_ok=True)
    before = sorted(checkpoint.iterdir())
    assert rerun.main([trial.run_id]) == 0
    assert "equal bit for bit in all 2 epochs" in capsys.readouterr().out
    assert sorted(checkpoint.iterdir()) == before
