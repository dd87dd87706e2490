from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fake_pool import FakePool, Script, diverges, trains
from mlflow import MlflowClient
from small_sweep import changed, small_settings
from tracking_helpers import new_store

from cnn.config import TrainConfig
from cnn.data import Dataset
from experiments.comparison.loading import load_results
from experiments.comparison.plan import ComparisonEnded, Event, ModelTested, Plan, Planned
from experiments.comparison.results import Results
from experiments.comparison.stages import compare
from experiments.engine.base import Event as WorkerEvent
from experiments.interrupts import Interrupts
from experiments.study.events import TrialEnded, TrialReused, TrialStarted

LOSSES = ("mse", "cross_entropy")
BY_TIME = ["run_id", "seconds", "images_per_second"]
BEST_RATES = {"mse": 0.2, "cross_entropy": 0.01, "l1": 0.5}


def planted(config: TrainConfig) -> float:
    """Return an accuracy with a best learning rate for each loss, and a little noise."""
    distance = math.log10(config.learning_rate / BEST_RATES[config.loss])
    noise = np.random.default_rng([config.seed, int(1e6 * config.learning_rate)]).normal()
    return 0.8 - 0.1 * min(2.0, abs(distance)) ** 2 + 0.002 * float(noise)


SCRIPT = trains(lambda _, config: planted(config))


def plan_in(folder: Path) -> Plan:
    settings = small_settings(
        f"sqlite:///{folder / 'optuna.db'}", losses=LOSSES, trials=6, epochs=2, seed=7, study="c"
    )
    return Plan(settings=settings, search="staged", searches=2, repeats=2)


def with_settings(plan: Plan, **changes: object) -> Plan:
    return replace(plan, settings=changed(plan.settings, **changes))


@dataclass
class Made:
    """What a comparison did."""

    events: list[Event] = field(default_factory=list)
    configs: list[TrainConfig] = field(default_factory=list)
    """Of the trainings that it made, in order."""

    @property
    def reused(self) -> int:
        return sum(isinstance(event, TrialReused) for event in self.events)

    @property
    def tested(self) -> list[ModelTested]:
        return [event for event in self.events if isinstance(event, ModelTested)]

    @property
    def ended(self) -> ComparisonEnded:
        assert isinstance(self.events[-1], ComparisonEnded)
        return self.events[-1]


def run(
    plan: Plan,
    data: Dataset,
    script: Script = SCRIPT,
    *,
    num_workers: int = 1,
    retest: bool = False,
    until: Callable[[Event], bool] = lambda _: False,
) -> Made:
    """Run a comparison, to its end or up to an event."""
    made = Made()

    def noting(job: int, config: TrainConfig) -> Iterable[WorkerEvent]:
        made.configs.append(config)
        return script(job, config)

    pool = FakePool(noting, num_workers)
    events = compare(plan, data, pool, Interrupts(), open_data=lambda _: data, retest=retest)
    with closing(events):
        for event in events:
            made.events.append(event)
            if until(event):
                break
    return made


def results(plan: Plan) -> Results:
    assert plan.settings.study is not None
    return load_results(plan.settings.study, plan.settings.storage)


def timeless(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.drop(columns=BY_TIME)


@pytest.fixture(scope="module")
def data(coloured_noise: Dataset) -> Dataset:
    return coloured_noise


@pytest.fixture
def plan(mlflow_store: str, tmp_path: Path) -> Plan:
    return plan_in(tmp_path)


@dataclass
class Whole:
    plan: Plan
    made: Made
    results: Results


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: Dataset) -> Iterator[Whole]:
    """A comparison that is over, for tests that only look at it."""
    folder = tmp_path_factory.mktemp("staged")
    with new_store(folder):
        plan = plan_in(folder)
        made = run(plan, data)
        yield Whole(plan, made, results(plan))


def test_every_search_has_as_many_trainings_as_every_other(whole: Whole) -> None:
    counts = whole.results.trials.groupby(["stage", "loss", "search"]).size()
    assert list(counts["explore"]) == [4] * 4
    assert list(counts["refine"]) == [2] * 4
    assert len(whole.made.configs) == 4 * 6 + 4 + 2


def test_the_searches_of_all_losses_begin_with_the_same_configurations(whole: Whole) -> None:
    explored = whole.results.trials.query("stage == 'explore'")
    columns = ["search", "trial", "seed", "learning_rate", "batch_size"]
    mse, cross_entropy = (
        explored[explored["loss"] == loss][columns].reset_index(drop=True) for loss in LOSSES
    )
    pd.testing.assert_frame_equal(mse, cross_entropy)


