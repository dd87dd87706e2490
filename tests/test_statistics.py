"""What is said of a comparison: hand-checked numbers, the words, and how often they are true."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from benchmarks.planted import TRUTH, World, study, told_apart
from experiments.comparison.assessment import Assessment, assess
from experiments.comparison.results import CURVE_COLUMNS, REPEAT_COLUMNS, TRIAL_COLUMNS, Results
from experiments.comparison.statements import points
from experiments.comparison.tables import interval, pairwise_tests, repeats_needed

NAN = math.nan


@pytest.fixture(autouse=True, scope="module")
def little_garbage() -> Iterator[None]:
    """Keep what is there from being looked at: statsmodels collects garbage in each correction."""
    gc.freeze()
    yield
    gc.unfreeze()


# Additional hours of sleep of ten patients under two drugs (Student 1908; R's data set `sleep`).
SLEEP = pd.DataFrame(
    {
        "second": [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4],
        "first": [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0],
    }
)


def results(accuracies: dict[str, list[float]], **plan: Any) -> Results:
    """Return a comparison with test accuracies in percent; those of validation are the same.

    NaN: the repeat diverged, at 10 %.
    """
    test = np.array(list(accuracies.values())).T / 100
    made = study(np.where(np.isnan(test), 0.1, test), test, list(accuracies))
    return replace(made, plan={**made.plan, **plan})


def around(mean: float, *, spread: float = 0.1, n: int = 10, offset: int = 0) -> list[float]:
    """Return n accuracies in percent of exactly this mean, in an order that the offset changes."""
    steps = [spread * (2 * i - n + 1) / n for i in range(n)]
    return [mean + steps[(i * 3 + offset) % n] for i in range(n)]


def shuffled(made: Results, seed: int) -> Results:
    tables = {name: getattr(made, name) for name in ("trials", "repeats", "curves")}
    return replace(
        made,
        **{name: table.sample(frac=1, random_state=seed) for name, table in tables.items()},
    )


def kinds(made: Results) -> list[tuple[str, str | None]]:
    return [(caveat.kind, caveat.loss) for caveat in assess(made).warnings]


def texts(made: Results, kind: str) -> list[str]:
    return [caveat.text for caveat in assess(made).warnings if caveat.kind == kind]


# Numbers


def test_paired_differences_are_those_of_r() -> None:
    (pair,) = pairwise_tests(SLEEP / 100).to_dict("records")
    assert (pair["first"], pair["loss"], pair["n"]) == ("second", "first", 10)
    assert pair["difference"] == pytest.approx(0.0158)
    assert pair["sd"] == pytest.approx(0.01229995)
    assert (pair["low"], pair["high"]) == pytest.approx((0.007001142, 0.024598858))
    assert pair["p"] == pair["p_holm"] == pytest.approx(0.00283289, rel=1e-5)
    assert pair["verdict"] == "worse"
    assert (pair["ahead"], pair["ties"], pair["probability"]) == (9, 1, 0.95)
    # R: binom.test(9, 10)$conf.int[1]; with the tie as won, 10 of 10, it ends at 1.
    assert (pair["probability_low"], pair["probability_high"]) == pytest.approx((0.5549839, 1))


def test_repeats_needed_are_those_of_r() -> None:
    # R: power.t.test(delta = 0.5, sd = 1, power = 0.8, type = "paired")$n is 33.36713
    assert repeats_needed(0.01, 0.05) == 34
    # ... of 80 % with sig.level = 0.05 / 15: 61.85938
    assert repeats_needed(0.01, 0.05 / 15) == 62
    assert repeats_needed(1.0, 0.05) == 10_000
    assert repeats_needed(1e-9, 0.05) == 2
    assert math.isnan(repeats_needed(0.0, 0.05))
    assert math.isnan(repeats_needed(NAN, 0.05))


def test_the_spread_of_repeats_needed_is_that_of_the_standard_deviation() -> None:
    (pair,) = pairwise_tests(SLEEP / 100).to_dict("records")
    # χ²(9) has 2.700389 and 19.022768 as its 2.5 and 97.5 % points.
    assert pair["repeats_needed"] == repeats_needed(pair["sd"], 0.05)
    assert pair["repeats_needed_low"] == repeats_needed(pair["sd"] * (9 / 19.022768) ** 0.5, 0.05)
    assert pair["repeats_needed_high"] == repeats_needed(pair["sd"] * (9 / 2.700389) ** 0.5, 0.05)


def test_p_values_are_corrected_step_by_step_over_all_pairs() -> None:
    accuracy = pd.DataFrame(np.random.default_rng(0).normal([0.72, 0.71, 0.7, 0.7], 0.01, (8, 4)))
    pairs = pairwise_tests(accuracy)
    assert len(pairs) == 6
    expected, least = {}, 0.0
    for rank, (index, p) in enumerate(pairs["p"].sort_values().items()):
        least = expected[index] = max(least, min(1.0, p * (6 - rank)))
    assert pairs["p_holm"].to_dict() == pytest.approx(expected)
    assert (pairs["p_holm"] <= 0.05).any()
    assert ((pairs["p"] <= 0.05) & (pairs["p_holm"] > 0.05)).any()


def test_a_loss_has_mean_spread_and_interval_of_each_measure() -> None:
    made = results({"mse": [70, 71, 72, 73, 74], "l1": [40, 40, 40, 40, 40]})
    made.repeats.loc[made.repeats["loss"] == "mse", "test_nll"] = [0.9, 1.0, 1.1, 1.2, 1.3]
    mse, l1 = assess(made).table.to_dict("records")
    # R: t.test(70:74)$conf.int is 70.03676 73.96324, sd(70:74) 1.581139
    assert (mse["loss"], mse["n"], mse["accuracy_mean"]) == ("mse", 5, pytest.approx(0.72))
    assert mse["accuracy_sd"] == pytest.approx(0.01581139)
    assert (mse["accuracy_low"], mse["accuracy_high"]) == pytest.approx((0.7003676, 0.7396324))
    assert (mse["nll_mean"], mse["nll_low"]) == pytest.approx((1.1, 0.9036757))
    assert (l1["accuracy_mean"], l1["accuracy_sd"]) == pytest.approx((0.4, 0.0))
    assert math.isnan(l1["accuracy_low"])
    assert math.isnan(l1["accuracy_high"])


def test_an_interval_ends_where_the_measure_does() -> None:
    (row,) = assess(results({"mse": [99.9, 100, 100, 100, 99.5]})).table.to_dict("records")
    assert row["accuracy_high"] == 1.0
    assert row["accuracy_low"] < 0.999


def test_the_winner_is_chosen_by_validation_not_by_test() -> None:
    validation, test = np.array([[0.7, 0.6]] * 3), np.array([[0.6, 0.7], [0.61, 0.7], [0.6, 0.72]])
    assessment = assess(study(validation, test, ["mse", "l1"]))
    assert assessment.winner == "mse"
    assert list(assessment.table["loss"]) == ["mse", "l1"]
    assert assessment.differences["difference"].item() < 0


def test_a_loss_that_diverges_is_chosen_by_what_it_came_to() -> None:
    assessment = assess(results({"mse": [75, 75.1, NAN, 75], "l1": [70, 70.2, 70, 70.1]}))
    assert assessment.winner == "l1"
    made = results({"mse": [75, 75.1, NAN, 75], "l1": [70, 70.2, 70, 70.1]})
    made.repeats.loc[made.repeats["outcome"] == "diverged", "val_accuracy"] = NAN
    assert assess(made).table["val_accuracy"].tolist() == pytest.approx([0.70075, 0.56275])


def test_a_failed_repeat_says_nothing_of_its_loss() -> None:
    made = results({"mse": [75, 75.1, NAN, 75], "l1": [70, 70.2, 70, 70.1]})
    made.repeats.loc[made.repeats["outcome"] == "diverged", "outcome"] = "failed"
    assessment = assess(made)
    assert assessment.winner == "mse"
    assert assessment.table["failed"].tolist() == [1, 0]


def test_only_seeds_that_both_have_are_compared() -> None:
    made = results({"mse": [70, 71, NAN, 73, 74], "l1": [60, NAN, 61, 62, 63.5]})
    (pair,) = assess(made).pairs.to_dict("records")
    assert pair["n"] == 3
    assert pair["difference"] == pytest.approx(np.mean([10, 11, 10.5]) / 100)


def test_equal_differences_have_no_interval_and_decide_nothing() -> None:
    pairs = pairwise_tests(pd.DataFrame({"a": [0.7, 0.4, 0.8], "b": [0.6, 0.3, 0.7]}))
    assert 0.7 - 0.6 < 0.4 - 0.3  # as floating-point numbers
    (pair,) = pairs.to_dict("records")
    assert (pair["sd"], pair["p"], pair["verdict"]) == (0.0, 1.0, "undecided")
    assert math.isnan(pair["low"])
    assert math.isnan(pair["repeats_needed"])


# How often it is true


def shares_of_360(rng: np.random.Generator, size: tuple[int, ...]) -> Any:
    """Return accuracies on 360 test images, like those of scikit-learn's digits."""
    return rng.binomial(360, np.clip(rng.normal(0.985, 0.004, size), 0, 1)) / 360


