"""Workers on a real Ray cluster: nodes of their own on this machine, which come and go."""

from __future__ import annotations

import os
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from real_workers import config, wait_for_end
from real_workers import data as data
from real_workers import data_dir as data_dir

from benchmarks import faults, processes, recorded
from cnn.data import Dataset
from cnn.devices import num_cores
from experiments.engine.base import CheckpointLost, EpochEnded, Event, JobEnded, JobFailed, JobMoved
from experiments.engine.checkpoints import Checkpoints
from experiments.engine.processes import ProcessPool

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")

from ray._private import worker as private  # noqa: E402
from ray.cluster_utils import Cluster as Nodes  # noqa: E402

from experiments.engine.ray_cluster import connected  # noqa: E402
from experiments.engine.ray_pool import Needs, RayPool  # noqa: E402
from tracking.errors import TransientError  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    # Ray's own, at work within it:
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

REPOSITORY = Path(__file__).parents[1]
ONE_CPU = Needs(cpus=1, gpus=0)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """A cluster whose head has one CPU, and that this process is connected to."""
    store = {"object_store_memory": 80 * 2**20}
    nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 1, **store})
    with connected(nodes.address):
        yield nodes
    nodes.shutdown()


@pytest.fixture(scope="module")
def pool(nodes: Nodes, data: Dataset, data_dir: Path) -> RayPool:
    pool = RayPool(ONE_CPU, num_workers=None, min_workers=1, timeout=120, checkpoint_seconds=0)
    pool.open(data, data_dir)
    return pool


def values(events: list[Event]) -> list[tuple[int, float, float]]:
    return [
        (event.number, event.metrics["train/loss"], event.metrics["val/loss"])
        for event in events
        if isinstance(event, EpochEnded)
    ]


def assert_same_training(events: list[Event], others: list[Event]) -> None:
    assert values(events) == values(others)
    end, other = events[-1], others[-1]
    assert isinstance(end, JobEnded)
    assert isinstance(other, JobEnded)
    for name, value in end.weights.items():
        np.testing.assert_array_equal(other.weights[name], value)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_worker_trains_bit_for_bit_as_one_of_this_machine_does(
    pool: RayPool, data: Dataset, data_dir: Path, precision: str
) -> None:
    training = config(precision=precision, seed=3)
    pool.submit(7, training)
    on_ray = wait_for_end(pool)
    with ProcessPool(1) as processes:
        processes.open(data, data_dir)
        processes.submit(7, training)
        here = wait_for_end(processes)
        processes.forget(training)
    assert [event.job for event in on_ray] == [7, 7, 7]
    assert_same_training(on_ray, here)


def test_an_exception_ends_its_job_only(pool: RayPool) -> None:
    pool.submit(1, config(batch_size=10**6))
    (failed,) = wait_for_end(pool)
    assert isinstance(failed, JobFailed)
    assert failed.error.startswith("ValueError: batch size 1000000 is larger")
    assert "Traceback" in failed.details
    pool.submit(1, config(epochs=1))  # at once, though the next worker is still to come
    assert isinstance(wait_for_end(pool)[-1], JobEnded)


def test_a_stopped_job_makes_room_for_another_and_can_be_submitted_again(pool: RayPool) -> None:
    pool.submit(1, config(epochs=500))
    while not pool.wait(0.1):
        pass
    pool.stop(1)
    pool.submit(1, config(epochs=3, seed=9))
    assert [number for number, _, _ in values(wait_for_end(pool))] == [1, 2, 3]
    assert pool.num_idle == 1


