"""Compare losses, and show the best models the test split once: `experiments.compare --help`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import cli
from experiments.study.parameters import BY_NAME, parse_vary
from tracking.cli import Parser, leave

# PyTorch, Optuna and MLflow are slow to import: each function imports what it needs.
if TYPE_CHECKING:
    from cnn.data import Dataset
    from experiments.comparison.assessment import Assessment
    from experiments.comparison.plan import ComparisonEnded, Plan
    from experiments.comparison.results import Results
    from experiments.engine.base import WorkerPool
    from experiments.study.settings import Settings
    from tracking.runs import Run

EPILOG = """\
There are three stages. First, a search finds the best configuration of each loss; the searches of
all losses have the same draws. Second, each best configuration is trained again on fresh seeds,
which change the split, the order of the images and the initial weights. Third, the models see the
test split, once. Then a report is written.

The same command continues a comparison that was stopped; with more --repeats, it adds repeats.
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
        trials=(12, "configurations to try for each loss"),
        sampler=(
            "random",
            "how to choose configurations; random draws the same ones for each loss, independently "
            "of each other, which curves over the budget need; the others are as in "
            "experiments.sweep",
        ),
    )
    text = "train the best configuration of each loss again on this many seeds after --seed"
    cli.add_flag(search, "--repeats", 10, text, metavar="N")
    search.add_argument(
        "--retest",
        action="store_true",
        help="show the confirmed models the test split again; the report says so",
    )
    cli.add_training_flags(parser)
    record = cli.add_record_flags(parser, "the comparison")
    text = "write the report to a folder in this one, which has the comparison's name"
    cli.add_flag(record, "--out", Path("reports"), text, metavar="DIR")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison of a command line, and return the exit code."""
    return cli.run(build_parser(), _run, argv)


def _run(options: argparse.Namespace) -> int:
    def make_plan(settings: Settings) -> Plan:
        from experiments.comparison.plan import Plan

        return Plan(settings=settings, repeats=options.repeats)

    def make_settings(num_workers: int) -> Settings:
        cli.check_out(options.out, "--out")
        for name in parse_vary(options.vary, options):
            if BY_NAME[name].is_searched_by_default:  # its figures are of these three
                flags = " and ".join(f"--{dest.replace('_', '-')}" for dest in BY_NAME[name].dests)
                raise ValueError(f"experiments.compare takes {flags}, not --vary {name}")
        others = {"pruner": "none", "timeout": 0, "register": "none"}
        settings = cli.settings_from_args(options, num_workers, **others)
        make_plan(settings)  # checks it, before the data is loaded
        return settings

    with cli.workers_and_data(options, make_settings) as (settings, data, pool):
        return _compare(options, make_plan(settings), data, pool)


def _compare(options: argparse.Namespace, plan: Plan, data: Dataset, pool: WorkerPool) -> int:
    from cnn.data import open_cached
    from experiments.comparison.plan import ComparisonEnded, ModelTested, StageStarted
    from experiments.comparison.stages import compare
    from experiments.interrupts import Interrupts
    from experiments.study.progress import Display

    def open_data(seed: int) -> Dataset:
        return open_cached(data.digest, options.data_dir, seed, checked=data.checked)

    def publish(results: Results, assessment: Assessment, run: Run) -> None:
        _publish(results, assessment, run, _report_folder(options.out, results.name))

    ended: ComparisonEnded | None = None
    with ExitStack() as whole:
        interrupts = whole.enter_context(Interrupts())
        stage = whole.enter_context(ExitStack())
        display: Any = None
        comparison = compare(
            plan,
            data,
            pool,
            interrupts,
            open_data=open_data,
            retest=options.retest,
            publish=publish,
        )
        for event in whole.enter_context(closing(comparison)):
            match event:
                case StageStarted():
                    stage.close()
                    print(f"\n{event.title}")
                    display = event.settings and stage.enter_context(Display(event.settings))
                case ModelTested():
                    print(f"  {event.loss}, seed {event.seed}: {event.accuracy:.2%}")
                case ComparisonEnded():
                    ended = event
                case _:
                    display.show(event)
    assert ended is not None
    return _report(ended, options.out)


def _report_folder(out: Path, name: str) -> Path:
    return out / re.sub(r"[^\w.-]+", "-", name)


def _publish(results: Results, assessment: Assessment, run: Run, folder: Path) -> None:
    """Write the report, and store it in the comparison's run with the answer."""
    from experiments.reporting.rendering import write_report

    folder.parent.mkdir(parents=True, exist_ok=True)
    write_report(results, assessment, folder)
    run.log_folder(folder, "report")
    means = assessment.table.set_index("loss")["accuracy_mean"].dropna()
    metrics = {f"{loss}/test_accuracy": mean for loss, mean in means.items()}
    run.log_metrics({k: v for k, v in metrics.items() if run.last_value(k) != v}, step=len(metrics))
    page = f"#/experiments/{run.experiment_id}/runs/{run.run_id}/artifacts/report/report.html"
    note = f"The whole report is among the artifacts: [report.html]({page})."
    run.set_tags(
        {"mlflow.note.content": f"{assessment.answer}\n\n{note}\n{assessment.caveat_list}"}
    )


def _report(ended: ComparisonEnded, out: Path) -> int:
    """Print the answer and what to type next, and return the exit code."""
    assessment = ended.assessment
    if assessment is None:
        return cli.report_stop(ended.outcome, ended.reason)
    print(
        f"\n{assessment.answer}\n{assessment.caveat_list}\n"
        f"  report:            {_report_folder(out, ended.name) / 'report.html'}\n"
        f"{cli.how_to_compare(ended.experiment_id, ended.parent_run_id)}"
    )
    return 0


if __name__ == "__main__":
    leave(main())
