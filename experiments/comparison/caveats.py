"""Where the answer of a comparison would not hold, and what to do about it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.multitest import multipletests

from experiments.comparison.results import Results
from experiments.comparison.tables import LEVEL

EDGE = 0.05
"""The share of the log range of learning rates that is its edge, at each end."""
WIDER = 3
"""By so much the range of learning rates is to be widened."""
FEW_TRIALS = 8
"""Fewer complete trials than these may all miss a loss' good settings."""
LAST_PART = 0.25
"""The share of the epochs in which the order is to have settled."""
GAIN = 0.01
"""A gain in validation accuracy over that part that says that training was too short."""


@dataclass(frozen=True, kw_only=True)
class Caveat:
    """Something for which a conclusion would not hold."""

    kind: str
    """edge, few trials, diverged, epochs, steps or retest."""
    loss: str | None
    """None: of all."""
    text: str
    """What it is, and what to do; losses in backticks."""


def find_caveats(results: Results, table: pd.DataFrame) -> tuple[Caveat, ...]:
    """Return the warnings of an `Assessment`, from its table: loss by loss, then of all losses."""
    found: list[Caveat] = []
    for row in table.to_dict("records"):
        setting = row["learning_rate"], row["batch_size"]
        found += _edges(results, row["loss"], *setting)
        found += _few_trials(results, row["loss"])
        found += _diverged(results, row["loss"], row["repeats"], row["diverged"])
    return (*found, *_epochs(results, list(table["loss"])), *_steps(results), *_retest(results))


