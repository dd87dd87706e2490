from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from real_workers import config, wait_for_end
from real_workers import data as data
from real_workers import data_dir as data_dir

from cnn.data import Dataset
from cnn.training import train
from experiments.engine import processes
from experiments.engine.base import CheckpointLost, EpochEnded, Event, JobEnded, JobFailed
from experiments.engine.checkpoints import Checkpoints
from experiments.engine.processes import ProcessPool, visible_gpus

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pool(data: Dataset, data_dir: Path) -> Iterator[ProcessPool]:
    """One pool for all tests: a worker takes seconds to start."""
    with ProcessPool(1) as pool:
        pool.open(data, data_dir)
        yield pool


def test_a_worker_trains_as_this_process_does(pool: ProcessPool, data: Dataset) -> None:
    pool.submit(7, config())
    *epochs, ended = wait_for_end(pool)
    expected = list(train(config(), data))
    assert isinstance(ended, JobEnded)
    assert [(e.job, e.number) for e in epochs if isinstance(e, EpochEnded)] == [(7, 1), (7, 2)]
    for event, epoch in zip(epochs, expected, strict=True):
        assert isinstance(event, EpochEnded)
        # This process may have more threads, which sum up in another order.
        assert event.metrics["train/loss"] == pytest.approx(epoch.train_loss, rel=1e-3)
    for name, value in expected[-1].model.state_dict().items():
        np.testing.assert_allclose(ended.weights[name], value.numpy(), atol=1e-2)


def test_a_worker_repeats_bit_for_bit(pool: ProcessPool) -> None:
    ends = []
    for job in (1, 2):
        pool.submit(job, config(precision="bfloat16"))
        end = wait_for_end(pool)[-1]
        assert isinstance(end, JobEnded)
        ends.append(end)
    for name, value in ends[0].weights.items():
        np.testing.assert_array_equal(ends[1].weights[name], value)


def test_an_exception_ends_its_job_only(pool: ProcessPool) -> None:
    pool.submit(1, config(batch_size=10**6))
    (failed,) = wait_for_end(pool)
    assert isinstance(failed, JobFailed)
    assert failed.error.startswith("ValueError: batch size 1000000 is larger")
    assert "Traceback" in failed.details
    pool.submit(2, config(epochs=1))
    assert isinstance(wait_for_end(pool)[-1], JobEnded)


def test_a_stopped_job_ends_before_its_last_epoch(pool: ProcessPool) -> None:
    pool.submit(1, config(epochs=500))
    while not pool.wait(0.1):
        pass
    pool.stop(1)
    *epochs, ended = wait_for_end(pool)
    assert isinstance(ended, JobEnded)
    assert len(epochs) < 100


def test_a_job_that_was_stopped_can_be_submitted_again(pool: ProcessPool) -> None:
    pool.submit(1, config(epochs=500))
    pool.stop(1)
    wait_for_end(pool)
    pool.submit(1, config(epochs=3))
    assert len(wait_for_end(pool)) == 4


def test_a_killed_worker_fails_its_job_and_another_takes_the_next(pool: ProcessPool) -> None:
    pool.submit(1, config(epochs=500))
    while not pool.wait(0.1):
        pass
    (worker,) = pool._workers
    worker.process.send_signal(signal.SIGKILL)
    failed = wait_for_end(pool)[-1]
    assert failed == JobFailed(
        job=1, error="the worker process was killed by signal 9 (SIGKILL)", details=""
    )
    pool.submit(2, config(epochs=1))
    assert isinstance(wait_for_end(pool)[-1], JobEnded)


@pytest.mark.slow
def test_workers_that_cannot_start_are_not_started_for_ever(data: Dataset, tmp_path: Path) -> None:
    with ProcessPool(1) as pool:
        pool.open(data, tmp_path)  # where it is not
        with pytest.raises(RuntimeError, match="exited with status 1 without a job"):
            wait_for_end(pool)


