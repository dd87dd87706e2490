"""What a comparison of losses came to: all that its statistics and its report are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pandas as pd
    from optuna import Study

TRIAL_COLUMNS = (
    "loss",
    "trial",
    "outcome",
    "learning_rate",
    "batch_size",
    "epochs",
    "val_accuracy",
    "val_loss",
    "seconds",
    "images_per_second",
    "run_id",
)
REPEAT_COLUMNS = (
    "loss",
    "trial",
    "seed",
    "outcome",
    "learning_rate",
    "batch_size",
    "val_accuracy",
    "test_accuracy",
    "test_nll",
    "test_brier",
    "test_ece",
    "test_evaluations",
    "seconds",
    "images_per_second",
    "run_id",
)
CURVE_COLUMNS = (
    "stage",
    "loss",
    "trial",
    "epoch",
    "train_loss",
    "train_accuracy",
    "val_loss",
    "val_accuracy",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Results:
    """The results of a comparison, as far as it has come."""

    name: str
    plan: Mapping[str, Any]
    """What it was told: dataset, dataset_digest, losses, learning_rate_min, learning_rate_max,
    batch_sizes, trials (of each loss), epochs, repeats, seed, sampler, optimizer, schedule, device,
    precision; and given_test, whether the test split is the same for every seed."""
    classes: tuple[str, ...]
    """The K class names."""
    sizes: Mapping[str, int]
    """Images of each split: train, validation, test."""
    trials: pd.DataFrame
    """A row for each trial of the search that is over: `TRIAL_COLUMNS`. Accuracies are shares, 0 to
    1, of the last epoch; `outcome` is complete, diverged or failed (nothing is pruned); `seconds`
    and `images_per_second` are of training and validation, the mean over its epochs of the
    latter."""
    repeats: pd.DataFrame
    """A row for each repeat of a loss' best setting that is over: `REPEAT_COLUMNS`. Repeats of
    different losses with the same seed are paired: they share the split and the order of images.
    `test_…` is NaN until the test split was looked at, and stays so where there is no model, as the
    training diverged or failed. `test_nll` takes probabilities below 1e-6 as 1e-6."""
    curves: pd.DataFrame
    """A row for each epoch of each of these trainings: `CURVE_COLUMNS`; `stage` is search or
    confirm, and `trial` the number in it (the search counts for each loss anew)."""
    confusions: Mapping[str, npt.NDArray[np.int64]]
    """Of each loss, (K, K) test images over all repeats: rows are true, columns predicted."""
    studies: Mapping[str, Study]
    """The Optuna study of each loss' search."""
    provenance: Mapping[str, str]
    """How it was made, to be shown as it is: commit, versions, hardware, command, run, experiment,
    started, ended (ISO 8601, UTC)."""