POPULATIONS: dict[str, Callable[[np.random.Generator, tuple[int, ...]], Any]] = {
    "normal": lambda rng, size: rng.normal(size=size),
    "skewness −0.5": lambda rng, size: -rng.gamma(16, size=size),
    "shares of 360": shares_of_360,
    "difference of two shares of 360": lambda rng, size: (
        shares_of_360(rng, size) - shares_of_360(rng, size)
    ),
}


@pytest.mark.parametrize("n", [5, 10, 20])
@pytest.mark.parametrize("values", POPULATIONS)
def test_intervals_of_95_percent_cover_94_to_96(values: str, n: int) -> None:
    rng, draw = np.random.default_rng(n), POPULATIONS[values]
    mean, studies = draw(rng, (2_000_000,)).mean(), draw(rng, (10_000, n))
    low, high = interval(studies[np.ptp(studies, axis=1) > 1e-9])
    assert 0.94 <= ((low <= mean) & (mean <= high)).mean() <= 0.96


def test_the_table_has_these_intervals() -> None:
    validation, test = TRUTH.draw(np.random.default_rng(0), 7)
    assessment = assess(study(validation, test))
    for row in assessment.table.to_dict("records"):
        low, high = interval(test[:, list(TRUTH.means).index(row["loss"])])
        assert (row["accuracy_low"], row["accuracy_high"]) == pytest.approx((low, high))


