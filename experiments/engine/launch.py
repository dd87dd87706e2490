"""Workers from the options of a command line, on this machine or on a Ray cluster."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from cnn.devices import num_cores
from cnn.references import module_path

if TYPE_CHECKING:
    from experiments.engine.base import WorkerPool


RAY_DEFAULTS = {
    "ray_address": None,
    "cpus_per_worker": 1,
    "gpus_per_worker": None,
    "min_workers": 1,
    "ray_timeout": 60,
}
"""The flags that need `--engine ray`, with their defaults."""


@contextmanager
def on_this_machine(
    options: argparse.Namespace,
    references: Sequence[str] = (),  # noqa: ARG001 - they have the same files
) -> Iterator[tuple[WorkerPool, int, str | None]]:
    """Open workers on this machine; yield them, their number and their device."""
    from experiments.engine.processes import ProcessPool, visible_gpus

    for name, default in RAY_DEFAULTS.items():
        if getattr(options, name) != default:
            raise ValueError(f"--{name.replace('_', '-')} is for --engine ray")
    # `cuda` gives each worker one GPU; `cuda:1` means that one.
    gpus = visible_gpus() if options.device in ("auto", "cuda") else []
    num_workers = _num_workers(options.workers, options.device, len(gpus))
    with ProcessPool(num_workers, num_threads=_num_threads(num_workers), gpus=gpus) as pool:
        yield pool, num_workers, None


@contextmanager
def on_ray(
    options: argparse.Namespace, references: Sequence[str] = ()
) -> Iterator[tuple[WorkerPool, int, str | None]]:
    """Open workers on a Ray cluster, as `on_this_machine` does.

    The modules of these references travel to its nodes.
    """
    try:
        from experiments.engine.ray_cluster import connected
        from experiments.engine.ray_pool import Needs, RayPool
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ValueError("--engine ray needs Ray: pip install '.[ray]'") from error
    if options.device not in ("auto", "cpu", "cuda"):
        raise ValueError(
            f"with --engine ray, --device is auto, cpu or cuda, not {options.device!r}: Ray "
            "chooses each worker's GPU"
        )
    if options.ray_address == "":  # an unset variable must not start a cluster of our own
        raise ValueError("--ray-address is empty: it takes auto, ray://HOST:10001 or HOST:6379")
    workers, min_workers, gpus = options.workers, options.min_workers, options.gpus_per_worker
    _check_positive("--workers", workers)
    _check_positive("--min-workers", min_workers)
    if workers is not None and min_workers > workers:
        raise ValueError(f"--min-workers {min_workers} is more than --workers {workers}")
    if not 0 <= options.ray_timeout < math.inf:
        raise ValueError(f"--ray-timeout must be seconds ≥ 0, not {options.ray_timeout}")
    if options.device == "cuda" and gpus == 0:
        raise ValueError("--device cuda needs --gpus-per-worker > 0")
    needs = Needs(cpus=options.cpus_per_worker, gpus=gpus or 0)
    modules = {str(module_path(each)) for each in references}
    with connected(options.ray_address, modules=sorted(modules)) as cluster:
        if gpus is None and (
            options.device == "cuda" or (options.device == "auto" and cluster.gpus > 0)
        ):
            needs = replace(needs, gpus=1)
        pool = RayPool(
            needs,
            num_workers=workers,
            min_workers=min_workers,
            timeout=options.ray_timeout,
            references=references,
        )
        if options.ray_address is None and pool.room() < min_workers:
            raise ValueError(pool.no_room())  # no node joins a cluster of our own
        device = "cpu" if options.device == "cpu" or not needs.gpus else "cuda"
        yield pool, workers or max(1, pool.room()), device


def _num_workers(asked: int | None, device: str, num_gpus: int) -> int:
    _check_positive("--workers", asked)
    if asked is not None:
        return asked
    if num_gpus or device.startswith("cuda"):
        return max(1, num_gpus)
    return num_cores()


def _num_threads(num_workers: int) -> int:
    """Return the number of threads per worker: OMP_NUM_THREADS, or 1, within the cores.

    Threads that share a core wait for each other most of the time. Many machines set
    OMP_NUM_THREADS for all programs, so it is limited.
    """
    asked = (os.environ.get("OMP_NUM_THREADS") or "1").partition(",")[0].strip()
    if not (asked.isdecimal() and int(asked) >= 1):
        raise ValueError(f"OMP_NUM_THREADS must be an integer ≥ 1, not {asked!r}")
    return min(int(asked), max(1, num_cores() // num_workers))


def _check_positive(flag: str, number: int | None) -> None:
    if number is not None and number < 1:
        raise ValueError(f"{flag} must be ≥ 1, not {number}")
