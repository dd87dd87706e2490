"""How often what `experiments.comparison.assessment` says is true, where the truth is known.

    python -m benchmarks.planted

Studies are drawn: losses have true accuracies, each repeat adds luck that all of its losses share
(the split) and luck of each loss, of which a part is shared by validation and test split. Printed:

- with one loss half a point better than two equal ones: how often each statement comes out, and how
  often it is true;
- with equal losses only: how often any are told apart, which 5 % may be;
- how often nominal 95 % intervals of a mean cover it, by ways of making them.

A share's Monte-Carlo standard error is at most 0.5 / √studies: 1.1 points of 2,000.
"""

from __future__ import annotations

import argparse
import gc
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from benchmarks.common import markdown
from experiments.comparison.assessment import Assessment, assess
from experiments.comparison.results import CURVE_COLUMNS, REPEAT_COLUMNS, TRIAL_COLUMNS, Results
from experiments.comparison.tables import ALPHA, MIN_EFFECT, interval, repeats_needed

Floats = npt.NDArray[np.float64]

LUCK, SPLIT = 0.004, 0.003
"""Standard deviations of accuracies: of each loss in each repeat, and of all of a repeat's."""
IMAGES = 10_000
"""Of the test split; an accuracy is a number of images."""

REPEATS = (5, 10, 20, 40)
MANY = 10_000
"""Studies, where a study takes no time."""
RESAMPLES = 1999


@dataclass(frozen=True, kw_only=True)
class World:
    """What studies are drawn from."""

    means: dict[str, float]
    """The expected accuracy of each loss."""
    shared: float
    """The correlation of what a loss' luck adds in validation with what it adds in the test."""

    @property
    def spread(self) -> float:
        """Return the standard deviation of paired differences."""
        return LUCK * math.sqrt(2)

    def draw(
        self, rng: np.random.Generator, n: int, studies: int | None = None
    ) -> tuple[Floats, Floats]:
        """Return validation and test accuracies, each (n, losses) or (studies, n, losses)."""
        shape = (n,) if studies is None else (studies, n)
        size = (*shape, len(self.means))
        training = rng.normal(size=size) * math.sqrt(self.shared)
        means = np.array(list(self.means.values())) + SPLIT * rng.normal(size=(*shape, 1))
        validation, test = (
            np.rint((means + LUCK * (training + rest)) * IMAGES) / IMAGES
            for rest in rng.normal(size=(2, *size)) * math.sqrt(1 - self.shared)
        )
        return validation, test


TRUTH = World(
    means={"mse": 0.7, "cross_entropy": 0.7, "label_smoothing": 0.7 + MIN_EFFECT}, shared=0.5
)


def study(validation: Floats, test: Floats, losses: Sequence[str] = tuple(TRUTH.means)) -> Results:
    """Return the results of a comparison with these accuracies, (n, losses).

    A repeat without a test accuracy diverged.
    """
    repeats = [
        {
            **dict.fromkeys(REPEAT_COLUMNS, 0.5),
            "loss": loss,
            "trial": seed * len(losses) + column,
            "seed": seed,
            "outcome": "diverged" if math.isnan(test[seed, column]) else "complete",
            "learning_rate": 0.03,
            "batch_size": 64,
            "val_accuracy": validation[seed, column],
            "test_accuracy": test[seed, column],
            "test_evaluations": 1,
        }
        for seed in range(len(test))
        for column, loss in enumerate(losses)
    ]
    trials = [
        {
            **dict.fromkeys(TRIAL_COLUMNS, 0.5),
            "loss": loss,
            "trial": trial,
            "outcome": "complete",
            "learning_rate": 0.03,
            "batch_size": 64,
        }
        for loss in losses
        for trial in range(12)
    ]
    return Results(
        name="planted",
        plan={
            "dataset": "planted",
            "losses": list(losses),
            "learning_rate_min": 0.001,
            "learning_rate_max": 1.0,
            "batch_sizes": [64],
            "trials": 12,
            "epochs": 8,
            "repeats": len(test),
            "given_test": True,
        },
        classes=tuple("0123456789"),
        sizes={"train": 45_000, "validation": 5_000, "test": IMAGES},
        trials=pd.DataFrame(trials, columns=TRIAL_COLUMNS),
        repeats=pd.DataFrame(repeats, columns=REPEAT_COLUMNS),
        curves=pd.DataFrame(columns=CURVE_COLUMNS),
        confusions={},
        studies={},
        provenance={},
    )