def test_a_job_resumes_from_its_checkpoint_when_its_node_is_lost(
    pool: RayPool, nodes: Nodes, data: Dataset, data_dir: Path
) -> None:
    training = config(epochs=8, seed=5, batch_size=16)
    pool.submit(1, training)
    undisturbed = wait_for_end(pool)
    pool.forget(training)

    pool.submit(2, config(epochs=500, seed=1))  # the head's worker has something to do
    node = nodes.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    while not pool.num_idle:  # a node that joins is used
        pool.wait(0.1)
    pool.submit(1, training)
    events: list[Event] = []
    while len(values(of_job(events, 1))) < 2:
        events.extend(pool.wait(0.1))
    nodes.remove_node(node, allow_graceful=False)
    pool.stop(2)
    before, after = of_job(events, 1), of_job(wait_for_end(pool), 1)
    moves = [event for event in after if isinstance(event, JobMoved)]
    after = after[after.index(moves[-1]) + 1 :]
    assert len(moves) == 1
    assert "was lost" in moves[0].reason
    # What was trained before is told again as it was, with its times.
    assert after[: len(before)] == before
    assert_same_training(after, undisturbed)
    assert Checkpoints(digest=data.digest, data_dir=data_dir).read(training) is not None


def test_a_damaged_checkpoint_has_a_job_begin_again(
    pool: RayPool, data: Dataset, data_dir: Path
) -> None:
    training = config(seed=11)
    pool.submit(1, training)
    undisturbed = wait_for_end(pool)
    file = Checkpoints(digest=data.digest, data_dir=data_dir).file(training)
    file.write_bytes(file.read_bytes()[:500_000])
    pool.submit(1, training)
    lost, *events = wait_for_end(pool)
    assert isinstance(lost, CheckpointLost)
    assert_same_training(events, undisturbed)
    pool.forget(training)


def test_a_checkpoint_that_cannot_be_kept_is_told_once(
    pool: RayPool, data: Dataset, data_dir: Path
) -> None:
    training = config(seed=12)
    file = Checkpoints(digest=data.digest, data_dir=data_dir).file(training)
    file.mkdir(parents=True)
    pool.submit(1, training)
    unusable, unkept, *events = wait_for_end(pool)
    assert isinstance(unusable, CheckpointLost)
    assert isinstance(unkept, CheckpointLost)
    assert [type(event) for event in events] == [EpochEnded, EpochEnded, JobEnded]
    file.rmdir()


def of_job(events: list[Event], job: int) -> list[Event]:
    return [event for event in events if event.job == job]


