"""How many epochs does pruning save, and what does it cost? `python -m benchmarks.pruning`.

    python -m benchmarks.pruning --study NAME [--storage sqlite:///optuna.db] [--figure FILE]

reads the learning curves that a study of random search without pruning has recorded (a sweep with
`--sampler random --pruner none`), and replays sweeps over them: each draws `--trials` of the curves
in random order and hands them, epoch by epoch, to Optuna, whose pruner says which trials end early.
Every pruner gets the same draws, with one worker and with two: then the one whose epoch is over
first reports next, and an epoch takes 1 ± 0.1 units of time. Draws share curves: their spread is
that of order and choice among these trials, not that of training them anew.

For each pruner, over all replays, median and quartiles:

- *to the best*: epochs that all trials together had been trained for when a complete trial had the
  best accuracy that the same trials have without pruning; `never` if none has;
- *to within half a point*: likewise, for that accuracy less 0.5 points, which is about what the
  luck of a run is worth;
- *in all*: epochs of the whole sweep;
- *regret*: by how many points the best complete trial is worse than the best without pruning: the
  mean, and the worst;
- *each loss' best*: share of the replays in which the best trial of a loss, or one of the same loss
  within half a point of it, is complete. It is no goal of pruning, but of comparing losses.

**The default is chosen by this rule**, written down before there were curves. Of the pruners that
come within half a point in at least 95 % of the replays: the one that needs the fewest epochs for
it, in the median, with two workers. If others need at most 5 % more: the one of them with the
fewest epochs in all. A user wants a setting that is as good as any, soon; the last digit is luck.
"""

from __future__ import annotations

import argparse
import heapq
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import optuna
from optuna.pruners import BasePruner
from optuna.trial import Trial, TrialState

from experiments.study.pruners import PRUNERS, OneEpochPruner, make_pruner

HALF_A_POINT = 0.005
OFTEN_ENOUGH = 0.95
AS_SOON = 1.05
WORKERS = (1, 2)
COLORS = ["#000000", "#E69F00", "#009E73", "#CC79A7", "#0072B2", "#56B4E9", "#D55E00"]

MakePruner = Callable[[int], BasePruner]

VARIANTS: dict[str, MakePruner] = {
    "median, from epoch 1": lambda _: optuna.pruners.MedianPruner(5, n_warmup_steps=1),
    "median, from epoch 1, 2 first": lambda _: optuna.pruners.MedianPruner(2, n_warmup_steps=1),
    "median, from epoch 3": lambda _: optuna.pruners.MedianPruner(5, n_warmup_steps=3),
    "hyperband, halving": lambda epochs: optuna.pruners.HyperbandPruner(1, epochs, 2),
    "asha, halving": lambda _: optuna.pruners.SuccessiveHalvingPruner(1, 2),
    "asha, quartering": lambda _: optuna.pruners.SuccessiveHalvingPruner(1, 4),
    "asha, from epoch 2": lambda _: optuna.pruners.SuccessiveHalvingPruner(2, 3),
    "one_epoch, best half": lambda _: OneEpochPruner(2),
    "one_epoch, best quarter": lambda _: OneEpochPruner(4),
    "one_epoch, best fifth": lambda _: OneEpochPruner(5),
}
"""Other arguments than those of `PRUNERS`."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What a trial that nothing cuts short comes to."""

    loss: str
    accuracies: Sequence[float]  # one an epoch
    is_complete: bool  # it did not diverge


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What a sweep over some curves came to."""

    epochs: int
    """That all trials together were trained for."""
    complete: list[tuple[int, Curve]]
    """Each complete trial, with the epochs of all trials when it was."""

    def epochs_to(self, accuracy: float) -> float:
        """Return the epochs after which a complete trial had this accuracy; inf: never."""
        return min((e for e, c in self.complete if c.accuracies[-1] >= accuracy), default=math.inf)

    def best(self) -> float:
        """Return the best accuracy of a complete trial."""
        return best([curve for _, curve in self.complete])


def main() -> None:
    """Read, replay, print and draw."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pruning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--study", required=True, metavar="NAME")
    parser.add_argument("--storage", default="sqlite:///optuna.db", metavar="URL")
    parser.add_argument("--trials", type=int, default=30, help="of a sweep (default: %(default)s)")
    parser.add_argument("--replays", type=int, default=1000, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    parser.add_argument("--variants", action="store_true", help="other arguments of them, too")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw curves and replays")
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
                replay(draw, make(epochs), workers=workers, seed=options.seed + number)
                for number, draw in enumerate(draws)
            ]
            for name, make in pruners(options.variants).items()
        }
        print(f"\n{workers} worker{'s' if workers > 1 else ''}:\n\n{markdown(draws, replays)}")
        of_two = replays
    print(f"\nby the rule, the default is: {choose(draws, of_two)}")
    if options.figure:
        draw_figure(curves, draws, {n: of_two[n] for n in PRUNERS}, options.figure)


