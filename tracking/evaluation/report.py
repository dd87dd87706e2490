"""Report on a file of predictions of labelled images, and log the report into the model's run.

The report is made from the finished file, so that it is right for a resumed one as well. It is a
folder of files.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracking.errors import TransientError, one_line
from tracking.evaluation.figures import FIGURES
from tracking.evaluation.metrics import BINS, Measures, MetricsAccumulator
from tracking.examples import EXPLANATION, ExamplePicker, Examples, ImageReader, draw_examples
from tracking.files import open_folder, writing
from tracking.prediction.formats import format_of, to_csv
from tracking.progress import progress
from tracking.run_search import described
from tracking.store import reading
from tracking.text import escape_formulas, escaped

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pandas as pd
    import pyarrow as pa
    from mlflow.entities import Run


EXAMPLES_FILE = "examples.png"

FILES = ("report.md", "report.json", "per_class.csv", "confusion.csv", *FIGURES, EXAMPLES_FILE)
"""The last one only where the images are at hand."""

SPLIT_NOTES = {
    "train": "this is the split that the model was trained on: it looks better here than it is",
    "validation": "this is the split that models are chosen by: the best of many looks better here "
    "than it is",
}

_CONFUSIONS_SHOWN = 10

NAME_LENGTH = 100


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The images and the model of a report."""

    name: str
    """The name of the images in a run: see `data_name`."""
    source: str
    """The images, as the user named them."""
    model: str | None = None
    run_id: str | None = None
    """The run that the model came from."""
    notes: tuple[str, ...] = ()
    """What a reader should know, in one line each."""


def data_name(source: str, split: str | None = None) -> str:
    """Return the name of a source of images in a run: a part of names of metrics and files."""
    if source == "-":
        name = "stdin"
    elif split:
        name = f"{Path(source.rpartition(':')[0]).resolve().name}-{split}"
    else:
        name = Path(source.removeprefix("@")).resolve().name
    return re.sub(r"[^\w.-]+", "-", name)[:NAME_LENGTH].strip("-.") or "images"


def make(
    file: Path,
    subject: Subject,
    folder: Path,
    *,
    is_logged: bool,
    read_image: ImageReader | None = None,
) -> None:
    """Write the report on a file of predictions, print its summary, and log it if asked.

    The folder must pass `check_folder`. With `read_image`, there is a sheet of images.

    Raises:
        ValueError: the file can't be read, or no image in it is labelled.
    """
    picker = ExamplePicker() if read_image is not None else None
    try:
        measures = count(file, picker).measures()
    except ValueError as error:
        raise ValueError(f"no report: {error}") from error
    examples = None
    if picker is not None and read_image is not None:
        examples = picker.examples(measures.classes, read_image)
    write(measures, subject, folder, examples if examples and examples.images else None)
    print(f"report {str(folder)!r}: {summary(measures)}")
    if is_logged:
        print(log(measures, subject, folder))


def count(file: Path, picker: ExamplePicker | None = None) -> MetricsAccumulator:
    """Count the predictions of a file, part by part, or raise ValueError; pick examples as well.

    The columns `p(<class>)` name the classes. Any other `label` counts as unlabelled.
    """
    import numpy as np
    import pyarrow as pa

    with _reading(file):
        heads = format_of(file).heads(file)
    columns = [head for head in heads if head.startswith("p(") and head.endswith(")")]
    if not columns or "label" not in heads or len(set(heads)) < len(heads):
        raise ValueError(
            f"{str(file)!r} needs a column label and columns p(<class>), all of different names, "
            "as tracking.predict writes them"
        )
    counts = MetricsAccumulator([head[2:-1] for head in columns])
    wanted = ["label", "error", *(["source"] if picker is not None else [])]
    texts = [head for head in wanted if head in heads]
    schema = pa.schema(
        [(head, pa.string()) for head in texts] + [(head, pa.float32()) for head in columns]
    )
    start = 0
    with progress("rows") as advance:
        for batch in _batches(file, schema):
            has_error = "error" in texts
            read = np.array(batch["error"].is_null()) if has_error else np.ones(len(batch), bool)
            probabilities = np.column_stack([batch[head] for head in columns])
            counts.unreadable += int((~read).sum())
            labels = _positions(batch["label"], counts.classes)
            counts.add(labels[read], probabilities[read])
            if picker is not None:
                rows = np.flatnonzero(read)
                names = _names(batch, rows, start)
                picker.add(start + rows, names, labels[read], probabilities[read])
            start += len(batch)
            advance(len(batch))
    return counts


