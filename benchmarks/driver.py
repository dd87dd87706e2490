"""Where the time of a sweep's driver goes, for `benchmarks.scaling`.

It wraps methods of `experiments` and `tracking` while a sweep runs: who renames one of them renames
it in `methods` as well.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from benchmarks.common import made_up
from benchmarks.simulation import SimulatedPool
from experiments.interrupts import Interrupts

if TYPE_CHECKING:
    from experiments.study.settings import Settings

WAIT, CONNECT, REST = "wait", "connect", "rest"
OF_AN_EPOCH = ("log to MLflow", "report to Optuna", "prune decision")
OF_A_TRIAL = (
    "count trials",
    "suggest",
    "open run",
    "record model",
    "close run",
    "tell Optuna",
    "heartbeats",
    "sweep's page",
    REST,
)


def methods() -> list[tuple[str, object, str]]:
    """Return the parts of a driver's work, and the methods that do them."""
    from experiments.study import controller
    from experiments.study.controller import _Sweep
    from experiments.study.dispatch import Dispatcher
    from experiments.study.heartbeat import Heartbeat
    from experiments.study.recorder import Recorder, RunningTrial
    from experiments.study.space import Space
    from tracking.runs import Run

    return [
        (WAIT, SimulatedPool, "wait"),
        (CONNECT, _Sweep, "_connect"),
        (CONNECT, Recorder, "warm_up_export"),
        ("count trials", Dispatcher, "has_more"),
        ("suggest", Heartbeat, "ask"),
        ("suggest", Space, "suggest"),
        ("open run", Recorder, "open_run"),
        ("open run", Recorder, "reopen_run"),
        ("open run", RunningTrial, "__init__"),
        ("log to MLflow", Run, "log_metrics"),
        ("report to Optuna", RunningTrial, "record"),
        ("prune decision", _Sweep, "_should_prune"),
        ("record model", Recorder, "record_model"),
        ("close run", Run, "end"),
        ("tell Optuna", controller, "tell"),
        ("heartbeats", Dispatcher, "keep_alive"),
        ("sweep's page", Recorder, "update_parent"),
    ]


class Stopwatch:
    """Seconds and HTTP requests of parts of a thread's work, each without the parts inside it."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.requests: dict[str, int] = defaultdict(int)
        self.began = math.inf
        """When the first part began."""
        self._inside: list[tuple[str, list[float]]] = []

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return the call with a note of its time."""

        @wraps(call)
        def noting(*args: Any, **kwargs: Any) -> Any:
            inner: list[float] = []
            self._inside.append((part, inner))
            start = time.monotonic()
            self.began = min(self.began, start)
            try:
                return call(*args, **kwargs)
            finally:
                took = time.monotonic() - start
                self._inside.pop()
                self.seconds[part].append(took - sum(inner))
                if self._inside:
                    self._inside[-1][1].append(took)

        return noting

    def counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return the call, counted as a request of the part that it is in."""

        @wraps(call)
        def counting(*args: Any, **kwargs: Any) -> Any:
            self.requests[self._inside[-1][0] if self._inside else REST] += 1
            return call(*args, **kwargs)

        return counting

    @contextmanager
    def on_the_driver(self) -> Iterator[None]:
        """Watch the sweep that runs in the context."""
        import requests

        wrapped = [
            (owner, name, self.timed(part, getattr(owner, name))) for part, owner, name in methods()
        ]
        wrapped.append((requests.Session, "send", self.counted(requests.Session.send)))
        with ExitStack() as stack:
            for owner, name, call in wrapped:
                stack.enter_context(patch.object(owner, name, call))
            yield


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a sweep did, from its first trial until its end, or until it was stopped."""

    workers: int
    epoch_seconds: float
    seconds: float
    late_busy_seconds: float
    """In the second half, summed over the workers that trained."""
    fill_seconds: float
    """Until every worker had a trial; inf: never."""
    trials: int
    """That ended."""
    epochs: int
    """That were recorded."""
    processor_seconds: float
    """Of the driver."""
    memory: float
    """The driver's, in MB, without mapped files that other processes share."""
    parts: Mapping[str, Sequence[float]]
    """Seconds of the driver for each call, by part."""
    requests: Mapping[str, int]
    """Over HTTP, by part."""

    @property
    def efficiency(self) -> float:
        """The share of time in which workers trained, in the second half."""
        return self.late_busy_seconds / (self.workers * self.seconds / 2)

    @property
    def would_feed(self) -> float:
        """How many such workers would keep the driver busy all the time."""
        return self.workers * self.efficiency * self.seconds / self.driver_seconds

    @property
    def driver_seconds(self) -> float:
        """In which the driver worked, without its start."""
        return self.seconds - self.total(WAIT) - self.total(CONNECT)

    def total(self, part: str) -> float:
        """Return the seconds of a part in all; `REST` is what belongs to no part."""
        if part == REST:
            return self.seconds - sum(map(sum, self.parts.values()))
        return sum(self.parts.get(part, ()))

    def milliseconds(self, part: str) -> float:
        """Return the mean time of a part: for each epoch or for each trial."""
        return 1000 * self.total(part) / (self.epochs if part in OF_AN_EPOCH else self.trials)


class _Stop(Interrupts):
    """A Ctrl-C some seconds after the first trial; it notes what was done until then."""

    def __init__(self, pool: SimulatedPool, watch: Stopwatch, seconds: float) -> None:
        super().__init__()
        self.pool, self.watch, self.after = pool, watch, seconds
        self.processor = time.process_time()
        self.noted: dict[str, Any] = {}

    def __call__(self) -> bool:
        if time.monotonic() >= self.watch.began + self.after:
            self.take_note()
        return self.first is not None

    def take_note(self) -> None:
        if self.first is not None:
            return
        import psutil

        now = self.first = time.monotonic()
        seconds = now - self.watch.began
        self.noted = {
            "seconds": seconds,
            "late_busy_seconds": self.pool.busy_seconds(now - seconds / 2, now),
            "processor_seconds": time.process_time() - self.processor,
            "memory": psutil.Process().memory_full_info().uss / 1e6,
            "parts": {part: list(times) for part, times in self.watch.seconds.items()},
            "requests": dict(self.watch.requests),
        }


def measure(settings: Settings, *, epoch_seconds: float, seconds: float = math.inf) -> Measured:
    """Run a sweep with simulated workers, to its end or for some seconds."""
    from experiments.study.controller import sweep
    from experiments.study.events import SweepEnded, TrialEnded, TrialProgressed

    pool, watch = SimulatedPool(settings.workers, epoch_seconds=epoch_seconds), Stopwatch()
    stop = _Stop(pool, watch, seconds)
    data = made_up(1000, 100, contrast=0, tint=0)
    trials = epochs = 0
    with watch.on_the_driver():
        for event in sweep(settings, data, pool, stop):
            trials += isinstance(event, TrialEnded) and event.outcome != "interrupted"
            epochs += isinstance(event, TrialProgressed)
            if isinstance(event, SweepEnded):
                if event.outcome == "failed" or event.reason:
                    raise RuntimeError(f"the sweep ended: {event.outcome} {event.reason}")
                stop.take_note()
    return Measured(
        workers=settings.workers,
        epoch_seconds=epoch_seconds,
        fill_seconds=pool.all_busy - watch.began,
        trials=trials,
        epochs=epochs,
        **stop.noted,
    )
