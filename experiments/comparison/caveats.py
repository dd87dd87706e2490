"""Reasons why the answer of a comparison may not hold, and what to do about each."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd

from experiments.comparison.advice import continued, made_anew
from experiments.comparison.ranges import Open
from experiments.comparison.results import Results
from experiments.comparison.settling import unsettled
from experiments.comparison.tables import outlying
from experiments.comparison.wording import listed, percent, quoted

WIDER = 3
"""The factor by which to widen the range of learning rates."""
FEW_TRIALS = 8
"""A search of fewer trials than this may miss a loss' good configurations."""
ENOUGH_TRIALS = 11
"""So many are advised then, for a search: see `search_rule`."""
FEW_REPEATS = 3
"""With so few repeats, or fewer, each one alone can change the result."""
ENOUGH_REPEATS = 5
"""So many are advised then."""

KINDS = (
    *("edge", "outlier", "few repeats", "retest", "epochs", "diverged", "few trials"),
    *("shared images", "steps"),
)
"""The kinds of caveats, in the order in which they matter."""


@dataclass(frozen=True, kw_only=True)
class Caveat:
    """A reason why a conclusion may not hold."""

    kind: str
    """One of `KINDS`."""
    loss: str | None
    """None: several losses, or all."""
    text: str
    """The reason; losses in backticks."""
    command: str = ""
    """What to type about it, whole; empty if there is nothing, or if it isn't known."""

    @property
    def markdown(self) -> str:
        """The reason and the command."""
        return f"{self.text} Try: `{self.command}`" if self.command else self.text


def find_caveats(
    results: Results, table: pd.DataFrame, still_open: Sequence[Open]
) -> tuple[Caveat, ...]:
    """Return the warnings of an `Assessment`, from its table: those that matter most first."""
    found = [
        *_edges(results, still_open),
        *_outliers(results, table),
        *_few_repeats(results, table),
        *_retest(results),
        *_epochs(results, list(table["loss"])),
        *_diverged(results, table),
        *_few_trials(results, table),
        *_shared_images(results),
        *_steps(results),
    ]
    return tuple(sorted(found, key=lambda caveat: KINDS.index(caveat.kind)))


def _edges(results: Results, still_open: Sequence[Open]) -> Iterator[Caveat]:
    """Yield a caveat for the losses whose ranges are open at the same end."""
    groups: dict[tuple[str, str, bool], list[Open]] = defaultdict(list)
    for each in still_open:
        groups[each.parameter, each.end, each.is_limit].append(each)
    for found in groups.values():
        text, command = (_of_searches if results.is_staged else _of_one)(results, found)
        loss = found[0].loss if len(found) == 1 else None
        yield Caveat(kind="edge", loss=loss, text=text, command=command)


def _of_searches(results: Results, found: Sequence[Open]) -> tuple[str, str]:
    at, trials = found[0], results.plan["trials"]
    where = listed([f"of `{each.loss}` in {each.count} of {each.searches}" for each in found])
    if at.is_limit:
        end = "smallest" if at.end == "lower" else "largest"
        text = f"The best batch size is the {end} that a search may try, {at.best:g}, {where} "
        text += "searches: a better one may lie beyond it."
        sizes = sorted({*results.plan["batch_sizes"], round(at.best)})
        return text, made_anew(results, "--batch-sizes", *sizes)
    return (
        f"The range of {at.name} is still open at its {at.end} end: the best is the most extreme "
        f"that was tried, {where} searches. A better one may lie beyond it, which a longer search "
        "tries."
    ), continued(results, "--trials", trials + math.ceil(trials / 2))


