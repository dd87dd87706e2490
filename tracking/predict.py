"""Predict the classes of images with a recorded model: `python -m tracking.predict --help`.

Functions import MLflow, PyTorch and pandas when called, so that `--help` is quick. In Python, it is
`tracking.load_best().predict(images)`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from tracking.cli import FILTERS, Parser, add_choice_flags, choice_filters, run_command
from tracking.errors import one_line
from tracking.evaluation.report import FILES, SPLIT_NOTES, Subject, check_run, data_name, make
from tracking.files import check_folder, is_writable, resolved
from tracking.models.predictor import BATCH_SIZE, Predictor, load_model
from tracking.prediction.chunks import Chunk, Source, image_at
from tracking.prediction.drafts import check_drafts, draft_files, open_draft
from tracking.prediction.formats import FORMATS, Format, format_of, table
from tracking.prediction.pipeline import (
    RunningCounts,
    chunk_size,
    predict_images,
    use_available_cores,
)
from tracking.prediction.sources import check, open_source
from tracking.prediction.splits import dataset_of
from tracking.progress import say_start
from tracking.run_search import described, model_uri
from tracking.selection import choose
from tracking.selection import load_best as load_best
from tracking.store import reading

SOME_FAILED = 3
"""The exit code if some images could not be read: their rows say why."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line. Bad input is a ValueError."""
    parser = Parser(
        prog="python -m tracking.predict",
        description="Predict the classes of images with the best model of an MLflow experiment. "
        "Write a row for each image: source, prediction, probability, p(<class>) for each class, "
        "label (the true class, if known), and error (if the image could not be read). Print the "
        "accuracy if true classes are known.",
        epilog="exit codes: 0 done; 3 done, but some images could not be read; 2 bad input; 1 the "
        "disk or the database failed; 130 interrupted. Only 0 and 3 leave a file. After 1, 130 or "
        "a kill, --resume continues. If only the report failed (2: no labelled image could be "
        "read; 1: disk or server), the file stays: make the report with tracking.report.",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a folder of images, searched recursively, or one image (true class: the name of its "
        "folder, if the model has such a class); @FILE or - (standard input), a list of such "
        "images, one a line, or with a NUL after each; an .npy file (uint8, N×H×W×C, N×H×W or "
        "H×W×C); an .npz file with such an array images, and optionally labels (class names, or "
        "integers from 0); a .parquet file with images, and optionally a column label; or "
        "NAME:SPLIT of a data set (any --dataset of a sweep, such as digits or a folder; train, "
        "validation or test), split "
        "as for the model's training. Images of any size are resized to the model's",
    )
    _add_output_flags(parser)
    model = parser.add_argument_group(
        "model",
        f"at most one of --experiment (with {', '.join(f'--{name}' for name in FILTERS)}), "
        "--run-id, --model",
    )
    model.add_argument("--run-id", metavar="ID", help="use the model of this run")
    model.add_argument(
        "--model",
        metavar="URI",
        help="use this model, say models:/NAME@ALIAS, runs:/ID/model or a folder",
    )
    add_choice_flags(model)
    parser.add_argument(
        "--batch-size",
        type=int,
        default=BATCH_SIZE,
        metavar="IMAGES",
        help="images that go through the model at once (default: %(default)s)",
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path("data"),
        metavar="DIR",
        help="the folder of downloaded and decoded data sets (default: %(default)s)",
    )
    return parser


def _add_output_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("predictions.csv"),
        metavar="FILE",
        help=f"the file to write; its ending ({', '.join(FORMATS)}) is the format. An existing "
        "file is replaced at the end (default: %(default)s)",
    )
    parser.add_argument(
        "--column",
        metavar="NAME",
        help="the column of a .parquet file with the images, as bytes or paths (default: the first "
        "of image, bytes and path)",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="stop at the first image that can't be read, and leave no file",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the same command where it was stopped; if nothing is left of it, start",
    )
    parser.add_argument(
        "--report",
        type=Path,
        metavar="DIR",
        help="write a report to this folder, if true classes are known: accuracy, precision and "
        f"recall with 95 %% intervals, confusion matrix, calibration, some images with their "
        f"probabilities ({', '.join(FILES)})",
    )
    parser.add_argument(
        "--log",
        action="store_true",
        help="log the report into the run of the model as well: metrics report/NAME/… and files "
        "reports/NAME/, where NAME is that of the source, say digits-test",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return the exit code."""
    return run_command(build_parser(), _run, argv)


def _check_options(options: argparse.Namespace) -> None:
    """Raise ValueError for flags that do not go together."""
    if options.batch_size < 1:
        raise ValueError(f"--batch-size must be ≥ 1, not {options.batch_size}")
    # Not by argparse: an empty value counts as not given, because MLproject passes defaults.
    if sum(map(bool, (options.experiment, options.run_id, options.model))) > 1:
        raise ValueError("--experiment, --run-id and --model exclude each other: give one")
    if (options.run_id or options.model) and any(choice_filters(options).values()):
        raise ValueError(
            "--dataset, --study, --loss and --where choose a run: not with --run-id or --model"
        )
    if options.log and not options.report:
        raise ValueError("--log logs a report: it needs --report DIR")


def _run(options: argparse.Namespace) -> int:
    _check_options(options)
    check(options.source)
    out, target = _check_output(options.out, options.source)
    if options.report:
        _check_folder(options, target)
    say_start(f"opening the model, then {options.source!r}")
    predictor, why = _choose_model(options)
    use_available_cores()
    source = open_source(
        options.source,
        classes=predictor.classes,
        metadata=predictor.metadata,
        data_dir=options.data_dir,
        image_size=_image_size(predictor),
        column=options.column or None,
    )
    _check_no_input([target, *draft_files(target)], source.files())
    if options.report:
        _check_reportable(predictor, source, options)
    print(why)
    for note in source.notes:
        print(f"note: {note}", file=sys.stderr)
    counts = _write_predictions(predictor, source, out, target, options)
    # Quoted: a path may hold what a terminal obeys.
    predicted = source.size - counts.failed
    print(f"predicted {predicted} images of {options.source!r}: {str(options.out)!r}\n")
    print(counts)
    if counts.failed:
        line = f"{counts.failed} of {source.size} images could not be read: column error says why"
        print(f"note: {line}", file=sys.stderr)
    if options.report:
        subject = _subject(predictor, source, options)
        read_image = partial(image_at, source)
        make(target, subject, options.report, is_logged=options.log, read_image=read_image)
    return SOME_FAILED if counts.failed else 0


def _image_size(predictor: Predictor) -> int:
    """Return height and width of the images that a model takes, or raise ValueError."""
    height, width, channels = predictor.image_shape
    if height != width or channels != 3:
        raise ValueError(
            f"the model takes images of {height}×{width} pixels and {channels} channels: this "
            "command predicts square images with 3 (in Python, Predictor.predict takes them)"
        )
    return height


def _write_predictions(
    predictor: Predictor, source: Source, out: Format, target: Path, options: argparse.Namespace
) -> RunningCounts:
    """Write the file, or resume writing it."""
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
            print(f"note: resuming after {draft.rows} of {source.size} images", file=sys.stderr)
        return predict_images(
            predictor, source, draft, out, batch_size=options.batch_size, strict=options.strict
        )


def _identity(
    predictor: Predictor, source: Source, options: argparse.Namespace
) -> dict[str, object]:
    """Return everything that the bytes of the output depend on."""
    import PIL
    import torch

    return {
        "source": [options.source, source.size, source.fingerprint],
        "model": [predictor.digest, list(predictor.classes)],
        "batch size": [
            options.batch_size,
            chunk_size(options.batch_size, predictor.image_shape),
        ],
        "format": options.out.suffix.lower(),
        "version of PyTorch or Pillow": [torch.__version__, PIL.__version__],
    }


def _check_folder(options: argparse.Namespace, out: Path) -> None:
    """Raise ValueError if the report can't be written to its folder."""
    check_folder(options.report, option="--report", source=options.source)
    if out.parent == options.report.resolve() and out.name in FILES:
        raise ValueError(f"--out {str(options.out)!r} is a file of the --report")


def _check_reportable(predictor: Predictor, source: Source, options: argparse.Namespace) -> None:
    """Raise ValueError for what would prevent the report after the predictions."""
    if not source.has_labels:
        raise ValueError(
            f"--report needs true classes: no image of {options.source!r} has a class of the model"
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


def _choose_model(options: argparse.Namespace) -> tuple[Predictor, str]:
    """Return the model that the options choose, and a line that names it and says why."""
    if options.model:
        predictor = load_model(options.model)
        return predictor, f"model {predictor.uri} of run {predictor.run_id}"
    if options.run_id:
        with reading() as client:
            run = client.get_run(options.run_id)
        return load_model(model_uri(run)), described(run)
    filters = choice_filters(options)
    known = None if filters["dataset"] else dataset_of(options.source, options.data_dir)
    # If a folder was trained on elsewhere, only its name is known here.
    name = known.name if known else Path(options.source).absolute().name
    choice = choose(
        options.experiment or None,
        metric=options.metric,
        prefer=(*(known.digests if known else ()), name),
        top=1,
        **filters,
    )
    return load_model(model_uri(choice.run)), "\nnote: ".join([str(choice), *choice.notes()])


def _check_output(path: Path, source: str) -> tuple[Format, Path]:
    """Return the format of the output file and its real path, or raise ValueError."""
    out = format_of(path)
    try:
        target = resolved(path)  # the link itself stays
        # Another user may have put a link there: it must not lead to a file of another kind.
        if target.suffix.lower() != path.suffix.lower():
            raise ValueError(
                f"can't write --out: {str(path)!r} is a link to {str(target)!r}, "
                f"which does not end in {path.suffix}"
            )
        check_drafts(target)
        _check_writable(target, source)
    except (OSError, RuntimeError) as error:  # before 3.13, a RuntimeError for links in a circle
        raise ValueError(f"can't write --out {str(path)!r}: {one_line(error)}") from error
    return out, target


def _check_writable(target: Path, source: str) -> None:
    if not target.parent.is_dir():
        raise ValueError(f"can't write --out: there is no folder {str(target.parent)!r}")
    if target.exists() and not target.is_file():
        raise ValueError(f"can't write --out: {str(target)!r} exists, and is no regular file")
    _check_no_input([target, *draft_files(target)], [source, source.removeprefix("@")])
    for place in (target.parent, target):
        if place.exists() and not is_writable(place):
            raise ValueError(f"can't write --out: {str(place)!r} is read-only")


def _check_no_input(
    targets: Sequence[Path], files: Iterable[str], *, option: str = "--out"
) -> None:
    """Raise ValueError if one of these files is a target, so that it would be replaced."""
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
