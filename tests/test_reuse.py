from __future__ import annotations

from dataclasses import replace

import pytest

from cnn.config import TrainConfig
from cnn.data import Dataset
from experiments.study.reuse import training_key

CONFIG = TrainConfig(loss="mse", learning_rate=0.1, batch_size=4)
PROVENANCE = {"source": "0" * 32, "torch": "2.15.0", "commit": "a", "python": "3.11.7"}
ARITHMETIC = {"processor": "x86_64 family 6 model 167", "threads": "1"}


@pytest.fixture(scope="module")
def data(coloured_noise: Dataset) -> Dataset:
    return coloured_noise


def test_equal_trainings_have_equal_keys(data: Dataset) -> None:
    first = training_key(CONFIG, data, PROVENANCE, ARITHMETIC)
    assert training_key(replace(CONFIG), data, dict(PROVENANCE), dict(ARITHMETIC)) == first
    assert len(first) == 32


@pytest.mark.parametrize(
    "change",
    [
        {"loss": "l1"},
        {"learning_rate": 0.1 + 1e-12},
        {"batch_size": 5},
        {"epochs": 9},
        {"seed": 1},
        {"optimizer": "adam"},
        {"network": "cnn_relu"},
        {"precision": "bfloat16"},
        {"label_smoothing": 0.1},
        {"augment": "flip"},
        {"device": "cuda"},
    ],
)
def test_each_part_of_a_configuration_is_in_the_key(
    data: Dataset, change: dict[str, object]
) -> None:
    other = replace(CONFIG, **change)  # type: ignore[arg-type]
    keys = {training_key(each, data, PROVENANCE, ARITHMETIC) for each in (CONFIG, other)}
    assert len(keys) == 2


@pytest.mark.parametrize("part", ["source", "torch"])
def test_another_code_or_version_of_pytorch_has_another_key(data: Dataset, part: str) -> None:
    before, after = PROVENANCE, {**PROVENANCE, part: "other"}
    keys = {training_key(CONFIG, data, each, ARITHMETIC) for each in (before, after)}
    assert len(keys) == 2


@pytest.mark.parametrize("part", ["commit", "python"])
def test_what_does_not_change_results_is_not_in_the_key(data: Dataset, part: str) -> None:
    before, after = PROVENANCE, {**PROVENANCE, part: "other"}
    keys = {training_key(CONFIG, data, each, ARITHMETIC) for each in (before, after)}
    assert len(keys) == 1


@pytest.mark.parametrize("part", ["processor", "threads"])
def test_another_processors_arithmetic_has_another_key(data: Dataset, part: str) -> None:
    before, after = ARITHMETIC, {**ARITHMETIC, part: "other"}
    keys = {training_key(CONFIG, data, PROVENANCE, each) for each in (before, after)}
    assert len(keys) == 2


def test_where_the_processor_is_unknown_there_is_no_key(data: Dataset) -> None:
    assert not training_key(CONFIG, data, PROVENANCE, {"threads": "1"})


def test_other_data_have_another_key(data: Dataset) -> None:
    other = replace(data, digest="1" * 32)
    keys = {training_key(CONFIG, each, PROVENANCE, ARITHMETIC) for each in (data, other)}
    assert len(keys) == 2
