"""How fast does prediction run, and in how much memory? `python -m benchmarks.predict`.

It measures `python -m tracking.predict` on an array, on a folder of JPEG files and on a Parquet
file of their bytes, beside the limits and the usual ways:

- the bare model at its best batch size: the stored graph, images in memory, no output;
- one call of `mlflow.pyfunc`;
- decoding alone;
- the loop of most scripts: `ImageFolder`, a `DataLoader`, a table of pandas at the end.

All run in turns, in one process, with the model loaded before: images/s, median and range, and the
ratio to both limits. Memory is the peak of a process that predicts a memory-mapped `.npy` file.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np

from benchmarks.common import REPOSITORY, make_parser, markdown, spread
from cnn.devices import machine, num_cores

if TYPE_CHECKING:
    from tracking.models.predictor import Predictor

CLASSES = [str(k) for k in range(10)]
BATCH_SIZES = (64, 128, 256, 512, 1024, 2048)
Ways = Mapping[str, Callable[[], object]]

# Predicts a file, and prints the peak of its resident memory in KiB, mapped files included. Not
# `ru_maxrss`: on Linux, a process inherits that from the process that started it.
PEAK = (
    "import sys; from pathlib import Path; from tracking.predict import main\n"
    "code = main(sys.argv[1:])\n"
    "status = Path('/proc/self/status').read_text().splitlines()\n"
    "print(*(line.split()[1] for line in status if line.startswith('VmHWM:'))); sys.exit(code)"
)


def main() -> None:
    """Measure and print."""
    parser = make_parser("predict", __doc__)
    add = parser.add_argument
    add("--images", type=int, default=10_000, help="number of images")
    add("--rounds", type=int, default=5, help="each way runs once in each")
    about = "of images (default: JPEG files of noise)"
    add("--folder", type=Path, default=argparse.SUPPRESS, metavar="DIR", help=about)
    add("--side", type=int, default=32, help="pixels of a file of noise")
    sizes, about = [10_000, 1_000_000], "numbers of images to measure memory with; may be none"
    add("--memory", type=int, nargs="*", default=sizes, metavar="IMAGES", help=about)
    options = parser.parse_args()
    source = options.folder.resolve() if "folder" in options else None
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        model = store_model(Path(folder))
        print(machine(), "\n", sep="")
        compare(model, image_files(source, options.images, options.side), options.rounds)
        if options.memory:
            report_memory(model, options.memory)


def store_model(folder: Path) -> str:
    """Store an untrained CNN, and return its folder."""
    from cnn.losses import softmax
    from cnn.networks import Classifier, build_network
    from tracking.models.recording import save_model

    network = Classifier(build_network(10, seed=0), softmax).eval()
    example = np.zeros((2, 32, 32, 3), np.uint8)
    save_model(network, folder / "model", input_example=example, metadata={"classes": CLASSES})
    return str(folder / "model")


def image_files(source: Path | None, number: int, side: int) -> list[Path]:
    """Return image files: those of a folder, or new ones in a folder for each class."""
    from PIL import Image

    from cnn.folders import find_images

    if source is not None:
        found = find_images(source)
        return found[:: max(1, len(found) // number)][:number]
    generator = np.random.default_rng(0)
    for index in range(number):
        file = Path("files", CLASSES[index % 10], f"{index:06}.jpg")
        file.parent.mkdir(parents=True, exist_ok=True)
        small = generator.integers(0, 256, (8, 8, 3)).astype(np.uint8)
        Image.fromarray(small).resize((side, side)).save(file)
    return find_images(Path("files").resolve())


def compare(model: str, files: list[Path], rounds: int) -> None:
    """Time each way in turns, and print a table."""
    import mlflow
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    from tracking.models.predictor import load_model

    predictor = load_model(model)
    pyfunc: Any = mlflow.pyfunc.load_model(model, model_config={"device": "cpu"})
    count = len(files)
    images = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3)).astype(np.uint8)
    np.save("a.npy", images)
    table = pa.table({"image": [file.read_bytes() for file in files]})
    pq.write_table(table, "files.parquet", row_group_size=1000)
    Path("list").write_bytes(b"\0".join(os.fsencode(file) for file in files))
    array = torch.from_numpy(images)
    by_size = in_turns(
        {str(size): partial(bare, predictor, array[:4096], size) for size in BATCH_SIZES}, rounds=3
    )
    best = min(by_size, key=lambda size: statistics.median(by_size[size]))
    limits = (f"bare model, batches of {best}", "decoding alone")
    ways: Ways = {
        limits[0]: lambda: bare(predictor, array, int(best)),
        "predict, array to CSV": lambda: predict(predictor, "a.npy", "a.csv"),
        "predict, array to Parquet": lambda: predict(predictor, "a.npy", "a.parquet"),
        "predict, array to JSON Lines": lambda: predict(predictor, "a.npy", "a.jsonl"),
        "mlflow.pyfunc, one call": lambda: pyfunc.predict(images),
        limits[1]: lambda: decode_all(files),
        "predict, JPEG files": lambda: predict(predictor, "@list", "a.csv"),
        "predict, Parquet of JPEG bytes": lambda: predict(predictor, "files.parquet", "a.csv"),
        "ImageFolder and DataLoader": lambda: usual_loop(predictor, files),
    }
    times = in_turns(ways, rounds)
    rows = []
    for name, seconds in times.items():
        # Of the same round: the other work of the machine changes with time.
        ratios = [
            spread(
                [other / own for other, own in zip(times[limit], seconds, strict=True)], digits=2
            )
            for limit in limits
        ]
        rows.append([name, spread([count / each for each in seconds]), *ratios])
    print(markdown(["way", "images/s", "of the bare model", "of decoding alone"], rows))


def in_turns(ways: Ways, rounds: int) -> dict[str, list[float]]:
    """Return the seconds that each way took in each round, after a first one."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            if number:
                times[name].append(time.perf_counter() - start)
    return times


