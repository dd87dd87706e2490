"""Files that somebody made to do harm: small, made here by code, each refused in bounded time.

What is loaded may take 2 GB and 60 s before it is refused; the tests allow less.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_outputs import predictor_of, use

from tracking import files
from tracking.drafts import open_folder
from tracking.predict import main
from tracking.store import make_whole


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with an array to label, and a file that nobody may write to."""
    monkeypatch.chdir(tmp_path)
    use(monkeypatch, predictor_of())
    np.save("a.npy", np.zeros((3, 32, 32, 3), np.uint8))
    Path("victim").write_text("precious")
    return tmp_path


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must fail as bad input does, and leave the victim; return what it says."""
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert Path("victim").read_text() == "precious"
    return error


# What is written: links, second names and pipes where drafts and locks have their names


def to_a_link(name: str) -> None:
    Path(name).symlink_to("victim")


def to_a_hard_link(name: str) -> None:
    Path(name).hardlink_to("victim")


def to_a_pipe(name: str) -> None:
    os.mkfifo(name)


def to_a_folder(name: str) -> None:
    Path(name).mkdir()


TURNED = (to_a_link, to_a_hard_link, to_a_pipe, to_a_folder)
DRAFTS = (".partial", ".partial.json", ".partial.json.new", ".partial.whole")


@pytest.mark.parametrize("turn", TURNED)
@pytest.mark.parametrize("ending", DRAFTS)
@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_what_has_the_name_of_a_draft_is_neither_written_to_nor_waited_for(
    turn: Callable[[str], None], ending: str, resume: list[str], desk: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    name = f".out.parquet{ending}"
    turn(name)
    before = os.lstat(name)
    error = fails(["a.npy", "--out", "out.parquet", *resume], capsys)
    assert f"{name}' would be written to, and is a" in error
    assert os.path.samestat(os.lstat(name), before)
    assert not Path("out.parquet").exists()
    Path(name).rename("moved")
    assert main(["a.npy", "--out", "out.parquet", *resume]) == 0


@pytest.mark.parametrize("turn", [to_a_link, to_a_hard_link, to_a_pipe])
@pytest.mark.parametrize("ending", DRAFTS)
def test_a_link_that_comes_later_is_not_followed(
    turn: Callable[[str], None], ending: str, desk: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """After all was looked at."""
    from tracking import drafts, predict

    def looked_at(target: Path) -> None:
        turn(f".out.parquet{ending}")

    monkeypatch.setattr(predict, "check_drafts", looked_at)
    monkeypatch.setattr(drafts, "check_drafts", looked_at)
    code = main(["a.npy", "--out", "out.parquet"])
    assert Path("victim").read_text() == "precious"
    assert capsys.readouterr().err.count("\n") == (code > 0)


def test_another_users_draft_is_not_gone_on_with(
    desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(".predictions.csv.partial").write_text("forged")
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert "is another user's: remove it" in fails(["a.npy", "--resume"], capsys)


def test_a_draft_is_no_input(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (9, 9)).save(".predictions.csv.partial", "PNG")
    before = Path(".predictions.csv.partial").read_bytes()
    Path("list").write_text(".predictions.csv.partial\n")
    for source in (".predictions.csv.partial", "@list"):
        assert "is among what is read" in fails([source], capsys)
        assert Path(".predictions.csv.partial").read_bytes() == before


def test_a_link_where_nobody_named_one_leads_to_no_file_of_another_kind(
    desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("predictions.csv").symlink_to("victim")
    assert "which does not end in .csv" in fails(["a.npy"], capsys)
    Path("predictions.csv").unlink()
    Path("predictions.csv").hardlink_to("victim")
    assert main(["a.npy"]) == 0
    assert Path("victim").read_text() == "precious"


@pytest.mark.parametrize("turn", TURNED)
def test_a_database_is_drafted_in_no_other_file(turn: Callable[[str], None], desk: Path) -> None:
    turn("x.db.draft")
    with pytest.raises(ValueError, match=r"x\.db\.draft' would be written to, and is a"):
        make_whole("sqlite:///x.db", lambda _: pytest.fail("it was made"))
    assert Path("victim").read_text() == "precious"
    assert not Path("x.db").exists()


def test_a_folder_of_a_report_that_is_a_link_is_not_followed(desk: Path) -> None:
    Path("report").mkdir()
    Path("elsewhere").mkdir()
    Path("report/data").symlink_to("../elsewhere")
    Path("elsewhere/old.csv").write_text("precious")
    with (
        pytest.raises(ValueError, match="report/data' would be written to, and is a link"),
        open_folder(Path("report"), ["data/new.csv", "data/old.csv"]) as draft,
    ):
        pytest.fail(f"{draft} was handed out")
    assert [file.name for file in Path("elsewhere").iterdir()] == ["old.csv"]


def test_a_new_file_takes_no_name_that_is_taken(desk: Path) -> None:
    to_a_link("link")
    Path("nowhere").symlink_to("gone")
    for name in ("victim", "link", "nowhere"):
        with pytest.raises(FileExistsError):
            files.create(Path(name))
    old = os.umask(0o027)
    try:
        files.create(Path("new")).close()
        with files.replacing(Path("secret"), mode=0o600) as stream:
            stream.write(b"1")
    finally:
        os.umask(old)
    assert stat.S_IMODE(Path("new").stat().st_mode) == 0o640
    assert stat.S_IMODE(Path("secret").stat().st_mode) == 0o600


def test_a_file_is_replaced_as_a_whole_or_not_at_all(desk: Path) -> None:
    to_a_link("link")
    with pytest.raises(ZeroDivisionError), files.replacing(Path("link")) as stream:
        stream.write(b"half" * (1 // 0))
    assert Path("link").is_symlink()
    with files.replacing(Path("link")) as stream:
        stream.write(b"whole")
    assert Path("link").read_bytes() == b"whole"
    assert not Path("link").is_symlink()
    assert Path("victim").read_text() == "precious"
    assert sorted(path.name for path in desk.iterdir()) == ["a.npy", "link", "victim"]


def test_a_lock_is_opened_as_it_is_and_a_pipe_is_not_waited_for(desk: Path) -> None:
    with files.open_own(Path("x.lock"), is_shared=True, buffering=0) as stream:
        stream.write(b"1")
    with files.open_own(Path("x.lock"), is_shared=True, buffering=0) as stream:
        stream.seek(0)
        assert stream.read() == b"1"
    for turn in TURNED:
        turn(turn.__name__)
        with pytest.raises(ValueError, match="would be written to, and is a"):
            files.open_own(Path(turn.__name__), is_shared=True)
