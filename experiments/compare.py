"""Compare losses, and show the best models the test split once: `experiments.compare --help`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING

from experiments import cli
from experiments.study.output import Output
from experiments.study.parameters import BY_NAME, parse_vary
from tracking.cli import Parser, leave
from tracking.text import printable
from tracking.views import runs_link

# PyTorch, Optuna and MLflow are slow to import: each function imports what it needs.
if TYPE_CHECKING:
    from cnn.data import Dataset
    from experiments.comparison.assessment import Assessment
    from experiments.comparison.plan import ComparisonEnded, Plan
    from experiments.comparison.results import Results
    from experiments.engine.base import WorkerPool
    from experiments.study.settings import Settings
    from tracking.runs import Run

SEARCHES = ("staged", "random", "tpe")

EPILOG = """\
The search of each loss is repeated, each time with other seeds: split, initial weights, order of
images and first configurations, the same ones for all losses. A search has steps: it explores the
ranges, and refines around the best, beyond a range if the best is at its edge. With 13 trials or
more, it trains the best candidates again on fresh seeds. Its choice is trained on a fresh seed and
shown the test split, once. So the statements are about a loss that is tuned with this many trials.
At the end the best configuration of the winner is trained on more fresh seeds: the one to use.

The same command continues a comparison that was stopped. With more --losses, --searches or --trials
it adds what is missing. Trainings that were made before, in any study, are not made again.
"""


def build_parser() -> Parser:
    """Return the parser of the command line; it raises ValueError for what is wrong."""
    parser = cli.make_parser(
        "experiments.compare",
        "Find out which loss function trains a CNN best, each at its own best learning rate and "
        "batch size, and how sure that is.",
        EPILOG,
    )
    search = cli.add_search_flags(
        parser,
        "search and confirmation",
        trials=(11, "trainings of each search"),
        sampler=None,
    )
    cli.add_flag(
        search,
        "--search",
        "staged",
        "staged: as said below; random or tpe: one search of each loss by that sampler of "
        "experiments.sweep, whose best configuration is trained again --repeats times, which "
        "compares these configurations and not the losses",
        choices=SEARCHES,
    )
    text = "how often the search of each loss is repeated, if it is staged"
    cli.add_flag(search, "--searches", 5, text, metavar="N")
    text = (
        "train the best configuration again on this many seeds after --seed: the one to use; with "
        "random or tpe, that of each loss"
    )
    cli.add_flag(search, "--repeats", 5, text, metavar="N")
    text = "the smallest difference in accuracy that matters, in points"
    cli.add_flag(search, "--min-effect", 0.2, text, metavar="POINTS")
    search.add_argument(
        "--retest",
        action="store_true",
        help="show the test split to what was added after it was looked at; the report says so",
    )
    search.add_argument(
        "--no-reuse",
        action="store_true",
        help="make each training, even if its results are known from another study; --engine ray "
        "makes each anyway",
    )
    cli.add_training_flags(parser)
    record = cli.add_record_flags(parser, "the comparison")
    text = "write the report to a folder in this one, which has the comparison's name"
    cli.add_flag(record, "--out", Path("reports"), text, metavar="DIR")
    cli.add_output_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison of a command line, and return the exit code."""
    return cli.run(build_parser(), _run, argv)


def _run(options: argparse.Namespace) -> int:
    def make_plan(settings: Settings) -> Plan:
        from experiments.comparison.plan import Plan

        return Plan(
            settings=settings,
            search=options.search,
            searches=options.searches,
            repeats=options.repeats,
            min_effect=options.min_effect / 100,
            reuse=not options.no_reuse,
        )

    def make_settings(num_workers: int) -> Settings:
        cli.check_out(options.out, "--out")
        for name in parse_vary(options.vary, options):
            if BY_NAME[name].is_searched_by_default:  # its figures are of these three
                flags = " and ".join(f"--{dest.replace('_', '-')}" for dest in BY_NAME[name].dests)
                raise ValueError(f"experiments.compare takes {flags}, not --vary {name}")
        sampler = "random" if options.search == "staged" else options.search
        others = {"pruner": "none", "timeout": 0, "register": "none", "sampler": sampler}
        settings = cli.settings_from_args(options, num_workers, **others)
        make_plan(settings)  # checks it, before the data is loaded
        return settings

    with (
        Output(quiet=options.quiet, as_json=options.json) as output,
        cli.workers_and_data(options, make_settings, output) as (settings, data, pool),
    ):
        return _compare(options, make_plan(settings), data, pool, output)


