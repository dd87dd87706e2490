"""The statements behind the answer: leads, other pairs, what is missing, and the method."""

from __future__ import annotations

import math
from collections.abc import Sequence

from experiments.comparison.intervals import ALPHA
from experiments.comparison.pairs import (
    MAX_REPEATS,
    MIN_EFFECT,
    POWER,
    UNFAIRNESS,
    may_fail,
)
from experiments.comparison.results import IRRELEVANT, Results
from experiments.comparison.tables import winner_covers
from experiments.comparison.wording import (
    INTERVAL,
    Row,
    listed,
    no_more_than,
    p_text,
    percent,
    points,
    quoted,
)
from experiments.study.parameters import BY_NAME


def details(results: Results, losses: Sequence[Row], pairs: Sequence[Row]) -> list[str]:
    """Return the statements about what was tested; the losses' first is the winner."""
    winner = losses[0]
    of_winner = [pair for pair in pairs if pair["first"] == winner["loss"]]
    return [
        *_leads(winner, of_winner),
        *_other_pairs([pair for pair in pairs if pair["first"] != winner["loss"]]),
        *_needed(of_winner),
        *_not_compared(of_winner),
        *_method(results, losses, pairs),
        *_failures_to_come(losses),
        *_scope(results, winner),
    ]


def use(to_use: Row) -> str:
    """Return the configuration to use and how good it is."""
    values = listed(
        [
            f"{BY_NAME[str(name)].label} {BY_NAME[str(name)].text(value)}"
            for name, value in to_use.items()
            if name in BY_NAME and name != "loss"
        ]
    )
    text = f"The configuration to use: `{to_use['loss']}` with {values}."
    lost = [f"{to_use[name]} {name}" for name in ("diverged", "failed") if to_use[name]]
    if lost:
        text += f" Of {to_use['repeats']} trainings on fresh seeds, {' and '.join(lost)}."
    if not to_use["n"]:
        return text
    right = f"it gets {percent(to_use['accuracy_mean'])} of the {to_use['split']} images right"
    spread = f"n = {to_use['n']}"
    if not math.isnan(to_use["accuracy_low"]):
        ends = f"{points(to_use['accuracy_low'])} to {points(to_use['accuracy_high'])} %"
        spread = f"{INTERVAL} {ends}, {spread}"
    return f"{text} Trained anew, {right} ({spread})."


def incomplete(losses: Sequence[Row]) -> list[str]:
    """Return which losses have no repeat, or repeats without a result."""
    lost = [row for row in losses if row["diverged"] + row["failed"]]
    statements = [f"`{row['loss']}` has no repeat." for row in losses if not row["repeats"]]
    if some := [row for row in lost if row["n"]]:
        of = listed([f"{row['n']} of {row['repeats']} of `{row['loss']}`" for row in some])
        statements.append(f"Only complete repeats are measured: {of}.")
    return statements


def _leads(winner: Row, others: Sequence[Row]) -> list[str]:
    """Return how far the winner is ahead of each loss that it is compared with."""
    leads: list[str] = []
    for other in others:
        if other["verdict"] == "not compared":
            continue
        spread = "the same in each repeat"
        if other["verdict"] != "constant":
            label = "" if leads else f"{INTERVAL} "
            spread = f"{label}{points(other['low'])} to {points(other['high'])}"
            spread += f", {p_text(other['p_holm'])}"
        count = "" if other["n"] == winner["n"] else f", n = {other['n']}"
        lead = points(other["difference"])
        verb, unit = ("", "") if leads else ("is ", " points")
        leads.append(f"over `{other['loss']}` {verb}{lead}{unit} ({spread}{count})")
    return [f"On the test images its lead {listed(leads)}."] if leads else []


