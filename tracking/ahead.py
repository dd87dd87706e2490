"""Work done ahead in threads: what is read and decoded while the model is busy."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

Given = TypeVar("Given")
Made = TypeVar("Made")

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


def ahead(
    work: Callable[[Given], Made], pieces: Iterable[tuple[Given, float]], *, threads: int
) -> Iterator[Made]:
    """Do work on pieces in threads, and yield the results in order.

    Args:
        work: holds no lock for long: Pillow lets others run while it decodes.
        pieces: each with its weight. They are taken while those under way weigh less than 1, so
            that what is kept in memory has a bound.
        threads: how many work at once.
    """
    under_way: deque[tuple[Future[Made], float]] = deque()
    weight = 0.0
    with ThreadPoolExecutor(threads) as executor:
        try:
            for piece, its_weight in pieces:
                under_way.append((executor.submit(work, piece), its_weight))
                weight += its_weight
                while weight >= 1:
                    future, its_weight = under_way.popleft()
                    weight -= its_weight
                    yield future.result()
            while under_way:
                yield under_way.popleft()[0].result()
        finally:  # an error, or nobody wants more
            executor.shutdown(cancel_futures=True)


def num_cores() -> int:
    """Return how many cores this process may use: those that it may run on, within its quota.

    A part of a core counts as one: threads that take turns use it, and wait for each other no more
    than they do for other processes.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _cpu_quota())))


def _cpu_quota() -> float:
    """Return how many cores' time Linux' control groups let this process have, as containers do.

    That is the least of its group and of those that this is in, as far as they can be seen: in a
    container, they may be at the top of what is mounted, whatever the path says. (The kernel's
    documentation: admin-guide/cgroup-v2, `cpu.max`; scheduler/sched-bwc, `cpu.cfs_quota_us`.)
    """
    try:
        groups = [line.split(":", 2) for line in _OWN_CGROUPS.read_text().splitlines()]
    except OSError:
        return math.inf
    least = math.inf
    for _, controllers, path in groups:
        if controllers and "cpu" not in controllers.split(","):
            continue
        for mounted in (controllers or ".", "cpu" if controllers else "unified"):
            group = _CGROUPS / mounted / path.lstrip("/")
            for folder in (group, *group.parents):
                if folder.is_relative_to(_CGROUPS):
                    least = min(least, _quota_in(folder))
    return least


def _quota_in(group: Path) -> float:
    """Return how many cores' time a control group may have, by its files of either version."""
    with suppress(OSError, ValueError):
        quota, period = (group / "cpu.max").read_text().split()
        return math.inf if quota == "max" else int(quota) / int(period)
    with suppress(OSError, ValueError):
        quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return math.inf if int(quota) < 0 else int(quota) / int(period)
    return math.inf
