"""The assessment of a comparison: numbers, statements and caveats."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from experiments.comparison.caveats import Caveat, find_caveats
from experiments.comparison.intervals import NewImages, exact
from experiments.comparison.pairs import UNFAIRNESS, Doubts, pairwise_tests
from experiments.comparison.ranges import open_ranges
from experiments.comparison.results import IRRELEVANT, Results
from experiments.comparison.statements import make_statements
from experiments.comparison.tables import MEASURES, summarise, summary
from experiments.study.parameters import BY_NAME


@dataclass(frozen=True, kw_only=True, eq=False)
class Assessment:
    """Numbers, statements and caveats. Accuracies and their differences are shares, 0 to 1.

    There are two kinds of 95 % intervals: `low` to `high` is over new trainings on these test
    images, `images_low` to `images_high` over new trainings and new images.
    """

    winner: str | None
    """The loss with the highest mean validation accuracy; None without a complete repeat."""
    table: pd.DataFrame
    """A row a loss, the winner first:

    - `loss`; `learning_rate`, the median over its repeats, with `learning_rate_low` and `…_high`,
      the extremes; the lower median `batch_size`, and so on for what else was searched (of texts
      the most frequent). Before there are repeats, it is the best trial's configuration.
    - finished `repeats`, how many of them `diverged` or `failed`, `n` tested ones, and how many of
      these are `outliers`; a search without a complete trial counts as a failed repeat
    - `val_accuracy`, the mean that orders the rows: a diverged repeat counts with its last accuracy
      (0 if unknown), a failed one not at all
    - `accuracy_median`, and `images_low` and `images_high` of the accuracy; NaN if n < 2, if all
      values are equal, or if the test split is given and what each model got right isn't known
    - of each of `MEASURES`, `…_mean`, `…_sd` (n ≥ 2), `…_low` and `…_high` (NaN if n < 2 or all
      values are equal)."""
    pairs: pd.DataFrame
    """A row for each pair of losses: `first` has the higher validation accuracy, `loss` the lower.
    Over the `n` seeds that both have:

    - `difference`, the mean of first − loss, with `sd`, `low` and `high`, `images_low` and
      `images_high`
    - `bound_low` and `bound_high`, as low and high, but for all pairs at once (Bonferroni)
    - `p` of the paired t-test (two-sided; NaN if all differences are equal), and `p_holm`,
      corrected over all pairs; `p_images` and `p_images_holm` likewise, for new images. Of losses
      that were searched for in stages, it is the p of a difference beyond `pairs.UNFAIRNESS`.
    - `verdict` on `loss`, from p_holm and the bounds, and `images_verdict`, from p_images_holm:

      - not compared: n < 2
      - constant: all differences are equal, so there is no test
      - unknown: which images each model got right isn't known
      - worse, better: p_holm ≤ 0.05, and the difference is at least the plan's min_effect
      - slightly worse, slightly better: p_holm ≤ 0.05, and the difference is smaller
      - behind, ahead: p_holm ≤ 0.05, but the loss ahead has a diverged or failed repeat
      - equal: the bounds lie within ± min_effect, and both losses completed all repeats
      - undecided: everything else, and where one of both has an outlying repeat and the repeats
        don't agree on which loss is ahead

    - `ahead` and `ties`, the repeats in which first was better, or both were equal
    - `probability` that first is better in a new repeat; a tie counts half. `probability_low` and
      `probability_high` are Clopper-Pearson's exact interval, with ties as lost and as won
      (Bouthillier et al. 2021, "Accounting for Variance in Machine Learning Benchmarks", demand
      0.75).
    - `repeats_needed` to find half a point with a chance of at least 80 %, given the upper 80 %
      limit of the sd. 10,000 means at least as many. The level is that of Holm's first step for the
      pairs with p_holm > 0.05."""
    to_use: Mapping[Hashable, Any] | None
    """The configuration to use: `loss` and its parameters; the `run_id` of its complete training
    with the lowest seed, None if there is none; its finished `repeats` on fresh seeds,
    how many of them `diverged` or `failed`, and `n` measured ones; the `split` of their images,
    test or validation; `accuracy_mean`, `accuracy_low`, `accuracy_high`. None if there is none."""
    statements: tuple[str, ...]
    """Sentences, losses in backticks; the first two are the answer."""
    warnings: tuple[Caveat, ...]
    """Reasons why the answer may not hold, those that matter most first."""

    @property
    def answer(self) -> str:
        """Return the first two statements."""
        return " ".join(self.statements[:2])

    @property
    def caveat_list(self) -> str:
        """Return the warnings as a list in Markdown, each after a line end."""
        return "".join(f"\n- {caveat.markdown}" for caveat in self.warnings)

    @property
    def differences(self) -> pd.DataFrame:
        """Return the rows of `pairs` that have the winner as their first."""
        return self.pairs[self.pairs["first"] == self.winner].reset_index(drop=True)


def assess(results: Results) -> Assessment:
    """Assess a comparison, finished or not."""
    repeats = results.repeats.sort_values(["loss", "seed"])
    images = NewImages(results, repeats)
    table = summarise(results, repeats, images)
    ranked = table.loc[table["val_accuracy"].notna(), "loss"]
    winner = None if ranked.empty else str(ranked.iloc[0])
    accuracy = repeats.pivot(index="seed", columns="loss", values="test_accuracy")  # noqa: PD010
    doubts = Doubts(
        incomplete=set(table.loc[table["diverged"] + table["failed"] > 0, "loss"]),
        outlying=set(table.loc[table["outliers"] > 0, "loss"]),
    )
    pairs = pairwise_tests(
        accuracy.reindex(columns=ranked),
        images,
        min_effect=results.plan.get("min_effect", IRRELEVANT),
        margin=UNFAIRNESS if results.is_staged else 0.0,
        doubts=doubts,
    )
    to_use, still_open = _to_use(results, winner), open_ranges(results, table)
    return Assessment(
        winner=winner,
        table=table,
        pairs=pairs,
        to_use=to_use,
        statements=make_statements(results, table, pairs, to_use, still_open),
        warnings=find_caveats(results, table, still_open),
    )


def _to_use(results: Results, winner: str | None) -> Mapping[Hashable, Any] | None:
    """Return `Assessment.to_use`; with one search a loss, the winner's repeats confirm it."""
    rows = results.confirmed
    if not results.is_staged:
        rows = results.repeats[results.repeats["loss"] == winner]
    if rows.empty:
        return None
    first = rows.to_dict("records")[0]
    complete = rows[rows["outcome"] == "complete"]
    split = "test" if complete["test_accuracy"].notna().any() else "validation"
    values = exact(complete["test_accuracy" if split == "test" else "val_accuracy"])
    of_values = summary(values, MEASURES["accuracy"])
    return {
        **{name: value for name, value in first.items() if name in BY_NAME},
        "run_id": None if complete.empty else str(complete.sort_values("seed")["run_id"].iloc[0]),
        "repeats": len(rows),
        **{name: int((rows["outcome"] == name).sum()) for name in ("diverged", "failed")},
        "n": len(values),
        "split": split,
        **{f"accuracy_{name}": of_values[name] for name in ("mean", "low", "high")},
    }
