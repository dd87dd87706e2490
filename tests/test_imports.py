"""Who imports whom: `experiments` → `tracking`, `cnn`, and never the other way round."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Collection, Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "cnn": {"mlflow", "optuna", "tracking", "experiments"},
    "tracking": {"optuna", "cnn", "experiments"},
}
# Prediction decodes images as training does: a call of its functions imports `cnn`, importing
# them does not.
INSIDE_FUNCTIONS = {"tracking/prediction": {"cnn"}}

# A file imports from lower lines, from its own, and from its own package, wherever in the file.
LAYERS = """
    cnn.references
    cnn.images cnn.folders cnn.losses cnn.source cnn.networks cnn.network_digest
    cnn.optimizers cnn.augmentation
    cnn.cache cnn.config
    cnn.arrays cnn.datasets cnn.devices cnn.downloads cnn.functions cnn.parquet
    cnn.data cnn.stepper
    cnn.training
    tracking.errors
    tracking.wording tracking.text tracking.plotting tracking.progress
    tracking.examples tracking.files tracking.cli tracking.store tracking.retries
    tracking.views
    tracking.prediction.pixels
    tracking.models
    tracking.ranking tracking.runs tracking.tracker tracking.system_metrics tracking.run_search
    tracking.selection
    tracking.model_texts
    tracking.registry
    tracking.candidates
    tracking.prediction
    tracking.evaluation
    tracking.best tracking.predict tracking.promote tracking.report
    experiments.interrupts experiments.accounts experiments.supervision
    experiments.server_addresses
    experiments.engine
    experiments.study
    experiments.inventory
    experiments.comparison
    experiments.reporting
    experiments.config_file experiments.cli
    experiments.sweep experiments.compare experiments.report experiments.servers experiments.rerun
    experiments.clean experiments.__main__
    experiments.from_python
