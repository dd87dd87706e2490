"""Processes of this machine that train what they are handed.

The main process has a `ProcessPool` of them. A worker starts once, opens the data (memory-mapped,
so that all share it), and trains one job after another; what comes of it arrives as events. What
runs in it is `process_worker.py`.
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
from experiments.engine.job import environment
from experiments.engine.process_worker import DataReference

if TYPE_CHECKING:
    from cnn.config import TrainConfig
    from cnn.data import Dataset

MAX_IDLE_DEATHS = 3
"""Workers that die without a job are replaced so often: it is no trial's fault, but no accident."""

NOT_FOR_WORKERS = ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID")


class ProcessPool:
    """Worker processes of this machine, each with one job at a time.

    Args:
        num_workers: how many processes.
        num_threads: how many threads each has for its arithmetic.
        gpus: what `visible_gpus` returns, for each worker to see one of them alone, in turns; none:
            each sees what this process does.
    """

    def __init__(self, num_workers: int, *, num_threads: int = 1, gpus: Sequence[str] = ()) -> None:
        assert num_workers >= 1
        self._num_threads = num_threads
        self._num_idle_deaths = 0
        self._data: DataReference | None = None
        seen = itertools.islice(itertools.cycle(gpus or [None]), num_workers)
        self._workers = [_Worker(num_threads, gpu) for gpu in seen]

    def open(self, data: Dataset, data_dir: Path) -> None:
        """Tell the workers which data to open; they do so while the caller goes on."""
        self._data = DataReference(
            digest=data.digest, data_dir=data_dir.resolve(), checked=data.checked
        )
        for worker in self._workers:
            worker.send(self._data)

    def hardware(self) -> str:
        """Return what this machine is."""
        from cnn.devices import machine

        return machine()

    @property
    def num_idle(self) -> int:
        """How many workers have nothing to do."""
        return sum(worker.job is None for worker in self._workers)

    def submit(self, job: int, config: TrainConfig) -> None:
        """Hand a job to an idle worker."""
        worker = next(worker for worker in self._workers if worker.job is None)
        if worker.process.poll() is not None:
            # It died while it had nothing to do: no failure of the job that comes next.
            worker = self._replace(worker, f"the worker process {worker.wait()}")
        worker.job = job
        worker.send((job, config))

    def stop(self, job: int) -> None:
        """Have a job stop after the epoch under way; its `JobEnded` still comes."""
        for worker in self._workers:
            if worker.job == job:
                worker.send(job)

    def forget(self, config: TrainConfig) -> None:
        """Remove the checkpoint of a training that is over."""
        assert self._data is not None
        self._data.checkpoints().remove(config)

    def wait(self, timeout: float) -> list[Event]:
        """Return what happened, once something has, or nothing after `timeout` seconds."""
        by_connection = {worker.connection: worker for worker in self._workers}
        events: list[Event] = []
        for connection in wait(list(by_connection), timeout):
            assert isinstance(connection, Connection)
            events.extend(self._receive(by_connection[connection]))
        return events

    def _receive(self, worker: _Worker) -> Iterator[Event]:
        try:
            event: Event = worker.connection.recv()
        except (EOFError, OSError):  # the latter, where it died within a message
            error = f"the worker process {worker.wait()}"
            self._replace(worker, error)
            if worker.job is not None:
                yield JobFailed(job=worker.job, error=error, details="")
            return
        if isinstance(event, JobFailed):
            # Whatever it is that raised, what comes next is not to be trained in the same process.
            worker.close()
            self._replace(worker, event.error)
        elif isinstance(event, JobEnded):
            worker.job = None
        yield event

    def _replace(self, dead: _Worker, error: str) -> _Worker:
        self._num_idle_deaths += dead.job is None
        if self._num_idle_deaths > MAX_IDLE_DEATHS:
            raise RuntimeError(f"{error} without a job, {self._num_idle_deaths} times by now")
        fresh = _Worker(self._num_threads, dead.gpu)
        fresh.send(self._data)
        self._workers[self._workers.index(dead)] = fresh
        return fresh

    def close(self) -> None:
        """End all workers at once, whatever they do."""
        for worker in self._workers:
            worker.process.kill()  # all, before the first is waited for
        for worker in self._workers:
            worker.close()

    def __enter__(self) -> ProcessPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Worker:
    """The main process' end of a worker."""

    def __init__(self, num_threads: int, gpu: str | None) -> None:
        self.gpu = gpu
        self.job: int | None = None
        self.connection, theirs = Pipe()
        variables = {k: v for k, v in os.environ.items() if k not in NOT_FOR_WORKERS}
        variables |= environment(num_threads)
        if gpu is not None:
            variables["CUDA_VISIBLE_DEVICES"] = gpu
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "experiments.engine.process_worker", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=variables,
                cwd=Path(__file__).parents[2],
                # Ctrl-C at the terminal is for the main process: it decides what becomes of jobs.
                start_new_session=True,
            )

    def send(self, message: object) -> None:
        # A worker that has died is found by `wait`, which reads what it left first.
        with suppress(ConnectionError):
            self.connection.send(message)

    def close(self) -> None:
        """End the process at once."""
        self.process.kill()
        self.wait()

    def wait(self) -> str:
        """Wait for the process, which has ended or is about to, and say how it ended."""
        self.connection.close()
        code = self.process.wait()
        if code < 0:
            return f"was killed by signal {-code} ({signal.Signals(-code).name})"
        return f"exited with status {code}"


def visible_gpus() -> list[str]:
    """Return the GPUs of this process that are there, as CUDA_VISIBLE_DEVICES names them.

    CUDA takes names from the left, up to the first that is none of a GPU's: those are as many as
    PyTorch counts. (CUDA C++ programming guide, "CUDA environment variables".)
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
        # Of the parts of a GPU a process uses and counts the first: each worker has its own.
        return list(itertools.takewhile(lambda name: name.startswith("MIG-"), names))
    return names[:count]


def _has_cuda() -> bool:
    """Return whether a driver of CUDA's is installed."""
    with suppress(OSError):
        ctypes.CDLL("libcuda.so.1")
        return True
    return False
