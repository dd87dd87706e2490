"""Sweep losses, learning rates and batch sizes: `python -m experiments.sweep --help`."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tracking.store import is_passing, without_passwords

# What is slow to import (PyTorch, Optuna, MLflow) is imported where it is needed: --help is not it.
if TYPE_CHECKING:
    from experiments.settings import Settings
    from experiments.study import SweepEnded, SweepStarted

# Unless the user says otherwise. A server that is away is waited for by `tracking.patience`, which
# hears a Ctrl-C meanwhile; MLflow's own seven retries don't.
MLFLOW_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    # Two lines a run, amid ours, with the password of whoever has it in the server's address.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}

EPILOG = """\
losses:
  l1 mse cross_entropy smooth_l1 l1_softmax mse_softmax bce label_smoothing
  focal squentropy poly1 gce multi_margin squared_hinge; or all

The same command again continues its study: --trials is the total. Runs and models go to MLflow
(sqlite:///mlflow.db unless MLFLOW_TRACKING_URI says otherwise), the study to --storage.

exit codes: 0 done; 1 no trial of the study is complete, or the disk is full, a database locked or
read-only, a server away: the same command goes on later; 2 bad input; 130 interrupted
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)  # one line, like all that is wrong with what was typed


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; what is wrong with that is a ValueError."""
    parser = _Parser(
        prog="python -m experiments.sweep",
        description="Find out which loss function, learning rate and batch size train a CNN best: "
        "an Optuna study, each trial a run with its model in MLflow.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset",
        default="digits",
        metavar="NAME|PATH",
        help="digits (bundled), cifar10 (downloaded on demand), or a folder of images: "
        "train/<class>/* with test/<class>/* if there, else <class>/* (default: %(default)s)",
    )
    data.add_argument(
        "--data-dir",
        type=Path,
        default=Path("data"),
        metavar="DIR",
        help="where downloads and decoded images are kept (default: %(default)s)",
    )
    space = parser.add_argument_group("search space")
    space.add_argument(
        "--losses",
        nargs="+",
        default=["l1", "mse", "cross_entropy"],
        metavar="LOSS",
        help="loss functions, or all; they are listed below (default: l1 mse cross_entropy)",
    )
    space.add_argument(
        "--learning-rate-min",
        type=float,
        default=0.001,
        metavar="RATE",
        help="lower end of the log-uniform range of peak learning rates (default: %(default)s)",
    )
    space.add_argument(
        "--learning-rate-max",
        type=float,
        default=1.0,
        metavar="RATE",
        help="upper end of that range (default: %(default)s)",
    )
    space.add_argument(
        "--batch-sizes",
        nargs="+",
        default=["16", "32", "64", "128"],
        metavar="IMAGES",
        help="batch sizes, in images a step (default: 16 32 64 128)",
    )
    search = parser.add_argument_group("search")
    search.add_argument(
        "--trials",
        type=int,
        default=24,
        metavar="N",
        help="trials that the study is brought to, those of earlier starts included "
        "(default: %(default)s)",
    )
    search.add_argument(
        "--epochs",
        type=int,
        default=10,
        metavar="N",
        help="passes over the training split in each trial (default: %(default)s)",
    )
    search.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of split, initial weights, order of images and sampler (default: %(default)s)",
    )
    search.add_argument(
        "--sampler",
        choices=("tpe", "random", "qmc", "gp"),
        default="tpe",
        help="how Optuna chooses settings: tree-structured Parzen estimator, independent draws, "
        "quasi-Monte-Carlo, or a Gaussian process (default: %(default)s)",
    )
    search.add_argument(
        "--pruner",
        choices=("none", "median", "hyperband", "asha", "one_epoch"),
        default="one_epoch",
        help="how trials that lag behind are ended early; one_epoch keeps the best third after "
        "their first epoch (default: %(default)s)",
    )
    search.add_argument(
        "--timeout",
        type=float,
        default=0,
        metavar="SECONDS",
        help="start no trial after so long; 0 is no limit (default: %(default)s)",
    )
    search.add_argument(
        "--max-failures",
        type=int,
        default=3,
        metavar="N",
        help="stop after so many failed trials one after another (default: %(default)s)",
    )
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
        help="processes that train, each one trial at a time; with more than one, results depend "
        "on timing (default: one a core on a CPU, one on a GPU)",
    )
    record = parser.add_argument_group("record")
    record.add_argument(
        "--study",
        default=None,
        metavar="NAME",
        help="the Optuna study (default: named after the data set and a digest of the settings)",
    )
    record.add_argument(
        "--experiment",
        default=None,
        metavar="NAME",
        help="the MLflow experiment (default: that of `mlflow run` or MLFLOW_EXPERIMENT_NAME, "
        "else cnn-sweep)",
    )
    record.add_argument(
        "--storage",
        default="sqlite:///optuna.db",
        metavar="URL",
        help="the study's database; not MLflow's (default: %(default)s)",
    )
    record.add_argument(
        "--tracking-timeout",
        type=float,
        default=300,
        metavar="SECONDS",
        help="how long to wait for an MLflow server that went away, before the sweep is stopped "
        "(the same command continues it; default: %(default)s)",
    )
    record.add_argument(
        "--register",
        default="auto",
        metavar="NAME",
        help="the registered model that the best trial's model becomes a version of, and its "
        "champion, if it beats the present one on the same data: auto is cnn-<data set>, none "
        "registers nothing (default: %(default)s)",
    )
    record.add_argument(
        "--tensorboard",
        type=Path,
        default=None,
        metavar="DIR",
        help="write TensorBoard event files as well, a folder for each trial",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sweep of a command line, and return the exit code."""
    parser = build_parser()
    for name, value in MLFLOW_SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        return _run(parser.parse_args(argv))
    except ValueError as error:
        line = without_passwords(str(error))
        if is_passing(error):
            print(f"stopped: {line}; the same command continues the study", file=sys.stderr)
            return 1
        print(f"{parser.prog}: error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command continues the study")
        return 130
    except BrokenPipeError:  # `| head` has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(options: argparse.Namespace) -> int:
    from experiments.workers import Pool, visible_gpus

    # `cuda` is one GPU to each worker; whoever says `cuda:1` means that one.
    gpus = visible_gpus() if options.device in ("auto", "cuda") else []
    num_workers = _num_workers(options.workers, options.device, len(gpus))
    num_threads = max(1, _num_cores() // num_workers)
    # The workers start while we import.
    with Pool(num_workers, num_threads=num_threads, gpus=gpus) as pool:
        from cnn.data import load
        from experiments.workers import DataReference

        settings = _settings(options, num_workers)
        data = load(options.dataset, data_dir=options.data_dir, seed=settings.seed)
        reference = DataReference(
            digest=data.digest, data_dir=options.data_dir.resolve(), seed=settings.seed
        )
        pool.open(reference)
        return _sweep(options, settings, data, pool)


def _sweep(options: argparse.Namespace, settings: Settings, data: Any, pool: Any) -> int:
    from experiments.display import Display
    from experiments.interrupts import Interrupts
    from experiments.study import (
        BestRegistered,
        SweepEnded,
        SweepStarted,
        open_study,
        sweep,
        trials_table,
    )

    started: SweepStarted | None = None
    ended: SweepEnded | None = None
    registered = ""
    with ExitStack() as stack:
        interrupts = stack.enter_context(Interrupts())
        observers: list[Any] = [stack.enter_context(Display(settings))]
        if options.tensorboard is not None:
            from experiments.tensorboard import EventFiles

            observers.append(stack.enter_context(EventFiles(options.tensorboard)))
        for event in sweep(settings, data, pool, interrupts):
            if isinstance(event, SweepStarted):
                started = event
            elif isinstance(event, BestRegistered):
                registered = event.report
            elif isinstance(event, SweepEnded):
                ended = event
            for observer in observers:
                observer.show(event)
    assert started is not None
    assert ended is not None
    table = trials_table(open_study(settings, data))
    return _report(table, started, ended, data_name=options.dataset, registered=registered)


def _report(
    table: Any, started: SweepStarted, ended: SweepEnded, *, data_name: str, registered: str
) -> int:
    """Print the trials, the best one, and what to type next."""
    shown = table.drop(columns=["val_loss", "run_id"]).assign(
        learning_rate=table["learning_rate"].map("{:.4g}".format),
        val_accuracy=table["val_accuracy"].map("{:.2%}".format),
    )
    print(f"\n{shown.to_string(index=False)}\n" if len(shown) else "")
    complete = table[table["outcome"] == "complete"]
    if ended.outcome == "interrupted" and ended.reason:
        print(f"stopped: {ended.reason}; the same command continues the study", file=sys.stderr)
        return 1
    if ended.outcome == "interrupted":
        print("interrupted: the same command continues the study")
        return 130
    if ended.outcome == "failed":
        reason = "their runs in MLflow say why; the same command goes on with the next trials"
        print(f"stopped: {ended.reason}: {reason}", file=sys.stderr)
        return 1
    if not len(complete):
        print(f"no trial of study {started.study} is complete", file=sys.stderr)
        return 1
    best = complete.iloc[0]
    line = f"  registered:        {registered}\n" if registered else ""
    print(
        f"best: trial {best['trial']}, loss {best['loss']}, learning rate "
        f"{best['learning_rate']:.4g}, batch size {best['batch_size']}: validation accuracy "
        f"{best['val_accuracy']:.2%}\n"
        f"{line}"
        f"  compare the runs:  {_ui_command()}\n"
        f"                     then {_ui_address(started)}\n"
        f"  label images:      python -m tracking.predict {_quoted(data_name + ':test')} "
        f"--run-id {best['run_id']}"
    )
    return 0


def _ui_command() -> str:
    import mlflow

    uri = mlflow.get_tracking_uri()
    if uri.startswith("http"):
        return "in the MLflow server's pages"
    if uri == f"sqlite:///{Path('mlflow.db').absolute()}":
        return "mlflow ui"
    return f"mlflow ui --backend-store-uri {_quoted(without_passwords(uri))}"


def _ui_address(started: SweepStarted) -> str:
    import mlflow

    uri = mlflow.get_tracking_uri()
    server = uri.rstrip("/") if uri.startswith("http") else "http://127.0.0.1:5000"
    server = re.sub(r"//\S*@", "//", server)  # a browser asks for name and password itself
    return f"open {server}/#/experiments/{started.experiment_id}/runs"


def _quoted(text: str) -> str:
    import shlex

    return shlex.quote(text)


def _settings(options: argparse.Namespace, num_workers: int) -> Settings:
    from cnn.losses import LOSSES
    from experiments.settings import Settings

    names = {field for field in Settings.__dataclass_fields__ if field not in ("workers",)}
    given = {name: value for name, value in vars(options).items() if name in names}
    losses = _split(options.losses)
    given["losses"] = tuple(LOSSES) if losses == ["all"] else tuple(losses)
    given["batch_sizes"] = tuple(_integer("--batch-sizes", v) for v in _split(options.batch_sizes))
    return Settings(**given, workers=num_workers)


def _split(values: Sequence[str]) -> list[str]:
    """Return the values of a list, separated by spaces or commas, as words or in one string."""
    return [part for value in values for part in re.split(r"[\s,]+", value) if part]


def _integer(flag: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{flag} takes integers ≥ 1, not {text!r}") from None


def _num_workers(asked: int | None, device: str, num_gpus: int) -> int:
    if asked is not None:
        if asked < 1:
            raise ValueError(f"--workers must be ≥ 1, not {asked}")
        return asked
    if num_gpus or device.startswith("cuda"):
        return max(1, num_gpus)
    return _num_cores()


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _leave(code: int) -> NoReturn:
    """End the process at once: taking MLflow and PyTorch apart would take two seconds more."""
    with suppress(BrokenPipeError):
        sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    _leave(main())