def test_the_searches_of_a_loss_have_their_own_seeds_and_configurations(whole: Whole) -> None:
    trials = whole.results.trials
    assert set(trials.query("search == 1")["seed"]) == {1007}
    assert set(trials.query("search == 2")["seed"]) == {2007}
    of_mse = trials.query("loss == 'mse' and stage == 'explore'")
    assert of_mse["learning_rate"].nunique() == 8


def test_each_search_is_refined_near_its_own_best(whole: Whole) -> None:
    for (loss, _), trials in whole.results.trials.groupby(["loss", "search"]):
        explored = trials.query("stage == 'explore'").sort_values("val_accuracy")
        best = explored["learning_rate"].iloc[-1]
        first = trials.query("stage == 'refine'")["learning_rate"].iloc[0]
        assert abs(math.log10(first / best)) < 0.7, loss


def test_the_best_of_each_search_is_repeated_on_a_fresh_seed(whole: Whole) -> None:
    repeats, trials = whole.results.repeats, whole.results.trials
    assert sorted(repeats["seed"]) == [2006, 2006, 3006, 3006]
    for row in repeats.itertuples():
        of_search = trials.query(f"loss == '{row.loss}' and search == {row.search}")
        best = of_search.sort_values("val_accuracy").iloc[-1]
        assert (row.learning_rate, row.batch_size) == (best["learning_rate"], best["batch_size"])


def test_the_configuration_to_use_is_one_that_a_search_of_the_winner_chose(whole: Whole) -> None:
    confirmed, repeats = whole.results.confirmed, whole.results.repeats
    winner = repeats.groupby("loss")["val_accuracy"].mean().idxmax()
    best = repeats[repeats["loss"] == winner].sort_values("val_accuracy").iloc[-1]
    assert list(confirmed["seed"]) == [8, 9]
    assert set(confirmed["loss"]) == {winner}
    assert set(confirmed["learning_rate"]) == {best["learning_rate"]}


def test_each_chosen_model_sees_the_test_split_once(whole: Whole) -> None:
    assert len(whole.made.tested) == 4 + 2
    assert list(whole.results.repeats["test_evaluations"]) == [1] * 4
    assert whole.results.test_rounds == 1


def test_the_hits_are_those_of_the_accuracy(whole: Whole) -> None:
    for loss, hits in whole.results.hits.items():
        rows = whole.results.repeats.query(f"loss == '{loss}'").sort_values("seed")
        assert hits.shape == (2, whole.results.sizes["test"])
        assert hits.mean(axis=1) == pytest.approx(rows["test_accuracy"])


def test_the_work_is_said_before_it_starts(whole: Whole) -> None:
    (planned,) = (event for event in whole.made.events if isinstance(event, Planned))
    assert whole.made.events.index(planned) == 0
    assert planned.trainings == {"mse": 14, "cross_entropy": 14}
    assert planned.total == len(whole.made.configs)


def test_a_studys_trials_of_a_loss_are_all_of_its_trainings(whole: Whole) -> None:
    study = whole.results.studies["mse"]
    assert study.metric_names == ["validation accuracy"]
    assert [trial.value for trial in study.trials] == pytest.approx(
        list(whole.results.trials.query("loss == 'mse'")["val_accuracy"])
    )


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [2, 5])
def test_results_do_not_depend_on_the_number_of_workers(
    plan: Plan, data: Dataset, whole: Whole, num_workers: int
) -> None:
    run(plan, data, num_workers=num_workers)
    again = results(plan)
    for name in ("trials", "repeats", "confirmed"):
        pd.testing.assert_frame_equal(
            timeless(getattr(again, name)), timeless(getattr(whole.results, name))
        )