@pytest.mark.parametrize("losses", [2, 3, 6])
@pytest.mark.parametrize("shared", [0.0, 0.5, 1.0])
def test_equal_losses_are_told_apart_in_at_most_5_percent(losses: int, shared: float) -> None:
    rng = np.random.default_rng(0)
    told, from_winner, _, _ = told_apart(rng, losses=losses, n=5, shared=shared, studies=10_000)
    assert from_winner <= told <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 10_000)


def test_to_correct_for_the_winners_pairs_only_would_not_do() -> None:
    rng = np.random.default_rng(0)
    _, right, wrong, _ = told_apart(rng, losses=6, n=10, shared=1.0, studies=10_000)
    assert right <= 0.05
    assert wrong >= 0.08


def test_told_apart_is_what_compare_says() -> None:
    rng = np.random.default_rng(6)
    world = World(means=dict.fromkeys("abc", 0.7), shared=0.5)
    verdicts = []
    for _ in range(60):
        _, test = world.draw(rng, 5)
        pairs = pairwise_tests(pd.DataFrame(test, columns=list("abc")))
        verdicts.append((pairs["verdict"] != "undecided").any())
        assert verdicts[-1] == (pairs["p"].min() * 3 <= 0.05)
    assert any(verdicts)


# Words


METHOD = "Better means p ≤ 0.05 in the t-test of paired repeats{}."
HOLM = ", corrected by Holm's method for {} pairs of losses"
ALONE = (
    "Each interval is for one loss or one pair alone. The winner's are too high if other losses "
    "are as good, because the same trainings chose it."
)
SCOPE = (
    "All repeats have the same 10,000 test images: the statements hold for new trainings, not for "
    "other images."
)


def said(made: Results) -> list[str]:
    """Return the statements, but for those of the method."""
    fixed = ("Better means", "Each interval", "All repeats have")
    return [text for text in assess(made).statements if not text.startswith(fixed)]


