"""Results of a comparison whose truth is known: the same each time, with real Optuna studies."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import optuna
import pandas as pd
from optuna.distributions import CategoricalDistribution, FloatDistribution
from scipy.stats import qmc

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
SIZES = {"train": 45_000, "validation": 5_000, "test": 10_000}
DIGITS = tuple(f"digit {digit}" for digit in range(10))


def planted_results(
    *,
    name: str = "planted",
    search: str = "random",
    losses: Sequence[str] = tuple(TRUTH),
    batch_sizes: Sequence[int] = (32, 64, 128),
    searches: int = 5,
    trials: int = 12,
    epochs: int = 6,
    repeats: int = 5,
    classes: Sequence[str] = DIGITS,
    is_tested: bool = True,
    given_test: bool = True,
    diverging: Mapping[str, float] = MappingProxyType({}),
    reused: int = 0,
    seed: int = 0,
) -> Results:
    """Return results of which every number follows from the arguments.

    A loss that is none of `TRUTH` has the truth of one of them.

    Args:
        search: staged, random or tpe; all but staged have one search of each loss.
        repeats: of each loss with random and tpe; with staged, of the configuration to use.
        diverging: of a loss, the share of trainings that diverge at any learning rate.
        reused: how many of each loss' first trainings were found, not made.
    """
    truths = list(TRUTH.values())
    plan = {
        "search": search,
        "dataset": "planted",
        "dataset_digest": "0123456789abcdef" * 2,
        "losses": list(losses),
        "searches": searches if search == "staged" else 1,
        "learning_rate_min": 0.001,
        "learning_rate_max": 1.0,
        "batch_sizes": list(batch_sizes),
        "trials": trials,
        "epochs": epochs,
        "repeats": repeats,
        "seed": seed,
        "optimizer": "sgd",
        "schedule": "one_cycle",
        "device": "cpu",
        "precision": "bfloat16",
        "given_test": given_test,
    }
    made = _Made(plan, np.random.default_rng(seed), is_tested=is_tested, reused=reused)
    for number, loss in enumerate(losses):
        truth = TRUTH.get(loss, truths[number % len(truths)])
        of_loss = _Loss(loss, truth, diverging.get(loss, 0.0))
        (_add_searches if search == "staged" else _add_search)(made, of_loss)
    if search == "staged" and repeats:
        _confirm(made)
    trials_frame = pd.DataFrame(made.trials, columns=list(TRIAL_COLUMNS))
    return Results(
        name=name,
        plan=plan,
        classes=tuple(classes),
        sizes=SIZES,
        trials=trials_frame,
        repeats=pd.DataFrame(made.repeats, columns=list(REPEAT_COLUMNS)),
        confirmed=pd.DataFrame(made.confirmed, columns=list(REPEAT_COLUMNS)),
        hits={loss: np.stack(of_loss) for loss, of_loss in made.hits.items()} if given_test else {},
        ranges=made.ranges,
        test_rounds=int(any(row["test_evaluations"] for row in made.repeats)),
        curves=pd.DataFrame(made.curves, columns=list(CURVE_COLUMNS)),
        confusions=_confusions(made.rng, list(made.hits), len(classes)),
        studies={loss: planted_study(name, loss, plan, trials_frame) for loss in losses},
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


@dataclass(frozen=True)
class _Loss:
    name: str
    truth: tuple[float, float, float]
    diverging: float


@dataclass
class _Made:
    """What was trained so far."""

    plan: Mapping[str, Any]
    rng: np.random.Generator
    is_tested: bool
    reused: int
    trials: list[dict[str, Any]] = field(default_factory=list)
    repeats: list[dict[str, Any]] = field(default_factory=list)
    confirmed: list[dict[str, Any]] = field(default_factory=list)
    curves: list[dict[str, Any]] = field(default_factory=list)
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    hits: dict[str, list[npt.NDArray[np.bool_]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.difficulty = self.rng.normal(size=SIZES["test"])

    def train(self, of_loss: _Loss, configuration: Mapping[str, Any], **row: Any) -> dict[str, Any]:
        """Add a training of a search, and return its row."""
        made = {"loss": of_loss.name, **row, **_trained(self.rng, of_loss, configuration)}
        before = sum(each["loss"] == of_loss.name for each in self.trials)
        made |= {"epochs": self.plan["epochs"], "reused": before < self.reused}
        self.trials.append(made)
        self.curves += _curve(self.rng, "search", made, self.plan["epochs"])
        return made

    def repeat(self, of_loss: _Loss, configuration: Mapping[str, Any], **row: Any) -> None:
        """Add a repeat of a configuration."""
        made = self.tested(of_loss, configuration, **row)
        self.repeats.append(made)
        self.curves += _curve(self.rng, "confirm", made, self.plan["epochs"])
        if made["test_evaluations"]:
            self.hits.setdefault(of_loss.name, []).append(made.pop("hits"))

    def tested(self, of_loss: _Loss, chosen: Mapping[str, Any], **row: Any) -> dict[str, Any]:
        """Return the row of a training that is shown the test split, if it has a model."""
        made = {"loss": of_loss.name, **row, **_trained(self.rng, of_loss, chosen), "reused": False}
        is_measured = self.is_tested and made["outcome"] == "complete"
        noise = self.rng.normal(0, 0.003, 4)
        right = round(SIZES["test"] * float(np.clip(made["val_accuracy"] + noise[0], 0, 1)))
        scores = self.difficulty + 0.5 * self.rng.normal(size=SIZES["test"])
        made["hits"] = np.argsort(np.argsort(scores)) < right
        test = {
            "test_accuracy": right / SIZES["test"],
            "test_nll": 1.1 + noise[1],
            "test_brier": 0.4 + noise[2],
            "test_ece": 0.05 + noise[3],
        }
        made |= test if is_measured else dict.fromkeys(test, np.nan)
        return made | {"test_evaluations": int(is_measured)}


def _add_search(made: _Made, of_loss: _Loss) -> None:
    """Add one search of random configurations, and the repeats of its best one."""
    plan, rng = made.plan, made.rng
    made.ranges[of_loss.name] = (plan["learning_rate_min"], plan["learning_rate_max"])
    for trial in range(plan["trials"]):
        configuration = {
            "learning_rate": float(10 ** rng.uniform(-3, 0)),
            "batch_size": int(rng.choice(plan["batch_sizes"])),
        }
        row = {"search": 1, "stage": "search", "trial": trial, "seed": plan["seed"]}
        made.train(of_loss, configuration, **row)
    for repeat in range(plan["repeats"]):
        if best := _best(made.trials, of_loss.name):
            number = plan["losses"].index(of_loss.name) + repeat * len(plan["losses"])
            seed = plan["seed"] + 1 + repeat
            made.repeat(of_loss, best, search=1, trial=number, seed=seed)


def _add_searches(made: _Made, of_loss: _Loss) -> None:
    """Add searches in stages, and a repeat of the configuration that each has chosen.

    Half of the trainings explore, two choose, and the others refine: a step beyond the edge where
    the best is the most extreme tried, else halfway to a neighbour.
    """
    plan = made.plan
    center = np.log10(of_loss.truth[1]) - 0.4
    low, high = (float(10 ** (center + way)) for way in (-1.0, 0.7))
    made.ranges[of_loss.name] = (low, high)
    choosing = min(2, plan["trials"] // 3)
    exploring = (plan["trials"] - choosing + 1) // 2
    for search in range(1, plan["searches"] + 1):
        seed = plan["seed"] + search
        places = qmc.Sobol(2, rng=made.rng).random(8 * -(-exploring // 8))[:exploring]
        found: list[dict[str, Any]] = []

        def train(stage: str, rate: float, size: int, seed: int = seed) -> None:
            configuration = {"learning_rate": float(rate), "batch_size": int(size)}
            row = {"search": search, "stage": stage, "trial": len(found), "seed": seed}  # noqa: B023
            found.append(made.train(of_loss, configuration, **row))  # noqa: B023

        for place in places:
            sizes = plan["batch_sizes"]
            train("explore", low * (high / low) ** place[0], sizes[int(len(sizes) * place[1])])
        for step in range(plan["trials"] - exploring - choosing):
            best = _best(found, of_loss.name) or found[0]
            rates = sorted({each["learning_rate"] for each in found})
            at = rates.index(best["learning_rate"])
            if at in (0, len(rates) - 1):
                rate = best["learning_rate"] * (2.5 if at else 0.4)
            else:
                rate = float(np.sqrt(best["learning_rate"] * rates[at + 1 - 2 * (step % 2)]))
            train("refine", rate, best["batch_size"] * (2 if step == 1 else 1))
        ranked = sorted(found, key=lambda each: -_accuracy(each))[:choosing]
        for each in ranked:
            train("choose", each["learning_rate"], each["batch_size"], seed + 1_000)
        if plan["trials"] and (best := _best(found, of_loss.name)):
            number = plan["losses"].index(of_loss.name) + (search - 1) * len(plan["losses"])
            made.repeat(of_loss, best, search=search, trial=number, seed=seed + 2_000)


def _confirm(made: _Made) -> None:
    """Train the best chosen configuration of the best loss on fresh seeds."""
    rows = pd.DataFrame(made.repeats, columns=list(REPEAT_COLUMNS))
    complete = rows[rows["outcome"] == "complete"]
    if complete.empty:
        return
    winner = str(complete.groupby("loss")["val_accuracy"].mean().idxmax())
    of_winner = complete[complete["loss"] == winner].sort_values("val_accuracy")
    best = {name: of_winner.iloc[-1][name] for name in ("search", "learning_rate", "batch_size")}
    configuration = {"learning_rate": best["learning_rate"], "batch_size": int(best["batch_size"])}
    of_loss = _Loss(winner, TRUTH.get(winner, next(iter(TRUTH.values()))), 0.0)
    for repeat in range(made.plan["repeats"]):
        about = {"search": int(best["search"]), "trial": repeat, "seed": 3_000 + repeat}
        row = made.tested(of_loss, configuration, **about)
        del row["hits"]
        made.confirmed.append(row)


def _accuracy(row: Mapping[str, Any]) -> float:
    return row["val_accuracy"] if row["outcome"] == "complete" else -1.0


def _best(rows: Sequence[dict[str, Any]], loss: str) -> dict[str, Any]:
    """Return the configuration of a loss' best complete training, or nothing."""
    found = pd.DataFrame([row for row in rows if row["loss"] == loss], columns=list(TRIAL_COLUMNS))
    found = found[found["outcome"] == "complete"]
    if found.empty:
        return {}
    best = best_first(found).iloc[0]
    return {
        "learning_rate": float(best["learning_rate"]),
        "batch_size": int(best["batch_size"]),
    }


