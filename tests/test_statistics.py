"""The numbers of a comparison: hand-checked ones, and the rules of its verdicts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from made_results import around, results, with_hits
from statsmodels.stats.multitest import multipletests

from experiments.comparison.assessment import Assessment, assess
from experiments.comparison.intervals import holm
from experiments.comparison.pairs import (
    Doubts,
    may_fail,
    pairwise_tests,
    repeats_needed,
    upper_spread,
)
from experiments.comparison.results import Results
from experiments.comparison.tables import outlying, winner_covers

NAN = math.nan

# Additional hours of sleep of ten patients under two drugs (Student 1908; R's data set `sleep`).
SLEEP = pd.DataFrame(
    {
        "second": [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4],
        "first": [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0],
    }
)


def pair_of(first: Iterable[float], loss: Iterable[float], **options: Any) -> dict[Any, Any]:
    """Return the row of two losses, from accuracies in percent."""
    accuracy = pd.DataFrame({"a": list(first), "b": list(loss)}) / 100
    (pair,) = pairwise_tests(accuracy, **options).to_dict("records")
    return pair


# Numbers


def test_paired_differences_are_those_of_r() -> None:
    (pair,) = pairwise_tests(SLEEP / 100).to_dict("records")
    assert (pair["first"], pair["loss"], pair["n"]) == ("second", "first", 10)
    assert pair["difference"] == pytest.approx(0.0158)
    assert pair["sd"] == pytest.approx(0.01229995)
    assert (pair["low"], pair["high"]) == pytest.approx((0.007001142, 0.024598858))
    # Of a single pair, the simultaneous bounds are the interval.
    assert (pair["bound_low"], pair["bound_high"]) == pytest.approx((pair["low"], pair["high"]))
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


def test_repeats_needed_are_for_the_upper_limit_of_the_spread() -> None:
    (pair,) = pairwise_tests(SLEEP / 100).to_dict("records")
    # χ²(9) has 5.380053 as its 20 % point.
    assert upper_spread(pair["sd"], 10) == pytest.approx(pair["sd"] * (9 / 5.380053) ** 0.5)
    assert pair["repeats_needed"] == repeats_needed(pair["sd"] * (9 / 5.380053) ** 0.5, 0.05)


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


def test_the_correction_is_that_of_statsmodels() -> None:
    p_values = np.random.default_rng(0).random(9) ** 3
    expected = multipletests(p_values, method="holm")[1]
    with_nan = np.insert(p_values, [0, 4, 9], NAN)
    assert holm(with_nan)[~np.isnan(with_nan)] == pytest.approx(expected)
    assert np.isnan(holm(with_nan)[np.isnan(with_nan)]).all()
    assert len(holm(np.array([]))) == 0


def test_a_loss_has_mean_spread_and_interval_of_each_measure() -> None:
    made = results({"mse": [70, 71, 72, 73, 74], "l1": [40, 40, 40, 40, 40]})
    made.repeats.loc[made.repeats["loss"] == "mse", "test_nll"] = [0.9, 1.0, 1.1, 1.2, 1.3]
    mse, l1 = assess(made).table.to_dict("records")
    # R: t.test(70:74)$conf.int is 70.03676 73.96324, sd(70:74) 1.581139
    assert (mse["loss"], mse["n"], mse["accuracy_mean"]) == ("mse", 5, pytest.approx(0.72))
    assert mse["accuracy_sd"] == pytest.approx(0.01581139)
    assert (mse["accuracy_low"], mse["accuracy_high"]) == pytest.approx((0.7003676, 0.7396324))
    assert mse["accuracy_median"] == 0.72
    assert (mse["nll_mean"], mse["nll_low"]) == pytest.approx((1.1, 0.9036757))
    assert (l1["accuracy_mean"], l1["accuracy_sd"]) == pytest.approx((0.4, 0.0))
    assert math.isnan(l1["accuracy_low"])
    assert math.isnan(l1["images_high"])


def test_an_interval_ends_where_the_measure_does() -> None:
    (row,) = assess(results({"mse": [99.9, 100, 100, 100, 99.5]})).table.to_dict("records")
    assert row["accuracy_high"] == 1.0
    assert row["accuracy_low"] < 0.999


def test_the_winner_is_chosen_by_validation_not_by_test() -> None:
    made = results(
        {"mse": [60, 61, 60], "l1": [70, 70, 72]},
        validation={"mse": [70, 70, 70], "l1": [60, 60, 60]},
    )
    assessment = assess(made)
    assert assessment.winner == "mse"
    assert list(assessment.table["loss"]) == ["mse", "l1"]
    assert assessment.differences["difference"].item() < 0


def test_a_loss_that_diverges_is_chosen_by_what_it_came_to() -> None:
    made = results({"mse": [75, 75.1, NAN, 75], "l1": [70, 70.2, 70, 70.1]})
    assert assess(made).winner == "l1"
    made.repeats.loc[made.repeats["outcome"] == "diverged", "val_accuracy"] = NAN
    assert assess(made).table["val_accuracy"].tolist() == pytest.approx([0.70075, 0.56275])


def test_a_failed_repeat_says_nothing_of_its_loss() -> None:
    made = results({"mse": [75, 75.1, NAN, 75], "l1": [70, 70.2, 70, 70.1]})
    made.repeats.loc[made.repeats["outcome"] == "diverged", "outcome"] = "failed"
    assessment = assess(made)
    assert assessment.winner == "mse"
    assert assessment.table["failed"].tolist() == [1, 0]


def test_a_search_that_found_nothing_is_a_failed_repeat() -> None:
    made = results({"mse": [75, 75.1, 75.3], "l1": [70, 70.2, 70]}, search="staged", trials=5)
    lost = (made.trials["loss"] == "mse") & (made.trials["search"] == 2)
    made.trials.loc[lost, "outcome"] = "diverged"
    assert assess(made).table["failed"].tolist() == [0, 0]  # it has a repeat, so it chose
    is_repeat = (made.repeats["loss"] == "mse") & (made.repeats["search"] == 2)
    made = replace(made, repeats=made.repeats[~is_repeat])
    assert assess(made).table[["repeats", "failed", "n"]].to_numpy().tolist() == [
        [3, 1, 2],
        [3, 0, 3],
    ]
    unfinished = replace(made, trials=made.trials[made.trials["trial"] < 3])
    assert assess(unfinished).table["failed"].tolist() == [0, 0]


def test_only_seeds_that_both_have_are_compared() -> None:
    made = results({"mse": [70, 71, NAN, 73, 74], "l1": [60, NAN, 61, 62, 63.5]})
    (pair,) = assess(made).pairs.to_dict("records")
    assert pair["n"] == 3
    assert pair["difference"] == pytest.approx(np.mean([10, 11, 10.5]) / 100)


def test_searches_of_losses_are_paired_by_seed() -> None:
    made = results({"mse": [70, 71, 73], "l1": [60, 62, 62]}, search="staged")
    (pair,) = assess(made).pairs.to_dict("records")
    assert pair["sd"] == pytest.approx(np.std([10, 9, 11], ddof=1) / 100)


def test_the_configuration_of_several_searches_is_their_middle() -> None:
    made = results({"mse": [70, 71, 73, 70]}, search="staged")
    made.repeats["learning_rate"] = [0.1, 0.4, 0.2, 0.3]
    made.repeats["batch_size"] = [32, 64, 128, 256]
    (row,) = assess(made).table.to_dict("records")
    assert row["learning_rate"] == pytest.approx(0.25)
    assert (row["learning_rate_low"], row["learning_rate_high"]) == (0.1, 0.4)
    assert row["batch_size"] == 64


# Both intervals


def test_new_images_widen_intervals_by_what_images_differ() -> None:
    made = results({"mse": around(70, n=5), "l1": around(69, n=5, offset=2)})
    assessment = assess(with_hits(made, noise=0.1))
    for row in [*assessment.table.to_dict("records"), *assessment.pairs.to_dict("records")]:
        low, high = (row[f"accuracy_{end}" if "p" not in row else end] for end in ("low", "high"))
        assert row["images_low"] < low < high < row["images_high"]
    # One training on N images has √(0.7 × 0.3 / N); five that agree have hardly less.
    half = np.diff(assessment.table.loc[0, ["images_low", "images_high"]]).item() / 2
    assert half == pytest.approx(1.96 * math.sqrt(0.7 * 0.3 / 10_000), rel=0.1)
    (pair,) = assessment.pairs.to_dict("records")
    assert pair["p_images"] == pair["p_images_holm"] > pair["p"]


def test_new_images_never_narrow_an_interval() -> None:
    rng = np.random.default_rng(0)
    for seed in range(8):
        made = with_hits(
            results({"a": list(rng.normal(70, 3, 3).round(2)), "b": [60, 61, 62]}), seed=seed
        )
        (pair,) = assess(made).pairs.to_dict("records")
        assert pair["images_low"] <= pair["low"]
        assert pair["images_high"] >= pair["high"]
        assert pair["p_images"] >= pair["p"]


def test_what_holds_for_new_images_is_unknown_without_hits() -> None:
    made = results({"mse": around(70), "l1": around(69, offset=3)})
    for given in (True, None):
        assessment = assess(replace(made, plan={**made.plan, "given_test": given}))
        (pair,) = assessment.pairs.to_dict("records")
        assert (pair["verdict"], pair["images_verdict"]) == ("worse", "unknown")
        assert math.isnan(pair["images_low"])
        assert math.isnan(pair["p_images_holm"])
        assert assessment.table["images_low"].isna().all()
    of_one = {"mse": with_hits(made).hits["mse"], "l1": with_hits(made).hits["l1"][:3]}
    (pair,) = assess(replace(made, hits=of_one)).pairs.to_dict("records")
    assert pair["images_verdict"] == "unknown"


def test_without_a_given_test_split_the_resampled_t_is_corrected() -> None:
    made = results({"mse": around(70), "l1": around(69, offset=3)}, given_test=False)
    assessment = assess(made)
    wider = math.sqrt(1 + 10 * 10_000 / 45_000)
    (pair,) = assessment.pairs.to_dict("records")
    middle = pair["difference"]
    assert pair["images_high"] - middle == pytest.approx(wider * (pair["high"] - middle))
    row = assessment.table.loc[0]
    assert row["images_high"] - row["accuracy_mean"] == pytest.approx(
        wider * (row["accuracy_high"] - row["accuracy_mean"])
    )


def test_a_lead_may_hold_for_these_images_only() -> None:
    made = with_hits(results({"mse": around(70, n=5), "l1": around(69.5, n=5, offset=2)}))
    (pair,) = assess(made).pairs.to_dict("records")
    assert (pair["verdict"], pair["images_verdict"]) == ("worse", "undecided")


# Verdicts


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        ([70, 70.1, 70.3], [69, 69.2, 69.1], "worse"),
        ([69, 69.2, 69.1], [70, 70.1, 70.3], "better"),
        (around(70.1, spread=0.05), around(70, spread=0.05, offset=3), "slightly worse"),
        (around(70, spread=0.05), around(70.1, spread=0.05, offset=3), "slightly better"),
        (around(70, spread=0.2), around(70, spread=0.2, offset=3), "equal"),
        (around(70, spread=1), around(70, spread=1, offset=3), "undecided"),
        ([70, NAN, 70], [NAN, 70, 69], "not compared"),
        ([70, 40, 80], [60, 30, 70], "constant"),
        ([70, 40, 80], [70, 40, 80], "constant"),
    ],
)
def test_a_verdict(first: list[float], second: list[float], verdict: str) -> None:
    assert pair_of(first, second)["verdict"] == verdict


def test_equal_differences_have_no_p_and_no_interval() -> None:
    assert 0.7 - 0.6 < 0.4 - 0.3  # as floating-point numbers
    pair = pair_of([70, 40, 80], [60, 30, 70])
    assert pair["sd"] == 0.0
    for name in ("p", "p_holm", "low", "bound_high", "repeats_needed"):
        assert math.isnan(pair[name])


def test_the_least_difference_that_matters_is_the_plans() -> None:
    lead = around(70.5), around(70, offset=3)
    assert pair_of(*lead)["verdict"] == "worse"
    assert pair_of(*lead, min_effect=0.005)["verdict"] == "worse"
    assert pair_of(*lead, min_effect=0.00501)["verdict"] == "slightly worse"
    made = results(dict(zip("ab", lead, strict=True)), min_effect=0.006)
    assert assess(made).pairs["verdict"].item() == "slightly worse"


def test_equal_means_within_bounds_for_all_pairs_at_once() -> None:
    alone = pair_of(around(70, spread=0.25), around(70, spread=0.25, offset=3))
    assert alone["verdict"] == "equal"
    many = {name: around(70, spread=0.25, offset=3 * i) for i, name in enumerate("ab")}
    many |= {name: around(60 - i, spread=0.25, offset=2 * i) for i, name in enumerate("cdefgh", 1)}
    pair = pairwise_tests(pd.DataFrame(many) / 100).to_dict("records")[0]
    assert pair["high"] < 0.002 < pair["bound_high"]
    assert pair["verdict"] == "undecided"


def test_a_loss_that_fails_is_never_better_and_may_be_worse() -> None:
    up, down = [70, 70.1, 70.3], [69, 69.2, 69.1]
    for failing, verdicts in (
        ({"a"}, ("behind", "better")),
        ({"b"}, ("worse", "ahead")),
        ({"a", "b"}, ("behind", "ahead")),
    ):
        doubts = Doubts(incomplete=failing)
        assert pair_of(up, down, doubts=doubts)["verdict"] == verdicts[0]
        assert pair_of(down, up, doubts=doubts)["verdict"] == verdicts[1]
    equal = around(70, spread=0.2), around(70, spread=0.2, offset=3)
    assert pair_of(*equal, doubts=Doubts(incomplete={"b"}))["verdict"] == "undecided"


def test_one_divergence_is_enough_not_to_be_better() -> None:
    made = results({"mse": around(70), "l1": [*around(72, n=9, offset=2), NAN]})
    for outcome in ("diverged", "failed"):
        made.repeats.loc[made.repeats["outcome"] != "complete", "outcome"] = outcome
        (pair,) = assess(made).pairs.to_dict("records")
        assert pair["p_holm"] < 0.001
        assert pair["verdict"] in ("ahead", "behind")


def test_an_outlying_repeat_needs_all_repeats_to_agree() -> None:
    first, second = [*around(80, n=19), 69], around(70, n=20, offset=3)
    pair = pair_of(first, second)
    assert pair["p"] < 0.001
    assert pair["verdict"] == "worse"
    assert pair_of(first, second, doubts=Doubts(outlying={"a"}))["verdict"] == "undecided"
    agreeing = pair_of([*first[:-1], 75], second, doubts=Doubts(outlying={"a"}))
    assert agreeing["verdict"] == "worse"
    made = results({"a": first, "b": second})
    assessment = assess(made)
    assert assessment.table["outliers"].tolist() == [1, 0]
    assert assessment.pairs["verdict"].item() == "undecided"


@pytest.mark.parametrize(
    ("accuracies", "found"),
    [
        ([70, 70.1, 69.9, 70.2, 60], [60]),
        ([70, 70.1, 69.9, 70.2, 80], [80]),
        ([70, 70.1, 69.9, 70.2, 68.5], []),  # within 2 points
        ([70, 72, 68, 74, 60], []),  # within 5 spreads
        ([70, 70, 70, 60, 60], [60, 60]),
        ([70, 60], []),
        ([70, 60, NAN, NAN], []),
    ],
)
def test_an_outlying_repeat(accuracies: list[float], found: list[float]) -> None:
    repeats = outlying(results({"mse": accuracies}).repeats)
    assert (100 * repeats["test_accuracy"]).tolist() == pytest.approx(found)


def test_repeats_without_failure_leave_a_share_that_may_fail() -> None:
    # Clopper-Pearson, one-sided: 1 − 0.05^(1/n)
    assert [round(may_fail(n), 3) for n in (1, 5, 10)] == [0.95, 0.451, 0.259]


def test_the_winner_of_many_losses_has_an_interval_that_covers_less() -> None:
    shares = [winner_covers(losses) for losses in (1, 2, 3, 4, 5, 6, 14, 20)]
    assert shares == [None, None, None, 0.92, pytest.approx(0.91), 0.9, 0.82, 0.82]


# What does not matter


def test_the_order_of_rows_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    accuracies = {loss: list(rng.normal(70, 0.5, 6).round(2)) for loss in "abc"}
    accuracies["b"][2] = NAN
    for search in ("random", "staged"):
        made = with_hits(results(accuracies, search=search))
        expected = assess(made)
        for seed in range(3):
            assert same(assess(shuffled(made, seed)), expected)


def shuffled(made: Results, seed: int) -> Results:
    tables = {name: getattr(made, name) for name in ("trials", "repeats", "curves")}
    return replace(
        made,
        **{name: table.sample(frac=1, random_state=seed) for name, table in tables.items()},
    )


def same(one: Assessment, other: Assessment) -> bool:
    return (
        (one.winner, one.statements, one.warnings)
        == (other.winner, other.statements, other.warnings)
        and one.table.equals(other.table)
        and one.pairs.equals(other.pairs)
    )


# What to use


def test_what_to_use_is_what_was_confirmed() -> None:
    made = results({"mse": [70, 71, 72], "l1": [60, 61, 62]}, search="staged")
    assert assess(made).to_use is None
    rows = results({"mse": [73, 74, NAN]}).repeats.assign(learning_rate=0.2, batch_size=128)
    to_use = assess(replace(made, confirmed=rows)).to_use
    assert to_use is not None
    assert (to_use["loss"], to_use["learning_rate"], to_use["batch_size"]) == ("mse", 0.2, 128)
    assert [to_use[name] for name in ("repeats", "diverged", "failed", "n")] == [3, 1, 0, 2]
    assert (to_use["split"], to_use["accuracy_mean"]) == ("test", pytest.approx(0.735))
    untested = rows.assign(test_accuracy=NAN, val_accuracy=[0.5, 0.6, 0.1])
    to_use = assess(replace(made, confirmed=untested)).to_use
    assert to_use is not None
    assert (to_use["split"], to_use["accuracy_mean"]) == ("validation", pytest.approx(0.55))


def test_what_to_use_of_one_search_is_what_its_repeats_had() -> None:
    to_use = assess(results({"mse": [70, 71, 72], "l1": [60, 61, 62]})).to_use
    assert to_use is not None
    assert (to_use["loss"], to_use["n"]) == ("mse", 3)
    assert to_use["accuracy_mean"] == pytest.approx(0.71)
