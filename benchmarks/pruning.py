"""How many epochs does pruning save, and what does it cost? `python -m benchmarks.pruning`.

It reads the learning curves of a study without pruning (a sweep with `--sampler random --pruner
none`), and replays sweeps over them. A replay draws `--trials` of the curves in random order and
gives them, epoch by epoch, to Optuna, whose pruner decides which trials end early. Every pruner
gets the same draws, with one worker and with two, whose epochs take 1 ± 0.1 units of time. Draws
share curves, so their spread is that of order and choice among these trials, not of new trainings.

For each pruner, median and quartiles over all replays:

- *to the best*: epochs of all trials together until a complete trial has the best accuracy that the
  same trials have without pruning; `never` if none has;
- *to within half a point*: the same for that accuracy less 0.5 points, about the spread of a run;
- *in all*: epochs of the whole sweep;
- *regret*: by how many points the best complete trial is worse than the best without pruning: the
  mean, and the worst;
- *each loss' best*: share of the replays in which the best trial of a loss, or one of that loss
  within half a point of it, is complete. This matters for comparing losses, not for pruning.

**The default is chosen by this rule**, written down before there were curves. Consider the pruners
that come within half a point in at least 95 % of the replays. Choose the one that needs the fewest
epochs for that, in the median, with two workers. If others need at most 5 % more, choose the one of
them with the fewest epochs in all.
"""

from __future__ import annotations

import argparse
import heapq
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import optuna
from optuna.pruners import BasePruner
from optuna.trial import Trial, TrialState

from benchmarks.common import make_parser, markdown
from experiments.study.pruners import PRUNERS, make_pruner

