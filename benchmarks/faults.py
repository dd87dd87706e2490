"""Does a sweep lose anything when it is killed? `python -m benchmarks.faults`.

A seeded sweep with one worker runs undisturbed; then the same sweep is killed with SIGKILL at
random instants, the main process or its worker, and started again each time, until it is through.
The two are compared: every trial finished once, Optuna and MLflow agreed on each, no run RUNNING,
no model that no run is linked to, every metric there once at every step, and all values equal, bit
for bit, but for times.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
SHOWN = 20
"""Differences that are printed: where the first trial differs, most later ones do."""

TERMINATED = {"FINISHED", "FAILED", "KILLED"}


def main() -> int:
    """Run, kill, compare, and print what was found."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=50, help="(default: %(default)s)")
    parser.add_argument("--trials", type=int, default=40, help="(default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the instants (default: %(default)s)"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        calm, stormy = Path(folder, "calm"), Path(folder, "stormy")
        for place in (calm, stormy):
            place.mkdir()
        command = sweep_command(options.trials, options.epochs, Path(folder, "data"))
        start = time.monotonic()
        assert run(command, calm) == 0
        print(f"undisturbed: {time.monotonic() - start:.0f} s", flush=True)
        kills = disturb(command, stormy, options.kills, random.Random(options.seed))
        code = run(command, stormy)
        assert code == 0, (stormy / "log.txt").read_text()[-2000:]
        print(f"killed: main process {kills.count('main')} times, worker {kills.count('worker')}")
        problems = compare(state(calm), state(stormy))
    for problem in problems[:SHOWN]:
        print(f"  {problem}")
    print(f"{len(problems)} differences in {options.trials} trials of {options.epochs} epochs")
    return bool(problems)


def sweep_command(trials: int, epochs: int, data_dir: Path) -> list[str]:
    """Return the command line of the sweep."""
    command = [sys.executable, "-m", "experiments.sweep", "--workers", "1", "--study", "faults"]
    command += ["--trials", str(trials), "--epochs", str(epochs), "--data-dir", str(data_dir)]
    return [*command, "--batch-sizes", "32", "64", "--max-failures", "99"]


def run(command: list[str], folder: Path) -> int:
    """Run a command in a folder to its end, and return its exit code."""
    return start_in(command, folder).wait()


def start_in(command: list[str], folder: Path) -> subprocess.Popen[bytes]:
    """Start a command in a folder, with an MLflow store and databases of its own."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(
            command,
            cwd=folder,
            env=clean | {"PYTHONPATH": str(REPOSITORY)},
            stdout=log,
            stderr=log,
        )


def disturb(command: list[str], folder: Path, number: int, dice: random.Random) -> list[str]:
    """Start the sweep again and again, kill it so many times, and return what was killed."""
    killed: list[str] = []
    spared = (
        -1
    )  # the trial whose worker was killed: a second time, it would rightly count as failed
    process: subprocess.Popen[bytes] | None = None
    while len(killed) < number:
        if process is None or process.poll() is not None:
            process = start_in(command, folder)
            time.sleep(dice.uniform(2, 5))  # until it is at work, or nearly
        time.sleep(dice.expovariate(1 / 1.5))
        workers = children(process.pid)
        if process.poll() == 0:
            break  # through before it could be killed as often
        if dice.random() < 0.4 and workers and spared != (trial := num_finished(folder)):
            os.kill(workers[0], signal.SIGKILL)
            killed.append("worker")
            spared = trial
        else:
            process.kill()
            process.wait()
            killed.append("main")
    if process is not None and process.poll() is None:
        process.kill()
        process.wait()
    return killed


def num_finished(folder: Path) -> int:
    """Return how many trials are over: with one worker, the number of the one under way."""
    file = folder / "optuna.db"
    if not file.exists():
        return 0
    with closing(sqlite3.connect(file)) as database:
        try:
            query = "SELECT COUNT(*) FROM trials WHERE state IN ('COMPLETE', 'PRUNED', 'FAIL')"
            (count,) = database.execute(query).fetchone()
        except sqlite3.OperationalError:  # its tables are being made
            return 0
    return int(count)


def children(pid: int) -> list[int]:
    """Return the worker processes of a process."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except FileNotFoundError:
        return []
    return [int(child) for child in text.split()]


def state(folder: Path) -> dict[str, Any]:
    """Return what a finished sweep has recorded, in Optuna and MLflow."""
    import mlflow
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.load_study(study_name="faults", storage=f"sqlite:///{folder}/optuna.db")
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("cnn-sweep")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=10_000)
    models = client.search_logged_models([experiment.experiment_id], max_results=1000)
    return {
        "trials": {trial.number: trial for trial in study.get_trials()},
        "runs": runs,
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


def answers(model_id: str) -> bytes:
    """Return what a model answers to some noise, to the bit."""
    import numpy as np

    from tracking.predict import load_model

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
