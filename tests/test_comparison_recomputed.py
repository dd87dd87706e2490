"""Every number of a comparison's tables, computed again from the raw rows by slow, obvious code."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from made_results import results, with_hits
from scipy import stats

from experiments.comparison.assessment import assess
from experiments.comparison.pairs import PAIR_COLUMNS
from experiments.comparison.results import Results
from experiments.comparison.tables import TABLE_COLUMNS

NAN = math.nan
Row = dict[str, Any]
Matrix = np.ndarray[Any, Any]


def drawn(seed: int, *, search: str, given_test: bool, n: int = 6) -> Results:
    """Return a comparison of five losses, with ties, a divergence, a failure and an outlier."""
    rng = np.random.default_rng(seed)
    means = {"a": 70.5, "b": 70.4, "c": 70.4, "d": 68.0, "e": 60.0}
    accuracies = {loss: list(rng.normal(mean, 0.2, n).round(2)) for loss, mean in means.items()}
    accuracies["b"][1] = accuracies["a"][1]
    accuracies["c"] = [each + 0.01 * (i % 2) for i, each in enumerate(accuracies["b"])]
    accuracies["d"][2] = NAN
    accuracies["d"][4] = NAN
    accuracies["e"][0] = 56.0
    validation = {
        loss: [round(each + rng.normal(0, 0.1), 2) for each in of_loss]
        for loss, of_loss in accuracies.items()
    }
    made = results(accuracies, validation=validation, search=search, given_test=given_test)
    is_failed = (made.repeats["loss"] == "d") & (made.repeats["seed"] == 4)
    made.repeats.loc[is_failed, "outcome"] = "failed"
    made.repeats.loc[is_failed, "val_accuracy"] = NAN
    for name in ("test_nll", "test_brier", "test_ece"):
        made.repeats[name] = rng.random(len(made.repeats))
        made.repeats.loc[made.repeats["test_accuracy"].isna(), name] = NAN
    if search == "staged":
        made.repeats["learning_rate"] = 10 ** rng.uniform(-2, -1, len(made.repeats))
        made.repeats["batch_size"] = rng.choice([32, 64, 128], len(made.repeats))
    return with_hits(made, seed=seed) if given_test else made


CASES = [
    drawn(0, search="staged", given_test=True),
    drawn(1, search="random", given_test=True),
    drawn(2, search="staged", given_test=False, n=9),
    replace(drawn(3, search="staged", given_test=True), hits={}),
]


def t_interval(values: Sequence[float], alpha: float = 0.05) -> tuple[float, float]:
    if len(values) < 2 or max(values) - min(values) < 1e-9:
        return NAN, NAN
    ends = stats.ttest_1samp(values, 0).confidence_interval(1 - alpha)
    return float(ends.low), float(ends.high)


def anova(matrix: Matrix) -> tuple[float, float]:
    """Return variance and degrees of freedom of the mean, term by term from the definition."""
    x = matrix.astype(float)
    n, images = x.shape
    mean, rows, columns = x.mean(), x.mean(axis=1), x.mean(axis=0)
    of_rows = sum(images * (row - mean) ** 2 for row in rows) / (n - 1)
    of_columns = float(np.sum(n * (columns - mean) ** 2)) / (images - 1)
    residuals = x - rows[:, None] - columns[None, :] + mean
    of_rest = float(np.sum(residuals**2)) / ((n - 1) * (images - 1))
    variance_of_rows = (of_rows - of_rest) / images
    variance_of_columns = max(0.0, (of_columns - of_rest) / n)
    # Components of the variance of the mean: of repeats, of images, and of what is left.
    variance = variance_of_rows / n + variance_of_columns / images + of_rest / (n * images)
    df = (n * images * variance) ** 2 / (
        of_rows**2 / (n - 1) + of_columns**2 / (images - 1) + of_rest**2 / ((n - 1) * (images - 1))
    )
    return variance, df


def margin_of(made: Results) -> float:
    """Return by how much a search may favour a loss."""
    return 0.001 if made.plan["search"] == "staged" else 0.0


def t_of(
    mean: float, variance: float, df: float, alpha: float, margin: float
) -> tuple[float, float, float]:
    """Return the ends of an interval, and the p of a mean beyond a margin.

    It is how often a mean would be as far from 0 as this one, if the true one were the margin.
    """
    half = stats.t.ppf(1 - alpha / 2, df) * math.sqrt(variance)
    of_mean = stats.t(df, loc=margin, scale=math.sqrt(variance))
    p = (1 - of_mean.cdf(abs(mean))) + of_mean.cdf(-abs(mean))
    return mean - half, mean + half, float(p)


def p_of(made: Results, values: Sequence[float]) -> float:
    """Return the p of a difference over new trainings."""
    if math.isnan(t_interval(values)[0]):
        return NAN
    variance = float(np.var(values, ddof=1)) / len(values)
    return t_of(float(np.mean(values)), variance, len(values) - 1, 0.05, margin_of(made))[2]


def on_new_images(
    made: Results, values: Sequence[float], matrix: Matrix | None, alpha: float
) -> tuple[float, float, float]:
    """Return the ends of the interval over new trainings and new images, and p."""
    low, high = t_interval(values, alpha)
    if math.isnan(low):
        return NAN, NAN, NAN
    n, mean = len(values), float(np.mean(values))
    if not made.plan["given_test"]:
        factor = 1 / n + made.sizes["test"] / made.sizes["train"]
        variance = float(np.var(values, ddof=1)) * factor
        return t_of(mean, variance, n - 1, alpha, margin_of(made))
    if matrix is None:
        return NAN, NAN, NAN
    wide = t_of(mean, *anova(matrix), alpha, margin_of(made))
    return min(low, wide[0]), max(high, wide[1]), max(p_of(made, values), wide[2])


def by_seed(made: Results, loss: str) -> dict[int, float]:
    """Return the test accuracies of a loss, by seed."""
    found = {}
    for row in made.repeats.to_dict("records"):
        if row["loss"] == loss and not math.isnan(row["test_accuracy"]):
            found[row["seed"]] = row["test_accuracy"]
    return dict(sorted(found.items()))


def hits_at(made: Results, loss: str, seeds: Sequence[int]) -> Matrix | None:
    if loss not in made.hits:
        return None
    order = list(by_seed(made, loss))
    return np.array([made.hits[loss][order.index(seed)] for seed in seeds], dtype=int)


def same(found: Mapping[Any, Any], expected: Row) -> None:
    for name, value in expected.items():
        if isinstance(value, float) and math.isnan(value):
            assert math.isnan(found[name]), name
        elif isinstance(value, float):
            assert found[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name
        else:
            assert found[name] == value, name


@pytest.mark.parametrize("made", CASES)
def test_the_table_is_right(made: Results) -> None:
    table = assess(made).table
    assert set(table.columns) == set(TABLE_COLUMNS)
    means = []
    for found in table.to_dict("records"):
        rows = [row for row in made.repeats.to_dict("records") if row["loss"] == found["loss"]]
        tested = [row for row in rows if not math.isnan(row["test_accuracy"])]
        values = [row["test_accuracy"] for row in tested]
        kept = [row["val_accuracy"] for row in rows if row["outcome"] != "failed"]
        means.append(sum(kept) / len(kept))
        rates, sizes = (
            sorted(row[name] for row in rows) for name in ("learning_rate", "batch_size")
        )
        middle = np.median(values)
        spread = 1.4826 * np.median([abs(each - middle) for each in values])
        seeds = list(by_seed(made, found["loss"]))
        low, high, _ = on_new_images(made, values, hits_at(made, found["loss"], seeds), 0.05)
        expected: Row = {
            "learning_rate": (rates[(len(rates) - 1) // 2] + rates[len(rates) // 2]) / 2,
            "learning_rate_low": rates[0],
            "learning_rate_high": rates[-1],
            "batch_size": sizes[(len(sizes) - 1) // 2],
            "repeats": len(rows),
            "diverged": sum(row["outcome"] == "diverged" for row in rows),
            "failed": sum(row["outcome"] == "failed" for row in rows),
            "n": len(tested),
            "outliers": sum(
                abs(each - middle) > 0.02 and abs(each - middle) > 5 * spread for each in values
            ),
            "val_accuracy": means[-1],
            "accuracy_median": float(middle),
            "images_low": float(np.clip(low, 0, 1)),
            "images_high": float(np.clip(high, 0, 1)),
        }
        for measure, most in (("accuracy", 1), ("nll", math.inf), ("brier", 2), ("ece", 1)):
            values = [row[f"test_{measure}"] for row in tested]
            low, high = t_interval(values)
            expected |= {
                f"{measure}_mean": sum(values) / len(values),
                f"{measure}_sd": float(np.std(values, ddof=1)),
                f"{measure}_low": max(0.0, low),
                f"{measure}_high": min(most, high),
            }
        same(found, expected)
    assert means == sorted(means, reverse=True)
    assert table["outliers"].sum() == 1


@pytest.mark.parametrize("made", CASES)
def test_the_pairs_are_right(made: Results) -> None:
    assessment = assess(made)
    pairs: list[Any] = assessment.pairs.to_dict("records")
    assert set(assessment.pairs.columns) == set(PAIR_COLUMNS)
    order = list(assessment.table["loss"])
    assert [(pair["first"], pair["loss"]) for pair in pairs] == list(combinations(order, 2))
    differences, matrices = [], []
    for pair in pairs:
        first, second = by_seed(made, pair["first"]), by_seed(made, pair["loss"])
        seeds = [seed for seed in first if seed in second]
        differences.append([round(first[seed] - second[seed], 9) for seed in seeds])
        one, other = (hits_at(made, pair[name], seeds) for name in ("first", "loss"))
        matrices.append(None if one is None or other is None else one - other)
    p_values = [p_of(made, values) for values in differences]
    p_images = [
        on_new_images(made, values, matrix, 0.05)[2]
        for values, matrix in zip(differences, matrices, strict=True)
    ]
    p_holm, p_images_holm = holm(p_values), holm(p_images)
    undecided = sum(p > 0.05 for p in p_holm)
    tested = sum(not math.isnan(p) for p in p_values)
    tested_on_new = max(1, sum(not math.isnan(p) for p in p_images))
    for at, (found, values, matrix) in enumerate(zip(pairs, differences, matrices, strict=True)):
        n = len(values)
        bounds = t_interval(values, 0.05 / tested)
        on_new = on_new_images(made, values, matrix, 0.05 / tested_on_new)[:2]
        ahead, ties = sum(each > 0 for each in values), sum(each == 0 for each in values)
        low, high = t_interval(values)
        images_low, images_high, _ = on_new_images(made, values, matrix, 0.05)
        same(
            found,
            {
                "n": n,
                "difference": sum(values) / n,
                "sd": float(np.std(values, ddof=1)),
                "low": low,
                "high": high,
                "images_low": images_low,
                "images_high": images_high,
                "bound_low": bounds[0],
                "bound_high": bounds[1],
                "p": p_values[at],
                "p_holm": p_holm[at],
                "p_images": p_images[at],
                "p_images_holm": p_images_holm[at],
                "verdict": verdict(made, found, p_holm[at], bounds),
                "images_verdict": verdict(made, found, p_images_holm[at], on_new),
                "ahead": ahead,
                "ties": ties,
                "probability": (ahead + ties / 2) / n,
                "probability_low": float(stats.beta.ppf(0.025, ahead, n - ahead + 1))
                if ahead
                else 0.0,
                "probability_high": float(stats.beta.ppf(0.975, ahead + ties + 1, n - ahead - ties))
                if ahead + ties < n
                else 1.0,
                "repeats_needed": needed(made, values, 0.05 / max(1, undecided)),
            },
        )


def holm(p_values: Sequence[float]) -> list[float]:
    tested = sorted(p for p in p_values if not math.isnan(p))
    corrected: dict[float, float] = {}
    highest = 0.0
    for rank, p in enumerate(tested):
        highest = max(highest, min(1.0, (len(tested) - rank) * p))
        corrected.setdefault(p, highest)
    return [NAN if math.isnan(p) else corrected[p] for p in p_values]


def verdict(made: Results, pair: Row, p: float, bounds: tuple[float, float]) -> str:
    """Return the verdict on a pair's second loss, rule by rule."""
    of_both = [row for row in made.repeats.to_dict("records") if row["loss"] in pair.values()]
    is_outlying = any(row["test_accuracy"] == pytest.approx(0.56) for row in of_both)
    failing = {row["loss"] for row in of_both if row["outcome"] != "complete"}
    if pair["sd"] < 1e-12:
        return "constant"
    if math.isnan(p):
        return "unknown"
    if is_outlying and 0 < pair["ahead"] < pair["n"] - pair["ties"]:
        return "undecided"
    if p > 0.05:
        is_equal = max(abs(bounds[0]), abs(bounds[1])) <= 0.002 and not failing
        return "equal" if is_equal else "undecided"
    if pair["difference"] > 0:
        ahead, words = pair["first"], ("worse", "slightly worse", "behind")
    else:
        ahead, words = pair["loss"], ("better", "slightly better", "ahead")
    if ahead in failing:
        return words[2]
    return words[0] if abs(pair["difference"]) >= 0.002 else words[1]


def needed(made: Results, values: Sequence[float], level: float) -> float:
    """Return how many repeats find half a point with 80 %: the first of all numbers that does."""
    n, lead = len(values), 0.005 - margin_of(made)
    sd = float(np.std(values, ddof=1)) * math.sqrt((n - 1) / stats.chi2.ppf(0.2, n - 1))
    for numbers in (np.arange(2, 200), np.arange(200, 10_000)):
        limits = stats.t.ppf(1 - level / 2, numbers - 1)
        power = 1 - stats.nct.cdf(limits, numbers - 1, lead / sd * np.sqrt(numbers))
        if (power >= 0.8).any():
            return float(numbers[power >= 0.8][0])
    return 10_000.0


def test_all_verdicts_of_interest_occur_here() -> None:
    found = {verdict for made in CASES for verdict in assess(made).pairs["verdict"]}
    assert {"worse", "undecided", "equal", "behind"} <= found