def test_a_clear_winner_of_several() -> None:
    made = results(
        {
            "mse": around(69.5, offset=3),
            "cross_entropy": around(70.1),
            "l1": around(40, spread=2, offset=5),
        }
    )
    assert list(assess(made).statements) == [
        "`cross_entropy` is the best of the 3 losses compared: it gets 70.10 % of the test "
        "images right (95 % interval 70.06 to 70.14 %, n = 10).",
        "Its lead over `mse` is 0.60 points (95 % interval 0.53 to 0.67, p < 0.001) and over `l1` "
        "30.10 (29.21 to 30.99, p < 0.001).",
        METHOD.format(HOLM.format(3)),
        ALONE,
        SCOPE,
    ]


def test_a_clear_winner_of_two() -> None:
    made = results({"cross_entropy": [70, 70.1], "mse": [69, 69.2]})
    assert list(assess(made).statements) == [
        "`cross_entropy` is better than `mse`: it gets 70.05 % of the test images right (95 % "
        "interval 69.41 to 70.69 %, n = 2).",
        "Its lead over `mse` is 0.95 points (95 % interval 0.31 to 1.59, p = 0.033).",
        METHOD.format(""),
        ALONE,
        SCOPE,
    ]


def test_a_tie_with_one_and_a_lead_over_another() -> None:
    made = results(
        {
            "cross_entropy": around(70.1, spread=1),
            "mse": around(69.9, spread=1, offset=3),
            "l1": around(40, offset=5),
        }
    )
    assert said(made) == [
        "`cross_entropy` has the highest validation accuracy and gets 70.10 % of the test "
        "images right (95 % interval 69.67 to 70.53 %, n = 10), but can't be told apart from "
        "`mse`.",
        "About 32 repeats (16 to 100, given the spread's 95 % interval) would show a difference "
        "of 0.5 points with a chance of 80 %.",
        "Its lead over `mse` is 0.20 points (95 % interval −0.49 to 0.89, p = 0.53) and over `l1` "
        "30.10 (29.64 to 30.56, p < 0.001).",
    ]


def test_a_tie_of_all() -> None:
    made = results(
        {
            "cross_entropy": around(70.1, spread=1),
            "mse": around(70, spread=1, offset=3),
            "squentropy": around(69.9, spread=1, offset=5),
            "poly1": around(69.95, spread=1, offset=7),
        }
    )
    first, second, *_ = assess(made).statements
    assert first.endswith("but can't be told apart from `mse`, `poly1` or `squentropy`.")
    assert second.startswith("About 58 repeats (29 to 183")


def test_another_is_better_than_the_winner_of_validation() -> None:
    validation = np.array([[0.7, 0.6]] * 3)
    test = np.array([[0.6, 0.7], [0.61, 0.7], [0.6, 0.72]])
    assert said(study(validation, test, ["l1", "mse"])) == [
        "`l1` has the highest validation accuracy and gets 60.33 % of the test images right "
        "(95 % interval 58.90 to 61.77 %, n = 3), but `mse` is better.",
        "Its lead over `mse` is −10.33 points (95 % interval −14.13 to −6.54, p = 0.0072).",
    ]


def test_one_repeat() -> None:
    assert list(assess(results({"cross_entropy": [70.0], "mse": [69.0]})).statements) == [
        "`cross_entropy` has the highest validation accuracy and gets 70.00 % of the test images "
        "right in its one repeat.",
        "The results don't say which loss is better: this needs two repeats of each with the same "
        "seeds.",
    ]


def test_one_loss() -> None:
    assert list(assess(results({"mse": [69.0, 70.0]})).statements) == [
        "`mse` gets 69.50 % of the test images right (95 % interval 63.15 to 75.85 %, n = 2).",
        "There is no other loss to compare it with.",
        SCOPE,
    ]
    assert list(assess(results({"mse": [69.0]})).statements) == [
        "`mse` gets 69.00 % of the test images right in its one repeat.",
        "There is no other loss to compare it with.",
    ]


def test_losses_that_diverged_in_all_or_some_repeats() -> None:
    made = results(
        {
            "cross_entropy": around(70),
            "l1": [NAN] * 10,
            "mse": [69, NAN, 69.1, NAN, 69.3, 69.2, 69, 69, 69, 69.14],
        }
    )
    made.repeats.loc[made.repeats["seed"] == 3, "outcome"] = "failed"
    made.repeats.loc[made.repeats["seed"] == 3, "test_accuracy"] = NAN
    assert said(made) == [
        "`cross_entropy` is better than `mse`: it gets 69.99 % of the test images right (95 % "
        "interval 69.95 to 70.03 %, n = 9).",
        "Its lead over `mse` is 0.90 points (95 % interval 0.80 to 1.00, p < 0.001, n = 8).",
        "Of 10 repeats of `cross_entropy`, 1 failed, and only the others were measured.",
        "Of 10 repeats of `mse`, 1 diverged and 1 failed, and only the others were measured: it is "
        "not as good as its mean says.",
        "`l1` completed none of 10 repeats (9 diverged, 1 failed).",
    ]