def bare(predictor: Predictor, array: Any, size: int) -> None:
    """Run the stored graph on images in memory, and keep nothing."""
    import torch

    with torch.inference_mode():
        for start in range(0, len(array), size):
            predictor.model(array[start : start + size])


def predict(predictor: Predictor, source: str, out: str) -> None:
    """Predict as the command does, up to the file's last byte, with a model that is loaded."""
    from tracking import predict as command

    patched = mock.patch.object(command, "_choose_model", return_value=(predictor, ""))
    with redirect_stdout(None), patched:
        code = command.main([source, "--out", out])
    assert code == 0


def decode_all(files: list[Path]) -> None:
    """Decode with a thread for each core, and keep nothing."""
    from cnn.images import decode

    def some(part: list[Path]) -> None:
        for file in part:
            decode(file)

    parts = [files[start : start + 32] for start in range(0, len(files), 32)]
    with ThreadPoolExecutor(num_cores()) as executor:
        list(executor.map(some, parts))


def usual_loop(predictor: Predictor, files: list[Path]) -> None:
    """Predict as most scripts do, with the same model: a loader of two workers, batches of 64."""
    import pandas as pd
    import torch
    from torch.utils.data import DataLoader, Subset
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    transform = transforms.Compose([transforms.Resize((32, 32)), transforms.PILToTensor()])
    folder = ImageFolder(str(files[0].parents[1]), transform)
    wanted = {str(file) for file in files}
    rows = [k for k, (name, _) in enumerate(folder.samples) if name in wanted]
    loader = DataLoader(Subset(folder, rows), batch_size=64, num_workers=2)
    with torch.inference_mode():
        found = [predictor.model(images.permute(0, 2, 3, 1).contiguous()) for images, _ in loader]
    pd.DataFrame(torch.cat(found).numpy()).to_csv("usual.csv")


def report_memory(model: str, counts: list[int]) -> None:
    """Predict images in a process of its own for each number, and print the peaks."""
    rows = []
    for count in counts:
        shape = (count, 32, 32, 3)
        array = np.lib.format.open_memmap("many.npy", "w+", np.uint8, shape)
        generator = np.random.default_rng(0)
        for start in range(0, count, 10_000):
            part = array[start : start + 10_000]
            part[:] = generator.integers(0, 256, part.shape, np.uint8)
        for out in ("many.csv", "many.parquet"):
            begin = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", PEAK, "many.npy", "--model", model, "--out", out],
                env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            peak = int(done.stdout.splitlines()[-1]) * 1024 / 1e6
            seconds = time.perf_counter() - begin
            rows.append([f"{count:,}", out, f"{peak:,.0f}", f"{seconds:,.0f}"])
    print(f"\n{markdown(['images', 'output', 'peak resident memory, MB', 's'], rows)}")


if __name__ == "__main__":
    main()
