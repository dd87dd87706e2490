"""Stored models that try to run code: each does where nothing protects, and is refused here.

The payload of each makes a file `ran` in the working folder.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
import yaml
from model_files import (
    CONSTANTS,
    EXAMPLE,
    PROGRAM,
    WEIGHTS,
    edit_archive,
    edit_description,
    edit_program,
    records_of,
    zipped,
)
from torch import Tensor, nn
from tracking_helpers import COLOURS, ColourModel, log_model, new_store

from cnn.losses import PROBABILITIES
from cnn.networks import CNN, Classifier
from tracking.models.predictor import load_model
from tracking.models.recording import save_model
from tracking.models.safety import sanitized_archive
from tracking.predict import main
from tracking.tracker import Tracker

ROOT = Path(__file__).parents[1]
RAN = Path("ran")
CODE = "__import__('pathlib').Path('ran').touch()"

COMPILED = "data/aotinductor/model"

EXAMPLES = np.zeros((2, 32, 32, 3), np.uint8)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder, as it is recorded: an export takes seconds, to copy it none."""
    folder = tmp_path_factory.mktemp("recorded") / "model"
    classes = {"classes": list(COLOURS)}
    save_model(ColourModel().eval(), folder, input_example=EXAMPLES, metadata=classes)
    return folder


