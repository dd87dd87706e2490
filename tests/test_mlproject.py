"""`mlflow run` and the environment it makes: what MLproject declares is what the commands take."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from experiments import compare, sweep
from experiments.study.parameters import split_words
from tracking import predict

ROOT = Path(__file__).parent.parent
COMMANDS = {
    "main": ("experiments.sweep", sweep.build_parser),
    "compare": ("experiments.compare", compare.build_parser),
    "predict": ("tracking.predict", predict.build_parser),
}
# Flags that are not declared, because no value stands for leaving them out.
RAY = {"ray-address", "gpus-per-worker"}
OTHERS = {"config", "vary", "warmup", "workers", "study", "experiment"}
CHOICE = {"dataset", "loss", "study", "where"}
UNDECLARED = {
    "main": {"tensorboard", *OTHERS, *RAY},
    "compare": {*OTHERS, *RAY},
    "predict": {
        "column",
        "dataset",
        "experiment",
        "loss",
        "model",
        "report",
        "run-id",
        "study",
        "where",
    },
}


@pytest.fixture(scope="module")
def project() -> Any:
    return load(ROOT)


def load(folder: Path) -> Any:
    from mlflow.projects import _project_spec

    mlflows_own: Any = _project_spec
    return mlflows_own.load_project(str(folder))


def command(project: Any, entry_point: str, parameters: Mapping[str, str]) -> list[str]:
    """Return the words that the shell makes of the command which `mlflow run` hands it."""
    text = project.get_entry_point(entry_point).compute_command(parameters, storage_dir=None)
    return shlex.split(text)


def options(project: Any, entry_point: str, parameters: Mapping[str, str]) -> dict[str, Any]:
    """Return what the entry point's command makes of parameters: its parsed options."""
    module, build_parser = COMMANDS[entry_point]
    python, dash_m, name, *arguments = command(project, entry_point, parameters)
    assert (python, dash_m, name) == ("python", "-m", module)
    parsed = vars(build_parser().parse_args(arguments))
    parsed.pop("options", None)  # all of them as a text
    return parsed


@dataclass(frozen=True)
class Flag:
    """An option of a command line, as argparse knows it."""

    name: str  # as it is typed, without dashes
    action: argparse.Action

    @property
    def mlflow_type(self) -> str:
        return "float" if self.action.type in (int, float) else "string"

    def other_value(self) -> str:
        """Return a value that is allowed, not the default, and hard to hand on where it can be."""
        if self.action.choices:
            return next(
                str(choice) for choice in self.action.choices if choice != self.action.default
            )
        if self.action.type in (int, float):
            return str(self.action.type(self.action.default) + 3)
        return "it's; another $(value) {of} {0}"

    def parsed(self, text: str) -> Any:
        value = self.action.type(text) if callable(self.action.type) else text
        is_list = self.action.nargs == "+" or isinstance(self.action.default, list)
        return [value] if is_list else value


def flags(entry_point: str) -> dict[str, Flag]:
    _, build_parser = COMMANDS[entry_point]
    found = [
        Flag((action.option_strings or [action.dest])[-1].lstrip("-"), action)
        for action in build_parser()._actions
        if action.nargs != 0  # switches have no value that `mlflow run` could hand on
    ]
    return {flag.name: flag for flag in found}


DECLARED = [
    (entry_point, name)
    for entry_point in COMMANDS
    for name in load(ROOT).get_entry_point(entry_point).parameters
]


def lost_parameters(project: Any, entry_point: str) -> list[str]:
    """Return the declared parameters that do not arrive, alone and whole, in the parsed options."""
    before = options(project, entry_point, {})
    lost = []
    for name in project.get_entry_point(entry_point).parameters:
        flag = flags(entry_point)[name]
        text = flag.other_value()
        after = options(project, entry_point, {name: text})
        if after != before | {flag.action.dest: flag.parsed(text)}:
            lost.append(name)
    return lost


@pytest.mark.parametrize("entry_point", COMMANDS)
def test_every_declared_parameter_arrives_in_the_options_of_its_command(
    project: Any, entry_point: str
) -> None:
    assert lost_parameters(project, entry_point) == []