def _of_one(results: Results, found: Sequence[Open]) -> tuple[str, str]:
    plan, at = results.plan, found[0]
    bests = listed([f"`{each.loss}` ({each.best:.2g})" for each in found])
    if at.parameter == "batch_size":
        sizes = sorted(plan["batch_sizes"])
        end = "smallest" if at.end == "lower" else "largest"
        more = [sizes[0] // 2, *sizes] if at.end == "lower" else [*sizes, 2 * sizes[-1]]
        text = f"The best batch size of {listed(quoted(each.loss for each in found))}, "
        text += f"{at.best:g}, is the {end} that was tried: a better one may lie beyond it."
        return text, made_anew(results, "--batch-sizes", *more)
    low, high = plan["learning_rate_min"], plan["learning_rate_max"]
    text = f"The best learning rate of {bests} is "
    if at.is_limit:
        flag, new = ("min", low / WIDER) if at.end == "lower" else ("max", high * WIDER)
        text += f"at the {at.end} end of the range, {low:g} to {high:g}: "
        text += "a better one may lie beyond it."
        return text, made_anew(results, f"--learning-rate-{flag}", float(f"{new:.1g}"))
    end, limit = ("lowest", low) if at.end == "lower" else ("highest", high)
    text += f"the {end} that was tried: a better one may lie between it and {limit:g}."
    return text, made_anew(results, "--trials", 2 * plan["trials"])


def _outliers(results: Results, table: pd.DataFrame) -> Iterator[Caveat]:
    for row in table[table["outliers"] > 0].to_dict("records"):
        loss = row["loss"]
        found = outlying(results.repeats[results.repeats["loss"] == loss]).sort_values("seed")
        which = listed(
            [
                (f"search {each['search']}, " if results.is_staged else "")
                + f"seed {each['seed']} ({percent(each['test_accuracy'])})"
                for each in found.to_dict("records")
            ]
        )
        verb = "repeat is" if len(found) == 1 else "repeats are"
        text = f"{len(found)} outlying {verb} among the {row['n']} of `{loss}`: {which}. The "
        text += f"median is {percent(row['accuracy_median'])}, the mean "
        text += f"{percent(row['accuracy_mean'])}. Its pairs are decided only where all repeats "
        text += "agree on which loss is ahead."
        yield Caveat(kind="outlier", loss=loss, text=text)


def _few_repeats(results: Results, table: pd.DataFrame) -> Iterator[Caveat]:
    found = table[(table["n"] >= 1) & (table["n"] <= FEW_REPEATS)]
    if found.empty:
        return
    flag = "searches" if results.is_staged else "repeats"
    planned = results.plan[flag]
    more = ENOUGH_REPEATS if planned < ENOUGH_REPEATS else 2 * planned
    who, loss = listed(quoted(found["loss"])), found["loss"].iloc[0] if len(found) == 1 else None
    if len(found) == len(table) > 1:
        who = "Each loss"
    most = found["n"].max()
    verb = "has" if loss or who == "Each loss" else "have"
    count = "only 1 tested repeat" if most == 1 else f"only {most} tested repeats"
    if most != found["n"].min():
        count = f"at most {most} tested repeats"
    text = f"{who} {verb} {count}: each one alone can change the result."
    yield Caveat(
        kind="few repeats", loss=loss, text=text, command=continued(results, f"--{flag}", more)
    )


def _retest(results: Results) -> Iterator[Caveat]:
    if results.test_rounds > 1:
        text = f"The test split was looked at in {results.test_rounds} rounds: what was added or "
        text += "changed in between may have been chosen by it."
        yield Caveat(kind="retest", loss=None, text=text)


def _epochs(results: Results, ranked: list[str]) -> Iterator[Caveat]:
    """Report validation accuracies, or an order of them, that still changed in the last epochs."""
    command = made_anew(results, "--epochs", 2 * results.plan["epochs"])
    for loss, text in unsettled(results, ranked):
        yield Caveat(kind="epochs", loss=loss, text=text, command=command)


def _diverged(results: Results, table: pd.DataFrame) -> Iterator[Caveat]:
    """Report losses that diverged in most trials."""
    outcomes = results.trials.groupby("loss")["outcome"]
    all_of, diverged = outcomes.size(), outcomes.agg(lambda of: (of == "diverged").sum())
    found = [loss for loss in table["loss"] if loss in all_of and 2 * diverged[loss] > all_of[loss]]
    if not found:
        return
    where = listed([f"`{loss}` in {diverged[loss]} of {all_of[loss]}" for loss in found])
    text = f"Most trials diverged, of {where}: most of the learning rates are too high there."
    yield Caveat(kind="diverged", loss=found[0] if len(found) == 1 else None, text=text)


def _few_trials(results: Results, table: pd.DataFrame) -> Iterator[Caveat]:
    planned = results.plan["trials"]
    if results.is_staged:
        if planned < FEW_TRIALS:
            text = f"A search has only {planned} trials: a longer one may change the order."
            command = continued(results, "--trials", ENOUGH_TRIALS)
            yield Caveat(kind="few trials", loss=None, text=text, command=command)
        return
    trials = results.trials
    complete = trials[trials["outcome"] == "complete"]["loss"].value_counts()
    over = trials["loss"].value_counts()
    counts = {loss: (int(complete.get(loss, 0)), int(over.get(loss, 0))) for loss in table["loss"]}
    few = {loss: count for loss, count in counts.items() if count[0] < FEW_TRIALS}
    if not few:
        return
    enough = max(
        math.ceil(FEW_TRIALS * tried / done) if done else 2 * planned
        for done, tried in few.values()
    )
    has = [f"`{loss}` has {done} complete trials of {of}" for loss, (done, of) in few.items()]
    text = f"{listed(has)}: a best configuration may be a lucky one, or not among them."
    command = made_anew(results, "--trials", enough) if enough > planned else ""
    loss = next(iter(few)) if len(few) == 1 else None
    yield Caveat(kind="few trials", loss=loss, text=text, command=command)


def _shared_images(results: Results) -> Iterator[Caveat]:
    """Report that, without a given test split, a search saw test images of its repeat."""
    if results.plan.get("given_test") is not False or results.repeats.empty:
        return
    text = "There is no given test split: each repeat draws its own, and part of its test images "
    text += "served the search that chose its configuration. So its accuracy may be too high."
    yield Caveat(kind="shared images", loss=None, text=text)


def _steps(results: Results) -> Iterator[Caveat]:
    if len(results.plan["batch_sizes"]) > 1:
        text = "Batch sizes are compared at equal epochs, so a larger one takes fewer steps. The "
        text += "result may differ at equal steps or in equal time."
        yield Caveat(kind="steps", loss=None, text=text)
