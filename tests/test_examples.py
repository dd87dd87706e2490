"""Predicted images to look at: which are picked, and how they are shown."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from mlflow import MlflowClient
from PIL import Image
from test_outputs import images, predictor_of
from test_report import desk, read_report

from experiments.comparison.loading import _examples
from experiments.comparison.testing import EXAMPLES_FILE
from tracking import predict
from tracking.examples import (
    RIGHT,
    SURE,
    UNSURE,
    WRONG,
    Example,
    ExamplePicker,
    Examples,
    draw_examples,
)
from tracking.models import predictions
from tracking.models.predictions import Predictions

__all__ = ["desk"]  # a fixture

CLASSES = ("ant", "bee", "cat")


def scores(count: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """Return probabilities (count, 3), some of them equal."""
    raw = np.random.default_rng(seed).integers(1, 6, (count, 3)).astype(np.float32)
    return raw / raw.sum(axis=1, keepdims=True)


def obvious(
    labels: npt.NDArray[np.int64], probabilities: npt.NDArray[np.float32]
) -> dict[str, list[int]]:
    """Return the rows of each group as a slow reader would find them."""
    rows = range(len(labels))
    sure = {row: probabilities[row].max() for row in rows}
    right = [row for row in rows if labels[row] == probabilities[row].argmax()]
    wrong = [row for row in rows if row not in right and labels[row] >= 0]
    by_sureness = lambda row: (-sure[row], row)  # noqa: E731
    return {
        RIGHT: sorted(right, key=by_sureness)[:4],
        WRONG: sorted(wrong, key=by_sureness)[:4],
        UNSURE: sorted(rows, key=lambda row: (sure[row], row))[:4],
    }


def width(file: str | Path | io.BytesIO) -> int:
    """Return the width of a picture in pixels."""
    with Image.open(file) as picture:
        return picture.width


def picked(groups: dict[str, list[Example]]) -> dict[str, list[int]]:
    return {title: [each.row for each in group] for title, group in groups.items()}


@pytest.mark.parametrize("part", [1, 7, 60])
def test_the_examples_are_those_of_a_slow_reader_however_they_come(part: int) -> None:
    probabilities = scores(60)
    labels = np.random.default_rng(1).integers(-1, 3, 60)
    picker = ExamplePicker()
    for start in range(0, 60, part):
        rows = np.arange(start, min(start + part, 60))
        picker.add(rows, [f"image {row}" for row in rows], labels[rows], probabilities[rows])
    assert picked(picker.groups()) == obvious(labels, probabilities)
    first = picker.groups()[WRONG][0]
    assert first.name == f"image {first.row}"
    assert first.label == labels[first.row]


def test_without_labels_there_are_the_surest_and_the_least_sure() -> None:
    picker = ExamplePicker(1)
    picker.add(np.array([3, 5]), ["a", "b"], np.array([-1, -1]), np.eye(3, dtype=np.float32)[:2])
    assert picked(picker.groups()) == {SURE: [3], UNSURE: [3]}


def test_a_group_without_examples_is_left_out() -> None:
    picker = ExamplePicker()
    picker.add(np.array([0]), ["a"], np.array([1]), np.array([[0, 1, 0]], np.float32))
    assert set(picker.groups()) == {RIGHT, UNSURE}
    assert ExamplePicker().groups() == {}


@pytest.mark.parametrize("channels", [1, 3])
def test_odd_names_and_many_classes_are_drawn(channels: int) -> None:
    classes = [f"$x_{k}$ \u202e{'n' * 40}" for k in range(50)]
    of_classes = np.full(50, 0.01, np.float32)
    example = Example(row=2, name="$a$/\x1b[31m" * 9, label=40, probabilities=of_classes)
    file = io.BytesIO()
    pixels = np.zeros((9, 7, channels), np.uint8)
    groups = {RIGHT: [example], WRONG: []}
    draw_examples(Examples(classes=tuple(classes), groups=groups, images={2: pixels}), file)
    assert width(file) > 400


def examples(side: int, channels: int) -> Examples:
    example = Example(row=5, name="x", label=1, probabilities=np.array([0.2, 0.8], np.float32))
    image = np.random.default_rng(0).integers(0, 256, (side, side + 1, channels)).astype(np.uint8)
    return Examples(classes=("ant", "bee"), groups={RIGHT: [example]}, images={5: image})


@pytest.mark.parametrize("channels", [1, 3])
def test_examples_are_recorded_as_json(channels: int) -> None:
    before = examples(9, channels)
    after = Examples.from_dict(json.loads(json.dumps(before.as_dict())))
    assert after.classes == before.classes
    np.testing.assert_array_equal(after.images[5], before.images[5])
    (one,), (other,) = before.groups[RIGHT], after.groups[RIGHT]
    assert (other.row, other.name, other.label) == (one.row, one.name, one.label)
    np.testing.assert_array_equal(other.probabilities, one.probabilities)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_large_image_is_reduced(channels: int) -> None:
    after = Examples.from_dict(examples(300, channels).as_dict())
    assert after.images[5].shape == (96, 96, channels)


@pytest.mark.parametrize(
    "change",
    [
        {"classes": None},
        {"classes": ["ant"]},
        {"groups": []},
        {"groups": {RIGHT: [{"row": 5, "name": "x", "label": 2, "probabilities": [0, 1]}]}},
        {"images": {"5": {"shape": [10**6, 10**6, 3], "pixels": ""}}},
        {"images": {"5": {"shape": [2, 2, 3], "pixels": "AAAA"}}},
        {"images": {"5": {"shape": [float("inf"), 2, 3], "pixels": "AAAA"}}},
    ],
)
def test_what_is_no_record_of_examples_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="these are no examples"):
        Examples.from_dict(examples(9, 3).as_dict() | change)


@pytest.mark.parametrize(
    ("damage", "is_read"),
    [(None, True), ("", False), ('{"half": ', False), (10**5 * "[", False)],
    ids=["none", "empty", "half", "deep"],
)
def test_a_comparison_is_read_without_the_examples_that_are_damaged(
    damage: str | None, is_read: bool, mlflow_store: str
) -> None:
    client, text = MlflowClient(), json.dumps(examples(9, 3).as_dict())
    run_id = client.create_run("0").info.run_id
    client.log_text(run_id, text if damage is None else damage, EXAMPLES_FILE)
    row = {"run_id": run_id, "loss": "mse", "seed": 1, "outcome": "complete", "test_evaluations": 1}
    assert list(_examples(client, [row])) == [run_id] * is_read


# In a report


def test_a_report_shows_the_images_of_its_source(
    desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[int, npt.NDArray[np.uint8]] = {}
    monkeypatch.setattr(
        "tracking.evaluation.report.draw_examples",
        lambda examples, file: (drawn.update(examples.images), file.touch()),
    )
    pixels, labels = images(30), np.arange(30) % 3
    np.savez("a.npz", images=pixels, labels=labels)
    assert predict.main(["a.npz", "--report", "report"]) == 0
    told = read_report()["examples"]
    assert {title: len(group) for title, group in told.items()} == {RIGHT: 4, WRONG: 4, UNSURE: 4}
    table = pd.read_csv("predictions.csv")
    for title, group in told.items():
        for each in group:
            (row,) = table[table["source"] == each["source"]].to_dict("records")
            assert each["prediction"] == row["prediction"]
            assert (row["prediction"] == row["label"]) == (title == RIGHT) or title == UNSURE
    for row, image in drawn.items():
        np.testing.assert_array_equal(image, pixels[row])
    assert "examples.png" in Path("report/report.md").read_text()


def test_an_image_that_cannot_be_read_is_no_example(desk: Path) -> None:
    for name, colour in (("red", (255, 0, 0)), ("green", (0, 255, 0))):
        Path("photos", name).mkdir(parents=True)
        Image.new("RGB", (9, 9), colour).save(f"photos/{name}/a.png")
    Path("photos/red/b.png").write_bytes(b"")
    assert predict.main(["photos", "--report", "report"]) == predict.SOME_FAILED
    shown = [each["source"] for group in read_report()["examples"].values() for each in group]
    assert set(shown) == {"photos/green/a.png", "photos/red/a.png"}
    assert width("report/examples.png") > 400


# In Python


def table(count: int = 30, *, with_labels: bool = True) -> Predictions:
    labels = ["red", "blue", None] * (count // 3) if with_labels else None
    made = predictor_of().predict(images(count), labels=labels)
    assert isinstance(made, Predictions)
    return made


def test_predictions_show_images_also_of_rows_that_were_chosen_and_sorted() -> None:
    made = table()
    wrong = made[made["label"] != made["prediction"]].sort_values("probability")
    assert width(io.BytesIO(wrong.show(6).png)) > 400
    assert wrong.show(6)._repr_png_() == wrong.show(6).png
    assert made.drop(columns="label").show(2).png


def test_the_images_shown_are_those_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: dict[int, npt.NDArray[np.uint8]] = {}
    monkeypatch.setattr(
        predictions, "draw_examples", lambda examples, _: shown.update(examples.images)
    )
    made = table(with_labels=False)
    made.iloc[[7, 3]].show(2)
    assert sorted(shown) == [3, 7]
    for row, image in shown.items():
        np.testing.assert_array_equal(image, images(30)[row])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda made: made.iloc[5:].reset_index(drop=True), "the index that they came with"),
        (lambda made: made[["label"]], "not rows of predictions"),
        (lambda made: made.iloc[:0], "no rows to show"),
    ],
)
def test_what_is_no_table_of_predictions_any_more_shows_no_images(change, expected) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=expected):
        change(table()).show()


def test_a_number_below_one_and_a_batch_that_was_too_large_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ValueError, match="must be ≥ 1, not 0"):
        table().show(0)
    monkeypatch.setattr(predictions, "_MOST_BYTES", 99)
    with pytest.raises(ValueError, match="are not kept"):
        table().show()


def test_the_sheet_can_be_saved(tmp_path: Path) -> None:
    table(3).show(3).save(tmp_path / "sheet.png")
    assert width(tmp_path / "sheet.png") > 200


def test_a_report_is_json(desk: Path) -> None:
    np.savez("a.npz", images=images(4), labels=[0, 1, 2, 0])
    assert predict.main(["a.npz", "--report", "report"]) == 0
    json.loads(Path("report/report.json").read_text())


def test_a_report_without_images_removes_an_older_sheet(desk: Path) -> None:
    from tracking import report

    np.savez("a.npz", images=images(9), labels=np.arange(9) % 3)
    assert predict.main(["a.npz", "--report", "report"]) == 0
    assert Path("report/examples.png").exists()
    assert report.main(["predictions.csv", "--out", "report"]) == 0
    assert not Path("report/examples.png").exists()
    assert "examples" not in read_report()
