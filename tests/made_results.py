"""Results of a comparison made by hand, from the test accuracies of each loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from experiments.comparison.assessment import assess
from experiments.comparison.caveats import Caveat
from experiments.comparison.results import CURVE_COLUMNS, REPEAT_COLUMNS, TRIAL_COLUMNS, Results

IMAGES = 10_000
COMMAND = "python -m experiments.compare --dataset cifar10 --losses mse l1"
RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
"""Those of each search; the middle one is chosen."""


def results(
    accuracies: Mapping[str, Sequence[float]],
    *,
    validation: Mapping[str, Sequence[float]] | None = None,
    search: str = "random",
    hits: Mapping[str, Any] | None = None,
    test_rounds: int = 1,
    command: str = COMMAND,
    **plan: Any,
) -> Results:
    """Return a comparison with test accuracies in percent; those of validation are the same.

    NaN: the repeat diverged, at 10 %. With a staged search, each repeat has a search of its own.
    """
    validation = validation or accuracies
    repeats, trials = [], []
    is_staged = search == "staged"
    for column, (loss, of_loss) in enumerate(accuracies.items()):
        for number, accuracy in enumerate(of_loss):
            is_complete = not math.isnan(accuracy)
            of_validation = validation[loss][number]
            repeats.append(
                _row(REPEAT_COLUMNS, loss, number + 1 if is_staged else 1, seed=number)
                | {
                    "trial": number * len(accuracies) + column,
                    "outcome": "complete" if is_complete else "diverged",
                    "val_accuracy": of_validation / 100 if is_complete else 0.1,
                    "test_accuracy": accuracy / 100,
                    "test_evaluations": int(is_complete),
                }
            )
        for number in range(len(of_loss) if is_staged else 1):
            rates = RATES if is_staged else (0.03,) * 12
            trials += [
                _row(TRIAL_COLUMNS, loss, number + 1, seed=1000 * number)
                | {"trial": trial, "learning_rate": rate, "val_accuracy": 0.5}
                for trial, rate in enumerate(rates)
            ]
    n = max(map(len, accuracies.values()))
    return Results(
        name="made",
        plan={
            "search": search,
            "dataset": "made",
            "losses": list(accuracies),
            "searches": n if is_staged else 1,
            "learning_rate_min": 0.001,
            "learning_rate_max": 1.0,
            "batch_sizes": [64],
            "trials": 11 if is_staged else 12,
            "epochs": 8,
            "repeats": n,
            "optimizer": "sgd",
            "given_test": True,
        }
        | plan,
        classes=tuple("0123456789"),
        sizes={"train": 45_000, "validation": 5_000, "test": IMAGES},
        trials=pd.DataFrame(trials, columns=list(TRIAL_COLUMNS)),
        repeats=pd.DataFrame(repeats, columns=list(REPEAT_COLUMNS)),
        confirmed=pd.DataFrame(columns=list(REPEAT_COLUMNS)),
        hits=hits or {},
        ranges=dict.fromkeys(accuracies, (0.001, 1.0)),
        test_rounds=test_rounds,
        curves=pd.DataFrame(columns=list(CURVE_COLUMNS)),
        confusions={},
        studies={},
        provenance={"command": command},
    )


def _row(columns: Sequence[str], loss: str, search: int, seed: int) -> dict[str, Any]:
    return {
        **dict.fromkeys(columns, 0.5),
        "loss": loss,
        "search": search,
        "stage": "search",
        "seed": seed,
        "outcome": "complete",
        "learning_rate": 0.03,
        "batch_size": 64,
        "reused": False,
    }


def with_hits(made: Results, *, own: float = 0.5, noise: float = 0.5, seed: int = 0) -> Results:
    """Return them with hits that have these accuracies.

    Images differ in difficulty: for all losses, for each loss on its own, and for each repeat.
    """
    rng = np.random.default_rng(seed)
    difficulty = rng.normal(size=IMAGES)
    hits = {}
    tested = made.repeats[made.repeats["test_accuracy"].notna()].sort_values("seed")
    for loss, rows in tested.groupby("loss"):
        scores = difficulty + own * rng.normal(size=IMAGES)
        scores = scores + noise * rng.normal(size=(len(rows), IMAGES))
        ranks = scores.argsort(axis=1).argsort(axis=1)
        hits[str(loss)] = ranks < np.rint(rows["test_accuracy"].to_numpy() * IMAGES)[:, None]
    return replace(made, hits=hits)


def around(mean: float, *, spread: float = 0.1, n: int = 10, offset: int = 0) -> list[float]:
    """Return n accuracies in percent of exactly this mean, in an order that the offset changes."""
    steps = [spread * (2 * i - n + 1) / n for i in range(n)]
    return [mean + steps[(i * 3 + offset) % n] for i in range(n)]


def with_curves(made: Results, gain: float = 0.004) -> Results:
    """Return them with two epochs of each repeat: after 6, and after 8, of 8."""
    curves = [
        {
            **dict.fromkeys(CURVE_COLUMNS, 0.5),
            **{name: repeat[name] for name in ("loss", "search", "trial")},
            "stage": stage,
            "epoch": epoch,
            "val_accuracy": accuracy,
        }
        for repeat in made.repeats.to_dict("records")
        for epoch, accuracy in (
            (6, repeat["val_accuracy"] - gain),
            (8, repeat["val_accuracy"]),
        )
        for stage in ("confirm", "search")
    ]
    return replace(made, curves=pd.DataFrame(curves, columns=list(CURVE_COLUMNS)))


def caveats(made: Results, kind: str) -> list[Caveat]:
    """Return the caveats of a kind."""
    return [caveat for caveat in assess(made).warnings if caveat.kind == kind]


def texts(made: Results, kind: str) -> list[str]:
    """Return the texts of the caveats of a kind."""
    return [caveat.text for caveat in caveats(made, kind)]
