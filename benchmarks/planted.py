"""How often is true what a comparison says? `python -m benchmarks.planted`.

It draws studies of which the truth is known. Losses have true accuracies. Each repeat adds noise
that all of its losses share (from the split), and noise of each loss, of which a part is common to
the validation and the test split. It prints:

- with one loss half a point better than two equal ones: how often each statement is made, and how
  often it is true;
- with that lead: how often it is shown by the number of repeats that is said to show it;
- with equal losses only: how often any are said to differ. At most 5 % are allowed.

The Monte-Carlo standard error of a share is at most 0.5 / √studies: 1.1 points for 2,000.
"""

from __future__ import annotations

import gc
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from benchmarks.common import make_parser, markdown
from experiments.comparison.assessment import Assessment, assess
from experiments.comparison.intervals import ALPHA, interval
from experiments.comparison.pairs import MIN_EFFECT, repeats_needed
from experiments.comparison.results import CURVE_COLUMNS, REPEAT_COLUMNS, TRIAL_COLUMNS, Results

Floats = npt.NDArray[np.float64]

NOISE, SPLIT_NOISE = 0.004, 0.003
"""Standard deviations of accuracy: of each loss in each repeat, and of all losses in a repeat."""
IMAGES = 10_000
"""Of the test split: an accuracy is a number of these images."""

REPEATS = (5, 10, 20, 40)
MANY = 10_000
"""Studies, where one takes no time."""


@dataclass(frozen=True, kw_only=True)
class World:
    """The truth that studies are drawn from."""

    means: dict[str, float]
    """The expected accuracy of each loss."""
    shared: float
    """The correlation of a loss' noise in validation with its noise in the test."""

    @property
    def spread(self) -> float:
        """Return the standard deviation of paired differences."""
        return NOISE * math.sqrt(2)

    def draw(
        self, rng: np.random.Generator, n: int, studies: int | None = None
    ) -> tuple[Floats, Floats]:
        """Return validation and test accuracies, each (n, losses) or (studies, n, losses)."""
        shape = (n,) if studies is None else (studies, n)
        size = (*shape, len(self.means))
        training = rng.normal(size=size) * math.sqrt(self.shared)
        means = np.array(list(self.means.values())) + SPLIT_NOISE * rng.normal(size=(*shape, 1))
        validation, test = (
            np.rint((means + NOISE * (training + rest)) * IMAGES) / IMAGES
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
    config = {"outcome": "complete", "learning_rate": 0.03, "batch_size": 64}
    repeats = [
        {
            **dict.fromkeys(REPEAT_COLUMNS, 0.5),
            **config,
            "loss": loss,
            "trial": seed * len(losses) + column,
            "seed": seed,
            "outcome": "diverged" if math.isnan(test[seed, column]) else "complete",
            "val_accuracy": validation[seed, column],
            "test_accuracy": test[seed, column],
            "test_evaluations": 1,
        }
        for seed in range(len(test))
        for column, loss in enumerate(losses)
    ]
    trials = [
        {**dict.fromkeys(TRIAL_COLUMNS, 0.5), **config, "loss": loss, "trial": trial}
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
    parser = make_parser("planted", __doc__)
    parser.add_argument("--studies", type=int, default=2000, help="of the first table")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    options = parser.parse_args()
    gc.freeze()  # statsmodels collects garbage in each correction: give it less to look at
    rng = np.random.default_rng(options.seed)
    lead = f"{100 * MIN_EFFECT:g} points"
    print(f"One loss {lead} better than two equal ones, {options.studies:,} studies\n")
    print(f"{planted(rng, options.studies)}\n")
    print(f"A lead of {lead}, shown by the repeats that are said to show it, {MANY:,} studies")
    print(f"\n{power(rng, MANY)}\n")
    print(f"Equal losses that are said to differ, {MANY:,} studies\n\n{equal(rng, MANY)}")


def planted(rng: np.random.Generator, studies: int) -> str:
    """Return a table of the statements about a planted truth, and how often they are true."""
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
    """Count how often each of `CLAIMS` is made or true, and with " of", how often it could be."""
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
    """Return the share in which something was said, of the times that it could be."""
    return f"{counts[said] / counts[f'{said} of']:.1%}"


def power(rng: np.random.Generator, studies: int) -> str:
    """Return a table of how often a lead is shown by the repeats that are said to show it."""
    rows = []
    for level in (ALPHA, ALPHA / 3, ALPHA / 15):
        n = int(repeats_needed(TRUTH.spread, level))
        p = stats.ttest_1samp(rng.normal(MIN_EFFECT, TRUTH.spread, (studies, n)), 0, axis=1).pvalue
        rows.append([f"{level:.2g}", f"{n}", f"{(p <= level).mean():.1%}"])
    return markdown(["level", "repeats needed", "shown"], rows)


def equal(rng: np.random.Generator, studies: int) -> str:
    """Return a table of how often equal losses are said to differ; 5 % are allowed."""
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
    """Return the share of studies in which equal losses are said to differ.

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


if __name__ == "__main__":
    main()
