"""A worker process on a Ray cluster. It needs Ray, PyTorch and `cnn`."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from time import monotonic
from typing import TYPE_CHECKING, Any

import ray

from experiments.engine.base import Event, JobEnded, JobFailed
from experiments.engine.job import set_arithmetic, train_job

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from cnn.config import TrainConfig
    from cnn.data import Dataset


@dataclass(frozen=True, kw_only=True)
class DatasetMeta:
    """A data set without its images, which are an object in Ray's store."""

    name: str
    source: str
    digest: str
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    given_test: int

    def split(self, images: npt.NDArray[np.uint8], seed: int) -> Dataset:
        """Return the data set, split with a seed."""
        from cnn.cache import ImagePool
        from cnn.data import split_pool

        pool = ImagePool(
            images=images, labels=self.labels, classes=self.classes, given_test=self.given_test
        )
        with warnings.catch_warnings():
            # Ray's store is read-only and shared by all workers of a node; nobody writes to it.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            return split_pool(pool, self.digest, seed, name=self.name, source=self.source)


@dataclass(frozen=True, kw_only=True)
class WorkerInfo:
    """The node and the versions of a worker, and why it can't train, if it can't."""

    node: str  # its id
    address: str
    versions: dict[str, str]
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class Step:
    """The result of a step of a job, usually an epoch."""

    event: Event | None = None
    checkpoint: bytes | None = None
    is_over: bool = True  # whether it is the last step of the job


def versions() -> dict[str, str]:
    """Return the versions that results depend on."""
    import torch

    return {"Python": platform.python_version(), "PyTorch": str(torch.__version__)}


class RayWorker:
    """Trains one job at a time, an epoch per call, so that the driver sees each epoch.

    Two calls of `step` are pending at a time, so that no worker waits for a busy driver. `stop`
    has its own thread and does not wait for them.

    Args:
        num_threads: of its arithmetic.
        checkpoint_seconds: minimum training time between two checkpoints that it sends.
        references: a user's own networks and losses.
    """

    def __init__(
        self, num_threads: int, checkpoint_seconds: float, references: Sequence[str]
    ) -> None:
        self._references = references
        self._num_threads, self._checkpoint_seconds = num_threads, checkpoint_seconds
        self._turn, self._stopped = 0, 0
        self._steps: Iterator[Step] = iter(())

    def open(self, about: DatasetMeta, images: npt.NDArray[np.uint8]) -> WorkerInfo:
        """Open the data set, and return the worker's node and versions.

        Args:
            about: the data set without its images.
            images: (M, S, S, 3), memory-mapped from Ray's store.
        """
        self._opened = lru_cache(maxsize=1)(lambda seed: about.split(images, seed))
        self._opened(0)
        import cnn.training  # noqa: F401 - saves the first job the import

        context = ray.get_runtime_context()
        return WorkerInfo(
            node=context.get_node_id(),
            address=str(ray.util.get_node_ip_address()),  # type: ignore[no-untyped-call]
            versions=versions(),
            problem=self._problem(),
        )

    def _problem(self) -> str:
        """Return why a reference can't be imported here, empty if all can."""
        from cnn.references import resolve

        try:
            for reference in self._references:
                resolve(reference)
        except ValueError as error:
            return str(error)
        return ""

    def begin(self, turn: int, job: int, config: TrainConfig, checkpoint: bytes | None) -> None:
        """Begin a job. Calls of `step` with this turn are its steps."""
        set_arithmetic(self._num_threads)  # it applies to the thread, and this one trains
        self._turn = turn
        self._steps = self._train(job, config, checkpoint)

    def step(self, turn: int) -> Step:
        """Take the next step of the turn's job, and return its result."""
        if turn != self._turn or turn <= self._stopped:
            return Step()
        return next(self._steps, Step())

    @ray.method(concurrency_group="control")
    def stop(self, turn: int) -> None:
        """Stop the turn's job after its current epoch."""
        self._stopped = turn

    def _train(self, job: int, config: TrainConfig, checkpoint: bytes | None) -> Iterator[Step]:
        kept: list[bytes] = []
        sent = monotonic()
        try:
            for event in train_job(
                job, config, self._opened(config.seed), checkpoint=checkpoint, keep=kept.append
            ):
                is_due = monotonic() - sent >= self._checkpoint_seconds
                latest = kept.pop() if kept and is_due else None
                sent = sent if latest is None else monotonic()
                kept.clear()
                yield Step(event=event, checkpoint=latest, is_over=isinstance(event, JobEnded))
        except Exception as error:
            yield Step(event=JobFailed.from_error(error, job))


def actor_class() -> Any:
    """Return the class as a Ray actor."""
    remote: Any = ray.remote  # its stubs know no groups
    return remote(concurrency_groups={"control": 1})(RayWorker)
