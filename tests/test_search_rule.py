from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import pytest

from experiments.comparison.search_rule import (
    Search,
    Training,
    best_of,
    candidates,
    steps,
    without_worst,
)
from experiments.study.domains import Choices, Range

DOMAINS = {
    "learning_rate": Range(0.001, 1.0, log=True),
    "batch_size": Choices((16, 32, 64, 128)),
}
Accuracy = Callable[[Mapping[str, Any]], float]


def peak(rate: float, *, size: int = 64, diverges_at: float = math.inf) -> Accuracy:
    """Return accuracies with one best configuration; from some rate on, training diverges."""

    def accuracy(configuration: Mapping[str, Any]) -> float:
        factor = configuration["batch_size"] / size
        distance = math.log10(configuration["learning_rate"] / rate) - 0.8 * math.log10(factor)
        if configuration["learning_rate"] > diverges_at * factor**0.8:
            return math.nan
        return 0.7 - 0.1 * distance**2 - 0.003 * math.log2(factor) ** 2

    return accuracy


def refined(
    accuracy: Accuracy, trials: int = 11, *, seed: int = 0, **others: Any
) -> list[Training]:
    """Return the trainings of a search but those on fresh seeds."""
    search = Search(domains=DOMAINS, seed=seed, **others)
    done: list[Training] = []
    for step in steps(trials):
        if step.stage == "explore":
            wanted = search.explore(step.trainings)
        elif step.stage == "refine":
            wanted = [search.refine(step.number, done)]
        else:
            break
        done += [Training(configuration=each, accuracy=accuracy(each)) for each in wanted]
    return done


@pytest.mark.parametrize("trials", [1, 2, 4, 7, 11, 13, 20, 33, 100])
def test_the_steps_are_as_many_trainings_as_were_asked_for(trials: int) -> None:
    assert sum(step.trainings for step in steps(trials)) == trials


def test_a_search_explores_then_refines_and_then_chooses() -> None:
    assert [step.name for step in steps(11)] == [
        "explore",
        *(f"refine-{number}" for number in range(1, 8)),
    ]
    assert [(step.name, step.trainings) for step in steps(20)][-2:] == [
        ("choose-1", 3),
        ("choose-2", 2),
    ]


def test_more_parameters_are_explored_by_more_trainings() -> None:
    assert steps(20, num_parameters=4)[0].trainings == 8


def test_the_first_configurations_are_spread_over_the_ranges() -> None:
    rates = [each["learning_rate"] for each in Search(domains=DOMAINS, seed=3).explore(4)]
    assert sorted(int(4 * math.log10(rate / 0.001) / 3) for rate in rates) == [0, 1, 2, 3]


def test_a_larger_search_begins_like_a_smaller_one() -> None:
    search = Search(domains=DOMAINS, seed=3)
    assert search.explore(8)[:4] == search.explore(4)


def test_another_seed_explores_other_configurations() -> None:
    assert Search(domains=DOMAINS, seed=1).explore(4) != Search(domains=DOMAINS, seed=2).explore(4)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rate", [0.002, 0.01, 0.1, 0.5, 3.0])
def test_a_search_ends_near_the_best_configuration(rate: float, seed: int) -> None:
    best = best_of(refined(peak(rate), seed=seed))
    assert best.accuracy > 0.7 - 0.012


@pytest.mark.parametrize("seed", range(5))
def test_a_search_finds_a_best_rate_below_one_that_diverges(seed: int) -> None:
    done = refined(peak(0.003, diverges_at=0.008), seed=seed)
    assert best_of([each for each in done if not math.isnan(each.accuracy)]).accuracy > 0.685


def test_it_goes_beyond_an_edge_where_the_best_is() -> None:
    done = refined(peak(10.0))
    assert max(each.configuration["learning_rate"] for each in done) > 1.0


