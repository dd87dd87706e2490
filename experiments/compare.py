"""Compare losses, and hold the answer to the test once: `python -m experiments.compare --help`."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import cli
from tracking.cli import Parser, leave

# What is slow to import (PyTorch, Optuna, MLflow) is imported where it is needed: --help is not it.
if TYPE_CHECKING:
    from cnn.data import Dataset
    from experiments.comparison.plan import ComparisonEnded, Plan
    from experiments.comparison.results import Results
    from experiments.engine.base import WorkerPool
    from experiments.study.settings import Settings
    from tracking.runs import Run

EPILOG = f"""\
{cli.LOSSES_TEXT}
Three stages: a search for the best setting of each loss, in a study of its own with the same draws;
the best setting of each trained again on fresh seeds, which split, order and initial weights vary
with; and then, once, the test split. A report of it all is written at the end.

The same command again continues a comparison that was cut off; with more --repeats, it adds some.

exit codes: 0 done; 1 no loss has a complete trial, or the disk is full, a database locked or
read-only, a server away: the same command goes on later; 2 bad input; 130 interrupted
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; what is wrong with that is a ValueError."""
    parser = Parser(
        prog="python -m experiments.compare",
        description="Find out which loss function trains a CNN best, each at its own best learning "
        "rate and batch size, and how sure that is.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    cli.add_data_flags(parser)
    cli.add_space_flags(parser)
    search = parser.add_argument_group("search and confirmation")
    search.add_argument(
        "--trials",
        type=int,
        default=12,
        metavar="N",
        help="settings that are tried for each loss (default: %(default)s)",
    )
    search.add_argument(
        "--epochs",
        type=int,
        default=10,
        metavar="N",
        help="passes over the training split in each training (default: %(default)s)",
    )
    search.add_argument(
        "--repeats",
        type=int,
        default=10,
        metavar="N",
        help="how often the best setting of each loss is trained again, on the seeds after --seed "
        "(default: %(default)s)",
    )
    search.add_argument(
        "--sampler",
        choices=("random", "tpe", "qmc", "gp"),
        default="random",
        help="how settings are chosen: independent draws, the same ones for each loss, with which "
        "curves over the budget are valid; or as in experiments.sweep (default: %(default)s)",
    )
    search.add_argument(
        "--retest",
        action="store_true",
        help="show the confirmed models the test split again: it is recorded, and reported",
    )
    cli.add_search_flags(search)
    cli.add_training_flags(parser)
    cli.add_engine_flags(parser)
    record = parser.add_argument_group("record")
    record.add_argument(
        "--study",
        default=None,
        metavar="NAME",
        help="the comparison (default: named after the data set and a digest of the settings)",
    )
    record.add_argument(
        "--out",
        type=Path,
        default=Path("reports"),
        metavar="DIR",
        help="where the report is written, in a folder of the comparison's name "
        "(default: %(default)s)",
    )
    cli.add_record_flags(record)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison of a command line, and return the exit code."""
    return cli.run(build_parser(), _run, argv)


def _run(options: argparse.Namespace) -> int:
    def settle(num_workers: int) -> Settings:
        from experiments.comparison.plan import Plan

        cli.check_out(options.out, "--out")
        others = {"pruner": "none", "timeout": 0, "register": "none"}
        settings = cli.settings_of(options, num_workers, **others)
        Plan(settings=settings, repeats=options.repeats)  # is checked before anything is begun
        return settings

    with cli.workers_and_data(options, settle) as (settings, data, pool):
        from experiments.comparison.plan import Plan

        plan = Plan(settings=settings, repeats=options.repeats)
        return _compare(options, plan, data, pool)


def _compare(options: argparse.Namespace, plan: Plan, data: Dataset, pool: WorkerPool) -> int:
    from cnn.data import open_cached
    from experiments.comparison.plan import ComparisonEnded, ModelTested, StageStarted
    from experiments.comparison.stages import compare
    from experiments.interrupts import Interrupts
    from experiments.study.progress import Display

    def open_data(seed: int) -> Dataset:
        return open_cached(data.digest, options.data_dir, seed, checked=data.checked)

    ended: ComparisonEnded | None = None
    found: list[str] = []
    with ExitStack() as whole:
        interrupts = whole.enter_context(Interrupts())
        display = whole.enter_context(ExitStack())
        shown: Any = None
        comparison = compare(
            plan,
            data,
            pool,
            interrupts,
            open_data=open_data,
            retest=options.retest,
            finish=lambda results, run: found.append(_publish(results, run, options.out)),
        )
        events = whole.enter_context(closing(comparison))
        for event in events:
            match event:
                case StageStarted():
                    display.close()
                    print(f"\n{event.title}")
                    shown = event.settings and display.enter_context(Display(event.settings))
                case ModelTested():
                    print(f"  {event.loss}, seed {event.seed}: {event.accuracy:.2%}")
                case ComparisonEnded():
                    ended = event
                case _:
                    shown.show(event)
    assert ended is not None
    return _report(ended, *found)


def _publish(results: Results, run: Run, out: Path) -> str:
    """Write the report, store it in the comparison's run, and return what is to be printed."""
    from experiments.comparison.assessment import assess
    from experiments.reporting.rendering import write_report

    assessment = assess(results)
    folder = out / re.sub(r"[^\w.-]+", "-", results.name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_report(results, assessment, folder)
    run.log_folder(folder, "report")
    means = assessment.table.set_index("loss")["accuracy_mean"].dropna()
    metrics = {f"{loss}/test_accuracy": mean for loss, mean in means.items()}
    run.log_metrics({k: v for k, v in metrics.items() if run.last_value(k) != v}, step=len(metrics))
    answer = " ".join(assessment.statements[:2])
    caveats = "".join(f"\n- {caveat.text}" for caveat in assessment.warnings)
    page = f"#/experiments/{run.experiment_id}/runs/{run.run_id}/artifacts/report/report.html"
    note = f"{answer}\n\nThe whole report is among the artifacts: [report.html]({page}).\n{caveats}"
    run.set_tags({"mlflow.note.content": note})
    return f"\n{answer}\n{caveats}\n  report:            {folder / 'report.html'}"


def _report(ended: ComparisonEnded, found: str = "") -> int:
    if ended.outcome == "interrupted":
        return cli.interrupted(ended.reason)
    if ended.outcome == "failed":
        print(f"stopped: {ended.reason}", file=sys.stderr)
        return 1
    print(
        f"{found}\n"
        f"  compare the runs:  {cli.ui_command()}\n"
        f"                     then {cli.ui_address(ended.experiment_id)}/{ended.parent_run_id}"
    )
    return 0


if __name__ == "__main__":
    leave(main())
