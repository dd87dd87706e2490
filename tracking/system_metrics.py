"""Use of the machine during a run, under the metric names that MLflow's pages show."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tracking.runs import Run

INTERVAL_SECONDS = 10.0
"""MLflow's own interval. Its own monitor is a thread, whose writes we could not order."""

PREFIX = "system/"


class SystemMetrics:
    """Logs the use of processor, memory, disk, network and GPU to a run.

    A resumed run continues with the next step.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.due = time.monotonic() + INTERVAL_SECONDS
        self.step = 0
        self.monitors: list[Any] = []

    def log_if_due(self) -> None:
        """Log a sample if the interval is over: the use since the sample before."""
        if time.monotonic() < self.due:
            return
        self.due = time.monotonic() + INTERVAL_SECONDS
        if not self.monitors:
            self.monitors = _monitors()
            self.step = self.run.last_step(f"{PREFIX}cpu_utilization_percentage")
        metrics: dict[str, float] = {}
        for monitor in self.monitors:
            with suppress(Exception):  # a failed measurement must not end a sweep
                monitor.collect_metrics()
                metrics |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        self.step += 1
        self.run.log_metrics(
            {PREFIX + key: value for key, value in metrics.items()}, step=self.step
        )


def _monitors() -> list[Any]:
    """Return MLflow's monitors for this machine; GPUs need the package nvidia-ml-py."""
    from importlib import import_module

    monitors = []
    for name in ("CPU", "Disk", "Network", "GPU"):
        module: Any = import_module(f"mlflow.system_metrics.metrics.{name.lower()}_monitor")
        # Without a GPU, an ImportError or an error of NVIDIA's; without network, AttributeError.
        with suppress(Exception):
            monitors.append(getattr(module, f"{name}Monitor")())
    return monitors
