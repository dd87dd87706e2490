"""The results of a comparison of losses, which its statistics and its report read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from optuna import Study

from experiments.study.parameters import searched

if TYPE_CHECKING:
    import numpy.typing as npt

    from tracking.examples import Examples

TRIAL_COLUMNS = (
    *("loss", "search", "stage", "trial", "seed", "outcome", "learning_rate", "batch_size"),
    *("epochs", "val_accuracy", "val_loss", "seconds", "images_per_second", "run_id", "reused"),
)
REPEAT_COLUMNS = (
    *("loss", "search", "trial", "seed", "outcome", "learning_rate", "batch_size", "val_accuracy"),
    *("test_accuracy", "test_nll", "test_brier", "test_ece", "test_evaluations"),
    *("seconds", "images_per_second", "run_id", "reused"),
)
CURVE_METRICS = ("train_loss", "train_accuracy", "val_loss", "val_accuracy")
CURVE_COLUMNS = ("stage", "loss", "search", "trial", "epoch", *CURVE_METRICS)


IRRELEVANT = 0.002
"""A smaller difference of accuracies matters to nobody, unless the plan has another min_effect."""


def validation_mean(complete: Sequence[float], diverged: Sequence[float]) -> float:
    """Return the mean validation accuracy of a loss' repeats, by which losses are ordered.

    A diverged repeat counts with its last accuracy, or 0 if that is unknown.
    """
    of_diverged = np.nan_to_num(np.array(diverged, np.float64))
    values = np.concatenate([np.array(complete, np.float64), of_diverged])
    return float(np.nanmean(np.round(values, 9)))  # to far less than an image


def with_searched(columns: Sequence[str], plan: Mapping[str, Any]) -> list[str]:
    """Return columns of trials, with those of parameters that only some studies search."""
    others = [name for name in searched(plan) if name not in columns]
    at = columns.index("batch_size") + 1
    return [*columns[:at], *others, *columns[at:]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Results:
    """The results of a comparison, finished or not."""

    name: str
    plan: Mapping[str, Any]
    """Its settings: search (staged, random or tpe), dataset, dataset_digest, losses, searches (of
    each loss), trials (of each search), learning_rate_min, learning_rate_max, batch_sizes, epochs,
    repeats, seed, optimizer, schedule, device, precision; and given_test, whether the test split is
    the same for every seed."""
    classes: tuple[str, ...]
    """The K class names."""
    sizes: Mapping[str, int]
    """Images of each split: train, validation, test."""
    trials: pd.DataFrame
    """A row for each finished training of the searches: `TRIAL_COLUMNS`. Accuracies are shares, 0
    to 1, of the last epoch. `outcome` is complete, diverged or failed; nothing is pruned. `search`
    counts the searches of a loss from 1, `trial` the trainings of a search from 0, and `stage` is
    explore, refine or choose; random and tpe have one search and one stage, search. `seconds` is
    the time of training and validation, `images_per_second` the mean over the epochs. `reused`: the
    training was found, not made."""
    repeats: pd.DataFrame
    """A row for each finished repeat: `REPEAT_COLUMNS`. A repeat is the training, on a fresh seed,
    of the configuration that a search has chosen. With random and tpe there is one search, and its
    configuration has a repeat for each of several seeds. Repeats of different losses with the same
    seed are paired: their searches and they share the split and the order of images. `test_…` is
    NaN before the test, and where the training diverged or failed and left no model. `test_nll`
    takes probabilities below 1e-6 as 1e-6."""
    confirmed: pd.DataFrame
    """A row for each finished training of the configuration to use, on fresh seeds:
    `REPEAT_COLUMNS`. It was chosen from all searches of the winner together. Empty for random and
    tpe, where `repeats` confirm it."""
    hits: Mapping[str, npt.NDArray[np.bool_]]
    """Of each loss, (n, N): whether each of the N test images was predicted correctly, in each of
    its n tested repeats, ordered by seed. Empty unless the test split is given."""
    ranges: Mapping[str, tuple[float, float]]
    """Of each loss, the range of learning rates in which its searches began."""
    test_rounds: int
    """How often models were shown the test split; each model was shown it once."""
    curves: pd.DataFrame
    """A row for each epoch of each training in `trials` and `repeats`: `CURVE_COLUMNS`. `stage` is
    search or confirm; `search` and `trial` are those of the training's row."""
    confusions: Mapping[str, npt.NDArray[np.int64]]
    """Of each loss, (K, K) counts of test images over all repeats: rows true, columns predicted."""
    studies: Mapping[str, Study]
    """An Optuna study of all trainings of each loss' searches."""
    examples: Mapping[str, Examples] = field(default_factory=dict)
    """By run, test images with the predictions of its model, where they are recorded: of each
    configuration that may be the one to use, the complete run with the lowest seed."""
    provenance: Mapping[str, str]
    """Texts: commit, versions, hardware, command, run, experiment, started and ended (in UTC)."""

    @property
    def search(self) -> str:
        """How configurations were searched: staged, random or tpe."""
        # Plans of older comparisons have the name of Optuna's sampler.
        return str(self.plan.get("search") or self.plan.get("sampler") or "random")

    @property
    def is_staged(self) -> bool:
        """Whether each loss has several searches, in stages."""
        return self.search == "staged"

    @property
    def losses(self) -> list[str]:
        """The losses that are compared, in the order of the plan."""
        return [str(loss) for loss in self.plan["losses"]]
