"""What the commands that train share: their flags, their exit codes, and their workers."""

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

from experiments.config_file import ConfigParser
from experiments.engine.launch import RAY_DEFAULTS, on_ray, on_this_machine
from experiments.study.output import Output
from experiments.study.parameters import PARAMETERS, networks, parse_vary, references
from tracking.cli import INTERRUPTED, Parser, run_command
from tracking.errors import without_passwords
from tracking.store import check_tracking, sqlite_file
from tracking.text import printable

# PyTorch, Optuna and MLflow are slow to import: each function imports what it needs.
if TYPE_CHECKING:
    from cnn.data import Dataset
    from experiments.engine.base import WorkerPool
    from experiments.study.settings import Settings

# Defaults, which the user's environment overrides. `tracking.retries` waits for a server that is
# away and notices a Ctrl-C meanwhile; MLflow's own seven retries don't.
MLFLOW_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    # They would be two lines a run, with the password if the server's address has one.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}

LOSSES_TEXT = """\
losses:
  l1 mse cross_entropy smooth_l1 l1_softmax mse_softmax bce label_smoothing
  focal squentropy poly1 gce multi_margin squared_hinge; or all
"""

EXIT_CODES = """\
exit codes: 0 done; 1 no trial is complete, or the disk is full, a database is locked or read-only,
a server is away: the same command continues later; 2 bad input; 130 interrupted
"""

RESUME = "the same command continues the study"