def test_a_parameter_that_is_declared_but_not_handed_on_would_be_found(tmp_path: Path) -> None:
    shutil.copy(ROOT / "conda.yaml", tmp_path)
    text = (ROOT / "MLproject").read_text()
    crossed = text.replace("--epochs {epochs}", "--epochs {seed}").replace(
        "--timeout {timeout}", ""
    )
    (tmp_path / "MLproject").write_text(crossed)
    assert lost_parameters(load(tmp_path), "main") == ["epochs", "seed", "timeout"]


@pytest.mark.parametrize("entry_point", COMMANDS)
def test_every_flag_with_a_default_value_is_declared(project: Any, entry_point: str) -> None:
    declared = set(project.get_entry_point(entry_point).parameters)
    assert declared == set(flags(entry_point)) - UNDECLARED[entry_point]


@pytest.mark.parametrize(("entry_point", "name"), DECLARED)
def test_types_are_those_of_the_command_line(project: Any, entry_point: str, name: str) -> None:
    # Not `path`, for none of them: MLflow would refuse a file that is still to be made.
    parameter = project.get_entry_point(entry_point).parameters[name]
    assert parameter.type == flags(entry_point)[name].mlflow_type


@pytest.mark.parametrize(
    ("entry_point", "name"), [(e, name) for e, name in DECLARED if name != "source"]
)
def test_defaults_are_those_of_the_command_line(project: Any, entry_point: str, name: str) -> None:
    action = flags(entry_point)[name].action
    of_mlproject = options(project, entry_point, {})[action.dest]
    if action.nargs == "+":  # one word with commas, which the command splits
        of_mlproject = of_mlproject[0].split(",")
    assert of_mlproject == action.default


def test_predict_takes_the_test_split_of_the_default_data_set(project: Any) -> None:
    main, prediction = (project.get_entry_point(name).parameters for name in ("main", "predict"))
    assert prediction["source"].default == f"{main['dataset'].default}:test"


@pytest.mark.parametrize(
    ("entry_point", "name"),
    [
        (entry_point, name)
        for entry_point, names in UNDECLARED.items()
        for name in sorted(names - {"config"})  # which is read at once
    ],
)
def test_a_flag_that_is_not_declared_can_be_given_all_the_same(
    project: Any, entry_point: str, name: str
) -> None:
    flag = flags(entry_point)[name]
    text = "3" if flag.action.type in (int, float) else flag.other_value()
    given = options(project, entry_point, {name: text})
    assert given[flag.action.dest] == flag.parsed(text)


@pytest.mark.parametrize("losses", ["bce,gce", "bce gce", "bce, gce"])
def test_lists_are_one_word_with_commas_or_spaces(project: Any, losses: str) -> None:
    assert split_words(options(project, "main", {"losses": losses})["losses"]) == ["bce", "gce"]


def test_the_test_entry_point_runs_pytest_on_what_it_is_told(project: Any) -> None:
    assert command(project, "test", {}) == ["python", "-m", "pytest", "tests"]
    assert command(project, "test", {"tests": "tests/test one.py"})[-1] == "tests/test one.py"
    assert set(project.get_entry_point("test").parameters) == {"tests"}


def test_conda_yaml_takes_all_packages_from_requirements_txt(project: Any) -> None:
    from mlflow.utils import environment

    assert Path(project.env_config_path) == ROOT / "conda.yaml"
    mlflows_own: Any = environment._PythonEnv
    read = mlflows_own.from_conda_yaml(project.env_config_path)
    assert read.to_dict() == {
        "python": "3.11",
        "build_dependencies": ["pip"],
        "dependencies": ["-r requirements.txt"],
    }


