"""Train a trial again, or a variation of it: `python -m experiments.rerun --help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import cli
from experiments.study.output import Output
from experiments.study.parameters import PARAMETERS
from tracking.cli import INTERRUPTED, Parser, leave
from tracking.text import printable

# PyTorch and MLflow are slow to import: each function imports what it needs.
if TYPE_CHECKING:
    from cnn.config import TrainConfig
    from cnn.data import Dataset
    from experiments.engine.processes import ProcessPool
    from experiments.interrupts import Interrupts
    from experiments.study.recorded import RecordedTrial
    from tracking.runs import Run
    from tracking.tracker import Tracker

WAIT_SECONDS = 0.2  # how long to wait for the worker between checks for a signal

ROLE = "rerun"

EPILOG = """\
Without options for other values, all metrics of each epoch but the times are compared with the
recorded ones. With them, the training is a variation. The new run is in the experiment of the
trial, under its run, with the tag rerun_of. tracking.best and the others that choose a run leave it
out; its model is used by its run's id. A rerun that is interrupted starts again.

exit codes: 0 equal bit for bit, or a variation; 1 the curve differs, the training failed, the disk
is full, a database is locked or read-only, a server is away; 2 bad input; 130 interrupted
"""


def build_parser() -> Parser:
    """Return the parser of the command line; it raises ValueError for what is wrong."""
    parser = Parser(
        prog="python -m experiments.rerun",
        description="Train a trial again from what its run in MLflow records, say what differs "
        "now (commit, code, versions, processor, threads), and compare the curves. Or train a "
        "variation of it: with another seed, more epochs, another learning rate, …",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_id", metavar="RUN_ID", help="the id of the trial's run")
    data = parser.add_argument_group("data")
    text = "the data set, or where its folder is now (default: as for the trial)"
    cli.add_flag(data, "--dataset", None, text, metavar="NAME|PATH")
    text = "the folder for downloads and decoded images (default: as for the trial, or data)"
    cli.add_flag(data, "--data-dir", None, text, type=Path, metavar="DIR")
    variation = parser.add_argument_group("variation", "Each is, by default, as for the trial.")
    for each in PARAMETERS:
        flag = f"--{each.name.replace('_', '-')}"
        options: dict[str, Any] = {"type": each.kind, "metavar": each.metavar}
        if each.choices:
            options = {"choices": each.choices}
        cli.add_flag(variation, flag, None, f"another {each.label}", **options)
    text = "other passes over the training split"
    cli.add_flag(variation, "--epochs", None, text, type=int, metavar="N")
    text = "another seed of split, initial weights and order of images"
    cli.add_flag(variation, "--seed", None, text, type=int, metavar="N")
    text = "another device: auto, cpu, cuda, cuda:1, …"
    cli.add_flag(variation, "--device", None, text, metavar="DEVICE")
    record = parser.add_argument_group("record")
    text = "how long to wait for an MLflow server that is away"
    cli.add_flag(record, "--tracking-timeout", 300, text, type=float, metavar="SECONDS")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return the exit code."""
    return cli.run(build_parser(), _run, argv, resume="")


def _run(options: argparse.Namespace) -> int:
    if not 0 <= options.tracking_timeout < float("inf"):
        raise ValueError(f"--tracking-timeout must be seconds ≥ 0, not {options.tracking_timeout}")
    output = Output()
    output.step(f"reading run {printable(options.run_id)}, opening its data set")
    from cnn.training import check_batch_size
    from experiments.engine.processes import ProcessPool, visible_gpus
    from experiments.interrupts import Interrupts
    from experiments.study.preflight import check_configurations
    from experiments.study.recorded import read_trial

    trial = read_trial(options.run_id)
    config = varied(trial.config, options)
    data_dir = options.data_dir or Path(str(trial.options.get("data-dir", "data")))
    data = _load(trial, config.seed, options.dataset, data_dir)
    check_batch_size(config.batch_size, data)
    check_configurations([config], data)
    gpus = visible_gpus()[:1] if config.device == "cuda" else []
    with ExitStack() as stack:
        # Checkpoints are the trial's, which may be interrupted.
        pool = stack.enter_context(
            ProcessPool(1, num_threads=_num_threads(trial), gpus=gpus, checkpoints=False)
        )
        pool.open(data, data_dir)
        interrupts = stack.enter_context(Interrupts())
        rerun = _Rerun(trial, config, data, pool, interrupts, output)
        rerun.introduce()
        return rerun.run(options.tracking_timeout)


