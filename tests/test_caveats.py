"""Where a comparison would not hold: each caveat, its order, and the command that it advises."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from made_results import COMMAND, around, caveats, results, texts, with_curves

from experiments.compare import build_parser
from experiments.comparison.advice import next_name
from experiments.comparison.assessment import assess
from experiments.comparison.caveats import KINDS
from experiments.comparison.results import Results

NAN = math.nan
TWO = {"mse": around(70), "l1": around(69, offset=3)}
SEARCHES = {"mse": around(70, n=4), "l1": around(69, n=4, offset=3)}
CONTINUED = f"{COMMAND} --study made"
ANEW = f"{COMMAND} --study made-2"


def with_values(made: Results, **values: Any) -> Results:
    return replace(made, repeats=made.repeats.assign(**values), trials=made.trials.assign(**values))


def commands(made: Results, kind: str) -> list[str]:
    return [caveat.command for caveat in caveats(made, kind)]


@pytest.mark.parametrize("search", ["random", "staged"])
def test_a_sound_comparison_has_no_warnings(search: str) -> None:
    made = with_curves(results(TWO, search=search))
    assert assess(made).warnings == ()
    assert assess(made).caveat_list == ""


# One search: the ends of the range


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        # 5 % of three decades are a factor of 1.413.
        (0.00141, ("lower", "--learning-rate-min 0.0003")),
        (0.00142, None),
        (0.707, None),
        (0.709, ("upper", "--learning-rate-max 3")),
    ],
)
def test_a_learning_rate_at_the_edge(rate: float, expected: tuple[str, str] | None) -> None:
    made = with_values(results({"mse": around(70)}), learning_rate=rate)
    if expected is None:
        assert texts(made, "edge") == []
        return
    assert texts(made, "edge") == [
        f"The best learning rate of `mse` ({rate:.2g}) is at the {expected[0]} end of the range, "
        "0.001 to 1: a better one may lie beyond it."
    ]
    assert commands(made, "edge") == [f"{ANEW} {expected[1]}"]


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([0.01, 0.02, 0.2], "highest that was tried: a better one may lie between it and 1."),
        ([0.2, 0.3, 0.02], "lowest that was tried: a better one may lie between it and 0.001."),
        ([0.01, 0.3, 0.02], None),
        ([0.02, 0.02, 0.02], None),
    ],
)
def test_a_learning_rate_beyond_which_none_was_drawn(
    rates: list[float], expected: str | None
) -> None:
    made = results({"mse": around(70)})
    trials = made.trials.iloc[:3].assign(
        learning_rate=rates,
        val_accuracy=[0.1, 0.2, 0.7],
        outcome=["diverged", "complete", "complete"],
    )
    made = replace(made, trials=trials, repeats=made.repeats.assign(learning_rate=rates[-1]))
    assert texts(made, "edge") == (
        [f"The best learning rate of `mse` ({rates[-1]:.2g}) is the {expected}"] if expected else []
    )
    assert commands(made, "edge") == ([f"{ANEW} --trials 24"] if expected else [])


@pytest.mark.parametrize(
    ("size", "sizes", "expected"),
    [
        (64, [32, 64, 128], None),
        (32, [128, 32, 64], ("smallest", "16 32 64 128")),
        (128, [32, 64, 128], ("largest", "32 64 128 256")),
        (64, [64], None),
        (1, [1, 2], None),
        (32_768, [1, 32_768], None),
    ],
)
def test_a_batch_size_at_the_edge(
    size: int, sizes: list[int], expected: tuple[str, str] | None
) -> None:
    made = with_values(results({"mse": around(70)}, batch_sizes=sizes), batch_size=size)
    if expected is None:
        assert texts(made, "edge") == []
        return
    assert texts(made, "edge") == [
        f"The best batch size of `mse`, {size}, is the {expected[0]} that was tried: a better one "
        "may lie beyond it."
    ]
    assert commands(made, "edge") == [f"{ANEW} --batch-sizes {expected[1]}"]


def test_losses_at_the_same_edge_share_a_caveat() -> None:
    made = with_values(results(TWO), learning_rate=0.9)
    (caveat,) = caveats(made, "edge")
    assert caveat.loss is None
    assert caveat.text.startswith("The best learning rate of `mse` (0.9) and `l1` (0.9) is at the ")


def test_the_edge_is_that_of_the_best_trial_before_there_are_repeats() -> None:
    made = results({"mse": around(70)})
    made.trials.loc[[3, 4], "val_accuracy"] = [0.9, 0.95]
    made.trials.loc[[3, 4], "learning_rate"] = [0.99, 0.1]
    made.trials.loc[4, "outcome"] = "diverged"
    made = replace(made, repeats=made.repeats.iloc[:0])
    assert len(texts(made, "edge")) == 1
    assert "`mse` (0.99) is at the upper end" in texts(made, "edge")[0]


# Several searches: what lies beyond the best


def searched(rates: list[float], **columns: Any) -> Results:
    """Return four searches of two losses; those of mse chose these learning rates."""
    made = results(SEARCHES, search="staged")
    repeats = made.repeats.copy()
    repeats.loc[repeats["loss"] == "mse", "learning_rate"] = rates
    trials = made.trials.copy()
    for name, values in columns.items():
        trials.loc[trials["loss"] == "mse", name] = values
    return replace(made, repeats=repeats, trials=trials)


def test_a_range_that_is_open_in_half_of_the_searches() -> None:
    made = searched([0.3, 0.3, 0.03, 0.03])
    assert texts(made, "edge") == [
        "The range of learning rates is still open at its upper end: the best is the most extreme "
        "that was tried, of `mse` in 2 of 4 searches. A better one may lie beyond it, which a "
        "longer search tries."
    ]
    assert commands(made, "edge") == [f"{CONTINUED} --trials 17 --retest"]
    assert texts(searched([0.3, 0.03, 0.03, 0.03]), "edge") == []
    assert texts(searched([0.3, 0.003, 0.03, 0.03]), "edge") == []  # one on each side
    assert "lower end" in texts(searched([0.003] * 4), "edge")[0]


def test_what_diverged_beyond_closes_a_range_and_what_failed_does_not() -> None:
    outcomes = {
        outcome: ["complete"] * 4 + [outcome] for outcome in ("complete", "diverged", "failed")
    }
    for outcome, is_open in (("complete", False), ("diverged", False), ("failed", True)):
        made = searched([0.1] * 4, outcome=outcomes[outcome] * 4)
        assert bool(texts(made, "edge")) == is_open


def test_rates_are_compared_at_the_same_batch_size() -> None:
    # 0.1 at 64 was the best; at 128 its rate is 1.74 times as high, and 0.13 at 64 was worse.
    rates, sizes = [0.01, 0.03, 0.1, 0.13, 0.174], [64, 64, 64, 64, 128]
    made = searched([0.174] * 4, learning_rate=rates * 4, batch_size=sizes * 4)
    made.repeats.loc[made.repeats["loss"] == "mse", "batch_size"] = 128
    assert not any("learning rates" in text for text in texts(made, "edge"))
    # A complete trial at four times the batch size says nothing of the rate, a diverged one does.
    made = searched([0.1] * 4, learning_rate=[0.01, 0.03, 0.1, 0.05, 3.0] * 4)
    made.trials.loc[made.trials["learning_rate"] == 3.0, "batch_size"] = 256
    assert any("learning rates" in text for text in texts(made, "edge"))
    made.trials.loc[made.trials["learning_rate"] == 3.0, "outcome"] = "diverged"
    assert not any("learning rates" in text for text in texts(made, "edge"))


@pytest.mark.parametrize(
    ("sizes", "chosen", "expected"),
    [
        ([32, 64, 64, 64, 128], 128, "upper"),
        ([32, 64, 64, 64, 128], 32, "lower"),
        ([32, 64, 64, 64, 128], 64, None),
        ([1, 64, 64, 64, 128], 1, None),
        ([32, 64, 64, 64, 32_768], 32_768, None),
        ([64] * 5, 64, None),
    ],
)
def test_batch_sizes_of_searches(sizes: list[int], chosen: int, expected: str | None) -> None:
    made = searched([0.03] * 4, batch_size=sizes * 4)
    made.repeats.loc[made.repeats["loss"] == "mse", "batch_size"] = chosen
    found = [text for text in texts(made, "edge") if "batch sizes" in text]
    assert [f"open at its {expected} end" in text for text in found] == ([True] if expected else [])


@pytest.mark.parametrize(
    ("chosen", "which", "sizes"),
    [(256, "largest", "64 256"), (16, "smallest", "16 64")],
)
def test_at_the_last_batch_size_of_the_rule_a_longer_search_is_not_advised(
    chosen: int, which: str, sizes: str
) -> None:
    made = searched([0.03] * 4, batch_size=[32, 64, 64, 64, chosen] * 4)
    made.repeats.loc[made.repeats["loss"] == "mse", "batch_size"] = chosen
    found = [each for each in caveats(made, "edge") if "batch size is" in each.text]
    assert [each.text for each in found] == [
        f"The best batch size is the {which} that a search may try, {chosen}, of `mse` in 4 of 4 "
        "searches: a better one may lie beyond it."
    ]
    assert [each.command for each in found] == [f"{ANEW} --batch-sizes {sizes}"]


# Repeats


def test_an_outlying_repeat_is_named_with_the_median() -> None:
    collapsed = {"mse": [70, 70.1, 69.9, 70.2, 12], "l1": around(69, n=5)}
    assert texts(results(collapsed, search="staged"), "outlier") == [
        "1 outlying repeat is among the 5 of `mse`: search 5, seed 4 (12.00 %). The median is "
        "70.00 %, the mean 58.44 %. Its pairs are decided only where all repeats agree on which "
        "loss is ahead."
    ]
    assert "`mse`: seed 4 (12.00 %)." in texts(results(collapsed), "outlier")[0]
    collapsed["mse"] = [70, 70.1, 12, *[69.9, 70.2, 70] * 2, 14]
    assert texts(results(collapsed), "outlier")[0].startswith(
        "2 outlying repeats are among the 10 of `mse`: seed 2 (12.00 %) and seed 9 (14.00 %). "
    )


@pytest.mark.parametrize(
    ("accuracies", "text", "flag"),
    [
        ({"a": [70, 71, 72], "b": [60, 61, 62]}, "Each loss has only 3 tested repeats", 5),
        ({"a": [70.0], "b": [60.0]}, "Each loss has only 1 tested repeat", 5),
        ({"a": around(70, n=5), "b": [60, 61, 62, NAN, NAN]}, "`b` has only 3 tested repeats", 10),
        ({"a": [70, 71, 72], "b": [60, 61, NAN]}, "Each loss has at most 3 tested repeats", 5),
        ({"a": around(70, n=4), "b": around(60, n=4)}, None, None),
    ],
)
def test_few_repeats(
    accuracies: dict[str, list[float]], text: str | None, flag: int | None
) -> None:
    expected = [f"{text}: each one alone can change the result."] if text else []
    for search, name in (("random", "repeats"), ("staged", "searches")):
        made = results(accuracies, search=search)
        assert texts(made, "few repeats") == expected
        assert commands(made, "few repeats") == (
            [f"{CONTINUED} --{name} {flag} --retest"] if text else []
        )


def test_a_test_split_that_was_looked_at_twice() -> None:
    assert texts(results(TWO, test_rounds=2), "retest") == [
        "The test split was looked at in 2 rounds: what was added or changed in between may have "
        "been chosen by it."
    ]


def test_test_images_that_served_the_search() -> None:
    assert texts(results(TWO, given_test=False), "shared images") == [
        "There is no given test split: each repeat draws its own, and part of its test images "
        "served the search that chose its configuration. So its accuracy may be too high."
    ]
    assert texts(results(TWO, given_test=None), "shared images") == []


# Searches


def test_too_few_complete_trials() -> None:
    made = results(TWO)
    made.trials.loc[(made.trials["loss"] == "l1") & (made.trials["trial"] < 4), "outcome"] = (
        "failed"
    )
    assert texts(made, "few trials") == []
    made.trials.loc[(made.trials["loss"] == "l1") & (made.trials["trial"] < 6), "outcome"] = (
        "failed"
    )
    assert texts(made, "few trials") == [
        "`l1` has 6 complete trials of 12: a best configuration may be a lucky one, or not among "
        "them."
    ]
    assert commands(made, "few trials") == [f"{ANEW} --trials 16"]


def test_short_searches() -> None:
    made = results(TWO, search="staged", trials=7)
    assert texts(made, "few trials") == [
        "A search has only 7 trials: a longer one may change the order."
    ]
    assert commands(made, "few trials") == [f"{CONTINUED} --trials 11 --retest"]
    assert texts(results(TWO, search="staged", trials=8), "few trials") == []


def test_a_loss_that_diverged_in_most_trials() -> None:
    made = results(TWO)
    made.trials.loc[(made.trials["loss"] == "l1") & (made.trials["trial"] < 6), "outcome"] = (
        "diverged"
    )
    assert texts(made, "diverged") == []
    made.trials.loc[(made.trials["loss"] == "l1") & (made.trials["trial"] < 7), "outcome"] = (
        "diverged"
    )
    assert texts(made, "diverged") == [
        "Most trials diverged, of `l1` in 7 of 12: most of the learning rates are too high there."
    ]


def test_batch_sizes_are_compared_at_equal_epochs() -> None:
    made = results(TWO, batch_sizes=[32, 64, 128])
    assert [(caveat.kind, caveat.loss) for caveat in caveats(made, "steps")] == [("steps", None)]
    assert "at equal epochs" in texts(made, "steps")[0]


# Epochs


def curved(made: Results, early: Callable[[pd.Series], float]) -> Results:
    """Return them with these accuracies two epochs before the end."""
    made = with_curves(made)
    repeats = made.repeats.set_index(["loss", "trial"])
    is_early = made.curves["epoch"] == 6
    made.curves.loc[is_early, "val_accuracy"] = [
        early(repeats.loc[(row["loss"], row["trial"])].rename(row["loss"]))
        for row in made.curves[is_early].to_dict("records")
    ]
    return made


def late(of_mse: float) -> Callable[[pd.Series], float]:
    """Return what repeats have early, if mse gains so much, and l1 0.2 points."""

    def early(repeat: pd.Series) -> float:
        gain = of_mse if repeat.name == "mse" else 0.002
        return float(
            repeat["val_accuracy"] - gain + 0.0001 * ((2 * repeat["seed"] + (gain > 0.002)) % 3 - 1)
        )

    return early


@pytest.mark.parametrize(
    ("search", "command"), [("random", f"{ANEW} --epochs 16"), ("staged", f"{ANEW} --epochs 16")]
)
def test_an_order_that_still_changes(search: str, command: str) -> None:
    made = curved(results(TWO, search=search), late(0.018))
    assert texts(made, "epochs") == [
        "The order still changes: in validation `mse` was 0.60 points behind `l1` after 6 epochs, "
        "and is 1.00 ahead after 8.",
        "`mse` gained 1.80 points of validation accuracy in the last 2 of 8 epochs: longer "
        "training may change the order.",
    ]
    assert commands(made, "epochs") == [command] * 2


def test_an_order_that_changes_by_luck_is_no_warning() -> None:
    rng = np.random.default_rng(0)
    warned = changed = 0
    for _ in range(15):
        made = results({loss: list(rng.normal(70, 0.3, 5).round(2)) for loss in "abc"})
        made = curved(made, lambda at: float(at["val_accuracy"] + rng.normal(0, 0.004)))
        of_repeats = made.curves.query("stage == 'confirm'")
        means = of_repeats.groupby(["epoch", "loss"])["val_accuracy"].mean()
        changed += list(means[6].sort_values().index) != list(means[8].sort_values().index)
        warned += any("order still" in text for text in texts(made, "epochs"))
    assert changed >= 6
    assert warned <= 1  # 5 % may be


def test_a_lead_that_grows_is_no_change_of_order() -> None:
    assert texts(curved(results(TWO), late(0.008)), "epochs") == []


def test_one_epoch_has_no_order_to_settle() -> None:
    made = results(TWO, epochs=1)
    assert texts(made, "epochs") == ["One epoch doesn't show whether the order of losses is final."]
    assert commands(made, "epochs") == [f"{ANEW} --epochs 2"]


# Order, and advice


def test_what_matters_most_comes_first() -> None:
    collapsed = {"mse": [70, 70.1, 69.9, 70.2, 12], "l1": [60, 61, 62, NAN, NAN]}
    made = results(
        collapsed,
        search="staged",
        batch_sizes=[32, 64],
        epochs=1,
        given_test=False,
        test_rounds=2,
        trials=5,
    )
    repeats = made.repeats.assign(learning_rate=0.3)
    trials = made.trials.assign(outcome="diverged")
    found = [each.kind for each in assess(replace(made, repeats=repeats, trials=trials)).warnings]
    assert found == list(KINDS)


def test_the_list_of_caveats_has_whole_commands() -> None:
    made = results(TWO, epochs=1, batch_sizes=[32, 64, 128])
    assert assess(made).caveat_list == (
        "\n- One epoch doesn't show whether the order of losses is final. Try: "
        f"`{ANEW} --epochs 2`"
        f"\n- {texts(made, 'steps')[0]}"
    )


@pytest.mark.parametrize(
    ("recorded", "expected"),
    [
        ("--epochs 4 --out 'my reports'", "--out 'my reports' --study made-2 --epochs 2"),
        ("--epochs=4 --out=x", "--out=x --study made-2 --epochs 2"),
        ("--study made --retest --seed 3", "--seed 3 --study made-2 --epochs 2"),
    ],
)
def test_advice_replaces_flags(recorded: str, expected: str) -> None:
    start = "python -m experiments.compare"
    made = results(TWO, epochs=1, command=f"{start} {recorded}")
    assert commands(made, "epochs") == [f"{start} {expected}"]


def test_advice_follows_the_last_command() -> None:
    start = "python -m experiments.compare"
    several = f"{start} --losses mse --out 'a; b'; {start} --losses l1 --retest --out 'a; b'"
    short = {"mse": [70, 71, 72], "l1": [60, 61, 62]}
    made = results(short, search="staged", command=several)
    assert commands(made, "few repeats") == [
        f"{start} --losses l1 --out 'a; b' --study made --searches 5 --retest"
    ]
    made = results(short, search="staged", command=several, epochs=1)
    assert commands(made, "epochs") == [
        f"{start} --out 'a; b' --study made-2 --losses mse l1 --searches 3 --trials 11 --epochs 2"
    ]
    made = results(short, command=several, epochs=1)
    assert commands(made, "epochs") == [
        f"{start} --out 'a; b' --study made-2 --losses mse l1 --repeats 3 --epochs 2"
    ]


def test_before_the_test_split_was_looked_at_there_is_no_retest() -> None:
    made = results({"mse": [70, 71, 72]}, test_rounds=0)
    assert commands(made, "few repeats") == [f"{CONTINUED} --repeats 5"]


def test_without_a_recorded_command_there_is_no_advice() -> None:
    for command in ("", "python my_script.py"):
        made = results(TWO, epochs=1, command=command)
        assert commands(made, "epochs") == [""]


def test_all_advice_can_be_parsed() -> None:
    """Each command here is one that the command line takes."""
    short = {"mse": [70, 71, 72], "l1": [60, 61, 62]}
    found = []
    for search in ("random", "staged"):
        made = results(short, search=search, epochs=1, trials=5, batch_sizes=[32, 64])
        for rate in (0.001, 0.3, 1.0):
            edged = replace(made, repeats=made.repeats.assign(learning_rate=rate, batch_size=64))
            found += [each.command for each in assess(edged).warnings if each.command]
    assert len(set(found)) >= 7
    for command in found:
        assert command.startswith(COMMAND)
        assert build_parser().parse_args(command.split()[3:]).study in ("made", "made-2")


def test_names_of_further_studies() -> None:
    assert [next_name(name) for name in ("x", "x-2", "x-9", "x-y", "x-01234")] == [
        *("x-2", "x-3", "x-10", "x-y-2", "x-01234-2")
    ]
