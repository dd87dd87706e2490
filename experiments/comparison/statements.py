"""The statements of a comparison: sentences that say what its statistics show, and no more."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import pandas as pd

from experiments.comparison.details import details, incomplete, use
from experiments.comparison.pairs import DECIDED
from experiments.comparison.ranges import Open
from experiments.comparison.results import Results
from experiments.comparison.wording import (
    INTERVAL,
    Row,
    listed,
    no_more_than,
    percent,
    points,
    quoted,
)

NO_ANSWER = "The results don't say which loss is better"
ANOTHER_SEARCH = (
    "Another search may end at other configurations, so this does not say which loss is better."
)
SHOWN = 3
"""As many leads, the smallest ones, stand in the answer."""


def make_statements(
    results: Results,
    table: pd.DataFrame,
    pairs: pd.DataFrame,
    to_use: Row | None,
    still_open: Sequence[Open],
) -> tuple[str, ...]:
    """Return the statements of an `Assessment`, from its table and what else was found."""
    losses: Sequence[Row] = table.to_dict("records")
    rows: Sequence[Row] = pairs.to_dict("records")
    winner = losses[0]
    if math.isnan(winner["val_accuracy"]):
        answer = ["No loss has a complete repeat.", f"{NO_ANSWER}."]
    elif not winner["n"]:
        answer = [
            f"`{winner['loss']}` has the highest validation accuracy, "
            f"{percent(winner['val_accuracy'])}.",
            f"{NO_ANSWER}: no model has seen the test split yet.",
        ]
    else:
        others = [row for row in rows if row["first"] == winner["loss"]]
        answer = [
            _on_these_images(results, losses, others, still_open),
            _on_other_images(results, losses, others),
        ]
    answer[0] = f"{_failures(losses)}{answer[0]}"
    rest = [] if to_use is None else [use(to_use)]
    if winner["n"]:
        rest += details(results, losses, rows)
    return (*answer, *rest, *incomplete(losses))


def _failures(losses: Iterable[Row]) -> str:
    """Return how often losses fail, as a sentence before all others."""
    found = []
    for row in losses:
        lost = [
            f"{outcome} in {row[outcome]}" for outcome in ("diverged", "failed") if row[outcome]
        ]
        if lost:
            found.append(f"`{row['loss']}` {' and '.join(lost)} of {row['repeats']} repeats")
    return f"{listed(found)}. " if found else ""


def _on_these_images(
    results: Results, losses: Sequence[Row], others: Sequence[Row], still_open: Sequence[Open]
) -> str:
    """Return what holds for new trainings and these test images."""
    is_alone = len(losses) == 1
    if results.is_staged:
        condition = (
            f"With {results.plan['trials']} trials to tune {'it' if is_alone else 'each loss'}"
        )
    else:
        condition = f"At the configuration{'' if is_alone else 's'} that one search found"
    end = f"{_open(results, still_open)}."
    if is_alone:
        return f"{condition}, {_measured(results, losses[0], is_named=True)}{end}"
    verdict = _verdict(losses[0], others, len(losses))
    return f"{condition}, {verdict}: {_measured(results, losses[0])}{end}"


def _verdict(winner: Row, others: Sequence[Row], losses: int) -> str:
    name = f"`{winner['loss']}`"
    if {other["verdict"] for other in others} == {"worse"} and len(others) == losses - 1:
        if losses == 2:
            return f"{name} is better than `{others[0]['loss']}`"
        return f"{name} is the best of {losses} losses"
    relations = _relations(others)
    highest = f"{name} has the highest validation accuracy"
    if len(relations) == 1:
        is_good = others[0]["verdict"] in ("worse", "slightly worse", "equal", "behind")
        return f"{highest}{' and' if is_good else ', but'} {relations[0]}"
    return ", ".join([highest, *relations[:-1]]) + (f", and {relations[-1]}" if relations else "")


def _relations(others: Sequence[Row]) -> list[str]:
    """Return the verdicts on the other losses, as predicates of the winner."""
    found = []
    for verdict, predicate in PREDICATES.items():
        rows = [other for other in others if other["verdict"] == verdict]
        if not rows:
            continue
        losses = quoted(str(row["loss"]) for row in rows)
        if verdict.startswith("slightly"):
            losses = [f"`{row['loss']}` (by {no_more_than(row)})" for row in rows]
        elif verdict == "equal":
            losses = [f"`{row['loss']}` by {no_more_than(row)}" for row in rows]
        elif verdict == "constant":
            losses = [_constant(row) for row in rows]
        found.append(predicate.format(listed(losses, "or" if "can't" in predicate else "and")))
    return found


PREDICATES = {
    "better": "is worse than {}",
    "slightly better": "is slightly worse than {}",
    "undecided": "can't be told apart from {}",
    "ahead": "is behind {} in the repeats that both completed",
    "behind": "is ahead of {} in the repeats that both completed, but not always completes",
    "constant": "is {} in each repeat",
    "equal": "differs from {}",
    "slightly worse": "is slightly better than {}",
    "worse": "is better than {}",
}
"""What the winner is, by the verdict on another loss."""


def _constant(pair: Row) -> str:
    lead = pair["difference"]
    if not lead:
        return f"equal to `{pair['loss']}`"
    return f"{points(abs(lead))} points {'ahead of' if lead > 0 else 'behind'} `{pair['loss']}`"


def _measured(results: Results, row: Row, *, is_named: bool = False) -> str:
    n, images = row["n"], f"{results.sizes['test']:,}"
    right = f"{'`' + row['loss'] + '`' if is_named else 'it'} gets "
    right += f"{percent(row['accuracy_mean'])} right"
    if n == 1:
        return f"shown {images} test images, {right} in its one repeat"
    shown = f"these {images} test images"
    if results.plan.get("given_test") is False:
        shown = f"{images} test images of a new split"
    if math.isnan(row["accuracy_low"]):
        return f"trained anew and shown {shown}, {right} in each of its {n} repeats"
    ends = f"{points(row['accuracy_low'])} to {points(row['accuracy_high'])} %"
    return f"trained anew and shown {shown}, {right} ({INTERVAL} {ends}, n = {n})"


def _open(results: Results, still_open: Sequence[Open]) -> str:
    """Return which ranges are still open, as the end of a sentence."""
    if not still_open:
        return ""
    if len(still_open) > 2:
        names = list(dict.fromkeys(each.loss for each in still_open))
        return f", but the ranges of {listed(quoted(names))} are still open"
    found = []
    for each in still_open:
        where = f" in {each.count} of {each.searches} searches" if results.is_staged else ""
        found.append(
            f"the range of {each.name} of `{each.loss}` is still open at its {each.end} end{where}"
        )
    return f", but {listed(found)}"


def _on_other_images(results: Results, losses: Sequence[Row], others: Sequence[Row]) -> str:
    """Return what holds for new trainings and new images."""
    compared = [other for other in others if other["verdict"] != "not compared"]
    if len(losses) == 1:
        alone = "There is no other loss to compare it with."
        if math.isnan(losses[0]["images_low"]):
            return alone
        return f"On other images {_accuracy_on_other(losses[0])} ({INTERVAL}). {alone}"
    if not compared:
        return f"{NO_ANSWER}: this needs two repeats of each with the same seeds."
    known = [other for other in compared if not math.isnan(other["p_images"])]
    if known:
        decided = _decided_on_other(compared)
        second = f"{decided}: {_numbers_on_other(losses[0], known)}."
    elif all(other["verdict"] == "constant" for other in compared):
        second = "Without a spread of the differences there is no test."
    else:
        second = "Whether this holds for other images is not known: the images that each model "
        second += "got right are not recorded."
    return second if results.is_staged else f"{second} {ANOTHER_SEARCH}"


def _decided_on_other(compared: Sequence[Row]) -> str:
    decided = [other for other in compared if other["verdict"] in (*DECIDED, "ahead", "behind")]
    lost = [other for other in decided if other["images_verdict"] != other["verdict"]]
    if not decided:
        return "For other images, nothing is decided either"
    if not lost:
        return "This holds for other images as well"
    if len(lost) == len(decided):
        return "For other images, this is not decided"
    names = listed(quoted(str(other["loss"]) for other in lost), "or")
    return f"This holds for other images as well, but not for {names}"


def _numbers_on_other(winner: Row, known: Sequence[Row]) -> str:
    closest = sorted(known, key=lambda other: float(abs(other["difference"])))[:SHOWN]
    leads: list[str] = []
    for other in closest:
        ends = f"{points(other['images_low'])} to {points(other['images_high'])}"
        leads.append(f"over `{other['loss']}` {ends}{'' if leads else ' points'}")
    if len(closest) < len(known):
        lead = f"its smallest leads are {listed(leads)}"
    else:
        lead = f"its lead {listed(leads).replace('` ', '` is ', 1)}"
    parts = [lead] if math.isnan(winner["images_low"]) else [_accuracy_on_other(winner), lead]
    kind = "95 % intervals over new trainings and new images"
    if any(
        other["images_verdict"] == "undecided" and other["images_low"] * other["images_high"] > 0
        for other in closest
    ):
        kind += ", not corrected for several pairs as the verdict is"
    return f"{', and '.join(parts)} ({kind})"


def _accuracy_on_other(winner: Row) -> str:
    return f"it gets {points(winner['images_low'])} to {points(winner['images_high'])} % right"