def test_it_goes_beyond_the_batch_sizes_where_the_best_is_and_not_much_further() -> None:
    sizes = [
        each.configuration["batch_size"]
        for seed in range(5)
        for each in refined(peak(0.05, size=1024), trials=25, seed=seed)
    ]
    assert 128 < max(sizes) <= 4 * 128


def test_a_batch_size_never_exceeds_what_there_is() -> None:
    done = refined(peak(0.05, size=1024), trials=25, max_batch_size=128)
    assert max(each.configuration["batch_size"] for each in done) == 128


def test_one_batch_size_stays() -> None:
    search = Search(domains=DOMAINS | {"batch_size": Choices((64,))}, seed=0)
    done = [Training(configuration=each, accuracy=0.5) for each in search.explore(4)]
    for number in range(1, 8):
        configuration = search.refine(number, done)
        assert configuration["batch_size"] == 64
        done.append(Training(configuration=configuration, accuracy=0.5))


def test_the_learning_rate_moves_with_the_batch_size() -> None:
    done = refined(peak(0.05))
    for before, after in pairwise(range(4, 11)):
        del before
        changed, earlier = done[after].configuration, best_of(done[:after]).configuration
        factor = changed["batch_size"] / earlier["batch_size"]
        if factor != 1:
            expected = earlier["learning_rate"] * factor**0.8
            assert changed["learning_rate"] == pytest.approx(expected)
            return
    pytest.fail("no batch size was changed")


def test_where_all_diverge_it_tries_lower_rates() -> None:
    done = refined(peak(1e-5, diverges_at=2e-4))
    rates = [each.configuration["learning_rate"] for each in done]
    assert min(rates) < 2e-4
    assert not math.isnan(max(each.accuracy for each in done[6:]))


def test_a_worse_batch_size_at_the_best_rate_does_not_close_the_range() -> None:
    search = Search(domains=DOMAINS, seed=0)
    tried = [(0.1, 64, 0.7), (0.01, 64, 0.5), (0.22, 128, 0.6)]  # 0.22 at 128 is 0.125 at 64
    done = [
        Training(configuration={"learning_rate": rate, "batch_size": size}, accuracy=accuracy)
        for rate, size, accuracy in tried
    ]
    assert search.refine(1, done)["learning_rate"] > 0.2


def test_equal_results_lead_to_equal_configurations() -> None:
    assert refined(peak(0.1), seed=4) == refined(peak(0.1), seed=4)


def test_other_parameters_are_varied_within_their_domains() -> None:
    domains = {
        **DOMAINS,
        "momentum": Range(0.5, 0.99),
        "schedule": Choices(("one_cycle", "cosine", "constant")),
    }
    search = Search(domains=domains, seed=0)
    done = [
        Training(configuration=each, accuracy=0.5 + each["momentum"] / 100)
        for each in search.explore(8)
    ]
    for number in range(1, 13):
        configuration = search.refine(number, done)
        assert set(configuration) == set(domains)
        assert 0.5 <= configuration["momentum"] <= 0.99
        accuracy = 0.5 + configuration["momentum"] / 100
        done.append(Training(configuration=configuration, accuracy=accuracy))
    assert best_of(done).configuration["momentum"] > 0.95
    assert len({each.configuration["schedule"] for each in done[8:]}) > 1


def test_candidates_are_the_best_complete_ones() -> None:
    accuracies = [0.5, math.nan, 0.7, 0.6]
    done = [Training(configuration={}, accuracy=each) for each in accuracies]
    assert candidates(done, 2) == [2, 3]
    assert candidates(done, 4) == [2, 3, 0, 1]


def test_each_round_drops_the_worst_by_its_mean() -> None:
    assert without_worst({4: [0.6, 0.7], 5: [0.7, 0.7], 6: [0.5, 0.9]}) == [5, 6]


def test_a_candidate_that_diverged_on_a_fresh_seed_is_the_worst() -> None:
    assert without_worst({4: [0.9, math.nan], 5: [0.1, 0.1]}) == [5]
