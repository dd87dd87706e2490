"""The pruner of one epoch, and the replays of `benchmarks.pruning`."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path

import optuna
import pytest
from optuna.trial import Trial, TrialState

from benchmarks import pruning
from benchmarks.pruning import Curve, Replay, choose, draw_trials, read_curves, replay
from experiments.study.pruners import PRUNERS, OneEpochPruner, make_pruner

optuna.logging.set_verbosity(optuna.logging.WARNING)


def study_of(*firsts: float, pruner: optuna.pruners.BasePruner | None = None) -> optuna.Study:
    """Return a study in which trials have had these accuracies in their first epochs."""
    study = optuna.create_study(direction="maximize", pruner=pruner or OneEpochPruner())
    for accuracy in firsts:
        report(study, accuracy)
    return study


def report(study: optuna.Study, *accuracies: float) -> Trial:
    """Return a new trial that has had these accuracies in its epochs."""
    trial = study.ask()
    for number, accuracy in enumerate(accuracies, start=1):
        trial.report(accuracy, number)
    return trial


def continues(study: optuna.Study, *accuracies: float) -> bool:
    return not report(study, *accuracies).should_prune()


def test_the_first_trial_continues() -> None:
    assert continues(study_of(), 0.1)


@pytest.mark.parametrize(("first", "second"), [(0.1, 0.2), (0.2, 0.1)])
def test_of_two_trials_only_the_better_continues(first: float, second: float) -> None:
    assert continues(study_of(first), second) == (second > first)


def test_a_trial_continues_if_fewer_than_a_third_are_better_its_own_epoch_counted() -> None:
    others = [0.1, 0.2, 0.3, 0.4, 0.5]  # with it six, so that one may be better
    assert continues(study_of(*others), 0.45)
    assert not continues(study_of(*others), 0.35)
    assert continues(study_of(*others, 0.0), 0.35)  # of seven, two


def test_a_tie_is_not_better() -> None:
    assert continues(study_of(0.5, 0.5, 0.5), 0.5)
    assert not continues(study_of(0.6, 0.6, 0.5), 0.5)


@pytest.mark.parametrize("state", TrialState)
def test_first_epochs_count_whatever_became_of_their_trials(state: TrialState) -> None:
    def study_with(accuracy: float, *running: float) -> optuna.Study:
        study = study_of(*running)
        trial = report(study, accuracy)
        if state.is_finished():
            study.tell(trial, 0.5 if state == TrialState.COMPLETE else None, state)
        return study

    assert not continues(study_with(0.9), 0.8)
    assert continues(study_with(0.1, 0.1, 0.9), 0.8)  # one of four is better; without it, of three


def test_a_trial_without_an_epoch_does_not_count() -> None:
    study = study_of(0.9, 0.1)
    study.ask()
    assert not continues(study, 0.8)


def test_an_accuracy_that_is_no_number_ends_a_trial_and_is_better_than_none() -> None:
    assert not continues(study_of(), math.nan)
    assert continues(study_of(math.nan), 0.1)


def test_after_its_second_epoch_no_trial_is_ended() -> None:
    study = study_of(0.5, 0.6, 0.7)
    assert not continues(study, 0.1)
    assert continues(study, 0.1, 0.2)


def test_a_decision_that_is_taken_again_is_the_same() -> None:
    study = study_of(0.5, 0.6, 0.7)
    bad, good = report(study, 0.4), report(study, 0.8)
    for _ in range(2):
        for trial, is_bad in ((bad, True), (good, False)):
            again = Trial(study, trial._trial_id)  # as a process does that takes it up again
            assert again.should_prune() == is_bad


@pytest.mark.parametrize("name", [name for name in PRUNERS if name != "none"])
def test_every_pruner_decides_the_same_again(name: str) -> None:
    study = optuna.create_study(direction="maximize", pruner=make_pruner(name, epochs=9))
    decisions = []
    for accuracies in curves(seed=0, trials=30, epochs=9):
        trial = study.ask()
        for epoch, accuracy in enumerate(accuracies, start=1):
            trial.report(accuracy, epoch)
            decisions.append(trial.should_prune())
            again = Trial(study, trial._trial_id)  # as a process does that takes it up again
            assert again.should_prune() == decisions[-1]
            if decisions[-1]:
                break
        if decisions[-1]:
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, accuracy)
    assert 0 < sum(decisions) < len(decisions)


@pytest.mark.parametrize(
    ("name", "optunas"),
    [
        ("asha", optuna.pruners.SuccessiveHalvingPruner(1, 3)),
        ("hyperband", optuna.pruners.HyperbandPruner(1, 9, 3)),
    ],
)
def test_ours_decide_as_optunas_do(name: str, optunas: optuna.pruners.BasePruner) -> None:
    assert lengths(make_pruner(name, epochs=9)) == lengths(optunas)


def lengths(pruner: optuna.pruners.BasePruner) -> list[int]:
    """Return how many of 9 epochs each of 200 trials has."""
    study = optuna.create_study(study_name="s", direction="maximize", pruner=pruner)
    found = []
    for accuracies in curves(seed=1, trials=200, epochs=9):
        trial = study.ask()
        for epoch, accuracy in enumerate(accuracies, start=1):
            trial.report(accuracy, epoch)
            if epoch < len(accuracies) and trial.should_prune():
                break
        found.append(epoch)
        study.tell(trial, accuracy)
    return found


def curves(seed: int, trials: int, epochs: int) -> list[list[float]]:
    generator = random.Random(seed)
    return [sorted(generator.random() for _ in range(epochs)) for _ in range(trials)]


def test_a_reduction_factor_of_less_than_two_is_refused() -> None:
    with pytest.raises(ValueError, match="reduction_factor must be ≥ 2, not 1"):
        OneEpochPruner(1)


def test_one_epoch_keeps_a_third() -> None:
    pruner = make_pruner("one_epoch", epochs=8)
    others = [0.1, 0.2, 0.3, 0.4, 0.5]
    assert continues(study_of(*others, pruner=pruner), 0.45)
    assert not continues(study_of(*others, pruner=pruner), 0.35)


# The replays, against slow and obvious counts.

CURVES = [
    Curve(loss="mse", accuracies=[0.30, 0.40, 0.50], is_complete=True),
    Curve(loss="l1", accuracies=[0.20, 0.25, 0.60], is_complete=True),  # a slow starter
    Curve(loss="mse", accuracies=[0.50, 0.60, 0.700], is_complete=True),
    Curve(loss="ce", accuracies=[0.60, 0.10], is_complete=False),  # it diverges
    Curve(loss="ce", accuracies=[0.55, 0.65, 0.704], is_complete=True),
    Curve(loss="ce", accuracies=[0.10, 0.65, 0.80], is_complete=True),
]


def counted_without_pruning(curves: Sequence[Curve]) -> Replay:
    epochs, complete = 0, []
    for curve in curves:
        epochs += len(curve.accuracies)
        if curve.is_complete:
            complete.append((epochs, curve))
    return Replay(epochs=epochs, complete=complete)


def counted_after_one_epoch(curves: Sequence[Curve]) -> Replay:
    epochs, complete = 0, []
    for number, curve in enumerate(curves, start=1):
        ranked = sorted((c.accuracies[0] for c in curves[:number]), reverse=True)
        is_kept = curve.accuracies[0] in ranked[: math.ceil(number / 3)]
        epochs += len(curve.accuracies) if is_kept else 1
        if is_kept and curve.is_complete:
            complete.append((epochs, curve))
    return Replay(epochs=epochs, complete=complete)


def counted_by_the_median(curves: Sequence[Curve]) -> Replay:
    """Of five complete trials or more, from epoch 2 on, by a trial's best accuracy so far."""
    epochs, told, complete = 0, [], []
    for curve in curves:
        for epoch in range(1, len(curve.accuracies) + 1):
            epochs += 1
            if len(told) < 5 or epoch == 1 or epoch == len(curve.accuracies):
                continue
            others = sorted(c.accuracies[epoch - 1] for c in told if len(c.accuracies) >= epoch)
            middle = (others[(len(others) - 1) // 2] + others[len(others) // 2]) / 2
            if max(curve.accuracies[:epoch]) < middle:
                break
        else:
            told.append(curve)
            if curve.is_complete:
                complete.append((epochs, curve))
    return Replay(epochs=epochs, complete=complete)


def random_curves(number: int, seed: int) -> list[Curve]:
    dice = random.Random(seed)
    return [
        Curve(
            loss=dice.choice(["l1", "mse"]),
            accuracies=[dice.random() for _ in range(4 if is_complete else dice.randint(1, 4))],
            is_complete=is_complete,
        )
        for is_complete in dice.choices([True, False], [4, 1], k=number)
    ]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("none", counted_without_pruning),
        ("one_epoch", counted_after_one_epoch),
        ("median", counted_by_the_median),
    ],
)
def test_a_replay_of_one_worker_is_what_one_counts(name: str, count: object) -> None:
    assert callable(count)
    for curves in [CURVES, *(random_curves(20, seed) for seed in range(10))]:
        assert replay(curves, make_pruner(name, 4), workers=1, seed=0) == count(curves)


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("workers", [1, 2, 9])
def test_a_replay_is_the_same_again_and_gives_each_trial_its_first_epoch(
    name: str, workers: int
) -> None:
    once, again = (replay(CURVES, make_pruner(name, 3), workers=workers, seed=1) for _ in range(2))
    assert once == again
    assert len(CURVES) <= once.epochs <= counted_without_pruning(CURVES).epochs
    assert once.best() <= pruning.best(CURVES)


