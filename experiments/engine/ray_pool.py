"""Workers on a Ray cluster. Ray places them and watches the nodes.

`RayPool` has the interface of `ProcessPool`. Ray's client (`ray://`) can't stream, so each call of
a worker trains one epoch, and two calls are pending at a time.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, RayError

from cnn.devices import machine
from experiments.engine.base import CheckpointLost, EpochEnded, Event, JobEnded, JobFailed, JobMoved
from experiments.engine.checkpoints import Checkpoints
from experiments.engine.job import worker_variables
from experiments.engine.ray_cluster import TOKENS, Cluster, one_line
from experiments.engine.ray_worker import DatasetMeta, Step, WorkerInfo, actor_class, versions
from tracking.errors import TransientError

if TYPE_CHECKING:
    from cnn.config import TrainConfig
    from cnn.data import Dataset

STEPS_AHEAD = 2  # pending calls of a worker that trains
GROW_SECONDS = 5.0  # seconds between checks whether the cluster has room for more workers
MAX_DEATHS = 3  # workers that died in a row before they were ready; more deaths are no accident


@dataclass(frozen=True, kw_only=True)
class Needs:
    """The resources of a worker. Fractions are allowed."""

    cpus: float
    gpus: float

    def __post_init__(self) -> None:
        if not 0 < self.cpus < 1e6:
            raise ValueError(f"--cpus-per-worker must be > 0, not {self.cpus:g}")
        if not 0 <= self.gpus < 1e6 or (self.gpus > 1 and self.gpus % 1):
            raise ValueError(
                f"--gpus-per-worker must be a fraction of 1, or an integer, not {self.gpus:g}"
            )

    def __str__(self) -> str:
        gpus = f" and {self.gpus:g} GPUs" if self.gpus else ""
        return f"{self.cpus:g} CPUs{gpus}"

    def fit(self, resources: Mapping[str, float]) -> int:
        """Return how many workers fit on a node."""
        room = [resources.get("CPU", 0.0) / self.cpus]
        if self.gpus:
            # A worker's fraction must come from one GPU.
            whole = resources.get("GPU", 0.0)
            room.append(whole // self.gpus if self.gpus >= 1 else whole * (1 // self.gpus))
        return int(min(room) + 1e-9)


@dataclass(eq=False)
class _Job:
    number: int
    config: TrainConfig
    progress: int = 0  # the last epoch that was reported
    lost_at: int = -1  # its progress when its last worker was lost
    is_kept: bool = True  # whether all of its checkpoints were written


@dataclass(eq=False)
class _Worker:
    """The driver's side of a worker."""

    actor: Any
    calls: list[Any]  # calls without an answer yet
    info: WorkerInfo | None = None  # where it is; None until it has opened the data
    is_ready: bool = False  # whether it opened the data and has the same versions as this process
    job: _Job | None = None
    turn: int = 0  # the number of its job's turn; answers of earlier turns are ignored

    @property
    def is_idle(self) -> bool:
        return self.is_ready and self.job is None


