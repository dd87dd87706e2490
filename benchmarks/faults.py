"""Does a sweep lose anything, whatever happens to it? `python -m benchmarks.faults`.

A seeded sweep with one worker runs undisturbed; then the same sweep is disturbed at random instants
until it is through, and again in a fresh folder, until there have been so many faults:

- `--kill` (the default): its main process or its worker is killed with SIGKILL, from the first
  moment on, and it is started again;
- `--server`: its MLflow server is stopped, by SIGKILL or SIGTERM, and started again meanwhile;
- `--full-disk`: the disk that all of it is on is filled up, and once it has stopped for that, freed
  again, and it is started again. It takes the right to mount a small file system.

Then the two are compared: every trial finished once, Optuna and MLflow agreed on each, no run
RUNNING, no model that no run is linked to, every metric there once at every step, one version of
the registered model, the best trial's, with the alias, and all values equal, bit for bit, but for
times.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
SHOWN = 20
"""Differences that are printed: where the first trial differs, most later ones do."""

DISK_MEGABYTES = 96
PATIENCE_SECONDS = 1800
"""After so long, a sweep is taken to hang."""

EPOCHS = "trial_intermediate_values"
TERMINATED = {"FINISHED", "FAILED", "KILLED"}


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a sweep runs, with databases, models, data and scratch files of its own."""

    folder: Path
    command: tuple[str, ...]
    uri: str = ""
    """MLflow's server; by default, MLflow has a database in the folder."""

    @property
    def log(self) -> Path:
        """What the sweep printed: beside the folder, which may be full."""
        return self.folder.with_suffix(".txt")

    def start(self) -> subprocess.Popen[bytes]:
        """Start the sweep."""
        scratch = {"TMPDIR": str(self.folder)}
        server = {"MLFLOW_TRACKING_URI": self.uri} if self.uri else {}
        return start_in(self.command, self.folder, log=self.log, environment=scratch | server)

    def printed(self, start: int = 0) -> str:
        """Return what the sweep printed, from a byte on."""
        return self.log.read_bytes()[start:].decode(errors="replace")


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How fast the undisturbed sweep was: random instants follow from it."""

    start_up: float
    """Seconds to its first epoch."""
    work: float
    """Seconds from there to its end."""
    number: int
    """How many faults there are to be."""

    def instant(self, dice: random.Random) -> float:
        """Return how many seconds after its start a sweep is to be disturbed."""
        return dice.uniform(0, 2 * (self.start_up + self.work / self.number))


@dataclass(kw_only=True)
class Told:
    """What was done to sweeps, and what was not as it should be."""

    sweeps: int = 0
    done: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        done = ", ".join(f"{number} × {what}" for what, number in sorted(self.done.items()))
        return f"{self.sweeps} sweeps, {done or 'undisturbed'}: {len(self.problems)} differences"


Mode = Callable[[Place, Pace, random.Random, Told], AbstractContextManager[Place]]
"""Has a sweep run, disturbed, until it is through. Within, what it recorded can be read."""


def main() -> int:
    """Run, disturb, compare, and print what was found."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    mode = parser.add_mutually_exclusive_group()
    for name in MODES:
        mode.add_argument(f"--{name}", dest="mode", action="store_const", const=name)
    parser.add_argument("--number", type=int, default=50, help="of faults (default: %(default)s)")
    parser.add_argument("--trials", type=int, default=12, help="(default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the instants (default: %(default)s)"
    )
    parser.set_defaults(mode="kill")
    options = parser.parse_args()
    command = sweep_command(options.trials, options.epochs)
    with tempfile.TemporaryDirectory() as folder:
        told = run(options.mode, command, Path(folder), options.number, options.seed)
    for problem in told.problems[:SHOWN]:
        print(f"  {problem}")
    print(f"{options.trials} trials of {options.epochs} epochs; {told}")
    return bool(told.problems)


def run(mode: str, command: tuple[str, ...], folder: Path, number: int, seed: int) -> Told:
    """Run the sweep undisturbed, then disturbed, as often as it takes, and compare each."""
    told, dice = Told(), random.Random(seed)
    calm = Place(folder=folder / "calm", command=command)
    calm.folder.mkdir()
    pace = undisturbed(calm, number)
    print(
        f"undisturbed: {pace.start_up:.1f} s to the first epoch, {pace.work:.1f} s more", flush=True
    )
    expected = state(calm)
    while told.done.total() < number and not told.problems:
        told.sweeps += 1
        place = replace(calm, folder=folder / f"sweep{told.sweeps}")
        place.folder.mkdir()
        with MODES[mode](place, pace, dice, told) as place:
            if not told.problems:
                told.problems += compare(expected, state(place))
        print(told, flush=True)
    return told


