"""Files that somebody made to do harm: small, made here by code, each refused in bounded time.

What is loaded may take 2 GB and 60 s before it is refused; the tests allow less.
"""

from __future__ import annotations

import os
import resource
import signal
import stat
import struct
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_outputs import predictor_of, use

from tracking import files
from tracking.files import open_folder
from tracking.predict import main
from tracking.prediction import arrays, inputs, parquet_reader
from tracking.prediction.inputs import Table
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
    from tracking import predict
    from tracking.prediction import drafts

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


# What is read: bounds on time and memory


@contextmanager
def bounded(*, seconds: float = 20.0, megabytes: int = 500) -> Iterator[None]:
    """Raise where a block takes longer, or more memory on top of what the process has."""

    def too_late(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    old = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + megabytes * 2**20
    handler = signal.signal(signal.SIGALRM, too_late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    resource.setrlimit(resource.RLIMIT_AS, (limit, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def test_the_bounds_hold() -> None:
    with pytest.raises(MemoryError), bounded(megabytes=100):
        bytearray(2**28)
    with pytest.raises(TimeoutError), bounded(seconds=0.01):
        time.sleep(5)


def npy(header: str, content: bytes = b"", *, version: bytes = b"\1\0") -> bytes:
    """Return an array as NumPy writes it, whatever its header says."""
    size = struct.pack("<H" if version == b"\1\0" else "<I", len(header))
    return b"\x93NUMPY" + version + size + header.encode("latin1") + content


def header(shape: object, descr: object = "|u1", *, fortran: bool = False) -> str:
    return f"{{'descr': {descr!r}, 'fortran_order': {fortran}, 'shape': {shape}, }}\n"


LAST_IMAGES = npy(header("(2, 32, 32, 3)"), bytes(2 * 32 * 32 * 3))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (npy(header("(1000000000000, 32, 32, 3)")), " 3,072,000,000,000,000 bytes"),
        (npy(header(f"({10**30}, 32, 32, 3)")), "2,000,000,000,000,000,000,000,000,000,000 bytes"),
        (npy(header("(9, 32, 32, 3)")), "9, 32, 32, 3), 27,648 bytes, and there are 0"),
        (npy(header(f"({2**63}, {2**63}, 1)")), "is refused: its images are"),
        (npy(header("(1, 65536, 8, 3)")), "and sides of 65,535 at most"),
        (npy(header("(2, -32, 32, 3)")), "its shape has a negative size: (2, -32, 32, 3)"),
        (npy(header("(-1, -32, 32, 3)")), "its shape has a negative size"),
        (npy(header("(2, 3.5, 32, 3)")), "its header is damaged"),
        (npy(header("(2,)", "|O")), "it holds Python objects"),
        (npy(header("(2,)", [("a", "|O")])), "it holds Python objects"),
        (npy(header("(1, 32, 32, 3)", "<U500000000")), "holds <U500000000 (1, 32, 32, 3)"),
        (npy(header("(1, 32, 32, 3)", ("|u1", (10**9,)))), "images must be uint8"),
        (npy(header("(2,)", "<U1000000000")), "its header is damaged"),
        (npy(header("(" + "1, " * 1000 + ")")), "holds uint8 (1, 1, "),
        (npy(f"{'-' * 4000}1"), "its header is damaged"),
        (npy(f"{'(' * 4000}1"), "its header is damaged"),
        (npy("{'descr': '\\d'}"), "its header is damaged"),
        (npy("x" * 60_000), "its header is larger than 4,096 bytes"),
        (npy("x" * 60_000, version=b"\2\0"), "its header is larger than 4,096 bytes"),
        (npy("", version=b"\3\0"), "it is no NumPy array"),
        (npy(""), "its header is damaged"),
        (LAST_IMAGES[:7], "it is no NumPy array"),
        (LAST_IMAGES[:9], "its header is damaged"),
        (b"\x93NUMPY\2\0\xff\xff\xff\xff", "its header is larger"),
        (b"\x80\x04\x95", "it is no NumPy array"),
        (LAST_IMAGES[:-1], "6,144 bytes, and there are 6,143"),
    ],
)
@pytest.mark.parametrize("ending", [".npy", ".npz"])
def test_an_array_that_says_what_is_not_so_is_refused(
    content: bytes, complaint: str, ending: str, desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if ending == ".npz":
        zipped({"images.npy": content})
    else:
        Path("x.npy").write_bytes(content)
    with bounded():
        error = fails([f"x{ending}"], capsys)
    assert f"x{ending}'" in error
    assert complaint in error


def zipped(entries: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile("x.npz", "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def bomb(megabytes: int, said: int) -> bytes:
    """Return deflated zeros with the head of an array, and a ZIP entry that says what it is."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = packer.compress(npy(header(f"({said}, 1000, 1000, 1)")))
    for _ in range(megabytes):
        packed += packer.compress(bytes(2**20))
    return packed + packer.flush()


def write_bomb(megabytes: int, *, said: int, file_size: int, labels: bytes | None = None) -> None:
    """Write an archive whose first entry stands for so many megabytes."""
    packed = bomb(megabytes, said)
    with zipfile.ZipFile("x.npz", "w") as archive:
        archive.writestr("images.npy", packed)
        if labels is not None:
            archive.writestr("labels.npy", labels)
        entry = archive.getinfo("images.npy")
        entry.compress_type, entry.file_size, entry.CRC = zipfile.ZIP_DEFLATED, file_size, 0


def test_a_bomb_is_refused_by_what_it_says(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_bomb(8, said=9000, file_size=9 * 10**9 + 200)
    with bounded():
        error = fails(["x.npz"], capsys)
    assert (
        "is refused: its arrays take 9,000,000,000 bytes unpacked, more than 2,000,000,0" in error
    )


def test_a_bomb_that_says_it_is_none_is_unpacked_no_further_than_it_says(
    desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_bomb(300, said=3, file_size=3 * 10**6 + 200)
    with bounded(megabytes=100):
        main(["x.npz"])
    write_bomb(1, said=1500, file_size=15 * 10**8 + 200)
    with bounded(megabytes=2000):  # mapped, and not written to
        assert "can't read the array 'x.npz': " in fails(["x.npz"], capsys)


def test_what_numpy_does_not_write_is_refused(
    desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(complaint: str) -> None:
        with bounded():
            assert complaint in fails(["x.npz"], capsys)

    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        zipped({"images.npy": LAST_IMAGES}, method)
        refused("'images' in it is not compressed as NumPy does it")
    zipped({"images.npy": LAST_IMAGES})
    whole = Path("x.npz").read_bytes()
    central = whole.index(b"PK\1\2")

    def patched(offset: int, value: bytes) -> None:
        where = central + offset
        Path("x.npz").write_bytes(whole[:where] + value + whole[where + len(value) :])

    patched(8, b"\1")
    refused("'images' in it is encrypted")
    patched(8, b"\x20")
    refused("can't read the array 'x.npz': compressed patched data")
    patched(6, b"\xff")
    refused("can't read the array 'x.npz': zip file version")
    patched(42, b"\xff\xff\xff\x7f")
    refused("can't read the array 'x.npz'")
    patched(10, b"\x63")
    refused("'images' in it is not compressed")
    patched(16, b"\0\0\0\0")
    refused("can't read the array 'x.npz': Bad CRC-32")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "Duplicate name"
        with zipfile.ZipFile("x.npz", "w") as twice:
            twice.writestr("images.npy", LAST_IMAGES)
            twice.writestr("images.npy", b"")
    refused("it holds 'images' twice")
    zipped({f"{k}": b"" for k in range(3000)})
    refused("'x.npz' holds no array 'images', but '0', '1', ")
    monkeypatch.setattr(arrays, "_LARGEST_DIRECTORY", 2**17)
    refused("can't read the array 'x.npz': its directory is larger than 131,072 bytes")


@pytest.mark.parametrize(
    ("labels", "complaint"),
    [
        (npy(header("(2,)", "<U500000000")), "labels of 500,000,000 letters are refused"),
        (npy(header("(2,)", "<U20000"), bytes(160_000)), "labels of 20,000 letters are refused"),
        (npy(header("(1000000000000,)", "<U0")), "2 images need as many labels, not an array"),
        (npy(header("(2,)", "<U1"), b"\xff" * 8), "it holds a text with a letter 0xffffffff"),
        (npy(header("(2,)", "<f8"), bytes(16)), "labels must be class names or integers"),
        (npy(header("(2,)", "<i8"), b"\xff" * 16), "label -1 is not in 0 to 2"),
        (npy(header("(2,)", "<u8"), b"\xff" * 16), "label 18446744073709551615 is not in 0 to 2"),
        (npy(header("(2,)", "<U2"), b"\x1b\0\0\0\n\0\0\0" * 2), r"label '\\x1b\\n' is no class"),
    ],
)
def test_labels_that_are_none_are_refused(
    labels: bytes, complaint: str, desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zipped({"images.npy": LAST_IMAGES, "labels.npy": labels})
    with bounded():
        assert complaint in fails(["x.npz"], capsys)


def test_labels_are_looked_at_before_any_image_is_unpacked(
    desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_bomb(1, said=1500, file_size=15 * 10**8 + 200, labels=npy(header("(2,)", "<i8")))
    with bounded(megabytes=100):
        fails(["x.npz"], capsys)


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.parquet"])
def test_what_is_no_regular_file_is_not_read(
    name: str, desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to_a_pipe(name)
    with bounded(seconds=5):
        assert "it is no regular file" in fails([name], capsys)
    Path(name).unlink()
    Path(name).symlink_to("/dev/zero")
    with bounded(seconds=5):
        assert "it is no regular file" in fails([name], capsys)


# Parquet: read by a process with a limit of its own


def reads(table: pa.Table, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    """Write a table, and return what is read of it, with 400 MB for the process that reads."""
    monkeypatch.setattr(parquet_reader, "MAX_MEMORY", 4 * 10**8)
    pq.write_table(table, "x.parquet", compression="zstd", **options)
    with bounded(seconds=60, megabytes=400):
        return list(Table(Path("x.parquet"), None).rows(0))


def test_a_table_that_unpacks_to_more_than_is_allowed_is_refused(
    desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pa.table({"image": [bytes(10**7)] * 20})  # a page
    with pytest.raises(ValueError, match=r"x\.parquet': row 0 takes more than 400,000,000 bytes"):
        reads(table, monkeypatch, use_dictionary=False)
    assert Path("x.parquet").stat().st_size < 100_000


def test_many_large_images_are_read_a_few_at_a_time(
    desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_reader, "MAX_MEMORY", 6 * 10**8)
    pq.write_table(pa.table({"image": [bytes(10**7)] * 30}), "x.parquet")  # once in the file
    with bounded(seconds=60, megabytes=400):
        sizes = [len(image) for image, _ in Table(Path("x.parquet"), None).rows(0)]
    assert sizes == [10**7] * 30


def test_an_image_that_unpacks_to_too_much_is_an_error_of_its_row(
    desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_reader, "MAX_CELL", 999)
    rows = reads(pa.table({"image": [bytes(999), bytes(1000), None]}), monkeypatch)
    assert rows[0] == (bytes(999), None)
    assert str(rows[1][0]) == "is refused: it has 1,000 bytes, more than 999"
    assert rows[2] == (None, None)


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        (pa.array([10**18, 1, None], pa.timestamp("ms")), [None] * 3),
        (pa.array([2**64 - 1, 1, None], pa.uint64()), [None, 1, None]),
        (pa.array(["a", "b", None]).dictionary_encode(), ["a", "b", None]),
        (pa.array([[1], [], None]), [None] * 3),
        (pa.array([1.5, 1, None]), [None] * 3),
        (pa.array([True, False, None]), [1, 0, None]),
    ],
)
def test_labels_may_be_of_any_type(
    label: pa.Array, expected: list[Any], desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = reads(pa.table({"image": [b"1", b"2", b"3"], "label": label}), monkeypatch)
    assert rows == list(zip([b"1", b"2", b"3"], expected, strict=True))


def test_in_a_struct_a_path_that_is_none_is_passed_over(
    desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = [{"bytes": b"1", "path": 7}, {"bytes": None, "path": 7}, None]
    assert reads(pa.table({"image": cells}), monkeypatch) == [(b"1", None), *[(None, None)] * 2]


def test_two_columns_of_a_name_are_one_line(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twice = pa.table([[b"1"], [b"2"], [0], [1]], ["image", "image", "label", "label"])
    pq.write_table(twice, "x.parquet")
    assert "has 2 columns 'image'" in fails(["x.parquet"], capsys)
    pq.write_table(twice.select([0, 2, 3]), "x.parquet")
    assert "has 2 columns 'label'" in fails(["x.parquet"], capsys)


def test_a_damaged_table_is_one_line(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pq.write_table(pa.table({"image": [os.urandom(1000)]}), "x.parquet", compression="zstd")
    whole = Path("x.parquet").read_bytes()
    Path("x.parquet").write_bytes(whole[:4] + b"\xff" * 30 + whole[34:])
    assert "can't read the Parquet file 'x.parquet': " in fails(["x.parquet"], capsys)
    Path("x.parquet").write_bytes(whole[:-8] + b"\xff\xff\xff\x7fPAR1")
    assert "its footer has 2,147,483,647 bytes, more than" in fails(["x.parquet"], capsys)


def test_a_table_that_takes_too_long_is_refused(
    desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "_SECONDS", 0.001)
    with pytest.raises(ValueError, match="row 0 and those after it take more than 0 s to unpack"):
        reads(pa.table({"image": [b"1"]}), monkeypatch)
