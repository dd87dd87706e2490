"""How busy a machine is while a run is open, under the names that MLflow's pages look for."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tracking.runs import Run

INTERVAL_SECONDS = 10.0
"""As often as MLflow itself does, whose own monitor is a thread that writes when it likes."""

PREFIX = "system/"


class SystemMetrics:
    """Use of processor, memory, disk, network and GPU, logged to a run now and then.

    A run that is taken up again goes on with the next step.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.due = time.monotonic() + INTERVAL_SECONDS
        self.step = 0
        self.monitors: list[Any] = []

    def log_if_due(self) -> None:
        """Log a sample if it is time for one; what was used is that since the sample before."""
        if time.monotonic() < self.due:
            return
        self.due = time.monotonic() + INTERVAL_SECONDS
        if not self.monitors:
            self.monitors = _monitors()
            self.step = self.run.last_step(f"{PREFIX}cpu_utilization_percentage")
        metrics: dict[str, float] = {}
        for monitor in self.monitors:
            with suppress(Exception):  # what can't be measured is no reason to end a sweep
                monitor.collect_metrics()
                metrics |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        self.step += 1
        self.run.log_metrics(
            {PREFIX + key: value for key, value in metrics.items()}, step=self.step
        )


def _monitors() -> list[Any]:
    """Return MLflow's monitors of what is there; of GPUs, it takes the package nvidia-ml-py."""
    from importlib import import_module

    monitors = []
    for name in ("CPU", "Disk", "Network", "GPU"):
        module: Any = import_module(f"mlflow.system_metrics.metrics.{name.lower()}_monitor")
        # Without a GPU an ImportError, or whatever NVIDIA's library raises; without a network
        # device an AttributeError.
        with suppress(Exception):
            monitors.append(getattr(module, f"{name}Monitor")())
    return monitors
