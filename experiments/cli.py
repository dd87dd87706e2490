"""What the commands that train have in common: their flags, how they end, and their workers."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.engine.launch import RAY_DEFAULTS, on_ray, on_this_machine
from experiments.study.parameters import PARAMETERS
from tracking.cli import INTERRUPTED, run_command
from tracking.errors import without_passwords
from tracking.store import check_tracking, sqlite_file
from tracking.text import printable

# What is slow to import (PyTorch, Optuna, MLflow) is imported where it is needed: --help is not it.
if TYPE_CHECKING:
    from cnn.data import Dataset
    from experiments.engine.base import WorkerPool
    from experiments.study.settings import Settings

# Unless the user says otherwise. A server that is away is waited for by `tracking.retries`, which
# hears a Ctrl-C meanwhile; MLflow's own seven retries don't.
MLFLOW_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    # Two lines a run, amid ours, with the password of whoever has it in the server's address.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}

LOSSES_TEXT = """\
losses:
  l1 mse cross_entropy smooth_l1 l1_softmax mse_softmax bce label_smoothing
  focal squentropy poly1 gce multi_margin squared_hinge; or all
"""


AGAIN = "the same command continues the study"


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what is trained on."""
    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset",
        default="digits",
        metavar="NAME|PATH",
        help="digits (bundled), cifar10 (downloaded on demand), or a folder of images: "
        "train/<class>/* with test/<class>/* if there, else <class>/*; folders whose names say "
        "train or test (Training, seg_test, train2017) are splits, one for validation is refused "
        "(default: %(default)s)",
    )
    data.add_argument(
        "--data-dir",
        type=Path,
        default=Path("data"),
        metavar="DIR",
        help="where downloads and decoded images are kept (default: %(default)s)",
    )


