"""Where does a training step's time go? `python -m benchmarks.profile`.

A worker's training steps on noise, in one thread, in bfloat16 where that is fast: the share of each
kind of operation by PyTorch's profiler, and the rate at which the convolutions run, beside that of
a bfloat16 matrix product in the same thread. What no operation accounts for, Python's time above
all, is the difference to the wall time of the same steps without the profiler.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

from benchmarks.common import markdown, matrix_product_rate
from cnn.devices import machine
from experiments.engine.job import worker_variables

SETTINGS = worker_variables(num_threads=1)
KINDS = {
    "convolutions, forwards": ("aten::mkldnn_convolution",),
    "convolutions, backwards": ("aten::convolution_backward",),
    "max-pool": ("aten::max_pool2d_with_indices", "aten::max_pool2d_with_indices_backward"),
    "linear layers": ("aten::mm", "aten::addmm"),
    "optimizer": ("aten::_fused_sgd_",),
    "copies, fills": ("aten::copy_", "aten::fill_", "aten::index_select", "aten::_foreach_copy_"),
}
CONVOLUTION_OPERATIONS = 2 * (2 * 2.4576e6 + 3 * 6.5536e6 + 3 * 3.2768e6)
"""An image's, of three convolutions: forwards, and the gradients of weights and inputs."""


def main() -> int:
    """Profile, and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.profile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--images", type=int, default=8192, help="a batch size (default: 8192)")
    options = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in SETTINGS.items()):
        # They are read when a process starts.
        command = [sys.executable, "-m", "benchmarks.profile", *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | SETTINGS)
    import torch

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    rate = matrix_product_rate()
    print(machine(), f"\nbfloat16 matrix product, one thread: {rate / 1e9:.0f} GFLOP/s\n")
    columns = [profile(batch_size, options.images, rate) for batch_size in options.batch_sizes]
    rows = [[kind, *(column[kind] for column in columns)] for kind in columns[0]]
    print(markdown(["", *(f"batch size {size}" for size in options.batch_sizes)], rows))
    return 0


def profile(batch_size: int, images: int, rate: float) -> dict[str, str]:
    """Return what each kind of operation takes at a batch size."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    from cnn.config import TrainConfig
    from cnn.devices import resolve_precision
    from cnn.losses import get_loss
    from cnn.networks import build_cnn
    from cnn.stepper import Stepper

    config = TrainConfig(
        loss="cross_entropy",
        learning_rate=0.01,
        batch_size=batch_size,
        precision=resolve_precision("auto", "cpu"),
    )
    steps = images // batch_size
    stepper = Stepper(build_cnn(10, seed=0), get_loss(config.loss), config, steps=9 * steps)
    generator = torch.Generator().manual_seed(0)
    batch = torch.randint(0, 256, (batch_size, 32, 32, 3), generator=generator).to(torch.uint8)
    labels = torch.randint(0, 10, (batch_size,), generator=generator)

    def take(number: int) -> float:
        start = time.perf_counter()
        for _ in range(number):
            stepper(batch, labels)
        return time.perf_counter() - start

    take(5)
    seconds = take(steps)
    with profiler(activities=[ProfilerActivity.CPU]) as profiled:
        take(steps)
    by_name = {each.key: each.self_cpu_time_total / 1e6 for each in profiled.key_averages()}
    times = {kind: sum(by_name.get(name, 0) for name in names) for kind, names in KINDS.items()}
    convolutions = times["convolutions, forwards"] + times["convolutions, backwards"]
    reached = steps * batch_size * CONVOLUTION_OPERATIONS / convolutions
    return {
        "µs an image": f"{seconds / (steps * batch_size) * 1e6:.0f}",
        **{kind: f"{of / seconds:.0%}" for kind, of in times.items()},
        "rest": f"{1 - sum(times.values()) / seconds:.0%}",
        "convolutions' rate / matrix product's": f"{reached / rate:.2f}",
    }


if __name__ == "__main__":
    sys.exit(main())