def _edges(results: Results, loss: str, rate: float, batch_size: float) -> Iterator[Caveat]:
    if math.isnan(rate):  # there is no best setting yet
        return
    plan = results.plan
    low, high = plan["learning_rate_min"], plan["learning_rate_max"]
    place = math.log(rate / low) / math.log(high / low)
    for is_there, end, flag, new in (
        (place <= EDGE, "low", "min", low / WIDER),
        (place >= 1 - EDGE, "high", "max", high * WIDER),
    ):
        if is_there:
            yield Caveat(
                kind="edge",
                loss=loss,
                text=f"The best learning rate of `{loss}`, {rate:.2g}, is at the {end} end of the "
                f"range, {low:g} to {high:g}: a better one may lie beyond it. Try "
                f"--learning-rate-{flag} {new:.1g}.",
            )
    tried = results.trials.loc[results.trials["loss"] == loss, "learning_rate"]
    for is_there, end, limit in (
        (place > EDGE and rate <= tried.min() < tried.max(), "lowest", low),
        (place < 1 - EDGE and rate >= tried.max() > tried.min(), "highest", high),
    ):
        if is_there:
            yield Caveat(
                kind="edge",
                loss=loss,
                text=f"The best learning rate of `{loss}`, {rate:.2g}, is the {end} that was "
                f"tried: a better one may lie between it and {limit:g}. Try --trials "
                f"{2 * plan['trials']}.",
            )
    sizes = sorted(plan["batch_sizes"])
    if len(sizes) < 2 or batch_size not in (sizes[0], sizes[-1]):
        return
    end, new = ("smallest", sizes[0] // 2) if batch_size == sizes[0] else ("largest", sizes[-1] * 2)
    if 1 <= new <= results.sizes["train"]:
        yield Caveat(
            kind="edge",
            loss=loss,
            text=f"The best batch size of `{loss}`, {batch_size}, is the {end} that was tried: a "
            f"better one may lie beyond it. Add {new} to --batch-sizes.",
        )


def _few_trials(results: Results, loss: str) -> Iterator[Caveat]:
    outcomes = results.trials.loc[results.trials["loss"] == loss, "outcome"]
    complete = int((outcomes == "complete").sum())
    if complete < FEW_TRIALS:
        planned = results.plan["trials"]
        enough = math.ceil(FEW_TRIALS * len(outcomes) / complete) if complete else 2 * planned
        advice = f" Try --trials {enough}." if enough > planned else ""
        yield Caveat(
            kind="few trials",
            loss=loss,
            text=f"`{loss}` has {complete} complete trials of {len(outcomes)}: its best setting "
            f"may be missing, or be one of luck.{advice}",
        )


def _diverged(results: Results, loss: str, repeats: int, diverged: int) -> Iterator[Caveat]:
    outcomes = results.trials.loc[results.trials["loss"] == loss, "outcome"]
    of_trials = int((outcomes == "diverged").sum())
    for what, number, of, advice in (
        (
            "trials",
            of_trials,
            len(outcomes),
            "most of the range of learning rates is too high for it",
        ),
        ("repeats", diverged, repeats, "its best setting is not to be relied on"),
    ):
        if number > of / 2:
            yield Caveat(
                kind="diverged",
                loss=loss,
                text=f"`{loss}` diverged in {number} of {of} {what}: {advice}.",
            )


def _epochs(results: Results, ranked: list[str]) -> Iterator[Caveat]:
    """Say whether validation accuracies and their order still changed in the last epochs."""
    last = results.plan["epochs"]
    before = max(1, math.floor(last * (1 - LAST_PART)))
    advice = f"Try --epochs {2 * last}."
    if last == 1:
        text = f"After one epoch it can't be seen whether the order of losses settles. {advice}"
        yield Caveat(kind="epochs", loss=None, text=text)
        return
    early, late = (_at_epoch(results, epoch).reindex(columns=ranked) for epoch in (before, last))
    for first, second in _reversals(early, late):
        lead = [100 * (at[first] - at[second]).mean() for at in (early, late)]
        yield Caveat(
            kind="epochs",
            loss=first,
            text=f"The order still changes: in validation `{first}` was {-lead[0]:.2f} points "
            f"behind `{second}` after {before} epochs, and is {lead[1]:.2f} ahead after {last}. "
            f"{advice}",
        )
    gain = (late - early).mean()
    for loss in ranked[:1]:
        if gain[loss] >= GAIN:
            yield Caveat(
                kind="epochs",
                loss=loss,
                text=f"`{loss}` gained {100 * gain[loss]:.2f} points of validation accuracy in the "
                f"last {last - before} of {last} epochs: longer trainings may come to another "
                f"order. {advice}",
            )


def _at_epoch(results: Results, epoch: int) -> pd.DataFrame:
    """Return the validation accuracies of complete repeats: a row a seed, a column a loss."""
    curves, repeats = results.curves, results.repeats
    repeats = repeats.loc[repeats["outcome"] == "complete", ["loss", "trial", "seed"]]
    curves = curves[(curves["stage"] == "confirm") & (curves["epoch"] == epoch)]
    merged = repeats.merge(curves, on=["loss", "trial"])
    return merged.pivot(index="seed", columns="loss", values="val_accuracy")  # noqa: PD010 (strict)


def _reversals(early: pd.DataFrame, late: pd.DataFrame) -> list[tuple[str, str]]:
    """Return the pairs of losses whose order changed by more than luck: who is ahead, who behind.

    By paired t-tests of the change of the difference, corrected over all pairs.
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
    if not pairs:
        return []
    is_change = multipletests(p_values, alpha=LEVEL, method="holm")[0]
    return [
        (first, second) if lead > 0 else (second, first)
        for (first, second, lead_before, lead), changed in zip(pairs, is_change, strict=True)
        if changed and lead_before * lead < 0
    ]


def _steps(results: Results) -> Iterator[Caveat]:
    if len(results.plan["batch_sizes"]) > 1:
        yield Caveat(
            kind="steps",
            loss=None,
            text="Batch sizes are compared at equal epochs, so a larger one takes fewer steps: "
            "which is better at equal steps or in equal time is not said by this.",
        )


def _retest(results: Results) -> Iterator[Caveat]:
    again = int((results.repeats["test_evaluations"] > 1).sum())
    if again:
        yield Caveat(
            kind="retest",
            loss=None,
            text=f"The test split was looked at more than once in {again} repeats: what was "
            "changed in between may have been chosen by it.",
        )
