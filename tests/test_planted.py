"""The planted comparisons: their worlds are what they are said to be, and so are their counts."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial
from small_sweep import small_settings

from benchmarks.planted import Cell, count, main
from benchmarks.planted_judging import Means, check, judge, verify
from benchmarks.planted_studies import LEVELS, OWN_EASE, Images, Study, Tuned, draw
from benchmarks.planted_worlds import BEST, DOMAINS, POSITIONS, Pool, Truth, lucky, staged
from experiments.comparison.plan import Block, Plan
from experiments.comparison.searches import Searches


def test_the_benchmark_prints_its_tables(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--quick", "--workers", "1"])
    tables = capsys.readouterr().out.split("\n\n")
    titles = [title.strip() for title in tables[::2]]
    assert titles == [
        "Points below the best configuration",
        "False statements about equal losses",
        "Intervals that cover",
        "Leads that are shown",
        "Where the cliff moves",
    ]
    for table in tables[1::2]:
        assert len({line.count("|") for line in table.strip().split("\n")}) == 1


# Worlds


def test_a_loss_is_best_at_its_rate_for_each_batch_size() -> None:
    truth = Truth(place=-1, power=0.5, batch_size=128)
    assert truth.accuracy(0.1 * 2**0.5, 128) == BEST
    assert truth.accuracy(0.1 * 2**-0.5, 32) == pytest.approx(BEST - 4 * truth.batch_curvature)
    assert truth.accuracy(0.01, 64) == pytest.approx(BEST - truth.curvature - truth.batch_curvature)


def test_beyond_the_cliff_training_diverges_more_or_less_often() -> None:
    truth = Truth(place=-1, cliff=0.3)
    assert truth.expected(0.1 * 10**0.2, 64)[1] == 0
    assert math.isnan(truth.accuracy(0.1 * 10**0.4, 64))
    assert truth.expected(0.1 * 10**0.4, 64)[1] == 1
    moving = replace(truth, noise="moving cliff")
    assert moving.expected(0.1 * 10**0.3, 64)[1] == pytest.approx(0.5)
    assert moving.expected(0.1 * 10**0.42, 64)[1] == pytest.approx(0.8413447)  # one deviation
    rng = np.random.default_rng(0)
    trained = [moving.train(0.1 * 10**0.42, 64, rng)[0] for _ in range(2000)]
    assert np.isnan(trained).mean() == pytest.approx(0.84, abs=0.03)


@pytest.mark.parametrize(("noise", "sd", "skewness"), [("normal", 0.002, 0), ("skewed", 0.005, -2)])
def test_luck_has_its_spread_and_its_tail(noise: str, sd: float, skewness: float) -> None:
    values = lucky(np.full(200_000, 0.7), noise, np.random.default_rng(0))
    assert values.mean() == pytest.approx(0.7, abs=1e-4)
    assert values.std() == pytest.approx(sd, rel=0.02)
    assert (((values - 0.7) / sd) ** 3).mean() == pytest.approx(skewness, abs=0.15)


def test_one_training_in_twenty_collapses() -> None:
    values = lucky(np.full(20_000, 0.7), "collapses", np.random.default_rng(0))
    assert (values == 0.1).mean() == pytest.approx(0.05, abs=0.005)


@pytest.mark.parametrize("trainings", [5, 11, 13, 20])
def test_planted_searches_take_the_steps_of_a_comparison(
    trainings: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for luck: an accuracy that depends on what was trained before."""
    truth, tried = Truth(place=-0.5), []

    def accuracy(rate: float, size: int, number: int) -> float:
        return truth.accuracy(rate, size) + 0.002 * math.sin(number)

    def train(truth: Truth, rate: float, size: int, rng: object) -> tuple[float, float]:
        tried.append((rate, size))
        return 0.0, accuracy(rate, size, len(tried))

    monkeypatch.setattr(Truth, "train", train)
    chosen = staged(trainings)(truth, 1000, np.random.default_rng(0))

    settings = small_settings("sqlite://", losses=("mse",), trials=trainings, seed=0)
    settings = replace(settings, search={**settings.search, **DOMAINS})
    plan = Plan(settings=settings, search="staged", repeats=1)
    block = Block(number=1, trials=trainings, pairs=(("mse", 1),))
    searches, done = Searches(plan, block, max_batch_size=2**31), []
    for step in plan.steps(trainings):
        study = optuna.create_study()
        for each in searches.configurations(step):
            rate, size = each["learning_rate"], each["batch_size"]
            done.append((rate, size))
            value = accuracy(rate, size, len(done))
            study.add_trial(
                create_trial(
                    state=TrialState.COMPLETE,
                    value=0.0 if math.isnan(value) else value,
                    params={"learning_rate": rate, "batch_size": size},
                    distributions={
                        "learning_rate": FloatDistribution(rate / 2, rate * 2),
                        "batch_size": CategoricalDistribution([size]),
                    },
                    user_attrs={"outcome": "diverged" if math.isnan(value) else "complete"},
                    intermediate_values={1: value},
                )
            )
        searches.take(step, study)
    assert done == tried
    ((_, configuration, _),) = searches.chosen()
    assert chosen == (configuration["learning_rate"], configuration["batch_size"])


# Studies


@pytest.mark.parametrize("own", [0.0, OWN_EASE])
def test_models_get_their_accuracy_of_all_images_right(own: float) -> None:
    images = Images(own=own, count=200_000)
    chances = images.of_accuracy(np.array([0.1, 0.5, 0.7]))
    levels = images.draw(2, np.random.default_rng(0))
    assert (levels[0] == levels[1]).all() == (own == 0)
    for level in levels:
        assert chances[:, level].mean(axis=1) == pytest.approx([0.1, 0.5, 0.7], abs=0.003)


