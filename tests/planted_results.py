"""Results of a comparison whose truth is known: the same each time, with real Optuna studies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
import pandas as pd
from optuna.distributions import CategoricalDistribution, FloatDistribution

from experiments.comparison.results import CURVE_COLUMNS, REPEAT_COLUMNS, TRIAL_COLUMNS, Results
from experiments.study.ranking import best_first

# (best accuracy, learning rate that it is at, where training diverges) of each loss.
TRUTH = {
    "cross_entropy": (0.700, 0.02, 0.15),
    "mse": (0.695, 0.2, 2.0),
    "l1": (0.410, 0.3, 2.0),
    "mse_softmax": (0.690, 0.6, 2.0),
    "label_smoothing": (0.702, 0.03, 0.2),
    "squentropy": (0.701, 0.02, 0.12),
}
DIGITS = tuple(f"digit {digit}" for digit in range(10))


def planted_results(
    *,
    name: str = "planted",
    losses: Sequence[str] = tuple(TRUTH),
    batch_sizes: Sequence[int] = (32, 64, 128),
    trials: int = 12,
    epochs: int = 6,
    repeats: int = 5,
    classes: Sequence[str] = DIGITS,
    sampler: str = "random",
    is_tested: bool = True,
    seed: int = 0,
) -> Results:
    """Return results of which every number follows from the arguments.

    A loss that is none of `TRUTH` has the truth of one of them.
    """
    truths = list(TRUTH.values())
    truth = {loss: TRUTH.get(loss, truths[i % len(truths)]) for i, loss in enumerate(losses)}
    plan = {
        "dataset": "planted",
        "dataset_digest": "0123456789abcdef" * 2,
        "losses": list(losses),
        "learning_rate_min": 0.001,
        "learning_rate_max": 1.0,
        "batch_sizes": list(batch_sizes),
        "trials": trials,
        "epochs": epochs,
        "repeats": repeats,
        "seed": seed,
        "sampler": sampler,
        "optimizer": "sgd",
        "schedule": "one_cycle",
        "device": "cpu",
        "precision": "bfloat16",
    }
    rng = np.random.default_rng(seed)
    trial_rows, repeat_rows, curve_rows = [], [], []
    for loss in losses:
        for trial in range(trials):
            configuration = {
                "learning_rate": float(10 ** rng.uniform(-3, 0)),
                "batch_size": int(rng.choice(batch_sizes)),
            }
            row = _trained(rng, truth[loss], configuration)
            trial_rows.append({"loss": loss, "trial": trial, "epochs": epochs, **row})
            curve_rows += _curve(rng, "search", loss, trial, row, epochs)
        found = pd.DataFrame(trial_rows, columns=list(TRIAL_COLUMNS))
        found = found[found["loss"] == loss]
        if repeats and len(found):
            best = best_first(found).iloc[0]
            for repeat in range(repeats):
                configuration = {
                    "learning_rate": float(best["learning_rate"]),
                    "batch_size": int(best["batch_size"]),
                }
                row = _trained(rng, truth[loss], configuration)
                is_measured = is_tested and row["outcome"] == "complete"
                noise = rng.normal(0, 0.003, 4)
                test = {
                    "test_accuracy": row["val_accuracy"] + noise[0],
                    "test_nll": 1.1 + noise[1],
                    "test_brier": 0.4 + noise[2],
                    "test_ece": 0.05 + noise[3],
                }
                if not is_measured:
                    test = dict.fromkeys(test, np.nan)
                number = losses.index(loss) + repeat * len(losses)
                repeat_rows.append(
                    {"loss": loss, "trial": number, "seed": seed + 1 + repeat, **row, **test}
                    | {"test_evaluations": int(is_measured)}
                )
                curve_rows += _curve(rng, "confirm", loss, number, row, epochs)
    trials_frame = pd.DataFrame(trial_rows, columns=list(TRIAL_COLUMNS))
    return Results(
        name=name,
        plan=plan,
        classes=tuple(classes),
        sizes={"train": 45_000, "validation": 5_000, "test": 10_000},
        trials=trials_frame,
        repeats=pd.DataFrame(repeat_rows, columns=list(REPEAT_COLUMNS)),
        curves=pd.DataFrame(curve_rows, columns=list(CURVE_COLUMNS)),
        confusions=_confusions(rng, losses, len(classes)) if repeats and is_tested else {},
        studies={loss: _study(name, loss, plan, trials_frame) for loss in losses},
        provenance={
            "commit": "5c68006",
            "versions": "torch 2.15.0, optuna 5.0.0, mlflow 3.17.2",
            "hardware": "2 cores of a planted processor",
            "command": "python -m experiments.compare --dataset planted",
            "run": "0123456789abcdef0123456789abcdef",
            "experiment": "1",
            "started": "2026-01-02T03:04:05Z",
            "ended": "2026-01-02T05:06:07Z",
        },
    )


def _trained(
    rng: np.random.Generator, truth: tuple[float, float, float], configuration: dict[str, Any]
) -> dict[str, Any]:
    best, learning_rate, limit = truth
    distance = np.log10(configuration["learning_rate"] / learning_rate)
    diverges = configuration["learning_rate"] > limit
    accuracy = 0.1 if diverges else 0.1 + (best - 0.1) * np.exp(-(distance**2) / 1.5)
    return configuration | {
        "outcome": "diverged" if diverges else "complete",
        "val_accuracy": float(np.clip(accuracy + (not diverges) * rng.normal(0, 0.004), 0, 1)),
        "val_loss": np.nan if diverges else float(2 - accuracy),
        "seconds": float(rng.uniform(50, 60)),
        "images_per_second": float(4_000 + 5 * configuration["batch_size"] + rng.normal(0, 50)),
        "run_id": rng.bytes(16).hex(),
    }


def _curve(
    rng: np.random.Generator, stage: str, loss: str, trial: int, row: dict[str, Any], epochs: int
) -> list[dict[str, Any]]:
    last = 1 if row["outcome"] == "diverged" else epochs
    shares = 1 - np.exp(-2.0 * np.arange(1, epochs + 1) / epochs)
    val = np.clip(row["val_accuracy"] * shares / shares[-1] + rng.normal(0, 0.005, epochs), 0, 1)
    return [
        {
            "stage": stage,
            "loss": loss,
            "trial": trial,
            "epoch": epoch,
            "train_loss": 2.0 / epoch,
            "train_accuracy": float(np.clip(val[epoch - 1] * 1.05, 0, 1)),
            "val_loss": 2.1 / epoch,
            "val_accuracy": float(val[epoch - 1]) if epoch < epochs else row["val_accuracy"],
        }
        for epoch in range(1, last + 1)
    ]


def _confusions(rng: np.random.Generator, losses: Sequence[str], size: int) -> dict[str, Any]:
    found = {}
    for loss in losses:
        likely = rng.dirichlet(np.full(size, 0.3), size) * 0.3 + 0.7 * np.eye(size)
        found[loss] = np.stack([rng.multinomial(5_000, row) for row in likely])
    return found


def _study(name: str, loss: str, plan: dict[str, Any], trials: pd.DataFrame) -> optuna.Study:
    study = optuna.create_study(study_name=f"{name}/search/{loss}", direction="maximize")
    distributions = {
        "loss": CategoricalDistribution([loss]),
        "learning_rate": FloatDistribution(
            plan["learning_rate_min"], plan["learning_rate_max"], log=True
        ),
        "batch_size": CategoricalDistribution(plan["batch_sizes"]),
    }
    for row in trials[trials["loss"] == loss].to_dict("records"):
        study.add_trial(
            optuna.trial.create_trial(
                params={key: row[key] for key in distributions},
                distributions=distributions,
                value=row["val_accuracy"],
            )
        )
    return study