def _trained(
    rng: np.random.Generator, of_loss: _Loss, configuration: Mapping[str, Any]
) -> dict[str, Any]:
    best, learning_rate, limit = of_loss.truth
    distance = np.log10(configuration["learning_rate"] / learning_rate)
    diverges = configuration["learning_rate"] > limit or rng.random() < of_loss.diverging
    accuracy = 0.1 if diverges else 0.1 + (best - 0.1) * np.exp(-(distance**2) / 1.5)
    return {
        **configuration,
        "outcome": "diverged" if diverges else "complete",
        "val_accuracy": float(np.clip(accuracy + (not diverges) * rng.normal(0, 0.004), 0, 1)),
        "val_loss": np.nan if diverges else float(2 - accuracy),
        "seconds": float(rng.uniform(50, 60)),
        "images_per_second": float(4_000 + 5 * configuration["batch_size"] + rng.normal(0, 50)),
        "run_id": rng.bytes(16).hex(),
    }


def _curve(
    rng: np.random.Generator, stage: str, row: Mapping[str, Any], epochs: int
) -> list[dict[str, Any]]:
    last = 1 if row["outcome"] == "diverged" else epochs
    shares = 1 - np.exp(-2.0 * np.arange(1, epochs + 1) / epochs)
    val = np.clip(row["val_accuracy"] * shares / shares[-1] + rng.normal(0, 0.005, epochs), 0, 1)
    return [
        {
            "stage": stage,
            **{name: row[name] for name in ("loss", "search", "trial")},
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


def planted_study(
    name: str, loss: str, plan: Mapping[str, Any], trials: pd.DataFrame
) -> optuna.Study:
    """Return an Optuna study of a loss' trials."""
    study = optuna.create_study(study_name=f"{name}/search/{loss}", direction="maximize")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.set_metric_names(["validation accuracy"])
    of_loss = trials[trials["loss"] == loss]
    rates = [plan["learning_rate_min"], plan["learning_rate_max"], *of_loss["learning_rate"]]
    sizes = sorted({*plan["batch_sizes"], *of_loss["batch_size"].astype(int)})
    distributions = {
        "loss": CategoricalDistribution([loss]),
        "learning_rate": FloatDistribution(min(rates), max(rates), log=True),
        "batch_size": CategoricalDistribution(sizes),
    }
    for row in of_loss.to_dict("records"):
        study.add_trial(
            optuna.trial.create_trial(
                params={key: row[key] for key in distributions},
                distributions=distributions,
                value=row["val_accuracy"],
            )
        )
    return study
