"""Sweep losses, learning rates and batch sizes: `python -m experiments.sweep --help`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import cli
from experiments.config_file import ConfigParser
from experiments.study.output import Output
from tracking.cli import leave
from tracking.text import printable

# PyTorch, Optuna and MLflow are slow to import: each function imports what it needs.
if TYPE_CHECKING:
    from optuna import Study

    from experiments.study.events import SweepEnded, SweepStarted
    from experiments.study.settings import Settings

SHOWN_TRIALS = 10
"""Trials that are printed at the end."""

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
    cli.add_output_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sweep of a command line, and return the exit code."""
    return cli.run(build_parser(), _run, argv)


def _run(options: argparse.Namespace) -> int:
    with Output(quiet=options.quiet, as_json=options.json) as output:
        conducted = conduct(options, output)
        _show_best_trials(conducted, output)
        if conducted.ended.outcome != "complete":
            return cli.report_stop(conducted.ended.outcome, conducted.ended.reason)
        return _report(conducted, output, data_name=options.dataset)


@dataclass(frozen=True, kw_only=True)
class Conducted:
    """What became of a sweep."""

    settings: Settings
    started: SweepStarted
    ended: SweepEnded
    registered: str
    """What was registered, in a line; empty if nothing was."""


def conduct(options: argparse.Namespace, output: Output) -> Conducted:
    """Run a sweep and show its progress.

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

    with cli.workers_and_data(options, make_settings, output) as (settings, data, pool):
        return _sweep(options, settings, data, pool, output)


def _sweep(
    options: argparse.Namespace, settings: Settings, data: Any, pool: Any, output: Output
) -> Conducted:
    from experiments.interrupts import Interrupts
    from experiments.study.controller import sweep
    from experiments.study.events import BestRegistered, SweepEnded, SweepStarted

    started: SweepStarted | None = None
    ended: SweepEnded | None = None
    registered = ""
    with ExitStack() as stack:
        interrupts = stack.enter_context(Interrupts())
        observers: list[Any] = [stack.enter_context(output.display(settings))]
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
    return Conducted(settings=settings, started=started, ended=ended, registered=registered)


def _write_report(study: Study, folder: Path) -> None:
    from experiments.reporting.rendering import write
    from experiments.reporting.sweep_report import make

    write(make(study), folder)


def _show_best_trials(conducted: Conducted, output: Output) -> None:
    """Print the best trials."""
    from experiments.study.progress import Row

    table = conducted.ended.trials
    if table is None or not len(table):
        return
    num_shown = min(len(table), SHOWN_TRIALS)
    is_all = num_shown == len(table)
    title = "all trials" if is_all else f"the best {num_shown} of {len(table)} trials"
    output.result(f"\n{title}, the best first:")
    rows = [
        Row(
            trial=row["trial"],
            values={str(name): value for name, value in row.items()},
            epochs_planned=conducted.settings.epochs,
            outcome=row["outcome"],
            accuracy=row["val_accuracy"],
            epochs=row["epochs"],
        )
        for row in table.head(num_shown).to_dict("records")
    ]
    output.rows(conducted.settings, rows)
    output.result("")


def _report(conducted: Conducted, output: Output, *, data_name: str) -> int:
    """Print the best trial, and what to type next; return the exit code."""
    from experiments.study.parameters import PARAMETERS
    from tracking.wording import labelled, narrowed, percent, wrapped

    started, ended = conducted.started, conducted.ended
    if ended.reason:
        output.result(wrapped(f"ended early: {ended.reason}", output.width))
    table = ended.trials
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
    searched = [each for each in PARAMETERS if each.name in best]
    values = ", ".join(f"{each.label} {each.text(best[each.name])}" for each in searched)
    accuracy = percent(best["val_accuracy"])
    line = f"best: trial {best['trial']}, {values}: validation accuracy {accuracy}"
    output.result(wrapped(line, output.width))
    if conducted.registered:
        output.result(labelled("registered", conducted.registered, output.width))
    output.result(narrowed(cli.how_to_compare(started.runs_page), output.width))
    output.result(labelled("predict", predict, output.width))
    output.record(
        "result",
        study=started.study,
        experiment=started.experiment,
        trial=best["trial"],
        val_accuracy=best["val_accuracy"],
        config={each.name: best[each.name] for each in searched},
        run_id=best["run_id"] if len(present) else None,
        registered=conducted.registered,
        skipped=list(deleted["trial"]),
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
