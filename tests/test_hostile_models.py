"""Stored models that take memory or time without end, or say what no model says: each is a line.

Each test has 60 seconds of a core and 1.2 GB, so that the machine stands it if a mend is gone.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_files import EXAMPLE, PROGRAM, WEIGHTS, edit_archive, edit_description, edit_program
from torch import Tensor, nn
from tracking_helpers import COLOURS, ColourModel, log_model, new_store

import tracking.models.cost
from tracking.models.cost import in_parts
from tracking.models.predictor import load_model
from tracking.models.recording import save_model
from tracking.predict import main
from tracking.tracker import Tracker

EXAMPLES = np.zeros((2, 32, 32, 3), np.uint8)
SECONDS, BYTES = 60, 1_200_000_000


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recorded") / "model"
    classes = {"classes": list(COLOURS)}
    save_model(ColourModel().eval(), folder, input_example=EXAMPLES, metadata=classes)
    load_model(str(folder))  # what is imported takes memory, too
    return folder


@pytest.fixture
def model(recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    np.save("a.npy", EXAMPLES)
    return Path(shutil.copytree(recorded, "model"))


@pytest.fixture(autouse=True)
def bounds() -> Iterator[None]:
    """Give the test some memory and time, not all that there is."""

    def stop(*_: object) -> None:
        raise TimeoutError

    (used,) = (
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmData:")
    )
    before = resource.getrlimit(resource.RLIMIT_DATA)
    handler = signal.signal(signal.SIGPROF, stop)
    resource.setrlimit(resource.RLIMIT_DATA, (used + BYTES, before[1]))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of a core: others work on this machine, too
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, handler)
    resource.setrlimit(resource.RLIMIT_DATA, before)


def refused(capfd: pytest.CaptureFixture[str], uri: str = "model") -> str:
    """Return the one line that the command says of a model, which it must not load."""
    capfd.readouterr()
    assert main(["a.npy", "--model", uri]) == 2
    output = capfd.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert len(line) < 500
    return line


# The archive


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compressed_record_is_refused_whatever_size_it_claims(
    model: Path, method: int, capfd: pytest.CaptureFixture[str]
) -> None:
    file = model / "data" / "model.pt2"
    size = 50_000_000
    with zipfile.ZipFile(file, "a", method) as archive:
        archive.writestr("archive/data/weights/weight_9", bytes(size))
    small = struct.pack("<L", 1000)
    file.write_bytes(file.read_bytes().replace(struct.pack("<L", size), small))
    assert file.stat().st_size < 200_000
    assert "weight_9' is compressed, which no recorded one is" in refused(capfd)


def test_an_encrypted_record_is_refused(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = model / "data" / "model.pt2"
    content = bytearray(file.read_bytes())
    content[content.rindex(b"PK\1\2") + 8] |= 1
    file.write_bytes(content)
    assert "encrypted" in refused(capfd)


def test_an_archive_of_very_many_records_is_refused(
    model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with (model / "data" / "model.pt2").open("ab") as stream:
        stream.write(b"PK\1\2" * 10_001)
    assert "it has more than the 10,000 records allowed" in refused(capfd)


def test_the_example_is_not_read(model: Path) -> None:
    # What `weights_only` lets through: bytearray(20 * 10**9).
    bomb = b"\x80\x02c__builtin__\nbytearray\nq\x00\x8a\x05" + (20 * 10**9).to_bytes(5, "little")
    edit_archive(model, lambda records: records.update({EXAMPLE: bomb + b"\x85Rq\x01."}))
    assert load_model("model").probabilities(EXAMPLES).shape == (2, 3)


@pytest.mark.parametrize("name", [PROGRAM, WEIGHTS])
def test_json_without_end_is_refused(
    model: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    edit_archive(model, lambda records: records.update({name: b"[" * 1_000_000}))
    assert f"its {name} is nested too deep" in refused(capfd)


def size(number: object) -> dict[str, object]:
    return {"as_int": number}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"storage_offset": size(1)}, "larger than its record"),
        ({"storage_offset": size(10**30)}, "larger than its record"),
        ({"storage_offset": size(-1)}, "larger than its record"),
        ({"storage_offset": size(0.0)}, "the size {'as_int': 0.0} is no integer"),
        ({"storage_offset": size(False)}, "the size {'as_int': False} is no integer"),
        ({"sizes": [size(2)], "strides": [size(1)]}, "larger than its record"),
        ({"sizes": [size(10**12)], "strides": [size(0)]}, "larger than its record"),
        ({"sizes": [size(0)], "strides": [size(1)]}, "larger than its record"),
        ({"sizes": [size(1)], "strides": [size(-1)]}, "larger than its record"),
        ({"sizes": [size(1)]}, "larger than its record"),
        ({"dtype": 99}, "is no plain tensor"),
        ({"dtype": 14}, "is no plain tensor"),
        ({"dtype": 5}, "is no plain tensor"),  # an integer that requires a gradient
        ({"dtype": 5, "requires_grad": False}, "larger than its record"),
        ({"requires_grad": 2}, "is no plain tensor"),
        ({"layout": 1}, "is no plain tensor"),
        ({"device": {"type": "cpu", "index": 7}}, "is no plain tensor"),
        ({"device": None}, "is no plain tensor"),
    ],
    ids=str,
)
def test_a_weight_that_is_not_what_lies_in_its_record_is_refused(
    model: Path, changes: dict[str, Any], complaint: str, capfd: pytest.CaptureFixture[str]
) -> None:
    def edit(records: dict[str, bytes]) -> None:
        content = json.loads(records[WEIGHTS])
        content["config"]["scale"]["tensor_meta"].update(changes)
        records[WEIGHTS] = json.dumps(content).encode()

    edit_archive(model, edit)
    assert complaint in refused(capfd)


def test_what_pytorch_logs_of_a_damaged_graph_is_the_line(
    model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    edit_archive(model, lambda records: records.update(archive_version=b"99"))
    edit_program(model, lambda program: program["graph_module"]["graph"].update(outputs=[]))
    assert "Please check the warnings above" not in refused(capfd)


# The description


def aliases(depth: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, depth)]
    return "\n".join(lines)


def merges(depth: int) -> str:
    lines = ["b0: &b0 {x: 1}"]
    lines += [f"b{i}: &b{i} {{<<: [{', '.join([f'*b{i - 1}'] * 10)}]}}" for i in range(1, depth)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (aliases(9), "it has YAML anchors or aliases"),
        (merges(9), "it has YAML anchors or aliases"),
        ("x: &x [*x]", "it has YAML anchors or aliases"),
        ("x: " + "[" * 100_000, "it is nested more than 20 deep"),
        ("- " * 100_000, "its file MLmodel can't be read"),
        ("x: " + "9" * 100_000, "its file MLmodel can't be read"),
        ("x: 2001-99-99", "its file MLmodel can't be read"),
        ("x: \x00", "its file MLmodel can't be read"),
        ("x: " + "y" * (1 << 18), "its MLmodel has 2"),
    ],
    ids=lambda text: text[:20],
)
def test_a_description_without_end_is_refused(
    model: Path, text: str, complaint: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with (model / "MLmodel").open("a") as stream:
        stream.write(f"{text}\n")
    assert complaint in refused(capfd)


def signed(shape: list[Any]) -> Callable[[dict[str, Any]], None]:
    spec = {"type": "tensor", "tensor-spec": {"dtype": "uint8", "shape": shape}}
    return lambda about: about["signature"].update(inputs=json.dumps([spec]))


NESTED = {"inputs": "[" * 9999, "outputs": "[]"}


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (signed([-1, 30_000, 30_000, 3]), "images of 30,000 × 30,000 × 3 numbers: at least 1 and"),
        (signed([-1, 32, 32, 0]), "images of 32 × 32 × 0 numbers: at least 1 and at most"),
        (signed([-1, 32, -32, -3]), "it takes uint8 (-1, 32, -32, -3), not images"),
        (signed([-1, 32.0, 32, 3]), "it takes uint8 (-1, 32.0, 32, 3), not images"),
        (signed([-1, True, 32, 3]), "it takes uint8 (-1, True, 32, 3), not images"),
        (signed([-1, "x" * 1000, 32, 3]), "it takes uint8 (-1, 'xxx"),
        (lambda about: about.update(signature=NESTED), "is not of one tensor"),
        (lambda about: about.update(signature={"inputs": {}, "outputs": [1]}), "no signature"),
        (lambda about: about.update(signature="x"), "no mapping as signature"),
        (lambda about: about["metadata"].update(seed="x"), "'x' as seed, which is no integer from"),
        (lambda about: about["metadata"].update(seed=True), "True as seed, which is no integer"),
        (lambda about: about["metadata"].update(seed=-1), "-1 as seed, which is no integer from 0"),
        (lambda about: about["metadata"].update(seed=2**32), "as seed, which is no integer from 0"),
        (lambda about: about["metadata"].update(dataset=["x"]), "['x'] as dataset, which is no"),
        (lambda about: about.update(run_id="x\x1b[2K\rforged"), r"its run_id 'x\x1b[2K\rforged'"),
        (lambda about: about.update(run_id=5), "its run_id 5 is not the id of a run"),
    ],
)  # fmt: skip
def test_a_description_that_says_what_none_says_is_refused(
    model: Path,
    edit: Callable[[dict[str, Any]], object],
    complaint: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    edit_description(model, edit)
    assert complaint in refused(capfd)


def test_no_file_that_a_description_names_is_opened(model: Path, tmp_path: Path) -> None:
    (tmp_path / "resources.yaml").write_text("{")  # MLflow would raise of it
    edit_description(model, lambda about: about.update(resources=str(tmp_path / "resources.yaml")))
    assert load_model("model").classes == tuple(COLOURS)


# The graph


def tensor(name: str) -> dict[str, Any]:
    return {"as_tensor": {"name": name}}


def tensors(*names: str) -> dict[str, Any]:
    return {"as_tensors": [{"name": name} for name in names]}


def optional(*names: str) -> dict[str, Any]:
    return {"as_optional_tensors": [{"as_tensor": {"name": name}} for name in names]}


Nodes = list[tuple[str, str, dict[str, Any]]]


def add_nodes(folder: Path, nodes: Nodes) -> None:
    """Have a graph compute something else, first: (name of the result, operator, arguments)."""

    def edit(program: dict[str, Any]) -> None:
        graph = program["graph_module"]["graph"]
        graph["nodes"][:0] = [
            {
                "target": f"torch.ops.aten.{operator}",
                "inputs": [{"name": key, "arg": arg, "kind": 1} for key, arg in args.items()],
                "outputs": [tensor(name)],
                "metadata": {},
                "is_hop_single_tensor_return": None,
                "name": name,
            }
            for name, operator, args in nodes
        ]
        images = graph["tensor_values"]["images"]
        graph["tensor_values"] |= {name: images for name, _, _ in nodes}

    edit_program(folder, edit)


def doubled(times: int, dims: tuple[int, ...] = (1,)) -> Nodes:
    """From `images`, as float32: f, then d0, d1, …, each twice as large as the one before."""
    names = ["f", *(f"d{i}" for i in range(times))]
    return [
        ("f", "to.dtype", {"self": tensor("images"), "dtype": {"as_scalar_type": 7}}),
        *(
            (name, "cat.default", {"tensors": tensors(before, before), "dim": size(dim)})
            for (before, name), dim in zip(pairwise(names), cycle(dims), strict=False)
        ),
    ]


def ints(*numbers: int) -> dict[str, Any]:
    return {"as_ints": list(numbers)}


FLAT: Nodes = [
    *doubled(0),
    ("v", "reshape.default", {"self": tensor("f"), "shape": ints(3072, 2)}),
    ("t", "transpose.int", {"self": tensor("v"), "dim0": size(0), "dim1": size(1)}),
]
PLANES: Nodes = [
    *doubled(8, (1, 2)),  # (2, 512, 512, 3)
    ("p", "permute.default", {"self": tensor("d7"), "dims": ints(0, 3, 1, 2)}),
    ("w", "permute.default", {"self": tensor("f"), "dims": ints(0, 3, 1, 2)}),
]

MEMORY = "for two images, its graph takes more than the 0.5 GiB of memory that are allowed"
TIME = "for two images, its graph takes more than the 2e+10 steps that are allowed"

GRAPHS: dict[str, tuple[Nodes, str]] = {
    "doubles its tensor 40 times": (doubled(40), MEMORY),
    "adds each number to each": (
        [
            *doubled(0),
            ("v", "reshape.default", {"self": tensor("f"), "shape": ints(6144, 1, 1)}),
            ("w", "reshape.default", {"self": tensor("f"), "shape": ints(6144, 1)}),
            ("r", "reshape.default", {"self": tensor("f"), "shape": ints(6144)}),
            ("s", "add.Tensor", {"self": tensor("v"), "other": tensor("w")}),
            ("x", "add.Tensor", {"self": tensor("s"), "other": tensor("r")}),
        ],
        MEMORY,
    ),
    "multiplies large matrices": (
        [
            *FLAT,
            ("m", "matmul.default", {"self": tensor("v"), "other": tensor("t")}),
            ("n", "matmul.default", {"self": tensor("m"), "other": tensor("m")}),
        ],
        TIME,
    ),
    "pools large windows": (
        [
            *PLANES,
            (
                "a",
                "avg_pool2d.default",
                {
                    "self": tensor("p"), "kernel_size": ints(255, 255), "stride": ints(1, 1),
                    "padding": ints(127, 127),
                },
            ),
        ],
        TIME,
    ),
    "convolves with a large kernel": (
        [*PLANES, ("c", "conv2d.default", {"input": tensor("p"), "weight": tensor("w")})],
        MEMORY,
    ),
    "sums a large tensor 1,500 times": (
        [
            *doubled(10),
            *(
                (f"s{i}", "sum.dim_IntList", {"self": tensor("d9"), "dim": ints(0, 1, 2, 3)})
                for i in range(1500)
            ),
        ],
        TIME,
    ),
    "attends to much": (
        [
            *doubled(7, (1,)),
            ("q", "reshape.default", {"self": tensor("d6"), "shape": ints(1, 262144, 3)}),
            (
                "a",
                "scaled_dot_product_attention.default",
                {"query": tensor("q"), "key": tensor("q"), "value": tensor("q")},
            ),
        ],
        MEMORY,
    ),
    "multiplies large batches of matrices": (
        [
            *FLAT,
            ("m", "mm.default", {"self": tensor("v"), "mat2": tensor("t")}),
            ("u", "unsqueeze.default", {"self": tensor("m"), "dim": size(0)}),
            ("n", "bmm.default", {"self": tensor("u"), "mat2": tensor("u")}),
        ],
        TIME,
    ),
    "repeats": (
        [
            *doubled(0),
            ("r", "repeat.default", {"self": tensor("f"), "repeats": ints(1, 999, 999, 1)}),
        ],
        MEMORY,
    ),
    "expands": (
        [
            *doubled(0),
            ("e", "expand.default", {"self": tensor("f"), "size": ints(99999, 2, 32, 32, 3)}),
        ],
        MEMORY,
    ),
    "pads": (
        [*doubled(0), ("p", "pad.default", {"self": tensor("f"), "pad": ints(0, 99999, 0, 999)})],
        MEMORY,
    ),
    "stacks": (
        [*doubled(12), ("s", "stack.default", {"tensors": tensors(*["d11"] * 99)})],
        MEMORY,
    ),
    "enlarges": (
        [
            *doubled(0),
            ("p", "permute.default", {"self": tensor("f"), "dims": ints(0, 3, 1, 2)}),
            (
                "u",
                "upsample_nearest2d.vec",
                {
                    "input": tensor("p"), "output_size": ints(9999, 9999),
                    "scale_factors": {"as_none": True},
                },
            ),
        ],
        MEMORY,
    ),
    "looks up much": (
        [
            *doubled(0),
            ("i", "arange.default", {"end": size(60_000)}),
            ("z", "zeros.default", {"size": ints(2, 9999)}),
            ("e", "index.Tensor", {"self": tensor("z"), "indices": optional("i")}),
        ],
        MEMORY,
    ),
    "makes a large tensor": ([("z", "zeros.default", {"size": ints(10**6, 10**6)})], MEMORY),
    "counts far": ([("a", "arange.default", {"end": size(10**12)})], MEMORY),
    "splits into very many parts": (
        [*doubled(0), ("v", "reshape.default", {"self": tensor("f"), "shape": ints(6144)}),
         ("u", "unbind.int", {"self": tensor("v")})],
        "its graph splits a tensor into more than 1,000 parts",
    ),
    "changes its weight": (
        [("w", "mul_.Tensor", {"self": tensor("p_scale"), "other": {"as_float": 2.0}})],
        "its graph changes its scale whenever it predicts",
    ),
    "changes a view of its weight": (
        [
            ("v", "view.default", {"self": tensor("p_scale"), "size": ints(1)}),
            ("w", "mul_.Tensor", {"self": tensor("v"), "other": {"as_float": 2.0}}),
        ],
        "its graph changes its scale whenever it predicts",
    ),
    "has 2,100 nodes": (
        [(f"n{i}", "abs.default", {"self": tensor("images")}) for i in range(2100)],
        "nodes: at most 2,000 are loaded",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", GRAPHS)
def test_a_small_graph_that_takes_much_is_refused_before_it_runs(
    model: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    nodes, complaint = GRAPHS[kind]
    add_nodes(model, nodes)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: pytest.fail("it runs"))
    line = refused(capfd)
    assert line.startswith("python -m tracking.predict: error: can't load the model model: ")
    assert complaint in line


def multiply(folder: Path, *factors: dict[str, Any], times: int = 1) -> None:
    """Have a graph multiply sizes, first: then each product by itself."""

    def edit(program: dict[str, Any]) -> None:
        graph = program["graph_module"]["graph"]
        symbol = graph["tensor_values"]["images"]["sizes"][0]
        nodes: list[dict[str, Any]] = []
        given: tuple[dict[str, Any], ...] = factors
        for product in (f"size_{i}" for i in range(times)):
            result = {"as_sym_int": {"as_name": product}}
            nodes.append({
                "target": "_operator.mul",
                "inputs": [
                    {"name": name, "arg": factor, "kind": 1}
                    for name, factor in zip("ab", given, strict=True)
                ],
                "outputs": [result],
                "metadata": {},
                "is_hop_single_tensor_return": None,
                "name": product,
            })  # fmt: skip
            graph["sym_int_values"][product] = symbol
            given = (result, result)
        graph["nodes"][:0] = nodes

    edit_program(folder, edit)


@pytest.mark.parametrize(
    ("factors", "times", "complaint"),
    [
        ((size(3), size(3)), 99, "its graph multiplies sizes to more than 2^62"),
        (({"as_string": "x"}, size(10**11)), 1, "multiplies 'x' by 100000000000, not two sizes"),
        ((ints(1, 1), size(10**11)), 1, "multiplies [1, 1] by 100000000000, not two sizes"),
    ],
)  # fmt: skip
def test_sizes_without_end_are_refused(
    model: Path,
    factors: tuple[dict[str, Any], ...],
    times: int,
    complaint: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    multiply(model, *factors, times=times)
    assert complaint in refused(capfd)


def test_a_graph_that_takes_much_for_one_image_alone_is_not_run() -> None:
    graph, aten = torch.fx.Graph(), torch.ops.aten
    images = graph.placeholder("images")
    number = graph.call_function(aten.sym_size.int, (images, 0))
    many = graph.call_function(aten.zeros.default, ([2],))
    many = graph.call_function(aten.slice.Tensor, (many, 0, number, 2))  # none for two images
    for _ in range(40):
        many = graph.call_function(aten.cat.default, ([many, many],))
    graph.output(graph.call_function(aten.sum.default, (many,)))
    module = torch.fx.GraphModule(nn.Module(), graph)
    tracking.models.cost.check_cost(module, (32, 32, 3))
    with pytest.raises(ValueError, match="for one image, its graph takes more than the 2 GiB"):
        in_parts(module, (32, 32, 3))(torch.zeros(1, 32, 32, 3, dtype=torch.uint8))


def test_what_a_graph_has_no_use_for_is_passed_over_in_silence(
    model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def edit(program: dict[str, Any]) -> None:
        values = program["graph_module"]["graph"]["tensor_values"]
        for number in range(1000, 1010):
            expression = f"Symbol('s{number}', positive=True, integer=True)"
            unused = json.loads(json.dumps(values["images"]))
            unused["sizes"][0]["as_expr"]["expr_str"] = expression
            values[f"x{number}"] = unused
            program["range_constraints"][f"s{number}"] = {"min_val": 2, "max_val": 9}

    edit_program(model, edit)
    capfd.readouterr()
    assert load_model("model").classes == tuple(COLOURS)
    assert capfd.readouterr().err == ""


def test_a_graph_that_takes_little_more_is_loaded(model: Path) -> None:
    add_nodes(model, [*doubled(8), *FLAT[1:]])
    assert load_model("model").probabilities(EXAMPLES).shape == (2, 3)


def exported(network: nn.Module) -> Any:
    shapes = ({0: torch.export.Dim("batch")},)
    example = (torch.zeros(2, 32, 32, 3, dtype=torch.uint8),)
    return torch.export.export(network.eval(), example, dynamic_shapes=shapes).module(
        check_guards=False
    )


def test_a_batch_that_takes_too_much_goes_through_in_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph = exported(ColourModel())
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (37, 32, 32, 3), np.uint8))
    with torch.inference_mode():
        expected = graph(images)
    sizes: list[int] = []
    graph.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    monkeypatch.setattr(
        tracking.models.cost, "BATCH_BYTES", 200_000
    )  # an image takes 12 kB and some
    with torch.inference_mode():
        torch.testing.assert_close(in_parts(graph, (32, 32, 3))(images), expected)
    assert sizes == [9, 9, 9, 9, 1]


def test_what_takes_too_much_to_be_loaded_is_not_recorded(tmp_path: Path) -> None:
    class Wide(ColourModel):
        def forward(self, images: Tensor) -> Tensor:
            wide = torch.cat([images] * 3, 1).float().flatten(1)
            table = torch.matmul(wide.unsqueeze(2), wide.unsqueeze(1))  # (N, 9216, 9216)
            return super().forward(images) * table.mean((1, 2)).unsqueeze(1)

    classes = {"classes": list(COLOURS)}
    with pytest.raises(ValueError, match=r"this model can't be recorded: .* 0.5 GiB of memory"):
        save_model(Wide().eval(), tmp_path / "model", input_example=EXAMPLES, metadata=classes)


def test_the_meter_counts_what_a_convolution_takes() -> None:
    class Convolution(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 16, 5, padding=2)

        def forward(self, images: Tensor) -> Tensor:
            return self.layer(images.permute(0, 3, 1, 2).float())

    meter = tracking.models.cost._Meter(exported(Convolution()), max_bytes=1 << 40)
    meter.measure(2, (32, 32, 3))
    pixels = 2 * 32 * 32
    assert meter.bytes == pixels * (3 + 3 * 4 + 16 * 4)
    assert meter.scratch == pixels * (3 * 25 + 16 + 16) * 4
    multiply_adds = pixels * 16 * 3 * 25
    assert 0 < meter.steps - multiply_adds < 20 * pixels * 200


# Where it is


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.parametrize(
    ("uri", "complaint"),
    [
        ("file:///etc", "file:///etc can't be used as a model: it has no file MLmodel"),
        ("file:/etc", "file:/etc can't be used as a model: it has no file MLmodel"),
        ("../..", "there is no model '../..': give a URI, or a folder with a file MLmodel"),
        ("/etc", "there is no model '/etc'"),
        ("x" * 5000, "there is no model 'xxx"),
        ("models:/m-" + "x" * 5000, "MLflow ("),
        ("models:/x" + "y" * 5000 + "@champion", "MLflow ("),
        ("models:/colours/1/../../..", "MLflow ("),
        ("models:/", "MLflow ("),
        ("runs:/", "MLflow ("),
        ("runs:/x/model", "MLflow ("),
        ("http://127.0.0.1:1/x", "its address is not MLflow's"),
        ("nosuch://x/y", "MLflow ("),
        ("a\0b", "there is no model"),
        ("file:///a\0b", "embedded null "),
    ],
    ids=lambda text: text[:20],
)
def test_what_is_no_model_is_a_line_and_nothing_is_copied(
    mlflow_store: str,
    scratch: Path,
    uri: str,
    complaint: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    np.save("a.npy", EXAMPLES)
    assert complaint in refused(capfd, uri)
    assert list(scratch.iterdir()) == []


def test_whatever_the_client_of_a_store_raises_is_a_line(
    mlflow_store: str,
    scratch: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class NoCredentialsError(Exception):  # botocore's derive from nothing else
        pass

    def get_repository(location: str) -> None:
        raise NoCredentialsError("Unable to locate credentials")

    registry = "mlflow.store.artifact.artifact_repository_registry"
    monkeypatch.setattr(f"{registry}.get_artifact_repository", get_repository)
    np.save("a.npy", EXAMPLES)
    line = refused(capfd, "s3://bucket/model")
    assert "can't fetch the model s3://bucket/model: Unable to locate credentials" in line


def test_a_recorded_model_that_is_a_folder_of_others_is_not_copied(
    tmp_path: Path, scratch: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "store").mkdir()
    with new_store(tmp_path / "store"):
        run = Tracker.open("study").start_run("run")
        location = Path(f"{run.client.get_run(run.run_id).info.artifact_uri}/model")
        location.mkdir(parents=True)
        (location / "large").write_bytes(bytes(1000))
        np.save("a.npy", EXAMPLES)
        line = refused(capfd, f"runs:/{run.run_id}/model")
    assert "can't be used as a model: it has no file MLmodel" in line
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("file", ["MLmodel", "data/model.pt2"])
def test_a_model_of_fifos_does_not_hang(
    model: Path, file: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (model / file).unlink()
    os.mkfifo(model / file)
    assert "model" in refused(capfd)


# Whether it is the one that was recorded


@pytest.mark.parametrize("file", ["MLmodel", "data/model.pt2"])
@pytest.mark.parametrize(
    "uri", ["models:/{id}", "runs:/{run}/model", "models:/colours/1", "models:/colours@champion"]
)
def test_a_model_that_was_swapped_in_the_store_is_refused(
    recorded: Path, tmp_path: Path, uri: str, file: str, capfd: pytest.CaptureFixture[str]
) -> None:
    from tracking.registry import Registry

    with new_store(tmp_path):
        tracker = Tracker.open("study")
        run = tracker.start_run("run")
        model_id = log_model(run).removeprefix("models:/")
        Registry(client=tracker.client, name="colours").promote_run(
            tracker.client.get_run(run.run_id)
        )
        named = uri.format(id=model_id, run=run.run_id)
        assert load_model(named).classes == tuple(COLOURS)
        location = Path(tracker.client.get_logged_model(model_id).artifact_location)
        shutil.copy(recorded / file, location / file)
        if file == "data/model.pt2":
            edit_archive(location, lambda records: records.update(byteorder=b"little "))
        np.save("a.npy", EXAMPLES)
        line = refused(capfd, named)
    assert f"{named} can't be used as a model: its {file} was changed since it was" in line
    assert "its SHA-256 is " in line


def test_a_model_whose_digest_was_not_recorded_is_loaded(tmp_path: Path) -> None:
    with new_store(tmp_path):
        tracker = Tracker.open("study")
        run = tracker.start_run("run")
        uri = log_model(run)
        for tag in tracker.client.get_logged_model(uri.removeprefix("models:/")).tags:
            if tag.startswith("sha256/"):
                tracker.client.delete_logged_model_tag(uri.removeprefix("models:/"), tag)
        assert load_model(uri).classes == tuple(COLOURS)
