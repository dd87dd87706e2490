"""How far does one driver go? `python -m benchmarks.scaling`, about ten minutes.

Everything is real but for the workers: Optuna's storage, MLflow's server with users as a team
starts it (`experiments.servers`), asked over HTTP by one of them, and the driver,
`controller.sweep`. A worker is a sleep of `--epoch-seconds` an epoch (± 10 %), which learns
as plausibly as needed for pruning to prune, and ends with the network's weights. Three tables:

1. *Efficiency* with few workers: seconds in which workers trained, of all that they had.
2. *Costs*: what the driver does for a trial and for an epoch, in a study that already has
   `--history` trials, with workers that are always done. Earlier trials are copies, row by row in
   both databases, of `--originals` that the driver has recorded itself.
3. *Limits*: efficiency with more and more workers, in the longest of those studies; in the second
   half of the time, as the first is for handing out trials. A driver that needs d seconds a trial
   feeds L / d workers whose trials take L seconds.
4. *Drivers*: several of them, processes that share a study and as many workers as one has alone.
   Not by default, as it takes `--storage postgresql`.

In 1, 3 and 4 the study always has more trials: what is measured ends after a time, by a Ctrl-C.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, chdir, contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from benchmarks.common import markdown, spread
from experiments.cli import MLFLOW_SETTINGS
from experiments.interrupts import Interrupts

if TYPE_CHECKING:
    from benchmarks.simulation import SimulatedPool
    from experiments.study.settings import Settings

FIGURES = Path(__file__).parent / "figures"
PARTS = ("efficiency", "costs", "limits", "drivers")
DATABASES = ("sqlite", "postgresql")
SEARCHES = {"tpe": "one_epoch", "random": "median"}
"""Samplers, and the pruner that each is measured with: what one costs, the other doesn't change."""

COST_WORKERS = 8
ENDLESS = 10**9
"""More trials than are ever tried."""

CONNECT, WAIT, REST = "connect", "wait", "rest"
OF_AN_EPOCH = ("log to MLflow", "report to Optuna", "prune decision")
OF_A_TRIAL = (
    "count trials",
    "suggest",
    "open run",
    "record model",
    "close run",
    "tell Optuna",
    "heartbeats",
    REST,
)
# Okabe and Ito's, which colour-blind readers can tell apart, and greys.
COLORS = ["#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#F0E442", "#888888"]
COLORS += ["#000000", "#BBBBBB", "#555555"]
MARKERS = "os^Dv"


