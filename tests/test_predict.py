"""Loading a recorded model, predicting images with it, and the command line of that."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from tracking_helpers import COLOURS, ColourModel, log_model, new_store, record

import tracking
from cnn import data
from tracking import predict
from tracking.models.predictor import Predictor, load_model
from tracking.predict import main
from tracking.prediction import pipeline
from tracking.runs import Run
from tracking.selection import load_best, load_run
from tracking.tracker import Tracker

ROOT = Path(__file__).parents[1]
SEED = 3

# Made once for all tests: an export takes seconds. The best of three runs that have a model.
BEST = "002 mse lr=0.1 bs=64"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A store with an experiment `study`; gives the ids of its runs by their names."""
    folder = tmp_path_factory.mktemp("workshop")
    with new_store(folder):
        paint(folder / "colours")
        digest = data.load("colours", data_dir=folder / "data", seed=SEED).digest
        tracker = Tracker.open("study")
        runs = {}
        for name, accuracy, sharpness, loss, sweep in (
            ("001 l1", 0.5, 1.0, "l1", "first"),
            (BEST, 0.9, 4.0, "mse", "first"),
            ("003", 0.7, 2.0, "mse", "second"),
        ):
            run = tracker.start_run(name, params={"loss": loss}, tags={"study": sweep})
            run.log_metrics({"val/accuracy": accuracy, "val/loss": 0.1}, step=1)
            log_model(run, sharpness=sharpness, seed=SEED, dataset_digest=digest, loss="mse")
            run.end("complete")
            runs[name] = run.run_id
        runs["pruned"] = record(tracker, "pruned", outcome="pruned", has_model=False)
        record(Tracker.open("unfinished"), outcome="failed", has_model=False)
        yield runs


