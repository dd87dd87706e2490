"""Label images with a recorded model: `load_best().predict(images)`, or as a command.

`python -m tracking.predict SOURCE` labels a folder of images, an image, a list of paths, an array,
a Parquet file or a split of a data set, and writes CSV, Parquet or JSON Lines. MLflow, PyTorch and
pandas are imported by what needs them, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tracking.cli import Parser, add_choice_flags, choice_filters, run_command
from tracking.errors import one_line
from tracking.evaluation.report import FILES, SPLIT_NOTES, Subject, check_run, data_name, make
from tracking.files import check_folder
from tracking.models.predictor import BATCH_SIZE, Predictor, load_model
from tracking.prediction.chunks import Chunk, Source
from tracking.prediction.drafts import check_drafts, draft_files, open_draft
from tracking.prediction.formats import FORMATS, Format, format_of, table
from tracking.prediction.pipeline import Tally, chunk_size, label, use_available_cores
from tracking.prediction.sources import check, open_source
from tracking.prediction.splits import dataset_of
from tracking.run_search import described, model_uri
from tracking.selection import DEFAULT_METRIC, choose
from tracking.selection import load_best as load_best
from tracking.store import reading

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    Images = npt.NDArray[np.uint8] | Tensor


SOME_FAILED = 3
"""The exit code where images could not be read: their rows say why."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; what is wrong with that is a ValueError."""
    parser = Parser(
        prog="python -m tracking.predict",
        description="Label images with the best model of an MLflow experiment, and write a row for "
        "each: source, prediction, probability, p(<class>) for each class, label, the true class, "
        "where it is known, and error, where the image could not be read. Then the accuracy is "
        "printed, too.",
        epilog="exit codes: 0 done; 3 done, but some images could not be read; 2 bad input; 1 the "
        "disk or the database said no; 130 interrupted. Only 0 and 3 leave a file; after 1, 130 or "
        "a kill, --resume goes on. Where only the report failed (2: no labelled image could be "
        "read; 1: disk or server), the file stays, and tracking.report can make up for it.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a folder of images, with all below it, or one image (true class: the name of its "
        "folder, if the model has such a class); @FILE or - (standard input), a list of such "
        "images, one a line, or with a NUL after each; an .npy file (uint8, N×H×W×C, N×H×W or "
        "H×W×C); an .npz file with such images, and labels if there are any (class names, or "
        "integers from 0); a .parquet file with images, and a column label if there are any; or "
        "NAME:SPLIT of a data set (digits, cifar10 or a folder; train, validation or test), split "
        "as it was when the model was trained. Images of any size: they are resized",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("predictions.csv"),
        metavar="FILE",
        help=f"what is written, by its ending ({', '.join(FORMATS)}); a file that is there is "
        "replaced, once all is done (default: %(default)s)",
    )
    parser.add_argument(
        "--column",
        metavar="NAME",
        help="where a .parquet file has its images, as bytes or paths (default: image, bytes or "
        "path, the first that is there)",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="stop at the first image that can't be read, and leave no file",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on where the same command was cut off; if there is nothing to go on with, start",
    )
    parser.add_argument(
        "--report",
        type=Path,
        metavar="DIR",
        help="where true classes are known, write a report to this folder: accuracy, precision and "
        f"recall with 95 %% intervals, confusion matrix, calibration ({', '.join(FILES)})",
    )
    parser.add_argument(
        "--log",
        action="store_true",
        help="log the report into the run of the model, too: metrics report/NAME/… and files "
        "reports/NAME/, where NAME is that of the source, say digits-test",
    )
    model = parser.add_argument_group(
        "model",
        "at most one of --experiment (with --dataset, --study, --loss, --where), --run-id, --model",
    )
    model.add_argument(
        "--experiment",
        metavar="NAME",
        help="the MLflow experiment whose best finished run is used (default: that of `mlflow run` "
        "or MLFLOW_EXPERIMENT_NAME, else cnn-sweep)",
    )
    model.add_argument("--run-id", metavar="ID", help="use this run instead")
    model.add_argument(
        "--model",
        metavar="URI",
        help="use this model instead, say models:/NAME@ALIAS, runs:/ID/model or a folder",
    )
    add_choice_flags(model)
    parser.add_argument(
        "--metric",
        default=DEFAULT_METRIC,
        metavar="NAME",
        help="what is best: the run with the highest last value of this metric, the lowest if the "
        "name ends in loss (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=BATCH_SIZE,
        metavar="IMAGES",
        help="images that go through the model at a time (default: %(default)s)",
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path("data"),
        metavar="DIR",
        help="where downloads and decoded images of data sets are kept (default: %(default)s)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Label what a command line names, and return the exit code."""
    return run_command(build_parser(), _run, argv)


def _run(options: argparse.Namespace) -> int:
    if options.batch_size < 1:
        raise ValueError(f"--batch-size must be ≥ 1, not {options.batch_size}")
    # By hand, because an empty one counts as not given: MLproject's parameters have defaults.
    if sum(map(bool, (options.experiment, options.run_id, options.model))) > 1:
        raise ValueError("--experiment, --run-id and --model exclude each other: give one")
    if (options.run_id or options.model) and any(choice_filters(options).values()):
        raise ValueError(
            "--dataset, --study, --loss and --where choose a run: not with --run-id or --model"
        )
    if options.log and not options.report:
        raise ValueError("--log logs a report: it needs --report DIR")
    check(options.source)
    out, target = _checked(options.out, options.source)
    if options.report:
        _check_folder(options, target)
    predictor, why = _chosen(options)
    use_available_cores()
    source = open_source(
        options.source,
        classes=predictor.classes,
        metadata=predictor.metadata,
        data_dir=options.data_dir,
        column=options.column or None,
    )
    _check_no_input([target, *draft_files(target)], source.files())
    if options.report:
        _check_reportable(predictor, source, options)
    print(why)
    for note in source.notes:
        print(f"note: {note}", file=sys.stderr)
    tally = _written(predictor, source, out, target, options)
    # With quotes and escapes: a path may hold what a terminal doesn't take.
    labelled = source.size - tally.failed
    print(f"labelled {labelled} images of {options.source!r}: {str(options.out)!r}\n")
    print(tally)
    if tally.failed:
        print(
            f"note: {tally.failed} of {source.size} images could not be read: column error says "
            "why",
            file=sys.stderr,
        )
    if options.report:
        subject = _subject(predictor, source, options)
        make(target, subject, options.report, is_logged=options.log)
    return SOME_FAILED if tally.failed else 0


def _written(
    predictor: Predictor, source: Source, out: Format, target: Path, options: argparse.Namespace
) -> Tally:
    """Write the file, or go on with it."""
    import numpy as np

    none = np.zeros((0, len(predictor.classes)), np.float32)
    no_images = np.zeros((0, *predictor.image_shape), np.uint8)
    empty = Chunk(images=no_images, names=[], labels=[] if source.has_labels else None)
    with open_draft(
        target,
        _identity(predictor, source, options),
        resume=options.resume,
        begin=lambda: out.begin(table(empty, none, predictor.classes).schema),
        finish=out.finish,
    ) as draft:
        if draft.rows:
            print(f"note: going on after {draft.rows} of {source.size} images", file=sys.stderr)
        return label(
            predictor, source, draft, out, batch_size=options.batch_size, strict=options.strict
        )


def _identity(
    predictor: Predictor, source: Source, options: argparse.Namespace
) -> dict[str, object]:
    """Return all that the bytes of the output depend on."""
    import PIL
    import torch

    return {
        "source": [options.source, source.size, source.fingerprint],
        "model": [predictor.digest, list(predictor.classes)],
        "batch size": [options.batch_size, chunk_size(options.batch_size)],
        "format": options.out.suffix.lower(),
        "version of PyTorch or Pillow": [torch.__version__, PIL.__version__],
    }


def _check_folder(options: argparse.Namespace, out: Path) -> None:
    """Raise ValueError for a folder that the report can't be written to."""
    check_folder(options.report, option="--report", source=options.source)
    if out.parent == options.report.resolve() and out.name in FILES:
        raise ValueError(f"--out {str(options.out)!r} is a file of the --report")


def _check_reportable(predictor: Predictor, source: Source, options: argparse.Namespace) -> None:
    """Raise ValueError for what would leave a report unwritten once all is labelled."""
    if not source.has_labels:
        raise ValueError(
            f"--report needs images whose class is known: {options.source!r} has none of a class "
            "of the model"
        )
    files = [options.report / name for name in FILES]
    _check_no_input(files, source.files(), option="--report")
    if options.log:
        check_run(predictor.run_id)


def _subject(predictor: Predictor, source: Source, options: argparse.Namespace) -> Subject:
    note = SPLIT_NOTES.get(source.split or "")
    return Subject(
        name=data_name(options.source, source.split),
        source=options.source,
        model=predictor.uri,
        run_id=predictor.run_id,
        notes=(*source.notes, *([note] if note else [])),
    )


def _chosen(options: argparse.Namespace) -> tuple[Predictor, str]:
    """Return the model that the command line asks for, and a line on which it is, and why."""
    if options.model:
        predictor = load_model(options.model)
        return predictor, f"model {predictor.uri} of run {predictor.run_id}"
    if options.run_id:
        with reading() as client:
            run = client.get_run(options.run_id)
        return load_model(model_uri(run)), described(run)
    filters = choice_filters(options)
    known = None if filters["dataset"] else dataset_of(options.source, options.data_dir)
    # A folder that was trained on elsewhere is found by its name.
    name = known.name if known else Path(options.source).absolute().name
    choice = choose(
        options.experiment or None,
        metric=options.metric,
        prefer=(*(known.digests if known else ()), name),
        top=1,
        **filters,
    )
    return load_model(model_uri(choice.run)), "\nnote: ".join([str(choice), *choice.notes()])


def _checked(path: Path, source: str) -> tuple[Format, Path]:
    """Return the format of a file to be written and its real path, or raise ValueError."""
    out = format_of(path)
    try:
        target = path.resolve()  # a link stays one
        # Somebody else may have put a link there: it leads to no file of another kind.
        if target.suffix.lower() != path.suffix.lower():
            raise ValueError(
                f"can't write --out: {str(path)!r} is a link to {str(target)!r}, "
                f"which does not end in {path.suffix}"
            )
        check_drafts(target)
        _check_writable(target, source)
    except (OSError, RuntimeError) as error:  # the latter for links that lead in a circle
        raise ValueError(f"can't write --out {str(path)!r}: {one_line(error)}") from error
    return out, target


def _check_writable(target: Path, source: str) -> None:
    if not target.parent.is_dir():
        raise ValueError(f"can't write --out: there is no folder {str(target.parent)!r}")
    if target.exists() and not target.is_file():
        raise ValueError(f"can't write --out: {str(target)!r} is there, and is no regular file")
    _check_no_input([target, *draft_files(target)], [source, source.removeprefix("@")])
    for place in (target.parent, target):
        # The mode too: for root everything is writable, also what was made read-only on purpose.
        if place.exists() and not (os.access(place, os.W_OK) and place.stat().st_mode & 0o222):
            raise ValueError(f"can't write --out: {str(place)!r} is read-only")


def _check_no_input(
    targets: Sequence[Path], files: Iterable[str], *, option: str = "--out"
) -> None:
    """Raise ValueError if a file that is there, and would be replaced, is one of these."""
    replaced = [target.stat() for target in targets if target.exists()]
    if not replaced:
        return
    for file in files:
        try:
            status = os.stat(file)  # noqa: PTH116 -- there may be millions
        except (OSError, ValueError):
            continue
        if any(os.path.samestat(status, other) for other in replaced):
            raise ValueError(f"can't write {option}: {file!r} is among what is read")


if __name__ == "__main__":
    sys.exit(main())
