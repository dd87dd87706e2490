"""What is said of a comparison: the words, and that they say no more than the numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from made_results import around, results, with_hits

from experiments.comparison.assessment import assess
from experiments.comparison.results import REPEAT_COLUMNS, TRIAL_COLUMNS, Results
from experiments.comparison.wording import no_more_than, points

NAN = math.nan
TWO = {"mse": around(70), "l1": around(69, offset=3)}
METHOD = (
    "Better means p ≤ 0.05 in the t-test of paired repeats{}, and a difference of at least {} "
    "points."
)
BEYOND = (
    " p is that of a difference of more than 0.1 points: by so much, a search may favour a loss."
)
HOLM = ", corrected by Holm's method for {} pairs of losses"
ALONE = "Each interval is for one loss or one pair alone."
MAY_FAIL = (
    "After 10 repeats without a failure, up to 26 % of all repeats may diverge, fail or collapse "
    "(95 % limit)."
)
STAGED = (
    "A repeat is a whole search of 11 trials and a training of what it chose. The statements are "
    "about losses that are tuned so, not about the best that a loss can reach."
)
FIXED = (
    "A repeat is a new training of one configuration of each loss. The statements are about these "
    "configurations."
)
ANOTHER = (
    "Another search may end at other configurations, so this does not say which loss is better."
)


def staged(accuracies: dict[str, list[float]], **options: Any) -> Results:
    return results(accuracies, search="staged", **options)


def first_of(made: Results) -> str:
    return assess(made).statements[0]


def starting(made: Results, start: str) -> str:
    """Return the statement that starts so."""
    (found,) = [text for text in assess(made).statements if text.startswith(start)]
    return found


# The answer


def test_a_clear_winner_of_several() -> None:
    made = staged(
        {
            "mse": around(69.5, offset=3),
            "cross_entropy": around(70.1),
            "l1": around(40, spread=2, offset=5),
        }
    )
    assert list(assess(with_hits(made, own=0.2)).statements) == [
        "With 11 trials to tune each loss, `cross_entropy` is the best of 3 losses: trained anew "
        "and shown these 10,000 test images, it gets 70.10 % right (95 % interval 70.06 to "
        "70.14 %, n = 10).",
        "This holds for other images as well: it gets 69.41 to 70.79 % right, and its lead over "
        "`mse` is 0.36 to 0.84 points and over `l1` 29.13 to 31.07 (95 % intervals over new "
        "trainings and new images).",
        "On the test images its lead over `mse` is 0.60 points (95 % interval 0.53 to 0.67, "
        "p < 0.001) and over `l1` 30.10 (29.21 to 30.99, p < 0.001).",
        "Of the other pairs: `mse` is better than `l1`.",
        METHOD.format(HOLM.format(3), 0.2) + BEYOND,
        ALONE,
        MAY_FAIL,
        STAGED,
    ]


def test_a_clear_winner_of_two_configurations() -> None:
    made = with_hits(results(TWO), own=0.2)
    assert list(assess(made).statements) == [
        "At the configurations that one search found, `mse` is better than `l1`: trained anew and "
        "shown these 10,000 test images, it gets 70.00 % right (95 % interval 69.96 to 70.04 %, "
        "n = 10).",
        "This holds for other images as well: it gets 69.31 to 70.69 % right, and its lead over "
        "`l1` is 0.76 to 1.24 points (95 % intervals over new trainings and new images). "
        f"{ANOTHER}",
        "The configuration to use: `mse` with learning rate 0.03 and batch size 64. Trained anew, "
        "it gets 70.00 % of the test images right (95 % interval 69.96 to 70.04 %, n = 10).",
        "On the test images its lead over `l1` is 1.00 points (95 % interval 0.93 to 1.07, "
        "p < 0.001).",
        METHOD.format("", 0.2),
        ALONE,
        MAY_FAIL,
        FIXED,
    ]


def test_a_tie_with_one_and_a_lead_over_another() -> None:
    made = staged(
        {
            "cross_entropy": around(70.1, spread=1),
            "mse": around(69.9, spread=1, offset=3),
            "l1": around(40, offset=5),
        }
    )
    assert first_of(made) == (
        "With 11 trials to tune each loss, `cross_entropy` has the highest validation accuracy, "
        "can't be told apart from `mse`, and is better than `l1`: trained anew and shown these "
        "10,000 test images, it gets 70.10 % right (95 % interval 69.67 to 70.53 %, n = 10)."
    )
    assert starting(made, "It may take") == (
        "It may take as many as 79 repeats to show a difference of 0.5 points from `mse` with a "
        "chance of 80 %."
    )


def test_a_tie_of_all() -> None:
    made = staged(
        {
            "cross_entropy": around(70.1, spread=1),
            "mse": around(70, spread=1, offset=3),
            "squentropy": around(69.9, spread=1, offset=5),
            "poly1": around(69.95, spread=1, offset=7),
        }
    )
    made = with_hits(made)
    first, second, *_ = assess(made).statements
    assert (
        "highest validation accuracy, but can't be told apart from `mse`, `poly1` or `squentropy`: "
        in first
    )
    assert second.startswith("For other images, nothing is decided either: it gets ")


def test_another_is_better_than_the_winner_of_validation() -> None:
    made = results(
        {"l1": [60, 61, 60], "mse": [70, 70, 72]},
        validation={"l1": [70, 70, 70], "mse": [60, 60, 60]},
    )
    assert (
        "`l1` has the highest validation accuracy, but is worse than `mse`: trained anew"
        in first_of(made)
    )
    assert starting(made, "On the test images") == (
        "On the test images its lead over `mse` is −10.33 points (95 % interval −14.13 to −6.54, "
        "p = 0.0072)."
    )


def test_small_differences_are_said_to_be_small() -> None:
    made = staged(
        {
            "a": around(70.18, spread=0.05),
            "b": around(70, spread=0.05, offset=3),
            "c": around(70.17, spread=0.1, offset=5),
        }
    )
    assert (
        "highest validation accuracy, differs from `c` by no more than 0.09 points, and is "
        "slightly better than `b` (by no more than 0.23 points): " in first_of(made)
    )
    assert starting(made, "Of the other pairs") == (
        "Of the other pairs: `c` is slightly better than `b` (by no more than 0.24 points)."
    )
    assert "at least 0.2 points. p is that of a difference of more than 0.1 points: " in starting(
        made, "Better means"
    )


def test_the_least_difference_that_matters_is_said() -> None:
    made = staged(TWO, min_effect=0.0035)
    assert starting(made, "Better means") == METHOD.format("", 0.35) + BEYOND


def test_bounds_are_rounded_up() -> None:
    assert no_more_than({"bound_low": -0.00101, "bound_high": 0.0}) == "no more than 0.11 points"
    assert no_more_than({"bound_low": 0.0, "bound_high": 0.001}) == "no more than 0.10 points"


def test_all_decided_pairs_are_named_together() -> None:
    made = staged(
        {
            "a": around(72, spread=3),
            "b": around(71.9, spread=3, offset=3),
            "c": around(60, offset=5),
            "d": around(50, offset=7),
            "e": around(50, spread=3, offset=1),
        }
    )
    assert starting(made, "Of the other pairs") == (
        "Of the other pairs: `b` is better than `c`, `d` and `e`; `c` is better than `d` and `e`."
    )
    made = staged(
        {
            "a": around(72, spread=3),
            "b": around(71.9, spread=3, offset=3),
            "b2": around(71.8, spread=3, offset=7),
            "c": around(60, offset=5),
        }
    )
    assert starting(made, "Of the other pairs") == (
        "Of the other pairs: `b` and `b2` are better than `c`."
    )


def test_other_equal_pairs_are_named() -> None:
    made = staged({"a": around(72), "b": around(70), "c": around(70, offset=3)})
    assert starting(made, "Of the other pairs") == (
        "Of the other pairs: `b` and `c` differ by no more than 0.09 points."
    )


# Other images


def test_a_lead_that_may_not_hold_for_other_images() -> None:
    made = with_hits(staged({"mse": around(70), "l1": around(69.5, offset=3)}))
    assert assess(made).statements[1].startswith("For other images, this is not decided: it gets ")


def test_a_lead_of_which_a_part_may_not_hold_for_other_images() -> None:
    made = with_hits(
        staged({"mse": around(70), "l1": around(69.5, offset=3), "l2": around(50, offset=5)})
    )
    assert (
        assess(made)
        .statements[1]
        .startswith("This holds for other images as well, but not for `l1`: it gets ")
    )


def test_other_images_of_which_nothing_is_known() -> None:
    assert assess(staged(TWO)).statements[1] == (
        "Whether this holds for other images is not known: the images that each model got right "
        "are not recorded."
    )


def test_the_smallest_leads_of_many() -> None:
    made = with_hits(staged({f"l{i}": around(70 - 3 * i, offset=i) for i in range(6)}), own=0.2)
    second = assess(made).statements[1]
    assert "its smallest leads are over `l1` " in second
    assert "over `l3`" in second
    assert "over `l4`" not in second


def test_an_interval_that_says_more_than_the_corrected_verdict_is_explained() -> None:
    leads = [0.5, 0.8, 0.8, 1.05, 1.65]
    of_first = [70.0, 69.6, 70.2, 69.9, 70.3]
    behind = [first - lead for first, lead in zip(of_first, leads, strict=True)]
    others = {f"l{i}": around(69.5, offset=i) for i in range(4)}
    alone = staged({"mse": of_first, "l1": behind})
    several = staged({"mse": of_first, "l1": behind, **others})
    correction = "not corrected for several pairs as the verdict is"
    for made, is_explained in ((alone, False), (several, True)):
        assessment = assess(with_hits(made, own=0.02))
        (pair,) = assessment.differences.query("loss == 'l1'").to_dict("records")
        assert pair["images_low"] > 0
        assert (pair["images_verdict"] == "undecided") == is_explained
        assert (correction in assessment.statements[1]) == is_explained


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (True, "shown these 10,000 test images"),
        (None, "shown these 10,000 test images"),
        (False, "shown 10,000 test images of a new split"),
    ],
)
def test_the_images_of_a_repeat_are_named(given: bool | None, shown: str) -> None:
    made = results(TWO, given_test=given)
    assert f"trained anew and {shown}, it gets 70.00 % right" in first_of(made)
    last = assess(made).statements[-1]
    assert last.endswith("draws its own test images from the same data.") == (given is False)


# Failures


def test_failures_are_said_before_anything_else() -> None:
    made = staged(
        {
            "cross_entropy": around(70),
            "l1": [NAN] * 10,
            "mse": [69, NAN, 69.1, NAN, 69.3, 69.2, 69, 69, 69, 69.14],
        }
    )
    failed = made.repeats["seed"] == 3
    made.repeats.loc[failed, "outcome"] = "failed"
    made.repeats.loc[failed, ["test_accuracy", "val_accuracy"]] = NAN
    assert first_of(made).startswith(
        "`cross_entropy` failed in 1 of 10 repeats, `mse` diverged in 1 and failed in 1 of 10 "
        "repeats and `l1` diverged in 9 and failed in 1 of 10 repeats. With 11 trials to tune each "
        "loss, `cross_entropy` has the highest validation accuracy and is ahead of `mse` in the "
        "repeats that both completed, but not always completes: trained anew"
    )
    assert starting(made, "Only complete") == (
        "Only complete repeats are measured: 9 of 10 of `cross_entropy` and 8 of 10 of `mse`."
    )
    assert "10 repeats without a failure" not in " ".join(assess(made).statements)
    assert "(95 % interval 0.80 to 1.00, p < 0.001, n = 8)." in starting(made, "On the test images")


def test_a_loss_that_fails_is_not_said_to_be_better() -> None:
    made = results({"mse": [70, 70.1, 70.2, 70, 70.1], "cross_entropy": [72, 72, 72.1, 72.2, NAN]})
    first = first_of(made)
    assert first.startswith("`cross_entropy` diverged in 1 of 5 repeats. At the configurations ")
    assert (
        "`mse` has the highest validation accuracy, but is behind `cross_entropy` in the repeats "
        "that both completed: " in first
    )
    assert "better" not in first


def test_a_loss_that_fails_may_be_worse() -> None:
    made = results({"mse": around(70), "l1": [*around(69, n=9, offset=3), NAN]})
    assert first_of(made).startswith(
        "`l1` diverged in 1 of 10 repeats. At the configurations that one search found, `mse` is "
        "better than `l1`: "
    )


def test_too_few_seeds_in_common() -> None:
    made = results(
        {"mse": [70, 70.2, NAN, NAN], "l1": [NAN, 69, 69, 69.1], "focal": [50, 50.1, 50.3, 50]}
    )
    assert starting(made, "`mse` shares") == (
        "`mse` shares fewer than two seeds with the winner: there is no test."
    )
    assert "`l1` has the highest validation accuracy" in first_of(made)


def test_no_loss_completed_anything() -> None:
    assert list(assess(results({"mse": [NAN] * 3, "l1": [NAN] * 3})).statements[:2]) == [
        "`mse` diverged in 3 of 3 repeats and `l1` diverged in 3 of 3 repeats. No loss has a "
        "complete repeat.",
        "The results don't say which loss is better.",
    ]


# Too little


def test_one_repeat() -> None:
    assert list(assess(results({"cross_entropy": [70.0], "mse": [69.0]})).statements[:2]) == [
        "At the configurations that one search found, `cross_entropy` has the highest validation "
        "accuracy: shown 10,000 test images, it gets 70.00 % right in its one repeat.",
        "The results don't say which loss is better: this needs two repeats of each with the same "
        "seeds.",
    ]


def test_one_loss() -> None:
    made = with_hits(staged({"mse": [69.0, 70.0]}))
    assert list(assess(made).statements[:2]) == [
        "With 11 trials to tune it, trained anew and shown these 10,000 test images, `mse` gets "
        "69.50 % right (95 % interval 63.15 to 75.85 %, n = 2).",
        "On other images it gets 63.15 to 75.85 % right (95 % interval). There is no other loss to "
        "compare it with.",
    ]
    assert list(assess(results({"mse": [69.0]})).statements[:2]) == [
        "At the configuration that one search found, shown 10,000 test images, `mse` gets 69.00 % "
        "right in its one repeat.",
        "There is no other loss to compare it with.",
    ]


def test_before_the_test_split_is_looked_at() -> None:
    made = results(TWO)
    made.repeats.loc[:, "test_accuracy"] = NAN
    assessment = assess(made)
    assert assessment.winner == "mse"
    assert list(assessment.statements[:2]) == [
        "`mse` has the highest validation accuracy, 70.00 %.",
        "The results don't say which loss is better: no model has seen the test split yet.",
    ]


@pytest.mark.parametrize("search", ["random", "staged"])
def test_before_anything_is_over(search: str) -> None:
    made = results(TWO, search=search, batch_sizes=[32, 64])
    made = replace(
        made,
        trials=pd.DataFrame(columns=list(TRIAL_COLUMNS)),
        repeats=pd.DataFrame(columns=list(REPEAT_COLUMNS)),
    )
    assessment = assess(made)
    assert assessment.winner is None
    assert assessment.to_use is None
    assert assessment.pairs.empty
    assert assessment.differences.empty
    assert list(assessment.statements) == [
        "No loss has a complete repeat.",
        "The results don't say which loss is better.",
        "`mse` has no repeat.",
        "`l1` has no repeat.",
    ]


def test_without_spread_there_is_no_test() -> None:
    made = results({"mse": [70.0] * 5, "l1": [69.0] * 5, "l2": [70.0] * 5})
    statements = assess(made).statements
    assert (
        "but is equal to `l2` and 1.00 points ahead of `l1` in each repeat: trained anew and shown "
        "these 10,000 test images, it gets 70.00 % right in each of its 5 repeats." in statements[0]
    )
    assert statements[1] == f"Without a spread of the differences there is no test. {ANOTHER}"
    assert starting(made, "On the test images") == (
        "On the test images its lead over `l2` is 0.00 points (the same in each repeat) and over "
        "`l1` 1.00 (the same in each repeat)."
    )
    assert "p = " not in " ".join(statements)


def test_with_a_wide_spread_no_number_of_repeats_is_promised() -> None:
    made = results({"mse": around(70.1, spread=30), "l1": around(69.9, spread=30, offset=3)})
    assert "as many as 10,000 or more repeats" in starting(made, "It may take")


def test_an_interval_of_many_losses_is_said_to_cover_less() -> None:
    def method(losses: int) -> str:
        return starting(
            staged({f"l{i}": around(70, offset=i) for i in range(losses)}), "Each interval"
        )

    assert method(3) == ALONE
    assert method(6) == (
        f"{ALONE} The winner's own covers less, because its luck chose it: about 90 %, if all 6 "
        "losses are equally good."
    )


# Open ranges


def with_best_rates(made: Results, loss: str, rates: list[float]) -> Results:
    """Return them with these learning rates chosen by a loss' searches."""
    repeats = made.repeats.copy()
    repeats.loc[repeats["loss"] == loss, "learning_rate"] = rates
    return replace(made, repeats=repeats)