"""
RANK = {name: rank for rank, line in enumerate(LAYERS.split("\n")) for name in line.split()}

# What travels to Ray's nodes and runs in worker processes.
WORKERS = {"base", "checkpoints", "job", "process_worker", "ray_worker"}

# Where names of other packages may stand that these do not promise to keep, by a pattern of them;
# each is used by a test that would fail if it went.
PRIVATE_NAMES = {
    r"optuna\.storages\._|\._(storage|backend|trial_id|study_id)\b": {
        "experiments/study/heartbeat.py",
        "experiments/study/retrying_storage.py",
        "experiments/study/storage.py",
        "experiments/study/trial_cache.py",
    },
    r"\btorch(\.\w+)*\._[a-z]": {
        "cnn/stepper.py",  # _foreach_copy_: all gradients in one call
        "experiments/engine/checkpoints.py",  # how a state_dict is pickled
        "experiments/study/models.py",  # whether the compiler was imported
        "tracking/models/cost.py",  # an operator that exports have
        "tracking/models/safety.py",  # the logger of a loaded graph
    },
    r"\bray\._private\b": {"experiments/engine/ray_cluster.py"},
    r"\b_download_file\b": {"tracking/models/fetching.py"},
}

SLOW_TO_IMPORT = {"torch", "mlflow", "optuna", "pandas", "matplotlib"}

# Imports every module of a package, one after the other, and prints what each brought.
IMPORT_ALL = """
import importlib, json, pkgutil, sys
package = importlib.import_module(sys.argv[1])
names = [package.__name__]
names += [found.name for found in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
brought, before = {}, set()
for name in names:
    importlib.import_module(name)
    now = {module.partition(".")[0] for module in sys.modules}
    brought[name] = sorted(now - before)
    before = now
print(json.dumps(brought))
"""

# Runs a module as `python -m` does, asks it for help, and prints what that brought.
HELP = """
import json, runpy, sys
name = sys.argv[1]
sys.argv = [name, "--help"]
import os
def leave(code):  # at once, as some commands do
    raise SystemExit(code)
os._exit = leave
try:
    runpy.run_module(name, run_name="__main__")
except SystemExit as exit:
    assert not exit.code
print(json.dumps(sorted({module.partition(".")[0] for module in sys.modules})))
"""


def in_a_new_process(script: str, argument: str, *, root: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, argument],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@cache
def brought(package: str, root: Path) -> dict[str, list[str]]:
    """Return what each module of a package brings, beyond those imported before it."""
    found: dict[str, list[str]] = json.loads(in_a_new_process(IMPORT_ALL, package, root=root))
    return found


def wrong_imports(package: str, *, root: Path = ROOT) -> dict[str, set[str]]:
    """Return what each module of a package brings when imported, and must not."""
    return {
        module: wrong
        for module, names in brought(package, root).items()
        if (wrong := FORBIDDEN[package].intersection(names))
    }


def wrong_statements(package: str, *, root: Path = ROOT) -> list[str]:
    """Return the import statements of a package that must not be, wherever in a file they are."""
    return [
        f"{path.relative_to(root).as_posix()}:{line} imports {name}"
        for path in sorted((root / package).rglob("*.py"))
        for name, line, in_function in imports(path)
        if name in FORBIDDEN[package]
        and not (
            in_function
            and name in INSIDE_FUNCTIONS.get(path.parent.relative_to(root).as_posix(), set())
        )
    ]


def imports(path: Path) -> Iterator[tuple[str, int, bool]]:
    """Yield each top-level package that a file imports, its line, and whether in a function."""
    tree = ast.parse(path.read_text())
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=aliases):
                names = [alias.name for alias in aliases]
            case ast.ImportFrom(module=str(module), level=0):
                names = [module]
            case _:
                continue
        for name in names:
            yield name.partition(".")[0], node.lineno, id(node) in inside


def modules(*packages: str, root: Path) -> dict[str, Path]:
    """Return the files of packages by the names of their modules."""
    return {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for package in packages
        for path in (root / package).rglob("*.py")
    }


def imported(path: Path, known: Collection[str]) -> set[str]:
    """Return which of the known modules a file imports, in functions and for types as well."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import(names=aliases):
                found |= {alias.name for alias in aliases}
            case ast.ImportFrom(module=str(module), level=0, names=aliases):
                full = {f"{module}.{alias.name}" for alias in aliases}
                found |= full & set(known) or {module}
    return found & set(known)


def rank(module: str) -> int:
    """Return a module's layer: that of the longest name in `LAYERS` which it is, or is part of."""
    name = module
    while name not in RANK:
        name = name.rpartition(".")[0]
        assert name, f"{module} has no layer"
    return RANK[name]


def import_graph(root: Path = ROOT) -> dict[str, set[str]]:
    """Return which of our modules each imports. The packages themselves are empty."""
    files = modules("cnn", "tracking", "experiments", root=root)
    known = {name for name, path in files.items() if path.stem != "__init__"}
    return {name: imported(files[name], known) for name in known}


def upward_imports(root: Path = ROOT) -> list[str]:
    """Return the imports of a higher layer."""
    return sorted(
        f"{module} imports {other}"
        for module, others in import_graph(root).items()
        for other in others
        if rank(other) > rank(module)
    )


def test_a_file_imports_from_its_own_layer_and_lower_ones_only() -> None:
    assert upward_imports() == []


def test_there_is_no_circle_of_imports() -> None:
    list(TopologicalSorter(import_graph()).static_order())  # raises CycleError


def test_workers_know_cnn_and_each_other_only() -> None:
    graph = import_graph()
    ours = {f"experiments.engine.{name}" for name in WORKERS}
    foreign = {
        f"{module} imports {other}"
        for module in ours
        for other in graph[module] - ours
        if not other.startswith("cnn.")
    }
    assert foreign == set()


@pytest.mark.parametrize("pattern", PRIVATE_NAMES)
def test_private_names_of_other_packages_stand_in_few_files(pattern: str) -> None:
    found = {
        path.relative_to(ROOT).as_posix()
        for path in modules("cnn", "tracking", "experiments", root=ROOT).values()
        if re.search(pattern, path.read_text())
    }
    assert found == PRIVATE_NAMES[pattern]


@pytest.mark.parametrize("package", FORBIDDEN)
def test_importing_a_package_brings_nothing_that_it_must_not_know(package: str) -> None:
    assert wrong_imports(package) == {}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_no_file_of_a_package_imports_what_it_must_not_know(package: str) -> None:
    assert wrong_statements(package) == []


@pytest.mark.parametrize("package", FORBIDDEN)
def test_every_module_is_looked_at(package: str) -> None:
    assert set(brought(package, ROOT)) == modules(package, root=ROOT).keys()


@pytest.mark.parametrize(
    "module",
    [
        "experiments.report",
        "experiments.rerun",
        "experiments.servers",
        "experiments.sweep",
        "tracking.predict",
        "tracking.best",
        "tracking.promote",
        "tracking.report",
    ],
)
def test_help_imports_nothing_slow(module: str) -> None:
    *text, modules = in_a_new_process(HELP, module, root=ROOT).splitlines()
    assert f"python -m {module}" in text[0]
    assert SLOW_TO_IMPORT.isdisjoint(json.loads(modules))


# Trains a little, with each optimizer, and prints whether PyTorch's compiler was imported for it.
TRAIN = """
import sys, torch
from cnn.data import Dataset, Split
from cnn.config import TrainConfig
from cnn.optimizers import OPTIMIZERS
from cnn.training import train
images, labels = torch.zeros(4, 32, 32, 3, dtype=torch.uint8), torch.arange(4) % 2
split = Split(all_images=images, all_labels=labels, rows=torch.arange(4))
data = Dataset(name="", classes=("a", "b"), train=split, validation=split, test=split, digest="",
               source="")
for name in OPTIMIZERS:
    config = TrainConfig(loss="mse", learning_rate=0.1, batch_size=2, epochs=1, optimizer=name)
    assert len(list(train(config, data))) == 1
print(sys.argv[1] in sys.modules)
"""


def test_a_worker_does_not_import_the_compiler() -> None:
    assert in_a_new_process(TRAIN, "torch._dynamo", root=ROOT).strip() == "False"


def test_importing_experiments_is_quick() -> None:
    loads = "import sys, experiments; print(sorted(set(sys.argv[1].split()) & set(sys.modules)))"
    assert in_a_new_process(loads, " ".join(SLOW_TO_IMPORT), root=ROOT).strip() == "[]"


def test_the_workers_do_not_wait_for_mlflow() -> None:
    loads = "import sys, experiments.study.controller; print(sys.argv[1] in sys.modules)"
    assert in_a_new_process(loads, "mlflow", root=ROOT).strip() == "False"


def plant(root: Path, file: str, source: str) -> None:
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / "__init__.py").touch()
    path.write_text(source)