def pins(text: str) -> Iterator[tuple[Requirement, str]]:
    """Read a requirements file: each requirement with its version.

    Raises:
        ValueError: a line is no package of the index, pinned to a version and its hashes.
    """
    without_comments = re.sub(r"^\s*#.*$", "", text, flags=re.MULTILINE)
    for line in without_comments.replace("\\\n", " ").splitlines():
        if not line.strip():
            continue
        name, *hashes = re.split(r"\s--hash=", line)
        requirement = Requirement(name)
        pin = re.fullmatch(r"==([\w.!+]+)", str(requirement.specifier))
        if not pin or requirement.url:
            raise ValueError(f"not pinned: {requirement}")
        if not hashes or not all(re.fullmatch(r"sha256:[0-9a-f]{64}\s*", each) for each in hashes):
            raise ValueError(f"no hash, or not that alone: {requirement}")
        yield requirement, pin[1]


def test_requirements_are_pinned_by_version_and_hash() -> None:
    names = [requirement.name for requirement, _ in pins((ROOT / "requirements.txt").read_text())]
    assert {"torch", "mlflow", "optuna", "pytest"}.issubset(names)


@pytest.mark.parametrize(
    "line",
    [
        "numpy==2.4.6",
        f"numpy>=2 --hash=sha256:{'0' * 64}",
        f"numpy==2.* --hash=sha256:{'0' * 64}",
        f"numpy @ file:///somewhere/numpy.whl --hash=sha256:{'0' * 64}",
        "numpy==2.4.6 --hash=md5:0",
        "--find-links /somewhere/wheels",
    ],
)
def test_a_requirement_without_version_or_hash_would_be_found(line: str) -> None:
    with pytest.raises(ValueError, match=r"not pinned|no hash|Expected"):
        list(pins(line))


def test_requirements_name_no_address_and_no_place_on_a_machine() -> None:
    text = (ROOT / "requirements.txt").read_text()
    assert not re.search(r"://|[\s=]/", text)


def test_requirements_hold_every_package_of_pyproject_toml_in_its_range() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = sum(settings["optional-dependencies"].values(), settings["dependencies"])
    versions = {
        requirement.name: version
        for requirement, version in pins((ROOT / "requirements.txt").read_text())
        if requirement.marker is None or requirement.marker.evaluate()
    }
    for requirement in map(Requirement, wanted):
        assert versions[requirement.name] in requirement.specifier, requirement


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project in which `mlflow run` has done a sweep of two trials."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("MLproject", "conda.yaml", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    for package in ("cnn", "experiments", "tracking"):
        shutil.copytree(ROOT / package, folder / package)
    mlflow_run(folder, "main", "trials=2", "epochs=1", "losses=mse", "study=a study")
    return folder


def mlflow_run(folder: Path, entry_point: str, *parameters: str) -> str:
    """Run an entry point in this environment, and return what it printed."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    given = [word for parameter in parameters for word in ("-P", parameter)]
    words = [sys.executable, "-m", "mlflow", "run", ".", "--env-manager", "local"]
    done = subprocess.run(
        [*words, "-e", entry_point, *given],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.slow
def test_the_run_that_mlflow_run_opened_is_the_parent_of_the_trials_runs(swept: Path) -> None:
    from mlflow import MlflowClient

    runs = MlflowClient(f"sqlite:///{swept / 'mlflow.db'}").search_runs(["0"])
    assert {run.info.status for run in runs} == {"FINISHED"}
    (opened,) = [run for run in runs if run.data.tags.get("mlflow.project.entryPoint") == "main"]
    assert "mlflow.parentRunId" not in opened.data.tags
    assert opened.data.params["trials"] == "2"
    trials = [run for run in runs if run is not opened]
    parents = [run.data.tags["mlflow.parentRunId"] for run in trials]
    assert parents == [opened.info.run_id] * 2
    assert {run.data.tags["study"] for run in trials} == {"a study"}


@pytest.mark.slow
def test_the_predict_entry_point_uses_the_best_run_of_the_same_experiment(swept: Path) -> None:
    printed = mlflow_run(swept, "predict", "out=labels of images.csv")
    assert "accuracy" in printed
    header, *rows = (swept / "labels of images.csv").read_text().splitlines()
    assert header.startswith('"source","prediction","probability",')
    assert len(rows) > 100