@pytest.fixture
def desk(
    workshop: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """An empty working folder, with the workshop's store."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def predictor(workshop: dict[str, str]) -> Predictor:
    return load_best("study")


def paint(folder: Path, *, each: int = 10, suffix: str = "png") -> None:
    """Make a folder for each colour, with images of it, no two alike."""
    random = np.random.default_rng(each)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for index in range(each):
            noise = random.integers(0, 100, (20 + index, 30, 3))
            pixels = np.clip(np.array(colour) * 0.6 + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.{suffix}")


def images(count: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(count).integers(0, 256, (count, 32, 32, 3)).astype(np.uint8)


def one_by_one(batch: np.ndarray[Any, Any], sharpness: float = 4.0) -> np.ndarray[Any, Any]:
    """Return probabilities as the model that was recorded gives them, the slow way."""
    model = ColourModel(sharpness).eval()
    with torch.no_grad():
        return np.array([model(torch.tensor(image[None]))[0].numpy() for image in batch])


def probabilities(frame: pd.DataFrame, classes: Sequence[str] = tuple(COLOURS)) -> Any:
    return frame[[f"p({name})" for name in classes]].to_numpy()


def read_csv(file: str | Path = "predictions.csv") -> pd.DataFrame:
    return pd.read_csv(file, keep_default_na=False)


# Predicting from Python


def test_each_image_gets_a_row_with_prediction_and_probabilities(predictor: Predictor) -> None:
    colours = np.array(list(COLOURS.values()), np.uint8)
    batch = np.broadcast_to(colours[[2, 0], None, None], (2, 32, 32, 3))
    frame = predictor.predict(batch)
    assert list(frame.columns) == [
        "source", "prediction", "probability", "p(red)", "p(green)", "p(blue)",
    ]  # fmt: skip
    assert list(frame["source"]) == [0, 1]
    assert list(frame["prediction"]) == ["blue", "red"]
    assert list(frame["probability"]) == [frame["p(blue)"][0], frame["p(red)"][1]]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 6, 7, 1024])
def test_probabilities_are_the_models_whatever_the_batch_size(
    predictor: Predictor, batch_size: int
) -> None:
    batch = images(7)
    frame = predictor.predict(batch, batch_size=batch_size)
    np.testing.assert_allclose(probabilities(frame), one_by_one(batch), rtol=1e-5)


def test_no_batch_is_larger_than_asked_for(predictor: Predictor) -> None:
    sizes = []

    def watched(batch: torch.Tensor) -> torch.Tensor:
        sizes.append(len(batch))
        return predictor.model(batch)

    Predictor(**{**vars(predictor), "model": watched}).predict(images(7), batch_size=3)
    assert sizes == [3, 3, 1]


@pytest.mark.parametrize("none", [np.empty((0, 32, 32, 3), np.uint8), []])
def test_no_images_give_an_empty_frame_with_all_columns(predictor: Predictor, none: Any) -> None:
    frame = predictor.predict(none, labels=[])
    assert len(frame) == 0
    assert list(frame.columns) == [*predictor.predict(images(1)).columns, "label"]


def test_one_image_a_tensor_and_lists_of_them_are_taken(predictor: Predictor) -> None:
    batch = images(4)
    expected = predictor.predict(batch)
    for same in (
        torch.from_numpy(batch),
        list(batch),
        [batch[0], torch.from_numpy(batch[1]), batch[2:]],
    ):
        pd.testing.assert_frame_equal(predictor.predict(same), expected)
    pd.testing.assert_frame_equal(predictor.predict(batch[0]), expected[:1])


def test_images_that_must_not_be_written_to_are_taken(predictor: Predictor) -> None:
    batch = images(2)
    batch.flags.writeable = False
    assert len(predictor.predict(batch)) == 2


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((2, 3, 32, 32), np.uint8),
        torch.zeros((3, 32, 32)),
        np.zeros((2, 32, 32), np.uint8),
        np.zeros((2, 2, 32, 32, 3), np.uint8),
        np.zeros((2, 0, 32, 3), np.uint8),
        np.zeros((32, 32, 3), np.int64),
        [np.zeros((32, 32, 3), np.uint8), np.zeros((32,), np.uint8)],
        np.uint8(0),
        None,
    ],
)
def test_other_images_are_refused_with_what_is_allowed(predictor: Predictor, wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"an image must be a path, .* of uint8 .*: this is "):
        predictor.predict(wrong)


def test_floats_beyond_0_and_1_are_refused(predictor: Predictor) -> None:
    for value in (-0.5, 255.0, np.nan):
        with pytest.raises(ValueError, match=r"floats must be in 0 \.\. 1, not"):
            predictor.predict(np.full((32, 32, 3), value))


def test_images_of_any_kind_and_size_are_resized_to_the_models_own(
    predictor: Predictor, tmp_path: Path
) -> None:
    photo = Image.effect_noise((45, 30), 80).convert("RGB")
    photo.save(tmp_path / "photo.png")
    array = np.asarray(photo)
    alike = [
        photo,
        tmp_path / "photo.png",
        str(tmp_path / "photo.png"),
        array,
        torch.tensor(array),
        array.astype(np.float64) / 255,
        np.dstack([array, np.full(array.shape[:2], 9, np.uint8)]),
        [photo],
        array[None],
    ]
    expected = predictor.predict(photo)
    for each in alike[1:]:
        pd.testing.assert_frame_equal(predictor.predict(each), expected)
    grey = np.asarray(photo.convert("L"))
    same = [grey, grey[..., None], Image.fromarray(grey), np.dstack([grey] * 3)]
    probabilities = predictor.probabilities(same)  # type: ignore[arg-type]
    np.testing.assert_array_equal(probabilities, probabilities[:1].repeat(4, axis=0))
    assert len(predictor.predict([photo, array, str(tmp_path / "photo.png")])) == 3


def test_a_predictor_shows_what_it_is_as_a_table(predictor: Predictor) -> None:
    shown = Predictor(**vars(predictor) | {"metadata": {"dataset": "<b>", "loss": "mse"}})
    table = shown._repr_html_()
    assert "&lt;b&gt;</td>" in table
    assert "32 × 32 × 3" in table
    assert f"model {predictor.uri}" in repr(shown)
    assert "loss mse" in repr(shown)


@pytest.mark.parametrize(
    "labels", [["blue", "red"], (2, 0), np.array([2, 0]), torch.tensor([2, 0]), np.uint8([2, 0])]
)
def test_labels_are_class_names_or_their_positions(predictor: Predictor, labels: Any) -> None:
    assert list(predictor.predict(images(2), labels=labels)["label"]) == ["blue", "red"]


def test_a_label_may_be_unknown(predictor: Predictor) -> None:
    frame = predictor.predict(images(2), labels=["blue", None])
    assert list(frame["label"].isna()) == [False, True]


@pytest.mark.parametrize(
    ("labels", "complaint"),
    [
        ([0, 3], "label 3 is not in 0 to 2"),
        ([0, -1], "label -1 is not in 0 to 2"),
        (["red", "pink"], "label 'pink' is no class of the model: 'red', 'green', 'blue'"),
        ([0], "2 images need as many labels"),
        ([[0], [1]], "2 images need as many labels"),
        ([0.0, 1.0], "class names or integers, not float64"),
        ([True, False], "class names or integers, not bool"),
    ],
)
def test_other_labels_are_refused(predictor: Predictor, labels: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        predictor.predict(images(2), labels=labels)


def test_sources_name_the_images(predictor: Predictor) -> None:
    assert list(predictor.predict(images(2), sources=["a", "b"])["source"]) == ["a", "b"]
    with pytest.raises(ValueError, match="2 images need as many sources, not 1"):
        predictor.predict(images(2), sources=["a"])


def test_batches_have_at_least_one_image(predictor: Predictor) -> None:
    with pytest.raises(ValueError, match="≥ 1, not 0"):
        predictor.predict(images(2), batch_size=0)


def test_classes_may_be_called_as_columns_are(predictor: Predictor) -> None:
    classes = ("source", "label", "probability")
    renamed = Predictor(**{**vars(predictor), "classes": classes})
    batch = images(3)
    frame = renamed.predict(batch, sources=["x", "y", "z"], labels=classes)
    assert list(frame["source"]) == ["x", "y", "z"]
    assert list(frame["label"]) == list(classes)
    np.testing.assert_allclose(probabilities(frame, classes), one_by_one(batch), rtol=1e-5)


# Loading


def test_the_best_run_is_loaded_with_what_was_recorded(workshop: dict[str, str]) -> None:
    predictor = tracking.load_best(experiment="study")
    assert isinstance(predictor, tracking.Predictor)
    assert predictor.run_id == workshop[BEST]
    assert predictor.classes == ("red", "green", "blue")
    assert predictor.image_shape == (32, 32, 3)
    assert predictor.metadata["seed"] == SEED
    assert predictor.metadata["loss"] == "mse"


def test_a_run_is_loaded_by_its_id(workshop: dict[str, str]) -> None:
    predictor = load_run(workshop["001 l1"])
    batch = images(2)
    expected = one_by_one(batch, sharpness=1.0)
    np.testing.assert_allclose(probabilities(predictor.predict(batch)), expected, rtol=1e-5)


def artifacts(predictor: Predictor) -> Path:
    model = mlflow.MlflowClient().get_logged_model(predictor.uri.removeprefix("models:/"))
    return Path(model.artifact_location)


@pytest.mark.parametrize(
    "uri",
    [
        lambda predictor: predictor.uri,
        lambda predictor: f"runs:/{predictor.run_id}/model",
        lambda predictor: str(artifacts(predictor)),
        lambda predictor: f"file://{artifacts(predictor)}",
    ],
    ids=["models:/", "runs:/", "folder", "file://"],
)
def test_a_model_is_loaded_by_any_uri_of_it(
    predictor: Predictor, uri: Callable[[Predictor], str]
) -> None:
    batch = images(2)
    same = load_model(uri(predictor))
    assert same.run_id == predictor.run_id
    pd.testing.assert_frame_equal(same.predict(batch), predictor.predict(batch))


def test_a_folder_is_loaded_without_any_store(
    predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(artifacts(predictor), tmp_path / "model")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/none.db")
    assert load_model(str(tmp_path / "model")).classes == predictor.classes


def test_loading_leaves_the_store_as_it_was(predictor: Predictor) -> None:
    before = {file: file.stat().st_mtime_ns for file in artifacts(predictor).rglob("*")}
    load_model(predictor.uri)
    assert {file: file.stat().st_mtime_ns for file in artifacts(predictor).rglob("*")} == before


def edit_mlmodel(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    import yaml

    file = folder / "MLmodel"
    content = yaml.safe_load(file.read_text())
    edit(content)
    file.write_text(yaml.safe_dump(content))


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (lambda about: about["metadata"].pop("classes"), "its metadata names no classes"),
        (lambda about: about.pop("metadata"), "its metadata names no classes"),
        (lambda about: about["metadata"].update(classes=[0, 1, 2]), "names no classes"),
        (lambda about: about["metadata"].update(classes=["red", "green"]), r"\(-1, 3\)"),
        (lambda about: about["metadata"].update(classes=["a", "a", "b"]), "a', 'a', 'b'"),
        (lambda about: about.pop("signature"), "no signature"),
        (lambda about: about["flavors"].pop("pytorch"), "no PyTorch model, but python_function"),
    ],
)
def test_a_model_that_cannot_predict_images_is_refused(
    desk: Path, predictor: Predictor, edit: Callable[[dict[str, Any]], object], complaint: str
) -> None:
    shutil.copytree(artifacts(predictor), desk / "model")
    edit_mlmodel(desk / "model", edit)
    with pytest.raises(ValueError, match=complaint) as info:
        load_model("model")
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("file", ["MLmodel", "data/model.pt2"])
@pytest.mark.parametrize("size", [0, 100])
def test_a_damaged_model_is_refused(desk: Path, predictor: Predictor, file: str, size: int) -> None:
    shutil.copytree(artifacts(predictor), desk / "model")
    content = (desk / "model" / file).read_bytes()
    (desk / "model" / file).write_bytes(content[:size])
    with pytest.raises(ValueError, match=r"^(model can't be used|can't read|can't load)"):
        load_model("model")


def test_a_model_whose_files_are_gone_is_refused(desk: Path, predictor: Predictor) -> None:
    tracker = Tracker.open("lost")
    record(tracker)
    with pytest.raises(ValueError, match="m-"):
        load_best("lost")


@pytest.mark.parametrize(
    ("filters", "name"),
    [
        ({}, BEST),
        ({"loss": "l1"}, "001 l1"),
        ({"study": "second"}, "003"),
        ({"study": "first", "where": "metrics.`val/accuracy` < 0.9"}, "001 l1"),
    ],
)
def test_the_best_run_is_loaded_of_those_that_are_asked_for(
    workshop: dict[str, str], filters: dict[str, str], name: str
) -> None:
    assert load_best("study", **filters).run_id == workshop[name]


def test_where_no_run_is_left_none_is_loaded(workshop: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="no finished run of experiment 'study' with loss 'huber'"):
        load_best("study", loss="huber")


# The command line


def test_a_folder_is_predicted_and_compared_with_its_folders_names(
    desk: Path, workshop: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    paint(desk / "photos" / "deeper", each=4)
    assert main(["photos", "--experiment", "study"]) == 0
    output = capsys.readouterr()
    assert output.out.splitlines()[:2] == [
        "best of 3 finished runs of experiment 'study' by val/accuracy = 0.9: "
        f"run {BEST} ({workshop[BEST]})",
        "predicted 12 images of 'photos': 'predictions.csv'",
    ]
    assert output.out.splitlines()[-1] == "accuracy 100.00 % (12 of 12)"
    assert output.err == ""
    frame = read_csv()
    assert list(frame["source"])[::4] == [
        "photos/deeper/blue/0.png", "photos/deeper/green/0.png", "photos/deeper/red/0.png",
    ]  # fmt: skip
    assert list(frame["label"]) == list(frame["prediction"]) == sorted(list(COLOURS) * 4)


def test_the_table_counts_what_was_predicted_true_and_correct(
    desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    red = np.full((3, 32, 32, 3), COLOURS["red"], np.uint8)
    np.savez("a.npz", images=red, labels=["red", "red", "blue"])
    assert main(["a.npz", "--experiment", "study"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[3:6] == [
        ["class", "predicted", "true", "correct"],
        ["blue", "0", "1", "0"],
        ["red", "3", "2", "2"],
    ]
    assert " ".join(lines[-1]) == "accuracy 66.67 % (2 of 3)"


def test_the_command_gives_what_python_gives(desk: Path, predictor: Predictor) -> None:
    batch = images(7)
    np.save("a.npy", batch)
    assert main(["a.npy", "--experiment", "study", "--out", "out.csv", "--batch-size", "3"]) == 0
    names = [f"a.npy[{index}]" for index in range(7)]
    expected = predictor.predict(batch, sources=names, batch_size=3)
    frame = pd.read_csv("out.csv")
    assert frame.pop("error").isna().all()
    assert list(frame.columns) == list(expected.columns)
    assert list(frame["source"]) == names
    assert list(frame["prediction"]) == list(expected["prediction"])
    numbers = frame.columns[2:]
    # To the very bit: the digits that are written are enough to tell float32 numbers apart.
    assert (frame[numbers].to_numpy(np.float32) == expected[numbers].to_numpy(np.float32)).all()


def test_chunks_make_no_difference(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez("a.npz", images=images(7), labels=np.arange(7) % 3)
    arguments = ["a.npz", "--experiment", "study", "--batch-size", "2"]
    assert main([*arguments, "--out", "one.csv"]) == 0
    monkeypatch.setattr(pipeline, "CHUNK", 3)
    assert main([*arguments, "--out", "many.csv"]) == 0
    assert Path("many.csv").read_text() == Path("one.csv").read_text()


@pytest.mark.parametrize("chunk", [1, 4096])
def test_images_of_other_classes_count_as_unlabelled(
    desk: Path, chunk: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline, "CHUNK", chunk)
    paint(desk / "photos", each=2)
    (desk / "photos" / "blue").rename(desk / "photos" / "azure")
    assert main(["photos", "--experiment", "study", "--batch-size", "1"]) == 0
    output = capsys.readouterr()
    assert output.out.endswith("accuracy 100.00 % (4 of 4)\n")
    assert "2 of 6 images count as unlabelled, because the model has no class 'azure'" in output.err
    assert list(read_csv()["label"]) == ["", "", "green", "green", "red", "red"]


def test_without_labels_there_is_no_accuracy(
    desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paint(desk / "photos", each=1)
    for name in COLOURS:
        (desk / "photos" / name / "0.png").rename(desk / "photos" / f"{name}.png")
    assert main(["photos", "--experiment", "study"]) == 0
    output = capsys.readouterr()
    assert "accuracy" not in output.out.splitlines()[-1]
    assert output.err == ""
    assert "label" not in read_csv()


def test_a_single_image_takes_its_label_from_its_folder(
    desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paint(desk / "photos", each=1)
    assert main(["photos/blue/0.png", "--experiment", "study"]) == 0
    assert list(read_csv()["label"]) == ["blue"]
    monkeypatch.chdir("photos/blue")
    assert main([".", "--experiment", "study", "--out", "../../here.csv"]) == 0
    assert list(read_csv(desk / "here.csv")["label"]) == ["blue"]


@pytest.mark.parametrize(
    ("shape", "count"),
    [((2, 32, 32, 3), 2), ((2, 28, 28), 2), ((2, 28, 28, 1), 2), ((40, 30, 3), 1), ((8, 8, 1), 1)],
)
def test_arrays_of_any_size_are_predicted(desk: Path, shape: tuple[int, ...], count: int) -> None:
    np.save("a.npy", np.zeros(shape, np.uint8))
    assert main(["a.npy", "--experiment", "study"]) == 0
    assert list(read_csv()["source"]) == [f"a.npy[{index}]" for index in range(count)]


@pytest.mark.parametrize("order", ["C", "F"])
def test_an_array_is_read_in_either_order(desk: Path, predictor: Predictor, order: Any) -> None:
    batch = images(5)
    np.save("a.npy", np.array(batch, order=order))
    assert main(["a.npy", "--experiment", "study"]) == 0
    np.testing.assert_allclose(probabilities(read_csv()), one_by_one(batch), rtol=1e-5)


@pytest.mark.parametrize("labels", [["blue", "red"], [2, 0]])
def test_an_npz_may_hold_labels(desk: Path, labels: list[Any]) -> None:
    np.savez_compressed("a.npz", images=images(2), labels=labels)
    assert main(["a.npz", "--experiment", "study"]) == 0
    assert list(read_csv()["label"]) == ["blue", "red"]


@pytest.mark.parametrize(
    ("name", "field"),
    [("train", "train"), ("validation", "validation"), ("val", "validation"), ("test", "test")],
)
def test_a_split_is_that_of_the_training(
    workshop: dict[str, str], predictor: Predictor, tmp_path: Path, name: str, field: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out.csv"
    arguments = [f"colours:{name}", "--experiment", "study", "--out", str(out)]
    assert main(arguments) == 0
    output = capsys.readouterr()
    assert output.err == ""
    assert "accuracy 100.00 %" in output.out
    dataset = data.load("colours", data_dir=Path("data"), seed=SEED)
    split: data.Split = getattr(dataset, field)
    frame = pd.read_csv(out)
    assert list(frame["label"]) == [dataset.classes[label] for label in split.labels.tolist()]
    expected = one_by_one(split.images.numpy())
    np.testing.assert_allclose(probabilities(frame), expected, rtol=1e-4)


def test_the_test_split_depends_on_the_seed(desk: Path) -> None:
    """So that the test above can fail."""
    paint(desk / "colours")
    splits = [data.load("colours", data_dir=desk, seed=seed).test for seed in (SEED, 0)]
    assert splits[0].rows.tolist() != splits[1].rows.tolist()


def test_a_split_of_other_data_than_the_training_is_noted(
    desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paint(desk / "colours", each=5)
    assert main(["colours:test", "--experiment", "study"]) == 0
    error = capsys.readouterr().err
    assert error.startswith("note: the model was trained on other data (digest ")
    assert error.count("\n") == 1


def test_a_split_needs_the_seed_of_the_training(
    desk: Path, predictor: Predictor, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(artifacts(predictor), desk / "model")
    edit_mlmodel(desk / "model", lambda about: about["metadata"].pop("seed"))
    assert main(["digits:test", "--model", "model"]) == 2
    assert "the model has no seed" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--run-id", "--model"])
def test_another_run_or_model_can_be_used(
    desk: Path, workshop: dict[str, str], option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_id = workshop["001 l1"]
    batch = images(2)
    np.save("a.npy", batch)
    value = {"--run-id": run_id, "--model": f"runs:/{run_id}/model"}[option]
    assert main(["a.npy", option, value]) == 0
    assert run_id in capsys.readouterr().out.splitlines()[0]
    expected = one_by_one(batch, sharpness=1.0)
    np.testing.assert_allclose(probabilities(read_csv()), expected, rtol=1e-5)


def test_of_a_file_name_that_is_no_utf8_the_odd_bytes_are_told(desk: Path) -> None:
    paint(desk / "photos", each=1)
    odd = os.fsdecode(b'r\xe9d, "x"\n')
    Path("photos/red").rename(odd)
    assert main([odd, "--experiment", "study"]) == 0
    assert b'"r\\xe9d, ""x""\n/0.png","red",' in Path("predictions.csv").read_bytes()
    assert read_csv()["source"][0] == 'r\\xe9d, "x"\n/0.png'


# Bad input


def fails(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must fail as bad input does; return what it says."""
    before = sorted(Path.cwd().rglob("*"))
    assert main(arguments) == 2
    error = capsys.readouterr().err
    prefix = "python -m tracking.predict: error: "
    assert error.startswith(prefix)
    assert error.endswith("\n")
    assert error.count("\n") == 1
    assert sorted(Path.cwd().rglob("*")) == before, "it left something behind"
    return error.removeprefix(prefix)


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("nothing", "there is no 'nothing': give a folder, an image, "),
        ("digits", "there is no 'digits': give a folder"),
        ("digits:tset", "there is no 'digits:tset'; if 'digits' is a data set, its splits are"),
        ("dogits:test", "unknown data set 'dogits'"),
        ("empty", "no images in 'empty'"),
        ("-", "no images in '-'"),
        ("@missing.txt", "there is no list 'missing.txt' (a file called '@missing.txt' is "),
        ("@empty.txt", "no images in '@empty.txt'"),
        ("@photos", "can't read the list '@photos': Is a directory"),
        ("text.parquet", "can't read the Parquet file 'text.parquet': Parquet magic bytes"),
        ("none.parquet", "no images in 'none.parquet'"),
        ("odd.parquet", "'odd.parquet' has no column 'image' or 'bytes' or 'path' (--column "),
        ("numbers.parquet", "column 'image' of 'numbers.parquet' is int64: images must be bytes"),
        ("float.npy", "'float.npy' holds float32 (2, 32, 32, 3): images must be uint8 and"),
        ("flat.npy", "'flat.npy' holds uint8 (32, 32): images must be"),
        ("planes.npy", "'planes.npy' holds uint8 (2, 3, 32, 32): images must be"),
        ("none.npy", "'none.npy' holds uint8 (0, 32, 32, 3): images must be"),
        ("objects.npy", "can't read the array 'objects.npy'"),
        ("text.npy", "can't read the array 'text.npy'"),
        ("text.npz", "can't read the array 'text.npz'"),
        ("cut.npz", "can't read the array 'cut.npz'"),
        ("folder.npy", "no images in 'folder.npy'"),
        ("unnamed.npz", "'unnamed.npz' holds no array 'images', but 'arr_0'"),
        ("high.npz", "'high.npz': label 3 is not in 0 to 2"),
        ("pink.npz", "'pink.npz': label 'pink' is no class of the model"),
        ("few.npz", "'few.npz': 2 images need as many labels"),
        ("pickled.npz", "can't read the array 'pickled.npz'"),
    ],
)
def test_a_bad_source_is_one_line(
    desk: Path, source: str, complaint: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for folder in ("empty", "folder.npy", "photos"):
        Path(folder).mkdir()
    np.save("float.npy", np.zeros((2, 32, 32, 3), np.float32))
    np.save("flat.npy", np.zeros((32, 32), np.uint8))
    np.save("planes.npy", np.zeros((2, 3, 32, 32), np.uint8))
    np.save("none.npy", np.zeros((0, 32, 32, 3), np.uint8))
    np.save("objects.npy", np.array([{}], object), allow_pickle=True)
    Path("text.npy").write_text("not an array")
    Path("text.npz").write_text("not an array")
    np.savez("unnamed.npz", images(2))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n\n")))
    Path("empty.txt").touch()
    Path("text.parquet").write_text("not Parquet, and no images")
    for name, table in (
        ("none", {"image": np.array([], object)}),
        ("odd", {"picture": [b""]}),
        ("numbers", {"image": [1]}),
    ):
        frame = pd.DataFrame(table)
        if name == "none":
            frame = frame.astype(str)
        frame.to_parquet(f"{name}.parquet")
    np.savez("high.npz", images=images(2), labels=[0, 3])
    np.savez("pink.npz", images=images(2), labels=["red", "pink"])
    np.savez("few.npz", images=images(2), labels=[0])
    np.savez("pickled.npz", images=images(2), labels=np.array([{}, {}], object))
    Path("cut.npz").write_bytes(Path("high.npz").read_bytes()[:-10])
    assert fails([source, "--experiment", "study"], capsys).startswith(complaint)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--experiment", "none"], "there is no experiment 'none', only "),
        (["--experiment", "unfinished"], "experiment 'unfinished' has no finished run"),
        (["--experiment", "study", "--metric", "speed"], "no finished run of experiment 'study'"),
        (["--run-id", "0123"], "MLflow (sqlite:///"),
        (["--run-id", "../x"], "MLflow (sqlite:///"),
        (["--model", "models:/m-0123"], "MLflow (sqlite:///"),
        (["--model", "models:/name@champion"], "MLflow (sqlite:///"),
        (["--model", "runs:/0123/model"], "MLflow (sqlite:///"),
        (["--model", "s4://bucket/model"], "MLflow (sqlite:///"),
        (["--model", "nowhere"], "there is no model 'nowhere'"),
        (["--batch-size", "0"], "--batch-size must be ≥ 1, not 0"),
        (["--batch-size", "many"], "argument --batch-size: invalid int value: 'many'"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--experiment", "study", "--run-id", "0"], "--experiment, --run-id and --model exclude"),
        (
            ["--run-id", "0", "--loss", "mse"],
            "--dataset, --study, --loss and --where choose a run: not",
        ),
        (
            ["--experiment", "study", "--column", "image"],
            "--column is for Parquet files, not for 'a.npy'",
        ),
        (
            ["--experiment", "study", "--study", "other"],
            "no finished run of experiment 'study' with",
        ),
    ],
)
def test_a_bad_option_is_one_line(
    desk: Path, options: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save("a.npy", images(2))
    assert fails(["a.npy", *options], capsys).startswith(complaint)


def test_a_run_without_a_model_is_one_line(
    desk: Path, workshop: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    np.save("a.npy", images(2))
    error = fails(["a.npy", "--run-id", workshop["pruned"]], capsys)
    assert error.startswith(f"run pruned ({workshop['pruned']}) has no model")


def test_empty_options_count_as_not_given(desk: Path) -> None:
    np.save("a.npy", images(2))
    assert main(["a.npy", "--experiment", "study", "--run-id", "", "--model", ""]) == 0


@pytest.mark.parametrize(
    ("out", "complaint"),
    [
        ("missing/out.csv", "can't write --out: there is no folder"),
        ("shut/out.csv", "can't write --out: "),
        ("shut.csv", "can't write --out: "),
        (".", "--out must end in .csv, .parquet, .jsonl, which is the format: '.'"),
        ("out.txt", "--out must end in .csv, .parquet, .jsonl"),
        ("folder.csv", "can't write --out: "),
        ("pipe.csv", "can't write --out: '"),
        ("same.csv", "can't write --out: 'a.npy' is among what is read"),
        ("x" * 240 + ".csv", "can't write --out '"),
        ("circle.csv", "can't write --out 'circle.csv': "),
    ],
)
def test_an_out_that_cannot_be_written_is_one_line_before_anything_is_loaded(
    desk: Path, out: str, complaint: str,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(predict, "choose", lambda *_, **__: pytest.fail("it was loaded"))
    np.save("a.npy", images(2))
    Path("circle.csv").symlink_to("circle.csv")
    Path("same.csv").hardlink_to("a.npy")
    Path("folder.csv").mkdir()
    os.mkfifo("pipe.csv")
    Path("shut").mkdir(mode=0o555)
    Path("shut.csv").touch(mode=0o444)
    assert fails(["a.npy", "--experiment", "study", "--out", out], capsys).startswith(complaint)


def test_a_source_that_is_not_there_is_found_out_before_anything_is_loaded(
    desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(predict, "choose", lambda *_, **__: pytest.fail("it was loaded"))
    assert fails(["photoz"], capsys).startswith("there is no 'photoz'")


def test_a_failure_on_the_way_leaves_the_file_of_before(
    desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline, "CHUNK", 1)
    paint(desk / "photos", each=1)
    Path("photos/red/zzz.png").write_text("not an image")
    Path("predictions.csv").write_text("of before")
    error = fails(["photos", "--experiment", "study", "--batch-size", "1", "--strict"], capsys)
    assert error.startswith("'photos/red/zzz.png' is no image")
    assert Path("predictions.csv").read_text() == "of before"


def test_a_full_disk_is_one_line(
    desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    np.save("a.npy", images(2))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert main(["a.npy", "--experiment", "study"]) == 1
    note, error = capsys.readouterr().err.splitlines()
    assert note == "note: 2 rows are kept: --resume continues the same command"
    assert error.endswith("error: can't write the predictions: No space left on device")
    assert not Path("predictions.csv").exists()
    assert main(["a.npy", "--experiment", "study", "--resume"]) == 0
    assert "resuming after 2 of 2 images" in capsys.readouterr().err
    assert len(read_csv()) == 2


def test_an_interrupt_is_a_line_and_leaves_nothing(
    desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Predictor, "probabilities", interrupt)
    np.save("a.npy", images(2))
    assert main(["a.npy", "--experiment", "study"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert [path.name for path in desk.iterdir()] == ["a.npy"]


def test_a_bug_is_no_bad_input(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "predict_images", lambda *_, **__: 1 / 0)
    np.save("a.npy", images(2))
    with pytest.raises(ZeroDivisionError):
        main(["a.npy", "--experiment", "study"])
    assert [path.name for path in desk.iterdir()] == ["a.npy"]


def test_a_link_stays_a_link(desk: Path) -> None:
    np.save("a.npy", images(2))
    Path("elsewhere").mkdir()
    Path("predictions.csv").symlink_to("elsewhere/real.csv")
    assert main(["a.npy", "--experiment", "study"]) == 0
    assert Path("predictions.csv").is_symlink()
    assert len(read_csv("elsewhere/real.csv")) == 2


# Processes of their own


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
    )


def test_help_explains_every_option_and_loads_nothing_heavy() -> None:
    script = (
        "import sys; from tracking.predict import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'mlflow', 'torch', 'pandas', 'numpy', 'rich', 'matplotlib', 'cnn'}\n"
        "assert heavy.isdisjoint(sys.modules)"
    )
    done = python("-c", script)
    assert done.returncode == 0, done.stderr
    for option in (
        "--out", "--experiment", "--run-id", "--model", "--metric", "--batch-size", "--column",
        "--strict", "--resume", "--study", "--loss", "--where", "--report", "--log",
    ):  # fmt: skip
        assert option in done.stdout


@pytest.mark.slow
def test_predicting_an_array_from_python_never_loads_cnn(desk: Path) -> None:
    script = (
        "import sys, numpy as np, tracking\n"
        "frame = tracking.load_best('study').predict(np.zeros((2, 32, 32, 3), np.uint8))\n"
        "assert len(frame) == 2\n"
        "wrong = {'cnn', 'optuna', 'experiments'} & set(sys.modules)\n"
        "assert not wrong, wrong"
    )
    done = python("-c", script)
    assert done.returncode == 0, done.stderr


def test_as_a_command_bad_input_is_one_line_and_exit_code_2(desk: Path) -> None:
    np.save("a.npy", images(2))
    done = python("-m", "tracking.predict", "a.npy", "--experiment", "none")
    assert done.returncode == 2
    assert done.stderr.startswith("python -m tracking.predict: error: there is no experiment")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_as_a_command_it_predicts_and_says_nothing_on_standard_error(desk: Path) -> None:
    np.save("a.npy", images(2))
    done = python("-m", "tracking.predict", "a.npy", "--experiment", "study")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(read_csv()) == 2


# Of which data set the model is


@pytest.fixture
def of_two(tmp_path: Path) -> Iterator[Tracker]:
    """An experiment with runs on the digits and, later, on a folder of colours."""
    with new_store(tmp_path):
        paint(Path("colours"), each=3)
        tracker = Tracker.open("two")
        for name in ("digits", "colours"):
            loaded = data.load(name, data_dir=Path("data"), seed=0)
            run_id = record(tracker, f"of {name}")
            run = Run(tracker.client, run_id, tracker.experiment_id)
            run.log_params({"dataset": name, "dataset_digest": loaded.digest, "seed": 0})
        yield tracker


def chosen_for(source: str, *options: str) -> str:
    """Return the line on why a model is chosen for a source; the model itself is not loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict, "load_model", lambda uri: uri)
        parsed = predict.build_parser().parse_args([source, "--experiment", "two", *options])
        return predict._choose_model(parsed)[1]


def test_the_model_is_of_the_data_set_that_the_source_is_of(of_two: Tracker) -> None:
    for source, name in (
        ("digits:test", "digits"),
        ("colours", "colours"),
        ("colours:test", "colours"),
        ("colours/red", "colours"),
    ):
        why = chosen_for(source)
        assert f"experiment 'two' on '{name}' by" in why
        assert f"run of {name} (" in why
        assert "\n" not in why
    Path("colours").rename("moved")
    Path("elsewhere").mkdir()
    shutil.move("moved", "elsewhere/colours")
    assert "run of colours (" in chosen_for("elsewhere/colours")


def test_for_a_source_of_no_known_data_set_it_is_said_which_the_model_is_of(
    of_two: Tracker,
) -> None:
    paint(Path("photos"), each=1)
    why, note = chosen_for("photos").splitlines()
    assert "experiment 'two' on 'colours' by" in why
    assert note.startswith("note: not among them: 1 run on 'digits'")
    assert note.endswith("--dataset digits chooses those")
    assert "on 'digits' by" in chosen_for("photos", "--dataset", "digits")
    assert "on 'digits' by" in chosen_for("colours:test", "--dataset", "digits")


def test_load_best_warns_of_runs_on_other_data_sets(
    of_two: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tracking.selection.load_model", lambda uri: uri)
    with pytest.warns(UserWarning, match="on 'colours'; not among") as caught:
        load_best("two")
    assert caught[0].filename == __file__