class Stopwatch:
    """Seconds and HTTP requests of parts of a thread's work, each without those of parts within.

    It is `begun` with the first of them.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.requests: dict[str, int] = defaultdict(int)
        self.begun = math.inf
        self._within: list[tuple[str, list[float]]] = []

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return the call, which takes note."""

        @wraps(call)
        def noting(*args: Any, **kwargs: Any) -> Any:
            inner: list[float] = []
            self._within.append((part, inner))
            start = time.monotonic()
            self.begun = min(self.begun, start)
            try:
                return call(*args, **kwargs)
            finally:
                took = time.monotonic() - start
                self._within.pop()
                self.seconds[part].append(took - sum(inner))
                if self._within:
                    self._within[-1][1].append(took)

        return noting

    def counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return the call, which is counted as a request of the part that it is in."""

        @wraps(call)
        def counting(*args: Any, **kwargs: Any) -> Any:
            self.requests[self._within[-1][0] if self._within else REST] += 1
            return call(*args, **kwargs)

        return counting

    @contextmanager
    def on_the_driver(self, pool: SimulatedPool) -> Iterator[None]:
        """Watch a sweep with this pool."""
        import requests

        from experiments.study import controller
        from experiments.study.controller import _Sweep
        from experiments.study.dispatch import Dispatcher
        from experiments.study.heartbeat import Heartbeat
        from experiments.study.recorder import Recorder, RunningTrial
        from experiments.study.space import Space
        from tracking.runs import Run

        parts: list[tuple[str, object, str]] = [
            (WAIT, pool, "wait"),
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
        ]
        with ExitStack() as stack:
            for part, owner, name in parts:
                stack.enter_context(
                    patch.object(owner, name, self.timed(part, getattr(owner, name)))
                )
            send = self.counted(requests.Session.send)
            stack.enter_context(patch.object(requests.Session, "send", send))
            yield


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a sweep came to, from when it asked for a trial until it was over, or told to end."""

    workers: int
    epoch_seconds: float
    seconds: float
    busy_seconds: float
    """In which workers trained, of all together."""
    late_busy_seconds: float
    """Likewise, in the second half."""
    fill_seconds: float
    """Until every worker had a trial; inf: there was no such time."""
    trials: int
    """That were over."""
    epochs: int
    """That were recorded."""
    processor_seconds: float
    """Of the driver."""
    parts: Mapping[str, Sequence[float]]
    """Seconds of the driver, a call."""
    requests: Mapping[str, int]
    """Over HTTP."""
    closing_seconds: float
    """Until what still ran was closed."""

    @property
    def efficiency(self) -> float:
        """Of the seconds that all workers had, the share in which they trained."""
        return self.busy_seconds / (self.workers * self.seconds)

    @property
    def late_efficiency(self) -> float:
        """Likewise, in the second half."""
        return self.late_busy_seconds / (self.workers * self.seconds / 2)

    @property
    def would_feed(self) -> float:
        """How many such workers would keep the driver busy all the time."""
        return self.workers * self.late_efficiency * self.seconds / self.driver_seconds

    @property
    def driver_seconds(self) -> float:
        """In which the driver worked, rather than waited for workers, but for its start."""
        return self.seconds - self.total(WAIT) - self.total(CONNECT)

    def total(self, part: str) -> float:
        """Return what a part took in all, in seconds; the rest is what no part has."""
        if part == REST:
            return self.seconds - sum(map(sum, self.parts.values()))
        return sum(self.parts.get(part, ()))

    def milliseconds(self, part: str) -> float:
        """Return what a part took on average: an epoch's an epoch, a trial's a trial."""
        return 1000 * self.total(part) / (self.epochs if part in OF_AN_EPOCH else self.trials)


class _End(Interrupts):
    """A Ctrl-C that comes so many seconds after the first trial, and takes note of what was."""

    def __init__(self, pool: SimulatedPool, watch: Stopwatch, seconds: float) -> None:
        super().__init__()
        self.pool, self.watch, self.after = pool, watch, seconds
        self.processor = time.process_time()

    def __call__(self) -> bool:
        if time.monotonic() >= self.watch.begun + self.after:
            self.take_note()
        return self.first is not None

    def take_note(self) -> None:
        if self.first is not None:
            return
        self.first = time.monotonic()
        self.seconds = self.first - self.watch.begun
        self.busy_seconds = self.pool.busy_seconds(self.watch.begun, self.first)
        half = self.first - self.seconds / 2
        self.late_busy_seconds = self.pool.busy_seconds(half, self.first)
        self.processor_seconds = time.process_time() - self.processor
        self.parts = {part: list(seconds) for part, seconds in self.watch.seconds.items()}
        self.requests = dict(self.watch.requests)


