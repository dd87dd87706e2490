"""What `--vary` and the flags of single values make of a study, and what they refuse."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import optuna
import pytest
from fake_pool import script_of_ten, use_pool
from mlflow import MlflowClient
from optuna import get_all_study_names

from cnn.config import TrainConfig
from experiments.study.domains import Choices, Domain, Range
from experiments.study.parameters import BY_NAME, PARAMETERS, parse_vary, run_name, searched
from experiments.study.space import Space
from experiments.sweep import build_parser, main

MAIN = {
    "loss": Choices(("mse",)),
    "learning_rate": Range(0.001, 1.0, log=True),
    "batch_size": Choices((16,)),
}


def options(*argv: str) -> argparse.Namespace:
    parsed: argparse.Namespace = build_parser().parse_args(list(argv))
    return parsed


def varied(text: str) -> Domain:
    (domain,) = parse_vary([text], options()).values()
    return domain


def test_every_parameter_is_a_field_with_the_same_default() -> None:
    config = TrainConfig(loss="mse", learning_rate=0.1, batch_size=8)
    for parameter in PARAMETERS:
        value = getattr(config, parameter.name)
        if not parameter.is_searched_by_default and parameter.default not in (None, "auto"):
            assert parameter.default == value, parameter.name


@pytest.mark.parametrize(
    ("text", "domain"),
    [
        ("momentum=0.8..0.99", Range(0.8, 0.99)),
        ("weight-decay=1e-5..1e-2:log", Range(1e-5, 1e-2, log=True)),
        ("weight_decay=0,1e-4", Choices((0.0, 1e-4))),
        ("optimizer=sgd,adamw", Choices(("sgd", "adamw"))),
        ("network=../net.py:make,cnn", Choices(("../net.py:make", "cnn"))),
        ("batch_size=16..256:log", Range(16, 256, log=True)),
        ("learning_rate=0.1..0.2", Range(0.1, 0.2)),
    ],
)
def test_a_range_or_choices_of_any_parameter(text: str, domain: Domain) -> None:
    assert varied(text) == domain
    name = text.partition("=")[0].replace("-", "_")
    assert searched(BY_NAME[name].to_settings(domain)) == {name: domain}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--vary", "momentum"], "NAME=LOW..HIGH[:log] or NAME=A,B,C, not 'momentum'"),
        (["--vary", "moment=0..1"], "there is no parameter 'moment' (did you mean 'momentum'?)"),
        (["--vary", "epochs=1,2"], "there is no parameter 'epochs': choose one of loss,"),
        (["--vary", "momentum=0..1", "--vary", "momentum=0,1"], "--vary momentum is given twice"),
        (["--vary", "momentum=0..0.9", "--momentum", "0.5"], "by --vary and by --momentum"),
        (["--vary", "batch_size=2,4", "--batch-sizes", "8"], "by --vary and by --batch-sizes"),
        (["--vary", "learning_rate=1,2", "--learning-rate-min", "0.1"], "and by --learning-rate"),
        (["--vary", "momentum=low..high"], "--vary momentum takes numbers, not 'low'"),
        (["--vary", "momentum=0.8..0.99:lin"], "a range ends in :log"),
        (["--vary", "momentum=0.9..0.1"], "the lower end 0.9 must be smaller than"),
        (["--vary", "momentum=0..0.9:log"], "the lower end must be finite and > 0, not 0.0"),
        (["--vary", "momentum=0.5,2"], "momentum must be ≥ 0 and < 1, not 2.0"),
        (["--vary", "momentum=0.5..2"], "momentum must be ≥ 0 and < 1, not 2.0"),
        (["--vary", "momentum="], "--vary momentum needs at least one value"),
        (["--vary", "augment=flip,flip"], "--vary augment has a value twice: flip flip"),
        (["--vary", "augment=flop"], "unknown augment 'flop': choose one of none, flip, flip_crop"),
        (["--label-smoothing", "1"], "label_smoothing must be ≥ 0 and < 1, not 1.0"),
        (["--warmup", "-0.1"], "warmup must be ≥ 0 and < 1, not -0.1"),
        (["--network", "resnte"], "unknown network 'resnte' (did you mean 'resnet'?)"),
        (["--patience", "-1"], "--patience must be trials ≥ 0 (0: no limit), not -1"),
        (["--min-delta", "2"], "--min-delta must be ≥ 0 and < 1, not 2.0"),
    ],
)
def test_bad_input_is_one_line_and_records_nothing(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    argv: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    use_pool(monkeypatch, script_of_ten)
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not list(tmp_path.iterdir())


def suggest(space: Space, **values: Any) -> tuple[TrainConfig, dict[str, Any]]:
    trial = optuna.trial.FixedTrial(
        {"loss": "mse", "learning_rate": 0.1, "batch_size": 16} | values
    )
    return space.suggest(trial), trial.params  # type: ignore[arg-type]


def test_momentum_is_asked_for_only_where_it_applies() -> None:
    domains = {"optimizer": Choices(("sgd", "adamw")), "momentum": Range(0.5, 0.9)}
    space = Space(search={**MAIN, **domains})
    config, params = suggest(space, optimizer="sgd", momentum=0.6)
    assert config.momentum == params["momentum"] == 0.6
    config, params = suggest(space, optimizer="adamw", momentum=0.6)
    assert "momentum" not in params
    assert "momentum" not in space.varied(config)
    assert Space(search=MAIN | {"momentum": Range(0.5, 0.9)}, fixed={"optimizer": "adam"}).varied(
        config
    ) == {"loss": "mse", "learning_rate": 0.1, "batch_size": 16}


def test_a_parameter_is_not_searched_and_set_to_one_value() -> None:
    with pytest.raises(ValueError, match="momentum is searched, and set to 0.5 as well"):
        Space(search={**MAIN, "momentum": Range(0.5, 0.9)}, fixed={"momentum": 0.5})


def test_the_names_of_runs_have_what_is_searched() -> None:
    values = {"loss": "mse", "weight_decay": 1e-4, "network": "resnet", "seed": 3}
    assert run_name(7, values) == "007 mse resnet wd=0.0001 seed=3"


def test_a_sweep_searches_names_shows_and_records_it(
    mlflow_store: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    digits_cache: Path,
) -> None:
    (Path.cwd() / "data").symlink_to(digits_cache)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    use_pool(monkeypatch, script_of_ten)
    argv = ["--trials", "8", "--epochs", "1", "--sampler", "random", "--augment", "flip"]
    argv += ["--vary", "optimizer=sgd,adamw", "--vary", "momentum=0.8..0.99"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert re.search(r" lr [\d.]+ +bs \d+ +sgd +m 0\.\d+ +1 epoch", out)
    assert re.search(r" lr [\d.]+ +bs \d+ +adamw +m – +1 epoch", out)
    runs = MlflowClient().search_runs(["1"], "tags.role = 'trial'")
    assert {run.data.params["augment"] for run in runs} == {"flip"}
    assert {run.data.params["optimizer"] for run in runs} == {"sgd", "adamw"}
    for run in runs:
        has_momentum = run.data.params["optimizer"] == "sgd"
        assert (" m=0." in run.info.run_name) == has_momentum
        assert (float(run.data.params["momentum"]) != 0.9) == has_momentum
    (parent,) = MlflowClient().search_runs(["1"], "tags.role = 'sweep'")
    assert parent.data.params["sweep/vary_momentum"] == "0.8..0.99"
    # A parameter that is at its default now is another setting, too.
    (name,) = get_all_study_names("sqlite:///optuna.db")
    capsys.readouterr()
    assert main([*argv[:-4], "--study", name]) == 2
    assert "vary_momentum 0.8..0.99 → None" in capsys.readouterr().err
    assert main(argv) == 0  # it is the same study
    assert "8 already finished" in capsys.readouterr().out
