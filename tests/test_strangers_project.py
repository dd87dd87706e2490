"""A stranger's network, loss and data set, by flags alone: `examples/strangers_project`."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import numpy as np
import pytest
import requests
from mlflow import MlflowClient
from model_server import serving

REPOSITORY = Path(__file__).parents[1]
PROJECT = REPOSITORY / "examples" / "strangers_project"

OWN = ["--dataset", "data.py:shapes", "--network", "network.py:small_net"]
OWN += ["--losses", "losses.py:tilted", "cross_entropy"]
SWEEP = ["experiments.sweep", *OWN, "--trials", "3", "--epochs", "4", "--workers", "1"]
SWEEP += ["--pruner", "none", "--sampler", "random", "--batch-sizes", "32"]
SWEEP += ["--learning-rate-max", "0.05"]  # so that none diverges: NaN is not equal to itself
SWEEP += ["--vary", "weight_decay=1e-5..1e-2:log"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    return kept | {"PYTHONPATH": str(REPOSITORY), "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Path:
    """The project, with a sweep that was not disturbed."""
    folder = tmp_path_factory.mktemp("stranger") / "project"
    shutil.copytree(PROJECT, folder)
    run(SWEEP, folder, environment)
    return folder


def run(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def curves(folder: Path) -> dict[str, list[float]]:
    """Return the validation losses of each trial, by the names of the runs."""
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    return {
        run.info.run_name: [
            metric.value for metric in client.get_metric_history(run.info.run_id, "val/loss")
        ]
        for run in client.search_runs(["1"], "tags.role = 'trial'")
    }


def test_no_file_of_the_packages_names_it() -> None:
    for package in ("cnn", "tracking", "experiments"):
        for file in (REPOSITORY / package).rglob("*.py"):
            assert not re.search(r"stranger|small_net|tilted", file.read_text()), file


def test_a_sweep_that_was_killed_resumes_bit_for_bit(
    swept: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    folder = tmp_path / "project"
    shutil.copytree(PROJECT, folder)
    with subprocess.Popen(
        [sys.executable, "-m", *SWEEP],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        while not list(folder.glob("data/checkpoints/*.pt")):
            assert process.poll() is None
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    run(SWEEP, folder, environment)
    assert curves(folder) == curves(swept)
    assert len(curves(folder)) == 3


def test_on_ray_it_comes_to_the_same(
    swept: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    pytest.importorskip("ray")
    folder = tmp_path / "project"
    shutil.copytree(PROJECT, folder)
    run([*SWEEP, "--engine", "ray"], folder, environment)
    assert curves(folder) == curves(swept)


def test_the_winner_is_promoted_served_and_predicts(
    swept: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = run(["tracking.predict", "data.py:shapes:test"], swept, environment)
    assert re.search(r"accuracy \d\d\.\d\d %", told)
    assert "the champion" in run(["tracking.promote", "cnn-data.py-shapes"], swept, environment)
    monkeypatch.chdir(swept)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{swept}/mlflow.db")
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)
    model = "models:/cnn-data.py-shapes@champion"
    with serving(model, swept) as address:
        answer = requests.post(address, json={"inputs": images.tolist()}, timeout=60)
    served = np.array(answer.json()["predictions"], np.float32)
    assert served.shape == (3, 3)
    np.testing.assert_array_equal(served, mlflow.pyfunc.load_model(model).predict(images))


def test_its_loss_is_compared(swept: Path, environment: dict[str, str]) -> None:
    command = ["experiments.compare", *OWN, "--trials", "1", "--epochs", "1", "--searches", "2"]
    told = run([*command, "--batch-sizes", "64", "--study", "c"], swept, environment)
    assert "`losses.py:tilted`" in told
    assert (swept / "reports" / "c" / "report.html").exists()