@pytest.mark.slow
def test_a_comparison_that_is_stopped_anywhere_ends_with_the_same_results(
    plan: Plan, data: Dataset, whole: Whole
) -> None:
    kinds = (TrialStarted, TrialEnded, ModelTested)
    made = 0
    for number in range(1, 40, 3):
        count = 0

        def after(event: Event, limit: int = number) -> bool:
            nonlocal count
            count += isinstance(event, kinds)
            return count == limit

        part = run(plan, data, until=after)
        made += len(part.configs)
        if isinstance(part.events[-1], ComparisonEnded):
            break
    else:
        run(plan, data)
    again = results(plan)
    for name in ("trials", "repeats", "confirmed"):
        pd.testing.assert_frame_equal(
            timeless(getattr(again, name)), timeless(getattr(whole.results, name))
        )
    assert again.test_rounds == 1
    runs = MlflowClient().search_runs(["1"], "tags.role = 'trial'")
    assert len(runs) == len(whole.made.configs)


@pytest.mark.slow
def test_fresh_seeds_decide_between_the_last_candidates(plan: Plan, data: Dataset) -> None:
    plan = replace(with_settings(plan, trials=13, losses=("mse",)), searches=1, repeats=1)

    def accuracy(_: int, config: TrainConfig) -> float:
        is_fresh = config.seed == 1008
        return planted(config) * (1 if config.learning_rate < 0.2 or not is_fresh else 0.5)

    run(plan, data, trains(accuracy))
    found = results(plan)
    candidates = found.trials.query("stage == 'choose'")
    assert list(candidates["seed"]) == [1008, 1008]
    best = candidates.sort_values("val_accuracy").iloc[-1]
    assert set(found.repeats["learning_rate"]) == {best["learning_rate"]}


@pytest.mark.slow
def test_a_loss_whose_repeat_diverges_has_it_recorded(plan: Plan, data: Dataset) -> None:
    def script(job: int, config: TrainConfig) -> Iterable[WorkerEvent]:
        if config.loss == "mse" and config.seed == 2006:
            return diverges(job, config)
        return SCRIPT(job, config)

    made = run(plan, data, script)
    found = results(plan)
    assert made.ended.outcome == "complete"
    outcomes = found.repeats.set_index(["loss", "seed"])["outcome"]
    assert outcomes["mse", 2006] == "diverged"
    assert set(found.confirmed["loss"]) <= set(LOSSES)


@pytest.mark.slow
def test_a_search_in_which_nothing_is_complete_has_no_repeat(plan: Plan, data: Dataset) -> None:
    def script(job: int, config: TrainConfig) -> Iterable[WorkerEvent]:
        return diverges(job, config) if config.loss == "mse" else SCRIPT(job, config)

    assert run(plan, data, script).ended.outcome == "complete"
    assert set(results(plan).repeats["loss"]) == {"cross_entropy"}


# It grows


@pytest.mark.slow
def test_losses_are_added_and_only_theirs_are_trained(plan: Plan, data: Dataset) -> None:
    first = run(with_settings(plan, losses=("mse",)), data, until=_before_the_test)
    before = {(config.loss, config.learning_rate, config.seed) for config in first.configs}
    more = run(plan, data)
    assert {config.loss for config in more.configs[:-2]} == {"cross_entropy"}
    assert not before & {(each.loss, each.learning_rate, each.seed) for each in more.configs}
    assert results(plan).plan["losses"] == ["mse", "cross_entropy"]


@pytest.mark.slow
def test_searches_are_added_and_only_theirs_are_trained(plan: Plan, data: Dataset) -> None:
    run(plan, data, until=_before_the_test)
    more = run(replace(plan, searches=3), data)
    searches = [config for config in more.configs if config.seed >= 1000]
    assert {config.seed for config in searches} == {3007, 4006}
    assert len(results(plan).repeats) == 6


@pytest.mark.slow
def test_trials_are_added_and_what_is_the_same_is_not_trained_again(
    plan: Plan, data: Dataset
) -> None:
    run(plan, data, until=_before_the_test)
    more = run(with_settings(plan, trials=8), data)
    assert more.reused >= 4 * 6
    assert len(results(plan).trials) == 4 * 8


@pytest.mark.slow
def test_what_was_asked_for_never_shrinks(plan: Plan, data: Dataset, whole: Whole) -> None:
    run(plan, data)
    less = run(replace(with_settings(plan, losses=("mse",), trials=5), searches=1), data)
    assert not less.configs
    pd.testing.assert_frame_equal(timeless(results(plan).trials), timeless(whole.results.trials))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"searches": 3}, "--searches 3"),
        ({"losses": (*LOSSES, "l1")}, "the losses l1"),
        ({"repeats": 3}, "--repeats 3"),
    ],
)
@pytest.mark.slow
def test_after_the_test_it_grows_only_by_retest(
    plan: Plan, data: Dataset, change: dict[str, object], named: str
) -> None:
    run(plan, data)
    own = {key: value for key, value in change.items() if key in ("searches", "repeats")}
    others = {key: value for key, value in change.items() if key not in own}
    more = replace(with_settings(plan, **others), **own)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"with {named} it would be used again, .*--retest"):
        run(more, data)
    tested = run(more, data, retest=True).tested
    assert tested
    assert len({(each.loss, each.seed) for each in tested}) == len(tested)
    assert results(plan).test_rounds == 2
    assert (results(plan).repeats["test_evaluations"] == 1).all()