def test_a_module_that_imports_what_it_must_not_would_be_found(tmp_path: Path) -> None:
    plant(tmp_path, "experiments/study/space.py", "")
    plant(tmp_path, "cnn/good.py", "import json\n")
    plant(tmp_path, "cnn/networks.py", "from experiments.study import space\n")
    plant(tmp_path, "tracking/runs.py", "import experiments.study.space\n")
    assert wrong_imports("cnn", root=tmp_path) == {"cnn.networks": {"experiments"}}
    assert wrong_imports("tracking", root=tmp_path) == {"tracking.runs": {"experiments"}}
    assert wrong_statements("cnn", root=tmp_path) == ["cnn/networks.py:1 imports experiments"]


def test_an_import_that_goes_round_about_would_be_found(tmp_path: Path) -> None:
    plant(tmp_path, "experiments/study/space.py", "")
    plant(tmp_path, "helpers/names.py", "import experiments.study.space\n")
    plant(tmp_path, "cnn/networks.py", "import helpers.names\n")
    assert wrong_imports("cnn", root=tmp_path) == {"cnn.networks": {"experiments"}}


def test_an_import_that_hides_in_a_function_would_be_found(tmp_path: Path) -> None:
    hidden = "def f():\n    import cnn.data\n"
    plant(tmp_path, "tracking/runs.py", hidden)
    plant(tmp_path, "tracking/prediction/sources.py", f"{hidden}\nimport cnn\n")
    assert wrong_statements("tracking", root=tmp_path) == [
        "tracking/prediction/sources.py:4 imports cnn",  # only inside functions
        "tracking/runs.py:2 imports cnn",
    ]


def test_an_upward_import_would_be_found(tmp_path: Path) -> None:
    plant(tmp_path, "tracking/store.py", "def f():\n    from tracking import registry\n")
    plant(tmp_path, "tracking/registry.py", "from tracking.store import f\n")
    plant(tmp_path, "cnn/data.py", "")
    plant(tmp_path, "experiments/study/space.py", "import experiments.comparison.plan\n")
    plant(tmp_path, "experiments/comparison/plan.py", "from cnn import data\n")
    assert upward_imports(tmp_path) == [
        "experiments.study.space imports experiments.comparison.plan",
        "tracking.store imports tracking.registry",
    ]
    with pytest.raises(CycleError):
        list(TopologicalSorter(import_graph(tmp_path)).static_order())
