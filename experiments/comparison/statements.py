"""The statements of a comparison: sentences that say what its statistics show, and no more."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import pandas as pd

from experiments.comparison.results import Results
from experiments.comparison.tables import ALPHA, MAX_REPEATS, MIN_EFFECT, POWER

Row = Mapping[Hashable, Any]
"""Of a table of `experiments.comparison.tables`."""

INTERVAL = f"{100 * (1 - ALPHA):g} % interval"
NO_ANSWER = "The results don't say which loss is better"


def make_statements(results: Results, table: pd.DataFrame, pairs: pd.DataFrame) -> tuple[str, ...]:
    """Return the statements of an `Assessment`, from its table and its pairs."""
    losses: Sequence[Row] = table.to_dict("records")
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
        rows: Sequence[Row] = pairs.to_dict("records")
        others = [row for row in rows if row["first"] == winner["loss"]]
        answer = _answer(winner, others, is_alone=len(losses) == 1)
        answer += _not_compared(others) + _method(rows) + _scope(results, winner)
    return tuple(answer[:2] + _incomplete(losses) + answer[2:])


def percent(share: float) -> str:
    """Return a share in percent."""
    return f"{100 * share:.2f} %"


def points(difference: float) -> str:
    """Return a difference of shares in percent points, without the unit."""
    return f"{100 * difference:z.2f}".replace("-", "−")


def _answer(winner: Row, others: Sequence[Row], *, is_alone: bool) -> list[str]:
    """Return the two sentences that say which loss is best, and the details."""
    name, measured = f"`{winner['loss']}`", _measured(winner)
    worse, undecided = (
        [f"`{other['loss']}`" for other in others if other["verdict"] == verdict]
        for verdict in ("worse", "undecided")
    )
    better = [_with_repeats(other, winner) for other in others if other["verdict"] == "better"]
    if is_alone:
        return [f"{name} {measured}.", "There is no other loss to compare it with."]
    if not (better or worse or undecided):
        return [
            f"{name} has the highest validation accuracy and {measured}.",
            f"{NO_ANSWER}: this needs two repeats of each with the same seeds.",
        ]
    first = f"{name} has the highest validation accuracy and {measured}, but "
    if better:
        first += f"{_list(better, 'and')} {'is' if len(better) == 1 else 'are'} better."
    elif undecided:
        first += f"can't be told apart from {_list(undecided, 'or')}."
    elif len(worse) == 1:
        first = f"{name} is better than {worse[0]}: it {measured}."
    else:
        first = f"{name} is the best of the {1 + len(worse)} losses compared: it {measured}."
    lead, needed = [_lead(winner, others)], _needed(others)
    return [first, *lead, *needed] if better else [first, *needed, *lead]


def _with_repeats(other: Row, winner: Row) -> str:
    """Return a loss' name, with the number of compared repeats if it is not all."""
    count = f" (in the {other['n']} of {winner['n']} repeats that it completed)"
    return f"`{other['loss']}`{count if other['n'] < winner['n'] else ''}"


def _measured(row: Row) -> str:
    n, mean = row["n"], f"gets {percent(row['accuracy_mean'])} of the test images right"
    if n == 1:
        return f"{mean} in its one repeat"
    if math.isnan(row["accuracy_low"]):
        return f"{mean} in each of its {n} repeats"
    ends = f"{points(row['accuracy_low'])} to {points(row['accuracy_high'])} %"
    return f"{mean} ({INTERVAL} {ends}, n = {n})"


