"""Measures of predictions, counted batch by batch in constant memory: K×K + 3×15 numbers."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pandas as pd

    Ints = npt.NDArray[np.int64]
    Floats = npt.NDArray[np.float64]

BINS = 15
"""Equal bins of the confidence, as in Guo et al. (2017)."""

COVERAGE = 0.95
"""The confidence level of the intervals."""

# A sum of K float32 numbers may exceed 1 by rounding.
_ROUNDING = 1e-3


class MetricsAccumulator:
    """Counts the predictions of images whose class is known.

    The prediction is the class with the highest probability, the first of equal ones. The
    confidence is this probability.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        import numpy as np

        size = len(classes)
        self.classes = tuple(classes)
        self.confusion: Ints = np.zeros((size, size), np.int64)
        self.bin_images: Ints = np.zeros(BINS, np.int64)
        self.bin_correct: Ints = np.zeros(BINS, np.int64)
        self.bin_confidence: Floats = np.zeros(BINS)
        self.squared_error = 0.0
        self.unlabelled = self.unreadable = 0

    def add(self, true: Ints, probabilities: npt.NDArray[np.floating[Any]]) -> None:
        """Count a batch.

        Args:
            true: (N,) positions of the true classes, -1 if unknown.
            probabilities: (N, K); ValueError if one is not from 0 to 1.
        """
        import numpy as np

        known = true >= 0
        self.unlabelled += int((~known).sum())
        true, probabilities = true[known], probabilities[known].astype(np.float64)
        # Negated, because every comparison with NaN is false.
        wrong = probabilities[~((probabilities >= -_ROUNDING) & (probabilities <= 1 + _ROUNDING))]
        if len(wrong):
            raise ValueError(f"probabilities must be from 0 to 1, not {wrong[0]}")
        rows = np.arange(len(true))
        predicted = probabilities.argmax(axis=1)
        confidence = probabilities[rows, predicted]
        # Bin m of M is ((m - 1) / M, m / M], as in Guo et al. (2017).
        place = np.digitize(confidence, np.linspace(0, 1, BINS + 1)[1:-1], right=True)
        np.add.at(self.confusion, (true, predicted), 1)
        self.bin_images += np.bincount(place, minlength=BINS)
        self.bin_correct += np.bincount(place[true == predicted], minlength=BINS)
        self.bin_confidence += np.bincount(place, weights=confidence, minlength=BINS)
        # Σₖ (pₖ - yₖ)², where y is 1 for the true class and else 0.
        truth = probabilities[rows, true]
        self.squared_error += float((probabilities**2).sum() - 2 * truth.sum() + len(true))

    def measures(self) -> Measures:
        """Return the measures of the counts, or raise ValueError if no image was labelled."""
        if not self.confusion.sum():
            raise ValueError("there is no image that could be read and whose class is known")
        return Measures(**deepcopy(vars(self)))


@dataclass(frozen=True, kw_only=True, eq=False)
class Measures:
    """Measures of the predictions of at least one labelled image; 0 / 0 is NaN."""

    classes: tuple[str, ...]
    confusion: Ints
    """(K, K) images: rows are the true classes, columns the predicted ones."""
    bin_images: Ints
    """(15,) images by their confidence."""
    bin_correct: Ints
    bin_confidence: Floats
    """(15,) sums of confidences."""
    squared_error: float
    unlabelled: int
    """Images whose class is unknown or not one of the model's; no measure includes them."""
    unreadable: int
    """Images that could not be read; no measure includes them."""

    @property
    def labelled(self) -> int:
        """How many images the measures are of."""
        return int(self.confusion.sum())

    @property
    def correct(self) -> int:
        """How many of them are predicted right."""
        return int(self.confusion.trace())

    @cached_property
    def accuracy(self) -> tuple[float, float, float]:
        """The share that is predicted right, and the ends of its interval."""
        import numpy as np

        share, low, high = wilson(np.array(self.correct), np.array(self.labelled))
        return float(share), float(low), float(high)

    @property
    def calibration_error(self) -> float:
        """The expected calibration error, 0 to 1: equation 5 of Guo et al. (2017), with 15 bins.

        On Calibration of Modern Neural Networks, ICML 2017.
        """
        return float(abs(self.bin_correct - self.bin_confidence).sum() / self.labelled)

    @property
    def brier_score(self) -> float:
        """The mean of Σₖ (pₖ - yₖ)², 0 (best) to 2 (Brier 1950).

        The negative log-likelihood would be infinite if a true class has probability 0, which
        losses with clipped outputs give.
        """
        return self.squared_error / self.labelled

    def per_class(self) -> pd.DataFrame:
        """Return a row for each class: counts, precision and recall with intervals, and F1."""
        import numpy as np
        import pandas as pd

        correct, support = self.confusion.diagonal(), self.confusion.sum(axis=1)
        predicted = self.confusion.sum(axis=0)
        columns: dict[str, Any] = {
            "class": pd.Series(self.classes, dtype=object),
            "images": support,
            "predicted": predicted,
            "correct": correct,
        }
        for name, total in (("precision", predicted), ("recall", support)):
            for end, values in zip(("", "_low", "_high"), wilson(correct, total), strict=True):
                columns[f"{name}{end}"] = values
        with np.errstate(invalid="ignore"):
            columns["f1"] = 2 * correct / (support + predicted)
        return pd.DataFrame(columns)

    def per_bin(self) -> pd.DataFrame:
        """Return a row for each bin of the confidence: its ends, its images and their accuracy."""
        import numpy as np
        import pandas as pd

        edges = np.linspace(0, 1, BINS + 1)
        columns: dict[str, Any] = {"above": edges[:-1], "up_to": edges[1:]}
        columns |= {"images": self.bin_images, "correct": self.bin_correct}
        with np.errstate(invalid="ignore"):
            columns["confidence"] = self.bin_confidence / self.bin_images
        shares = wilson(self.bin_correct, self.bin_images)
        columns |= zip(("accuracy", "accuracy_low", "accuracy_high"), shares, strict=True)
        return pd.DataFrame(columns)

    def confused(self, limit: int) -> list[tuple[str, str, int]]:
        """Return the most frequent confusions: true class, predicted class, images."""
        import numpy as np

        wrong = self.confusion.copy()
        np.fill_diagonal(wrong, 0)
        order = (-wrong).argsort(axis=None, kind="stable")[:limit]
        pairs = np.array(np.unravel_index(order, wrong.shape)).T.tolist()
        return [
            (self.classes[true], self.classes[predicted], int(wrong[true, predicted]))
            for true, predicted in pairs
            if wrong[true, predicted]
        ]


def wilson(correct: Ints, total: Ints) -> tuple[Floats, Floats, Floats]:
    """Return shares and the ends of their 95 % intervals, NaN if the total is 0.

    The score interval of Wilson (1927), Probable Inference, the Law of Succession, and Statistical
    Inference, JASA 22, 209-212. SciPy's `binomtest` takes 1 ms for each, and a second to import.
    """
    import numpy as np

    z2 = NormalDist().inv_cdf((1 + COVERAGE) / 2) ** 2
    with np.errstate(invalid="ignore", divide="ignore"):
        share = correct / total
        middle = (correct + z2 / 2) / (total + z2)
        half = np.sqrt(z2 * (share * (1 - share) * total + z2 / 4)) / (total + z2)
    # Exactly 1 if all are correct: rounding could put the share outside of its interval.
    return share, middle - half, np.where(correct == total, share, middle + half)