def test_an_open_range_is_said_in_the_first_sentence() -> None:
    made = staged({"mse": around(70, n=4), "l1": around(69, n=4, offset=3)})
    made = with_best_rates(made, "mse", [0.3, 0.3, 0.03, 0.003])
    assert first_of(made).endswith(
        "n = 4), but the range of learning rates of `mse` is still open at its upper end in 2 of 4 "
        "searches."
    )
    assert "open" not in first_of(with_best_rates(made, "mse", [0.3, 0.03, 0.03, 0.003]))


def test_an_open_range_of_one_search_is_said_in_the_first_sentence() -> None:
    made = results(TWO)
    made = replace(made, repeats=made.repeats.assign(learning_rate=0.9))
    assert first_of(made).endswith(
        ", but the range of learning rates of `mse` is still open at its upper end and the range "
        "of learning rates of `l1` is still open at its upper end."
    )


def test_many_open_ranges_are_listed() -> None:
    made = results({"a": around(72), "b": around(71), "c": around(70)})
    made = replace(made, repeats=made.repeats.assign(learning_rate=0.9))
    assert first_of(made).endswith(", but the ranges of `a`, `b` and `c` are still open.")


# What to use


def test_the_configuration_to_use_is_said() -> None:
    rows = results({"mse": [73, 74, NAN]}).repeats.assign(learning_rate=0.2, batch_size=128)
    made = replace(staged(TWO), confirmed=rows)
    assert starting(made, "The configuration to use") == (
        "The configuration to use: `mse` with learning rate 0.2 and batch size 128. Of 3 trainings "
        "on fresh seeds, 1 diverged. Trained anew, it gets 73.50 % of the test images right (95 % "
        "interval 67.15 to 79.85 %, n = 2)."
    )
    made = replace(staged(TWO), confirmed=rows[:1])
    assert starting(made, "The configuration to use").endswith(
        "Trained anew, it gets 73.00 % of the test images right (n = 1)."
    )
    made = replace(staged(TWO), confirmed=rows[2:])
    assert starting(made, "The configuration to use").endswith("on fresh seeds, 1 diverged.")


# Words and verdicts


def test_points_have_no_negative_zero() -> None:
    assert [points(share) for share in (0.00534, -0.00534, -0.00001, 0)] == [
        *("0.53", "−0.53", "0.00", "0.00")
    ]


def test_words_agree_with_the_verdicts() -> None:
    rng = np.random.default_rng(0)
    firsts = set()
    for number in range(20):
        n = 2 + number % 12
        made = staged(
            {
                loss: list((mean + rng.normal(0, 0.4, n)).round(2))
                for loss, mean in {"a": 70.5, "b": 70, "c": 70 - number % 3}.items()
            }
        )
        assessment = assess(made)
        first, differences = assessment.statements[0], assessment.differences
        verdicts = set(differences["verdict"])
        is_best, is_tie = "is the best of 3" in first, "can't be told apart" in first
        assert is_best == (verdicts == {"worse"})
        assert is_tie == ("undecided" in verdicts)
        for verdict, words in (("undecided", "can't be told apart from"), ("better", "is worse")):
            for loss in differences.loc[differences["verdict"] == verdict, "loss"]:
                assert f"`{loss}`" in first.split(words)[1]
        firsts.add((is_best, is_tie))
    assert len(firsts) == 2