def _other_pairs(pairs: Sequence[Row]) -> list[str]:
    """Return the decided pairs without the winner, those with the same losers together."""
    found: list[str] = []
    for verdicts, adverb in (
        (("worse", "better"), ""),
        (("slightly worse", "slightly better"), "slightly "),
    ):
        losers: dict[str, list[str]] = {}
        for pair in pairs:
            if pair["verdict"] not in verdicts:
                continue
            names = str(pair["first"]), str(pair["loss"])
            better, worse = names if pair["verdict"] == verdicts[0] else names[::-1]
            size = f" (by {no_more_than(pair)})" if adverb else ""
            losers.setdefault(better, []).append(f"`{worse}`{size}")
        groups: dict[tuple[str, ...], list[str]] = {}
        for better, worse_ones in losers.items():
            groups.setdefault(tuple(worse_ones), []).append(better)
        found += [
            f"{listed(quoted(better))} {'is' if len(better) == 1 else 'are'} {adverb}better than "
            f"{listed(worse_ones)}"
            for worse_ones, better in groups.items()
        ]
    found += [
        f"`{pair['first']}` and `{pair['loss']}` differ by {no_more_than(pair)}"
        for pair in pairs
        if pair["verdict"] == "equal"
    ]
    return [f"Of the other pairs: {'; '.join(found)}."] if found else []


def _needed(others: Sequence[Row]) -> list[str]:
    """Return how many repeats would show a difference of `MIN_EFFECT` from undecided losses."""
    undecided = [other for other in others if other["verdict"] == "undecided"]
    if not undecided:
        return []
    most = max(float(other["repeats_needed"]) for other in undecided)
    count = f"{most:,.0f}" + (" or more" if most == MAX_REPEATS else "")
    return [
        f"It may take as many as {count} repeats to show a difference of {100 * MIN_EFFECT:g} "
        f"points from {listed(quoted(str(other['loss']) for other in undecided), 'or')} with a "
        f"chance of {100 * POWER:g} %."
    ]


def _not_compared(others: Sequence[Row]) -> list[str]:
    names = quoted(str(other["loss"]) for other in others if other["verdict"] == "not compared")
    if not names or len(names) == len(others):
        return []
    verb = "shares" if len(names) == 1 else "share"
    return [f"{listed(names)} {verb} fewer than two seeds with the winner: there is no test."]


def _method(results: Results, losses: Sequence[Row], pairs: Sequence[Row]) -> list[str]:
    """Return the meaning of better and of the intervals."""
    tested = sum(not math.isnan(pair["p"]) for pair in pairs)
    if not tested:
        return []
    corrected = "" if tested == 1 else f", corrected by Holm's method for {tested} pairs of losses"
    least = 100 * results.plan.get("min_effect", IRRELEVANT)
    text = (
        f"Better means p ≤ {ALPHA:g} in the t-test of paired repeats{corrected}, and a difference "
        f"of at least {least:g} points."
    )
    if results.is_staged:
        text += (
            f" p is that of a difference of more than {100 * UNFAIRNESS:g} points: by so much, a "
            "search may favour a loss."
        )
    covers = winner_covers(len(losses))
    alone = "Each interval is for one loss or one pair alone."
    if covers is not None:
        alone += " The winner's own covers less, because its luck chose it: about "
        alone += f"{100 * covers:.0f} %, if all {len(losses)} losses are equally good."
    return [text, alone]


def _failures_to_come(losses: Sequence[Row]) -> list[str]:
    """Return how many repeats may fail although none did."""
    complete = [row["n"] for row in losses if row["n"] and row["n"] == row["repeats"]]
    if not complete:
        return []
    n = max(complete)
    repeats = "1 repeat" if n == 1 else f"{n} repeats"
    return [
        f"After {repeats} without a failure, up to {100 * may_fail(n):.0f} % of all repeats may "
        "diverge, fail or collapse (95 % limit)."
    ]


def _scope(results: Results, winner: Row) -> list[str]:
    """Return what the statements are about."""
    if results.is_staged:
        about = f"A repeat is a whole search of {results.plan['trials']} trials and a training of "
        about += "what it chose. The statements are about losses that are tuned so, not about the "
        about += "best that a loss can reach."
    else:
        about = "A repeat is a new training of one configuration of each loss. The statements are "
        about += "about these configurations."
    if winner["n"] > 1 and results.plan.get("given_test") is False:
        about += " Each repeat draws its own test images from the same data."
    return [about]
