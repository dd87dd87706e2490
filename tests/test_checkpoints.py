"""A checkpoint is as it was written, or it is none: it costs time, and nothing else."""

from __future__ import annotations

import io
import os
import pickle
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from zipfile import ZIP_BZIP2, ZIP_DEFLATED, ZIP_STORED, ZipFile

import pytest
import torch

from cnn.config import TrainConfig
from cnn.data import Dataset
from experiments.engine import checkpoints
from experiments.engine.base import CheckpointLost, EpochEnded, Event, JobEnded
from experiments.engine.checkpoints import CheckpointError, Checkpoints, key_of, unpack
from experiments.engine.job import train_job

CONFIG = TrainConfig(loss="mse", learning_rate=0.01, batch_size=32, epochs=3)
KEY = "0" * 32


def run(
    data: Dataset,
    checkpoint: bytes | None = None,
    keep: Callable[[bytes], None] = lambda _: None,
    config: TrainConfig = CONFIG,
) -> list[Event]:
    return list(train_job(0, config, data, checkpoint=checkpoint, keep=keep))


@pytest.fixture(scope="module")
def kept(coloured_noise: Dataset) -> list[bytes]:
    """The checkpoints of the three epochs of a training."""
    kept: list[bytes] = []
    run(coloured_noise, keep=kept.append)
    return kept


def resumed_from(content: bytes, data: Dataset) -> int:
    """Return how many epochs a training need not train, and check that it ends as it should."""
    trained: list[bytes] = []
    *events, end = run(data, content, trained.append)
    lost = [event for event in events if isinstance(event, CheckpointLost)]
    *expected, expected_end = run(data)
    epochs = [event for event in events if isinstance(event, EpochEnded)]
    assert values(epochs) == values(expected)
    assert isinstance(end, JobEnded)
    assert isinstance(expected_end, JobEnded)
    for name, value in expected_end.weights.items():
        assert (end.weights[name] == value).all()
    assert (len(trained) == CONFIG.epochs) == bool(lost)
    assert events[: len(lost)] == lost
    return CONFIG.epochs - len(trained)


def values(events: list[Event]) -> list[tuple[int, float, float]]:
    return [
        (event.number, event.metrics["train/loss"], event.metrics["val/loss"])
        for event in events
        if isinstance(event, EpochEnded)
    ]


def test_a_training_resumes_from_its_checkpoint(kept: list[bytes], coloured_noise: Dataset) -> None:
    assert [resumed_from(each, coloured_noise) for each in kept] == [1, 2, 3]


def inverted(content: bytes, start: int, length: int) -> bytes:
    """Return content with some bytes inverted."""
    part = bytes(255 - byte for byte in content[start : start + length])
    return content[:start] + part + content[start + length :]


def damages(content: bytes) -> Iterator[bytes]:
    yield inverted(content, len(content) // 2, 4096)
    yield from (inverted(content, start, 1) for start in range(0, len(content), 40_000))
    yield from (inverted(content, start, 1) for start in range(0, 160, 7))
    yield from (content[:length] for length in (0, 1, 50, 130, 5000, len(content) - 1))
    yield content + b"\0"
    yield from (b"x" * 10_000, b"PK cut short", b"\n" * 200)


def test_whatever_is_damaged_is_noticed(kept: list[bytes]) -> None:
    key = checkpoints.key_of("0" * 32, CONFIG)
    unpack(kept[0], key, CONFIG, num_classes=3, image_size=32)
    for content in damages(kept[0]):
        with pytest.raises(CheckpointError):
            unpack(content, key, CONFIG, num_classes=3, image_size=32)


@pytest.mark.parametrize("damage", ["inverted", "cut short", "of another training"])
def test_a_damaged_checkpoint_has_the_training_begin_again_and_say_so(
    kept: list[bytes], coloured_noise: Dataset, damage: str
) -> None:
    content = {
        "inverted": inverted(kept[1], 500_000, 4096),
        "cut short": kept[1][:1000],
        "of another training": kept[1].replace(
            checkpoints.key_of("0" * 32, CONFIG).encode(), KEY.encode(), 1
        ),
    }[damage]
    assert resumed_from(content, coloured_noise) == 0
    (lost,) = (event for event in run(coloured_noise, content) if isinstance(event, CheckpointLost))
    assert lost.reason.startswith("its checkpoint can't be used (it")
    assert lost.reason.endswith("): it starts again from its first epoch")


def test_a_checkpoint_of_other_code_is_none(
    kept: list[bytes], coloured_noise: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "source_digest", lambda: "another network's")
    assert resumed_from(kept[1], coloured_noise) == 0


def archive_of(content: bytes) -> bytes:
    """Return the ZIP archive in a checkpoint: all there was of it once."""
    return content.partition(b"\n")[2]


def test_a_checkpoint_of_before_there_was_a_digest_is_taken_by_its_checksums(
    kept: list[bytes], coloured_noise: Dataset
) -> None:
    old = archive_of(kept[1])
    assert resumed_from(old, coloured_noise) == 2
    for content in (inverted(old, 400_000, 4096), inverted(old, 300, 1), old[:-100]):
        assert resumed_from(content, coloured_noise) == 0


def test_one_of_another_network_is_none(kept: list[bytes]) -> None:
    with pytest.raises(CheckpointError):
        unpack(archive_of(kept[0]), KEY, CONFIG, num_classes=4, image_size=32)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[object]]:
        return os.mkdir, ("it ran",)