def test_a_job_that_kills_its_workers_where_it_is_fails(
    pool: RayPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool.submit(3, config(epochs=500, batch_size=1))
    events: list[Event] = []
    while not any(isinstance(event, JobFailed) for event in events):
        events.extend(pool.wait(0.1))
        for worker in pool._workers:
            if worker.job is not None:
                ray.kill(worker.actor)
    moved, failed = (event for event in events if not isinstance(event, EpochEnded))
    assert isinstance(moved, JobMoved)
    assert isinstance(failed, JobFailed)
    assert failed.error.startswith("the worker on node ")


@pytest.mark.parametrize(
    ("needs", "room"),
    [
        (Needs(cpus=1, gpus=0), 3),
        (Needs(cpus=0.5, gpus=0), 7),
        (Needs(cpus=4, gpus=0), 0),
        (Needs(cpus=0.1, gpus=0.25), 8),
        (Needs(cpus=0.1, gpus=0.4), 4),  # two of them on each GPU
        (Needs(cpus=1, gpus=2), 1),
    ],
)
def test_how_many_workers_a_node_has_room_for(needs: Needs, room: int) -> None:
    assert needs.fit({"CPU": 3.5, "GPU": 2.0}) == room
    assert needs.fit({}) == 0


@pytest.mark.parametrize(
    ("cpus", "gpus", "error"),
    [
        (0, 0, "--cpus-per-worker must be > 0, not 0"),
        (float("nan"), 0, "--cpus-per-worker must be > 0, not nan"),
        (1, -1, "--gpus-per-worker must be a fraction of 1, or an integer, not -1"),
        (1, 1.5, "--gpus-per-worker must be a fraction of 1, or an integer, not 1.5"),
    ],
)
def test_needs_that_no_node_can_meet(cpus: float, gpus: float, error: str) -> None:
    with pytest.raises(ValueError, match=f"^{error}$"):
        Needs(cpus=cpus, gpus=gpus)


def test_a_gpu_that_no_node_has_is_said_and_not_waited_for(
    nodes: Nodes, data: Dataset, data_dir: Path
) -> None:
    pool = RayPool(Needs(cpus=1, gpus=1), num_workers=2, min_workers=1, timeout=0.5)
    with pytest.raises(
        ValueError,
        # A node that was killed a moment ago may not be missed yet.
        match="^there is room for 0 of 1 workers of 1 CPUs and 1 GPUs: the cluster has "
        r"\d nodes? with 1 CPUs and 0 GPUs$",
    ):
        pool.open(data, data_dir)


def test_too_few_workers_are_said(nodes: Nodes, data: Dataset, data_dir: Path) -> None:
    pool = RayPool(Needs(cpus=0.1, gpus=0), num_workers=1, min_workers=2, timeout=0.5)
    with pytest.raises(TransientError, match=r"^\d of --min-workers 2 workers started within 0.5"):
        pool.open(data, data_dir)


def test_nodes_with_other_versions_train_nothing(
    nodes: Nodes, data: Dataset, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = {"Python": "3.11.99", "PyTorch": "1.0"}
    monkeypatch.setattr("experiments.engine.ray_pool.versions", lambda: other)
    pool = RayPool(Needs(cpus=0.1, gpus=0), num_workers=1, min_workers=1, timeout=60)
    node = nodes.add_node(num_cpus=1)  # the head's CPU may be another pool's
    with pytest.raises(ValueError, match="^node .* has Python .*, not Python 3.11.99, PyTorch 1.0"):
        pool.open(data, data_dir)
    nodes.remove_node(node)


def test_nodes_without_the_users_module_train_nothing(
    nodes: Nodes, data: Dataset, data_dir: Path
) -> None:
    pool = RayPool(
        Needs(cpus=0.1, gpus=0),
        num_workers=1,
        min_workers=1,
        timeout=60,
        references=["only_here:make"],
    )
    node = nodes.add_node(num_cpus=1)  # the head's CPU may be another pool's
    with pytest.raises(ValueError, match=r"on node .*'only_here:make': there is no module"):
        pool.open(data, data_dir)
    nodes.remove_node(node)


@pytest.mark.parametrize(
    "address", ["ray://127.0.0.1:1", "127.0.0.1:1", "[::1]:1", "ray://x:99999"]
)
def test_an_address_without_a_cluster(address: str) -> None:
    with (
        pytest.raises(ValueError, match="^no Ray cluster answers at --ray-address "),
        connected(address),
    ):
        pass


def test_what_ray_writes_is_in_a_file_that_one_line_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuses(*_: object, **__: object) -> None:
        os.write(2, b"W gcs_client.cc: InvalidAuthToken\n" * 20)  # as C++ does, past Python
        raise ConnectionError("Failed to connect")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(ray, "init", refuses)
    with pytest.raises(ValueError, match="Failed to connect") as raised, connected("auto"):
        pass
    (log,) = tmp_path.iterdir()
    assert str(raised.value).endswith(f": see {log}")
    assert len(log.read_text().splitlines()) == 20
    assert capfd.readouterr() == ("", "")


def test_what_ray_tells_while_it_works_is_in_a_file_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(ray, "init", lambda *_, **__: None)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with connected("auto"):
        pass
    assert not list(tmp_path.iterdir())  # it had nothing to say
    with connected("auto"):
        told = {"lines": ["Raylet is terminated"], "pid": "raylet", "is_err": False}
        private.print_to_stdstream(told, ignore_prefix=False)
    (log,) = tmp_path.iterdir()
    assert log.read_text() == "Raylet is terminated\n"
    assert capfd.readouterr() == ("", f"note: messages of Ray: see {log}\n")


def test_several_workers_share_a_gpu(nodes: Nodes, data: Dataset, data_dir: Path) -> None:
    # Ray takes our word for it that there is one: it is told to workers, and they use none.
    node = nodes.add_node(num_cpus=1, num_gpus=1)
    pool = RayPool(Needs(cpus=0.1, gpus=0.25), num_workers=None, min_workers=4, timeout=60)
    pool.open(data, data_dir)
    assert pool.num_idle == 4
    seen = [
        worker.actor.__ray_call__.remote(lambda _: os.environ["CUDA_VISIBLE_DEVICES"])
        for worker in pool._workers
    ]
    assert ray.get(seen) == ["0"] * 4
    for job in range(4):
        pool.submit(job, config(epochs=1, seed=job))
    assert pool.num_idle == 0
    ended: set[int] = set()
    while len(ended) < 4:
        ended |= {event.job for event in wait_for_end(pool) if isinstance(event, JobEnded)}
    nodes.remove_node(node)


def test_a_sweep_loses_nothing_to_a_node_that_goes_nor_to_a_driver_that_is_killed(
    nodes: Nodes, tmp_path: Path
) -> None:
    # Which configurations are tried does not depend on timing, and a worker has one thread.
    command = (sys.executable, "-m", "experiments.sweep", "--trials", "4", "--epochs", "6")
    command += ("--batch-sizes", "32", "--sampler", "random", "--pruner", "none")
    command += ("--study", "faults", "--workers")
    calm = faults.Sweep(folder=tmp_path / "calm", command=(*command, str(num_cores())))
    # A worker on each of the two nodes, before the first epoch: the head has no room for one.
    on_ray = ("2", "--engine", "ray", "--ray-address", str(nodes.address))
    on_ray += ("--cpus-per-worker", "1.5", "--min-workers", "2", "--ray-timeout", "300")
    stormy = faults.Sweep(folder=tmp_path / "stormy", command=(*command, *on_ray))
    stormy.folder.mkdir()
    faults.run_undisturbed(calm)

    small = {"num_cpus": 2, "object_store_memory": 80 * 2**20}
    first, second = nodes.add_node(**small), nodes.add_node(**small)
    process = stormy.start()

    def wait_for_epochs(number: int) -> None:
        while stormy.num_epochs() < number:
            assert not processes.ended(process, 0.01), stormy.printed()

    def wait_until_one_has_moved() -> None:
        with closing(sqlite3.connect(stormy.folder / "mlflow.db", timeout=60)) as database:
            while not database.execute("SELECT * FROM tags WHERE key = 'moved'").fetchall():
                assert not processes.ended(process, 0.01), stormy.printed()

    try:
        wait_for_epochs(3)  # both workers train
        nodes.remove_node(second, allow_graceful=False)
        second = nodes.add_node(**small)
        wait_until_one_has_moved()  # the driver may be busy when the node goes
        wait_for_epochs(11)  # the trial that was moved is among those under way, or over
        process.kill()
        process.wait()
        process = stormy.start()
        assert processes.ended(process, 300), stormy.printed()
        assert process.returncode == 0, stormy.printed()
    finally:
        process.kill()
        process.wait()
        for node in (first, second):
            nodes.remove_node(node, allow_graceful=False)
    assert "raylet" not in stormy.printed()  # what Ray has to say is in a file
    found = recorded.read(stormy.folder)
    assert recorded.compare(recorded.read(calm.folder), found) == []
    assert [run.data.tags["moved"] for run in found["runs"] if "moved" in run.data.tags]


def test_a_sweep_on_a_cluster_of_its_own_leaves_nothing_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "experiments.sweep", "--trials", "2", "--epochs", "1"]
    command += ["--engine", "ray", "--pruner", "none"]
    with processes.start(command, tmp_path) as process:
        assert process.wait() == 0, (tmp_path / "log.txt").read_text()
    assert (tmp_path / "log.txt").read_text().count(" complete ") == 4  # as they end, and the table
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # Ray's processes are of its group