class RayPool:
    """Workers on the cluster that this process is connected to.

    When a node is lost, the jobs of its workers resume on other workers, from the last checkpoint
    that was sent. A job that loses two workers without an epoch in between has failed.

    Args:
        needs: the resources of a worker.
        num_workers: the number of workers; None: as many as fit on the cluster.
        min_workers: the number of workers that `open` waits for.
        timeout: how long it waits, in seconds.
        references: a user's own networks and losses, which workers must be able to import.
        checkpoint_seconds: minimum training time between two checkpoints that a worker sends.
    """

    def __init__(
        self,
        needs: Needs,
        *,
        num_workers: int | None,
        min_workers: int,
        timeout: float,
        references: Sequence[str] = (),
        checkpoint_seconds: float = 10,
    ) -> None:
        self._needs, self._num_workers = needs, num_workers
        self._min_workers, self._timeout = min_workers, timeout
        self._workers: list[_Worker] = []
        self._queue: deque[_Job] = deque()
        self._jobs: dict[int, _Job] = {}
        self._turns = count(1)
        self._deaths = 0
        self._refusals: dict[str, str] = {}
        self._next_look = 0.0
        self._checkpoints: Checkpoints
        self._meta: DatasetMeta
        self._images: Any
        threads = max(1, int(needs.cpus))
        self._threads = threads
        self._actor_args = (threads, checkpoint_seconds, tuple(references))
        self._new_actor = actor_class().options(
            num_cpus=needs.cpus,
            num_gpus=needs.gpus,
            max_restarts=0,
            runtime_env={"env_vars": worker_variables(threads)},
        )

    def open(self, data: Dataset, data_dir: Path) -> None:
        """Start the workers, and wait for `min_workers` of them.

        The images go into Ray's store once, and to each node once.

        Raises:
            ValueError: no node has room for a worker, the store has no room for the data, or nodes
                have other versions.
            TransientError: too few workers started in time.
        """
        pool = data.train.all_images.numpy()
        self._checkpoints = Checkpoints(digest=data.digest, data_dir=data_dir.resolve())
        self._meta = DatasetMeta(
            name=data.name,
            source=data.source,
            digest=data.digest,
            labels=data.train.all_labels.numpy(),
            classes=data.classes,
            given_test=len(data.test) if data.given_test else 0,
        )
        try:
            self._images = ray.put(pool)
        except (ObjectStoreFullError, OutOfDiskError) as error:
            raise ValueError(
                f"Ray's object store has no room for the data set's {pool.nbytes / 1e6:,.0f} MB: "
                "start its nodes with a larger --object-store-memory"
            ) from error
        self._await_workers()

    def _await_workers(self) -> None:
        deadline = time.monotonic() + self._timeout
        said = False
        while (ready := sum(worker.is_ready for worker in self._workers)) < self._min_workers:
            self._grow()
            if not said and self._timeout and not self.room():
                said = True
                print(
                    f"note: {self.no_room()}; waiting {self._timeout:g} s for more nodes",
                    file=sys.stderr,
                )
            if self._refusals and not ready:
                raise ValueError("; ".join(self._refusals.values()))
            if time.monotonic() >= deadline:
                if not self.room():
                    raise ValueError(self.no_room())
                raise TransientError(
                    f"{ready} of --min-workers {self._min_workers} workers started within "
                    f"{self._timeout:g} s; {self.no_room()}"
                )
            self.wait(0.2)

    def hardware(self) -> str:
        """Return the hardware of the cluster and of this machine."""
        return f"Ray {ray.__version__}: {Cluster()}; driver: {machine()}"

    def arithmetic(self, device: str) -> dict[str, str]:  # noqa: ARG002 - nodes may differ
        """Return the number of threads of each worker; nodes may have different processors."""
        return {"threads": str(self._threads)}

    def room(self) -> int:
        """Return how many workers fit on the cluster if nobody else uses it."""
        return sum(self._needs.fit(node) for node in Cluster().nodes)

    def no_room(self) -> str:
        """Return the message for too little room."""
        return (
            f"there is room for {self.room()} of {self._min_workers} workers of {self._needs}: the "
            f"cluster has {Cluster()}"
        )

    @property
    def num_idle(self) -> int:
        """The number of idle workers."""
        return max(0, sum(worker.is_idle for worker in self._workers) - len(self._queue))

    def submit(self, job: int, config: TrainConfig) -> None:
        """Give a job to an idle worker, or queue it."""
        earlier = self._jobs.get(job)
        self._jobs[job] = _Job(job, config, lost_at=earlier.lost_at if earlier else -1)
        self._queue.append(self._jobs[job])
        self._dispatch()

    def stop(self, job: int) -> None:
        """Stop a job after its current epoch. It has no more events."""
        stopped = self._jobs.pop(job, None)
        if stopped is None:
            return
        with suppress(ValueError):
            self._queue.remove(stopped)
        for worker in self._workers:
            if worker.job is stopped:
                worker.actor.stop.remote(worker.turn)

    def forget(self, config: TrainConfig) -> None:
        """Remove the checkpoint of a training that ended."""
        self._checkpoints.remove(config)

    def wait(self, timeout: float) -> list[Event]:
        """Return the next events, or nothing after `timeout` seconds."""
        self._grow()
        # In order: a model's weights take longer, so later answers may arrive first.
        by_ref = {worker.calls[0]: worker for worker in self._workers if worker.calls}
        if not by_ref:
            time.sleep(timeout)
            return []
        ready, _ = ray.wait(list(by_ref), num_returns=1, timeout=timeout)
        if ready:
            ready, _ = ray.wait(list(by_ref), num_returns=len(by_ref), timeout=0)
        events: list[Event] = []
        for ref in ready:
            events.extend(self._receive(by_ref[ref]))
        self._dispatch()
        return events

    def _receive(self, worker: _Worker) -> Sequence[Event]:
        try:
            answer: WorkerInfo | Step | None = ray.get(worker.calls.pop(0))
        except RayError as error:
            return self._handle_loss(worker, error)
        if isinstance(answer, WorkerInfo):
            self._register(worker, answer)
        elif isinstance(answer, Step):
            return self._handle_step(worker, answer)
        return []

    def _handle_step(self, worker: _Worker, step: Step) -> Sequence[Event]:
        job, event = worker.job, step.event
        assert job is not None
        if step.is_over:
            worker.job = None
            worker.calls.clear()
        else:
            worker.calls.append(worker.actor.step.remote(worker.turn))
        if event is None or self._jobs.get(job.number) is not job:  # it was stopped
            return []
        events = self._write_checkpoint(job, step.checkpoint)
        if isinstance(event, EpochEnded):
            job.progress = event.number
        elif isinstance(event, JobEnded):
            del self._jobs[job.number]
            # They arrive read-only, and PyTorch warns of that.
            weights = {name: values.copy() for name, values in event.weights.items()}
            event = replace(event, weights=weights)
        elif isinstance(event, JobFailed):
            # After any error, the next job gets a new process.
            self._remove(worker)
        return [*events, event]

    def _write_checkpoint(self, job: _Job, checkpoint: bytes | None) -> Sequence[Event]:
        if checkpoint is None:
            return []
        try:
            self._checkpoints.write(job.config, checkpoint)
        except OSError as error:
            was_kept, job.is_kept = job.is_kept, False  # report it once
            return [CheckpointLost.unwritten(error, job.number)] if was_kept else []
        return []

    def _register(self, worker: _Worker, info: WorkerInfo) -> None:
        """Register a worker that answered. One that can't train as we would stays unused.

        It is not removed, because Ray would start another one on the same node.
        """
        self._deaths = 0
        needed = versions()
        worker.info, worker.is_ready = info, info.versions == needed and not info.problem
        if info.problem:
            self._refusals[info.node] = f"on node {info.address}, {info.problem}"
        elif not worker.is_ready:
            theirs, ours = (
                ", ".join(f"{name} {version}" for name, version in each.items())
                for each in (info.versions, needed)
            )
            self._refusals[info.node] = f"node {info.address} has {theirs}, not {ours}"

    def _handle_loss(self, worker: _Worker, error: RayError) -> Sequence[Event]:
        where = f"on node {worker.info.address} " if worker.info else ""
        reason = f"the worker {where}was lost: {one_line(error)}"
        self._remove(worker)
        job = worker.job
        if job is None:
            self._deaths += worker.info is None
            if self._deaths > MAX_DEATHS:
                raise TransientError(f"{reason}, {self._deaths} times in a row ({TOKENS})")
            return []
        if self._jobs.get(job.number) is not job:  # it was stopped
            return []
        if job.lost_at >= job.progress:
            return [JobFailed(job=job.number, error=reason, details=str(error))]
        job.lost_at = job.progress
        self._queue.appendleft(job)
        return [JobMoved(job=job.number, reason=reason)]

    def _remove(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        self._next_look = 0.0
        with suppress(RayError):
            ray.kill(worker.actor)

    def _dispatch(self) -> None:
        idle = [worker for worker in self._workers if worker.is_idle]
        while self._queue and idle:
            worker, job = idle.pop(), self._queue.popleft()
            worker.job, worker.turn = job, next(self._turns)
            checkpoint = self._checkpoints.read(job.config)
            actor, turn = worker.actor, worker.turn
            worker.calls = [
                actor.begin.remote(turn, job.number, job.config, checkpoint),
                *(actor.step.remote(turn) for _ in range(STEPS_AHEAD)),
            ]

    def _grow(self) -> None:
        """Request the workers that are missing.

        A given number is requested even without room: that makes a cloud or Kubernetes start nodes.
        """
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + GROW_SECONDS
        for _ in range(len(self._workers), self._num_workers or self.room()):
            actor = self._new_actor.remote(*self._actor_args)
            self._workers.append(_Worker(actor, [actor.open.remote(self._meta, self._images)]))
