"""The assessment of a comparison: numbers, statements and caveats."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from experiments.comparison.caveats import Caveat, find_caveats
from experiments.comparison.results import Results
from experiments.comparison.statements import make_statements
from experiments.comparison.tables import pairwise_tests, summarise


@dataclass(frozen=True, kw_only=True, eq=False)
class Assessment:
    """Numbers, statements and caveats. Accuracies and their differences are shares, 0 to 1."""

    winner: str | None
    """The loss with the highest mean validation accuracy; None without a complete repeat."""
    table: pd.DataFrame
    """A row a loss, the winner first: `loss`, `learning_rate` and `batch_size` of its best
    configuration, finished `repeats`, how many of them `diverged` or `failed`, and `n` tested ones.
    `val_accuracy` is the mean that orders the rows: a diverged repeat counts with its last accuracy
    (0 if unknown), a failed one not at all. Each of `MEASURES` has `…_mean`, `…_sd` (n ≥ 2),
    `…_low` and `…_high` (95 % interval of the mean; NaN if n < 2 or all values are equal)."""
    pairs: pd.DataFrame
    """A row for each pair of losses: `first` has the higher validation accuracy, `loss` the lower.
    Over the `n` seeds that both have:

    - `difference`, the mean of first − loss, with `sd`, `low` and `high` (95 % interval),
    - `p` of the paired t-test (two-sided; 1 if all differences are equal), and `p_holm`, corrected,
    - `verdict` on `loss`: worse or better (p_holm ≤ 0.05), undecided, or (n < 2) not compared,
    - `ahead` and `ties`, the repeats in which first was better, or both were equal,
    - `probability` that first is better in a new repeat; a tie counts half. `probability_low` and
      `probability_high` are Clopper-Pearson's exact interval, with ties as lost and as won
      (Bouthillier et al. 2021, "Accounting for Variance in Machine Learning Benchmarks", demand
      0.75),
    - `repeats_needed` to find half a point with probability 80 %, given `sd`;
      `repeats_needed_low` and `…_high` are for the ends of the sd's 95 % interval. 10,000 means at
      least as many. The level is that of Holm's first step for the undecided pairs."""
    statements: tuple[str, ...]
    """Sentences, losses in backticks; the first two are the answer."""
    warnings: tuple[Caveat, ...]
    """Reasons why the answer may not hold."""

    @property
    def answer(self) -> str:
        """Return the first two statements."""
        return " ".join(self.statements[:2])

    @property
    def caveat_list(self) -> str:
        """Return the warnings as a list in Markdown, each after a line end."""
        return "".join(f"\n- {caveat.text}" for caveat in self.warnings)

    @property
    def differences(self) -> pd.DataFrame:
        """Return the rows of `pairs` that have the winner as their first."""
        return self.pairs[self.pairs["first"] == self.winner].reset_index(drop=True)


def assess(results: Results) -> Assessment:
    """Assess a comparison, finished or not."""
    repeats = results.repeats.sort_values(["loss", "seed"])
    table = summarise(results, repeats)
    ranked = table.loc[table["val_accuracy"].notna(), "loss"]
    accuracy = repeats.pivot(index="seed", columns="loss", values="test_accuracy")  # noqa: PD010
    pairs = pairwise_tests(accuracy.reindex(columns=ranked))
    return Assessment(
        winner=None if ranked.empty else ranked.iloc[0],
        table=table,
        pairs=pairs,
        statements=make_statements(results, table, pairs),
        warnings=find_caveats(results, table),
    )