def test_two_workers_train_two_trials_at_a_time() -> None:
    two = replay(CURVES[:2], make_pruner("none", 3), workers=2, seed=0)
    assert two.epochs == 6
    assert sorted(epochs for epochs, _ in two.complete)[0] in (4, 5)  # not 3, nor the last
    assert [epochs for epochs, _ in two.complete][1] == 6


def test_a_trial_that_diverges_is_complete_for_the_pruner_but_never_the_best() -> None:
    diverging = Curve(loss="ce", accuracies=[0.1, 0.99], is_complete=False)
    done = replay([diverging] * 6, make_pruner("none", 3), workers=1, seed=0)
    assert (done.epochs, done.complete, done.best()) == (12, [], 0)


def test_the_best_is_that_of_the_last_epochs_of_complete_trials() -> None:
    falling = Curve(loss="ce", accuracies=[0.9, 0.6], is_complete=True)
    diverging = Curve(loss="ce", accuracies=[0.9, 0.9], is_complete=False)
    assert pruning.best([*CURVES[:2], falling, diverging]) == 0.6


def test_the_best_that_is_pruned_is_never_reached_and_regretted() -> None:
    done = replay(CURVES, make_pruner("one_epoch", 3), workers=1, seed=0)
    assert done.epochs_to(0.80) == math.inf
    assert done.epochs_to(0.704) == 3 + 1 + 3 + 2 + 3
    assert pruning.best(CURVES) - done.best() == pytest.approx(0.096)
    table = pruning.table([CURVES], {"one_epoch": [done]})
    expected = "| `one_epoch` | never (never–never) | 0.0% | never (never–never) | 0.0% |"
    expected += " 13 (13–13) | 9.60, 9.60 | 0.0% | 0.0% | 100.0% |"
    assert table.splitlines()[-1] == expected