@pytest.mark.slow
def test_growth_that_was_stopped_before_the_test_still_asks_for_retest(
    plan: Plan, data: Dataset
) -> None:
    small = replace(with_settings(plan, losses=("mse",), trials=4), searches=1, repeats=1)
    more = replace(small, searches=2)
    run(small, data)
    assert not run(more, data, retest=True, until=_before_the_test).tested
    with pytest.raises(ValueError, match="with --searches 2 it would be used again"):
        run(more, data)
    assert run(more, data, retest=True).tested
    assert not run(more, data).tested
    assert results(plan).test_rounds == 2


def _before_the_test(event: Event) -> bool:
    return getattr(event, "title", "") == "the test split"


# Nothing is trained twice


@pytest.mark.slow
def test_another_study_reuses_what_is_known(plan: Plan, data: Dataset) -> None:
    first = run(plan, data)
    other = run(with_settings(plan, study="other"), data)
    assert not other.configs
    assert other.reused == len(first.configs)
    before, after = results(plan), results(with_settings(plan, study="other"))
    assert list(after.trials["run_id"]) == list(before.trials["run_id"])
    assert after.trials["reused"].all()
    assert not before.trials["reused"].any()
    assert list(after.repeats["test_accuracy"]) == list(before.repeats["test_accuracy"])


def test_a_wider_comparison_trains_only_the_new_losses(plan: Plan, data: Dataset) -> None:
    small = replace(with_settings(plan, losses=("mse",), trials=4), searches=1, repeats=1)
    first = run(small, data)
    assert len(first.configs) == 4 + 1 + 1
    other = run(with_settings(small, study="other", losses=LOSSES), data)
    assert {config.loss for config in other.configs if config.seed >= 1000} == {"cross_entropy"}
    assert other.reused >= 5


@pytest.mark.slow
@pytest.mark.parametrize("where", ["last_reported_epoch", "set_attributes", "tell"])
def test_a_kill_while_known_results_are_linked_changes_nothing(
    plan: Plan, data: Dataset, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    small = replace(with_settings(plan, losses=("mse",), trials=5), searches=1, repeats=1)
    run(small, data)
    ends = {each.info.run_id: each.info.end_time for each in MlflowClient().search_runs(["1"])}
    other = with_settings(small, study="other")

    def killed(*_: object, **__: object) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(f"experiments.study.controller.{where}", killed)
        patch.setattr("experiments.study.controller._Sweep.close", lambda _: [])
        with pytest.raises(SystemExit):
            run(other, data)
    assert not run(other, data).configs
    before, after = results(small), results(other)
    for name in ("trials", "repeats", "confirmed"):
        pd.testing.assert_frame_equal(
            getattr(after, name).drop(columns="reused"),
            getattr(before, name).drop(columns="reused"),
        )
    for each in MlflowClient().search_runs(["1"], "tags.role = 'trial'"):
        assert each.info.end_time == ends[each.info.run_id]


@pytest.mark.slow
def test_without_reuse_all_is_trained(plan: Plan, data: Dataset) -> None:
    first = run(plan, data)
    other = run(replace(with_settings(plan, study="other"), reuse=False), data)
    assert len(other.configs) == len(first.configs)
    assert not other.reused


def test_a_plan_says_what_is_wrong_with_it(tmp_path: Path) -> None:
    plan = plan_in(tmp_path)
    for change, message in (
        ({"searches": 0}, "--searches must be ≥ 1, not 0"),
        ({"repeats": 1000}, "--repeats must be < 1000, not 1000"),
        ({"min_effect": -0.01}, "--min-effect must be points from 0 to 100, not -1"),
        ({"search": "grid"}, "--search"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(plan, **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="--seed 4294967290 is too high for these --searches"):
        with_settings(plan, seed=2**32 - 6)
