"""How fast images are labelled, and in how much memory: `python -m benchmarks.predict`.

Beside `python -m tracking.predict` on an array, on a folder of JPEG files and on Parquet with their
bytes: the bare model at its best batch size (the stored graph, float32, images in memory, nothing
written), one call of `mlflow.pyfunc`, decoding alone, and the loop of most scripts (`ImageFolder`
and a `DataLoader`, a table of pandas at the end). In turns, in one process, each with its model
loaded before; images a second, median and range, and the ratio to what is the limit there.

Memory is the peak of a process of its own that labels a memory-mapped `.npy`, made on the fly.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from benchmarks.common import REPOSITORY, markdown, spread
from cnn.devices import machine, num_cores

if TYPE_CHECKING:
    from tracking.models.predictor import Predictor

CLASSES = [str(k) for k in range(10)]
BATCH_SIZES = (64, 128, 256, 512, 1024, 2048)

# Labels a file, and prints the peak of its resident memory in KiB, mapped files included. Not
# `ru_maxrss`, which on Linux a process takes over from the one that started it: here, from the one
# that has just written all images through a map.
PEAK = (
    "import sys; from pathlib import Path; from tracking.predict import main\n"
    "code = main(sys.argv[1:])\n"
    "status = Path('/proc/self/status').read_text().splitlines()\n"
    "print(*(line.split()[1] for line in status if line.startswith('VmHWM:'))); sys.exit(code)"
)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--images", type=int, default=10_000, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of each way (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="of images (default: JPEG files of noise)"
    )
    parser.add_argument(
        "--side", type=int, default=32, help="of the JPEG files made (default: %(default)s)"
    )
    parser.add_argument(
        "--memory", type=int, nargs="*", default=[10_000, 1_000_000], metavar="IMAGES",
        help="how many images memory is measured with; none leaves it out (default: %(default)s)",
    )  # fmt: skip
    options = parser.parse_args()
    if options.folder is not None:
        options.folder = options.folder.resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        uri = store_model(Path(folder))
        print(machine(), "\n", sep="")
        compare(uri, options)
        if options.memory:
            report_memory(uri, options.memory)


def store_model(folder: Path) -> str:
    """Record a CNN that has learnt nothing, and return the folder that it is stored in."""
    import mlflow
    import numpy as np

    from cnn.losses import softmax
    from cnn.networks import Classifier, build_cnn
    from tracking.tracker import Tracker

    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder / 'mlflow.db'}"
    run = Tracker.open("benchmark").start_run("model")
    uri = run.log_model(
        Classifier(build_cnn(10, seed=0), softmax).eval(),
        input_example=np.zeros((2, 32, 32, 3), np.uint8),
        classes=CLASSES,
        step=1,
    )
    found = mlflow.MlflowClient().get_logged_model(uri.removeprefix("models:/"))
    return str(found.artifact_location)


# Throughput


def compare(uri: str, options: argparse.Namespace) -> None:
    """Time each way in turns, and print a table."""
    import mlflow
    import numpy as np
    import torch

    from tracking.models.predictor import load_model

    predictor = load_model(uri)
    pyfunc: Any = mlflow.pyfunc.load_model(uri, model_config={"device": "cpu"})
    files = files_to_read(options)
    count = len(files)
    images = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3)).astype(np.uint8)
    np.save("a.npy", images)
    write_parquet(files)
    Path("list").write_bytes(b"\0".join(os.fsencode(file) for file in files))
    best = best_batch_size(predictor, images)
    array = torch.from_numpy(images)
    ways: dict[str, Callable[[], object]] = {
        f"bare model, batches of {best}": lambda: bare(predictor, array, best),
        "predict, array to CSV": lambda: predict(predictor, "a.npy", "a.csv"),
        "predict, array to Parquet": lambda: predict(predictor, "a.npy", "a.parquet"),
        "predict, array to JSON Lines": lambda: predict(predictor, "a.npy", "a.jsonl"),
        "mlflow.pyfunc, one call": lambda: pyfunc.predict(images),
        "decoding alone": lambda: decode_all(files),
        "predict, JPEG files": lambda: predict(predictor, "@list", "a.csv"),
        "predict, Parquet of JPEG bytes": lambda: predict(
            predictor, "a.parquet.in.parquet", "a.csv"
        ),
        "ImageFolder and DataLoader": lambda: usual(predictor, files),
    }
    times = in_turns(ways, options.rounds)
    print_rates(times, count, next(iter(ways)))


def in_turns(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds that each way took in each round, but for a first one."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            if number:
                times[name].append(time.perf_counter() - start)
    return times


def print_rates(times: dict[str, list[float]], count: int, bare_name: str) -> None:
    """Print rates, and ratios of the same round: what else the machine does changes with time."""
    rows = []
    for name, seconds in times.items():
        ratios = [
            [other / own for other, own in zip(times[limit], seconds, strict=True)]
            for limit in (bare_name, "decoding alone")
        ]
        shares = [spread(values, digits=2) for values in ratios]
        rows.append([name, spread([count / s for s in seconds]), *shares])
    print(markdown(["way", "images/s", "of the bare model", "of decoding alone"], rows))


def files_to_read(options: argparse.Namespace) -> list[Path]:
    """Return image files: those of a folder, or new ones in a class each."""
    import numpy as np
    from PIL import Image

    from cnn.folders import find_images

    if options.folder is not None:
        found = find_images(options.folder)
        return found[:: max(1, len(found) // options.images)][: options.images]
    generator = np.random.default_rng(0)
    for index in range(options.images):
        file = Path("files", CLASSES[index % 10], f"{index:06}.jpg")
        file.parent.mkdir(parents=True, exist_ok=True)
        small = generator.integers(0, 256, (8, 8, 3)).astype(np.uint8)
        Image.fromarray(small).resize((options.side, options.side)).save(file)
    return find_images(Path("files").resolve())


def write_parquet(files: list[Path]) -> None:
    """Write the files' bytes into a Parquet file, in row groups of a thousand."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"image": [file.read_bytes() for file in files]})
    pq.write_table(table, "a.parquet.in.parquet", row_group_size=1000)