@pytest.mark.slow
def test_workers_end_when_the_main_process_is_killed(data: Dataset, data_dir: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path\n"
        "from cnn.data import load\n"
        "from cnn.training import TrainConfig; from experiments.engine.processes import *\n"
        "pool = ProcessPool(1); folder = Path(sys.argv[1])\n"
        "pool.open(load('digits', data_dir=folder, seed=0), folder)\n"
        "pool.submit(1, TrainConfig(loss='mse', learning_rate=0.1, batch_size=1, epochs=99))\n"
        "print(pool._workers[0].process.pid, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(data_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=REPOSITORY) as main:
        assert main.stdout is not None
        worker = int(main.stdout.readline())
        main.kill()
    deadline = time.monotonic() + 20
    while is_running(worker):
        assert time.monotonic() < deadline, "the worker outlives its main process"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_job_whose_worker_was_killed_resumes_from_its_last_epoch_and_ends_the_same(
    pool: ProcessPool, data: Dataset, data_dir: Path
) -> None:
    training = config(epochs=4, seed=5, precision="bfloat16")
    checkpoints = Checkpoints(digest=data.digest, data_dir=data_dir)
    pool.submit(1, training)
    *undisturbed, expected = wait_for_end(pool)
    pool.forget(training)

    pool.submit(2, training)
    before: list[Event] = []
    while len(before) < 2:
        before.extend(pool.wait(0.1))
    (worker,) = pool._workers
    worker.process.kill()
    before.extend(wait_for_end(pool)[:-1])
    assert checkpoints.file(training).exists()
    pool.submit(2, training)
    *after, ended = wait_for_end(pool)

    # What was trained before is told again as it was, with its times.
    assert after[: len(before)] == before
    assert isinstance(expected, JobEnded)
    assert isinstance(ended, JobEnded)
    for name, value in expected.weights.items():
        np.testing.assert_array_equal(ended.weights[name], value)
    assert losses(after) == losses(undisturbed)
    pool.forget(training)
    assert not checkpoints.file(training).exists()


def losses(events: list[Event]) -> list[tuple[int, float, float]]:
    return [
        (event.number, event.metrics["train/loss"], event.metrics["val/loss"])
        for event in events
        if isinstance(event, EpochEnded)
    ]


def test_a_damaged_checkpoint_costs_time_and_nothing_else(
    pool: ProcessPool, data: Dataset, data_dir: Path
) -> None:
    training = config(seed=6)
    pool.submit(1, training)
    undisturbed = wait_for_end(pool)
    file = Checkpoints(digest=data.digest, data_dir=data_dir).file(training)
    content = bytearray(file.read_bytes())
    content[200_000:204_096] = bytes(255 - byte for byte in content[200_000:204_096])
    file.write_bytes(content)
    pool.submit(1, training)
    lost, *events = wait_for_end(pool)
    assert isinstance(lost, CheckpointLost)
    assert losses(events) == losses(undisturbed)


def test_a_finished_training_is_told_from_its_checkpoint(pool: ProcessPool) -> None:
    training = config(seed=7)
    pool.submit(1, training)
    first = wait_for_end(pool)
    pool.submit(1, training)
    again = wait_for_end(pool)
    assert first[:-1] == again[:-1]
    assert isinstance(first[-1], JobEnded)
    assert isinstance(again[-1], JobEnded)
    for name, value in first[-1].weights.items():
        np.testing.assert_array_equal(again[-1].weights[name], value)


def test_a_checkpoint_that_cannot_be_kept_does_not_end_the_training(
    pool: ProcessPool, data: Dataset, data_dir: Path
) -> None:
    training = config(seed=8)
    file = Checkpoints(digest=data.digest, data_dir=data_dir).file(training)
    file.mkdir(parents=True)  # as a full disk would, it keeps the file from being written
    pool.submit(1, training)
    unusable, unkept, *epochs, ended = wait_for_end(pool)
    assert isinstance(ended, JobEnded)
    assert len(epochs) == 2
    assert isinstance(unusable, CheckpointLost)
    assert isinstance(unkept, CheckpointLost)
    assert "can't be written" in unkept.reason
    pool.forget(training)  # which is no error
    file.rmdir()


@pytest.mark.slow
def test_a_worker_that_died_while_it_was_idle_is_no_failure_of_the_next_job(
    pool: ProcessPool,
) -> None:
    pool.submit(1, config(epochs=1))
    wait_for_end(pool)
    (worker,) = pool._workers
    worker.process.kill()
    worker.process.wait()
    pool.submit(2, config(epochs=1))
    *_, ended = wait_for_end(pool)
    assert isinstance(ended, JobEnded)
    assert ended.job == 2


def seen_by(pool: ProcessPool) -> list[str | None]:
    """Return CUDA_VISIBLE_DEVICES of each worker."""
    return [environment(worker.process.pid).get("CUDA_VISIBLE_DEVICES") for worker in pool._workers]


def environment(pid: int) -> dict[str, str]:
    """Return a process' environment, for which it takes a moment at its start."""
    deadline = time.monotonic() + 20
    while not (text := Path(f"/proc/{pid}/environ").read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return dict(entry.partition("=")[::2] for entry in text.split("\0"))


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_each_worker_sees_one_gpu_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    with ProcessPool(3, gpus=["5", "7"]) as pool:
        assert seen_by(pool) == ["5", "7", "5"]
    with ProcessPool(1) as pool:
        assert seen_by(pool) == ["5,7"]


@pytest.fixture
def eight_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has eight GPUs, as far as NVIDIA's library says; PyTorch does the rest."""
    monkeypatch.setattr(processes, "_has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "_raw_device_count_nvml", lambda: 8)
    uuids = [f"{number}a-bc" for number in range(8)]
    monkeypatch.setattr(torch.cuda, "_raw_device_uuid_nvml", lambda: [f"GPU-{u}" for u in uuids])
    # Of parts of a GPU, PyTorch asks CUDA, which gives a process one.
    monkeypatch.setattr(torch._C, "_cuda_getDeviceCount", lambda: 1)


@pytest.mark.parametrize(
    ("named", "seen"),
    [
        (None, list("01234567")),
        ("5,7", ["5", "7"]),
        (" 3 , 1", ["3", "1"]),
        ("0,-1,1", ["0"]),
        ("2,8,3", ["2"]),
        ("2,x,3", ["2"]),
        ("1,,2", ["1"]),
        ("", []),
        (" ", []),
        ("-1", []),
        ("none", []),
        ("NoDevFiles", []),
        ("8", []),
        ("0,1,0", []),
        ("GPU-3a,GPU-1a", ["GPU-3a", "GPU-1a"]),
        ("GPU-3a,GPU-9", ["GPU-3a"]),
        ("MIG-1,MIG-2,0", ["MIG-1", "MIG-2"]),
    ],
)
@pytest.mark.usefixtures("eight_gpus")
def test_gpus_are_those_that_are_there(
    monkeypatch: pytest.MonkeyPatch, named: str | None, seen: list[str]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert visible_gpus() == seen


@pytest.mark.parametrize("named", [None, "0", "0,1", "all", "MIG-1"])
def test_without_a_driver_there_are_none(
    monkeypatch: pytest.MonkeyPatch, named: str | None
) -> None:
    monkeypatch.setattr(processes, "_has_cuda", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert visible_gpus() == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("named", [None, "0", "0,1", "0,-1,1", "none", "99", "", "0,0"])
def test_as_many_gpus_are_seen_as_cuda_itself_counts(
    monkeypatch: pytest.MonkeyPatch, named: str | None
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    script = "import torch; print(torch._C._cuda_getDeviceCount())"
    counted = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert len(visible_gpus()) == int(counted.stdout)
