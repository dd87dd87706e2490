"""What can be said of a comparison, in numbers and in words, and where it would not hold."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from experiments.comparison.caveats import Caveat, find_caveats
from experiments.comparison.results import Results
from experiments.comparison.statements import make_statements
from experiments.comparison.tables import compare, summarise


@dataclass(frozen=True, kw_only=True, eq=False)
class Assessment:
    """What can be said of a comparison. Accuracies and their differences are shares, 0 to 1."""

    winner: str | None
    """The loss of the highest mean validation accuracy; None if none has a complete repeat."""
    table: pd.DataFrame
    """A row a loss, the winner first: `loss`, `learning_rate` and `batch_size` of its best setting,
    `repeats` that are over, of which `diverged`, `failed`, and `n` measured on the test split;
    `val_accuracy`, the mean that orders the rows: a diverged repeat counts as what it came to (0
    if that is unknown), a failed one not at all. Of each of `MEASURES`, `…_mean`, `…_sd` (n ≥ 2),
    `…_low` and `…_high` (95 % interval of the mean; NaN if n < 2 or all values are equal)."""
    pairs: pd.DataFrame
    """A row for each pair of losses: `first`, the one with the higher validation accuracy, `loss`,
    the other, and over the `n` seeds that both have

    - `difference`, the mean of first − loss, with `sd`, `low` and `high` (95 % interval),
    - `p` of the paired t-test (two-sided; 1 if all differences are equal), and `p_holm`, corrected,
    - `verdict`: what `loss` is: worse or better (p_holm ≤ 0.05), undecided, or (n < 2) not
      compared,
    - `ahead`, in how many repeats first was better, and `ties`, in how many they were equal,
    - `probability` that first is better in a new repeat, a tie being half of it, with
      `probability_low` and `probability_high` (Bouthillier et al. 2021, "Accounting for Variance in
      Machine Learning Benchmarks", who ask for 0.75; Clopper-Pearson's exact interval, widened by
      counting ties as lost and as won),
    - `repeats_needed` to find half a point with a chance of 80 %, if the spread is `sd`, and
      `repeats_needed_low` and `…_high`, if it is at the ends of its 95 % interval; 10,000 is at
      least as many. It is at the level that Holm's first step has for the undecided pairs."""
    statements: tuple[str, ...]
    """In words, losses in backticks; the first two are the answer."""
    warnings: tuple[Caveat, ...]
    """Where the answer would not hold."""

    @property
    def differences(self) -> pd.DataFrame:
        """Return the rows of `pairs` that have the winner as their first."""
        return self.pairs[self.pairs["first"] == self.winner].reset_index(drop=True)

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON can hold it: tables as lists of rows, NaN as None."""
        return {
            "winner": self.winner,
            "statements": list(self.statements),
            "warnings": [asdict(caveat) for caveat in self.warnings],
            "table": _rows(self.table),
            "pairs": _rows(self.pairs),
        }


def assess(results: Results) -> Assessment:
    """Return what can be said of a comparison, as far as it has come."""
    repeats = results.repeats.sort_values(["loss", "seed"])
    table = summarise(results, repeats)
    ranked = table.loc[table["val_accuracy"].notna(), "loss"]
    accuracy = repeats.pivot(index="seed", columns="loss", values="test_accuracy")  # noqa: PD010
    pairs = compare(accuracy.reindex(columns=ranked))
    return Assessment(
        winner=None if ranked.empty else ranked.iloc[0],
        table=table,
        pairs=pairs,
        statements=make_statements(results, table, pairs),
        warnings=find_caveats(results, table),
    )


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [
        {str(name): None if pd.isna(value) else value for name, value in row.items()}
        for row in table.astype(object).to_dict("records")
    ]