def add_space_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what is searched."""
    space = parser.add_argument_group("search space")
    for parameter in PARAMETERS:
        parameter.add_flags(space)


def add_search_flags(group: argparse._ArgumentGroup) -> None:
    """Add what every search has."""
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of split, initial weights, order of images and sampler (default: %(default)s)",
    )
    group.add_argument(
        "--max-failures",
        type=int,
        default=3,
        metavar="N",
        help="stop after so many failed trials one after another (default: %(default)s)",
    )


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how each trial is trained."""
    training = parser.add_argument_group("training")
    training.add_argument(
        "--optimizer",
        choices=("sgd", "adam", "adamw"),
        default="sgd",
        help="sgd is with Nesterov momentum 0.9 (default: %(default)s)",
    )
    training.add_argument(
        "--schedule",
        choices=("one_cycle", "cosine", "constant"),
        default="one_cycle",
        help="how the learning rate goes over a trial's steps (default: %(default)s)",
    )
    training.add_argument(
        "--device",
        default="auto",
        metavar="DEVICE",
        help="auto (a GPU where there is one), cpu, cuda, cuda:1, … (default: %(default)s)",
    )
    training.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of the network's arithmetic; auto is bfloat16 where the processor is fast at it "
        "(default: %(default)s)",
    )
    training.add_argument(
        "--workers",
        type=int,
        default=None,
        metavar="N",
        help="workers that train, each one trial at a time, in one thread unless OMP_NUM_THREADS "
        "says otherwise; with more than one, results depend on timing (default: one a core on a "
        "CPU, one on a GPU; with --engine ray as many as the cluster has room for, and more when "
        "nodes join)",
    )


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say where the workers run."""
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--engine",
        choices=("processes", "ray"),
        default="processes",
        help="where the workers are: processes of this machine, or a Ray cluster, which the extra "
        "`ray` is for (default: %(default)s)",
    )
    engine.add_argument(
        "--ray-address",
        default=RAY_DEFAULTS["ray_address"],
        metavar="ADDRESS",
        help="the cluster: auto for the one that this machine is part of, ray://HOST:10001 or "
        "HOST:6379 (default: one of its own is started on this machine, and stopped)",
    )
    engine.add_argument(
        "--cpus-per-worker",
        type=float,
        default=RAY_DEFAULTS["cpus_per_worker"],
        metavar="CPUS",
        help="what a worker takes of a node; a fraction is allowed (default: %(default)s)",
    )
    engine.add_argument(
        "--gpus-per-worker",
        type=float,
        default=RAY_DEFAULTS["gpus_per_worker"],
        metavar="GPUS",
        help="likewise; 0.25 has four trials share a GPU (default: 1 where the cluster has GPUs, "
        "unless --device is cpu)",
    )
    engine.add_argument(
        "--min-workers",
        type=int,
        default=RAY_DEFAULTS["min_workers"],
        metavar="N",
        help="workers to begin with, while others are still to come (default: %(default)s)",
    )
    engine.add_argument(
        "--ray-timeout",
        type=float,
        default=RAY_DEFAULTS["ray_timeout"],
        metavar="SECONDS",
        help="how long to wait for --min-workers (default: %(default)s)",
    )


def add_record_flags(group: argparse._ArgumentGroup) -> None:
    """Add where everything is recorded."""
    group.add_argument(
        "--experiment",
        default=None,
        metavar="NAME",
        help="the MLflow experiment (default: that of `mlflow run` or MLFLOW_EXPERIMENT_NAME, "
        "else cnn-sweep)",
    )
    group.add_argument(
        "--storage",
        default="sqlite:///optuna.db",
        metavar="URL",
        help="the study's database; not MLflow's (default: %(default)s)",
    )
    group.add_argument(
        "--tracking-timeout",
        type=float,
        default=300,
        metavar="SECONDS",
        help="how long to wait for a server that went away, MLflow's or that of the study, before "
        "the sweep is stopped (the same command continues it; default: %(default)s)",
    )


def run(
    parser: argparse.ArgumentParser,
    do: Callable[[argparse.Namespace], int],
    argv: Sequence[str] | None,
) -> int:
    """Do what a command line asks for, and return the exit code."""
    for name, value in MLFLOW_SETTINGS.items():
        os.environ.setdefault(name, value)
    return run_command(parser, do, argv, resume=AGAIN, exits_at_once=True)


def interrupted(reason: str) -> int:
    """Say that a sweep was stopped, by a signal or for a reason, and return the exit code."""
    if reason:
        print(f"stopped: {reason}; {AGAIN}", file=sys.stderr)
        return 1
    print(f"interrupted: {AGAIN}", file=sys.stderr)
    return INTERRUPTED


@contextmanager
def workers_and_data(
    options: argparse.Namespace, settle: Callable[[int], Settings]
) -> Iterator[tuple[Settings, Dataset, WorkerPool]]:
    """Open the workers of a command line, and the data in all of them.

    Args:
        options: the command line.
        settle: returns the settings, checked, for a number of workers.
    """
    open_workers = on_ray if options.engine == "ray" else on_this_machine
    # The workers start while we import.
    with open_workers(options) as (pool, num_workers, device):
        from cnn.data import load, notes_on_choosing
        from experiments.study.storage import check_storage

        settings = replace(settle(num_workers), worker_device=device)
        check_storage(settings.storage)
        check_tracking()
        data = load(options.dataset, data_dir=options.data_dir, seed=settings.seed)
        for note in (*data.notes, *notes_on_choosing(data)):
            print(f"note: {printable(note)}", file=sys.stderr)
        pool.open(data, options.data_dir)
        yield settings, data, pool


def check_out(folder: Path, flag: str) -> None:
    """Raise ValueError if nothing could be written to a folder, hours before it is."""
    from tracking.files import check_folder

    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    check_folder(there, option=flag)


def settings_of(options: argparse.Namespace, num_workers: int, **others: Any) -> Settings:
    """Return the settings of a command line; `others` are those that it has no flags for."""
    from experiments.study.settings import Settings

    given = {
        name: value
        for name, value in vars(options).items()
        if name in Settings.__dataclass_fields__
    }
    domains = {each.name: each.domain(options) for each in PARAMETERS}
    given["search"] = {name: domain for name, domain in domains.items() if domain is not None}
    return Settings(**(given | others | {"workers": num_workers}))


def ui_command() -> str:
    """Return what shows the runs."""
    import mlflow

    uri = mlflow.get_tracking_uri()
    if uri.startswith("http"):
        return "in the MLflow server's pages"
    file = sqlite_file(uri)
    if file is not None and file.absolute() == Path("mlflow.db").absolute():
        return "mlflow ui"
    return f"mlflow ui --backend-store-uri {shlex.quote(without_passwords(uri))}"


def ui_address(experiment_id: str) -> str:
    """Return where the runs of an experiment are shown."""
    import mlflow

    uri = mlflow.get_tracking_uri()
    server = uri.rstrip("/") if uri.startswith("http") else "http://127.0.0.1:5000"
    server = re.sub(r"//\S*@", "//", server)  # a browser asks for name and password itself
    return f"open {server}/#/experiments/{experiment_id}/runs"
