"""Worker processes of this machine, in a `ProcessPool` of the main process.

A worker starts once, opens the data (memory-mapped, shared by all), and trains one job after
another. Its results are events. `process_worker.py` runs in it.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.engine.base import Event, JobEnded, JobFailed
from experiments.engine.job import worker_variables
from experiments.engine.process_worker import DataReference

if TYPE_CHECKING:
    from cnn.config import TrainConfig
    from cnn.data import Dataset

MAX_IDLE_DEATHS = 3
"""Idle workers that died are replaced this many times; more deaths are no accident."""

NOT_FOR_WORKERS = ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID")


class ProcessPool:
    """Worker processes of this machine, each with one job at a time.

    Args:
        num_workers: number of processes.
        num_threads: of each worker's arithmetic.
        gpus: from `visible_gpus`. Each worker sees one of them, in turns; without any, each sees
            what this process sees.
        checkpoints: whether trainings resume from checkpoints, and write them.
    """

    def __init__(
        self,
        num_workers: int,
        *,
        num_threads: int = 1,
        gpus: Sequence[str] = (),
        checkpoints: bool = True,
    ) -> None:
        assert num_workers >= 1
        self._num_threads, self._has_checkpoints = num_threads, checkpoints
        self._num_idle_deaths = 0
        self._data: DataReference | None = None
        seen = itertools.islice(itertools.cycle(gpus or [None]), num_workers)
        self._workers = [_Worker(num_threads, gpu) for gpu in seen]

    def open(self, data: Dataset, data_dir: Path) -> None:
        """Send the workers the data to open; they open it in the background."""
        self._data = DataReference(
            digest=data.digest,
            data_dir=data_dir.resolve(),
            checked=data.checked,
            working_dir=Path.cwd(),
            has_checkpoints=self._has_checkpoints,
        )
        for worker in self._workers:
            worker.send(self._data)

    def hardware(self) -> str:
        """Return the hardware of this machine."""
        from cnn.devices import machine

        return machine()

    def arithmetic(self, device: str) -> dict[str, str]:
        """Return the processor and the number of threads of each worker."""
        from cnn.devices import processor

        return {"processor": processor(device), "threads": str(self._num_threads)}

    @property
    def num_idle(self) -> int:
        """The number of idle workers."""
        return sum(worker.job is None for worker in self._workers)

    def submit(self, job: int, config: TrainConfig) -> None:
        """Give a job to an idle worker."""
        worker = next(worker for worker in self._workers if worker.job is None)
        if worker.process.poll() is not None:
            # It died while idle, so the next job has not failed.
            worker = self._replace(worker, f"the worker process {worker.wait()}")
        worker.job = job
        worker.send((job, config))

    def stop(self, job: int) -> None:
        """Stop a job after its current epoch. Its `JobEnded` still comes."""
        for worker in self._workers:
            if worker.job == job:
                worker.send(job)

    def forget(self, config: TrainConfig) -> None:
        """Remove the checkpoint of a training that ended."""
        assert self._data is not None
        self._data.checkpoints().remove(config)

    def wait(self, timeout: float) -> list[Event]:
        """Return the next events, or nothing after `timeout` seconds."""
        by_connection = {worker.connection: worker for worker in self._workers}
        events: list[Event] = []
        for connection in wait(list(by_connection), timeout):
            assert isinstance(connection, Connection)
            events.extend(self._receive(by_connection[connection]))
        return events

    def _receive(self, worker: _Worker) -> Iterator[Event]:
        try:
            event: Event = worker.connection.recv()
        except (EOFError, OSError):  # OSError if it died within a message
            error = f"the worker process {worker.wait()}"
            self._replace(worker, error)
            if worker.job is not None:
                yield JobFailed(job=worker.job, error=error, details="")
            return
        if isinstance(event, JobFailed):
            # After any error, the next job gets a new process.
            worker.close()
            self._replace(worker, event.error)
        elif isinstance(event, JobEnded):
            worker.job = None
        yield event

    def _replace(self, dead: _Worker, error: str) -> _Worker:
        self._num_idle_deaths += dead.job is None
        if self._num_idle_deaths > MAX_IDLE_DEATHS:
            raise RuntimeError(f"{error} without a job, {self._num_idle_deaths} times")
        fresh = _Worker(self._num_threads, dead.gpu)
        fresh.send(self._data)
        self._workers[self._workers.index(dead)] = fresh
        return fresh

    def close(self) -> None:
        """Kill all workers."""
        for worker in self._workers:
            worker.process.kill()  # all, before waiting for the first
        for worker in self._workers:
            worker.close()

    def __enter__(self) -> ProcessPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Worker:
    """The main process' side of a worker."""

    def __init__(self, num_threads: int, gpu: str | None) -> None:
        self.gpu = gpu
        self.job: int | None = None
        self.connection, theirs = Pipe()
        variables = {k: v for k, v in os.environ.items() if k not in NOT_FOR_WORKERS}
        variables |= worker_variables(num_threads)
        if gpu is not None:
            variables["CUDA_VISIBLE_DEVICES"] = gpu
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "experiments.engine.process_worker", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=variables,
                cwd=Path(__file__).parents[2],
                # Ctrl-C at the terminal goes to the main process only, which stops the jobs.
                start_new_session=True,
            )

    def send(self, message: object) -> None:
        # `wait` finds a worker that died, and first reads its last messages.
        with suppress(ConnectionError):
            self.connection.send(message)

    def close(self) -> None:
        self.process.kill()
        self.wait()

    def wait(self) -> str:
        """Wait for the end of the process, and return how it ended."""
        self.connection.close()
        code = self.process.wait()
        if code < 0:
            return f"was killed by signal {-code} ({signal.Signals(-code).name})"
        return f"exited with status {code}"


def visible_gpus() -> list[str]:
    """Return the GPUs that this process can use, as CUDA_VISIBLE_DEVICES names them.

    CUDA reads the names from the left, up to the first that is not a GPU. PyTorch counts those.
    (CUDA C++ programming guide, "CUDA environment variables".)
    """
    if not _has_cuda():  # PyTorch takes a second to import
        return []
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [str(number) for number in range(count)]
    names = [name.strip() for name in named.split(",")]
    if count and names[0].startswith("MIG-"):
        # A process uses and counts only the first MIG part: each worker gets its own.
        return list(itertools.takewhile(lambda name: name.startswith("MIG-"), names))
    return names[:count]


def _has_cuda() -> bool:
    with suppress(OSError):
        ctypes.CDLL("libcuda.so.1")
        return True
    return False