def _names(batch: pa.RecordBatch, rows: npt.NDArray[np.int64], start: int) -> list[str]:
    """Return the names of a part's images; without a column of them, their positions."""
    import pyarrow as pa

    if "source" not in batch.schema.names:
        return [str(start + row) for row in rows]
    return [str(name) for name in batch["source"].take(pa.array(rows)).to_pylist()]


def _batches(file: Path, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    with _reading(file):
        yield from format_of(file).read(file, schema)


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Raise each error of a file as a ValueError of one line."""
    import pyarrow as pa

    try:
        yield
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ValueError(f"can't read {str(file)!r}: {one_line(error)}") from error


def _positions(labels: pa.Array, classes: Sequence[str]) -> Any:
    """Return the positions of labels among the classes, -1 for a missing or unknown one."""
    import pyarrow as pa
    from pyarrow import compute

    found = compute.index_in(labels, value_set=pa.array(classes, pa.string()))
    return found.fill_null(-1).to_numpy(zero_copy_only=False).astype("int64")


def summary(measures: Measures) -> str:
    """Return the report in a line."""
    return (
        f"accuracy {_percent(measures.accuracy[0])} ({measures.correct} of {measures.labelled}), "
        f"95 % interval {_interval(measures.accuracy)}, "
        f"expected calibration error {measures.calibration_error:.4f}"
    )


def write(measures: Measures, subject: Subject, folder: Path, examples: Examples | None) -> None:
    """Write a report to a folder, which is created: each file appears as a whole or not at all.

    Files of the same names are replaced; others stay.
    """
    with writing("the report"), open_folder(folder, FILES) as draft:
        for name, content in _contents(measures, subject, examples):
            (draft / name).write_bytes(content)
        for name, draw in FIGURES.items():
            draw(measures, draft / name)
        if examples is not None:
            draw_examples(examples, draft / EXAMPLES_FILE)


def _contents(
    measures: Measures, subject: Subject, examples: Examples | None
) -> Iterator[tuple[str, bytes]]:
    import pyarrow as pa

    yield "report.md", _markdown(measures, subject, has_examples=examples is not None).encode()
    told = as_dict(measures, subject)
    if examples is not None:
        told["examples"] = examples.records()
    numbers = json.dumps(told, indent=1, allow_nan=False, ensure_ascii=False)
    yield "report.json", numbers.encode()
    yield "per_class.csv", to_csv(pa.Table.from_pandas(measures.per_class(), preserve_index=False))
    classes = pa.array(measures.classes, pa.string())
    heads = ["true class", *escape_formulas(classes).to_pylist()]
    yield "confusion.csv", to_csv(pa.table([classes, *measures.confusion.T], heads))


def as_dict(measures: Measures, subject: Subject) -> dict[str, Any]:
    """Return all numbers in JSON's types; 0 / 0 is None."""
    share, low, high = measures.accuracy
    return {
        "source": subject.source,
        "model": subject.model,
        "run_id": subject.run_id,
        "notes": list(subject.notes),
        "images": {
            "labelled": measures.labelled,
            "correct": measures.correct,
            "unlabelled": measures.unlabelled,
            "unreadable": measures.unreadable,
        },
        "accuracy": {"value": share, "low": low, "high": high},
        "expected_calibration_error": measures.calibration_error,
        "brier_score": measures.brier_score,
        "classes": _records(measures.per_class()),
        "confusion": measures.confusion.tolist(),
        "calibration": _records(measures.per_bin()),
    }


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    rows = frame.astype(object).where(frame.notna(), None).to_dict("records")
    return [{str(key): value for key, value in row.items()} for row in rows]


def _markdown(measures: Measures, subject: Subject, *, has_examples: bool) -> str:
    overview = {
        "images": escaped(subject.source),
        "labelled": f"{measures.labelled:,}, {measures.correct:,} of them right",
        "not counted": f"{measures.unlabelled:,} without a known class, {measures.unreadable:,} "
        "that could not be read",
        "model": escaped(subject.model or "not known"),
        "run": escaped(subject.run_id or "not known"),
        "accuracy": f"{_percent(measures.accuracy[0])}, 95 % interval "
        f"{_interval(measures.accuracy)}",
        "expected calibration error": f"{measures.calibration_error:.4f}",
        "Brier score": f"{measures.brier_score:.4f}",
    }
    parts = [
        f"# Report on {escaped(subject.source)}",
        _table(("", ""), overview.items()),
        *(f"**Note:** {escaped(note)}" for note in subject.notes),
        "## Classes",
        _table(
            ("class", "images", "predicted", "precision", "recall", "F1"),
            map(_class_cells, measures.per_class().to_dict("records")),
        ),
        "## Most frequent confusions",
        _table(
            ("true class", "predicted class", "images"),
            [
                (escaped(true), escaped(predicted), f"{images:,}")
                for true, predicted, images in measures.confused(_CONFUSIONS_SHOWN)
            ]
            or [("–", "–", "0")],
        ),
        "![Confusion matrix](confusion.png)",
        "![Reliability diagram](reliability.png)",
        *(["## Some of the images", _EXAMPLES_TEXT] if has_examples else []),
        "Intervals are Wilson's (1927). *Precision* is the share of the images predicted as a class"
        " that are of it, *recall* the share of the images of a class that are predicted as it, *F1"
        "* their harmonic mean; – is 0 / 0. The *expected calibration error* (Guo et al. 2017) is "
        f"the mean distance of accuracy and confidence over {BINS} equal bins of the confidence, "
        "weighted by their images: 0 is best. The *Brier score* is the mean squared distance of the"
        " probabilities from the truth, summed over the classes: 0 is best, 2 worst. All digits are"
        " in `report.json`, `per_class.csv` and `confusion.csv`.",
    ]
    return "\n\n".join(parts) + "\n"


def _class_cells(row: Mapping[Any, Any]) -> list[str]:
    counts = [f"{row[name]:,}" for name in ("images", "predicted")]
    shares = [
        f"{_percent(row[name])} ({_interval((row[name], row[f'{name}_low'], row[f'{name}_high']))})"
        for name in ("precision", "recall")
    ]
    cells = [*shares, _percent(row["f1"])]
    return [escaped(row["class"]), *counts, *("–" if "nan" in cell else cell for cell in cells)]


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _interval(shares: Sequence[float]) -> str:
    _, low, high = shares
    return f"{100 * low:.2f} to {100 * high:.2f} %"


_EXAMPLES_TEXT = f"{EXPLANATION}\n\n![Predicted images with their probabilities]({EXAMPLES_FILE})"


def check_run(run_id: str | None) -> None:
    """Raise ValueError unless the run exists, so that the report can be logged into it."""
    if run_id is None:
        raise ValueError("--log needs a run to log into: the model came from no run")
    with reading() as client:
        run = client.get_run(run_id)
    if run.info.lifecycle_stage != "active":
        raise ValueError(f"can't --log into {described(run)}: it is deleted")


def log(measures: Measures, subject: Subject, folder: Path) -> str:
    """Log a written report into the run of the model, and return a line about it.

    The run's status and times stay. A second report of the same name replaces the files, and adds
    values of the metrics if they differ. Raises TransientError if the server refuses.
    """
    assert subject.run_id is not None
    files, prefix = f"reports/{subject.name}", f"report/{subject.name}"
    try:
        with reading() as client:
            run = client.get_run(subject.run_id)
            # Files first: so metrics in a run imply the files.
            for name in FILES:
                if not (folder / name).exists():  # EXAMPLES_FILE
                    continue
                client.log_artifact(subject.run_id, str(folder / name), files)
            values = {f"{prefix}/{key}": value for key, value in _metrics(measures).items()}
            if {key: run.data.metrics.get(key) for key in values} != values:
                client.log_batch(subject.run_id, metrics=_of_the_model(values, run))
    except Exception as error:  # each artifact store has errors of its own
        raise TransientError(
            f"the report is in {str(folder)!r}, but not in run {subject.run_id}: {one_line(error)}"
        ) from error
    return f"logged into {described(run)}: metrics {prefix}/…, files {files}/"


def _metrics(measures: Measures) -> dict[str, float]:
    share, low, high = measures.accuracy
    return {
        "accuracy": share,
        "accuracy_low": low,
        "accuracy_high": high,
        "expected_calibration_error": measures.calibration_error,
        "brier_score": measures.brier_score,
        "images": measures.labelled,
    }


def _of_the_model(values: Mapping[str, float], run: Run) -> list[Any]:
    """Return metrics at the epoch of the run's model, linked to the model."""
    from mlflow.entities import Metric

    models = run.outputs.model_outputs if run.outputs else []
    last = max(models, key=lambda output: output.step, default=None)
    model_id, step = (last.model_id, last.step) if last else (None, 0)
    now = int(time.time() * 1000)
    return [Metric(key, value, now, step, model_id=model_id) for key, value in values.items()]