HALF_A_POINT = 0.005
OFTEN_ENOUGH = 0.95
AS_SOON = 1.05
WORKERS = (1, 2)
COLORS = ["#000000", "#E69F00", "#009E73", "#CC79A7", "#0072B2", "#56B4E9", "#D55E00"]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The accuracies of a trial that is not pruned."""

    loss: str
    accuracies: Sequence[float]  # one an epoch
    is_complete: bool  # it did not diverge


@dataclass(frozen=True, kw_only=True)
class Replay:
    """The result of a sweep over some curves."""

    epochs: int
    """Of all trials together."""
    complete: list[tuple[int, Curve]]
    """Each complete trial, with the epochs of all trials up to its end."""

    def epochs_to(self, accuracy: float) -> float:
        """Return the epochs until a complete trial has this accuracy; inf: never."""
        return min((e for e, c in self.complete if c.accuracies[-1] >= accuracy), default=math.inf)

    def best(self) -> float:
        """Return the best accuracy of a complete trial."""
        return best([curve for _, curve in self.complete])


def main() -> None:
    """Read, replay, print and draw."""
    parser = make_parser("pruning", __doc__)
    add = parser.add_argument
    name = "of a study without pruning"
    add("--study", required=True, default=argparse.SUPPRESS, metavar="NAME", help=name)
    add("--storage", default="sqlite:///optuna.db", metavar="URL", help="the study's database")
    add("--trials", type=int, default=30, help="of a replay")
    add("--replays", type=int, default=1000, help="for each pruner and number of workers")
    add("--seed", type=int, default=0, help="of the draws")
    picture = "file for a figure of the curves and the replays"
    add("--figure", type=Path, default=argparse.SUPPRESS, metavar="FILE", help=picture)
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    epochs, curves = read_curves(options.storage, options.study)
    draws = draw_trials(curves, options.trials, options.replays, options.seed)
    diverged = sum(not curve.is_complete for curve in curves)
    print(f"{len(curves)} curves of {epochs} epochs, {diverged} of them diverged", end="; ")
    print(f"{len(draws)} replays of {options.trials} trials")
    of_two: dict[str, list[Replay]] = {}
    for workers in WORKERS:
        replays = {
            name: [
                replay(draw, make_pruner(name, epochs), workers=workers, seed=options.seed + number)
                for number, draw in enumerate(draws)
            ]
            for name in PRUNERS
        }
        print(f"\n{workers} worker{'s' if workers > 1 else ''}:\n\n{table(draws, replays)}")
        of_two = replays
    print(f"\nby the rule, the default is: {choose(draws, of_two)}")
    if "figure" in options:
        draw_figure(curves, draws, of_two, options.figure)


def read_curves(storage: str, name: str) -> tuple[int, list[Curve]]:
    """Return the epochs of a study's trials, and the curves of those that have ended.

    Raises:
        ValueError: the study's trials are not independent of each other, or were pruned.
    """
    study = optuna.load_study(study_name=name, storage=storage)
    settings = study.user_attrs["settings"]
    if (settings["sampler"], settings["pruner"]) != ("random", "none"):
        raise ValueError(f"study {name!r} was not made with --sampler random --pruner none")
    curves = [
        Curve(
            loss=trial.params["loss"],
            accuracies=[accuracy for _, accuracy in sorted(trial.intermediate_values.items())],
            is_complete=trial.user_attrs["outcome"] == "complete",
        )
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    ]
    return settings["epochs"], curves


def draw_trials(curves: Sequence[Curve], trials: int, replays: int, seed: int) -> list[list[Curve]]:
    """Return the trials of each replay, in order.

    Raises:
        ValueError: there are fewer curves.
    """
    if trials > len(curves):
        raise ValueError(f"--trials {trials}, but only {len(curves)} trials have ended")
    rng = random.Random(seed)
    return [rng.sample(curves, trials) for _ in range(replays)]


def replay(curves: Sequence[Curve], pruner: BasePruner, *, workers: int, seed: int) -> Replay:
    """Sweep over some curves, as `experiments.study.controller` does, with a number of workers.

    The seed sets the times of epochs and, by the study's name, the brackets of Hyperband.
    """
    study = optuna.create_study(
        study_name=f"replay {seed}",
        direction="maximize",
        sampler=optuna.samplers.RandomSampler(seed=0),
        pruner=pruner,
    )
    rng = random.Random(seed)
    waiting = list(reversed(curves))
    running: list[tuple[float, int, int, Trial, Curve]] = []

    def train(now: float, epoch: int, trial: Trial, curve: Curve) -> None:
        over = now + rng.uniform(0.9, 1.1)
        heapq.heappush(running, (over, trial.number, epoch, trial, curve))

    for _ in range(min(workers, len(waiting))):
        train(0, 1, study.ask(), waiting.pop())
    epochs, complete = 0, []
    while running:
        now, _, epoch, trial, curve = heapq.heappop(running)
        epochs += 1
        trial.report(curve.accuracies[epoch - 1], epoch)
        if epoch == len(curve.accuracies):  # a diverged one, too, after which none is pruned
            study.tell(trial, curve.accuracies[-1])
            if curve.is_complete:
                complete.append((epochs, curve))
        elif trial.should_prune():
            study.tell(trial, state=TrialState.PRUNED)
        else:
            train(now, epoch + 1, trial, curve)
            continue
        if waiting:
            train(now, 1, study.ask(), waiting.pop())
    return Replay(epochs=epochs, complete=complete)


def best(curves: Sequence[Curve]) -> float:
    """Return the best accuracy of those curves that did not diverge."""
    return max((c.accuracies[-1] for c in curves if c.is_complete), default=0.0)


def choose(draws: Sequence[Sequence[Curve]], replays: dict[str, list[Replay]]) -> str:
    """Return the pruner that the rule above chooses; `none` always fulfils its condition."""
    close = {name: epochs_to(draws, of, HALF_A_POINT) for name, of in replays.items()}
    often = [name for name in close if np.isfinite(close[name]).mean() >= OFTEN_ENOUGH]
    median = {name: float(np.median(close[name])) for name in often}
    soon = [name for name in often if median[name] <= AS_SOON * min(median.values())]
    return min(soon, key=lambda name: np.median([replay.epochs for replay in replays[name]]))


def epochs_to(
    draws: Sequence[Sequence[Curve]], replays: Sequence[Replay], tolerance: float
) -> list[float]:
    """Return the epochs of each replay until it is as close to the best of its draw."""
    pairs = zip(draws, replays, strict=True)
    return [replay.epochs_to(best(draw) - tolerance) for draw, replay in pairs]


def table(draws: Sequence[Sequence[Curve]], replays: dict[str, list[Replay]]) -> str:
    """Return a table with a row for each pruner."""
    losses = sorted({curve.loss for draw in draws for curve in draw})
    header = ["pruner", "to the best", "reached", "to within half a point", "reached", "in all"]
    header += ["regret", *(f"{loss}'s best" for loss in losses)]
    rows = []
    for name, of in replays.items():
        cells = [f"`{name}`"]
        for tolerance in (0, HALF_A_POINT):
            epochs = epochs_to(draws, of, tolerance)
            cells += [quartiles(epochs), f"{np.isfinite(epochs).mean():.1%}"]
        cells.append(quartiles([replay.epochs for replay in of]))
        regrets = [
            100 * (best(draw) - replay.best()) for draw, replay in zip(draws, of, strict=True)
        ]
        cells.append(f"{np.mean(regrets):.2f}, {max(regrets):.2f}")
        rows.append([*cells, *(f"{share_kept(draws, of, loss):.1%}" for loss in losses)])
    return markdown(header, rows)


def share_kept(draws: Sequence[Sequence[Curve]], replays: Sequence[Replay], loss: str) -> float:
    """Return the share of replays in which the best trial of a loss, or nearly, is complete."""
    kept = []
    for draw, replay in zip(draws, replays, strict=True):
        of_loss = [curve for curve in draw if curve.loss == loss and curve.is_complete]
        if of_loss:
            complete = [curve for _, curve in replay.complete if curve.loss == loss]
            kept.append(best(complete) >= best(of_loss) - HALF_A_POINT)
    return float(np.mean(kept)) if kept else math.nan


def quartiles(values: Sequence[float]) -> str:
    """Return median and quartiles of epochs, each of them one of the values; inf is never."""
    low, middle, high = (
        float(np.percentile(values, percent, method="lower")) for percent in (25, 50, 75)
    )
    text = ["never" if math.isinf(value) else f"{value:.0f}" for value in (low, middle, high)]
    return f"{text[1]} ({text[0]}–{text[2]})"


def draw_figure(
    curves: Sequence[Curve],
    draws: Sequence[Sequence[Curve]],
    replays: dict[str, list[Replay]],
    file: Path,
) -> None:
    """Draw the curves, and the share of replays that are close to the best, by epochs."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import PercentFormatter

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    colors = dict(zip(sorted({curve.loss for curve in curves}), COLORS[1:], strict=False))
    for curve in curves:
        epochs = range(1, len(curve.accuracies) + 1)
        left.plot(epochs, curve.accuracies, color=colors[curve.loss], linewidth=0.8)
    for loss, color in colors.items():
        left.plot([], [], color=color, label=loss)
    left.set_xlabel("epoch")
    left.set_ylabel("validation accuracy")
    left.set_title(f"{len(curves)} trials, none pruned")
    for (name, of), color in zip(replays.items(), COLORS, strict=False):
        spent = sorted(epochs_to(draws, of, HALF_A_POINT))
        shares = np.arange(1, len(spent) + 1) / len(spent)
        right.step([0, *spent], [0, *shares], where="post", color=color, label=name)
    right.set_xlim(0, None)
    right.set_xlabel("epochs, of all trials together")
    right.set_ylabel("replays within half a point")
    right.set_title(f"sweeps of {len(draws[0])} trials, two workers")
    for axes in (left, right):
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize="small")
    figure.savefig(file, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