def _compare(
    options: argparse.Namespace, plan: Plan, data: Dataset, pool: WorkerPool, output: Output
) -> int:
    from cnn.data import open_cached
    from experiments.comparison.display import ComparisonDisplay
    from experiments.comparison.plan import ComparisonEnded
    from experiments.comparison.stages import compare
    from experiments.interrupts import Interrupts

    def open_data(seed: int) -> Dataset:
        return open_cached(data.digest, options.data_dir, seed, checked=data.checked)

    def publish(results: Results, assessment: Assessment, run: Run) -> None:
        _publish(results, assessment, run, cli.report_folder(options.out, results.name))

    ended: ComparisonEnded | None = None
    with ExitStack() as stack:
        interrupts = stack.enter_context(Interrupts())
        display = stack.enter_context(ComparisonDisplay(output, plan, data))
        comparison = compare(
            plan,
            data,
            pool,
            interrupts,
            open_data=open_data,
            retest=options.retest,
            publish=publish,
        )
        for event in stack.enter_context(closing(comparison)):
            display.show(event)
            if isinstance(event, ComparisonEnded):
                ended = event
    assert ended is not None
    return _report(ended, options.out, data.name, output)


def _publish(results: Results, assessment: Assessment, run: Run, folder: Path) -> None:
    """Write the report, and store it in the comparison's run with the answer."""
    from experiments.reporting.rendering import write_report
    from experiments.study.summary import REPORT_PAGE

    folder.parent.mkdir(parents=True, exist_ok=True)
    write_report(results, assessment, folder)
    run.log_folder(folder, "report")
    means = assessment.table.set_index("loss")["accuracy_mean"].dropna()
    metrics = {f"{loss}/test_accuracy": mean for loss, mean in means.items()}
    run.log_metrics({k: v for k, v in metrics.items() if run.last_value(k) != v}, step=len(metrics))
    page = runs_link(run.experiment_id, run.run_id, REPORT_PAGE)
    note = f"The whole report is among the artifacts: [report.html]({page})."
    run.set_tags(
        {"mlflow.note.content": f"{assessment.answer}\n\n{note}\n{assessment.caveat_list}"}
    )


def _report(ended: ComparisonEnded, out: Path, data_name: str, output: Output) -> int:
    """Print the answer and what to type next, and return the exit code."""
    from tracking.wording import labelled, narrowed, wrapped

    assessment = ended.assessment
    if assessment is None:
        return cli.report_stop(ended.outcome, ended.reason)
    for note in ended.notes:
        print(f"note: {printable(note)}", file=sys.stderr)
    report = cli.report_folder(out, ended.name) / "report.html"
    output.result(f"\n{wrapped(assessment.answer, output.width)}\n")
    for caveat in assessment.warnings:
        output.result(wrapped(f"- {caveat.text}", output.width))
        if caveat.command:
            output.result(f"  {caveat.command}")  # in one line, to be copied
    output.result("")
    output.result(labelled("report", str(report), output.width))
    answer = runs_link(ended.experiment_id, ended.parent_run_id)
    compare_runs = cli.how_to_compare(ended.runs_page, answer)
    output.result(narrowed(compare_runs, output.width))
    if assessment.to_use and (run_id := assessment.to_use["run_id"]):
        command = f"python -m tracking.predict {shlex.quote(f'{data_name}:test')} --run-id {run_id}"
        output.result(labelled("predict", command, output.width))
    output.record(
        "comparison_result",
        comparison=ended.name,
        answer=assessment.answer,
        warnings=[
            {"text": caveat.text, "command": caveat.command} for caveat in assessment.warnings
        ],
        winner=assessment.winner,
        losses=assessment.table.to_dict("records"),
        pairs=assessment.pairs.to_dict("records"),
        to_use=assessment.to_use,
        report=report,
        experiment_id=ended.experiment_id,
        run_id=ended.parent_run_id,
    )
    return 0


if __name__ == "__main__":
    leave(main())
