"""`benchmarks.gpu`, tried on the CPU, so that it works when a GPU is there for a few minutes."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import gpu, gpu_checks, tutorial
from benchmarks.common import made_up
from benchmarks.gpu import measure_accuracy, measure_speed
from benchmarks.gpu_checks import require, run_checks
from cnn.config import PRECISIONS

# What a machine with PyTorch and NumPy alone does not have.
ABSENT = "PIL matplotlib mlflow optuna pandas psutil pyarrow pytest requests rich scipy sklearn"
ABSENT += " sqlalchemy torchvision"

WITHOUT = """
import runpy, sys
absent, sys.argv = sys.argv[1].split(), ["benchmarks.gpu", *sys.argv[2:]]
sys.modules.update(dict.fromkeys(absent))  # importing one of them raises an ImportError
runpy.run_module("benchmarks.gpu", run_name="__main__")
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT, ABSENT, *arguments],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=450,
        check=False,
    )


@pytest.mark.slow
def test_it_runs_with_pytorch_and_numpy_alone() -> None:
    done = run("--device", "cpu", "--seconds", "1", "--images", "160", "--batch-sizes", "16", "64")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert torch.__version__ in lines[0]
    assert lines[-1].endswith("All holds.")
    assert sum("| holds |" in line for line in lines) == len(gpu_checks.CHECKS)
    baseline = gpu.TUTORIAL.split(",")[0]
    for batch_size, way in itertools.product((16, 64), (baseline, *PRECISIONS)):
        rows = [line for line in lines if line.startswith(f"| {batch_size} | {way}")]
        assert any("n = 2" in row for row in rows)


def test_where_there_is_no_gpu_it_says_so_in_a_line() -> None:
    done = run()
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("no GPU here")
    assert done.stderr.count("\n") == 1


def test_a_check_that_fails_is_printed_and_the_others_are_made(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(device: str) -> None:
        """One and one are three."""
        require(1 + 1 == 3, f"they are two\non {device}")

    def breaks(device: str) -> None:
        """It works."""
        raise RuntimeError("CUDA error")

    def holds(device: str) -> None:
        """One and one are two."""

    assert run_checks([fails, breaks, holds], "cpu") == ["One and one are three", "It works"]
    *_, one, two, three = capsys.readouterr().out.splitlines()
    assert "does not hold: AssertionError: they are two on cpu" in one
    assert "does not hold: RuntimeError: CUDA error" in two
    assert "| One and one are two | holds |" in three


def test_repeats_that_differ_do_not_hold(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = iter("abcdefgh")

    def trained(way: str, data: object, device: str, batch_size: int) -> tuple[float, str]:
        return 100.0, next(ends) if way == "bfloat16" else "always the same"

    monkeypatch.setattr(gpu, "trained", trained)
    data = made_up(20, 20, contrast=1, tint=1)
    until = time.perf_counter()
    assert measure_speed(data, "cpu", [4], until) == ["repeats differ: batch size 4, bfloat16"]
    assert "| 4 | bfloat16 | 100 (100–100, n = 2) | 1.0 | no |" in capsys.readouterr().out


def test_another_accuracy_does_not_hold(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Trained:
        def __init__(self, config: gpu.TrainConfig) -> None:
            self.val_accuracy = {"float32": 0.9, "bfloat16": 0.88}[config.precision]

    monkeypatch.setattr(gpu, "train", lambda config, data: [Trained(config)])
    data = made_up(20, 20, contrast=1, tint=1)
    wrong = measure_accuracy(data, "cpu", 4, time.perf_counter() + 60)
    assert wrong == ["accuracy of bfloat16 on cpu differs"]
    assert "-2.00 points (-2.00 to -2.00) | 8 |" in capsys.readouterr().out
    monkeypatch.setattr(gpu, "TOLERANCE", 0.03)
    assert measure_accuracy(data, "cpu", 4, time.perf_counter() + 60) == []


def test_without_torchvision_the_tutorial_sees_the_same_tensors() -> None:
    from PIL import Image

    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    assert tutorial.HAS_TORCHVISION
    expected = tutorial.NORMALISED(Image.fromarray(image))
    assert torch.equal(tutorial.plain_normalised(image), expected)
