"""How many workers does one driver feed? `python -m benchmarks.scaling`, about ten minutes.

Only the workers are simulated. Optuna's storage is real, and so are MLflow's server, started as
`experiments.servers` does for a team, one of its users, and the driver, `experiments.sweep`.
A worker sleeps for each epoch (± 10 %), reports accuracies at which pruning prunes, and ends with
the network's weights. Two tables:

1. *Costs*: the driver's time for a trial and for an epoch, in a study that already has `--history`
   trials, with workers that never keep it waiting. Earlier trials are copies of 20 that the driver
   has recorded, in Optuna's storage alone.
2. *Workers*: the share of time in which workers train, in the longest of these studies, in the
   second half of the time, since the first is needed to start trials. A driver that needs d seconds
   for a trial feeds L / d workers whose trials take L seconds. The sweep is stopped by a Ctrl-C.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager
from pathlib import Path
from unittest.mock import patch

from benchmarks.common import make_parser, markdown, spread
from benchmarks.driver import OF_A_TRIAL, OF_AN_EPOCH, Measured, measure
from benchmarks.processes import serving
from cnn.devices import machine
from experiments.cli import MLFLOW_SETTINGS
from experiments.study.domains import Choices, Range
from experiments.study.settings import Settings

PARTS = ("costs", "workers")
PRUNERS = {"tpe": "one_epoch", "random": "median"}
"""The pruner that each sampler is measured with: what one costs, the other doesn't change."""

COST_WORKERS = 8
NUM_ORIGINALS = 20
ENDLESS = 10**9
"""More trials than are ever tried."""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    options = parse(argv)
    os.environ |= {k: v for k, v in MLFLOW_SETTINGS.items() if k not in os.environ}
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
        os.environ.pop(name, None)
    with tempfile.TemporaryDirectory() as folder, chdir(folder), mlflow_access(options.server):
        server = "MLflow's server" if options.server else "no server"
        print(f"{machine()}; SQLite, {server}\n", flush=True)
        if "costs" in options.parts:
            print(f"{costs_table(measure_costs(options))}\n", flush=True)
        if "workers" in options.parts:
            print(workers_table(measure_workers(options)), flush=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = make_parser("scaling", __doc__)
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="tables")
    about = "MLflow's server; without it, the driver writes to MLflow's database itself"
    add("--server", action=argparse.BooleanOptionalAction, default=True, help=about)
    add("--epochs", type=int, default=20, help="of a trial")
    add("--samplers", nargs="+", choices=PRUNERS, default=list(PRUNERS), help="of the studies")
    add("--history", type=int, nargs="+", default=[100, 1000], help="numbers of earlier trials")
    add("--trials", type=int, default=10, help="that are measured in one repeat")
    add("--repeats", type=int, default=3, help="of each row of the first table")
    rows, about = [(8, 3), (100, 3), (1000, 3), (1000, 30)], "rows of the second table"
    add("--workers", type=_row, nargs="+", default=rows, metavar="WORKERSxSECONDS", help=about)
    add("--seconds", type=float, default=90.0, help="of each row of the second table")
    options = parser.parse_args(argv)
    if min(options.history) < NUM_ORIGINALS:
        parser.error(f"--history must be ≥ {NUM_ORIGINALS}, not {min(options.history)}")
    return options


def _row(text: str) -> tuple[int, float]:
    workers, _, seconds = text.partition("x")
    return int(workers), float(seconds)


Options = argparse.Namespace


def make_settings(
    options: Options, sampler: str, *, trials: int, workers: int = COST_WORKERS
) -> Settings:
    """Return the settings of a sweep, in databases in the working folder."""
    return Settings(
        search={
            "loss": Choices(("l1", "mse", "cross_entropy")),
            "learning_rate": Range(0.001, 1.0, log=True),
            "batch_size": Choices((16, 32, 64, 128)),
        },
        trials=trials,
        epochs=options.epochs,
        seed=0,
        sampler=sampler,
        pruner=PRUNERS[sampler],
        training={"precision": "float32"},
        device="cpu",
        study=sampler,
        storage="sqlite:///optuna.db",
        experiment="scaling",
        timeout=0,
        workers=workers,
        max_failures=99,
        tracking_timeout=60,
    )


def lengthen(options: Options, sampler: str, num_trials: int) -> None:
    """Bring the study of a sampler to a number of trials, by copies of its first ones."""
    import optuna

    settings = make_settings(options, sampler, trials=NUM_ORIGINALS)
    measure(settings, epoch_seconds=0)
    study = optuna.load_study(study_name=sampler, storage=settings.storage)
    trials = study.get_trials()
    missing = max(0, num_trials - len(trials))
    study.add_trials(itertools.islice(itertools.cycle(trials[:NUM_ORIGINALS]), missing))


