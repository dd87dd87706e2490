"""List what is stored, and remove what is named: `python -m experiments.clean --help`."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments import cli
from experiments.engine.checkpoints import FOLDER
from tracking.cli import Parser, confirm, leave, run_command
from tracking.errors import without_passwords
from tracking.store import reading, sqlite_file, tracking_uri
from tracking.text import printable
from tracking.wording import counted

# Optuna and MLflow are slow to import: each function imports what it needs.
if TYPE_CHECKING:
    from experiments.inventory.removal import Inventory, Removal
    from experiments.inventory.runs import StoredRun
    from experiments.study.trial_cache import TrialCache

DESCRIPTION = """\
List what there is: studies and comparisons with their runs and models, registered models,
checkpoints, and decoded images, with their sizes. With names, remove these, in Optuna, in MLflow
and on the disk, after showing it and asking. What something else needs stays: a run that another
study links to, and the run of a registered model.
"""

EXIT_CODES = """\
exit codes: 0 done; 1 not removed, or the disk, a database or a server refused; 2 bad input;
130 interrupted: the same command continues
"""


def build_parser() -> Parser:
    """Return the parser of the command line; it raises ValueError for what is wrong."""
    parser = Parser(
        prog="python -m experiments.clean",
        description=DESCRIPTION,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="remove this study or comparison, or this registered model: models:/NAME, or "
        "models:/NAME/VERSION",
    )
    text = "remove the decoded images of this data set; the next start decodes them again"
    parser.add_argument("--cache", action="append", default=[], metavar="DATASET", help=text)
    parser.add_argument(
        "--unused",
        action="store_true",
        help="remove checkpoints and decoded images that nothing refers to, and the runs that "
        "were deleted in MLflow",
    )
    parser.add_argument("--yes", action="store_true", help="remove without asking")
    cli.add_storage_flag(parser)
    text = "the folder with checkpoints and decoded images"
    cli.add_flag(parser, "--data-dir", Path("data"), text, metavar="DIR")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """List or remove what a command line names, and return the exit code."""
    cli.set_up_mlflow()
    return run_command(build_parser(), _run, argv)


def _run(options: argparse.Namespace) -> int:
    from experiments.inventory.removal import choose, read_inventory, remove

    with reading() as client:
        storage = _storage(options.storage)
        inventory = read_inventory(client, storage, options.storage, options.data_dir)
        if not (options.names or options.cache or options.unused):
            _show(inventory, options)
            return 0
        removal = choose(inventory, options.names, options.cache, unused=options.unused)
        _show_removal(removal)
        if options.unused and not inventory.checkpoints.is_certain:
            print("note: no checkpoint is removed: those of some unfinished trials are not known")
        if not removal:
            print("nothing to remove")
            return 0
        if not options.yes and not confirm(
            "remove this?", otherwise="there is no terminal to ask on: --yes removes without asking"
        ):
            print("nothing was removed")
            return 1
        is_erased = remove(removal, client, storage, options.storage)
    print("removed")
    if removal.runs and not is_erased:
        print("its runs can still be restored: `mlflow gc`, where the server is, frees the disk")
    return 0


def _storage(url: str) -> TrialCache | None:
    """Open the storage; None if its file does not exist."""
    from experiments.study.storage import check_storage, open_storage, storage_errors

    check_storage(url)
    file = sqlite_file(url)
    if file is not None and not file.exists():
        return None
    with storage_errors(url):
        return open_storage(url)


# What is shown

Row = Sequence[str]


def _show(inventory: Inventory, options: argparse.Namespace) -> None:
    """Print all that is stored."""
    runs = printable(without_passwords(tracking_uri()))
    print(f"studies in {without_passwords(options.storage)}, runs in {runs}\n")
    columns: Row = ("study", "what", "trials", "runs", "models", "size", "last used")
    _print_table(columns, _run_rows(inventory), numbers=range(2, 6))
    versions = [
        (f"models:/{each.model}/{each.version}", ", ".join(each.aliases))
        for each in inventory.versions
    ]
    _print_table(("registered model", "alias"), versions)
    columns = (f"checkpoints in {options.data_dir / FOLDER}", "files", "size")
    _print_table(columns, _checkpoint_rows(inventory), numbers=(1, 2))
    columns = (f"decoded images in {options.data_dir / 'cache'}", "size", "in use", "what")
    images = [
        (
            each.name or each.folder.name,
            _size(each.size),
            "yes" if each.is_used else "no",
            each.about,
        )
        for each in inventory.cache
    ]
    _print_table(columns, images, numbers=(1,))
    print("remove: python -m experiments.clean NAME …, --cache DATASET, --unused (see --help)")


def _run_rows(inventory: Inventory) -> Iterator[Row]:
    """Yield a row for each study, and one for each kind of other runs."""
    for study in inventory.studies:
        total = study.num_finished + study.num_unfinished
        trials = f"{study.num_finished:,}" + (f" of {total:,}" if study.num_unfinished else "")
        used = study.last_used
        when = f"{used:%Y-%m-%d %H:%M}" if used is not None else ""
        yield _row(study.name, study.kind, trials, inventory.runs_of(study), when)
    for name, runs in inventory.of_other_storages().items():
        yield _row(name, "not in this storage", "", runs)
    reruns = [run for run in inventory.runs if run.role == "rerun" and not run.is_deleted]
    if reruns:
        yield _row("", "reruns", "", reruns)
    if deleted := [run for run in inventory.runs if run.is_deleted]:
        yield _row("", "deleted in MLflow", "", deleted)


def _row(name: str, what: str, trials: str, runs: Sequence[StoredRun], when: str = "") -> Row:
    from experiments.inventory.runs import size_of

    models = sum(len(run.models) for run in runs)
    return (name, what, trials, f"{len(runs):,}", f"{models:,}", _size(size_of(runs)), when)


def _checkpoint_rows(inventory: Inventory) -> Iterator[Row]:
    from experiments.inventory.runs import file_size

    checkpoints = inventory.checkpoints
    names = {id_: study.name for study in inventory.studies for id_ in study.ids}
    owners: dict[str, list[Path]] = {}
    for file, study_id in checkpoints.used.items():
        owners.setdefault(f"of study {names.get(study_id, 'of another storage')}", []).append(file)
    nobody = "that nothing refers to" if checkpoints.is_certain else "of unknown trials"
    for owner, files in (*owners.items(), (nobody, checkpoints.unused)):
        if files:
            yield owner, f"{len(files):,}", _size(sum(map(file_size, files)))


def _show_removal(removal: Removal) -> None:
    """Print what is to be removed, and what stays."""
    from experiments.inventory.runs import file_size, size_of

    for study in removal.studies:
        trials = study.num_finished + study.num_unfinished
        print(f"{study.kind} {printable(study.name)}: {counted(trials, 'trial')}")
    for name in removal.elsewhere:
        print(f"study {printable(name)} is not in this storage: only its runs are removed")
    if removal.runs:
        models = sum(len(run.models) for run in removal.runs)
        size = _size(size_of(removal.runs))
        what = f"{counted(len(removal.runs), 'run')} with {counted(models, 'model')}"
        print(f"{what} in MLflow: {size}")
    for version in removal.versions:
        print(f"registered model {printable(str(version))}")
    for file in removal.files:
        print(f"{printable(str(file))}: {_size(file_size(file))}")
    for line in removal.kept:
        print(f"stays: {printable(line)}")


def _size(number: int | None) -> str:
    from rich.filesize import decimal

    return "?" if number is None else decimal(number)


def _print_table(header: Row, rows: Iterable[Row], numbers: Iterable[int] = ()) -> None:
    """Print a table, unless it has no rows; columns of numbers are aligned at the right."""
    rows = [[printable(cell) for cell in row] for row in rows]
    if not rows:
        return
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        cells = [
            cell.rjust(width) if place in numbers else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
    print()


if __name__ == "__main__":
    leave(main())
