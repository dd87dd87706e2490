"""Recorded models behind MLflow's own ways: `mlflow models serve`, and pyfunc without our code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import requests
import torch
import yaml
from model_server import serving
from tracking_helpers import COLOURS, ColourModel, log_model, new_store

from tracking.models.predictor import load_model
from tracking.models.recording import save_model
from tracking.registry import Registry
from tracking.selection import load_best
from tracking.tracker import Tracker

ROOT = Path(__file__).parents[1]
CHAMPION = "models:/colours@champion"
EXAMPLES = np.zeros((2, 32, 32, 3), np.uint8)


def images(count: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(count).integers(0, 256, (count, 32, 32, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder, as it is recorded."""
    folder = tmp_path_factory.mktemp("recorded") / "model"
    classes = {"classes": list(COLOURS)}
    save_model(ColourModel().eval(), folder, input_example=EXAMPLES, metadata=classes)
    return folder


# Served


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder with a store, in which a model is registered and champion."""
    folder = tmp_path_factory.mktemp("store")
    with new_store(folder):
        tracker = Tracker.open("study")
        run = tracker.start_run("run")
        log_model(run)
        run.end("complete")
        registry = Registry(client=tracker.client, name="colours")
        registry.promote_run(tracker.client.get_run(run.run_id))
        yield folder


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[str]:
    """The real server; gives the address for images."""
    with serving(CHAMPION, store) as address:
        yield address


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 50])
def test_a_served_model_gives_the_same_probabilities(server: str, count: int) -> None:
    batch = images(count)
    answer = requests.post(server, json={"inputs": batch.tolist()}, timeout=60)
    assert answer.status_code == 200, answer.text
    served = np.array(answer.json()["predictions"], np.float32)
    np.testing.assert_array_equal(served, load_model(CHAMPION).probabilities(batch))


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong",
    [
        {"inputs": images(2)[:, :31].tolist()},
        {"inputs": images(2)[0].tolist()},
        {"inputs": (images(2) + 256.0).tolist()},
        {"inputs": (images(2).astype(int) - 256).tolist()},
        {"inputs": [["red"]]},
        {"inputs": [[1, 2], [3]]},
        {"inputs": []},
        {"inputs": None},
        {"images": images(2).tolist()},
        "images",
    ],
    ids=["size", "one", "large", "negative", "text", "ragged", "none", "null", "key", "no mapping"],
)
def test_other_input_is_the_clients_fault(server: str, wrong: Any) -> None:
    answer = requests.post(server, json=wrong, timeout=60)
    assert answer.status_code == 400
    assert answer.json()["error_code"]
    assert "Traceback" not in answer.text


# Without this project's code

PREDICT = """
import sys
sys.modules.update(dict.fromkeys(["cnn", "experiments", "tracking"]))  # can't be imported
import mlflow, numpy

model, images, probabilities = sys.argv[1:]
numpy.save(probabilities, mlflow.pyfunc.load_model(model).predict(numpy.load(images)))
"""


@pytest.mark.slow
def test_a_model_is_loaded_by_mlflow_where_there_is_none_of_our_code(
    folder: Path, tmp_path: Path
) -> None:
    batch = images(7)
    np.save(tmp_path / "images.npy", batch)
    files = [str(folder), "images.npy", "probabilities.npy"]
    done = subprocess.run(
        [sys.executable, "-I", "-c", PREDICT, *files],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = load_model(str(folder)).probabilities(batch)
    np.testing.assert_array_equal(np.load(tmp_path / "probabilities.npy"), expected)


def test_a_model_needs_mlflow_pytorch_and_numpy_alone(folder: Path) -> None:
    def names(requirements: list[str]) -> set[str]:
        return {re.split("[=<>]", requirement)[0] for requirement in requirements}

    conda = yaml.safe_load((folder / "conda.yaml").read_text())
    *_, pip = conda["dependencies"]
    assert names((folder / "requirements.txt").read_text().split()) == {"mlflow", "torch", "numpy"}
    assert names(pip["pip"]) == {"mlflow", "torch", "numpy"}
    about = yaml.safe_load((folder / "MLmodel").read_text())
    assert about["flavors"]["python_function"]["loader_module"] == "mlflow.pytorch"
    assert not (folder / "code").exists()


# Devices


def test_where_there_is_a_gpu_pyfunc_takes_the_cpu_all_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    model = mlflow.pyfunc.load_model(str(folder))
    np.testing.assert_array_equal(
        model.predict(images(3)), load_model(str(folder)).probabilities(images(3))
    )


def test_else_mlflow_would_take_the_gpu_and_fail(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(mlflow.MlflowException, match="can't be loaded on 'cuda' device"):
        mlflow.pyfunc.load_model(str(folder), model_config={"device": None})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_machine_with_a_gpu_mlflow_and_we_give_the_same(folder: Path) -> None:
    expected = load_model(str(folder)).probabilities(images(3))
    found = mlflow.pyfunc.load_model(str(folder)).predict(images(3))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
            ],
        ),
    ],
)
def test_a_model_is_recorded_for_the_cpu_wherever_it_was_trained(
    mlflow_store: str, tmp_path: Path, device: str
) -> None:
    command = [sys.executable, "-m", "experiments.sweep", "--device", device, "--losses", "mse"]
    command += ["--trials", "1", "--epochs", "1", "--workers", "1", "--experiment", "trained"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    predictor = load_best("trained")
    run = mlflow.get_run(str(predictor.run_id))
    assert run.data.params["device"] == device
    expected = predictor.probabilities(images(3))
    np.testing.assert_array_equal(
        mlflow.pyfunc.load_model(predictor.uri).predict(images(3)), expected
    )


def test_a_model_on_another_device_is_not_recorded(tmp_path: Path) -> None:
    model = ColourModel().to("meta").eval()
    classes = {"classes": list(COLOURS)}
    with pytest.raises(ValueError, match="recorded from the CPU, .* its scale is on meta"):
        save_model(model, tmp_path / "model", input_example=EXAMPLES, metadata=classes)
