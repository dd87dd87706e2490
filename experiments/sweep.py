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
from experiments.config_file import ConfigParser
from tracking.cli import leave
from tracking.text import printable

# PyTorch, Optuna and MLflow are slow to import: each function imports what it needs.
if TYPE_CHECKING:
    from optuna import Study

    from experiments.study.events import SweepEnded, SweepStarted
    from experiments.study.settings import Settings

EPILOG = """\
The same command continues its study: --trials is the total. Runs and models are recorded in MLflow
(sqlite:///mlflow.db unless MLFLOW_TRACKING_URI says otherwise), the study in --storage.
"""


def build_parser() -> ConfigParser:
    """Return the parser of the command line; it raises ValueError for what is wrong."""
    parser = cli.make_parser(
        "experiments.sweep",
        "Find out which loss function, learning rate and batch size train a CNN best: an Optuna "
        "study, each trial a run with its model in MLflow.",
        EPILOG,
    )
    search = cli.add_search_flags(
        parser,
        "search",
        trials=(24, "trials of the study, those of earlier starts included"),
        sampler=(
            "tpe",
            "how Optuna chooses configurations: tree-structured Parzen estimator, independent "
            "draws, quasi-Monte-Carlo, or a Gaussian process",
        ),
    )
    cli.add_flag(
        search,
        "--pruner",
        "one_epoch",
        "how to stop trials that are behind; one_epoch keeps the best third after their first "
        "epoch",
        choices=("none", "median", "hyperband", "asha", "one_epoch"),
    )
    text = (
        "start no more trials after so many finished ones in which the best accuracy did not rise "
        "by more than --min-delta; 0 is no limit"
    )
    cli.add_flag(search, "--patience", 0, text, metavar="TRIALS")
    text = "the difference in validation accuracy, in 0 .. 1, for --patience"
    cli.add_flag(search, "--min-delta", 0.0, text, metavar="SHARE")
    text = "start no trial after this time; 0 is no limit"
    cli.add_flag(search, "--timeout", 0, text, type=float, metavar="SECONDS")
    cli.add_training_flags(parser)
    record = cli.add_record_flags(parser, "the Optuna study")
    cli.add_flag(
        record,
        "--register",
        "auto",
        "register the best trial's model as a version of this registered model, and make it "
        "champion if it beats the present one on the same data; auto is cnn-<data set>, none "
        "registers nothing",
        metavar="NAME",
    )
    text = "write TensorBoard event files as well, a folder for each trial"
    cli.add_flag(record, "--tensorboard", None, text, type=Path, metavar="DIR")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sweep of a command line, and return the exit code."""
    return cli.run(build_parser(), _run, argv)


def _run(options: argparse.Namespace) -> int:
    started, ended, registered = conduct(options)
    registered = f"  registered:        {registered}\n" if registered else ""
    return _report(started, ended, data_name=options.dataset, registered=registered)


def conduct(options: argparse.Namespace) -> tuple[SweepStarted, SweepEnded, str]:
    """Run a sweep and show its progress; return its first and last event, and what was registered.

    Raises:
        ValueError: an option is bad, or a database, a server or the data can't be used.
        KeyboardInterrupt: a signal, before anything was recorded.
    """

    def make_settings(num_workers: int) -> Settings:
        if options.tensorboard is not None:
            if find_spec("tensorboard") is None:
                raise ValueError("--tensorboard needs TensorBoard: pip install '.[tensorboard]'")
            cli.check_out(options.tensorboard, "--tensorboard")
        return cli.settings_from_args(options, num_workers)

    with cli.workers_and_data(options, make_settings) as (settings, data, pool):
        return _sweep(options, settings, data, pool)


def _sweep(
    options: argparse.Namespace, settings: Settings, data: Any, pool: Any
) -> tuple[SweepStarted, SweepEnded, str]:
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
        events = sweep(settings, data, pool, interrupts, write_report=_write_report)
        for event in stack.enter_context(closing(events)):
            match event:
                case SweepStarted():
                    started = event
                case BestRegistered():
                    registered = event.report
                case SweepEnded():
                    ended = event
            for observer in observers:
                observer.show(event)
    assert started is not None
    assert ended is not None
    for note in ended.notes:
        print(f"note: {printable(note)}", file=sys.stderr)
    return started, ended, registered


def _write_report(study: Study, folder: Path) -> None:
    from experiments.reporting.rendering import write
    from experiments.reporting.sweep_report import make

    write(make(study), folder)


def _report(started: SweepStarted, ended: SweepEnded, *, data_name: str, registered: str) -> int:
    """Print the trials, the best one, and what to type next; return the exit code."""
    from experiments.study.parameters import PARAMETERS

    table = ended.trials
    if table is not None and len(table):
        searched = [each for each in PARAMETERS if each.name in table]
        texts = {each.name: table[each.name].map(each.text) for each in searched}
        texts["val_accuracy"] = table["val_accuracy"].map("{:.2%}".format, na_action="ignore")
        shown = table.drop(columns=["val_loss", "run_id"]).assign(**texts)
        print(f"\n{shown.to_string(index=False, na_rep='–')}\n")
    if ended.outcome != "complete":
        return cli.report_stop(ended.outcome, ended.reason)
    if ended.reason:
        print(f"ended early: {ended.reason}")
    complete = None if table is None else table[table["outcome"] == "complete"]
    if complete is None or not len(complete):
        print(f"no trial of study {started.study} is complete", file=sys.stderr)
        return 1
    deleted, present = _split_deleted(complete)
    if len(deleted):
        shown = deleted.head(8)
        trials = zip(shown["trial"], shown["val_accuracy"], strict=True)
        skipped = ", ".join(f"{trial} ({accuracy:.2%})" for trial, accuracy in trials)
        skipped += f" and {len(deleted) - 8} more" if len(deleted) > 8 else ""
        print(f"note: skipped trials whose run or model was deleted: {skipped}", file=sys.stderr)
    best = (present if len(present) else complete).iloc[0]
    predict = "no complete trial has a model any more"
    if len(present):
        source = shlex.quote(f"{data_name}:test")
        predict = f"python -m tracking.predict {source} --run-id {best['run_id']}"
    values = ", ".join(f"{each.label} {each.text(best[each.name])}" for each in searched)
    print(
        f"best: trial {best['trial']}, {values}: validation accuracy {best['val_accuracy']:.2%}\n"
        f"{registered}"
        f"{cli.how_to_compare(started.runs_page)}\n"
        f"  predict:           {predict}"
    )
    return 0


def _split_deleted(complete: Any) -> tuple[Any, Any]:
    """Split complete trials before the first whose run and model still exist."""
    from tracking.run_search import first_with_model
    from tracking.store import reading

    try:
        with reading() as client:
            run_id = first_with_model(client, complete["run_id"])
    except ValueError:  # the server is away; it was there when the sweep was recorded
        return complete.iloc[:0], complete
    is_present = (complete["run_id"] == run_id).cummax()
    return complete[~is_present], complete[is_present]


if __name__ == "__main__":
    leave(main())
