"""Does a sweep lose anything when it is disturbed? `python -m benchmarks.faults`.

A seeded sweep with one worker runs undisturbed. Then the same sweep is disturbed at random times,
from its start on, until it has finished; this repeats in fresh folders until the number of faults
is reached. A fault is one of these:

- `--kill` (the default): SIGKILL ends the main process, which is started again, or its worker;
- `--server`: SIGKILL or SIGTERM ends the MLflow server, which is started again;
- `--full-disk`: the disk that the sweep is on is filled. Once the sweep has stopped, the disk is
  freed and the sweep started again. This needs the right to mount a small file system.

Each disturbed sweep is compared with the undisturbed one: every trial finished once; Optuna and
MLflow agree on each; no run is RUNNING; every model is linked to a run; every metric is there once
at each step; the registry has one version, of the best trial, with the alias. All values but times
are equal, bit for bit.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

from benchmarks import processes, recorded
from benchmarks.common import make_parser
from benchmarks.processes import ended

MAX_SHOWN = 20
"""Differences that are printed: after the first trial that differs, most others do as well."""
DISK_MEGABYTES = 96
HANG_SECONDS = 1800
"""After this time, a sweep is taken to hang."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep in a folder of its own, with its databases, models, data and temporary files."""

    folder: Path
    command: tuple[str, ...]
    uri: str = ""
    """MLflow's server; empty: MLflow's database in the folder."""

    @property
    def log(self) -> Path:
        """The output of the sweep: beside the folder, which may be full."""
        return self.folder.with_suffix(".txt")

    def start(self) -> subprocess.Popen[bytes]:
        """Start the sweep, or continue it."""
        own = {"TMPDIR": str(self.folder)} | ({"MLFLOW_TRACKING_URI": self.uri} if self.uri else {})
        return processes.start(self.command, self.folder, log=self.log, environment=own)

    def printed(self, start: int = 0) -> str:
        """Return what the sweep printed, from a byte on."""
        return self.log.read_bytes()[start:].decode(errors="replace")

    def num_epochs(self) -> int:
        """Return how many epochs are recorded."""
        return recorded.count(self.folder, recorded.EPOCHS)

    def wait_for_epoch(self, process: subprocess.Popen[bytes]) -> None:
        """Wait until an epoch is recorded, or the process has ended."""
        while not self.num_epochs() and not ended(process, 0.05):
            pass


@dataclass(kw_only=True)
class Faults:
    """When sweeps are disturbed, how they were, and what was wrong with them."""

    number: int
    start_up: float
    """Seconds of the undisturbed sweep to its first epoch."""
    work: float
    """Seconds from there to its end."""
    rng: Random
    sweeps: int = 0
    done: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        done = ", ".join(f"{number} × {what}" for what, number in sorted(self.done.items()))
        return f"{self.sweeps} sweeps, {done or 'undisturbed'}: {len(self.problems)} differences"

    @property
    def enough(self) -> bool:
        """Whether no sweep is to be disturbed any more."""
        return self.done.total() >= self.number or bool(self.problems)

    def due(self, process: subprocess.Popen[bytes], seconds: float = 0) -> bool:
        """Wait for the next fault, by default at a random time; return whether it is due."""
        seconds = seconds or self.rng.uniform(0, 2 * (self.start_up + self.work / self.number))
        enough = self.enough
        return not ended(process, HANG_SECONDS if enough else seconds) and not enough

    def end(self, process: subprocess.Popen[bytes], sweep: Sweep) -> None:
        """Note a problem unless the last start of a sweep has succeeded."""
        if process.poll() != 0:
            process.kill()
            end = f"the last start ended with {process.poll()}: {sweep.printed()[-3000:]}"
            self.problems.append(end)


def main() -> int:
    """Run, disturb, compare, and print the differences."""
    parser = make_parser("faults", __doc__)
    kinds, add = parser.add_mutually_exclusive_group(), parser.add_argument
    for name in KINDS:
        kinds.add_argument(f"--{name}", dest="kind", action="store_const", const=name)
    add("--number", type=int, default=50, help="of faults")
    add("--trials", type=int, default=12, help="of a sweep")
    add("--epochs", type=int, default=4, help="of a trial")
    add("--seed", type=int, default=0, help="of the random times")
    parser.set_defaults(kind="kill")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = sweep_command(options.trials, options.epochs)
        undisturbed = Sweep(folder=Path(folder, "undisturbed"), command=command)
        faults = run_undisturbed(undisturbed, options.number, options.seed)
        print(f"undisturbed: {faults.start_up:.1f} s to the first epoch, {faults.work:.1f} s more")
        expected = recorded.read(undisturbed.folder)
        while not faults.enough:
            faults.sweeps += 1
            sweep = replace(undisturbed, folder=Path(folder, f"sweep{faults.sweeps}"))
            sweep.folder.mkdir()
            with KINDS[options.kind](sweep, faults) as sweep:
                if not faults.problems:
                    found = recorded.read(sweep.folder, sweep.uri)
                    faults.problems += recorded.compare(expected, found)
            print(faults, flush=True)
    for problem in faults.problems[:MAX_SHOWN]:
        print(f"  {problem}")
    print(f"{options.trials} trials of {options.epochs} epochs; {faults}")
    return bool(faults.problems)


