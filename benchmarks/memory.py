"""Does a sweep's memory grow with its trials? `python -m benchmarks.memory`.

Runs a real sweep of many short trials on the digits, each with its run and model in MLflow, and
reads now and then the anonymous resident memory of the main process and of all workers: what they
allocated, without the files mapped (libraries, data), which other processes may have mapped, too.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from benchmarks.common import markdown
from benchmarks.faults import children, num_finished, start_in


def main() -> int:
    """Run, measure, print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--trials", type=int, default=1000, help="(default: %(default)s)")
    parser.add_argument("--points", type=int, default=10, help="rows (default: %(default)s)")
    parser.add_argument("--sampler", default="tpe", help="(default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, "-m", "experiments.sweep", "--trials", str(options.trials)]
        command += ["--epochs", "1", "--sampler", options.sampler, "--batch-sizes", "64", "128"]
        start = time.monotonic()
        process = start_in(command, folder)
        rows = [["trials", "main process, MB", "workers, MB", "s"]]
        for due in range(1, options.points + 1):
            finished = wait_for(process, folder, due * options.trials // options.points)
            workers = sum(resident(pid) for pid in children(process.pid))
            megabytes = [f"{resident(process.pid):.0f}", f"{workers:.0f}"]
            rows.append([str(finished), *megabytes, f"{time.monotonic() - start:.0f}"])
            print(*rows[-1], flush=True)
        code = process.wait()
        print(f"\n{markdown(rows[0], rows[1:])}\n\nexit code {code}")
        if code:
            print((folder / "log.txt").read_text()[-2000:])
    return code


def wait_for(process: subprocess.Popen[bytes], folder: Path, wanted: int) -> int:
    """Wait until so many trials, less two, have finished, and return how many have."""
    while process.poll() is None:
        finished = num_finished(folder)
        if finished >= wanted - 2:  # at the very end there would be no process to look at
            return finished
        time.sleep(0.05)
    return num_finished(folder)


def resident(pid: int) -> float:
    """Return a process' anonymous memory in MB, 0 if it is gone."""
    with suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Anonymous:"):
                return int(line.split()[1]) / 1000
    return 0.0


if __name__ == "__main__":
    sys.exit(main())
