"""Reasons why the answer of a comparison may not hold, and what to do about each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.multitest import multipletests

from experiments.comparison.results import Results
from experiments.comparison.tables import ALPHA

EDGE = 0.05
"""The share of the log range of learning rates that counts as its edge, at each end."""
WIDER = 3
"""The factor by which to widen the range of learning rates."""
FEW_TRIALS = 8
"""Fewer complete trials than this may miss a loss' good configurations."""
LAST_PART = 0.25
"""The last share of the epochs, in which the order should not change."""
GAIN = 0.01
"""After a larger gain in validation accuracy over that part, training was too short."""


@dataclass(frozen=True, kw_only=True)
class Caveat:
    """A reason why a conclusion may not hold."""

    kind: str
    """edge, few trials, diverged, epochs, steps or retest."""
    loss: str | None
    """None: all losses."""
    text: str
    """The reason, and what to do; losses in backticks."""


def find_caveats(results: Results, table: pd.DataFrame) -> tuple[Caveat, ...]:
    """Return the warnings of an `Assessment`, from its table: loss by loss, then of all losses."""
    found: list[Caveat] = []
    for row in table.to_dict("records"):
        loss = row["loss"]
        of_loss = {
            "edge": _edges(results, loss, row["learning_rate"], row["batch_size"]),
            "few trials": _few_trials(results, loss),
            "diverged": _diverged(results, loss, row["repeats"], row["diverged"]),
        }
        found += _caveats(of_loss, loss)
    found += _epochs(results, list(table["loss"]))
    found += _caveats({"steps": _steps(results), "retest": _retest(results)})
    return tuple(found)


def _caveats(texts: Mapping[str, Iterator[str]], loss: str | None = None) -> list[Caveat]:
    return [
        Caveat(kind=kind, loss=loss, text=text) for kind, each in texts.items() for text in each
    ]


def _edges(results: Results, loss: str, rate: float, batch_size: float) -> Iterator[str]:
    if math.isnan(rate):  # there is no best configuration yet
        return
    plan = results.plan
    low, high = plan["learning_rate_min"], plan["learning_rate_max"]
    place = math.log(rate / low) / math.log(high / low)
    the_rate = f"The best learning rate of `{loss}`, {rate:.2g}, is"
    for is_there, end, flag, new in (
        (place <= EDGE, "low", "min", low / WIDER),
        (place >= 1 - EDGE, "high", "max", high * WIDER),
    ):
        if is_there:
            yield (
                f"{the_rate} at the {end} end of the range, {low:g} to {high:g}: a better one may "
                f"lie beyond it. Try --learning-rate-{flag} {new:.1g}."
            )
    tried = results.trials.loc[results.trials["loss"] == loss, "learning_rate"]
    for is_there, end, limit in (
        (place > EDGE and rate <= tried.min() < tried.max(), "lowest", low),
        (place < 1 - EDGE and rate >= tried.max() > tried.min(), "highest", high),
    ):
        if is_there:
            yield (
                f"{the_rate} the {end} that was tried: a better one may lie between it and "
                f"{limit:g}. Try --trials {2 * plan['trials']}."
            )
    sizes = sorted(plan["batch_sizes"])
    if len(sizes) < 2 or batch_size not in (sizes[0], sizes[-1]):
        return
    end, new = ("smallest", sizes[0] // 2) if batch_size == sizes[0] else ("largest", sizes[-1] * 2)
    if 1 <= new <= results.sizes["train"]:
        yield (
            f"The best batch size of `{loss}`, {batch_size}, is the {end} that was tried: a better "
            f"one may lie beyond it. Add {new} to --batch-sizes."
        )


def _few_trials(results: Results, loss: str) -> Iterator[str]:
    outcomes = results.trials.loc[results.trials["loss"] == loss, "outcome"]
    complete = int((outcomes == "complete").sum())
    if complete < FEW_TRIALS:
        planned = results.plan["trials"]
        enough = math.ceil(FEW_TRIALS * len(outcomes) / complete) if complete else 2 * planned
        advice = f" Try --trials {enough}." if enough > planned else ""
        yield (
            f"`{loss}` has {complete} complete trials of {len(outcomes)}: its best configuration "
            f"may be a lucky one, or not among them.{advice}"
        )


def _diverged(results: Results, loss: str, repeats: int, diverged: int) -> Iterator[str]:
    outcomes = results.trials.loc[results.trials["loss"] == loss, "outcome"]
    trials = int((outcomes == "diverged").sum())
    if trials > len(outcomes) / 2:
        yield (
            f"`{loss}` diverged in {trials} of {len(outcomes)} trials: most of the range of "
            "learning rates is too high for it."
        )
    if diverged > repeats / 2:
        yield (
            f"`{loss}` diverged in {diverged} of {repeats} repeats: its best configuration is "
            "unreliable."
        )


def _epochs(results: Results, ranked: list[str]) -> Iterator[Caveat]:
    """Report validation accuracies, or an order of them, that still changed in the last epochs."""
    last = results.plan["epochs"]
    before = max(1, math.floor(last * (1 - LAST_PART)))
    advice = f"Try --epochs {2 * last}."
    if last == 1:
        text = f"One epoch doesn't show whether the order of losses is final. {advice}"
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
                f"last {last - before} of {last} epochs: longer training may change the "
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
    if not pairs:
        return []
    is_change = multipletests(p_values, alpha=ALPHA, method="holm")[0]
    return [
        (first, second) if lead > 0 else (second, first)
        for (first, second, lead_before, lead), changed in zip(pairs, is_change, strict=True)
        if changed and lead_before * lead < 0
    ]


def _steps(results: Results) -> Iterator[str]:
    if len(results.plan["batch_sizes"]) > 1:
        yield (
            "Batch sizes are compared at equal epochs, so a larger one takes fewer steps. The "
            "result may differ at equal steps or in equal time."
        )


def _retest(results: Results) -> Iterator[str]:
    again = int((results.repeats["test_evaluations"] > 1).sum())
    if again:
        yield (
            f"The models of {again} repeats saw the test split more than once: changes in between "
            "may have been chosen by it."
        )