@pytest.fixture
def model(recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of it, in the working folder, beside `a.npy`; what is imported is forgotten again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where PyTorch unpacks what it would compile
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    np.save("a.npy", EXAMPLES)
    modules = set(sys.modules)
    yield Path(shutil.copytree(recorded, "model"))
    for name in set(sys.modules) - modules:
        if not (getattr(sys.modules[name], "__file__", None) or "").startswith(sys.prefix):
            del sys.modules[name]


# How a model is tampered with


class Explosive:
    def __reduce__(self) -> Any:
        return Path.touch, (RAN,)


def pickled() -> bytes:
    content = io.BytesIO()
    torch.save(Explosive(), content)
    return content.getvalue()


LOADER = f"{CODE}\ndef _load_pyfunc(path, model_config=None): ...\n"


def add_code(folder: Path, module: str) -> None:
    """Ship a module with the model."""
    file = folder / "code" / f"{module}.py"
    file.parent.mkdir()
    file.write_text(LOADER)

    def edit(about: dict[str, Any]) -> None:
        about["flavors"]["pytorch"]["code"] = about["flavors"]["python_function"]["code"] = "code"

    edit_description(folder, edit)


def pickle_instead_of_a_graph(folder: Path) -> None:
    (folder / "data" / "model.pt2").unlink()
    (folder / "data" / "model.pth").write_bytes(pickled())
    (folder / "data" / "pickle_module_info.txt").write_text("pickle")


def pickle_beside_a_graph(folder: Path) -> None:
    graph = (folder / "data" / "model.pt2").read_bytes()
    pickle_instead_of_a_graph(folder)
    (folder / "data" / "model.pt2").write_bytes(graph)


def pickle_module_from_the_folder(folder: Path) -> None:
    add_code(folder, "own_pickle")
    pickle_instead_of_a_graph(folder)
    (folder / "data" / "pickle_module_info.txt").write_text("own_pickle")


def code_for_what_mlflow_imports(folder: Path) -> None:
    add_code(folder, "pytorch_forecasting")  # MLflow asks whether it is a model of that


def other_loader_module(folder: Path) -> None:
    Path("own_loader.py").write_text(LOADER)
    sys.path.append(str(Path.cwd()))
    edit_description(
        folder, lambda about: about["flavors"]["python_function"].update(loader_module="own_loader")
    )


def elsewhere(folder: Path) -> Path:
    """Make another model's data, beside the folder."""
    shutil.copytree(folder, "other")
    pickle_instead_of_a_graph(Path("other"))
    return Path("other/data")


def data_outside(folder: Path, path: Callable[[Path], str | Path]) -> None:
    data = str(path(elsewhere(folder)))

    def edit(about: dict[str, Any]) -> None:
        about["flavors"]["pytorch"]["model_data"] = data
        about["flavors"]["python_function"]["data"] = data

    edit_description(folder, edit)


def link_to_data_outside(folder: Path) -> None:
    data = elsewhere(folder)
    shutil.rmtree(folder / "data")
    (folder / "data").symlink_to(data.absolute())


def link_to_a_graph_outside(folder: Path) -> None:
    pickled_weight(folder)
    shutil.move(folder / "data" / "model.pt2", "elsewhere.pt2")
    (folder / "data" / "model.pt2").symlink_to(Path("elsewhere.pt2").absolute())


def pickled_weight(folder: Path) -> None:
    def edit(records: dict[str, bytes]) -> None:
        content = json.loads(records[WEIGHTS])
        content["config"]["scale"]["use_pickle"] = True
        records[WEIGHTS] = json.dumps(content).encode()
        records["data/weights/weight_0"] = pickled()

    edit_archive(folder, edit)


def pickled_constant(folder: Path, file: str) -> None:
    constant = {"path_name": file, "is_param": False, "use_pickle": True, "tensor_meta": None}
    edit_archive(
        folder,
        lambda records: records.update({
            CONSTANTS: json.dumps({"config": {"constant": constant}}).encode(),
            f"data/constants/{file}": (
                pickle.dumps(Explosive()) if file.startswith("opaque") else pickled()
            ),
        }),
    )  # fmt: skip


def pickled_record(folder: Path, name: str) -> None:
    edit_archive(folder, lambda records: records.update({name: pickled()}))


def compiled(folder: Path, **files: bytes) -> None:
    """Add a model that AOTInductor is said to have compiled."""
    edit_archive(
        folder,
        lambda records: records.update({
            f"{COMPILED}/x.wrapper_metadata.json": b'{"AOTI_DEVICE_KEY": "cpu"}',
            **{f"{COMPILED}/{name}": content for name, content in files.items()},
        }),
    )  # fmt: skip


def compiled_library(folder: Path) -> None:
    Path("x.c").write_text(
        "#include <stdio.h>\n"
        '__attribute__((constructor)) void run(void) { fclose(fopen("ran", "w")); }\n'
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", "x.so", "x.c"], check=True)
    compiled(folder, **{"x.wrapper.so": Path("x.so").read_bytes()})


def compiler_of_its_own(folder: Path) -> None:
    lists = (
        "cflags", "definitions", "include_dirs", "ldflags", "libraries", "libraries_dirs",
        "passthrough_args",
    )  # fmt: skip
    flags = ("aot_mode", "compile_only", "use_relative_path")
    options = {
        "compiler": "touch ran; true",
        **{name: [] for name in lists},
        **dict.fromkeys(flags, False),
    }
    as_json = json.dumps(options).encode()
    compiled(
        folder,
        **{
            "x.wrapper.cpp": b"1",
            "x.wrapper_compile_flags.json": as_json,
            "x.wrapper_linker_flags.json": as_json,
        },
    )


def path_out_of_the_archive(folder: Path) -> None:
    compiled(folder, **{f"{'../' * 20}{RAN.absolute()}": b"{}"})


def guard(folder: Path) -> None:
    edit_program(folder, lambda program: program.update(guards_code=[f"{CODE} or True"]))


def size(folder: Path) -> None:
    def edit(program: dict[str, Any]) -> None:
        sizes = program["graph_module"]["graph"]["tensor_values"]["images"]["sizes"]
        sizes[0]["as_expr"]["expr_str"] = f"{CODE} or s0"

    edit_program(folder, edit)


def name_of_an_input(folder: Path) -> None:
    edit_archive(
        folder,
        lambda records: records.update({
            PROGRAM: records[PROGRAM].replace(
                b'"images"', json.dumps(f'images=exec("{CODE}")').encode()
            )
        }),
    )  # fmt: skip


def tree_of_the_outputs(folder: Path) -> None:
    Path("own_tree.py").write_text(f"{CODE}\nfactory = None\n")
    sys.path.append(str(Path.cwd()))
    names = {"default_factory_module": "own_tree", "default_factory_name": "factory"}
    leaf = {"type": None, "context": None, "children_spec": []}
    tree = {
        "type": "collections.defaultdict",
        "context": names | {"dict_context": ["a"]},
        "children_spec": [leaf],
    }

    def edit(program: dict[str, Any]) -> None:
        call = program["graph_module"]["module_call_graph"][0]
        call["signature"]["out_spec"] = json.dumps([1, tree])

    edit_program(folder, edit)


def call(target: str, **arguments: dict[str, Any]) -> Callable[[Path], None]:
    """Have the graph call something else, first."""
    node = {
        "target": target,
        "inputs": [{"name": name, "arg": value, "kind": 1} for name, value in arguments.items()],
        "outputs": [{"as_tensor": {"name": "new"}}],
        "metadata": {},
        "is_hop_single_tensor_return": None,
        "name": "new",
    }

    def edit(program: dict[str, Any]) -> None:
        graph = program["graph_module"]["graph"]
        graph["nodes"].insert(0, node)
        graph["tensor_values"]["new"] = graph["tensor_values"]["images"]

    return lambda folder: edit_program(folder, edit)


@dataclass(frozen=True)
class Attack:
    tamper: Callable[[Path], object]
    complaint: str
    pickles: bool = False
    """Whether MLflow's own setting against pickle would do."""


NOT_READ = ""
"""The complaint of an attack that is none here: what it changes is never read."""

NO_GRAPH = "not stored as a graph (pt2), and pickle, which can run any code, is refused"

ATTACKS = {
    "pickle instead of a graph": Attack(pickle_instead_of_a_graph, NO_GRAPH, pickles=True),
    "pickle beside a graph": Attack(pickle_beside_a_graph, NO_GRAPH, pickles=True),
    "pickle module from the folder": Attack(pickle_module_from_the_folder, NO_GRAPH),
    "code for what MLflow imports": Attack(
        code_for_what_mlflow_imports, "its code is 'code', not None"
    ),
    "other loader module": Attack(other_loader_module, "'own_loader', not 'mlflow.pytorch'"),
    "data outside": Attack(
        lambda folder: data_outside(folder, lambda data: f"../{data}"),
        "its data is '../other/data', not 'data'",
        pickles=True,
    ),
    "data at an absolute path": Attack(
        lambda folder: data_outside(folder, Path.absolute), "/other/data', not 'data'", pickles=True
    ),
    "link to data outside": Attack(
        link_to_data_outside,
        "its data/model.pt2 is a link that leads out of its folder",
        pickles=True,
    ),
    "link to a graph outside": Attack(
        link_to_a_graph_outside, "its data/model.pt2 is a link that leads out", pickles=True
    ),
    "pickled weight": Attack(pickled_weight, "its weight 'scale' is pickled", pickles=True),
    "pickled example": Attack(
        lambda folder: pickled_record(folder, EXAMPLE), NOT_READ, pickles=True
    ),
    "pickled weights, the old way": Attack(
        lambda folder: pickled_record(folder, "data/weights/model.pt"),
        "its graph holds 'data/weights/model.pt', which no recorded model has",
        pickles=True,
    ),
    "pickled constants, the old way": Attack(
        lambda folder: pickled_record(folder, "data/constants/model.pt"),
        "its graph holds 'data/constants/model.pt', which no recorded model has",
        pickles=True,
    ),
    "pickled constant": Attack(
        lambda folder: pickled_constant(folder, "tensor_0"),
        "its weight 'constant' is pickled",
        pickles=True,
    ),
    "pickled object": Attack(
        lambda folder: pickled_constant(folder, "opaque_obj_0"),
        "its graph holds 'data/constants/opaque_obj_0', which no recorded model has",
        pickles=True,
    ),
    "compiled library": Attack(
        compiled_library, "its graph holds 'data/aotinductor/model/x.wrapper", pickles=True
    ),
    "compiler of its own": Attack(compiler_of_its_own, "its graph holds 'data/aotinductor/"),
    "path out of the archive": Attack(path_out_of_the_archive, "its graph holds 'data/aotinductor"),
    "guard": Attack(guard, f'the guards_code "{CODE} or True" in its graph is not allowed'),
    "size": Attack(size, f'the expr_str "{CODE} or s0" in its as_expr is not allowed'),
    "name of an input": Attack(name_of_an_input, "the name 'images=exec(\""),
    "tree of the outputs": Attack(
        tree_of_the_outputs, "the type 'collections.defaultdict' in its out_spec is not allowed"
    ),
    "operator that makes a file": Attack(
        call(
            "torch.ops.aten.from_file.default",
            filename={"as_string": "ran"},
            shared={"as_bool": True},
            size={"as_int": 1},
        ),
        "the target 'torch.ops.aten.from_file.default' in its nodes is not allowed",
    ),
}  # fmt: skip


def tampered(model: Path, attack: str) -> None:
    if attack == "compiled library" and shutil.which("cc") is None:
        pytest.skip("there is no C compiler to make the library with")
    ATTACKS[attack].tamper(model)
    RAN.unlink(missing_ok=True)


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run the command, which must fail with one line and no file, and return the line."""
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert not Path("predictions.csv").exists()
    return line


@pytest.mark.parametrize("attack", ATTACKS)
def test_where_nothing_protects_its_code_runs(
    model: Path, attack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tampered(model, attack)
    allowed = "true" if ATTACKS[attack].pickles else "false"
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", allowed)
    with suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mlflow.pyfunc.load_model("model").predict(EXAMPLES)
    assert RAN.exists()


@pytest.mark.parametrize("attack", ATTACKS)
def test_here_it_is_refused_and_nothing_of_it_runs(
    model: Path, attack: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tampered(model, attack)
    if ATTACKS[attack].complaint == NOT_READ:
        assert load_model("model").classes == tuple(COLOURS)
        assert not RAN.exists()
        return
    with pytest.raises(ValueError, match="model") as info:
        load_model("model")
    assert ATTACKS[attack].complaint in str(info.value)
    assert "\n" not in str(info.value)
    assert ATTACKS[attack].complaint in fails(["a.npy", "--model", "model"], capsys)
    assert not RAN.exists()


def test_as_a_command_it_is_one_line_too(model: Path) -> None:
    tampered(model, "guard")
    done = subprocess.run(
        [sys.executable, "-m", "tracking.predict", "a.npy", "--model", "model"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("python -m tracking.predict: error: can't load the model model: ")
    assert done.stderr.count("\n") == 1
    assert not RAN.exists()


@pytest.mark.parametrize("uri", ["models:/{model_id}", "runs:/{run_id}/model", "models:/colours/1"])
def test_a_recorded_model_that_was_replaced_is_refused(
    recorded: Path, tmp_path: Path, uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with new_store(tmp_path):
        run = Tracker.open("study").start_run("run")
        model_id = log_model(run).removeprefix("models:/")
        mlflow.MlflowClient().create_registered_model("colours")
        mlflow.MlflowClient().create_model_version("colours", f"models:/{model_id}", run.run_id)
        location = mlflow.MlflowClient().get_logged_model(model_id).artifact_location
        guard(Path(location.removeprefix("file://")))
        np.save("a.npy", EXAMPLES)
        capsys.readouterr()
        named = uri.format(model_id=model_id, run_id=run.run_id)
        line = fails(["a.npy", "--model", named], capsys)
        assert f"{named} can't be used as a model: its data/model.pt2 was changed since" in line
        assert not RAN.exists()


def test_python_in_a_description_is_not_evaluated(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (model / "MLmodel").open("a") as stream:
        stream.write(f'x: !!python/object/apply:builtins.eval ["{CODE}"]\n')
    with (model / "MLmodel").open() as stream:
        yaml.unsafe_load(stream)
    assert RAN.exists()
    RAN.unlink()
    error = fails(["a.npy", "--model", "model"], capsys)
    assert "its file MLmodel can't be read: could not determine a constructor" in error
    assert not RAN.exists()


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (lambda about: about["flavors"].update(sklearn={}), "it has the flavor 'sklearn'"),
        (
            lambda about: about["flavors"]["pytorch"].update(extra_files=[{"path": "../x"}]),
            "its flavor pytorch has 'extra_files', which no recorded model has",
        ),
        (lambda about: about.update(flavors=1), "its file MLmodel has no mapping as flavors"),
        (
            lambda about: about.update(flavors={"pytorch": 1}),
            "its file MLmodel has no mapping as pytorch",
        ),
        (lambda about: about.update(metadata=[1]), "its file MLmodel has no mapping as metadata"),
    ],
)
def test_another_description_is_refused(
    model: Path, edit: Callable[[dict[str, Any]], object], complaint: str
) -> None:
    edit_description(model, edit)
    with pytest.raises(ValueError, match="MLmodel|model can't be used") as info:
        load_model("model")
    assert complaint in str(info.value)


# What could be too large


def test_a_decompression_bomb_is_refused_before_it_is_unpacked(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(model / "data" / "model.pt2", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/weights/weight_9", bytes(50_000_000))
    assert (model / "data" / "model.pt2").stat().st_size < 200_000
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_: pytest.fail("it was unpacked"))
    with pytest.raises(ValueError, match="weight_9' is compressed, which no recorded one is"):
        load_model("model")


def test_a_weight_is_no_larger_than_its_record(model: Path) -> None:
    def edit(records: dict[str, bytes]) -> None:
        content = json.loads(records[WEIGHTS])
        content["config"]["scale"]["tensor_meta"]["sizes"] = [{"as_int": 10**12}]
        content["config"]["scale"]["tensor_meta"]["strides"] = [{"as_int": 0}]
        records[WEIGHTS] = json.dumps(content).encode()

    edit_archive(model, edit)
    with pytest.raises(ValueError, match="its weight 'scale' is larger than its record"):
        load_model("model")


@pytest.mark.parametrize(("file", "size"), [("MLmodel", 1 << 18), ("data/model.pt2", 1 << 28)])
def test_a_huge_file_is_refused_before_it_is_read(model: Path, file: str, size: int) -> None:
    with (model / file).open("ab") as stream:
        stream.truncate(size + 1)  # without a byte on the disk
    with pytest.raises(ValueError, match=f"its {file} has .* bytes, more than"):
        load_model("model")


def test_a_huge_graph_is_refused_before_it_is_parsed(model: Path) -> None:
    edit_archive(model, lambda records: records.update({PROGRAM: b" " * ((1 << 22) + 1)}))
    with pytest.raises(ValueError, match=r"its models/model.json has 4,194,305 bytes"):
        load_model("model")


# Whatever else may be in a graph


def places(part: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each container in a JSON document with each key or index of a text in it."""
    for key, value in part.items() if isinstance(part, dict) else enumerate(part):
        if isinstance(value, str):
            yield part, key
        elif isinstance(value, (dict, list)):
            yield from places(value)


@pytest.mark.parametrize("name", [PROGRAM, WEIGHTS])
@pytest.mark.parametrize("text", [CODE, "x.__class__", "../../x", "é"])
def test_no_text_in_a_graph_can_be_any_other(recorded: Path, name: str, text: str) -> None:
    records = records_of((recorded / "data" / "model.pt2").read_bytes())
    content = json.loads(records[name])
    for container, key in places(content):
        before, container[key] = container[key], text
        with pytest.raises(ValueError, match="is not allowed|Expecting value|is pickled"):
            sanitized_archive(zipped(records | {name: json.dumps(content).encode()}))
        container[key] = before
    assert sanitized_archive(zipped(records))


@pytest.mark.parametrize("name", [PROGRAM, WEIGHTS])
@pytest.mark.parametrize("key", [CODE, "x.__class__", "../../x", "é", ""])
def test_no_key_in_a_graph_can_be_anything(recorded: Path, name: str, key: str) -> None:
    records = records_of((recorded / "data" / "model.pt2").read_bytes())

    def add_key(part: Any) -> Iterator[bytes]:
        """Yield the JSON with a key added to each mapping in it, one at a time."""
        if isinstance(part, dict):
            part[key] = 1
            yield json.dumps(content).encode()
            del part[key]
        for at, value in list(part.items()) if isinstance(part, dict) else enumerate(part):
            if isinstance(value, (dict, list)) and at != "metadata":
                yield from add_key(value)

    content = json.loads(records[name])
    for changed in add_key(content):
        with pytest.raises(ValueError, match="the name .* is not allowed"):
            sanitized_archive(zipped(records | {name: changed}))


def test_notes_on_where_a_graph_came_from_are_left_out(recorded: Path) -> None:
    def add_notes(part: Any) -> None:
        for key, value in part.items() if isinstance(part, dict) else enumerate(part):
            if key == "metadata":
                part[key] = {"stack_trace": CODE, CODE: CODE}
            elif isinstance(value, (dict, list)):
                add_notes(value)

    records = records_of((recorded / "data" / "model.pt2").read_bytes())
    content = json.loads(records[PROGRAM])
    add_notes(content)
    noted = json.dumps(content).encode()
    assert noted.count(CODE.encode()) > 3
    assert records_of(sanitized_archive(zipped(records | {PROGRAM: noted}))) == records


@pytest.mark.parametrize(
    "target",
    [
        "torch.os.system", "torch.hub.load", "torch.serialization.load", "math.sqrt",
        "_operator.call", "torch.ops.aten.relu.default.__call__", "relu.default",
        "torch.ops.aten.resize_.default", "torch.ops.aten.save", "torch.ops.higher_order.cond", "",
    ],
)  # fmt: skip
def test_a_graph_calls_nothing_but_operators_of_the_list(model: Path, target: str) -> None:
    call(target)(model)
    with pytest.raises(ValueError, match=f"the target '{target}' in its nodes is not allowed"):
        load_model("model")


def test_a_graph_for_a_gpu_is_refused(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_archive(
        model,
        lambda records: records.update({
            name: records[name].replace(b'"cpu"', b'"cuda"') for name in (PROGRAM, WEIGHTS)
        }),
    )  # fmt: skip
    error = fails(["a.npy", "--model", "model"], capsys)
    assert "can't load the model model: the type 'cuda' in its " in error


def test_what_a_graph_gives_is_tried(model: Path) -> None:
    def edit(about: dict[str, Any]) -> None:
        about["metadata"]["classes"] = ["red", "green"]
        about["signature"]["outputs"] = about["signature"]["outputs"].replace("3]", "2]")

    edit_description(model, edit)
    with pytest.raises(ValueError, match=r"for two images, it gives \(\(2, 3\), torch.float32\)"):
        load_model("model")


def test_loading_a_model_unpickles_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, names in {torch: ("load",), pickle: ("load", "loads", "Unpickler")}.items():
        for name in names:
            monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("it was unpickled"))
    assert load_model("model").classes == tuple(COLOURS)


# What is recorded is what is loaded


@pytest.mark.parametrize("probabilities", PROBABILITIES)
def test_whatever_a_sweep_records_is_loaded(tmp_path: Path, probabilities: str) -> None:
    network = Classifier(CNN(3), PROBABILITIES[probabilities]).eval()
    classes = {"classes": list(COLOURS)}
    save_model(network, tmp_path / "model", input_example=EXAMPLES, metadata=classes)
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3)).astype(np.uint8)
    with torch.inference_mode():
        expected = network(torch.from_numpy(images)).numpy()
    loaded = load_model(str(tmp_path / "model")).probabilities(images)
    np.testing.assert_array_equal(loaded, expected)


class UsualLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding="same"), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2),
            nn.Conv2d(4, 4, 3, groups=2), nn.GroupNorm(2, 4), nn.GELU(), nn.Dropout(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3), nn.LayerNorm(3), nn.SiLU(),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        outputs = self.layers(images.permute(0, 3, 1, 2).float())
        return torch.softmax(outputs.view(images.size(0), -1), dim=1)


def test_a_model_of_the_usual_layers_is_recorded_and_loaded(tmp_path: Path) -> None:
    classes = {"classes": list(COLOURS)}
    model = UsualLayers().eval()
    save_model(model, tmp_path / "model", input_example=EXAMPLES, metadata=classes)
    assert load_model(str(tmp_path / "model")).probabilities(EXAMPLES).shape == (2, 3)


def test_what_is_recorded_says_nothing_of_this_machine(recorded: Path) -> None:
    for file in (path for path in recorded.rglob("*") if path.is_file()):
        for path in (str(ROOT), sys.prefix, "tracking_helpers"):
            assert path.encode() not in file.read_bytes(), file


class OddModel(ColourModel):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(torch.fft.fft(images.float()).real)


def test_a_model_that_could_not_be_loaded_is_not_recorded(tmp_path: Path) -> None:
    classes = {"classes": list(COLOURS)}
    line = (
        r"can't be recorded: its forward at test_safe_loading.py:\d+ calls fft_fft \(torch.ops.aten"
    )
    with pytest.raises(ValueError, match=line):
        save_model(OddModel().eval(), tmp_path / "model", input_example=EXAMPLES, metadata=classes)


# Files that a server says a model has


@pytest.fixture
def server(listing: list[dict[str, Any]]) -> Iterator[str]:
    """A server of artifacts that lists these, whatever it is asked; gives its URI."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked_for_a_list = "?path=" in self.path
            body = json.dumps({"files": listing}).encode() if asked_for_a_list else b"of the server"
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/api/2.0/mlflow-artifacts/artifacts/model"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    "listing",
    [
        [{"path": "MLmodel", "is_dir": False}, {"path": path, "is_dir": is_dir}]
        for path in ("../../escaped", "/escaped", "a/../../../escaped", "..%2f..%2fescaped")
        for is_dir in (False, True)
        if not (is_dir and path == "/escaped")
    ],
    ids=str,
)
def test_a_file_outside_of_the_model_is_not_fetched(
    mlflow_store: str, tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "a" / "b"
    scratch.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    before = set(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"^MLflow \(|^can't fetch the model") as info:
        load_model(server)
    assert "\n" not in str(info.value)
    assert set(tmp_path.rglob("*")) == before
