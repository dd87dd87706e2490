"""Sweep losses, learning rates and batch sizes: `python -m experiments.sweep --help`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import cli
from tracking.cli import Parser, leave
from tracking.text import printable

# What is slow to import (PyTorch, Optuna, MLflow) is imported where it is needed: --help is not it.
if TYPE_CHECKING:
    from experiments.study.events import SweepEnded, SweepStarted
    from experiments.study.settings import Settings

EPILOG = f"""\
{cli.LOSSES_TEXT}
The same command again continues its study: --trials is the total. Runs and models go to MLflow
(sqlite:///mlflow.db unless MLFLOW_TRACKING_URI says otherwise), the study to --storage.

exit codes: 0 done; 1 no trial of the study is complete, or the disk is full, a database locked or
read-only, a server away: the same command goes on later; 2 bad input; 130 interrupted
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; what is wrong with that is a ValueError."""
    parser = Parser(
        prog="python -m experiments.sweep",
        description="Find out which loss function, learning rate and batch size train a CNN best: "
        "an Optuna study, each trial a run with its model in MLflow.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    cli.add_data_flags(parser)
    cli.add_space_flags(parser)
    search = parser.add_argument_group("search")
    search.add_argument(
        "--trials",
        type=int,
        default=24,
        metavar="N",
        help="trials that the study is brought to, those of earlier starts included "
        "(default: %(default)s)",
    )
    search.add_argument(
        "--epochs",
        type=int,
        default=10,
        metavar="N",
        help="passes over the training split in each trial (default: %(default)s)",
    )
    search.add_argument(
        "--sampler",
        choices=("tpe", "random", "qmc", "gp"),
        default="tpe",
        help="how Optuna chooses settings: tree-structured Parzen estimator, independent draws, "
        "quasi-Monte-Carlo, or a Gaussian process (default: %(default)s)",
    )
    search.add_argument(
        "--pruner",
        choices=("none", "median", "hyperband", "asha", "one_epoch"),
        default="one_epoch",
        help="how trials that lag behind are ended early; one_epoch keeps the best third after "
        "their first epoch (default: %(default)s)",
    )
    search.add_argument(
        "--timeout",
        type=float,
        default=0,
        metavar="SECONDS",
        help="start no trial after so long; 0 is no limit (default: %(default)s)",
    )
    cli.add_search_flags(search)
    cli.add_training_flags(parser)
    cli.add_engine_flags(parser)
    record = parser.add_argument_group("record")
    record.add_argument(
        "--study",
        default=None,
        metavar="NAME",
        help="the Optuna study (default: named after the data set and a digest of the settings)",
    )
    record.add_argument(
        "--register",
        default="auto",
        metavar="NAME",
        help="the registered model that the best trial's model becomes a version of, and its "
        "champion, if it beats the present one on the same data: auto is cnn-<data set>, none "
        "registers nothing (default: %(default)s)",
    )
    record.add_argument(
        "--tensorboard",
        type=Path,
        default=None,
        metavar="DIR",
        help="write TensorBoard event files as well, a folder for each trial",
    )
    cli.add_record_flags(record)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sweep of a command line, and return the exit code."""
    return cli.run(build_parser(), _run, argv)


def _run(options: argparse.Namespace) -> int:
    def settle(num_workers: int) -> Settings:
        if options.tensorboard is not None:
            if find_spec("tensorboard") is None:
                raise ValueError("--tensorboard needs TensorBoard: pip install '.[tensorboard]'")
            cli.check_out(options.tensorboard, "--tensorboard")
        return cli.settings_of(options, num_workers)

    with cli.workers_and_data(options, settle) as (settings, data, pool):
        return _sweep(options, settings, data, pool)


def _sweep(options: argparse.Namespace, settings: Settings, data: Any, pool: Any) -> int:
    from experiments.interrupts import Interrupts
    from experiments.study.controller import sweep
    from experiments.study.events import BestRegistered, SweepEnded, SweepStarted
    from experiments.study.progress import Display

    started: SweepStarted | None = None
    ended: SweepEnded | None = None
    registered = ""
    with ExitStack() as stack:
        interrupts = stack.enter_context(Interrupts())
        observers: list[Any] = [stack.enter_context(Display(settings))]
        if options.tensorboard is not None:
            from experiments.study.tensorboard import EventFiles

            observers.append(stack.enter_context(EventFiles(options.tensorboard, settings.space())))
        events = stack.enter_context(closing(sweep(settings, data, pool, interrupts)))
        for event in events:
            if isinstance(event, SweepStarted):
                started = event
            elif isinstance(event, BestRegistered):
                registered = event.report
            elif isinstance(event, SweepEnded):
                ended = event
            for observer in observers:
                observer.show(event)
    assert started is not None
    assert ended is not None
    return _report(started, ended, data_name=options.dataset, registered=registered)


def _report(started: SweepStarted, ended: SweepEnded, *, data_name: str, registered: str) -> int:
    """Print the trials, the best one, and what to type next."""
    from experiments.study.parameters import PARAMETERS

    table = ended.trials
    if table is not None:
        texts = {
            each.name: table[each.name].map(each.text) for each in PARAMETERS if each.name in table
        }
        texts["val_accuracy"] = table["val_accuracy"].map("{:.2%}".format)
        shown = table.drop(columns=["val_loss", "run_id"]).assign(**texts)
        print(f"\n{shown.to_string(index=False)}\n" if len(shown) else "")
    if ended.outcome == "interrupted":
        return cli.interrupted(ended.reason)
    if ended.outcome == "failed":
        print(f"stopped: {printable(ended.reason)}", file=sys.stderr)
        return 1
    complete = None if table is None else table[table["outcome"] == "complete"]
    if complete is None or not len(complete):
        print(f"no trial of study {started.study} is complete", file=sys.stderr)
        return 1
    gone, there = _deleted(complete)
    best = there.iloc[0] if len(there) else complete.iloc[0]
    if len(gone):
        few = gone.head(8)
        trials = zip(few["trial"], few["val_accuracy"], strict=True)
        passed = ", ".join(f"{trial} ({accuracy:.2%})" for trial, accuracy in trials)
        passed += f" and {len(gone) - 8} more" if len(gone) > 8 else ""
        print(f"note: passed over, as run or model was deleted: trial {passed}", file=sys.stderr)
    line = f"  registered:        {registered}\n" if registered else ""
    label = (
        f"python -m tracking.predict {shlex.quote(data_name + ':test')} --run-id {best['run_id']}"
        if len(there)
        else "no complete trial has a model any more"
    )
    values = ", ".join(
        f"{each.label} {each.text(best[each.name])}" for each in PARAMETERS if each.name in best
    )
    print(
        f"best: trial {best['trial']}, {values}: validation accuracy {best['val_accuracy']:.2%}\n"
        f"{line}"
        f"  compare the runs:  {cli.ui_command()}\n"
        f"                     then {cli.ui_address(started.experiment_id)}\n"
        f"  label images:      {label}"
    )
    return 0


def _deleted(complete: Any) -> tuple[Any, Any]:
    """Return the best trials whose runs or models were deleted since, and those after them."""
    from tracking.run_search import first_with_model
    from tracking.store import reading

    try:
        with reading() as client:
            run_id = first_with_model(client, complete["run_id"])
    except ValueError:  # away by now: all was recorded before
        return complete.iloc[:0], complete
    is_there = (complete["run_id"] == run_id).cummax()
    return complete[~is_there], complete[is_there]


if __name__ == "__main__":
    leave(main())
