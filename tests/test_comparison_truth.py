"""How often is true what a comparison says: simulations of which the truth is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from made_results import results
from scipy import stats

from experiments.comparison.intervals import Estimate, crossed, over_trainings
from experiments.comparison.pairs import (
    MIN_EFFECT,
    Doubts,
    pairwise_tests,
    repeats_needed,
    upper_spread,
)
from experiments.comparison.tables import outlying, winner_covers


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


def intervals(studies: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the lower and the upper ends of the intervals over trainings, (2, studies)."""
    return np.transpose([over_trainings(values).ends() for values in studies])


@cache
def mean_of(values: str) -> float:
    return float(POPULATIONS[values](np.random.default_rng(0), (2_000_000,)).mean())


@pytest.mark.parametrize("n", [5, 10, 20])
@pytest.mark.parametrize("values", POPULATIONS)
def test_intervals_over_trainings_cover_94_to_96_percent(values: str, n: int) -> None:
    studies = POPULATIONS[values](np.random.default_rng(n), (10_000, n))
    mean = mean_of(values)
    low, high = intervals(studies[np.ptp(studies, axis=1) > 1e-9])
    assert 0.94 <= ((low <= mean) & (mean <= high)).mean() <= 0.96


def draw_hits(
    rng: np.random.Generator, n: int, images: int, of_images: float, of_repeats: float
) -> npt.NDArray[np.int8]:
    """Return hits of two losses, (2, n, images); both have the same expected accuracy.

    The logit of a hit is the sum of an image's difficulty, of which a part is the loss' own, a
    repeat's effect, and their interaction.
    """
    common, own = rng.normal(size=images), rng.normal(size=(2, 1, images))
    logits = 1 + of_images * (0.9 * common + math.sqrt(0.19) * own)
    logits = logits + of_repeats * rng.normal(size=(2, n, 1)) + rng.normal(size=(2, n, images))
    return (rng.random((2, n, images)) < 1 / (1 + np.exp(-logits))).astype(np.int8)


@pytest.mark.parametrize("n", [3, 5, 10])
@pytest.mark.parametrize(("of_images", "of_repeats"), [(5.0, 0.03), (3.0, 0.1), (2.0, 0.4)])
def test_intervals_over_new_images_cover_93_to_97_percent(
    n: int, of_images: float, of_repeats: float
) -> None:
    rng, studies = np.random.default_rng(n), 600
    spread = math.sqrt(of_images**2 + of_repeats**2 + 1)
    quantiles = stats.norm.ppf((np.arange(100_000) + 0.5) / 100_000)
    truth = float((1 / (1 + np.exp(-1 - spread * quantiles))).mean())
    covered = np.zeros(2)
    for _ in range(studies):
        hits = draw_hits(rng, n, 400, of_images, of_repeats)
        for at, (values, mean) in enumerate(((hits[0], truth), (hits[0] - hits[1], 0.0))):
            trainings = over_trainings(values.mean(axis=1))
            variance, df = crossed(values)
            low, high = Estimate(
                mean=trainings.mean, variance=variance, df=df, least=trainings
            ).ends()
            covered[at] += low <= mean <= high
    # ± three standard errors of 600 studies at 95 %
    assert ((covered / studies >= 0.93 - 0.007) & (covered / studies <= 0.97 + 0.007)).all()


def test_intervals_over_trainings_do_not_cover_new_images() -> None:
    rng, covered = np.random.default_rng(0), 0
    for _ in range(200):
        differences = np.subtract(*draw_hits(rng, 10, 400, 5.0, 0.03))
        low, high = over_trainings(differences.mean(axis=1)).ends()
        covered += low <= 0 <= high
    assert covered / 200 < 0.8


def test_the_resampled_t_covers_splits_of_the_same_data() -> None:
    """Each repeat draws 1,000 test images of 6,000, which are a sample themselves."""
    rng, n, covered = np.random.default_rng(0), 10, np.zeros(2)
    for _ in range(1500):
        difficulty = rng.normal(0, 0.4, 6_000)
        shares = [0.7 + rng.choice(difficulty, 1_000, replace=False).mean() for _ in range(n)]
        values = np.array(shares) + rng.normal(0, 0.002, n)
        trainings = over_trainings(values)
        corrected = trainings.variance * (1 + n * 1_000 / 4_500)
        for at, variance in enumerate((trainings.variance, corrected)):
            low, high = Estimate(mean=trainings.mean, variance=variance, df=n - 1).ends()
            covered[at] += low <= 0.7 <= high
    assert covered[0] / 1500 < 0.9
    assert 0.93 <= covered[1] / 1500 <= 0.985