def sweep_command(trials: int, epochs: int) -> tuple[str, ...]:
    """Return the command line of the sweep."""
    command = [sys.executable, "-m", "experiments.sweep", "--workers", "1", "--study", "faults"]
    command += ["--trials", str(trials), "--epochs", str(epochs), "--batch-sizes", "32", "64"]
    return (*command, "--max-failures", "99", "--tracking-timeout", str(PATIENCE_SECONDS))


def undisturbed(place: Place, number: int) -> Pace:
    """Run the sweep, and return how fast it was."""
    start = time.monotonic()
    process = place.start()
    while not count(place.folder, EPOCHS) and not ended(process, 0.05):
        pass
    first = time.monotonic()
    assert process.wait() == 0, place.printed()
    return Pace(start_up=first - start, work=time.monotonic() - first, number=number)


# What is done to a sweep


@contextmanager
def killed(place: Place, pace: Pace, dice: random.Random, told: Told) -> Iterator[Place]:
    """Kill the main process or its worker."""
    spared = -1  # the trial whose worker was killed: the second time, it would rightly have failed
    process = place.start()
    while goes_on(process, pace.instant(dice), pace, told):
        workers = children(process.pid)
        trial = num_finished(place.folder)
        if dice.random() < 0.5 and workers and trial != spared:
            with suppress(ProcessLookupError):
                os.kill(workers[0], signal.SIGKILL)
            told.done["killed worker"] += 1
            spared = trial
        else:
            process.kill()
            process.wait()
            told.done["killed main process"] += 1
            process = place.start()
    check_end(process, place, told)
    yield place


@contextmanager
def without_server(place: Place, pace: Pace, dice: random.Random, told: Told) -> Iterator[Place]:
    """Stop the MLflow server of a sweep, and start it again: the sweep itself goes on."""
    port = free_port()
    place = replace(place, uri=f"http://127.0.0.1:{port}")
    server = start_server(place.folder, port)
    try:
        process = place.start()
        # One that isn't there when the sweep starts is refused: only then it is stopped.
        while not count(place.folder, EPOCHS) and not ended(process, 0.05):
            pass
        while goes_on(process, dice.uniform(0, pace.start_up), pace, told):
            number = dice.choice([signal.SIGKILL, signal.SIGTERM])
            stop_group(server, number)
            told.done[f"server ended by {number.name}"] += 1
            time.sleep(dice.uniform(0, pace.start_up))
            server = start_server(place.folder, port)
        check_end(process, place, told)
        yield place
    finally:
        stop_group(server, signal.SIGKILL)


@contextmanager
def on_full_disk(place: Place, pace: Pace, dice: random.Random, told: Told) -> Iterator[Place]:
    """Fill up the disk until the sweep has stopped for that."""
    with small_disk(place.folder, DISK_MEGABYTES):
        process = place.start()
        while goes_on(process, pace.instant(dice), pace, told):
            if dice.random() < 0.3:  # it is full when the sweep starts
                process.kill()
                process.wait()
            ballast = fill(place.folder, spare=dice.choice([0, 0, 10_000, 100_000]))
            before = place.log.stat().st_size
            if process.poll() is not None:
                process = place.start()
            if not ended(process, PATIENCE_SECONDS) or process.returncode != 0:
                told.done["disk filled"] += 1
                told.problems += said_badly(process, place.printed(before))
                process.kill()
                ballast.unlink()
                process = place.start()
        check_end(process, place, told)
        yield place


MODES: dict[str, Mode] = {
    "kill": killed,
    "server": without_server,
    "full-disk": on_full_disk,
}