def tuned(noise: str = "normal", own: float = 0.0, best: float = BEST, count: int = 400) -> Tuned:
    chosen = best - 0.004 * np.random.default_rng(0).random(50)
    return Tuned(chosen=chosen, noise=noise, images=Images(own=own, count=count), best=best)


@pytest.mark.parametrize("noise", ["normal", "skewed", "collapses"])
def test_what_is_true_of_new_images_is_the_mean_over_all(noise: str) -> None:
    loss = tuned(noise, own=OWN_EASE)
    weights = np.exp(-((LEVELS / math.hypot(0.85, OWN_EASE)) ** 2) / 2)
    assert np.average(loss.chances, weights=weights) == pytest.approx(loss.mean, abs=3e-4)


def test_what_is_true_of_these_images_is_the_mean_over_many_searches() -> None:
    study = draw([tuned(own=0.5), tuned(own=0.5)], 2000, np.random.default_rng(0))
    assert study.test.mean(axis=0) == pytest.approx(study.on_these, abs=2e-3)
    assert abs(study.on_these - study.losses[0].mean).max() > 5e-3  # 400 images are few


@pytest.mark.parametrize("is_staged", [True, False])
def test_searches_differ_if_they_are_repeated(is_staged: bool) -> None:
    loss = replace(tuned(), chosen=np.array([0.2, 0.8]))
    study = draw([loss], 20, np.random.default_rng(0), is_staged=is_staged)
    assert (np.ptp(study.validation) > 0.5) == is_staged


@pytest.mark.parametrize("searches", [2, 3, 10])
@pytest.mark.parametrize("noise", ["normal", "collapses"])
def test_what_is_judged_fast_is_what_compare_says(searches: int, noise: str) -> None:
    rng = np.random.default_rng(0)
    losses = [tuned(noise, own=0.25, best=best) for best in (0.7, 0.71, 0.75)]
    verdicts = set()
    for _ in range(4):
        study = draw(losses, searches, rng)
        said = judge(study)
        check(study, said)
        verdicts |= {*said.verdicts[0], *said.verdicts[1]}
    assert "undecided" in verdicts
    assert "worse" in verdicts or searches < 10 or noise == "collapses"
    with pytest.raises(AssertionError):
        check(study, replace(said, verdicts=(said.verdicts[0], ["equal"] * 3)))
    far = replace(said.differences[1], df=said.differences[1].df + 1, least=None)
    with pytest.raises(AssertionError):
        check(study, replace(said, differences=(said.differences[0], far)))


# Counts


def test_what_is_not_so_is_counted() -> None:
    study = draw([tuned(), tuned(best=0.71), tuned()], 5, np.random.default_rng(0))
    said = judge(study)

    def counts(*verdicts: tuple[int, int, str]) -> tuple[int, int, int]:
        words = [each[2] for each in verdicts]
        unknown = np.full(len(words), math.nan)
        means = Means(mean=unknown, variance=unknown, df=unknown)
        other = replace(
            said,
            pairs=[each[:2] for each in verdicts],
            differences=(means, means),
            verdicts=(words, ["undecided"] * len(words)),
        )
        found = verify(study, other)
        assert found["false new"] == 0
        return found["false these"], found["shown these"], found["shown these of"]

    assert counts((1, 0, "worse"), (1, 2, "slightly worse"), (0, 2, "undecided")) == (0, 1, 2)
    assert counts((0, 1, "better"), (2, 0, "equal")) == (0, 1, 1)
    assert counts((1, 0, "better")) == (1, 0, 1)
    assert counts((1, 0, "equal")) == (1, 0, 1)
    assert counts((0, 2, "slightly better"), (2, 0, "worse")) == (1, 0, 0)
    assert counts((1, 0, "not compared")) == (0, 0, 1)


def test_intervals_are_counted_where_they_cover() -> None:
    study = draw([tuned(), tuned()], 5, np.random.default_rng(0))
    said = judge(study)
    near = Study(
        losses=study.losses,
        validation=study.validation,
        hits=study.hits,
        on_these=np.array([said.accuracies[0].mean[0]] * 2),
        is_staged=True,
    )
    far = replace(near, on_these=np.array([0.9, 0.1]))
    assert verify(near, said)["winner these"] == 1
    assert verify(far, said)["winner these"] == verify(far, said)["accuracy these"] == 0
    assert verify(far, said)["accuracy these of"] == 2


def test_a_cell_has_its_lead_in_a_loss_of_any_place() -> None:
    pool = Pool(method="staged-5", shapes=1, searches=3)
    accuracies = np.full((len(POSITIONS), 1, 3), 0.69)
    cell = Cell(
        pool=pool,
        losses=2,
        searches=4,
        studies=3,
        images=2000,
        lead=0.2,
        accuracies=accuracies.tobytes(),
    )
    counts = count(cell)
    assert counts["shown these"] == counts["shown these of"] == 3
    assert counts["false these"] == counts["false new"] == 0


def test_what_is_so_of_best_accuracies_may_not_be_so_of_tuned_losses() -> None:
    better = replace(tuned(best=0.72, count=4000), chosen=np.full(50, 0.66))  # badly tuned
    study = draw([better, tuned(count=4000)], 10, np.random.default_rng(0))
    said = judge(study)
    assert (said.pairs[0], said.verdicts[0]) == ((1, 0), ["worse"])
    found = verify(study, said)
    assert (found["false these"], found["reversed these"]) == (1, 0)
    found = verify(study, replace(said, verdicts=(["better"], ["undecided"])))
    assert (found["false these"], found["reversed these"]) == (0, 1)