def test_epochs_to_half_a_point_are_those_to_any_trial_that_is_so_close() -> None:
    done = replay(CURVES[:5], make_pruner("none", 3), workers=1, seed=0)
    assert pruning.epochs_to([CURVES[:5]], [done], 0) == [14]
    assert pruning.epochs_to([CURVES[:5]], [done], 0.005) == [9]


def test_quartiles_are_values_that_there_are() -> None:
    assert pruning.quartiles([4.0, 1.0, 2.0, math.inf]) == "2 (1–4)"
    assert pruning.quartiles([3.0, math.inf, math.inf]) == "never (3–never)"


def replays_with(epochs_to_the_best: Sequence[float], epochs: int) -> list[Replay]:
    return [
        Replay(
            epochs=epochs,
            complete=[] if math.isinf(each) else [(int(each), CURVES[-1])],
        )
        for each in epochs_to_the_best
    ]


def test_the_rule_takes_the_soonest_that_is_close_often_enough() -> None:
    draws = [CURVES] * 20
    of = {
        "none": replays_with([100] * 20, 240),
        "slow": replays_with([60] * 20, 90),
        "soon": replays_with([40] * 19 + [math.inf], 120),
        "rash": replays_with([10] * 18 + [math.inf] * 2, 50),
    }
    assert choose(draws, of) == "soon"
    assert choose(draws, of | {"as soon, and shorter": replays_with([42] * 20, 119)}) != "soon"
    assert choose(draws, of | {"not as soon": replays_with([43] * 20, 119)}) == "soon"


def test_draws_are_of_different_trials_and_seeded() -> None:
    draws = draw_trials(CURVES, 4, 50, seed=0)
    assert draws == draw_trials(CURVES, 4, 50, seed=0) != draw_trials(CURVES, 4, 50, seed=1)
    assert all(len({id(curve) for curve in draw}) == 4 for draw in draws)
    with pytest.raises(ValueError, match="--trials 7, but only 6 trials have ended"):
        draw_trials(CURVES, 7, 1, seed=0)


def recorded(folder: Path, pruner: str) -> str:
    """Record two trials and one that runs, as a sweep does; return the storage."""
    storage = f"sqlite:///{folder}/optuna.db"
    study = optuna.create_study(storage=storage, study_name="s", direction="maximize")
    study.set_user_attr("settings", {"sampler": "random", "pruner": pruner, "epochs": 3})
    for outcome, accuracies in (("complete", [0.1, 0.2, 0.3]), ("diverged", [0.4, 0.1])):
        trial = report(study, *accuracies)
        trial.suggest_categorical("loss", ["mse"])
        trial.set_user_attr("outcome", outcome)
        study.tell(trial, accuracies[-1])
    report(study, 0.5)
    return storage


def test_curves_are_those_of_trials_that_have_ended(tmp_path: Path) -> None:
    assert read_curves(recorded(tmp_path, "none"), "s") == (
        3,
        [
            Curve(loss="mse", accuracies=[0.1, 0.2, 0.3], is_complete=True),
            Curve(loss="mse", accuracies=[0.4, 0.1], is_complete=False),
        ],
    )


def test_curves_that_were_pruned_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not made with --sampler random --pruner none"):
        read_curves(recorded(tmp_path, "median"), "s")
