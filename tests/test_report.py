"""`--report`, `--log`, and `python -m tracking.report`: what is written, and what is logged."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image
from test_measures import measured, sample
from test_outputs import ENDINGS, ODD, cut_after, images, linear, predictor_of, use
from tracking_helpers import COLOURS, log_model, new_store

from tracking import predict, report
from tracking.evaluation import figures
from tracking.evaluation.metrics import MetricsAccumulator
from tracking.evaluation.report import FILES, count, data_name
from tracking.prediction import pipeline
from tracking.tracker import Tracker

ROOT = Path(__file__).parents[1]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, in which the model of colours is the one that is chosen.

    Figures are drawn empty: each takes about a second.
    """
    monkeypatch.chdir(tmp_path)
    use(monkeypatch, predictor_of())
    for name in figures.FIGURES:
        monkeypatch.setitem(figures.FIGURES, name, lambda _, file: file.touch())
    return tmp_path


def save_array(count: int = 40, *, num_classes: int = 3, seed: int = 0) -> None:
    """Write `a.npz` with images and labels of all classes but the last."""
    labels = np.random.default_rng(seed).integers(0, max(1, num_classes - 1), count)
    np.savez("a.npz", images=images(count, seed=seed), labels=labels)


def save_folder(*, each: int = 2, bad: Sequence[str] = ()) -> None:
    """Write a folder `photos` with images of the three classes, and one or more of no class."""
    for name, colour in {**COLOURS, "azure": (0, 0, 255)}.items():
        Path("photos", name).mkdir(parents=True)
        for index in range(each - (name == "azure")):
            file = Path(f"photos/{name}/{index}.png")
            Image.new("RGB", (9, 9 + index), colour).save(file)
            if f"{name}/{index}" in bad:
                file.write_bytes(b"")


def read_report(folder: str = "report") -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path(folder, "report.json").read_text())
    return content


def rows_of(file: str) -> list[list[str]]:
    with Path("report", file).open(newline="") as stream:
        return list(csv.reader(stream))


def files_in(folder: str = ".") -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


OF_ORIGIN = ("source", "model", "run_id", "examples")


def without_origin(content: dict[str, Any]) -> dict[str, Any]:
    return {key: content[key] for key in content if key not in OF_ORIGIN}