def make_parser(module: str, description: str, epilog: str) -> ConfigParser:
    """Return a parser with the flags for the data and the search space."""
    parser = ConfigParser(
        prog=f"python -m {module}",
        description=description,
        epilog=f"{LOSSES_TEXT}\n{epilog}\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    data = parser.add_argument_group("data")
    add_flag(
        data,
        "--dataset",
        "digits",
        "digits (bundled); cifar10, cifar100, mnist, fashion_mnist, kmnist, svhn or stl10 "
        "(downloaded on demand); a folder of images: train/<class>/* with test/<class>/* if there, "
        "else <class>/*; folders whose names say train or test (Training, seg_test, train2017) are "
        "splits; one for validation is refused; a folder of Parquet files: train-*.parquet with "
        "test-*.parquet if there, with columns image (bytes) and label; or package.module:function "
        "or file.py:function, which returns images, uint8 (N, H, W, 3) or (N, H, W), and labels "
        "(N,), integers or texts: as (images, labels), (images, labels, test_images, test_labels), "
        "or a mapping with these names and classes",
        metavar="NAME|PATH|FUNCTION",
    )
    text = "height and width that all images are resized to, 8 to 512 pixels"
    add_flag(data, "--image-size", 32, text, metavar="PIXELS")
    text = "the folder for downloads and decoded images"
    add_flag(data, "--data-dir", Path("data"), text, metavar="DIR")
    add_space_flags(parser)
    return parser


def add_flag(
    group: argparse._ActionsContainer, flag: str, default: Any, text: str, **options: Any
) -> None:
    """Add a flag; a default also gives its type and the end of its help."""
    if default is not None:
        options = {"type": type(default), **options}
        text = f"{text} (default: %(default)s)".lstrip()
    group.add_argument(flag, default=default, help=text, **options)


def add_space_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what is searched."""
    space = parser.add_argument_group("search space")
    for parameter in PARAMETERS:
        if parameter.is_searched_by_default:
            parameter.add_flags(space)
    others = [each.name for each in PARAMETERS if not each.is_searched_by_default]
    space.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="NAME=VALUES",
        help="search another parameter as well, over LOW..HIGH, LOW..HIGH:log or A,B,C; may be "
        f"repeated; NAME is {', '.join(others[:-1])} or {others[-1]}, or one of the three above; "
        "momentum is searched for sgd only",
    )


def add_search_flags(
    parser: Parser, title: str, *, trials: tuple[int, str], sampler: tuple[str, str] | None
) -> argparse._ArgumentGroup:
    """Add the flags of the search, two with their defaults and help; return the group.

    Without a sampler, there is no flag for it.
    """
    search = parser.add_argument_group(title)
    add_flag(search, "--trials", *trials, metavar="N")
    text = "passes over the training split in each training"
    add_flag(search, "--epochs", 10, text, metavar="N")
    if sampler is not None:
        add_flag(search, "--sampler", *sampler, choices=("tpe", "random", "qmc", "gp"))
    text = "of split, initial weights, order of images and sampler"
    add_flag(search, "--seed", 0, text, metavar="N")
    text = "stop after this many failed trials in a row"
    add_flag(search, "--max-failures", 3, text, metavar="N")
    return search


def add_training_flags(parser: Parser) -> None:
    """Add the flags that say how and where each trial is trained."""
    training = parser.add_argument_group("training")
    for parameter in PARAMETERS:
        if not parameter.is_searched_by_default:
            parameter.add_flags(training)
    text = "auto (a GPU if there is one), cpu, cuda, cuda:1, …"
    add_flag(training, "--device", "auto", text, metavar="DEVICE")
    add_flag(
        training,
        "--workers",
        None,
        "workers; each trains one trial at a time, in one thread unless OMP_NUM_THREADS says "
        "otherwise; with more than one, results depend on timing (default: one a core on a CPU, "
        "one on a GPU; with --engine ray as many as the cluster has room for, and more when nodes "
        "join)",
        type=int,
        metavar="N",
    )
    engine = parser.add_argument_group("engine")
    text = "workers are processes of this machine, or of a Ray cluster, which needs the extra `ray`"
    add_flag(engine, "--engine", "processes", text, choices=("processes", "ray"))
    for name, kind, metavar, text in _RAY_FLAGS:
        flag = f"--{name.replace('_', '-')}"
        add_flag(engine, flag, RAY_DEFAULTS[name], text, type=kind, metavar=metavar)


_RAY_FLAGS = (
    (
        *("ray_address", str, "ADDRESS"),
        "the cluster: auto for the one that this machine is part of, ray://HOST:10001 or HOST:6379 "
        "(default: start one on this machine, and stop it at the end)",
    ),
    (
        *("cpus_per_worker", float, "CPUS"),
        "CPUs of a node that a worker takes; a fraction is allowed",
    ),
    (
        *("gpus_per_worker", float, "GPUS"),
        "GPUs of a node that a worker takes; with 0.25, four trials share a GPU (default: 1 if the "
        "cluster has GPUs, unless --device is cpu)",
    ),
    ("min_workers", int, "N", "start with this many workers; others may join later"),
    ("ray_timeout", float, "SECONDS", "how long to wait for --min-workers"),
)


def add_record_flags(parser: Parser, study: str) -> argparse._ArgumentGroup:
    """Add the flags that say where results are recorded, `--study` with its help."""
    record = parser.add_argument_group("record")
    text = f"{study} (default: named after the data set and a digest of the settings)"
    add_flag(record, "--study", None, text, metavar="NAME")
    add_flag(
        record,
        "--experiment",
        None,
        "the MLflow experiment (default: that of `mlflow run` or MLFLOW_EXPERIMENT_NAME, else "
        "cnn-sweep)",
        metavar="NAME",
    )
    add_storage_flag(record)
    add_flag(
        record,
        "--tracking-timeout",
        300,
        "how long to wait for a server that is away, MLflow's or the study's, before the sweep "
        "stops; the same command continues it",
        type=float,
        metavar="SECONDS",
    )
    return record


def add_output_flags(parser: Parser) -> None:
    """Add the flags that say how to show what happens."""
    output = parser.add_argument_group("output").add_mutually_exclusive_group()
    text = "print the result only, and problems on standard error"
    output.add_argument("--quiet", action="store_true", help=text)
    text = "print a JSON object for each event, one a line; all else is on standard error"
    output.add_argument("--json", action="store_true", help=text)


def add_storage_flag(group: argparse._ActionsContainer) -> None:
    """Add the flag that names Optuna's database."""
    text = "the database of the studies; not MLflow's"
    add_flag(group, "--storage", "sqlite:///optuna.db", text, metavar="URL")


def run(
    parser: Parser,
    do: Callable[[argparse.Namespace], int],
    argv: Sequence[str] | None,
    *,
    resume: str = RESUME,
) -> int:
    """Do what a command line asks for, and return the exit code."""
    set_up_mlflow()
    return run_command(parser, do, argv, resume=resume, exits_at_once=True)


def set_up_mlflow() -> None:
    """Set what MLflow reads from the environment, where the user has not."""
    for name, value in MLFLOW_SETTINGS.items():
        os.environ.setdefault(name, value)


def report_stop(outcome: str, reason: str) -> int:
    """Say why a sweep is interrupted or failed, and return the exit code.

    After a signal, the reason is empty.
    """
    if outcome == "failed":
        line = f"stopped: {printable(reason)}"
    else:
        line = f"stopped: {reason}; {RESUME}" if reason else f"interrupted: {RESUME}"
    print(line, file=sys.stderr)
    return 1 if reason else INTERRUPTED


@contextmanager
def workers_and_data(
    options: argparse.Namespace, make_settings: Callable[[int], Settings], output: Output
) -> Iterator[tuple[Settings, Dataset, WorkerPool]]:
    """Open the workers of a command line, and the data in all of them.

    `make_settings` returns the settings, checked, for a number of workers.
    """
    where = " on Ray" if options.engine == "ray" else ""
    output.step(f"starting workers{where}, opening {printable(options.dataset)}")
    open_workers = on_ray if options.engine == "ray" else on_this_machine
    own = references(options)
    data = None
    if own or any(":" in name for name in networks(options)):
        from experiments.study.preflight import check_trainable

        data = _checked_data(options, settings := make_settings(1))
        check_trainable(settings, data)
    # The workers start while we import.
    with open_workers(options, own) as (pool, num_workers, device):
        settings = replace(make_settings(num_workers), worker_device=device)
        data = data or _checked_data(options, settings)
        pool.open(data, options.data_dir)
        output.step("opening study and MLflow")
        yield settings, data, pool


def _checked_data(options: argparse.Namespace, settings: Settings) -> Dataset:
    """Return the data set of a command line, once both databases can be opened."""
    from cnn.data import load, notes_on_choosing
    from experiments.study.storage import check_storage

    check_storage(settings.storage)
    check_tracking()
    data = load(
        options.dataset,
        data_dir=options.data_dir,
        seed=settings.seed,
        image_size=options.image_size,
    )
    for note in (*data.notes, *notes_on_choosing(data)):
        print(f"note: {printable(note)}", file=sys.stderr)
    return data


def check_out(folder: Path, flag: str) -> None:
    """Raise ValueError if nothing can be written to a folder, which may not exist yet."""
    from tracking.files import check_folder

    existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    check_folder(existing, option=flag)


def report_folder(folder: Path, name: str) -> Path:
    """Return the folder of the report of a study or comparison, in another folder."""
    return folder / (re.sub(r"[^\w.-]+", "-", name).lstrip(".") or "study")


def settings_from_args(options: argparse.Namespace, num_workers: int, **others: Any) -> Settings:
    """Return the settings of a command line; `others` are those that have no flags."""
    from experiments.study.settings import Settings

    given = {
        name: value
        for name, value in vars(options).items()
        if name in Settings.__dataclass_fields__
    }
    varied = parse_vary(options.vary, options)
    domains = {each.name: varied.get(each.name, each.domain(options)) for each in PARAMETERS}
    given["search"] = {name: domain for name, domain in domains.items() if domain is not None}
    given["training"] = {
        each.name: getattr(options, each.name)
        for each in PARAMETERS
        if not each.is_searched_by_default and each.is_given(options)
    }
    return Settings(**(given | others | {"workers": num_workers}))


def how_to_compare(page: str, answer: str = "") -> str:
    """Return the lines that say how to see runs in MLflow.

    Args:
        page: the address of their list, after that of the server: see `Tracker.show`.
        answer: that of the page with the answer, if there is one.
    """
    import mlflow

    uri = mlflow.get_tracking_uri()
    server, command = "http://127.0.0.1:5000", "mlflow ui"
    if uri.startswith("http"):
        # A browser asks for name and password itself.
        server = re.sub(r"//\S*@", "//", uri.rstrip("/"))
        command = "in the MLflow server's pages"
    elif (file := sqlite_file(uri)) is None or file.absolute() != Path("mlflow.db").absolute():
        command += f" --backend-store-uri {shlex.quote(without_passwords(uri))}"
    lines = [
        f"  compare the runs:  {command}",
        f"                     then open {server}/{page}",
        *([f"  the answer there:  {server}/{answer}"] if answer else []),
    ]
    return "\n".join(lines)