def test_a_loss_that_is_better_where_it_does_not_diverge() -> None:
    made = results({"mse": [70, 70.1, 70.2, 70, 70.1], "cross_entropy": [72, 72, 72.1, 72.2, NAN]})
    first, *_ = said(made)
    assert first.startswith("`mse` has the highest validation accuracy and gets 70.08 %")
    assert first.endswith(
        "but `cross_entropy` (in the 4 of 5 repeats that it completed) is better."
    )


def test_too_few_seeds_in_common() -> None:
    made = results(
        {"mse": [70, 70.2, NAN, NAN], "l1": [NAN, 69, 69, 69.1], "focal": [50, 50.1, 50.3, 50]}
    )
    assert "`mse` shares fewer than two seeds with it: there is no test." in said(made)
    assert said(made)[0].startswith("`l1` is better than `focal`:")


def test_no_loss_completed_anything() -> None:
    assert list(assess(results({"mse": [NAN] * 3, "l1": [NAN] * 3})).statements) == [
        "No loss has a complete repeat.",
        "The results don't say which loss is better.",
        "`mse` completed none of 3 repeats (3 diverged).",
        "`l1` completed none of 3 repeats (3 diverged).",
    ]


def test_before_the_test_split_is_looked_at() -> None:
    made = results({"mse": around(70), "l1": around(69)})
    made.repeats.loc[:, "test_accuracy"] = NAN
    assessment = assess(made)
    assert assessment.winner == "mse"
    assert list(assessment.statements) == [
        "`mse` has the highest validation accuracy, 70.00 %.",
        "The results don't say which loss is better: no model has seen the test split yet.",
    ]


def test_before_anything_is_over() -> None:
    made = results({"mse": around(70), "l1": around(69)}, batch_sizes=[32, 64])
    made = replace(
        made,
        trials=pd.DataFrame(columns=list(TRIAL_COLUMNS)),
        repeats=pd.DataFrame(columns=list(REPEAT_COLUMNS)),
    )
    assessment = assess(made)
    assert assessment.winner is None
    assert assessment.pairs.empty
    assert assessment.differences.empty
    assert list(assessment.statements)[1:] == [
        "The results don't say which loss is better.",
        "`mse` has no repeat.",
        "`l1` has no repeat.",
    ]


def test_without_spread_nothing_is_promised() -> None:
    assert said(results({"mse": [70.0] * 5, "l1": [69.0] * 5})) == [
        "`mse` has the highest validation accuracy and gets 70.00 % of the test images right in "
        "each of its 5 repeats, but can't be told apart from `l1`.",
        "All repeats differ by the same amount, so the repeats needed are unknown.",
        "Its lead over `l1` is 1.00 points (the same in each repeat, p = 1).",
    ]


def test_with_a_wide_spread_no_number_of_repeats_is_promised() -> None:
    made = results({"mse": around(70.1, spread=30), "l1": around(69.9, spread=30, offset=3)})
    assert said(made)[1] == (
        "It would take 10,000 or more repeats to show a difference of 0.5 points with a chance of "
        "80 %."
    )


@pytest.mark.parametrize(
    ("plan", "scope"),
    [
        ({"given_test": True}, SCOPE),
        (
            {"given_test": False},
            "Each repeat draws its own 10,000 test images from the same data: the statements hold "
            "for new splits and trainings, not for other data.",
        ),
        ({"given_test": None}, "The statements hold for new trainings, not for other images."),
    ],
)
def test_the_scope_depends_on_the_test_split(plan: dict[str, bool | None], scope: str) -> None:
    made = results({"mse": around(70), "l1": around(69)}, **plan)
    assert assess(made).statements[-1] == scope


