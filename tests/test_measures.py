"""Accuracy, precision, recall, calibration: beside slow code, scikit-learn, SciPy, and papers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn import metrics

from tracking.evaluation.metrics import BINS, Measures, MetricsAccumulator, wilson


def sample(
    count: int, num_classes: int, *, seed: int = 0
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return true classes, among which the last is not, and float32 probabilities."""
    random = np.random.default_rng(seed)
    true = random.integers(0, max(1, num_classes - 1), count)
    logits = 2 * random.normal(size=(count, num_classes))
    logits[np.arange(count), true] += 1
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return true, probabilities.astype(np.float32)


def counted(true: Any, probabilities: Any, *, batch_size: int = 10_000) -> MetricsAccumulator:
    true, probabilities = np.asarray(true, np.int64), np.asarray(probabilities)
    counter = MetricsAccumulator([f"class {k}" for k in range(probabilities.shape[1])])
    for start in range(0, len(true), batch_size):
        batch = slice(start, start + batch_size)
        counter.add(true[batch], probabilities[batch])
    return counter


def measured(true: Any, probabilities: Any, **options: Any) -> Measures:
    return counted(true, probabilities, **options).measures()


# Intervals


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        # Newcombe (1998), Two-sided confidence intervals for the single proportion, table I
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_intervals_are_those_of_newcombes_table(
    correct: int, total: int, low: float, high: float
) -> None:
    share, *ends = wilson(np.array(correct), np.array(total))
    assert share == correct / total
    assert ends == pytest.approx([low, high], abs=5e-5)


def test_intervals_are_scipys_and_hold_their_share() -> None:
    totals = np.repeat([1, 2, 7, 100, 12345], 5)
    corrects = np.array(
        [round(total * q) for total, q in zip(totals, [0, 0.1, 0.5, 0.9, 1] * 5, strict=True)]
    )
    shares, lows, highs = wilson(corrects, totals)
    for correct, total, share, low, high in zip(corrects, totals, shares, lows, highs, strict=True):
        expected = binomtest(correct, total).proportion_ci(0.95, "wilson")
        assert (low, high) == pytest.approx(tuple(expected), abs=1e-12)
        assert 0 <= low <= share <= high <= 1


def test_an_interval_of_none_begins_at_zero_and_one_of_all_ends_at_one_exactly() -> None:
    totals = np.arange(1, 1000)
    assert set(wilson(np.zeros_like(totals), totals)[1]) == {0.0}
    assert set(wilson(totals, totals)[2]) == {1.0}


def test_a_share_of_nothing_is_missing() -> None:
    assert np.isnan(wilson(np.array([0]), np.array([0]))).all()


# Calibration


def test_the_calibration_error_of_an_example_is_that_by_hand() -> None:
    """Two images in a bin at 0.9 and 0.95, one right; two at 0.55, both right."""
    true = [0, 1, 0, 0]
    probabilities = [[0.9, 0.1], [0.95, 0.05], [0.55, 0.45], [0.55, 0.45]]
    # 0.9 is in (13/15, 14/15], 0.95 in (14/15, 1], 0.55 in (8/15, 9/15]
    by_hand = 1 / 4 * abs(1 - 0.9) + 1 / 4 * abs(0 - 0.95) + 2 / 4 * abs(1 - 0.55)
    measures = measured(true, probabilities)
    assert measures.calibration_error == pytest.approx(by_hand, abs=1e-12)
    bins = measures.per_bin()
    assert bins["images"].tolist() == [0] * 8 + [2, 0, 0, 0, 0, 1, 1]
    assert bins["accuracy"].dropna().tolist() == [1, 1, 0]
    assert bins["confidence"].dropna().tolist() == pytest.approx([0.55, 0.9, 0.95])


def test_a_bin_holds_its_upper_end_as_in_guo_2017() -> None:
    third, above = 5 / 15, np.nextafter(5 / 15, 1)
    bins = measured([0, 0], [[third, 0.3, 0.3], [above, 0.3, 0.3]]).per_bin()
    assert bins["images"].to_numpy().nonzero()[0].tolist() == [4, 5]
    ends = measured([0, 0], [[1.0, 0.0], [0.0, 0.0]]).per_bin()
    assert ends["images"].to_numpy().nonzero()[0].tolist() == [0, 14]


def slow_calibration_error(true: Any, probabilities: Any) -> float:
    total = 0.0
    for m in range(1, BINS + 1):
        rows = [
            (label == row.argmax(), float(row.max()))
            for label, row in zip(true, probabilities, strict=True)
            if (m - 1) / BINS < row.max() <= m / BINS
        ]
        if rows:
            accuracy, confidence = np.mean(rows, axis=0)
            total += len(rows) / len(true) * abs(accuracy - confidence)
    return total