def sweep_command(trials: int, epochs: int) -> tuple[str, ...]:
    """Return the command line of the sweep."""
    command = [sys.executable, "-m", "experiments.sweep", "--workers", "1"]
    command += ["--study", recorded.STUDY, "--trials", str(trials), "--epochs", str(epochs)]
    command += ["--batch-sizes", "32", "64"]
    return (*command, "--max-failures", "99", "--tracking-timeout", str(HANG_SECONDS))


def run_undisturbed(sweep: Sweep, number: int = 1, seed: int = 0) -> Faults:
    """Run a sweep in a new folder; return the faults to come, whose times follow from its own."""
    sweep.folder.mkdir()
    start = time.monotonic()
    process = sweep.start()
    sweep.wait_for_epoch(process)
    first = time.monotonic()
    assert process.wait() == 0, sweep.printed()
    work = time.monotonic() - first
    return Faults(number=number, start_up=first - start, work=work, rng=Random(seed))


# Each kind of fault runs a sweep until it has finished. The context is where its records are read.


@contextmanager
def killed(sweep: Sweep, faults: Faults) -> Iterator[Sweep]:
    """Kill the main process or its worker."""
    spared = -1  # the trial whose worker was killed: it would fail the second time, as it should
    process = sweep.start()
    while faults.due(process):
        workers = processes.children(process.pid)
        trial = recorded.count(sweep.folder, recorded.FINISHED)  # the number of the next one
        if faults.rng.random() < 0.5 and workers and trial != spared:
            with suppress(ProcessLookupError):
                os.kill(workers[0], signal.SIGKILL)
            faults.done["killed worker"] += 1
            spared = trial
        else:
            process.kill()
            process.wait()
            faults.done["killed main process"] += 1
            process = sweep.start()
    faults.end(process, sweep)
    yield sweep


@contextmanager
def without_server(sweep: Sweep, faults: Faults) -> Iterator[Sweep]:
    """Stop the MLflow server of a sweep that goes on, and start the server again."""
    port = processes.free_port()
    sweep = replace(sweep, uri=f"http://127.0.0.1:{port}")
    server = processes.start_mlflow(sweep.folder, port)
    try:
        process = sweep.start()
        sweep.wait_for_epoch(process)  # a sweep that starts without its server is refused
        while faults.due(process, faults.rng.uniform(0, faults.start_up)):
            number = faults.rng.choice([signal.SIGKILL, signal.SIGTERM])
            processes.stop_group(server, number)
            faults.done[f"server ended by {number.name}"] += 1
            time.sleep(faults.rng.uniform(0, faults.start_up))
            server = processes.start_mlflow(sweep.folder, port)
        faults.end(process, sweep)
        yield sweep
    finally:
        processes.stop_group(server, signal.SIGKILL)


@contextmanager
def on_full_disk(sweep: Sweep, faults: Faults) -> Iterator[Sweep]:
    """Fill the disk until the sweep has stopped for that."""
    with small_disk(sweep.folder, DISK_MEGABYTES):
        process = sweep.start()
        while faults.due(process):
            if faults.rng.random() < 0.3:  # it is full when the sweep starts
                process.kill()
                process.wait()
            ballast = fill(sweep.folder, spare=faults.rng.choice([0, 0, 10_000, 100_000]))
            before = sweep.log.stat().st_size
            if process.poll() is not None:
                process = sweep.start()
            if not ended(process, HANG_SECONDS) or process.returncode != 0:
                faults.done["disk filled"] += 1
                faults.problems += wrong_message(process.poll(), sweep.printed(before))
                process.kill()
                ballast.unlink()
                process = sweep.start()
        faults.end(process, sweep)
        yield sweep


KINDS: dict[str, Callable[[Sweep, Faults], AbstractContextManager[Sweep]]] = {
    "kill": killed,
    "server": without_server,
    "full-disk": on_full_disk,
}


def wrong_message(code: int | None, text: str) -> list[str]:
    """Return what is wrong with the end of a sweep that was stopped by a full disk."""
    if "Traceback" in text:
        return [f"a traceback on a full disk: {text[-3000:]}"]
    last = (text.strip().splitlines() or [""])[-1]
    if code != 1 or not last.startswith("stopped: "):
        return [f"exit code {code} on a full disk, after the line {last!r}"]
    return []


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    """Mount a small file system at a folder."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    subprocess.run(mount, check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path, *, spare: int) -> Path:
    """Fill the disk that a folder is on, except for some bytes; return the file that does it."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as stream, suppress(OSError):
        while True:
            stream.write(bytes(2**16))
    with ballast.open("r+b") as stream:
        stream.truncate(max(0, ballast.stat().st_size - spare))
    return ballast


if __name__ == "__main__":
    sys.exit(main())
