"""The order of trials. Whatever names a best trial names the first one of this order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tracking.ranking import Entry
from tracking.ranking import best_first as order_of

if TYPE_CHECKING:
    import pandas as pd


def best_first(trials: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of trials, the best first: complete trials, then the others.

    Args:
        trials: with the columns `trial`, `outcome`, `loss`, `val_accuracy` and `val_loss`.
    """
    import pandas as pd

    is_complete = trials["outcome"] == "complete"
    parts = [_ordered(trials[is_complete]), _ordered(trials[~is_complete])]
    return pd.concat([part for part in parts if len(part)] or parts[:1])


def _ordered(trials: pd.DataFrame) -> pd.DataFrame:
    columns = trials[["trial", "loss", "val_accuracy", "val_loss"]]
    # As objects, so that missing values are None in each column.
    rows = columns.astype(object).where(columns.notna(), None).itertuples(index=False)
    entries = [
        Entry(
            value=float("nan") if accuracy is None else accuracy,
            loss=loss,
            val_loss=val_loss,
            start=trial,
        )
        for trial, loss, accuracy, val_loss in rows
    ]
    return trials.iloc[order_of(entries)]
