"""`--config FILE` and `--print-config`."""

from __future__ import annotations

import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
from fake_pool import script_of_ten, use_pool
from mlflow import MlflowClient

from experiments import compare, sweep


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def parsed(text: str, *argv: str) -> Any:
    Path("study.toml").write_text(text)
    return sweep.build_parser().parse_args(["--config", "study.toml", *argv])


def test_a_file_gives_options_by_their_names() -> None:
    options = parsed(
        'trials = 3\nlosses = ["l1", "mse"]\nlearning-rate-min = 0.01\nbatch_sizes = [8, 16]\n'
        'data-dir = "d"\n[vary]\nmomentum = "0.8..0.99"\n'
    )
    assert options.trials == 3
    assert options.losses == ["l1", "mse"]
    assert options.learning_rate_min == 0.01
    assert options.batch_sizes == ["8", "16"]
    assert options.data_dir == Path("d")
    assert options.vary == ["momentum=0.8..0.99"]
    assert options.epochs == 10


def test_a_file_begins_with_the_shortest_command_that_has_its_options() -> None:
    parser = sweep.build_parser()
    words = ["--losses", "l1", "mse", "--trials", "5", "--vary", "momentum=0.8..0.99"]
    words += ["--study", "a b", "--storage", "postgresql://me:secret@host/studies"]
    options = parser.parse_args(words)
    first = options.options.partition("\n")[0]
    assert first.startswith("# python -m experiments.sweep --losses l1 mse")
    assert "secret" not in first
    _, _, _, _, *again = shlex.split(first)
    same = parser.parse_args(again)
    assert {**vars(options), **dict.fromkeys(("options", "storage"))} == {
        **vars(same),
        **dict.fromkeys(("options", "storage")),
    }


def test_a_switch_is_true_or_false() -> None:
    for value in (True, False):
        Path("c.toml").write_text(f"retest = {str(value).lower()}")
        options = compare.build_parser().parse_args(["--config", "c.toml"])
        assert options.retest == value


def test_the_command_line_goes_before_the_file() -> None:
    text = 'trials = 3\nlosses = ["l1"]\noptimizer = "adam"\n[vary]\nmomentum = "0.8..0.99"\n'
    options = parsed(text, "--trials", "5", "--losses", "mse", "bce", "--momentum", "0.5")
    assert (options.trials, options.losses) == (5, ["mse", "bce"])
    assert (options.momentum, options.vary) == (0.5, [])
    options = parsed(text, "--vary", "momentum=0.1,0.2", "--vary", "optimizer=sgd,adam")
    assert options.vary == ["momentum=0.1,0.2", "optimizer=sgd,adam"]
    assert options.optimizer == "sgd"
    options = parsed(text, "--vary", "loss=mse,bce")
    assert options.losses == ["l1", "mse", "cross_entropy"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trails = 3", "'study.toml' has an unknown option 'trails' (did you mean 'trials'?)"),
        ("config = 'x'", "has an unknown option 'config'"),
        ("trials = '3'", "trials must be an integer, not '3'"),
        ("trials = 3.5", "trials must be an integer, not 3.5"),
        ("trials = true", "trials must be an integer, not True"),
        ("learning-rate-min = 'low'", "learning-rate-min must be a number, not 'low'"),
        ("losses = 'mse'", "losses must be a list, not 'mse'"),
        ("optimizer = 3", "optimizer must be a text, not 3"),
        ("vary = 'momentum'", "vary must be a table of texts"),
        ("[vary]\nmomentum = 0.5", "vary must be a table of texts"),
        ("[vary]\nmoment = '0..1'", "there is no parameter 'moment'"),
        ("optimizer = 'sdg'", "invalid choice: 'sdg'"),
        ("trials = ", "--config 'study.toml' is no TOML"),
    ],
)
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], text: str, message: str) -> None:
    Path("study.toml").write_text(text)
    assert sweep.main(["--config", "study.toml"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_file_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main(["--config", "none.toml"]) == 2
    assert "can't read --config 'none.toml'" in capsys.readouterr().err


def test_what_is_printed_is_read_again_as_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        "--trials",
        "7",
        "--data-dir",
        'odd "\\\x7fé',
        "--batch-sizes",
        "8",
        "16",
        "--study",
        "s",
    ]
    argv += ["--vary", "weight_decay=1e-5..1e-2:log", "--warmup", "0.1"]
    assert sweep.main([*argv, "--print-config"]) == 0
    printed = capsys.readouterr().out
    told, direct = parsed(printed), sweep.build_parser().parse_args(argv)
    assert tomllib.loads(told.options) == tomllib.loads(direct.options)
    differing = {k for k in vars(told) if getattr(told, k) != getattr(direct, k)}
    assert differing == {"config", "options"}  # 0 is written as 0.0 then


def test_passwords_are_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main(["--storage", "postgresql://me:secret@host/db", "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert "secret" not in printed
    assert tomllib.loads(printed)["storage"].endswith("@host/db")


def test_a_sweep_has_its_options_as_an_artifact_that_repeats_it(
    mlflow_store: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    digits_cache: Path,
    tmp_path: Path,
) -> None:
    (Path.cwd() / "data").symlink_to(digits_cache)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    use_pool(monkeypatch, script_of_ten)
    argv = ["--trials", "2", "--epochs", "1", "--losses", "mse", "--vary", "momentum=0.5,0.6"]
    assert sweep.main(argv) == 0
    (parent,) = MlflowClient().search_runs(["1"], "tags.role = 'sweep'")
    file = MlflowClient().download_artifacts(parent.info.run_id, "study.toml", str(tmp_path))
    capsys.readouterr()
    assert sweep.main(["--config", file]) == 0
    assert "2 already finished" in capsys.readouterr().out