# Equal losses


@pytest.mark.parametrize("losses", [2, 3, 6])
@pytest.mark.parametrize("n", [3, 5, 10])
def test_equal_losses_are_told_apart_in_at_most_5_percent(losses: int, n: int) -> None:
    rng, studies = np.random.default_rng(0), 10_000
    test = rng.normal(size=(studies, n, 1)) + rng.normal(size=(studies, n, losses))
    pairs = list(combinations(range(losses), 2))
    differences = np.stack([test[..., i] - test[..., j] for i, j in pairs], axis=-1)
    p = stats.ttest_1samp(differences, 0, axis=1).pvalue
    # Holm's method finds something if its first step does: the least p, by their number.
    found = (p.min(axis=1) * len(pairs) <= 0.05).mean()
    assert found <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / studies)
    one = pairwise_tests(pd.DataFrame(test[p.min(axis=1).argmin()] / 1000), min_effect=0.0)
    assert (one["p_holm"].min() <= 0.05) == (p.min() * len(pairs) <= 0.05)


def test_equal_losses_are_rarely_better() -> None:
    rng, wrong = np.random.default_rng(1), 0
    for _ in range(150):
        accuracy = pd.DataFrame(0.7 + 0.004 * rng.normal(size=(5, 3)))
        wrong += bool(pairwise_tests(accuracy)["verdict"].isin(["better", "worse"]).any())
    assert wrong / 150 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 150)


def test_losses_that_differ_by_what_matters_are_rarely_equal() -> None:
    rng, wrong, right = np.random.default_rng(2), 0, 0
    for _ in range(100):
        noise = 0.001 * rng.normal(size=(10, 3))
        verdicts = pairwise_tests(pd.DataFrame(0.7 + noise + [0, 0.002, 0.004]))["verdict"]
        wrong += "equal" in set(verdicts)
        right += "equal" in set(pairwise_tests(pd.DataFrame(0.7 + noise))["verdict"])
    assert wrong / 100 <= 0.05
    assert right / 100 >= 0.5


def test_collapses_that_are_seen_decide_nothing() -> None:
    """Losses of equal expected accuracy, of which one collapses in a fifth of its repeats."""
    rng, by_p, decided, seen = np.random.default_rng(4), 0, 0, 0
    for _ in range(100):
        collapses = rng.random(20) < 0.2
        fall = 10 * rng.uniform(0.7, 1.3, 20)
        made = results(
            {
                "steady": list(rng.normal(70, 0.4, 20).round(2)),
                "other": list((rng.normal(72, 0.4, 20) - fall * collapses).round(2)),
            }
        )
        accuracy = made.repeats.pivot(index="seed", columns="loss", values="test_accuracy")  # noqa: PD010
        has = [str(loss) for loss, rows in made.repeats.groupby("loss") if len(outlying(rows))]
        seen += bool(has)
        (pair,) = pairwise_tests(accuracy, doubts=Doubts(outlying=has)).to_dict("records")
        by_p += bool(has) and pair["p"] <= 0.05
        decided += bool(has) and pair["verdict"] in ("better", "worse")
    assert seen >= 90
    assert by_p >= 3
    assert decided == 0


# What is promised


@pytest.mark.parametrize("n", [3, 5, 10])
@pytest.mark.parametrize("level", [0.05, 0.05 / 15])
def test_repeats_that_would_show_half_a_point_show_it(n: int, level: float) -> None:
    rng, sd, shown = np.random.default_rng(n), 0.0057, []
    for spread in sd * np.sqrt(rng.chisquare(n - 1, 60) / (n - 1)):
        needed = int(repeats_needed(upper_spread(spread, n), level))
        differences = rng.normal(MIN_EFFECT, sd, (200, needed))
        test = stats.ttest_1samp(differences, 0, axis=1)
        shown.append(((test.pvalue <= level) & (test.statistic > 0)).mean())
    assert 0.8 <= np.mean(shown) <= 0.95


@pytest.mark.parametrize("losses", [4, 6, 10, 14])
def test_the_winners_interval_covers_as_often_as_is_said(losses: int) -> None:
    rng, studies, n = np.random.default_rng(0), 10_000, 10
    # The luck of a training, and that of a split, is good on validation and test alike.
    accuracy = rng.normal(size=(studies, n, losses)) + 0.75 * rng.normal(size=(studies, n, 1))
    winner = accuracy.mean(1).argmax(1)[:, None, None]
    low, high = intervals(np.take_along_axis(accuracy, winner, axis=-1)[..., 0])
    assert ((low <= 0) & (high >= 0)).mean() == pytest.approx(winner_covers(losses), abs=0.012)