class Huge:
    def __reduce__(self) -> tuple[object, tuple[object]]:
        return bytearray, (3 * 10**8,)


def saved(past: object, checkpoint: bytes) -> bytes:
    parts = torch.load(io.BytesIO(checkpoint), weights_only=True)
    content = io.BytesIO()
    torch.save(parts | {"past": past}, content)
    return content.getvalue()


def rewritten(checkpoint: bytes, method: int, name: str = "") -> bytes:
    """Return an archive written again, with a method, and one entry twice."""
    content = io.BytesIO()
    with ZipFile(io.BytesIO(checkpoint)) as old, ZipFile(content, "w", method) as new:
        for entry in old.namelist():
            new.writestr(entry, old.read(entry))
            if entry == name:
                with pytest.warns(UserWarning, match="Duplicate name"):
                    new.writestr(entry, old.read(entry))
    return content.getvalue()


def test_what_a_hostile_checkpoint_asks_for_is_not_done(
    kept: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    old = archive_of(kept[0])
    hostile = [
        (saved(Evil(), old), "it has posix mkdir"),
        (saved(Huge(), old), "it has .*bytearray"),
        (saved([], old), "the number of epochs does not fit"),
        (saved([{"val/accuracy": "x"}], old), "a metric is no number"),
        (rewritten(old, ZIP_DEFLATED), "an entry is compressed"),
        (rewritten(old, ZIP_BZIP2), "an entry is compressed"),
        (rewritten(old, ZIP_STORED, "archive/data.pkl"), "two entries have the same name"),
        (pickle.dumps(Evil()), "BadZipFile as it was read"),
    ]
    start = time.monotonic()
    for archive, error in hostile:
        about = checkpoints._about(KEY)
        digest = checkpoints._digest(about, archive)
        for content in (archive, b"".join([about, b" ", digest, b"\n", archive])):
            with pytest.raises(CheckpointError, match=f"^{error}$"):
                unpack(content, KEY, CONFIG, num_classes=3, image_size=32)
    assert time.monotonic() - start < 10
    assert not list(tmp_path.iterdir())


@pytest.fixture
def places(tmp_path: Path) -> Checkpoints:
    (tmp_path / "checkpoints").mkdir()
    return Checkpoints(digest="0" * 32, data_dir=tmp_path)


def test_no_link_that_stands_where_a_draft_might_is_followed(places: Checkpoints) -> None:
    victim = places.data_dir / "victim"
    victim.write_text("of value")
    file = places.file(CONFIG)
    for name in (file.with_suffix(".draft"), file):
        name.symlink_to(victim)
    assert places.read(CONFIG) == b""
    places.write(CONFIG, b"content")
    assert places.read(CONFIG) == b"content"
    assert victim.read_text() == "of value"
    places.remove(CONFIG)
    assert not list(file.parent.iterdir())
    assert places.read(CONFIG) is None


def test_what_is_no_file_is_not_waited_for(places: Checkpoints) -> None:
    file = places.file(CONFIG)
    os.mkfifo(file)
    os.mkfifo(file.with_suffix(".draft"))
    assert places.read(CONFIG) == b""
    places.write(CONFIG, b"content")
    assert places.read(CONFIG) == b"content"
    file.unlink()
    file.mkdir()
    assert places.read(CONFIG) == b""
    with pytest.raises(OSError, match="directory"):
        places.write(CONFIG, b"content")
    assert not list(file.parent.glob(f"{file.stem}.*.draft"))  # nothing is left of it
    places.remove(CONFIG)


def test_a_file_beyond_all_bounds_is_not_read(places: Checkpoints) -> None:
    with places.file(CONFIG).open("wb") as file:
        file.truncate(10**12)
    assert places.read(CONFIG) == b""


def test_a_checkpoint_that_cannot_be_kept_is_told_once(coloured_noise: Dataset) -> None:
    def full(_: bytes) -> None:
        raise OSError(28, "No space left on device")

    first, *others = run(coloured_noise, keep=full)
    assert first == CheckpointLost(
        job=0,
        reason="its checkpoint can't be written ([Errno 28] No space left on device): if "
        "interrupted, it would start again",
    )
    assert [type(event) for event in others] == [EpochEnded] * 3 + [JobEnded]


def test_a_checkpoint_is_of_the_users_own_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = "from torch import nn\ndef make(num_classes):\n    return nn.Linear(1, num_classes)\n"
    Path("net.py").write_text(code)
    config = replace(CONFIG, network="net.py:make")
    before = key_of("0", config)
    assert before == key_of("0", config)
    Path("net.py").write_text(f"{code}\n# edited\n")
    assert key_of("0", config) != before
    assert CONFIG.code_digests() == {}