def _lead(winner: Row, others: Sequence[Row]) -> str:
    """Return how far the winner is ahead of each loss that it is compared with."""
    leads: list[str] = []
    for other in others:
        if other["verdict"] == "not compared":
            continue
        lead, unit = points(other["difference"]), "" if leads else " points"
        spread = f"{points(other['low'])} to {points(other['high'])}"
        if math.isnan(other["low"]):
            spread = "the same in each repeat"
        elif not leads:
            spread = f"{INTERVAL} {spread}"
        count = "" if other["n"] == winner["n"] else f", n = {other['n']}"
        verb = "" if leads else "is "
        details = f"{spread}, {_p(other['p_holm'])}{count}"
        leads.append(f"over `{other['loss']}` {verb}{lead}{unit} ({details})")
    return f"Its lead {_list(leads, 'and')}."


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.2g}"


def _needed(others: Sequence[Row]) -> list[str]:
    """Return how many repeats would show a difference of `MIN_EFFECT` from undecided losses."""
    undecided = [other for other in others if other["verdict"] == "undecided"]
    if not undecided:
        return []
    varied = [other for other in undecided if not math.isnan(other["repeats_needed"])]
    if not varied:
        return ["All repeats differ by the same amount, so the repeats needed are unknown."]
    most = max(varied, key=lambda other: float(other["repeats_needed"]))
    count, low, high = (_count(most[f"repeats_needed{end}"]) for end in ("", "_low", "_high"))
    show = f"show a difference of {100 * MIN_EFFECT:g} points with a chance of {100 * POWER:g} %."
    if most["repeats_needed"] == MAX_REPEATS:
        return [f"It would take {count} repeats to {show}"]
    return [
        f"About {count} repeats ({low} to {high}, given the spread's 95 % interval) would {show}"
    ]


def _count(repeats: float) -> str:
    return f"{repeats:,.0f}" + (" or more" if repeats == MAX_REPEATS else "")


def _incomplete(losses: Sequence[Row]) -> list[str]:
    """Return which losses have repeats that diverged, failed or are missing."""
    statements = []
    for row in losses:
        name, repeats = f"`{row['loss']}`", row["repeats"]
        lost = [f"{row[outcome]} {outcome}" for outcome in ("diverged", "failed") if row[outcome]]
        if not repeats:
            statements.append(f"{name} has no repeat.")
        elif row["diverged"] + row["failed"] == repeats:
            statements.append(f"{name} completed none of {repeats} repeats ({', '.join(lost)}).")
        elif lost:
            worse = ": it is not as good as its mean says" if row["diverged"] else ""
            statements.append(
                f"Of {repeats} repeats of {name}, {' and '.join(lost)}, and only the others were "
                f"measured{worse}."
            )
    return statements


def _not_compared(others: Sequence[Row]) -> list[str]:
    names = [f"`{other['loss']}`" for other in others if other["verdict"] == "not compared"]
    if not names or len(names) == len(others):
        return []
    verb = "shares" if len(names) == 1 else "share"
    return [f"{_list(names, 'and')} {verb} fewer than two seeds with it: there is no test."]


def _method(pairs: Sequence[Row]) -> list[str]:
    """Return the meaning of p and of the intervals."""
    tested = sum(pair["verdict"] != "not compared" for pair in pairs)
    if not tested:
        return []
    corrected = "" if tested == 1 else f", corrected by Holm's method for {tested} pairs of losses"
    return [
        f"Better means p ≤ {ALPHA:g} in the t-test of paired repeats{corrected}.",
        "Each interval is for one loss or one pair alone. The winner's are too high if other "
        "losses are as good, because the same trainings chose it.",
    ]


def _scope(results: Results, winner: Row) -> list[str]:
    """Return what the statements hold for."""
    given, images = results.plan.get("given_test"), results.sizes["test"]
    if winner["n"] == 1:
        return []
    if given is None:
        return ["The statements hold for new trainings, not for other images."]
    if given:
        return [
            f"All repeats have the same {images:,} test images: the statements hold for new "
            "trainings, not for other images."
        ]
    return [
        f"Each repeat draws its own {images:,} test images from the same data: the statements "
        "hold for new splits and trainings, not for other data."
    ]


def _list(names: Sequence[str], last: str) -> str:
    return f" {last} ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
