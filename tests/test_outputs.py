"""What `python -m tracking.predict` writes, in each format, whatever goes in or cuts it off.

The models here are made on the spot: nothing is exported, and no store is asked.
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor
from tracking_helpers import COLOURS, ColourModel

from tracking import predict, progress
from tracking.models.predictor import Predictor
from tracking.predict import main
from tracking.prediction import drafts, formats, pipeline

ROOT = Path(__file__).parents[1]
ENDINGS = (".csv", ".parquet", ".jsonl")


def predictor_of(
    classes: Sequence[str] = tuple(COLOURS), model: Callable[[Tensor], Tensor] | None = None
) -> Predictor:
    return Predictor(
        model=model or ColourModel().eval(),
        classes=tuple(classes),
        image_shape=(32, 32, 3),
        uri="models:/m-0",
        run_id=None,
        metadata={"seed": 0},
        digest=str(classes),
    )


def use(patch: pytest.MonkeyPatch, predictor: Predictor) -> None:
    patch.setattr(predict, "_choose_model", lambda _: (predictor, "the model of the test"))


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, in which the model of colours is the one that is chosen."""
    monkeypatch.chdir(tmp_path)
    use(monkeypatch, predictor_of())
    return tmp_path


def images(count: int, *shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    shape = shape or (32, 32, 3)
    return np.random.default_rng(seed).integers(0, 256, (count, *shape)).astype(np.uint8)


def read(file: str) -> pd.DataFrame:
    """Read predictions as a user would, with what CSV needs put before it taken away."""
    if file.endswith(".parquet"):
        return pd.read_parquet(file)
    if file.endswith(".jsonl"):
        frame = pd.DataFrame(json.loads(line) for line in Path(file).read_text().splitlines())
        return frame.astype({"error": object})
    convert = pyarrow.csv.ConvertOptions(
        strings_can_be_null=True, quoted_strings_can_be_null=False,
        column_types=dict.fromkeys(("source", "prediction", "label", "error"), pyarrow.string()),
    )  # fmt: skip
    parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
    table = pyarrow.csv.read_csv(file, parse_options=parse, convert_options=convert)
    frame = table.to_pandas()
    for name in {"source", "prediction", "label", "error"} & set(frame.columns):
        texts = table[name].to_pylist()
        frame[name] = [text if text is None else text.removeprefix("'") for text in texts]
    return frame


def save_files(count: int, *, bad: Sequence[int] = ()) -> None:
    Path("photos").mkdir()
    for index, pixels in enumerate(images(count)):
        if index in bad:
            Path(f"photos/{index:03}.png").write_bytes(b"")
        else:
            Image.fromarray(pixels).save(f"photos/{index:03}.png")


# What goes in through the command comes out as through Python

ODD = ["=1+1", "+1", "-1", "@x", "'=1", "'", 'a "b"', "c,d", "e\nf", "\tg", "é", "{}", " ", "\\"]


def linear(num_classes: int, generator: np.random.Generator) -> Callable[[Tensor], Tensor]:
    """Return a model in which every pixel counts, with probabilities near 0 and 1."""
    weights = torch.from_numpy(generator.normal(size=(3072, num_classes))).float()

    def model(batch: Tensor) -> Tensor:
        return torch.softmax(batch.flatten(1).float() @ weights / 500, dim=1)

    return model


@pytest.mark.parametrize("seed", range(18))
def test_what_the_command_writes_is_what_python_returns(
    seed: int, desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For arrays of any shape, numbers and names of classes, batch sizes, formats, labels."""
    generator = np.random.default_rng(seed)
    classes = generator.permutation([*ODD, *map(str, range(20))])[: generator.integers(1, 30)]
    predictor = predictor_of(classes.tolist(), linear(len(classes), generator))
    use(monkeypatch, predictor)
    monkeypatch.setattr(pipeline, "CHUNK", int(generator.integers(1, 20)))
    count, height, width = generator.integers(1, 40, 3).tolist()
    shape = [(height, width, 3), (height, width, 1), (32, 32, 3)][seed % 3]
    batch = images(count, *shape, seed=seed)
    labels = generator.integers(0, len(classes), count)
    np.savez("a.npz", images=batch, labels=labels)
    batch_size, out = int(generator.integers(1, 12)), f"out{ENDINGS[seed % 3]}"
    assert main(["a.npz", "--out", out, "--batch-size", str(batch_size)]) == 0

    colour = np.broadcast_to(batch, (*batch.shape[:3], 3))
    resized = [
        Image.fromarray(image).resize((32, 32), Image.Resampling.BILINEAR) for image in colour
    ]
    expected = predictor.predict(
        np.stack(resized), labels=labels, batch_size=batch_size,
        sources=[f"a.npz[{index}]" for index in range(count)],
    )  # fmt: skip
    check_equal(read(out), expected)


def check_equal(frame: pd.DataFrame, expected: pd.DataFrame) -> None:
    assert frame.pop("error").isna().all()
    assert list(frame.columns) == list(expected.columns)
    for name in frame.columns:
        if name in ("source", "prediction", "label"):
            assert list(frame[name]) == list(expected[name])
        else:
            np.testing.assert_array_equal(
                frame[name].to_numpy(np.float32), expected[name].to_numpy(np.float32)
            )


@pytest.mark.parametrize("seed", range(6))
def test_files_of_any_mode_come_out_as_through_python(
    seed: int, desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cnn.images import decode

    generator = np.random.default_rng(seed)
    classes = ["a", "b", "c"][: seed % 3 + 1]
    predictor = predictor_of(classes, linear(len(classes), generator))
    use(monkeypatch, predictor)
    names = []
    for index, (mode, kind) in enumerate(
        [
            ("1", "png"), ("L", "jpg"), ("P", "png"), ("P", "gif"), ("RGBA", "png"), ("LA", "png"),
            ("CMYK", "jpg"), ("I;16", "png"), ("I;16", "tiff"), ("RGB", "webp"), ("RGB", "jp2"),
        ]
    ):  # fmt: skip
        height, width = generator.integers(1, 70, 2)
        if mode == "I;16":
            values = generator.integers(0, 65536, (height, width)).astype(np.uint16)
            picture = Image.fromarray(values)
        else:
            picture = Image.fromarray(images(height, width, 3, seed=seed)).convert(mode)
        exif = Image.Exif()
        exif[0x0112] = int(generator.integers(1, 9))
        names.append(f"{index:02}.{kind}")
        picture.save(names[-1], **({"exif": exif} if kind in ("jpg", "png", "webp") else {}))
    Path("list").write_text("\n".join(names))
    out = f"out{ENDINGS[seed % 3]}"
    assert main(["@list", "--out", out, "--batch-size", "4"]) == 0
    decoded = np.stack([decode(Path(name)) for name in names])
    check_equal(read(out), predictor.predict(decoded, sources=names, batch_size=4))


# Formats


@pytest.mark.parametrize("name", [*ODD[:5], "\rx", "'", "''=1", "x'"])
def test_in_csv_no_cell_is_a_formula_and_a_name_can_be_told_from_its_guard(
    name: str, desk: Path
) -> None:
    Path(name).write_bytes(b"")
    Path("list").write_bytes(os.fsencode(name) + b"\0")
    for ending in ENDINGS:
        assert main(["@list", "--out", f"out{ending}"]) == 3
        assert list(read(f"out{ending}")["source"]) == [name]
    cell = pd.read_csv("out.csv", lineterminator="\n")["source"][0]
    assert cell[0] not in "=+-@\t\r"
    assert cell.removeprefix("'") == name


def test_a_class_that_is_called_as_a_formula_is_guarded_too(
    desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, predictor_of(("=A1", "=A2", "=A3")))
    np.savez("a.npz", images=images(1), labels=["=A1"])
    assert main(["a.npz"]) == 0
    row = pd.read_csv("predictions.csv").iloc[0]
    assert row["label"] == "'=A1"
    assert row["prediction"].startswith("'=A")


def test_numbers_that_are_none_are_missing_or_null(
    desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nan = predictor_of(model=lambda batch: torch.full((len(batch), 3), float("nan")))
    use(monkeypatch, nan)
    np.save("a.npy", images(1))
    for ending in ENDINGS:
        assert main(["a.npy", "--out", f"out{ending}"]) == 0
        assert np.isnan(read(f"out{ending}")["p(red)"].astype(float)).all()
    assert '"p(red)": null' in Path("out.jsonl").read_text()


@pytest.mark.parametrize("rows", [1, 5, 100])
def test_parquet_has_row_groups_of_a_size(
    rows: int, desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "_ROW_GROUP", rows)
    monkeypatch.setattr(pipeline, "CHUNK", 1)
    np.save("a.npy", images(12))
    assert main(["a.npy", "--out", "out.parquet", "--batch-size", "2"]) == 0
    about = pq.ParquetFile("out.parquet").metadata
    sizes = [about.row_group(k).num_rows for k in range(about.num_row_groups)]
    assert sizes == {1: [2] * 6, 5: [6, 6], 100: [12]}[rows]


# Images that can't be read


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(("chunk", "bad"), [(1, [0]), (3, [2, 3]), (4096, [6]), (3, range(7))])
def test_an_image_that_cannot_be_read_has_a_row_with_its_error(
    ending: str, chunk: int, bad: Sequence[int], desk: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(pipeline, "CHUNK", chunk)
    save_files(7, bad=bad)
    assert main(["photos", "--out", f"out{ending}", "--batch-size", "1"]) == 3
    output = capsys.readouterr()
    assert output.err == (
        f"note: {len(bad)} of 7 images could not be read: column error says why\n"
    )
    assert f"predicted {7 - len(bad)} images of 'photos'" in output.out
    frame = read(f"out{ending}")
    assert list(frame["source"]) == [f"photos/{index:03}.png" for index in range(7)]
    good = [index for index in range(7) if index not in bad]
    expected = predictor_of().predict(images(7), batch_size=1)
    assert list(frame["prediction"][good]) == list(expected["prediction"][good])
    np.testing.assert_array_equal(
        frame["probability"][good].to_numpy(np.float32), expected["probability"][good]
    )
    for index in bad:
        row = frame.iloc[index]
        assert row["error"] == "is no image: it is empty"
        assert row[["prediction", "probability", "p(red)"]].isna().all()
    assert frame["error"][good].isna().all()


def test_strict_stops_at_the_first_and_leaves_nothing(
    desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_files(7, bad=[4, 5])
    assert main(["photos", "--strict"]) == 2
    assert capsys.readouterr().err == (
        "python -m tracking.predict: error: 'photos/004.png' is no image: it is empty\n"
    )
    assert [path.name for path in desk.iterdir()] == ["photos"]


def test_an_image_that_cannot_be_read_is_neither_right_nor_wrong(
    desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, colour in COLOURS.items():
        Path("photos", name).mkdir(parents=True)
        Image.new("RGB", (9, 9), colour).save(f"photos/{name}/0.png")
    Path("photos/red/1.png").write_bytes(b"")
    assert main(["photos"]) == 3
    assert capsys.readouterr().out.endswith("accuracy 100.00 % (3 of 3)\n")
    assert list(read("predictions.csv")["label"]) == ["blue", "green", "red", "red"]


def test_what_pillow_warns_of_stays_away_from_standard_error(
    desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (32, 32)).save("a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert main(["a.png"]) == 0  # warnings are errors in tests


# Cut off


class Cut(BaseException):
    """As a kill: nothing that runs at an end of a process may count on it."""


def cut_after(rows: int, arguments: Sequence[str], patch: pytest.MonkeyPatch) -> None:
    """Run a command that ends, as if killed, in the middle of writing what comes after `rows`."""
    append, remove = drafts.Draft.append, drafts._remove

    def torn(self: drafts.Draft, content: bytes, **options: Any) -> None:
        if self.rows >= rows:
            self.stream.write(content[: len(content) // 2])
            self.stream.flush()
            raise Cut
        append(self, content, **options)

    with patch.context() as context:
        context.setattr(drafts.Draft, "append", torn)
        context.setattr(drafts, "_remove", lambda _: None)
        with pytest.raises(Cut):
            main(arguments)
    assert drafts._remove is remove


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("rows", [0, 4, 10])
def test_resumed_it_ends_with_the_bytes_of_an_undisturbed_run(
    ending: str, rows: int, desk: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(pipeline, "CHUNK", 1)
    save_files(11, bad=[1, 8])
    arguments = ["photos", "--batch-size", "2", "--out"]
    assert main([*arguments, f"whole{ending}"]) == 3
    whole = capsys.readouterr().out
    out = f"out{ending}"
    cut_after(rows, [*arguments, out], monkeypatch)
    assert not Path(out).exists()
    seen = []
    probabilities = Predictor.probabilities
    monkeypatch.setattr(
        Predictor,
        "probabilities",
        lambda self, batch, **options: (seen.append(len(batch)),
                                        probabilities(self, batch, **options))[1],
    )  # fmt: skip
    capsys.readouterr()
    assert main([*arguments, out, "--resume"]) == 3
    assert Path(out).read_bytes() == Path(f"whole{ending}").read_bytes()
    output = capsys.readouterr()
    assert output.out == whole.replace(f"whole{ending}", out)
    assert (f"note: resuming after {rows} of 11 images" in output.err) == (rows > 0)
    assert sum(seen) == 9 - sum(index not in (1, 8) for index in range(rows))
    assert sorted(path.name for path in desk.iterdir()) == sorted([out, "photos", f"whole{ending}"])


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_a_kill_leaves_no_half_file_and_is_resumed(
    ending: str, desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a process of its own, which kills itself without a warning."""
    np.save("a.npy", images(50))
    script = (
        "import os, signal, sys; sys.path.insert(0, sys.argv[2])\n"
        "from test_outputs import predictor_of, predict, pipeline, drafts\n"
        "predict._choose_model = lambda _: (predictor_of(), '')\n"
        "pipeline.CHUNK = 1\n"
        "append = drafts.Draft.append\n"
        "def watched(self, content, **options):\n"
        "    append(self, content, **options)\n"
        "    if self.rows == int(sys.argv[1]): os.kill(os.getpid(), signal.SIGKILL)\n"
        "drafts.Draft.append = watched\n"
        "sys.exit(predict.main(sys.argv[3:]))"
    )

    arguments = ["a.npy", "--batch-size", "7", "--out"]
    command = [sys.executable, "-c", script, "28", str(ROOT / "tests"), *arguments, f"out{ending}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    killed = subprocess.run(command, env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not Path(f"out{ending}").exists()
    monkeypatch.setattr(pipeline, "CHUNK", 1)
    assert main([*arguments, f"out{ending}", "--resume"]) == 0
    assert "resuming after 28 of 50" in capsys.readouterr().err
    assert main([*arguments, f"whole{ending}"]) == 0
    assert Path(f"out{ending}").read_bytes() == Path(f"whole{ending}").read_bytes()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda patch: np.save("a.npy", images(8, seed=1)), "another source"),
        (lambda patch: use(patch, predictor_of(("a", "b", "c"))), "another model"),
        (lambda patch: patch.setattr(pipeline, "CHUNK", 4), "another batch size"),
    ],
)
def test_only_the_same_can_be_resumed(
    change: Callable[[pytest.MonkeyPatch], None], complaint: str, desk: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(pipeline, "CHUNK", 1)
    np.save("a.npy", images(8))
    arguments = ["a.npy", "--batch-size", "2"]
    cut_after(4, arguments, monkeypatch)
    os.utime("a.npy", ns=(0, 0))
    np.save("a.npy", images(8))
    os.utime("a.npy", ns=(0, 0))
    cut_after(4, arguments, monkeypatch)
    change(monkeypatch)
    capsys.readouterr()
    assert main([*arguments, "--resume"]) == 2
    error = capsys.readouterr().err
    assert f"can't resume '{desk / 'predictions.csv'}': its draft was made with {complaint}" in (
        error
    )
    assert error.count("\n") == 1
    assert main(arguments) == 0
    assert "note: dropped 4 rows that --resume would keep" in capsys.readouterr().err
    assert len(read("predictions.csv")) == 8


@pytest.mark.parametrize("damage", ["sidecar", "draft"])
def test_a_damaged_draft_is_started_again(
    damage: str, desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "CHUNK", 1)
    np.save("a.npy", images(8))
    cut_after(4, ["a.npy", "--batch-size", "2"], monkeypatch)
    file = {"sidecar": ".predictions.csv.partial.json", "draft": ".predictions.csv.partial"}[damage]
    Path(file).write_bytes(Path(file).read_bytes()[:50])
    assert main(["a.npy", "--batch-size", "2", "--resume"]) == 0
    assert list(read("predictions.csv")["source"]) == [f"a.npy[{index}]" for index in range(8)]


def test_without_anything_to_resume_it_starts(desk: Path) -> None:
    np.save("a.npy", images(3))
    assert main(["a.npy", "--resume"]) == 0
    assert len(read("predictions.csv")) == 3


def test_ctrl_c_keeps_what_is_written_and_says_so(
    desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline, "CHUNK", 1)
    np.save("a.npy", images(6))
    calls = iter([False, False, True])

    def model(batch: Tensor) -> Tensor:
        if next(calls, False):
            raise KeyboardInterrupt
        return torch.full((len(batch), 3), 1 / 3)

    use(monkeypatch, predictor_of(model=model))
    assert main(["a.npy", "--batch-size", "2"]) == 130
    error = capsys.readouterr().err
    assert error == "note: 4 rows are kept: --resume continues the same command\ninterrupted\n"
    assert not Path("predictions.csv").exists()
    assert main(["a.npy", "--batch-size", "2", "--resume"]) == 0
    assert "resuming after 4 of 6" in capsys.readouterr().err


def test_two_processes_do_not_write_one_file(
    desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save("a.npy", images(3))
    with drafts._locked(desk / "predictions.csv"):
        assert main(["a.npy"]) == 2
    error = capsys.readouterr().err
    assert error.endswith(f"error: another process is writing '{desk / 'predictions.csv'}'\n")
    assert main(["a.npy"]) == 0


def test_a_draft_that_became_the_file_is_not_written_to(
    desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening and locking it, another process may have finished."""
    import fcntl

    flock = fcntl.flock

    def late(stream: Any, how: int) -> None:
        drafts.draft_file(desk / "out.csv").rename(desk / "out.csv")
        flock(stream, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(ValueError, match="another process"), drafts._locked(desk / "out.csv"):
        pass


# What is read is not written to


@pytest.mark.parametrize("source", ["photos", "@list.csv", "table.parquet", "photos/a.csv"])
def test_the_output_never_replaces_an_input(
    source: str, desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("photos").mkdir()
    Image.new("RGB", (9, 9)).save("photos/a.csv", "PNG")
    Path("list.csv").write_text("photos/a.csv\n")
    pd.DataFrame({"path": ["photos/a.csv"]}).to_parquet("table.parquet")
    Path("link.csv").symlink_to("photos/a.csv")
    outs = ["photos/a.csv", "link.csv"] + ["list.csv"] * (source == "@list.csv")
    outs += ["table.parquet"] * (source == "table.parquet")
    before = {path: path.read_bytes() for path in desk.rglob("*.*") if path.is_file()}
    for out in outs:
        assert main([source, "--out", out]) == 2
        error = capsys.readouterr().err
        assert "is among what is read" in error
        assert error.count("\n") == 1
    assert {path: path.read_bytes() for path in desk.rglob("*.*") if path.is_file()} == before


# Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("seconds", [0.0, 1.0])
def test_on_a_terminal_progress_of_long_work_is_shown_with_its_rate_and_the_time_left(
    seconds: float, desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(pipeline, "CHUNK", 1)
    monkeypatch.setattr(progress, "QUICK_SECONDS", 600 * seconds)
    monkeypatch.setattr(sys, "stderr", Terminal())
    np.save("a.npy", images(4))
    assert main(["a.npy", "--batch-size", "1"]) == 0
    assert isinstance(sys.stderr, Terminal)
    shown = sys.stderr.getvalue()
    assert shown.startswith("opening the model, then 'a.npy'\n")
    is_shown = bool(re.search(r"4/4 images  [\d,.]+/s  0:00 left", shown))
    assert is_shown == (seconds == 0)
