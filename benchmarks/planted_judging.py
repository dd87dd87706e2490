"""What is said of planted studies, and whether it is so.

Studies are judged on arrays, which takes a twentieth of the time of `assess()`. The verdicts are
those of `experiments.comparison.pairs`; of each kind some studies go through `assess()` as well,
which must come to the same.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import special

from benchmarks.planted_studies import Floats, Study, results_of
from experiments.comparison.assessment import assess
from experiments.comparison.intervals import ALPHA, holm, p_beyond
from experiments.comparison.pairs import UNFAIRNESS, Doubts, Judge
from experiments.comparison.results import IRRELEVANT
from experiments.comparison.tables import OUTLYING_DISTANCE, outlying


@dataclass(frozen=True, kw_only=True, eq=False)
class Means:
    """Estimates of several means, as those of `experiments.comparison.intervals`."""

    mean: Floats
    variance: Floats
    """Of the mean; NaN if unknown."""
    df: Floats
    """Degrees of freedom of the variance."""
    least: Means | None = None
    """No interval is narrower than its one, and no p smaller."""

    def half_width(self, alpha: float = ALPHA) -> Floats:
        """Return half the widths of intervals."""
        own: Floats = -special.stdtrit(self.df, alpha / 2) * np.sqrt(self.variance)
        return own if self.least is None else np.fmax(own, self.least.half_width(alpha))

    def ends(self, alpha: float = ALPHA) -> tuple[Floats, Floats]:
        """Return the ends of intervals."""
        half = self.half_width(alpha)
        return self.mean - half, self.mean + half

    def p(self, margin: float) -> Floats:
        """Return two-sided p of t-tests for means beyond ± margin."""
        own: Floats = p_beyond(self.mean, self.variance, self.df, margin)
        return own if self.least is None else np.fmax(own, self.least.p(margin))


@dataclass(frozen=True, kw_only=True, eq=False)
class Said:
    """What a comparison says: in the order of validation accuracies."""

    order: Sequence[int]
    """The columns of its losses, the best first."""
    accuracies: tuple[Means, Means]
    """Over new trainings; over new trainings and new images."""
    pairs: Sequence[tuple[int, int]]
    """The columns of each pair, the better one in validation first."""
    differences: tuple[Means, Means]
    """Of first − loss, likewise."""
    verdicts: tuple[Sequence[str], Sequence[str]]
    """On `loss`."""


def judge(study: Study) -> Said:
    """Return what `assess()` says, of a study in which nothing diverged."""
    test = study.test
    order = [int(at) for at in np.argsort(-study.validation.mean(axis=0), kind="stable")]
    pairs = list(combinations(order, 2))
    first, loss = (list(each) for each in zip(*pairs, strict=True))
    values = np.round(test[:, first] - test[:, loss], 9)
    differences = _means(values, *_of_pairs(study.hits, first, loss))
    ahead, ties = (values > 0).sum(axis=0), (values == 0).sum(axis=0)
    rows = [
        {
            "first": pair[0],
            "loss": pair[1],
            "n": len(values),
            "sd": float(np.ptp(values[:, at])),
            "difference": float(differences[0].mean[at]),
            "ahead": int(ahead[at]),
            "ties": int(ties[at]),
        }
        for at, pair in enumerate(pairs)
    ]
    outliers: Any = [at for at in order if _outlies(test[:, at])]
    margin = UNFAIRNESS if study.is_staged else 0.0
    says = Judge(min_effect=IRRELEVANT, doubts=Doubts(outlying=outliers))
    these, new = (
        [
            says(row, p, (low, high))
            for row, p, low, high in zip(
                rows, holm(each.p(margin)), *each.ends(_level(each)), strict=True
            )
        ]
        for each in differences
    )
    return Said(
        order=order,
        accuracies=_means(test[:, order], *_of_losses(study.hits[order])),
        pairs=pairs,
        differences=differences,
        verdicts=(these, new),
    )


def _level(means: Means) -> float:
    return ALPHA / max(1, int(np.isfinite(means.variance).sum()))


def _outlies(values: Floats) -> bool:
    if np.ptp(values) <= OUTLYING_DISTANCE:  # this saves time
        return False
    return not outlying(pd.DataFrame({"outcome": "complete", "test_accuracy": values})).empty


Sums = tuple[Floats, Floats, Floats, int]
"""Of hits or their differences: of squares, of the squares of the sums of repeats, of the squares
of the sums of images; and how many images there are."""


def _of_losses(hits: npt.NDArray[np.int8]) -> Sums:
    of_repeats: Floats = hits.sum(axis=2, dtype=np.float64)
    of_images: Floats = hits.sum(axis=1, dtype=np.float64)
    squares = (of_repeats**2).sum(axis=1), (of_images**2).sum(axis=1)
    return of_repeats.sum(axis=1), *squares, hits.shape[2]


def _of_pairs(hits: npt.NDArray[np.int8], first: Sequence[int], loss: Sequence[int]) -> Sums:
    of_repeats = hits.sum(axis=2, dtype=np.int64)[:, :, None]
    of_images = hits.sum(axis=1, dtype=np.float64)
    flat = hits.reshape(len(hits), -1).astype(np.float32)  # exact up to 2²⁴

    def squares(products: Floats) -> Floats:
        own = np.diag(products)
        found: Floats = own[first] + own[loss] - 2 * products[first, loss]
        return found

    of_differences = ((of_repeats[first] - of_repeats[loss]) ** 2).sum(axis=(1, 2))
    return (
        squares((flat @ flat.T).astype(np.float64)),
        of_differences.astype(np.float64),
        squares(of_images @ of_images.T),
        hits.shape[2],
    )


def _means(
    values: Floats, squares: Floats, by_repeat: Floats, by_image: Floats, images: int
) -> tuple[Means, Means]:
    """Return the estimates of means over repeats, from values (repeats, means) and sums of hits."""
    n = len(values)
    mean = values.mean(axis=0)
    variance = np.where(np.ptp(values, axis=0) > 0, values.var(axis=0, ddof=1) / n, math.nan)
    trainings = Means(mean=mean, variance=variance, df=np.full(len(mean), n - 1.0))
    common = np.round(mean * n * images) ** 2 / (n * images)
    between = by_repeat / images - common, by_image / n - common
    sums = np.array([*between, squares - common - between[0] - between[1]])
    df = np.array([n - 1, images - 1, (n - 1) * (images - 1)])[:, None]
    mean_squares = np.maximum(sums, 0) / df
    both = mean_squares[0] + np.maximum(0, mean_squares[1] - mean_squares[2])
    freedom = both**2 / (mean_squares**2 / df).sum(axis=0)
    both = np.where(np.isnan(variance), math.nan, both / (n * images))
    return trainings, Means(mean=mean, variance=both, df=freedom, least=trainings)


def check(study: Study, said: Said) -> None:
    """Compare with what `assess()` says of the same study."""
    found = assess(results_of(study))
    names = study.names
    assert list(found.table["loss"]) == [names[at] for at in said.order]
    for prefixes, table, means in (
        (("accuracy_", "images_"), found.table, said.accuracies),
        (("", "images_"), found.pairs, said.differences),
    ):
        for prefix, each in zip(prefixes, means, strict=True):
            for name, ends in zip(("low", "high"), each.ends(), strict=True):
                clipped = ends.clip(0 if table is found.table else -1, 1)
                np.testing.assert_allclose(table[f"{prefix}{name}"], clipped, atol=1e-9)
    pairs = zip(found.pairs["first"], found.pairs["loss"], strict=True)
    assert list(pairs) == [(names[first], names[loss]) for first, loss in said.pairs]
    for column, verdicts in zip(("verdict", "images_verdict"), said.verdicts, strict=True):
        assert list(found.pairs[column]) == list(verdicts)


def verify(study: Study, said: Said) -> Counter[str]:
    """Count what is said and true, and with " of", how often it could be.

    `false` is what is not so of best accuracies, `reversed` what is not so of the losses as they
    are tuned: these differ, if only by as much as the search is unfair.
    """
    counts: Counter[str] = Counter()

    def add(what: str, is_true: bool | np.bool_) -> None:
        counts.update({what: int(is_true), f"{what} of": 1})

    means = [loss.mean for loss in study.losses]
    truths: dict[str, Sequence[float]] = {"these": list(study.on_these), "new": means}
    for (images, true), accuracies, differences, verdicts in zip(
        truths.items(), said.accuracies, said.differences, said.verdicts, strict=True
    ):
        low, high = accuracies.ends()
        covers = [low[at] <= true[loss] <= high[at] for at, loss in enumerate(said.order)]
        counts.update({f"accuracy {images}": sum(covers), f"accuracy {images} of": len(covers)})
        add(f"winner {images}", covers[0])
        low, high = differences.ends()
        wrong = reversed_ = False
        for at, (first, loss) in enumerate(said.pairs):
            difference = true[first] - true[loss]
            add(f"difference {images}", low[at] <= difference <= high[at])
            lead = round(study.losses[first].best - study.losses[loss].best, 9)
            is_so = holds(verdicts[at], lead, difference)
            wrong |= is_so is False
            reversed_ |= holds(verdicts[at], difference, difference) is False
            if lead:
                add(f"shown {images}", verdicts[at] in ("worse", "better") and is_so is True)
        add(f"false {images}", wrong)
        add(f"reversed {images}", reversed_)
    return counts


def holds(verdict: str, lead: float, difference: float) -> bool | None:
    """Return whether a verdict is so, given the truth; None if it decides nothing.

    The lead is that of best accuracies; the difference is what the verdict is about.
    """
    if verdict == "equal":
        return bool(abs(difference) <= IRRELEVANT)
    return {"worse": bool(lead > 0), "better": bool(lead < 0)}.get(verdict.split()[-1])