def main() -> None:
    """Draw, assess and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.planted",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--studies", type=int, default=2000, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    options = parser.parse_args()
    gc.freeze()  # statsmodels collects garbage in each correction: let it have less to look at
    rng = np.random.default_rng(options.seed)
    lead = f"{100 * MIN_EFFECT:g} points"
    print(f"One loss {lead} better than two equal ones, {options.studies:,} studies\n")
    print(f"{planted(rng, options.studies)}\n")
    print(f"A lead of {lead} shown at the repeats that were said to be needed, {MANY:,} studies")
    print(f"\n{power(rng, MANY)}\n")
    print(f"Equal losses that are told apart, {MANY:,} studies\n\n{equal(rng, MANY)}\n")
    print(f"What nominal 95 % intervals cover, {MANY:,} studies\n\n{coverage(rng, MANY)}")


def planted(rng: np.random.Generator, studies: int) -> str:
    """Return a table of what is said of a planted truth, and how often it is true."""
    columns = {}
    for n in REPEATS:
        counts: Counter[str] = Counter()
        for _ in range(studies):
            counts.update(judge(assess(study(*TRUTH.draw(rng, n)))))
        columns[n] = counts
    rows = [
        [said, claim, *(share(columns[n], said) for n in REPEATS)] for said, claim in CLAIMS.items()
    ]
    return markdown(["said", "claimed", *(f"n = {n}" for n in REPEATS)], rows)


CLAIMS = {
    "the best loss is the winner": "–",
    "it is the best of the three": "–",
    "it can't be told apart from one of them": "–",
    "it can't be told apart from both": "–",
    "a loss is better that is not": "≤ 5 %",
    "interval of a loss' accuracy covers": "95 %",
    "interval of the winner's accuracy covers": "95 %",
    "interval of a pair's difference covers": "95 %",
    "interval of the winner's lead covers": "95 %",
    "interval of the probability covers": "≥ 95 %",
    "range of the repeats needed covers": "95 %",
}


def judge(assessment: Assessment) -> Counter[str]:
    """Return how often each of `CLAIMS` was made or is true, and " of": how often it could be."""
    counts: Counter[str] = Counter()

    def count(said: str, is_true: bool) -> None:
        counts.update({said: int(is_true), f"{said} of": 1})

    said = assessment.statements[0]
    best, *_ = sorted(TRUTH.means, key=lambda loss: -TRUTH.means[loss])
    is_best = assessment.winner == best
    undecided = (assessment.differences["verdict"] == "undecided").sum()
    count("the best loss is the winner", is_best)
    count("it is the best of the three", is_best and "is the best of the 3 losses" in said)
    count("it can't be told apart from one of them", is_best and undecided == 1)
    count("it can't be told apart from both", is_best and undecided == 2)
    wrong = 0
    for pair in assessment.pairs.to_dict("records"):
        lead = TRUTH.means[pair["first"]] - TRUTH.means[pair["loss"]]
        wrong += {"worse": lead <= 0, "better": lead >= 0}.get(pair["verdict"], False)
        covers = pair["low"] <= lead <= pair["high"]
        count("interval of a pair's difference covers", covers)
        if pair["first"] == assessment.winner:
            count("interval of the winner's lead covers", covers)
        chance = stats.norm.cdf(lead / TRUTH.spread)
        covers = pair["probability_low"] <= chance <= pair["probability_high"]
        count("interval of the probability covers", covers)
        level = ALPHA / max(1, (assessment.pairs["verdict"] == "undecided").sum())
        needed = repeats_needed(TRUTH.spread, level)
        covers = pair["repeats_needed_low"] <= needed <= pair["repeats_needed_high"]
        count("range of the repeats needed covers", covers)
    count("a loss is better that is not", wrong > 0)
    for row in assessment.table.to_dict("records"):
        covers = row["accuracy_low"] <= TRUTH.means[row["loss"]] <= row["accuracy_high"]
        count("interval of a loss' accuracy covers", covers)
        if row["loss"] == assessment.winner:
            count("interval of the winner's accuracy covers", covers)
    return counts


def share(counts: Counter[str], said: str) -> str:
    """Return how often something was said, of how often it could be."""
    return f"{counts[said] / counts[f'{said} of']:.1%}"


def power(rng: np.random.Generator, studies: int) -> str:
    """Return a table of how often a lead is shown by as many repeats as are said to show it."""
    rows = []
    for level in (ALPHA, ALPHA / 3, ALPHA / 15):
        n = int(repeats_needed(TRUTH.spread, level))
        p = stats.ttest_1samp(rng.normal(MIN_EFFECT, TRUTH.spread, (studies, n)), 0, axis=1).pvalue
        rows.append([f"{level:.2g}", f"{n}", f"{(p <= level).mean():.1%}"])
    return markdown(["level", "repeats needed", "shown"], rows)


def equal(rng: np.random.Generator, studies: int) -> str:
    """Return a table of how often equal losses are told apart, which 5 % are allowed to be."""
    rows = []
    for losses, n, shared in product((2, 3, 6), (5, 10), (0.0, 0.5, 1.0)):
        shares = told_apart(rng, losses=losses, n=n, shared=shared, studies=studies)
        rows.append([f"{losses}", f"{n}", f"{shared:g}", *(f"{share:.1%}" for share in shares)])
    header = ["losses", "n", "shared luck", "any", "the winner and another"]
    header += ["so, corrected for its pairs only", "winner's interval covers"]
    return markdown(header, rows)


def told_apart(
    rng: np.random.Generator, *, losses: int, n: int, shared: float, studies: int
) -> tuple[float, float, float, float]:
    """Return in what share of studies equal losses are told apart.

    Any; the winner from another; that, if p-values were corrected for the winner's pairs only; and
    how often the interval of the winner's accuracy covers it.
    """
    world = World(means={str(loss): 0.7 for loss in range(losses)}, shared=shared)
    validation, test = world.draw(rng, n, studies)
    winner = validation.mean(1).argmax(1)[:, None]
    pairs = list(combinations(range(losses), 2))
    differences = np.stack([test[..., i] - test[..., j] for i, j in pairs], axis=-1)
    p = stats.ttest_1samp(differences, 0, axis=1).pvalue  # (studies, pairs)
    has_winner = np.stack([(winner == pair).any(1) for pair in pairs], axis=-1)
    # Holm's method finds something if its first step does: the least p, by their number.
    is_found = p * len(pairs) <= ALPHA
    is_found_alone = has_winner & (p * (losses - 1) <= ALPHA)
    of_winner = np.take_along_axis(test, winner[:, None], axis=-1)[..., 0]
    low, high = interval(of_winner)
    return (
        float(is_found.any(1).mean()),
        float((has_winner & is_found).any(1).mean()),
        float(is_found_alone.any(1).mean()),
        float(((low <= 0.7) & (high >= 0.7)).mean()),
    )


def coverage(rng: np.random.Generator, studies: int) -> str:
    """Return a table of how often nominal 95 % intervals of a mean cover it."""
    rows = []
    for (name, draw), n in product(POPULATIONS.items(), (5, 10, 20)):
        mean = float(draw(rng, (2_000_000,)).mean())
        values = draw(rng, (studies, n))
        values = values[np.ptp(values, axis=1) > 1e-9]  # no way gives an interval without spread
        cells = []
        for way in WAYS.values():
            low, high = way(values, rng)
            width = np.median(high - low) / np.median(np.subtract(*interval(values)[::-1]))
            cells.append(f"{((low <= mean) & (mean <= high)).mean():.1%}, {width:.2f}")
        rows.append([name, f"{n}", *cells])
    return markdown(["values", "n", *(f"{way}: covers, width" for way in WAYS)], rows)


def by_t(values: Floats, rng: np.random.Generator) -> tuple[Floats, Floats]:  # noqa: ARG001
    """Return Student's intervals of the means of values (studies, n)."""
    return interval(values)