@pytest.mark.parametrize(("count", "num_classes"), [(1, 2), (50, 1), (300, 2), (1000, 10)])
def test_calibration_and_brier_score_are_those_of_slow_code(count: int, num_classes: int) -> None:
    true, probabilities = sample(count, num_classes)
    measures = measured(true, probabilities)
    exact = probabilities.astype(float)
    assert measures.calibration_error == pytest.approx(slow_calibration_error(true, exact))
    truth = np.eye(num_classes)[true]
    brier = ((exact - truth) ** 2).sum(axis=1).mean()
    assert measures.brier_score == pytest.approx(brier, abs=1e-12)


# Classes


@pytest.mark.parametrize(("count", "num_classes"), [(40, 2), (500, 5), (3000, 100)])
def test_confusion_precision_recall_and_f1_are_scikit_learns(count: int, num_classes: int) -> None:
    true, probabilities = sample(count, num_classes)
    predicted, classes = probabilities.argmax(axis=1), range(num_classes)
    measures = measured(true, probabilities)
    expected = metrics.confusion_matrix(true, predicted, labels=classes)
    assert measures.confusion.tolist() == expected.tolist()
    assert measures.accuracy[0] == metrics.accuracy_score(true, predicted)
    table = measures.per_class()
    numbers = metrics.precision_recall_fscore_support(
        true, predicted, labels=classes, zero_division=np.nan
    )
    names = ("precision", "recall", "f1", "images")
    for name, values in zip(names, numbers, strict=True):
        np.testing.assert_allclose(table[name], values, rtol=1e-12, err_msg=name)


def test_of_a_class_without_images_there_is_no_recall() -> None:
    """Rather than one of 0; nor precision, where nothing was predicted as the class."""
    table = measured([0, 0], [[0.5, 0.3, 0.2], [0.3, 0.5, 0.2]]).per_class().set_index("class")
    assert table.loc["class 0", ["precision", "recall"]].tolist() == [1, 0.5]
    assert table.loc["class 1", "precision"] == 0
    assert math.isnan(table.loc["class 1", "recall"])
    assert table.loc["class 1", "f1"] == 0
    missing = table.loc["class 2", ["precision", "precision_low", "recall", "recall_high", "f1"]]
    assert missing.isna().all()


def test_of_equal_probabilities_the_first_is_the_prediction() -> None:
    measures = measured([0, 1, 2], np.full((3, 3), 1 / 3, np.float32))
    assert measures.confusion[:, 0].tolist() == [1, 1, 1]


def test_the_most_frequent_confusions_come_first_and_ties_in_the_order_of_classes() -> None:
    eye = np.eye(3)
    measures = measured([0, 0, 1, 2, 2, 2], eye[[2, 2, 0, 1, 0, 2]])
    first, *others = measures.confused(10)
    assert first == ("class 0", "class 2", 2)
    assert others == [("class 1", "class 0", 1), ("class 2", "class 0", 1),
                      ("class 2", "class 1", 1)]  # fmt: skip
    assert measures.confused(1) == [first]
    assert measured([0, 1, 2], eye).confused(10) == []


# Counting


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_batches_make_no_difference(batch_size: int) -> None:
    true, probabilities = sample(300, 4)
    one, many = measured(true, probabilities), measured(true, probabilities, batch_size=batch_size)
    assert many.confusion.tolist() == one.confusion.tolist()
    assert many.calibration_error == pytest.approx(one.calibration_error, rel=1e-12)
    assert many.brier_score == pytest.approx(one.brier_score, rel=1e-12)


def test_what_is_kept_does_not_grow_with_the_images() -> None:
    def size(counter: MetricsAccumulator) -> int:
        assert not any(isinstance(value, list) for value in vars(counter).values())
        return sum(getattr(value, "nbytes", 8) for value in vars(counter).values())

    assert size(counted(*sample(5000, 4), batch_size=100)) == size(counted(*sample(1, 4)))


def test_images_without_a_label_count_as_such_and_nowhere_else() -> None:
    true, probabilities = sample(100, 3)
    known = np.arange(100) % 4 > 0
    counter = counted(np.where(known, true, -1), probabilities)
    assert counter.unlabelled == 25
    measures, expected = counter.measures(), measured(true[known], probabilities[known])
    assert measures.labelled == 75
    assert measures.confusion.tolist() == expected.confusion.tolist()
    assert measures.calibration_error == pytest.approx(expected.calibration_error)


@pytest.mark.parametrize("true", [[], [-1, -1]])
def test_without_a_labelled_image_there_is_nothing_to_measure(true: list[int]) -> None:
    with pytest.raises(ValueError, match="no image that could be read and whose class is known"):
        measured(true, np.full((len(true), 2), 0.5))


@pytest.mark.parametrize("wrong", [math.nan, -0.5, 1.5, math.inf])
def test_what_is_no_probability_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match=f"must be from 0 to 1, not {wrong}"):
        counted([0], [[0.5, wrong]])


def test_a_sum_that_rounding_took_beyond_one_is_none_the_less_a_probability() -> None:
    assert measured([0], [[np.float32(1.0000001), 0]]).per_bin()["images"].iloc[-1] == 1
