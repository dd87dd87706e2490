from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_pool import diverges, script_of_ten, use_pool
from mlflow import MlflowClient
from mlflow.tracking._tracking_service.utils import _get_store
from optuna import get_all_study_names, load_study
from optuna.trial import TrialState
from PIL import Image

from cnn.config import PRECISIONS
from cnn.devices import num_cores
from cnn.losses import LOSSES
from cnn.optimizers import OPTIMIZERS, SCHEDULES
from experiments.engine.launch import _num_workers
from experiments.study.pruners import PRUNERS
from experiments.study.samplers import SAMPLERS
from experiments.study.settings import Settings
from experiments.sweep import build_parser, main
from tracking.run_search import model_uri

REPOSITORY = Path(__file__).parents[1]
SMALL = ["--trials", "2", "--epochs", "2"]


@pytest.fixture(autouse=True)
def small_world(mlflow_store: str, monkeypatch: pytest.MonkeyPatch, digits_cache: Path) -> None:
    """Each test has its own folder, which the decoded digits are in already."""
    (Path.cwd() / "data").symlink_to(digits_cache)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    use_pool(monkeypatch, script_of_ten)


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Return the one line of an exit with code 2."""
    assert main(list(argv)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m experiments.sweep: error: ")
    return line


def test_the_help_names_every_choice() -> None:
    text = build_parser().format_help()
    for names in (LOSSES, SAMPLERS, PRUNERS, OPTIMIZERS, SCHEDULES, PRECISIONS):
        for name in names:
            assert re.search(rf"\b{name}\b", text), name


@pytest.mark.parametrize(
    ("option", "table"),
    [
        ("--sampler", SAMPLERS),
        ("--pruner", PRUNERS),
        ("--optimizer", OPTIMIZERS),
        ("--schedule", SCHEDULES),
        ("--precision", ["auto", *PRECISIONS]),
    ],
)
def test_the_choices_of_an_option_are_those_of_its_table(option: str, table: object) -> None:
    (action,) = (a for a in build_parser()._actions if option in a.option_strings)
    assert action.choices is not None
    assert list(action.choices) == list(table)  # type: ignore[call-overload]


def test_every_setting_is_an_option() -> None:
    own = {"search", "training", "configurations", "tags", "worker_device"}
    assert set(Settings.__dataclass_fields__) - own <= set(vars(build_parser().parse_args([])))


def test_a_sweep_ends_with_its_table_its_best_and_what_to_type_next(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*SMALL, "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert re.search(
        r"\nall trials, the best first:\n"
        r"0  complete +90.00%  \w+ +lr [\d.e-]+ +bs \d+ +2 epochs\n"
        r"1  pruned +44.50%  \w+ +lr [\d.e-]+ +bs \d+ +1 epoch\n\n",
        out,
    )
    assert re.search(r"best: trial 0, loss \w+, learning rate [\d.e-]+, batch size \d+", out)
    assert "validation accuracy 90.00%" in out
    assert "mlflow ui\n" in out
    (predict,) = re.findall(r"python -m (tracking.predict .*)", out)
    assert predict.startswith("tracking.predict digits:test --run-id ")


def test_a_line_is_printed_for_each_trial_as_it_ends(capsys: pytest.CaptureFixture[str]) -> None:
    main([*SMALL, "--workers", "1", "--pruner", "none"])
    line = r"^(\d)/2  trial (\d)  complete +(\d\d).00%  .* 2 epochs +\d+\.\d s$"
    rows = re.findall(line, capsys.readouterr().out, re.M)
    assert rows == [("1", "0", "90"), ("2", "1", "89")]


def test_the_same_command_again_does_nothing_and_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main(SMALL)
    capsys.readouterr()
    assert main(SMALL) == 0
    out = capsys.readouterr().out
    assert "2 already finished" in out
    assert "nothing is left to do" in out
    assert "best: trial 0" in out


def test_a_trial_that_another_tool_ended_without_parameters_is_a_row_with_dashes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main([*SMALL, "--pruner", "none"])
    (name,) = get_all_study_names("sqlite:///optuna.db")
    study = load_study(study_name=name, storage="sqlite:///optuna.db")
    study.tell(study.ask(), state=TrialState.FAIL)
    capsys.readouterr()
    assert main(["--trials", "3", *SMALL[2:], "--pruner", "none"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"\n2  fail +–  – +lr – +bs – +0 epochs\n", out)
    assert re.search(r"\n0  complete +90.00%  \w+ +lr [\d.e-]+ +bs (16|32|64|128) ", out)


def test_a_best_trial_whose_run_was_deleted_for_good_is_passed_over_and_said_to_be(
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = [*SMALL, "--workers", "1", "--pruner", "none"]
    main(argv)
    (run_id,) = re.findall(r"--run-id (\w+)", capsys.readouterr().out)
    MlflowClient().delete_run(run_id)
    _get_store()._hard_delete_run(run_id)  # as `mlflow gc` does
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert "best: trial 1, " in out
    assert "note: skipped trials whose run or model was deleted: 0 (90.00%)" in err
    (other,) = re.findall(r"--run-id (\w+)", out)
    assert model_uri(MlflowClient().get_run(other))
    MlflowClient().delete_run(other)
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert "best: trial 0, " in out
    assert "no complete trial has a model any more" in out
    assert "--run-id" not in out
    assert "deleted: 0 (90.00%), 1 (89.00%)" in err


def test_a_sweep_without_a_complete_trial_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_pool(monkeypatch, diverges)
    assert main(SMALL) == 1
    assert "is complete" in capsys.readouterr().err


def test_lists_are_taken_with_spaces_or_commas_and_all_is_all(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Settings] = []

    def keep(_: object, settings: Settings, *__: object) -> None:
        seen.append(settings)
        raise ValueError("seen")

    monkeypatch.setattr("experiments.sweep._sweep", keep)
    main(["--losses", "l1 mse", "--batch-sizes", "8,16"])
    main(["--losses", "l1", "mse", "--batch-sizes", "8", "16"])
    main(["--losses", "all"])
    assert seen[0].search["batch_size"].values == (8, 16)
    assert seen[0].losses == ("l1", "mse")
    assert seen[0] == seen[1]
    assert seen[2].losses == tuple(LOSSES)


def test_tensorboard_files_hold_every_metric(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    main([*SMALL, "--tensorboard", str(tmp_path / "tb")])
    folders = sorted((tmp_path / "tb").iterdir())
    assert [folder.name[:3] for folder in folders] == ["000", "001"]
    events = EventAccumulator(str(folders[0])).Reload()
    assert [event.step for event in events.Scalars("val/accuracy")] == [1, 2]
    assert events.Scalars("val/accuracy")[-1].value == pytest.approx(0.9)


def test_a_disk_that_is_full_of_event_files_stops_a_sweep_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full)
    assert main([*SMALL, "--tensorboard", str(tmp_path / "tb")]) == 1
    assert capsys.readouterr().err == (
        "stopped: can't write TensorBoard's event files: No space left on device; "
        "the same command continues the study\n"
    )
    client = MlflowClient()
    (experiment,) = client.search_experiments(filter_string="name = 'cnn-sweep'")
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} == {"KILLED"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--losses", "hinge"], "unknown loss 'hinge'"),
        (["--dataset", "minst"], "unknown data set 'minst'"),
        (["--dataset", "none.py:load"], "'none.py:load': there is no file"),
        (["--image-size", "7"], "the image size must be from 8 to 512 pixels: 7"),
        (["--sampler", "cma"], "argument --sampler: invalid choice: 'cma'"),
        (["--pruner", "x"], "argument --pruner: invalid choice: 'x'"),
        (["--learning-rate-min", "0"], "--learning-rate-min must be finite and > 0, not 0.0"),
        (["--learning-rate-min", "-1"], "--learning-rate-min must be finite and > 0, not -1.0"),
        (["--learning-rate-max", "inf"], "--learning-rate-max must be finite and > 0, not inf"),
        (["--learning-rate-max", "nan"], "--learning-rate-max must be finite and > 0, not nan"),
        (["--learning-rate-min", "2"], "--learning-rate-min 2.0 must be smaller than"),
        (["--batch-sizes", "0"], "batch_size must be an integer ≥ 1, not 0"),
        (["--batch-sizes", "64", "many"], "--batch-sizes takes integers ≥ 1, not 'many'"),
        (["--batch-sizes", "100000"], "batch size 100000 is larger than the training split"),
        (["--epochs", "0"], "epochs must be an integer ≥ 1, not 0"),
        (["--trials", "-1"], "--trials must be ≥ 1, not -1"),
        (["--trials", "x"], "argument --trials: invalid int value: 'x'"),
        (["--seed", "-1"], "seed must be an integer from 0"),
        (["--workers", "0"], "--workers must be ≥ 1, not 0"),
        (["--timeout", "-1"], "--timeout must be seconds ≥ 0"),
        (["--device", "tpu"], "device 'tpu' is not here"),
        (["--storage", "sqlite:////proc/none/o.db"], "'sqlite:////proc/none/o.db' can't be opened"),
        (
            ["--storage", "optuna.db"],
            "'optuna.db' is not the address of a database: use sqlite:///",
        ),
        (
            ["--tensorboard", "/dev/null"],
            "can't write --tensorboard: there is no folder '/dev/null'",
        ),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
    ],
)
def test_bad_input_is_one_line_and_records_nothing(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert message in error_of(capsys, *argv)
    assert not Path("mlruns").exists()
    assert not list(Path.cwd().glob("*.db.*.lock"))


def test_a_tracking_store_that_cannot_be_opened_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////proc/nowhere/mlflow.db")
    assert "can't make MLflow's database '/proc/nowhere/mlflow.db'" in error_of(capsys, *SMALL)


def test_a_tracking_server_that_is_away_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 doesn't answer" in error_of(capsys, *SMALL)


def test_a_folder_with_a_file_that_is_no_image_is_refused_by_its_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in "ab":
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for i in range(4):
            Image.fromarray(np.full((8, 8), i, np.uint8)).save(folder / f"{i}.png")
    (tmp_path / "images" / "b" / "notes.txt").write_text("no image")
    assert "notes.txt" in error_of(capsys, "--dataset", str(tmp_path / "images"))


def test_bad_input_in_a_process_of_its_own_has_no_traceback() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "experiments.sweep", "--losses", "hinge"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=False,
    )
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "unknown loss 'hinge'" in result.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("hangup_ends")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_ends_a_real_sweep_in_order(tmp_path: Path, number: int) -> None:
    argv = ["--trials", "50", "--epochs", "50", "--data-dir", "data", "--workers", "1"]
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "experiments.sweep", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    ) as process:
        assert process.stdout is not None
        assert any(line.startswith("study digits-") for line in process.stdout)
        process.send_signal(number)
        _, err = process.communicate()
        assert process.returncode == 130
    assert err == "interrupted: the same command continues the study\n"


@pytest.mark.parametrize(
    ("asked", "device", "num_gpus", "expected"),
    [
        (None, "auto", 0, num_cores()),
        (None, "cpu", 0, num_cores()),
        (None, "auto", 4, 4),
        (None, "cuda", 0, 1),
        (None, "cuda:1", 0, 1),
        (3, "auto", 2, 3),
    ],
)
def test_there_is_one_worker_for_each_core_or_gpu_unless_told(
    asked: int | None, device: str, num_gpus: int, expected: int
) -> None:
    assert _num_workers(asked, device, num_gpus) == expected