def by_scipy(method: str) -> Way:
    """Return bootstrap intervals by one of the methods of `scipy.stats.bootstrap`."""

    def way(values: Floats, rng: np.random.Generator) -> tuple[Floats, Floats]:
        found = [
            stats.bootstrap(
                (part,), np.mean, axis=-1, n_resamples=RESAMPLES, method=method, rng=rng
            ).confidence_interval
            for part in np.array_split(values, max(1, len(values) // 100))
        ]
        return np.concatenate([f.low for f in found]), np.concatenate([f.high for f in found])

    return way


def by_studentized(values: Floats, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Return bootstrap-t intervals (Efron and Tibshirani 1993, section 12.5)."""
    n, lows, highs = values.shape[-1], [], []
    for part in np.array_split(values, max(1, len(values) // 100)):
        drawn = rng.integers(n, size=(len(part), RESAMPLES, n))
        resamples = np.take_along_axis(part[:, None], drawn, axis=-1)
        mean, error = part.mean(-1), stats.sem(part, axis=-1)
        errors = np.maximum(stats.sem(resamples, axis=-1), 1e-12)
        t = (resamples.mean(-1) - mean[:, None]) / errors
        low, high = np.quantile(t, [ALPHA / 2, 1 - ALPHA / 2], axis=-1)
        lows.append(mean - high * error)
        highs.append(mean - low * error)
    return np.concatenate(lows), np.concatenate(highs)


def digits(rng: np.random.Generator, size: tuple[int, ...]) -> Floats:
    """Return accuracies on 360 test images, like those of scikit-learn's digits."""
    return rng.binomial(360, np.clip(rng.normal(0.985, 0.004, size), 0, 1)) / 360


Way = Callable[[Floats, np.random.Generator], tuple[Floats, Floats]]
WAYS: dict[str, Way] = {
    "Student's t": by_t,
    "percentile": by_scipy("percentile"),
    "BCa": by_scipy("BCa"),
    "studentized": by_studentized,
}
POPULATIONS: dict[str, Callable[[np.random.Generator, tuple[int, ...]], Floats]] = {
    "normal": lambda rng, size: rng.normal(size=size),
    "skewness −0.5": lambda rng, size: -rng.gamma(16, size=size),
    "skewness −1": lambda rng, size: -rng.gamma(4, size=size),
    "difference of two of skewness −1": lambda rng, size: (
        rng.gamma(4, size=size) - rng.gamma(4, size=size)
    ),
    "shares of 360": digits,
    "difference of two shares of 360": lambda rng, size: digits(rng, size) - digits(rng, size),
}


if __name__ == "__main__":
    main()
