from __future__ import annotations

import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_pool import fails, script_of_ten, use_pool
from mlflow import MlflowClient
from torch import nn

import experiments
from cnn.references import reference_to, resolve
from experiments.config_file import ConfigParser
from experiments.from_python import _domain

REPOSITORY = Path(__file__).parents[1]
SMALL: dict[str, Any] = {"trials": 2, "epochs": 2, "workers": 1, "register": "none"}


def net(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.AvgPool2d(16), nn.Flatten(), nn.Linear(12, num_classes))


@pytest.fixture(autouse=True)
def small_world(mlflow_store: str, monkeypatch: pytest.MonkeyPatch, digits_cache: Path) -> None:
    (Path.cwd() / "data").symlink_to(digits_cache)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    use_pool(monkeypatch, script_of_ten)


def test_a_sweep_from_python_gives_its_trials_its_best_and_its_model() -> None:
    result = experiments.run_sweep(**SMALL, pruner="none", losses=["mse"], study="s")
    assert (result.study, result.experiment, len(result.trials)) == ("s", "cnn-sweep", 2)
    assert (result.best["trial"], result.best["loss"]) == (0, "mse")
    assert isinstance(result.best["learning_rate"], float)
    assert result.load_best().run_id == result.best["run_id"]
    assert "history" in result.figures()
    assert repr(result) == (
        "SweepResult(study s, 2 trials, best trial 0: validation accuracy 90.00%)"
    )
    assert "<table" in result._repr_html_()
    assert "90.00%" in result._repr_html_()


def test_the_command_continues_a_study_of_python_and_has_its_options(tmp_path: Path) -> None:
    from experiments.sweep import main

    given = SMALL | {"losses": "mse l1", "vary": {"momentum": (0.8, 0.99)}, "batch_sizes": [16]}
    study = experiments.run_sweep(**given).study
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (parent,) = client.search_runs(["1"], "tags.role = 'sweep'")
    file = client.download_artifacts(parent.info.run_id, "study.toml", str(tmp_path))
    assert main(["--config", file]) == 0
    assert experiments.run_sweep(config=file).study == study
    assert len(client.search_runs(["1"], "tags.role = 'trial'")) == 2


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"trails": 3}, "unknown option 'trails' (did you mean 'trials'?)"),
        ({"trials": "3"}, "run_sweep: trials must be an integer, not '3'"),
        ({"trials": 0}, "--trials must be ≥ 1, not 0"),
        ({"losses": ["nope"]}, "unknown loss 'nope'"),
        ({"vary": ["momentum"]}, "vary must be a table of texts"),
        ({"vary": {"momentun": (0, 1)}}, "there is no parameter 'momentun' (did you mean"),
        ({"network": lambda num_classes: None}, "has no name that other processes could find"),
        ({"dataset": "nowhere"}, "unknown data set 'nowhere'"),
        ({"config": "none.toml"}, "can't read --config 'none.toml'"),
    ],
)
def test_bad_options_are_value_errors_and_record_nothing(
    options: dict[str, Any], line: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="^[^\n]+$") as raised:
        experiments.run_sweep(**options)
    assert line in str(raised.value)
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "optuna.db").exists()


@pytest.mark.parametrize(
    ("domain", "text"),
    [
        ("0.8..0.99", "0.8..0.99"),
        ((0.8, 0.99), "0.8..0.99"),
        ((1e-5, 0.1, "log"), "1e-05..0.1:log"),
        ([0.8, 0.9], "0.8,0.9"),
        (("sgd", "adam"), "sgd,adam"),
        ((np.float64(0.5), np.float64(0.75)), "0.5..0.75"),
        ([net], f"{Path(__file__)}:net"),
    ],
)
def test_what_is_searched_is_a_text_a_tuple_or_a_list(domain: object, text: str) -> None:
    assert _domain(domain) == text


def test_a_stopped_sweep_is_a_value_error_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    use_pool(monkeypatch, fails)
    with pytest.raises(ValueError, match="^stopped: 1 trials failed in a row"):
        experiments.run_sweep(**SMALL, max_failures=1)


def test_a_sweep_runs_in_a_thread() -> None:
    results: list[experiments.SweepResult] = []
    thread = threading.Thread(target=lambda: results.append(experiments.run_sweep(**SMALL)))
    thread.start()
    thread.join()
    assert len(results[0].trials) == 2


def test_a_function_of_a_module_has_a_reference_that_leads_to_it() -> None:
    assert reference_to(net) == f"{Path(__file__)}:net"
    assert reference_to(nn.Linear) == "torch.nn.modules.linear:Linear"
    assert resolve(reference_to(ConfigParser)) is ConfigParser


def test_a_function_of_a_notebook_is_to_be_put_into_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    main = types.ModuleType("__main__")
    exec("def net(num_classes): ...", vars(main))
    monkeypatch.setitem(sys.modules, "__main__", main)
    with pytest.raises(ValueError, match="%%writefile mine.py.*'mine.py:net'"):
        reference_to(main.net)


def test_a_function_that_its_name_does_not_lead_to_is_refused() -> None:
    def inner(num_classes: int) -> None: ...

    inner.__qualname__ = "net"
    with pytest.raises(ValueError, match="is not the 'net' of its module"):
        reference_to(inner)
    with pytest.raises(ValueError, match="has no name"):
        reference_to(3)


SCRIPT = """
import torch
import experiments

def net(num_classes):
    return torch.nn.Sequential(torch.nn.AvgPool2d(8), torch.nn.Flatten(),
                               torch.nn.Linear(48, num_classes))

def my_loss(outputs, labels):
    return torch.nn.functional.cross_entropy(outputs, labels)

result = experiments.run_sweep(trials=1, epochs=1, network=net, losses=[my_loss], workers=1,
                               batch_sizes=[128])
print("BEST", result.best["loss"], result.load_best().image_shape)
"""


@pytest.mark.slow
def test_a_plain_script_sweeps_its_own_network_and_loss(tmp_path: Path, digits_cache: Path) -> None:
    (tmp_path / "mine.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "mine.py"],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPOSITORY), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout.splitlines()[-1] == "BEST mine.py:my_loss (32, 32, 3)", done.stderr