def test_points_have_no_negative_zero() -> None:
    assert [points(share) for share in (0.00534, -0.00534, -0.00001, 0)] == [
        *("0.53", "−0.53", "0.00", "0.00")
    ]


def test_words_agree_with_the_verdicts() -> None:
    rng = np.random.default_rng(0)
    firsts = set()
    for number in range(30):
        n = 2 + number % 12
        assessment = assess(study(*TRUTH.draw(rng, n)))
        first, verdicts = assessment.statements[0], set(assessment.differences["verdict"])
        is_best, is_tie = "is the best of the 3" in first, "can't be told apart" in first
        assert is_best == (verdicts == {"worse"})
        assert is_tie == ("undecided" in verdicts and "better" not in verdicts)
        undecided = assessment.differences.query("verdict == 'undecided'")["loss"]
        if is_tie:
            assert all(f"`{loss}`" in first.split("told apart")[1] for loss in undecided)
        firsts.add((is_best, is_tie))
    assert len(firsts) == 2


def test_the_order_of_rows_does_not_matter() -> None:
    validation, test = TRUTH.draw(np.random.default_rng(0), 6)
    test[2, 1] = NAN
    made = with_curves(study(validation, test))
    expected = assess(made)
    for seed in range(3):
        assert same(assess(shuffled(made, seed)), expected)


def same(one: Assessment, other: Assessment) -> bool:
    return (
        (one.winner, one.statements, one.warnings)
        == (other.winner, other.statements, other.warnings)
        and one.table.equals(other.table)
        and one.pairs.equals(other.pairs)
    )


# Where it would not hold


def with_curves(
    made: Results,
    early: Callable[[pd.Series], float] = lambda repeat: repeat["val_accuracy"] - 0.004,
) -> Results:
    """Return them with two epochs of each repeat: after 6, and after 8, of 8."""
    curves = [
        {
            **dict.fromkeys(CURVE_COLUMNS, 0.5),
            "stage": stage,
            "loss": repeat["loss"],
            "trial": repeat["trial"],
            "epoch": epoch,
            "val_accuracy": accuracy,
        }
        for _, repeat in made.repeats.iterrows()
        for epoch, accuracy in ((6, early(repeat)), (8, repeat["val_accuracy"]))
        for stage in ("confirm", "search")
    ]
    return replace(made, curves=pd.DataFrame(curves, columns=list(CURVE_COLUMNS)))


def with_values(made: Results, **values: float) -> Results:
    return replace(made, repeats=made.repeats.assign(**values), trials=made.trials.assign(**values))


TWO = {"mse": around(70), "l1": around(69, offset=3)}


def test_a_sound_comparison_has_no_warnings() -> None:
    assert assess(with_curves(results(TWO))).warnings == ()


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        # 5 % of three decades are a factor of 1.413.
        (0.00141, "low end of the range, 0.001 to 1: a better one may lie beyond it. Try "
         "--learning-rate-min 0.0003."),
        (0.00142, None),
        (0.707, None),
        (0.709, "high end of the range, 0.001 to 1: a better one may lie beyond it. Try "
         "--learning-rate-max 3."),
    ],
)  # fmt: skip
def test_a_learning_rate_at_the_edge(rate: float, expected: str | None) -> None:
    found = texts(with_values(results({"mse": around(70)}), learning_rate=rate), "edge")
    assert found == (
        [f"The best learning rate of `mse`, {rate:.2g}, is at the {expected}"] if expected else []
    )


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([0.01, 0.02, 0.2], "highest that was tried: a better one may lie between it and 1"),
        ([0.2, 0.3, 0.02], "lowest that was tried: a better one may lie between it and 0.001"),
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
        [f"The best learning rate of `mse`, {rates[-1]:.2g}, is the {expected}. Try --trials 24."]
        if expected
        else []
    )


@pytest.mark.parametrize(
    ("size", "sizes", "expected"),
    [
        (64, [32, 64, 128], None),
        (32, [128, 32, 64], "the smallest that was tried: a better one may lie beyond it. Add 16"),
        (128, [32, 64, 128], "the largest that was tried: a better one may lie beyond it. Add 256"),
        (64, [64], None),
        (1, [1, 2], None),
        (32_768, [1, 32_768], None),
    ],
)
def test_a_batch_size_at_the_edge(size: int, sizes: list[int], expected: str | None) -> None:
    made = with_values(results({"mse": around(70)}, batch_sizes=sizes), batch_size=size)
    found = texts(made, "edge")
    assert found == (
        [f"The best batch size of `mse`, {size}, is {expected} to --batch-sizes."]
        if expected
        else []
    )


