"""What sweeps recorded in Optuna and MLflow, and how two differ, for `benchmarks.faults`."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

STUDY = "faults"
EPOCHS = "trial_intermediate_values"
FINISHED = "trials WHERE state IN ('COMPLETE', 'PRUNED', 'FAIL')"
TERMINATED = {"FINISHED", "FAILED", "KILLED"}


def count(folder: Path, rows: str) -> int:
    """Return how many rows there are in the database of a study, such as `EPOCHS`."""
    file = folder / "optuna.db"
    if not file.exists():
        return 0
    with closing(sqlite3.connect(file, timeout=60)) as database:
        (number,) = database.execute(f"SELECT COUNT(*) FROM {rows}").fetchone()
    return int(number)


def read(folder: Path, uri: str = "") -> dict[str, Any]:
    """Return what a finished sweep in a folder has recorded.

    Args:
        folder: has Optuna's database.
        uri: MLflow's server (default: its database in the folder).
    """
    from tracking.store import environment

    with environment({"MLFLOW_TRACKING_URI": uri or f"sqlite:///{folder}/mlflow.db"}):
        return _read(folder)


def _read(folder: Path) -> dict[str, Any]:
    import mlflow
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.load_study(study_name=STUDY, storage=f"sqlite:///{folder}/optuna.db")
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
            (model.name, int(version.version)): _registered(client, model, version, trial_of)
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
        "probabilities": {
            run.data.tags["trial"]: _probabilities(run.outputs.model_outputs[-1].model_id)
            for run in runs
            if run.outputs is not None and run.outputs.model_outputs
        },
    }


def _registered(client: Any, model: Any, version: Any, trial_of: Mapping[str, Any]) -> Any:
    """Return what the registry has of a version: its trial, model, aliases and tags."""
    (output,) = client.get_run(version.run_id).outputs.model_outputs
    # The run's id, which is part of MLmodel, differs between sweeps. So does the verdict of a
    # promotion that was killed right after it and is repeated: it finds the alias already set.
    own = {"run", "verdict", "sha256/MLmodel"}
    return {
        "trial": trial_of.get(version.run_id),
        "is the run's model": version.source == f"models:/{output.model_id}",
        "aliases": [name for name, of in model.aliases.items() if int(of) == int(version.version)],
        "tags": {key: "" if key in own else value for key, value in sorted(version.tags.items())},
        "champions": model.tags.get("champions"),
    }


def _probabilities(model_id: str) -> bytes:
    """Return the bits of what a model predicts for some noise."""
    import numpy as np

    from tracking.models.predictor import load_model

    noise = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    return load_model(f"models:/{model_id}").probabilities(noise).tobytes()


def compare(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Return how what a sweep recorded differs from what is expected, a line each."""
    if sorted(found["trials"]) != sorted(expected["trials"]):
        return [f"there are {len(found['trials'])} trials, not {len(expected['trials'])}"]
    problems = [
        f"run {run.info.run_name} is {run.info.status}"
        for run in found["runs"]
        if run.info.status not in TERMINATED
    ]
    linked = set()
    for number, trial in found["trials"].items():
        runs = _runs_of(found, number)
        if len(runs) != 1:
            problems.append(f"trial {number} has {len(runs)} runs")
            continue
        (run,) = runs
        (expected_run,) = _runs_of(expected, number)
        linked |= {output.model_id for output in run.outputs.model_outputs}
        is_complete = trial.user_attrs["outcome"] == "complete"
        pairs = {
            "outcome in MLflow": (run.data.tags.get("outcome"), trial.user_attrs["outcome"]),
            "run": (trial.user_attrs.get("run_id"), run.info.run_id),
            "models": (len(run.outputs.model_outputs), int(is_complete)),
        }
        there = _values(expected, expected["trials"][number], expected_run)
        for what, value in _values(found, trial, run).items():
            pairs[what] = (value, there[what])
        problems += [
            f"trial {number}: {what} {value!r:.100} instead of {other!r:.100}"
            for what, (value, other) in pairs.items()
            if value != other
        ]
    problems += [f"model {model} belongs to no run" for model in found["models"] - linked]
    if found["registered"] != expected["registered"]:
        problems.append(f"registered is {found['registered']}, not {expected['registered']}")
    if [each["aliases"] for each in found["registered"].values()] != [["champion"]]:
        problems.append("not one version is registered, with the alias champion")
    return problems


def _runs_of(records: dict[str, Any], number: int) -> list[Any]:
    """Return the runs of a trial."""
    tags = {"role": "trial", "trial": str(number)}
    return [run for run in records["runs"] if tags.items() <= run.data.tags.items()]


def _values(records: dict[str, Any], trial: Any, run: Any) -> dict[str, Any]:
    """Return all that must be equal of a trial and its run, bit for bit; no times."""
    metrics = records["metrics"][run.info.run_id]
    return {
        "state": trial.state,
        "params": trial.params,
        "value": trial.value,
        "epochs": trial.intermediate_values,
        "outcome": trial.user_attrs.get("outcome"),
        "probabilities": records["probabilities"].get(str(trial.number)),
        # As text, in which NaN equals itself.
        "metrics": repr({k: metrics[k] for k in sorted(metrics) if not k.startswith("worker/")}),
        "params in MLflow": run.data.params,
        "data sets": [given.dataset.digest for given in run.inputs.dataset_inputs],
    }