# What is counted


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("num_classes", [1, 5, 24])
def test_a_report_is_of_the_rows_that_were_written_whatever_the_format_and_the_classes_names(
    ending: str, num_classes: int, desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(num_classes)
    names = [*ODD, "", "NA", "null", "a.b", "p(x)", "x).y", "nan", "label", "error", "source"]
    classes = [*generator.permutation(names)[:num_classes]]
    predictor = predictor_of(classes, linear(num_classes, generator))
    use(monkeypatch, predictor)
    monkeypatch.setattr(pipeline, "CHUNK", 7)
    save_array(num_classes=num_classes)
    arguments = ["a.npz", "--out", f"out{ending}", "--report", "report", "--batch-size", "5"]
    assert predict.main(arguments) == 0
    frame = predictor.predict(np.load("a.npz")["images"], batch_size=5)
    probabilities = frame[[f"p({name})" for name in classes]].to_numpy()
    expected = measured(np.load("a.npz")["labels"], probabilities)
    content = read_report()
    assert [row["class"] for row in content["classes"]] == classes
    assert content["confusion"] == expected.confusion.tolist()
    assert content["accuracy"]["value"] == expected.accuracy[0]
    assert content["expected_calibration_error"] == pytest.approx(expected.calibration_error)
    assert content["brier_score"] == pytest.approx(expected.brier_score)


@pytest.mark.parametrize("ending", ENDINGS)
def test_images_without_label_and_unreadable_ones_count_as_such_only(
    ending: str, desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_folder(bad=["red/0", "azure/0"])
    arguments = ["photos", "--out", f"out{ending}", "--report", "report"]
    assert predict.main(arguments) == 3
    content = read_report()
    assert content["images"] == {"labelled": 5, "correct": 5, "unlabelled": 0, "unreadable": 2}
    note = "1 of 7 images count as unlabelled, because the model has no class 'azure'"
    assert content["notes"] == [note]
    output = capsys.readouterr()
    assert output.out.endswith(
        "report 'report': accuracy 100.00 % (5 of 5), 95 % interval 56.55 to 100.00 %, "
        f"expected calibration error {content['expected_calibration_error']:.4f}\n"
    )
    Image.new("RGB", (9, 9)).save("photos/azure/0.png")
    assert predict.main(arguments) == 3
    assert read_report()["images"]["unlabelled"] == 1


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_resumed_the_report_is_that_of_an_undisturbed_run(
    ending: str, desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "CHUNK", 1)
    save_array()
    arguments = ["a.npz", "--batch-size", "4", "--out", f"out{ending}"]
    assert predict.main([*arguments, "--report", "whole"]) == 0
    # Cut off without a report, which is asked for only then.
    cut_after(20, arguments, monkeypatch)
    assert predict.main([*arguments, "--report", "report", "--resume"]) == 0
    for name in FILES:
        assert Path("report", name).read_bytes() == Path("whole", name).read_bytes(), name


def test_a_finished_file_is_reported_on_as_it_was_while_predicting(desk: Path) -> None:
    save_array()
    for ending in ENDINGS:
        out = f"out{ending}"
        assert predict.main(["a.npz", "--out", out, "--report", "report"]) == 0
        assert report.main([out, "--out", "again"]) == 0
        assert without_origin(read_report("again")) == without_origin(read_report())
        assert read_report("again")["source"] == out


def test_a_label_added_by_hand_counts_if_it_is_a_class(desk: Path) -> None:
    np.save("a.npy", images(3))
    assert predict.main(["a.npy"]) == 0
    frame = pd.read_csv("predictions.csv", keep_default_na=False)
    frame["label"] = ["red", "pink", ""]
    frame.drop(columns="error").to_csv("predictions.csv", index=False)
    assert report.main(["predictions.csv"]) == 0
    assert read_report()["images"] | {"correct": 0} == {
        "labelled": 1, "correct": 0, "unlabelled": 2, "unreadable": 0,
    }  # fmt: skip


def test_of_a_large_file_only_a_part_is_in_memory(
    desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true, probabilities = sample(200_000, 3)
    names = np.array(["a", "\n," * 20 + '"', "c"], object)
    columns = {f"p({name})": probabilities[:, k] for k, name in enumerate(names)}
    frame = pd.DataFrame({"label": names[true], **columns})
    frame.to_csv("out.csv", index=False)
    frame.to_parquet("out.parquet")
    frame.to_json("out.jsonl", orient="records", lines=True)
    sizes: list[int] = []
    add = MetricsAccumulator.add
    monkeypatch.setattr(
        MetricsAccumulator,
        "add",
        lambda self, true, p: (sizes.append(len(true)), add(self, true, p))[1],
    )
    for ending in ENDINGS:
        sizes.clear()
        measures = count(Path(f"out{ending}")).measures()
        assert measures.labelled == sum(sizes) == 200_000
        assert max(sizes) < 100_000
        assert measures.correct == (probabilities.argmax(axis=1) == true).sum()


# What is written


def test_the_tables_have_all_digits_and_no_formulas(
    desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes = ["=1+1", "'", "a,\nb", "never"]
    use(monkeypatch, predictor_of(classes, linear(4, np.random.default_rng(0))))
    save_array(num_classes=4)
    assert predict.main(["a.npz", "--report", "report"]) == 0
    assert files_in("report") == sorted(FILES)
    content = read_report()
    guarded = ["'=1+1", "''", "a,\nb", "never"]
    heads, *rows = rows_of("confusion.csv")
    assert heads == ["true class", *guarded]
    assert [row[0] for row in rows] == guarded
    assert [[int(cell) for cell in row[1:]] for row in rows] == content["confusion"]
    heads, *rows = rows_of("per_class.csv")
    assert [row[0] for row in rows] == guarded
    assert heads == [*content["classes"][0]]
    for row, expected in zip(rows, content["classes"], strict=True):
        numbers = [None if cell == "" else float(cell) for cell in row[1:]]
        assert numbers == list(expected.values())[1:]
    assert content["classes"][3]["recall"] is None


def test_markdown_and_html_in_names_are_text(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classes = ["a|b", "<script>", "*x*", "c\nd"]
    use(monkeypatch, predictor_of(classes, linear(4, np.random.default_rng(0))))
    save_array(num_classes=4)
    assert predict.main(["a.npz", "--report", "report"]) == 0
    text = Path("report/report.md").read_text()
    for name in (r"a\|b", r"\<script\>", r"\*x\*", r"c\\nd"):
        assert f"\n| {name} |" in text
    table = text.split("## Classes\n\n")[1].split("\n\n")[0].replace(r"\|", "").splitlines()
    assert len(table) == 6
    assert {line.count("|") for line in table} == {7}
    assert "nan" not in text


@pytest.mark.parametrize(
    ("split", "words"),
    [("train", "was trained on"), ("val", "models are chosen by"), ("test", None)],
)
def test_it_says_what_a_split_was_used_for(split: str, words: str | None, desk: Path) -> None:
    save_folder(each=10)
    assert predict.main([f"photos:{split}", "--report", "report"]) == 0
    notes = [note for note in read_report()["notes"] if note.startswith("this is the split")]
    assert len(notes) == (words is not None)
    assert not words or words in notes[0]
    assert not words or words in Path("report/report.md").read_text()


def test_a_report_replaces_an_earlier_one_and_no_other_file(desk: Path) -> None:
    save_array()
    assert predict.main(["a.npz", "--report", "report"]) == 0
    first = read_report()
    Path("report/mine.txt").touch()
    save_array(50)
    assert predict.main(["a.npz", "--report", "report"]) == 0
    assert read_report() != first
    assert files_in("report") == sorted([*FILES, "mine.txt"])
    assert files_in() == ["a.npz", "predictions.csv", "report"]


@pytest.mark.parametrize("is_there", [False, True])
def test_a_report_that_fails_leaves_what_was_there(
    is_there: bool, desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    if is_there:
        Path("report").mkdir()
        Path("report/report.json").write_text("of before")
    save_array()
    monkeypatch.setitem(figures.FIGURES, "reliability.png", full)
    assert predict.main(["a.npz", "--report", "report"]) == 1
    assert capsys.readouterr().err == (
        "python -m tracking.predict: error: can't write the report: No space left on device\n"
    )
    assert len(pd.read_csv("predictions.csv")) == 40
    assert files_in() == ["a.npz", "predictions.csv", *["report"] * is_there]
    if is_there:
        assert files_in("report") == ["report.json"]
        assert Path("report/report.json").read_text() == "of before"


def test_a_link_to_a_folder_stays_a_link(desk: Path) -> None:
    save_array()
    Path("report").symlink_to("elsewhere")
    for _ in range(2):
        assert predict.main(["a.npz", "--report", "report"]) == 0
        assert Path("report").is_symlink()
        assert files_in("elsewhere") == sorted(FILES)


# Figures


@pytest.mark.parametrize(
    "num_classes", [1, 10, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 31, 100, 300))]
)
def test_figures_are_of_a_size_that_can_be_looked_at(num_classes: int, tmp_path: Path) -> None:
    measures = measured(*sample(200, num_classes))
    for name, draw in figures.FIGURES.items():
        draw(measures, tmp_path / name)
        with Image.open(tmp_path / name) as figure:
            figure.verify()
            assert figure.format == "PNG"
            assert 300 < min(figure.size) <= max(figure.size) < 3000


def test_names_that_matplotlib_would_not_show_as_they_are_do_no_harm(tmp_path: Path) -> None:
    """No mathematics is read, and nothing is warned of: warnings are errors in tests."""
    names = ["$a_1$", r"$\frac{$", "long " * 40, "名前", "a\nb\t\0", "", "%s", "$", "😀"]
    counter = MetricsAccumulator(names)
    counter.add(np.arange(9), np.eye(9))
    figures.draw_confusion(counter.measures(), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as figure:
        assert figure.width < 1500


def test_long_names_are_cut_in_the_middle_and_line_ends_are_escaped() -> None:
    assert figures.shortened("cat") == "cat"
    assert figures.shortened("a\nb") == r"a\nb"
    cut = figures.shortened("the beginning of a long name, and its end")
    assert cut == "the beginni… and its end"


def test_a_users_matplotlib_is_left_as_it_is(tmp_path: Path) -> None:
    with mpl.rc_context({"text.usetex": True, "figure.dpi": 7}):  # there need be no TeX
        before = dict(mpl.rcParams)
        for name, draw in figures.FIGURES.items():
            draw(measured(*sample(20, 3)), tmp_path / name)
        assert dict(mpl.rcParams) == before


def test_pyplot_is_not_imported(desk: Path) -> None:
    save_array()
    assert predict.main(["a.npz"]) == 0
    script = (
        "import sys; from tracking.report import main\n"
        "assert main(['predictions.csv']) == 0\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


# Without labels


def fails(main: Callable[[Sequence[str]], int], arguments: Sequence[str], capsys: Any) -> str:
    """Run a command that must fail as bad input does, and leave nothing; return what it says."""
    before = sorted(Path.cwd().rglob("*"))
    assert main(arguments) == 2
    error: str = capsys.readouterr().err
    assert error.startswith("python -m tracking.")
    assert error.count("\n") == 1
    assert sorted(Path.cwd().rglob("*")) == before, "it left something behind"
    return error.partition("error: ")[2]


def test_without_any_label_a_report_is_refused_before_anything_is_predicted(
    desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save("a.npy", images(2))
    monkeypatch.setattr(predict, "predict_images", lambda *_, **__: pytest.fail("it was labelled"))
    assert fails(predict.main, ["a.npy", "--report", "report"], capsys) == (
        "--report needs true classes: no image of 'a.npy' has a class of the model\n"
    )


def test_where_none_with_a_label_can_be_read_the_predictions_stay(
    desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_folder(bad=[f"{name}/{index}" for name in COLOURS for index in range(2)])
    assert predict.main(["photos", "--report", "report"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "python -m tracking.predict: error: no report: there is no image that could be read and "
        "whose class is known"
    )
    assert len(pd.read_csv("predictions.csv")) == 7
    assert not Path("report").exists()


def test_of_a_model_that_gives_no_numbers_there_is_no_report(
    desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nan = predictor_of(model=lambda batch: torch.full((len(batch), 3), math.nan))
    use(monkeypatch, nan)
    save_array()
    for ending in ENDINGS:
        out = f"out{ending}"
        assert predict.main(["a.npz", "--out", out, "--report", "report"]) == 2
        error = capsys.readouterr().err
        assert error.endswith("error: no report: probabilities must be from 0 to 1, not nan\n")
        assert Path(out).exists()


# Bad input


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--log"], "--log logs a report: it needs --report DIR"),
        (["--report", "none/report"], "can't write --report: there is no folder '"),
        (["--report", "a.npz"], "can't write --report: there is no folder '"),
        (["--report", "shut"], "can't write --report: '"),
        (["--report", "shut/report"], "can't write --report: '"),
        (["--report", "x" * 300], "can't write --report 'xxx"),
        (["--report", "circle"], "can't write --report 'circle'"),
        (["--report", ".", "--out", "confusion.csv"], "--out 'confusion.csv' is a file of the"),
        (
            ["--report", "report", "--log"],
            "--log needs a run to log into: the model came from no run",
        ),
    ],
)
def test_a_bad_option_is_one_line_before_anything_is_predicted(
    options: list[str], complaint: str, desk: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    save_array(2)
    Path("shut").mkdir(mode=0o555)
    Path("circle").symlink_to("circle")
    monkeypatch.setattr(predict, "predict_images", lambda *_, **__: pytest.fail("it was labelled"))
    assert fails(predict.main, ["a.npz", *options], capsys).startswith(complaint)


@pytest.mark.parametrize("source", ["photos", "photos:test"])
@pytest.mark.parametrize("folder", ["photos", "photos/red", "photos/report"])
def test_no_figure_gets_among_the_images(
    source: str, folder: str, desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_folder()
    error = fails(predict.main, [source, "--report", folder], capsys)
    assert "and the figures would be among its images" in error


def test_a_report_replaces_nothing_that_is_read(
    desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("red").mkdir()
    Image.new("RGB", (9, 9)).save("red/confusion.png")
    Path("list").write_text("red/confusion.png\n")
    error = fails(predict.main, ["@list", "--report", "red"], capsys)
    assert error == "can't write --report: 'red/confusion.png' is among what is read\n"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["none.csv"], "there is no file 'none.csv'"),
        (["folder.csv"], "there is no file 'folder.csv'"),
        (["out.txt"], "a file of predictions must end in .csv, .parquet, .jsonl"),
        (["empty.csv"], "can't read 'empty.csv': "),
        (["empty.jsonl"], "'empty.jsonl' needs a column label and columns p(<class>)"),
        (["unlabelled.csv"], "'unlabelled.csv' needs a column label"),
        (["twice.csv"], "'twice.csv' needs a column label and columns p(<class>), all of diff"),
        (["text.parquet"], "can't read 'text.parquet': "),
        (["list.jsonl"], "'list.jsonl' needs a column label"),
        (["torn.jsonl"], "can't read 'torn.jsonl': "),
        (["ragged.csv"], "can't read 'ragged.csv': "),
        (["words.csv"], "can't read 'words.csv': "),
        (["far.csv"], "probabilities must be from 0 to 1, not 1.5"),
        (["gap.csv"], "probabilities must be from 0 to 1, not nan"),
        (["bare.csv"], "there is no image that could be read and whose class is known"),
        (["good.csv", "--log"], "--log needs the run to log into: --run-id ID"),
        (["good.csv", "--out", "none/report"], "can't write --out: there is no folder"),
        (["good.csv", "--name", "a/b"], "--name takes letters, digits, . _ and -, 100 at most"),
        (["good.csv", "--name", ".."], "--name takes letters"),
        (["good.csv", "--log", "--run-id", "0", "--name", "x"], "there are no runs here"),
    ],
)
def test_a_bad_file_of_predictions_is_one_line(
    arguments: list[str], complaint: str, desk: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///none.db")
    Path("folder.csv").mkdir()
    for name, text in {
        "out.txt": "", "empty.csv": "", "empty.jsonl": "", "text.parquet": "text",
        "unlabelled.csv": "p(a),p(b)\n1,0\n",
        "twice.csv": "label,p(a),p(a)\na,1,0\n",
        "list.jsonl": "[1, 2]\n",
        "torn.jsonl": '{"label": "a", "p(a)": 1}\n{"label": "a", "p(',
        "ragged.csv": "label,p(a)\na,1\na,1,2\n",
        "words.csv": "label,p(a)\na,high\n",
        "far.csv": "label,p(a)\na,1.5\n",
        "gap.csv": "label,p(a)\na,\n",
        "bare.csv": "label,p(a)\n,1\n",
        "good.csv": "label,p(a)\na,1\n",
    }.items():  # fmt: skip
        Path(name).write_text(text)
    error = fails(report.main, arguments, capsys).removeprefix("no report: ")
    assert error.startswith(complaint)


# Into the run


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A store with an experiment `study`, and in it a run that has a model, made once."""
    folder = tmp_path_factory.mktemp("store")
    with new_store(folder):
        run = Tracker.open("study").start_run("best")
        run.log_metrics({"val/accuracy": 0.9}, step=3)
        log_model(run, seed=0, step=3)
        run.end("complete")
        yield folder


@pytest.fixture
def run_id(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Work in an empty folder with the store; give the id of its run."""
    monkeypatch.chdir(tmp_path)
    (run,) = mlflow.search_runs(experiment_names=["study"], output_format="list")
    return str(run.info.run_id)


def history(run_id: str, metric: str) -> list[float]:
    entries = MlflowClient().get_metric_history(run_id, metric)
    return [entry.value for entry in sorted(entries, key=lambda entry: entry.timestamp)]


def reported(run_id: str, name: str) -> dict[str, float]:
    metrics = MlflowClient().get_run(run_id).data.metrics
    prefix = f"report/{name}/"
    return {k.removeprefix(prefix): v for k, v in metrics.items() if k.startswith(prefix)}


def test_a_report_is_logged_into_the_run_of_the_model_which_stays_finished(
    run_id: str, capsys: pytest.CaptureFixture[str]
) -> None:
    client = MlflowClient()
    before = client.get_run(run_id)
    save_folder()
    assert predict.main(["photos", "--experiment", "study", "--report", "r", "--log"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"logged into run best ({run_id}): metrics report/photos/…, files reports/photos/"
    )
    run = client.get_run(run_id)
    assert run.info == before.info or vars(run.info) == vars(before.info)
    assert (run.info.status, run.info.end_time) == ("FINISHED", before.info.end_time)
    assert run.data.tags == before.data.tags
    content = read_report("r")
    assert content["run_id"] == run_id
    assert reported(run_id, "photos") == {
        "accuracy": content["accuracy"]["value"],
        "accuracy_low": content["accuracy"]["low"],
        "accuracy_high": content["accuracy"]["high"],
        "expected_calibration_error": content["expected_calibration_error"],
        "brier_score": content["brier_score"],
        "images": 6,
    }
    (entry,) = client.get_metric_history(run_id, "report/photos/accuracy")
    assert entry.step == 3  # the epoch that the model is of
    for name in FILES:
        stored = client.download_artifacts(run_id, f"reports/photos/{name}", str(Path.cwd()))
        assert Path(stored).read_bytes() == Path("r", name).read_bytes()
    model_id = content["model"].removeprefix("models:/")
    shown = {metric.key: metric.value for metric in client.get_logged_model(model_id).metrics}
    assert shown["report/photos/accuracy"] == content["accuracy"]["value"]


def test_logged_again_a_report_is_there_once_unless_it_differs(run_id: str) -> None:
    arguments = ["a.npz", "--experiment", "study", "--report", "report", "--log"]
    for _ in range(2):
        save_array(40)
        assert predict.main(arguments) == 0
    assert history(run_id, "report/a.npz/images") == [40]
    save_array(50)
    assert predict.main(arguments) == 0
    assert history(run_id, "report/a.npz/images") == [40, 50]
    assert reported(run_id, "a.npz")["images"] == 50
    stored = mlflow.artifacts.load_dict(f"runs:/{run_id}/reports/a.npz/report.json")
    assert stored == read_report()


def test_a_finished_file_can_be_logged_under_a_name(run_id: str) -> None:
    save_array()
    assert predict.main(["a.npz", "--experiment", "study"]) == 0
    assert report.main(["predictions.csv", "--run-id", run_id, "--log", "--name", "night"]) == 0
    assert reported(run_id, "night")["images"] == 40
    assert read_report()["run_id"] == run_id


def test_a_server_that_refuses_leaves_predictions_and_report(
    run_id: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class StoreError(Exception):
        """As object stores raise them: of no kind that MLflow knows."""

    def refuse(*_: object) -> None:
        raise StoreError("access denied")

    save_array()
    monkeypatch.setattr(MlflowClient, "log_artifact", refuse)
    assert predict.main(["a.npz", "--experiment", "study", "--report", "report", "--log"]) == 1
    assert capsys.readouterr().err == (
        "python -m tracking.predict: error: the report is in 'report', but not in run "
        f"{run_id}: access denied\n"
    )
    assert files_in("report") == sorted(FILES)
    assert Path("predictions.csv").exists()


def test_a_run_that_is_deleted_or_not_there_is_found_out_before_anything_is_predicted(
    run_id: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_array()
    client = MlflowClient()
    (model,) = client.get_run(run_id).outputs.model_outputs
    monkeypatch.setattr(predict, "predict_images", lambda *_, **__: pytest.fail("it was labelled"))
    client.delete_run(run_id)
    arguments = ["a.npz", "--model", f"models:/{model.model_id}", "--report", "report", "--log"]
    try:
        error = fails(predict.main, arguments, capsys)
    finally:
        client.restore_run(run_id)
    assert error == f"can't --log into run best ({run_id}): it is deleted\n"
    Path("good.csv").write_text("label,p(a)\na,1\n")
    error = fails(report.main, ["good.csv", "--log", "--run-id", "0" * 32], capsys)
    assert "not found" in error


@pytest.mark.parametrize(
    ("source", "split", "name"),
    [
        ("digits:test", "test", "digits-test"),
        ("some where/odd$name:val", "validation", "odd-name-validation"),
        ("photos/", None, "photos"),
        ("a/b.npz", None, "b.npz"),
        ("@lists/night.txt", None, "night.txt"),
        ("-", None, "stdin"),
        ("/", None, "images"),
        ("...", None, "images"),
        ("x" * 200, None, "x" * 100),
    ],
)
def test_what_images_are_called_in_a_run(source: str, split: str | None, name: str) -> None:
    assert data_name(source, split) == name


def test_the_working_folder_has_a_name(desk: Path) -> None:
    assert data_name(".") == desk.name