def measure(settings: Settings, *, epoch_seconds: float, seconds: float = math.inf) -> Measured:
    """Run a sweep, to its end or for so many seconds, and return what it came to."""
    from benchmarks.simulation import SimulatedPool, no_data
    from experiments.study.controller import sweep
    from experiments.study.events import SweepEnded, TrialEnded, TrialProgressed

    pool, watch = SimulatedPool(settings.workers, epoch_seconds=epoch_seconds), Stopwatch()
    end = _End(pool, watch, seconds)
    trials = epochs = 0
    with watch.on_the_driver(pool):
        for event in sweep(settings, no_data(), pool, end):
            trials += isinstance(event, TrialEnded) and event.outcome != "interrupted"
            epochs += isinstance(event, TrialProgressed)
            if isinstance(event, SweepEnded):
                if event.outcome == "failed" or event.reason:
                    raise RuntimeError(f"the sweep ended: {event.outcome} {event.reason}")
                end.take_note()
    assert end.first is not None
    return Measured(
        workers=settings.workers,
        epoch_seconds=epoch_seconds,
        seconds=end.seconds,
        busy_seconds=end.busy_seconds,
        late_busy_seconds=end.late_busy_seconds,
        fill_seconds=pool.all_busy - watch.begun,
        trials=trials,
        epochs=epochs,
        processor_seconds=end.processor_seconds,
        parts=end.parts,
        requests=end.requests,
        closing_seconds=time.monotonic() - end.first,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and draw."""
    options = parse(argv)
    os.environ |= {k: v for k, v in MLFLOW_SETTINGS.items() if k not in os.environ}
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
        os.environ.pop(name, None)
    figure = options.figure.absolute() if options.figure else None
    with ExitStack() as stack:
        stack.enter_context(chdir(stack.enter_context(tempfile.TemporaryDirectory())))
        bench = stack.enter_context(Bench.opened(options))
        from cnn.devices import machine

        print(f"{machine()}; Optuna on {options.storage}, MLflow on {options.server}\n", flush=True)
        efficiency = bench.efficiency() if "efficiency" in options.parts else []
        costs = bench.costs() if {"costs", "limits"} & set(options.parts) else {}
        limits = bench.limits() if "limits" in options.parts else []
        if "drivers" in options.parts:
            bench.drivers()
    if figure:
        draw(efficiency, costs, limits, options, figure)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    default = "(default: %(default)s)"
    add("--parts", nargs="+", choices=PARTS, default=PARTS[:3], help="(default: the first three)")
    add("--storage", choices=DATABASES, default="sqlite", help=f"Optuna's {default}")
    add(
        "--server",
        choices=(*DATABASES, "none"),
        default="sqlite",
        help=f"MLflow's database; none: SQLite without a server {default}",
    )
    add("--epochs", type=int, default=20, help=f"of a trial {default}")
    add("--epoch-seconds", type=float, default=3.0, help=default)
    add("--workers", type=int, nargs="+", default=[1, 2, 4, 8], help="of the first table")
    add("--seconds", type=float, default=45.0, help=f"of each row of the first table {default}")
    add("--history", type=int, nargs="+", default=[100, 1000, 10_000], help="earlier trials")
    add("--originals", type=int, default=20, help=f"of which the others are copies {default}")
    add("--trials", type=int, default=10, help=f"that are measured at a time {default}")
    add("--repeats", type=int, default=3, help=f"of that {default}")
    add("--samplers", nargs="+", choices=SEARCHES, default=list(SEARCHES), help="(default: both)")
    add(
        "--limits",
        type=_limit,
        nargs="+",
        default=[(10, 3), (100, 3), (1000, 3), (1000, 30)],
        metavar="WORKERSxSECONDS",
        help="rows of the third table: workers, and seconds an epoch "
        "(default: 10x3 100x3 1000x3 1000x30)",
    )
    add("--limit-seconds", type=float, default=90.0, help=f"of each row of it {default}")
    add("--drivers", type=int, nargs="+", default=[1, 2, 4], help="rows of the fourth table")
    add("--shared", type=_limit, default=(400, 3), metavar="WORKERSxSECONDS", help="400x3")
    add("--figure", type=Path, metavar="FILE", help="draw the first three")
    options = parser.parse_args(argv)
    if "drivers" in options.parts and options.storage != "postgresql":
        parser.error("several drivers share a study on --storage postgresql")
    options.history.sort()
    if options.originals > options.history[0]:
        parser.error(f"--originals must be ≤ the first of --history, not {options.originals}")
    return options


def _limit(text: str) -> tuple[int, float]:
    workers, _, seconds = text.partition("x")
    return int(workers), float(seconds)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Servers that run, and what is measured on them."""

    options: argparse.Namespace
    storage: str
    """Optuna's database."""
    store: str
    """MLflow's."""

    @classmethod
    @contextmanager
    def opened(cls, options: argparse.Namespace) -> Iterator[Bench]:
        """Start what is asked for in the working folder, and stop it in the end."""
        folder = Path.cwd()
        with ExitStack() as stack:
            urls = {"sqlite": f"sqlite:///{folder}/{{}}.db"}
            if "postgresql" in (options.storage, options.server):
                urls["postgresql"] = stack.enter_context(postgresql())
            storage = urls[options.storage].format("optuna")
            store = urls["sqlite" if options.server == "none" else options.server].format("mlflow")
            if options.server == "none":
                access = {"MLFLOW_TRACKING_URI": store}
            else:
                users = urls[options.server].format("mlflow_users")
                access = stack.enter_context(team_server(store, users))
            stack.enter_context(patch.dict(os.environ, access))
            yield cls(options=options, storage=storage, store=store)

    def settings(self, study: str, *, workers: int, trials: int, sampler: str = "tpe") -> Settings:
        """Return those of a sweep."""
        from experiments.study.parameters import Choices, LogRange
        from experiments.study.settings import Settings

        return Settings(
            search={
                "loss": Choices(("l1", "mse", "cross_entropy")),
                "learning_rate": LogRange(0.001, 1.0),
                "batch_size": Choices((16, 32, 64, 128)),
            },
            trials=trials,
            epochs=self.options.epochs,
            seed=0,
            sampler=sampler,
            pruner=SEARCHES[sampler],
            optimizer="sgd",
            schedule="one_cycle",
            device="cpu",
            precision="float32",
            study=study,
            storage=self.storage,
            experiment="scaling",
            timeout=0,
            workers=workers,
            max_failures=99,
            tracking_timeout=60,
        )

    def efficiency(self) -> list[Measured]:
        """Measure with few workers, each number in a study of its own."""
        self._record_originals("tpe")  # what is imported by the first trial alone is no matter here
        rows = []
        for workers in self.options.workers:
            settings = self.settings(f"of {workers}", workers=workers, trials=ENDLESS)
            rows.append(_for_a_while(settings, self.options.epoch_seconds, self.options.seconds))
        print(f"{efficiency_table(rows)}\n", flush=True)
        return rows

    def costs(self) -> dict[tuple[str, int], list[Measured]]:
        """Measure a trial's and an epoch's costs, by sampler and number of earlier trials."""
        from benchmarks.earlier import lengthen

        options = self.options
        rows: dict[tuple[str, int], list[Measured]] = defaultdict(list)
        for sampler in options.samplers:
            self._record_originals(sampler)
        for history in options.history:
            for sampler in options.samplers:
                originals = options.originals
                lengthen(self.storage, self.store, sampler, history, num_originals=originals)
            for repeat, sampler in itertools.product(range(options.repeats), options.samplers):
                trials = history + (repeat + 1) * options.trials
                settings = self.settings(
                    sampler, workers=COST_WORKERS, trials=trials, sampler=sampler
                )
                rows[sampler, history].append(measure(settings, epoch_seconds=0))
        if "costs" in options.parts:
            print(f"{costs_table(rows)}\n", flush=True)
        return rows

    def limits(self) -> list[Measured]:
        """Measure with many workers, in the longest study of the first sampler."""
        rows = []
        sampler = self.options.samplers[0]
        for workers, epoch_seconds in self.options.limits:
            settings = self.settings(sampler, workers=workers, trials=ENDLESS, sampler=sampler)
            rows.append(_for_a_while(settings, epoch_seconds, self.options.limit_seconds))
        print(f"{limits_table(rows)}\n", flush=True)
        return rows

    def drivers(self) -> dict[int, list[Measured]]:
        """Measure several drivers at a time, which share a study and a number of workers."""
        workers, epoch_seconds = self.options.shared
        self._record_originals("tpe")
        rows: dict[int, list[Measured]] = {}
        for number in self.options.drivers:
            settings = self.settings("tpe", workers=workers // number, trials=ENDLESS)
            # Processes that know nothing of this one's connections.
            with ProcessPoolExecutor(number, get_context("spawn")) as processes:
                job = partial(measure, settings, epoch_seconds=epoch_seconds)
                job = partial(job, seconds=self.options.limit_seconds)
                futures = [processes.submit(job) for _ in range(number)]
                rows[number] = [future.result() for future in futures]
            give_up_unfinished(settings)
        print(f"{drivers_table(rows)}\n", flush=True)
        return rows

    def _record_originals(self, sampler: str) -> None:
        trials = self.options.originals
        settings = self.settings(sampler, workers=COST_WORKERS, trials=trials, sampler=sampler)
        measure(settings, epoch_seconds=0)


def _for_a_while(settings: Settings, epoch_seconds: float, seconds: float) -> Measured:
    measured = measure(settings, epoch_seconds=epoch_seconds, seconds=seconds)
    give_up_unfinished(settings)
    return measured


def give_up_unfinished(settings: Settings) -> None:
    """Have the next sweep not take up again what the last one left."""
    import optuna
    from optuna.trial import TrialState

    study = optuna.load_study(study_name=settings.study, storage=settings.storage)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)


@contextmanager
def team_server(store: str, users: str) -> Iterator[dict[str, str]]:
    """Start MLflow's server as a team does; give the variables by which one of its users asks it.

    Args:
        store: URL of the database of its runs.
        users: of its users.
    """
    from benchmarks.pages import started
    from experiments.accounts import Passwords, make_users
    from experiments.servers import mlflow_command, mlflow_settings

    passwords = Passwords(Path.cwd())
    for name in ("passwords", "users"):
        Path(name).mkdir()
    command, settings = mlflow_command(store, "artifacts"), mlflow_settings(passwords, users)
    access = {"MLFLOW_TRACKING_USERNAME": "alice"}
    access["MLFLOW_TRACKING_PASSWORD"] = passwords.read("users/alice")
    with started(command, health="/health", settings=settings) as address:
        make_users(address, passwords)
        yield {"MLFLOW_TRACKING_URI": address, **access}


@contextmanager
def postgresql() -> Iterator[str]:
    """Start a server with the databases; give the URL of all, with {} for the name."""
    import sqlalchemy

    from tests.postgresql import find_programs, server

    if find_programs() is None:
        raise SystemExit("PostgreSQL is not installed")
    with server() as url:
        admin = sqlalchemy.create_engine(url, isolation_level="AUTOCOMMIT")
        with admin.connect() as connection:
            for name in ("optuna", "mlflow", "mlflow_users"):
                connection.execute(sqlalchemy.text(f"CREATE DATABASE {name}"))
        admin.dispose()
        yield url.replace("/postgres?", "/{}?")


def efficiency_table(rows: Sequence[Measured]) -> str:
    """Return the table of few workers."""
    header = ["workers", "efficiency", "trials", "epochs", "driver at work"]
    return markdown(
        header,
        [
            [
                f"{row.workers:,}",
                f"{row.efficiency:.1%}",
                f"{row.trials:,}",
                f"{row.epochs:,}",
                f"{row.driver_seconds / row.seconds:.1%}",
            ]
            for row in rows
        ],
    )


def costs_table(rows: Mapping[tuple[str, int], Sequence[Measured]]) -> str:
    """Return the table of what the driver does, in ms: medians over the repeats."""
    header = ["sampler, pruner", "trials", *OF_A_TRIAL, *OF_AN_EPOCH, "a trial, whole", "requests"]
    lines = []
    for (sampler, history), of in rows.items():
        parts = [
            f"{statistics.median(row.milliseconds(part) for row in of):.1f}"
            for part in (*OF_A_TRIAL, *OF_AN_EPOCH)
        ]
        whole = spread([1000 * row.driver_seconds / row.trials for row in of])
        requests = statistics.median(sum(row.requests.values()) / row.trials for row in of)
        name = f"`{sampler}`, `{SEARCHES[sampler]}`"
        lines.append([name, f"{history:,}", *parts, whole, f"{requests:.0f}"])
    return markdown(header, lines)


def limits_table(rows: Sequence[Measured]) -> str:
    """Return the table of many workers."""
    header = ["workers", "epoch, s", "efficiency", "all busy after", "trials", "epochs"]
    header += ["driver at work", "of a processor", "would feed", "to end it"]
    return markdown(
        header,
        [
            [
                f"{row.workers:,}",
                f"{row.epoch_seconds:g}",
                f"{row.late_efficiency:.1%}",
                "never" if math.isinf(row.fill_seconds) else f"{row.fill_seconds:.0f} s",
                f"{row.trials:,}",
                f"{row.epochs:,}",
                f"{row.driver_seconds / row.seconds:.0%}",
                f"{row.processor_seconds / row.seconds:.0%}",
                f"{row.would_feed:,.0f}",
                f"{row.closing_seconds:.0f} s",
            ]
            for row in rows
        ],
    )


def drivers_table(rows: Mapping[int, Sequence[Measured]]) -> str:
    """Return the table of several drivers: sums over all of them, but for the busiest's time."""
    header = ["drivers", "workers of each", "efficiency", "trials", "epochs"]
    header += ["driver at work", "of a processor, all", "would feed, all"]
    return markdown(
        header,
        [
            [
                f"{number}",
                f"{of[0].workers:,}",
                f"{statistics.mean(row.late_efficiency for row in of):.1%}",
                f"{sum(row.trials for row in of):,}",
                f"{sum(row.epochs for row in of):,}",
                f"{max(row.driver_seconds / row.seconds for row in of):.0%}",
                f"{sum(row.processor_seconds / row.seconds for row in of):.0%}",
                f"{sum(row.would_feed for row in of):,.0f}",
            ]
            for number, of in rows.items()
        ],
    )


def draw(
    efficiency: Sequence[Measured],
    costs: Mapping[tuple[str, int], Sequence[Measured]],
    limits: Sequence[Measured],
    options: argparse.Namespace,
    file: Path,
) -> None:
    """Draw the three tables, those that were measured."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    _draw_efficiency(left, {"measured": efficiency}, late=False)
    left.axhline(0.9, color=COLORS[4], linestyle="--", linewidth=1, label="goal")
    left.set_title(f"a new study, epochs of {options.epoch_seconds:g} s")
    _draw_costs(middle, costs)
    by_length: dict[str, list[Measured]] = defaultdict(list)
    for row in limits:
        by_length[f"epochs of {row.epoch_seconds:g} s"].append(row)
    _draw_efficiency(right, by_length, late=True)
    right.set_title(f"a study of {options.history[-1]:,} trials")
    for axes in (left, right):
        axes.legend(frameon=False)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _draw_efficiency(axes: Any, lines: Mapping[str, Sequence[Measured]], *, late: bool) -> None:
    from matplotlib.ticker import PercentFormatter

    for (label, rows), color, marker in zip(lines.items(), COLORS, MARKERS, strict=False):
        shares = [row.late_efficiency if late else row.efficiency for row in rows]
        axes.plot([row.workers for row in rows], shares, marker=marker, color=color, label=label)
    numbers = sorted({row.workers for rows in lines.values() for row in rows})
    axes.set_xscale("log")
    axes.set_xticks(numbers, [f"{number:,}" for number in numbers])
    axes.minorticks_off()
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("workers")
    axes.set_ylabel("time in which workers trained")
    axes.grid(alpha=0.3)


def _draw_costs(axes: Any, costs: Mapping[tuple[str, int], Sequence[Measured]]) -> None:
    """Draw what the driver does for a trial: a bar for each sampler and number of earlier ones."""
    labels = [f"{sampler}\n{history:,}" for sampler, history in costs]
    bottoms = [0.0] * len(costs)
    for part, color in zip((*OF_A_TRIAL, *OF_AN_EPOCH), COLORS, strict=True):
        heights = [
            statistics.median(1000 * row.total(part) / row.trials for row in of)
            for of in costs.values()
        ]
        axes.bar(labels, heights, bottom=bottoms, color=color, edgecolor="white", label=part)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axes.set_ylabel("driver, ms a trial")
    axes.set_xlabel("sampler, and trials that the study has")
    axes.set_title(f"what the driver does, {COST_WORKERS} workers")
    axes.grid(axis="y", alpha=0.3)
    handles, names = axes.get_legend_handles_labels()
    beside = {"loc": "upper left", "bbox_to_anchor": (1, 1)}
    axes.legend(handles[::-1], names[::-1], frameon=False, fontsize="small", **beside)


if __name__ == "__main__":
    main()