def varied(config: TrainConfig, options: argparse.Namespace) -> TrainConfig:
    """Return a recorded configuration with the changes of a command line; ValueError if bad."""
    from cnn.devices import resolve_device, resolve_precision

    names = (*(each.name for each in PARAMETERS), "epochs", "seed", "device")
    given = {name: getattr(options, name) for name in names}
    changes = {name: value for name, value in given.items() if value is not None}
    device = changes["device"] = resolve_device(changes.get("device", config.device))
    if changes.get("precision") == "auto":
        changes["precision"] = resolve_precision("auto", device)
    return replace(config, **changes)


def changes_of(before: TrainConfig, after: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Return the fields that differ, with both values."""
    old, new = before.as_params(), after.as_params()
    return {name: (old[name], new[name]) for name in new if new[name] != old[name]}


def _load(trial: RecordedTrial, seed: int, dataset: str | None, data_dir: Path) -> Dataset:
    """Load the data set of a trial; ValueError if it is not there, or another one now."""
    from cnn.data import load

    # The command may have named a folder relative to its own.
    folder = trial.source if Path(trial.source).is_dir() else None
    name = str(dataset or folder or trial.options.get("dataset", trial.dataset))
    try:
        data = load(name, data_dir=data_dir, seed=seed, image_size=trial.image_size)
    except ValueError as error:
        hint = "" if dataset else "; --dataset says where the trial's data set is now"
        raise ValueError(f"{error}{hint}") from error
    if data.digest != trial.dataset_digest:
        raise ValueError(
            f"the data set {name!r} has the digest {data.digest[:8]}, but that of the trial, "
            f"{trial.dataset!r}, had {trial.dataset_digest[:8]}: --dataset chooses another"
        )
    return data


def _num_threads(trial: RecordedTrial) -> int:
    """Return the number of threads that trained the trial, within the cores."""
    from cnn.devices import num_cores

    text = trial.made_with.get("threads", "1")
    return max(1, min(int(text) if text.isdecimal() else 1, num_cores()))


@dataclass
class _Rerun:
    """One training: its worker's events are printed and recorded."""

    trial: RecordedTrial
    config: TrainConfig
    data: Dataset
    pool: ProcessPool
    interrupts: Interrupts
    output: Output
    curve: dict[int, Mapping[str, float]] = field(default_factory=dict)

    @property
    def changes(self) -> dict[str, tuple[Any, Any]]:
        return changes_of(self.trial.config, self.config)

    def made_with(self) -> dict[str, str]:
        from experiments.study.identity import provenance

        now = provenance(self.config.precision, self.config.device)
        return {key: now[key] for key in ("commit", "uncommitted", "source", "python", "torch")}

    def introduce(self) -> None:
        """Print what is trained again, and what differs now."""
        from experiments.study.identity import (
            digest_of_network,
            list_differences,
            training_digest,
        )

        trial, before = self.trial, self.trial.config
        print(f"rerun of {printable(trial.name)} ({trial.run_id}), which is {trial.outcome}")
        for name, (old, new) in self.changes.items():
            print(f"  variation: {name.replace('_', ' ')} {old} → {new}")
        now = self.made_with() | self.pool.arithmetic(self.config.device)
        now |= {
            "network digest": digest_of_network(before.network, self.data),
            "training digest": training_digest(before.loss, before.optimizer, before.schedule),
        }
        different = list_differences(trial.made_with, now)
        for line in different:
            print(f"  differs now: {printable(line)}")
        if unknown := [key for key in now if key not in trial.made_with]:
            print(f"  not recorded, and may differ: {', '.join(unknown)}")
        if not different and not unknown:
            print("  nothing differs: the same code, versions, processor and threads")

    def run(self, tracking_timeout: float) -> int:
        """Train and record, and return the exit code."""
        from experiments.study.storage import outcome_of, recording_errors, start_errors
        from tracking.retries import RetryPolicy

        retries = RetryPolicy(seconds=tracking_timeout, should_stop=self.interrupts)
        with start_errors():
            with self.interrupts.at_once():
                from tracking.tracker import Tracker

                tracker = Tracker.open(self.trial.experiment, retries=retries)
            run = self._open_run(tracker)
        ended = False
        try:
            outcome, reason = self._train(run)
            run.end(outcome, reason=reason)
            ended = True
            return self._report(run, outcome, reason)
        except recording_errors() as error:
            print(f"stopped: {printable(outcome_of(error)[1])}", file=sys.stderr)
            return 1
        finally:
            if not ended:
                with suppress(*recording_errors()):
                    run.end("interrupted")

    def _open_run(self, tracker: Tracker) -> Run:
        from experiments.study.recorder import log_config, log_data, provenance_tags
        from tracking.runs import Run

        changed = ", ".join(f"{name}={new}" for name, (_, new) in self.changes.items())
        tags = {"role": ROLE, "rerun_of": self.trial.run_id}
        tags |= {"rerun_changes": changed} if changed else {}
        tags |= provenance_tags(self.made_with(), self.pool.arithmetic(self.config.device))
        original = Run(tracker.client, self.trial.run_id, tracker.experiment_id)
        name = f"rerun of {self.trial.name}" + (f": {changed}" if changed else "")
        run = tracker.start_run(name, tags=tags, parent=original)
        log_config(run, self.config, self.data)
        log_data(run, self.data)
        return run

    def _train(self, run: Run) -> tuple[str, str]:
        """Train to the end, record it, and return outcome and reason."""
        from experiments.engine.base import EpochEnded, JobEnded, JobFailed
        from experiments.study.models import Models

        models = Models(self.data)
        self.pool.submit(0, self.config)
        models.warm_up(self.config, self.interrupts)
        diverged = False
        while not self.interrupts():
            for event in self.pool.wait(WAIT_SECONDS):
                match event:
                    case EpochEnded():
                        diverged = event.diverged
                        run.log_metrics(event.metrics, step=event.number)
                        self.curve[event.number] = event.metrics
                        self._show(event.number)
                    case JobEnded() if diverged:
                        return "diverged", f"not finite in epoch {len(self.curve)}"
                    case JobEnded():
                        epochs = len(self.curve)
                        models.record(run, self.config, event.weights, step=epochs, about={})
                        return "complete", ""
                    case JobFailed():
                        if event.details:
                            run.log_text(event.details, "traceback.txt")
                        return "failed", event.error
        return "interrupted", ""

    def _show(self, epoch: int) -> None:
        """Print an epoch beside the recorded one."""
        new, old = self.curve[epoch], self.trial.curve.get(epoch, {})
        texts = [f"epoch {epoch:3d} of {self.config.epochs}"]
        for name, form in (("val/accuracy", ".2%"), ("val/loss", ".4g")):
            recorded = f" (recorded {old[name]:{form}})" if name in old else ""
            texts.append(f"{name} {new[name]:{form}}{recorded}")
        width = self.output.width
        while width is not None and len("  ".join(texts)) > width and len(texts) > 2:
            texts.pop()
        print("  ".join(texts), flush=True)

    def _report(self, run: Run, outcome: str, reason: str) -> int:
        """Print the result, and return the exit code."""
        from experiments.study.recorded import compare_curves

        if outcome == "interrupted":
            print("interrupted: the same command starts again", file=sys.stderr)
            return INTERRUPTED
        if outcome == "failed":
            print(f"failed: {printable(reason)}", file=sys.stderr)
            return 1
        code, trial = 0, self.trial
        if self.changes:
            print(f"{outcome}: a variation, {self._beside()}")
        elif not trial.curve:
            print(f"{outcome}: the trial, which is {trial.outcome}, has no epoch to compare with")
        else:
            result = compare_curves(trial.curve, self.curve)
            run.set_tags({"rerun_result": str(result)})
            print(result)
            code = 0 if result.first is None else 1
        print(cli.how_to_compare(run.experiment_id, run.run_id))
        return code

    def _beside(self) -> str:
        name = "val/accuracy"
        new, old = self.curve[max(self.curve)], self.trial.curve
        text = f"{name} {new[name]:.2%}"
        if old and name in old[max(old)]:
            text += f", that of the trial {old[max(old)][name]:.2%}"
        return text + (" (on another split)" if "seed" in self.changes else "")


if __name__ == "__main__":
    leave(main())
