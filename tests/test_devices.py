"""What there is of a machine for this process, containers with a part of it included."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cnn import devices
from experiments.engine.launch import _num_threads

V1 = "4:cpu,cpuacct:{}\n3:memory:/elsewhere\n0::/elsewhere\n"
V2 = "0::{}\n"


@pytest.fixture
def eight_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the test a machine of eight cores, and a folder for its control groups."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(devices, "_CGROUPS", tmp_path)
    monkeypatch.setattr(devices, "_OWN_CGROUPS", tmp_path / "own")
    return tmp_path


def v2(quota: object, period: int = 100_000) -> dict[str, str]:
    return {"cpu.max": f"{quota} {period}\n"}


def v1(quota: int, period: int = 100_000) -> dict[str, str]:
    return {"cpu.cfs_quota_us": f"{quota}\n", "cpu.cfs_period_us": f"{period}\n"}


@pytest.mark.parametrize(
    ("own", "groups", "expected"),
    [
        (V2.format("/"), {".": v2(300_000)}, 3),
        (V2.format("/"), {".": v2(150_000)}, 2),  # a part of a core is a core
        (V2.format("/"), {".": v2(10_000)}, 1),
        (V2.format("/"), {".": v2(40_000, 10_000)}, 4),
        (V2.format("/"), {".": v2("max")}, 8),
        (V2.format("/"), {".": v2(9_900_000)}, 8),
        (V2.format("/a/b"), {"a/b": v2("max"), "a": v2(200_000), ".": {}}, 2),
        (V2.format("/a/b"), {"a/b": v2(200_000), "a": v2(600_000), "a/c": v2(100_000)}, 2),
        (V2.format("/kubepods/x"), {".": v2(500_000)}, 5),  # a path of the host's
        (V2.format("/../.."), {".": v2(500_000)}, 5),
        (V2.format("/"), {".": {"cpu.max": "some\n"}}, 8),
        (V1.format("/"), {"cpu,cpuacct": v1(300_000)}, 3),
        (V1.format("/"), {"cpu": v1(300_000)}, 3),
        (V1.format("/docker/x"), {"cpu,cpuacct": v1(300_000)}, 3),  # a path of the host's
        (V1.format("/a/b"), {"cpu/a/b": v1(-1), "cpu/a": v1(250_000), "cpu": v1(-1)}, 3),
        (V1.format("/"), {"cpu": v1(-1), "memory": v1(100_000)}, 8),
        ("1:cpu:/\n0::/a\n", {"unified/a": v2(100_000), "cpu": v1(-1)}, 1),
        ("", {".": v2(100_000)}, 8),
        (None, {".": v2(100_000)}, 8),  # no Linux
    ],
)
def test_a_quota_of_a_container_limits_the_cores(
    eight_cores: Path, own: str | None, groups: dict[str, dict[str, str]], expected: int
) -> None:
    if own is not None:
        (eight_cores / "own").write_text(own)
    for group, files in groups.items():
        (eight_cores / group).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (eight_cores / group / name).write_text(content)
    assert devices.num_cores() == expected


def test_cores_that_a_process_may_not_run_on_are_none(
    eight_cores: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5}, raising=False)
    (eight_cores / "own").write_text("0::/\n")
    (eight_cores / "cpu.max").write_text("400000 100000\n")
    assert devices.num_cores() == 2


@pytest.mark.parametrize(
    ("variable", "num_workers", "expected"),
    [
        (None, 1, 1),
        (None, 8, 1),
        ("4", 1, 4),
        ("4", 4, 2),
        ("64", 1, 8),
        ("4,2", 1, 4),
        ("2", 9, 1),
    ],
)
@pytest.mark.usefixtures("eight_cores")
def test_a_worker_has_one_thread_unless_told(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, num_workers: int, expected: int
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert _num_threads(num_workers) == expected


@pytest.mark.parametrize("variable", ["0", "-1", "many", "1.5"])
def test_a_number_of_threads_that_is_none(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    with pytest.raises(
        ValueError, match=f"^OMP_NUM_THREADS must be an integer ≥ 1, not '{variable}'$"
    ):
        _num_threads(1)