def measure_costs(options: Options) -> dict[tuple[str, int], list[Measured]]:
    """Measure what a trial and an epoch cost, by sampler and number of earlier trials."""
    rows: dict[tuple[str, int], list[Measured]] = defaultdict(list)
    for history in sorted(options.history):
        for sampler in options.samplers:
            lengthen(options, sampler, history)
        for repeat, sampler in itertools.product(range(options.repeats), options.samplers):
            trials = history + (repeat + 1) * options.trials
            settings = make_settings(options, sampler, trials=trials)
            rows[sampler, history].append(measure(settings, epoch_seconds=0))
    return rows


def measure_workers(options: Options) -> list[Measured]:
    """Measure with each number of workers, in the longest study of the first sampler."""
    sampler, rows = options.samplers[0], []
    lengthen(options, sampler, max(options.history))
    for workers, seconds in options.workers:
        settings = make_settings(options, sampler, trials=ENDLESS, workers=workers)
        rows.append(measure(settings, epoch_seconds=seconds, seconds=options.seconds))
        give_up_unfinished(settings)
    return rows


def give_up_unfinished(settings: Settings) -> None:
    """End the trials that a stopped sweep left, so that the next sweep does not resume them."""
    import optuna
    from optuna.trial import TrialState

    study = optuna.load_study(study_name=settings.study, storage=settings.storage)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)


@contextmanager
def mlflow_access(with_server: bool) -> Iterator[None]:
    """Have MLflow on SQLite in the working folder, on a server as a team starts it, or without."""
    from experiments.accounts import Passwords, make_users
    from experiments.servers import mlflow_command, mlflow_settings

    store = f"sqlite:///{Path.cwd()}/mlflow.db"
    if not with_server:
        with patch.dict(os.environ, {"MLFLOW_TRACKING_URI": store}):
            yield
        return
    passwords = Passwords(Path.cwd())
    for name in ("passwords", "users"):
        Path(name).mkdir()
    access = {"MLFLOW_TRACKING_USERNAME": "alice"}
    access["MLFLOW_TRACKING_PASSWORD"] = passwords.read("users/alice")
    variables = mlflow_settings(passwords, users=f"sqlite:///{Path.cwd()}/mlflow_users.db")
    command = mlflow_command(store, "artifacts")
    with serving(command, health="/health", environment=variables) as address:
        make_users(address, passwords)
        with patch.dict(os.environ, {**access, "MLFLOW_TRACKING_URI": address}):
            yield


def costs_table(rows: Mapping[tuple[str, int], Sequence[Measured]]) -> str:
    """Return the table of the driver's times in ms, medians over the repeats; memory in MB."""
    parts = (*OF_A_TRIAL, *OF_AN_EPOCH)
    header = ["sampler, pruner", "trials", *parts, "a trial, whole", "requests", "memory"]
    lines = []
    for (sampler, history), of in rows.items():
        times = [statistics.median(row.milliseconds(part) for row in of) for part in parts]
        requests = statistics.median(sum(row.requests.values()) / row.trials for row in of)
        cells = [f"`{sampler}`, `{PRUNERS[sampler]}`", f"{history:,}", *(f"{t:.1f}" for t in times)]
        cells.append(spread([1000 * row.driver_seconds / row.trials for row in of]))
        lines.append([*cells, f"{requests:.0f}", f"{of[-1].memory:.0f}"])
    return markdown(header, lines)


def workers_table(rows: Sequence[Measured]) -> str:
    """Return the table of efficiency by number of workers."""
    header = ["workers", "epoch, s", "efficiency", "all busy after", "trials", "epochs"]
    header += ["driver at work", "of a processor", "would feed"]
    lines = [
        [
            f"{row.workers:,}",
            f"{row.epoch_seconds:g}",
            f"{row.efficiency:.1%}",
            "never" if math.isinf(row.fill_seconds) else f"{row.fill_seconds:.0f} s",
            f"{row.trials:,}",
            f"{row.epochs:,}",
            f"{row.driver_seconds / row.seconds:.0%}",
            f"{row.processor_seconds / row.seconds:.0%}",
            f"{row.would_feed:,.0f}",
        ]
        for row in rows
    ]
    return markdown(header, lines)


if __name__ == "__main__":
    main()