def pruners(with_variants: bool) -> dict[str, MakePruner]:
    """Return what makes each pruner, from the number of epochs."""
    own: dict[str, MakePruner] = {
        name: lambda epochs, name=name: make_pruner(name, epochs)  # type: ignore[misc]
        for name in PRUNERS
    }
    return own | (VARIANTS if with_variants else {})


def read_curves(storage: str, name: str) -> tuple[int, list[Curve]]:
    """Return the epochs of a study's trials, and the curves of those that are over.

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
    """Return what is tried in each replay, in order.

    Raises:
        ValueError: there are not so many curves.
    """
    if trials > len(curves):
        raise ValueError(f"--trials {trials}, but the study has {len(curves)} that are over")
    dice = random.Random(seed)
    return [dice.sample(curves, trials) for _ in range(replays)]


def replay(curves: Sequence[Curve], pruner: BasePruner, *, workers: int, seed: int) -> Replay:
    """Sweep over some curves, as `experiments.study.controller` would, with so many trials at once.

    The seed is that of the workers' pace and, by the study's name, of Hyperband's brackets.
    """
    study = optuna.create_study(
        study_name=f"replay {seed}",
        direction="maximize",
        sampler=optuna.samplers.RandomSampler(seed=0),
        pruner=pruner,
    )
    dice = random.Random(seed)
    waiting = list(reversed(curves))
    under_way: list[tuple[float, int, int, Trial, Curve]] = []

    def train(now: float, epoch: int, trial: Trial, curve: Curve) -> None:
        over = now + dice.uniform(0.9, 1.1)
        heapq.heappush(under_way, (over, trial.number, epoch, trial, curve))

    for _ in range(min(workers, len(waiting))):
        train(0, 1, study.ask(), waiting.pop())
    epochs, complete = 0, []
    while under_way:
        now, _, epoch, trial, curve = heapq.heappop(under_way)
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
    """Return how many epochs each replay took to come so close to the best of its draw."""
    pairs = zip(draws, replays, strict=True)
    return [replay.epochs_to(best(draw) - tolerance) for draw, replay in pairs]


def markdown(draws: Sequence[Sequence[Curve]], replays: dict[str, list[Replay]]) -> str:
    """Return a table with a row for each pruner."""
    losses = sorted({curve.loss for draw in draws for curve in draw})
    head = ["pruner", "to the best", "reached", "to within half a point", "reached", "in all"]
    head += ["regret", *(f"{loss}'s best" for loss in losses)]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
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
        cells += [f"{share_kept(draws, of, loss):.1%}" for loss in losses]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def share_kept(draws: Sequence[Sequence[Curve]], replays: Sequence[Replay], loss: str) -> float:
    """Return in how many of the replays with a loss its best, or nearly, is complete."""
    kept = []
    for draw, replay in zip(draws, replays, strict=True):
        of_loss = [curve for curve in draw if curve.loss == loss and curve.is_complete]
        if of_loss:
            complete = [curve for _, curve in replay.complete if curve.loss == loss]
            kept.append(best(complete) >= best(of_loss) - HALF_A_POINT)
    return float(np.mean(kept)) if kept else math.nan


def quartiles(values: Sequence[float]) -> str:
    """Return median and quartiles of epochs, each one of the values; inf is never."""
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
    """Draw the curves, and how many of the replays are close to the best after so many epochs."""
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
