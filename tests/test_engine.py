"""What the command line says of where the workers are to be."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from experiments.sweep import main


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refused(options: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line that a command line is refused with."""
    assert main(options.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("python -m experiments.sweep: error: ")


@pytest.mark.parametrize(
    "flag", ["--ray-address auto", "--gpus-per-worker 1", "--cpus-per-worker 2", "--min-workers 2"]
)
def test_flags_of_ray_need_ray(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(flag, capsys) == f"{flag.split()[0]} is for --engine ray"


def test_without_ray_it_is_said_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    for module in ("experiments.engine.ray_pool", "experiments.engine.ray_worker"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    assert refused("--engine ray", capsys) == "--engine ray needs Ray: pip install '.[ray]'"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ("--device cuda:1", "--device is auto, cpu or cuda, not 'cuda:1'"),
        ("--workers 0", "--workers must be ≥ 1, not 0"),
        ("--min-workers 0", "--min-workers must be ≥ 1, not 0"),
        ("--workers 2 --min-workers 3", "--min-workers 3 is more than --workers 2"),
        ("--ray-timeout -1", "--ray-timeout must be seconds ≥ 0, not -1"),
        ("--cpus-per-worker 0", "--cpus-per-worker must be > 0, not 0"),
        ("--device cuda --gpus-per-worker 0", "--device cuda needs --gpus-per-worker > 0"),
        ("--ray-address=", "--ray-address is empty: it takes auto, ray://HOST:10001 or HOST:6379"),
        ("--ray-address foo", "no Ray cluster can be used at --ray-address foo: Invalid address"),
        ("--ray-address 127.0.0.1:1", "no Ray cluster answers at --ray-address 127.0.0.1:1: "),
    ],
)
def test_what_ray_can_not_do_is_said_in_a_line(
    options: str, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    assert error in refused(f"--engine ray {options}", capsys)
