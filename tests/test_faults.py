"""What kills, full disks and servers that go away leave: short versions of `benchmarks.faults`."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from tracking.store import make_whole

REPOSITORY = Path(__file__).parents[1]

# Processes that make MLflow's tables are forked from one that has imported it: that takes seconds.
KILLED_MAKERS = """
import os, sys, time
from pathlib import Path
from tracking.runs import Tracker

def forked():
    child = os.fork()
    if not child:
        try:
            Tracker.open("tests")
        finally:
            os._exit(sys.exc_info()[0] is not None)
    return child

for size in map(int, sys.argv[1:]):
    folder = Path(str(size)).absolute()
    folder.mkdir()
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
    child = forked()
    made = [folder / "mlflow.db", folder / "mlflow.db.draft"]  # whichever it is
    while sum(os.stat(file).st_size for file in made if os.path.exists(file)) < size:
        time.sleep(0.001)
    os.kill(child, 9)
    os.waitpid(child, 0)
    _, status = os.waitpid(forked(), 0)
    print(size, "is refused" if status else "is whole", flush=True)
"""


def test_a_process_killed_while_it_made_mlflows_tables_leaves_nothing_that_is_refused(
    tmp_path: Path,
) -> None:
    sizes = ["50000", "100000", "150000", "200000", "250000", "300000"]
    made = subprocess.run(
        [sys.executable, "-c", KILLED_MAKERS, *sizes],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    assert made.stdout.splitlines() == [f"{size} is whole" for size in sizes]


def table(url: str) -> None:
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as database:
        database.execute("CREATE TABLE whole (x)")


def test_a_database_that_is_there_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "there.db"
    file.write_text("something")
    make_whole(f"sqlite:///{file}", table)
    assert file.read_text() == "something"


def test_of_several_that_make_a_database_one_does_and_the_others_wait(tmp_path: Path) -> None:
    makers: list[int] = []

    def slowly(url: str) -> None:
        makers.append(threading.get_ident())
        time.sleep(0.2)
        table(url)

    url = f"sqlite:///{tmp_path}/one.db"
    threads = [threading.Thread(target=make_whole, args=(url, slowly)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(makers) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["one.db"]


def test_what_fails_to_make_a_database_leaves_none(tmp_path: Path) -> None:
    def failing(url: str) -> None:
        table(url)
        raise RuntimeError("no luck")

    url = f"sqlite:///{tmp_path}/one.db"
    with pytest.raises(RuntimeError, match="no luck"):
        make_whole(url, failing)
    assert not (tmp_path / "one.db").exists()
    make_whole(url, table)
    assert [file.name for file in tmp_path.iterdir()] == ["one.db"]