def test_the_edge_is_that_of_the_best_trial_before_there_are_repeats() -> None:
    made = results({"mse": around(70)})
    made.trials.loc[3, ["val_accuracy", "learning_rate"]] = [0.9, 0.99]
    made.trials.loc[4, ["val_accuracy", "learning_rate", "outcome"]] = [0.95, 0.1, "diverged"]
    made = replace(made, repeats=made.repeats.iloc[:0])
    assert texts(made, "edge") == [
        "The best learning rate of `mse`, 0.99, is at the high end of the range, 0.001 to 1: a "
        "better one may lie beyond it. Try --learning-rate-max 3."
    ]


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
        "`l1` has 6 complete trials of 12: its best configuration may be a lucky one, or not among "
        "them. Try --trials 16."
    ]


def test_a_loss_that_diverged_in_most_trials_or_repeats() -> None:
    made = results({"mse": around(70), "l1": [69, 69.1, *[NAN] * 8]})
    made.trials.loc[(made.trials["loss"] == "l1") & (made.trials["trial"] < 6), "outcome"] = (
        "diverged"
    )
    assert texts(made, "diverged") == [
        "`l1` diverged in 8 of 10 repeats: its best configuration is unreliable."
    ]
    made.trials.loc[(made.trials["loss"] == "l1") & (made.trials["trial"] < 7), "outcome"] = (
        "diverged"
    )
    assert texts(made, "diverged")[0] == (
        "`l1` diverged in 7 of 12 trials: most of the range of learning rates is too high for it."
    )


def test_an_order_that_still_changes() -> None:
    def early(repeat: pd.Series) -> float:
        gain = 0.018 if repeat["loss"] == "mse" else 0.002
        return float(repeat["val_accuracy"] - gain + 0.0001 * (repeat["trial"] % 3 - 1))

    assert texts(with_curves(results(TWO), early), "epochs") == [
        "The order still changes: in validation `mse` was 0.60 points behind `l1` after 6 epochs, "
        "and is 1.00 ahead after 8. Try --epochs 16.",
        "`mse` gained 1.80 points of validation accuracy in the last 2 of 8 epochs: longer "
        "training may change the order. Try --epochs 16.",
    ]


def test_an_order_that_changes_by_luck_is_no_warning() -> None:
    rng = np.random.default_rng(0)
    warned = changed = 0
    for _ in range(25):
        validation, test = TRUTH.draw(rng, 5)
        made = with_curves(
            study(validation, test), lambda at: at["val_accuracy"] + rng.normal(0, 0.004)
        )
        before, after = (
            made.curves.query("epoch == @epoch and stage == 'confirm'")
            .groupby("loss")["val_accuracy"].mean().sort_values()
            for epoch in (6, 8)
        )  # fmt: skip
        changed += list(before.index) != list(after.index)
        warned += any("order still" in text for text in texts(made, "epochs"))
    assert changed >= 10
    assert warned <= 2  # 5 % may be


def test_a_lead_that_grows_is_no_change_of_order() -> None:
    def early(repeat: pd.Series) -> float:
        gain = 0.008 if repeat["loss"] == "mse" else 0.002
        return float(repeat["val_accuracy"] - gain + 0.0001 * (repeat["trial"] % 3 - 1))

    assert texts(with_curves(results(TWO), early), "epochs") == []


def test_one_epoch_has_no_order_to_settle() -> None:
    assert texts(results(TWO, epochs=1), "epochs") == [
        "One epoch doesn't show whether the order of losses is final. Try --epochs 2."
    ]


def test_batch_sizes_are_compared_at_equal_epochs() -> None:
    made = results(TWO, batch_sizes=[32, 64, 128])
    assert kinds(made) == [("steps", None)]
    assert "at equal epochs" in texts(made, "steps")[0]


def test_a_test_split_that_was_looked_at_twice() -> None:
    made = results(TWO)
    made.repeats.loc[:2, "test_evaluations"] = 2
    assert texts(made, "retest") == [
        "The models of 3 repeats saw the test split more than once: changes in between may have "
        "been chosen by it."
    ]
