"""Whether training was long enough for the order of losses to be final."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations

import numpy as np
import pandas as pd
from scipy import stats

from experiments.comparison.intervals import ALPHA, holm
from experiments.comparison.results import Results

LAST_PART = 0.25
"""The last share of the epochs, in which the order should not change."""
GAIN = 0.01
"""After a larger gain in validation accuracy over that part, training was too short."""


def unsettled(results: Results, ranked: list[str]) -> Iterator[tuple[str | None, str]]:
    """Yield a loss and a sentence where accuracies, or their order, changed in the last epochs."""
    last = results.plan["epochs"]
    before = max(1, math.floor(last * (1 - LAST_PART)))
    if last == 1:
        yield None, "One epoch doesn't show whether the order of losses is final."
        return
    early, late = (_at_epoch(results, epoch).reindex(columns=ranked) for epoch in (before, last))
    for first, second in _reversals(early, late):
        lead = [100 * (at[first] - at[second]).mean() for at in (early, late)]
        yield (
            first,
            f"The order still changes: in validation `{first}` was {-lead[0]:.2f} points behind "
            f"`{second}` after {before} epochs, and is {lead[1]:.2f} ahead after {last}.",
        )
    gain = (late - early).mean()
    for loss in ranked[:1]:
        if gain[loss] >= GAIN:
            yield (
                loss,
                f"`{loss}` gained {100 * gain[loss]:.2f} points of validation accuracy in the last "
                f"{last - before} of {last} epochs: longer training may change the order.",
            )


def _at_epoch(results: Results, epoch: int) -> pd.DataFrame:
    """Return the validation accuracies of complete repeats: a row a seed, a column a loss."""
    keys = ["loss", "search", "trial"]
    curves, repeats = results.curves, results.repeats
    repeats = repeats.loc[repeats["outcome"] == "complete", [*keys, "seed"]]
    curves = curves[(curves["stage"] == "confirm") & (curves["epoch"] == epoch)]
    merged = repeats.merge(curves[[*keys, "val_accuracy"]], on=keys)
    return merged.pivot(index="seed", columns="loss", values="val_accuracy")  # noqa: PD010 (strict)


def _reversals(early: pd.DataFrame, late: pd.DataFrame) -> list[tuple[str, str]]:
    """Return the pairs of losses whose order changed significantly, the one ahead first.

    The tests are paired t-tests of the change of the difference, corrected over all pairs.
    """
    pairs, p_values = [], []
    for first, second in combinations(late.columns, 2):
        leads = pd.DataFrame(
            {"early": early[first] - early[second], "late": late[first] - late[second]}
        )
        leads = leads.dropna()
        changes = (leads["late"] - leads["early"]).to_numpy().round(9)
        if len(changes) < 2 or not np.ptp(changes):
            continue
        mean = leads.mean()
        pairs.append((first, second, mean["early"], mean["late"]))
        p_values.append(stats.ttest_1samp(changes, 0).pvalue)
    is_change = holm(np.array(p_values)) <= ALPHA
    return [
        (first, second) if lead > 0 else (second, first)
        for (first, second, lead_before, lead), changed in zip(pairs, is_change, strict=True)
        if changed and lead_before * lead < 0
    ]
