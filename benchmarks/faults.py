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
import random
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
    """MLflow's server (default: MLflow's database in the folder)."""

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

    def end(self, process: subprocess.Popen[bytes], findings: Findings) -> None:
        """Note a problem unless the last start of the sweep has succeeded."""
        if process.poll() != 0:
            process.kill()
            findings.problems.append(
                f"the last start ended with {process.poll()}: {self.printed()[-3000:]}"
            )


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Times of the undisturbed sweep, from which the random times of faults follow."""

    start_up: float
    """Seconds to the first epoch."""
    work: float
    """Seconds from there to the end."""
    num_faults: int

    def draw(self, rng: random.Random) -> float:
        """Return how many seconds after its start a sweep is to be disturbed."""
        return rng.uniform(0, 2 * (self.start_up + self.work / self.num_faults))


@dataclass(kw_only=True)
class Findings:
    """How sweeps were disturbed, and what was wrong with them."""

    sweeps: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        faults = ", ".join(f"{number} × {what}" for what, number in sorted(self.faults.items()))
        return f"{self.sweeps} sweeps, {faults or 'undisturbed'}: {len(self.problems)} differences"

    def wait(self, process: subprocess.Popen[bytes], seconds: float, timing: Timing) -> bool:
        """Wait some seconds, or after enough faults to the end; return whether a fault is due."""
        enough = self.faults.total() >= timing.num_faults or bool(self.problems)
        return not ended(process, HANG_SECONDS if enough else seconds) and not enough


Mode = Callable[[Sweep, Timing, random.Random, Findings], AbstractContextManager[Sweep]]
"""Runs a sweep with faults until it has finished. Within the context, its records can be read."""


def main() -> int:
    """Run, disturb, compare, and print the differences."""
    parser = make_parser("faults", __doc__)
    mode = parser.add_mutually_exclusive_group()
    for name in MODES:
        mode.add_argument(f"--{name}", dest="mode", action="store_const", const=name)
    parser.add_argument("--number", type=int, default=50, help="of faults (default: %(default)s)")
    parser.add_argument("--trials", type=int, default=12, help="(default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the random times (default: %(default)s)"
    )
    parser.set_defaults(mode="kill")
    options = parser.parse_args()
    command = sweep_command(options.trials, options.epochs)
    with tempfile.TemporaryDirectory() as folder:
        findings = run(options.mode, command, Path(folder), options.number, options.seed)
    for problem in findings.problems[:MAX_SHOWN]:
        print(f"  {problem}")
    print(f"{options.trials} trials of {options.epochs} epochs; {findings}")
    return bool(findings.problems)


def run(mode: str, command: tuple[str, ...], folder: Path, number: int, seed: int) -> Findings:
    """Run the sweep undisturbed, then disturbed until there were enough faults; compare each."""
    findings, rng = Findings(), random.Random(seed)
    undisturbed = Sweep(folder=folder / "undisturbed", command=command)
    timing = run_undisturbed(undisturbed, number)
    print(f"undisturbed: {timing.start_up:.1f} s to the first epoch, {timing.work:.1f} s more")
    expected = recorded.read(undisturbed.folder)
    while findings.faults.total() < number and not findings.problems:
        findings.sweeps += 1
        sweep = replace(undisturbed, folder=folder / f"sweep{findings.sweeps}")
        sweep.folder.mkdir()
        with MODES[mode](sweep, timing, rng, findings) as sweep:
            if not findings.problems:
                found = recorded.read(sweep.folder, sweep.uri)
                findings.problems += recorded.compare(expected, found)
        print(findings, flush=True)
    return findings


def sweep_command(trials: int, epochs: int) -> tuple[str, ...]:
    """Return the command line of the sweep."""
    command = [sys.executable, "-m", "experiments.sweep", "--workers", "1"]
    command += ["--study", recorded.STUDY, "--trials", str(trials), "--epochs", str(epochs)]
    command += ["--batch-sizes", "32", "64"]
    return (*command, "--max-failures", "99", "--tracking-timeout", str(HANG_SECONDS))


def run_undisturbed(sweep: Sweep, num_faults: int = 1) -> Timing:
    """Run a sweep in a new folder, and return its times."""
    sweep.folder.mkdir()
    start = time.monotonic()
    process = sweep.start()
    while not sweep.num_epochs() and not ended(process, 0.05):
        pass
    first = time.monotonic()
    assert process.wait() == 0, sweep.printed()
    return Timing(start_up=first - start, work=time.monotonic() - first, num_faults=num_faults)


@contextmanager
def killed(sweep: Sweep, timing: Timing, rng: random.Random, findings: Findings) -> Iterator[Sweep]:
    """Kill the main process or its worker."""
    spared = -1  # the trial whose worker was killed: it would fail the second time, as it should
    process = sweep.start()
    while findings.wait(process, timing.draw(rng), timing):
        workers = processes.children(process.pid)
        trial = recorded.count(sweep.folder, recorded.FINISHED)  # the number of the next one
        if rng.random() < 0.5 and workers and trial != spared:
            with suppress(ProcessLookupError):
                os.kill(workers[0], signal.SIGKILL)
            findings.faults["killed worker"] += 1
            spared = trial
        else:
            process.kill()
            process.wait()
            findings.faults["killed main process"] += 1
            process = sweep.start()
    sweep.end(process, findings)
    yield sweep


@contextmanager
def without_server(
    sweep: Sweep, timing: Timing, rng: random.Random, findings: Findings
) -> Iterator[Sweep]:
    """Stop the MLflow server of a sweep that goes on, and start the server again."""
    port = processes.free_port()
    sweep = replace(sweep, uri=f"http://127.0.0.1:{port}")
    server = processes.start_mlflow(sweep.folder, port)
    try:
        process = sweep.start()
        # A sweep that starts without its server is refused: the first fault comes later.
        while not sweep.num_epochs() and not ended(process, 0.05):
            pass
        while findings.wait(process, rng.uniform(0, timing.start_up), timing):
            number = rng.choice([signal.SIGKILL, signal.SIGTERM])
            processes.stop_group(server, number)
            findings.faults[f"server ended by {number.name}"] += 1
            time.sleep(rng.uniform(0, timing.start_up))
            server = processes.start_mlflow(sweep.folder, port)
        sweep.end(process, findings)
        yield sweep
    finally:
        processes.stop_group(server, signal.SIGKILL)


@contextmanager
def on_full_disk(
    sweep: Sweep, timing: Timing, rng: random.Random, findings: Findings
) -> Iterator[Sweep]:
    """Fill the disk until the sweep has stopped for that."""
    with small_disk(sweep.folder, DISK_MEGABYTES):
        process = sweep.start()
        while findings.wait(process, timing.draw(rng), timing):
            if rng.random() < 0.3:  # it is full when the sweep starts
                process.kill()
                process.wait()
            ballast = fill(sweep.folder, spare=rng.choice([0, 0, 10_000, 100_000]))
            before = sweep.log.stat().st_size
            if process.poll() is not None:
                process = sweep.start()
            if not ended(process, HANG_SECONDS) or process.returncode != 0:
                findings.faults["disk filled"] += 1
                findings.problems += wrong_message(process.poll(), sweep.printed(before))
                process.kill()
                ballast.unlink()
                process = sweep.start()
        sweep.end(process, findings)
        yield sweep


MODES: dict[str, Mode] = {"kill": killed, "server": without_server, "full-disk": on_full_disk}


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