def best_batch_size(predictor: Predictor, images: Any) -> int:
    """Return the batch size at which the bare model is fastest, and print all."""
    import torch

    array = torch.from_numpy(images[:4096])
    ways: dict[str, Callable[[], object]] = {
        str(size): partial(bare, predictor, array, size) for size in BATCH_SIZES
    }
    times = in_turns(ways, 3)
    rows = [[name, spread([len(array) / s for s in seconds])] for name, seconds in times.items()]
    print(markdown(["bare model, batch size", "images/s"], rows), "\n")
    return int(min(times, key=lambda name: statistics.median(times[name])))


def bare(predictor: Predictor, array: Any, size: int) -> None:
    """Run the stored graph on images in memory, and keep nothing."""
    import torch

    with torch.inference_mode():
        for start in range(0, len(array), size):
            predictor.model(array[start : start + size])


def predict(predictor: Predictor, source: str, out: str) -> None:
    """Label a source as the command does, to the file's last byte, with a model that is loaded."""
    from tracking import predict as command

    with (
        redirect_stdout(None),
        mock.patch.object(command, "_choose_model", return_value=(predictor, "")),
    ):
        code = command.main([source, "--out", out])
    assert code == 0


def decode_all(files: list[Path]) -> None:
    """Decode with as many threads as there are cores, and keep nothing."""
    from cnn.images import decode

    def some(part: list[Path]) -> None:
        for file in part:
            decode(file)

    parts = [files[start : start + 32] for start in range(0, len(files), 32)]
    with ThreadPoolExecutor(num_cores()) as executor:
        list(executor.map(some, parts))


def usual(predictor: Predictor, files: list[Path]) -> None:
    """Label files as most scripts do, on the same model: a loader of two workers, batches of 64."""
    import pandas as pd
    import torch
    from torch.utils.data import DataLoader, Subset
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    root = files[0].parents[1]
    transform = transforms.Compose([transforms.Resize((32, 32)), transforms.PILToTensor()])
    folder = ImageFolder(str(root), transform)
    wanted = {str(file) for file in files}
    rows = [k for k, (name, _) in enumerate(folder.samples) if name in wanted]
    loader = DataLoader(Subset(folder, rows), batch_size=64, num_workers=2)
    found = []
    with torch.inference_mode():
        for images, _ in loader:
            found.append(predictor.model(images.permute(0, 2, 3, 1).contiguous()))
    pd.DataFrame(torch.cat(found).numpy()).to_csv("usual.csv")


# Memory


def report_memory(uri: str, counts: list[int]) -> None:
    """Label so many images in a process each, and print the peaks."""
    rows = []
    for count in counts:
        make_npy(Path("many.npy"), count)
        for out in ("many.csv", "many.parquet"):
            start = time.perf_counter()
            peak = peak_of(["many.npy", "--model", uri, "--out", out])
            size = Path(out).stat().st_size / 1e6
            seconds = time.perf_counter() - start
            rows.append([f"{count:,}", out, f"{peak:,.0f}", f"{size:,.1f}", f"{seconds:,.0f}"])
            print(*rows[-1], file=sys.stderr, flush=True)
    header = ["images", "output", "peak resident memory, MB", "output, MB", "s"]
    print("\n", markdown(header, rows), sep="")


def make_npy(file: Path, count: int) -> None:
    """Write images of 32×32 pixels, a few at a time."""
    import numpy as np

    array = np.lib.format.open_memmap(file, "w+", np.uint8, (count, 32, 32, 3))
    generator = np.random.default_rng(0)
    for start in range(0, count, 10_000):
        stop = min(start + 10_000, count)
        array[start:stop] = generator.integers(0, 256, (stop - start, 32, 32, 3), np.uint8)


def peak_of(arguments: list[str]) -> float:
    """Return the peak of the resident memory, in MB, of a process that labels."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *arguments],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return int(done.stdout.splitlines()[-1]) * 1024 / 1e6


if __name__ == "__main__":
    main()