def start_in(
    command: Sequence[str],
    folder: Path,
    *,
    log: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a command in a folder, in a session of its own, with nothing of the user's MLflow."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    with (log or folder / "log.txt").open("ab") as stream:
        return subprocess.Popen(
            command,
            cwd=folder,
            env=clean | {"PYTHONPATH": str(REPOSITORY)} | dict(environment or {}),
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )


def goes_on(process: subprocess.Popen[bytes], seconds: float, pace: Pace, told: Told) -> bool:
    """Wait so long, or to the end after enough faults; return whether it is time for one."""
    enough = told.done.total() >= pace.number or bool(told.problems)
    return not ended(process, PATIENCE_SECONDS if enough else seconds) and not enough


def ended(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Wait so long for a process to end, and return whether it has."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    return process.returncode is not None


def check_end(process: subprocess.Popen[bytes], place: Place, told: Told) -> None:
    """Note it unless the last start of a sweep ended well."""
    if process.poll() != 0:
        process.kill()
        told.problems.append(
            f"the last start ended with {process.poll()}: {place.printed()[-3000:]}"
        )


def said_badly(process: subprocess.Popen[bytes], text: str) -> list[str]:
    """Return what is wrong with how a sweep ended that was stopped by a full disk."""
    if "Traceback" in text:
        return [f"a traceback on a full disk: {text[-3000:]}"]
    last = (text.strip().splitlines() or [""])[-1]
    if process.poll() != 1 or not last.startswith("stopped: "):
        return [f"exit code {process.poll()} on a full disk, after the line {last!r}"]
    return []


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    """Have a small file system in a folder."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    subprocess.run(mount, check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path, *, spare: int) -> Path:
    """Fill up the disk that a folder is on, but for some bytes; return the file that does it."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as stream, suppress(OSError):
        while True:
            stream.write(bytes(2**16))
    with ballast.open("r+b") as stream:
        stream.truncate(max(0, ballast.stat().st_size - spare))
    return ballast


def start_server(
    folder: Path, port: int, *options: str, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start an MLflow server with its store in a folder, and wait until it answers."""
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    command += options
    log = folder.with_suffix(".server.txt")
    # Without its job runners, eight processes that nothing here asks for.
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    server = start_in(command, folder, log=log, environment={**quiet, **(environment or {})})
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not answers_at(port):
        assert time.monotonic() < deadline, "the MLflow server doesn't start"
        assert not ended(server, 0.1), log.read_text()
    return server


def free_port() -> int:
    """Return a port of this machine that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def answers_at(port: int) -> bool:
    """Return whether a server answers."""
    with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
        return True
    return False


def stop_group(leader: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Send a signal to a process and its children, and wait until it has ended."""
    with suppress(ProcessLookupError):
        os.killpg(leader.pid, number)
    if not ended(leader, 30):
        os.killpg(leader.pid, signal.SIGKILL)
        leader.wait()


def children(pid: int) -> list[int]:
    """Return the worker processes of a process."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except FileNotFoundError:
        return []
    return [int(child) for child in text.split()]


def num_finished(folder: Path) -> int:
    """Return how many trials are over: with one worker, the number of the one under way."""
    return count(folder, "trials WHERE state IN ('COMPLETE', 'PRUNED', 'FAIL')")


def count(folder: Path, rows: str) -> int:
    """Return how many rows there are in the database of a study."""
    file = folder / "optuna.db"
    if not file.exists():
        return 0
    with closing(sqlite3.connect(file, timeout=60)) as database:
        (number,) = database.execute(f"SELECT COUNT(*) FROM {rows}").fetchone()
    return int(number)


# What is left in the end


def state(place: Place) -> dict[str, Any]:
    """Return what a finished sweep has recorded, in Optuna and MLflow."""
    from tracking.store import environment

    uri = place.uri or f"sqlite:///{place.folder}/mlflow.db"
    with environment({"MLFLOW_TRACKING_URI": uri}):
        return recorded(place.folder)


def recorded(folder: Path) -> dict[str, Any]:
    """Return what is in the study's database in a folder, and in MLflow."""
    import mlflow
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.load_study(study_name="faults", storage=f"sqlite:///{folder}/optuna.db")
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("cnn-sweep")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=10_000)
    models = client.search_logged_models([experiment.experiment_id], max_results=1000)
    trial_of = {run.info.run_id: run.data.tags.get("trial") for run in runs}
    return {
        "trials": {trial.number: trial for trial in study.get_trials()},
        "runs": runs,
        "registered": {
            (model.name, int(version.version)): registered(client, model, version, trial_of)
            for model in client.search_registered_models()
            for version in client.search_model_versions(f"name = '{model.name}'")
        },
        "models": {model.model_id for model in models},
        "metrics": {
            run.info.run_id: {
                name: [
                    (entry.step, entry.value)
                    for entry in client.get_metric_history(run.info.run_id, name)
                ]
                for name in run.data.metrics
            }
            for run in runs
        },
        "weights": {
            run.data.tags["trial"]: answers(run.outputs.model_outputs[-1].model_id)
            for run in runs
            if run.outputs is not None and run.outputs.model_outputs
        },
    }


def registered(client: Any, model: Any, version: Any, trial_of: Mapping[str, Any]) -> Any:
    """Return what a version of a registered model is: of which trial, its names, what it says."""
    (output,) = client.get_run(version.run_id).outputs.model_outputs
    # The run's id, which is in MLmodel, too, is another in each sweep, and the verdict of one that
    # was killed right after it had made the version champion is that this was so before.
    own = {"run", "verdict", "sha256/MLmodel"}
    return {
        "trial": trial_of.get(version.run_id),
        "is the run's model": version.source == f"models:/{output.model_id}",
        "aliases": [name for name, of in model.aliases.items() if int(of) == int(version.version)],
        "tags": {key: "" if key in own else value for key, value in sorted(version.tags.items())},
        "champions": model.tags.get("champions"),
    }


def answers(model_id: str) -> bytes:
    """Return what a model answers to some noise, to the bit."""
    import numpy as np

    from tracking.models.predictor import load_model

    noise = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    predictor = load_model(f"models:/{model_id}")
    return bytes(predictor.predict(noise).filter(like="p(").to_numpy().tobytes())


def compare(calm: dict[str, Any], stormy: dict[str, Any]) -> list[str]:
    """Return what is not as it should be, a line each."""
    problems = [f"run {run.info.run_name} is {run.info.status}" for run in not_over(stormy["runs"])]
    by_trial: dict[str, list[Any]] = {}
    for run in stormy["runs"]:
        if run.data.tags.get("role") == "trial":
            by_trial.setdefault(run.data.tags["trial"], []).append(run)
    if sorted(stormy["trials"]) != sorted(calm["trials"]):
        problems.append(f"there are {len(stormy['trials'])} trials, not {len(calm['trials'])}")
    calm_runs = {run.data.tags.get("trial"): run for run in calm["runs"]}
    linked = set()
    for number, trial in stormy["trials"].items():
        expected, runs = calm["trials"][number], by_trial.get(str(number), [])
        if len(runs) != 1:
            problems.append(f"trial {number} has {len(runs)} runs")
            continue
        (run,) = runs
        calm_run = calm_runs[str(number)]
        linked |= {output.model_id for output in run.outputs.model_outputs}
        for what, here, there in (
            ("state", trial.state, expected.state),
            ("params", trial.params, expected.params),
            ("value", trial.value, expected.value),
            ("epochs", trial.intermediate_values, expected.intermediate_values),
            ("outcome", trial.user_attrs.get("outcome"), expected.user_attrs.get("outcome")),
            ("outcome in MLflow", run.data.tags.get("outcome"), trial.user_attrs.get("outcome")),
            ("run", trial.user_attrs.get("run_id"), run.info.run_id),
            (
                "models",
                len(run.outputs.model_outputs),
                int(trial.user_attrs["outcome"] == "complete"),
            ),
            ("weights", stormy["weights"].get(str(number)), calm["weights"].get(str(number))),
            ("metrics", exact(stormy, run), exact(calm, calm_run)),
            ("params in MLflow", run.data.params, calm_run.data.params),
            ("data sets", digests(run), digests(calm_run)),
        ):
            if here != there:
                problems.append(f"trial {number}: {what} {here!r:.100} instead of {there!r:.100}")
    problems += [f"model {model} belongs to no run" for model in stormy["models"] - linked]
    if len(calm["registered"]) != 1 or stormy["registered"] != calm["registered"]:
        problems.append(f"registered is {stormy['registered']} instead of {calm['registered']}")
    return problems


def digests(run: Any) -> list[str]:
    """Return the digests of the data sets that a run has logged."""
    return [each.dataset.digest for each in run.inputs.dataset_inputs]


def not_over(runs: list[Any]) -> list[Any]:
    """Return the runs that are not over."""
    return [run for run in runs if run.info.status not in TERMINATED]


def exact(of: dict[str, Any], run: Any) -> str:
    """Return a run's metrics at all steps, but for times, as text: NaN equals itself there."""
    metrics = of["metrics"][run.info.run_id]
    return repr({k: metrics[k] for k in sorted(metrics) if not k.startswith("time/")})


if __name__ == "__main__":
    sys.exit(main())
