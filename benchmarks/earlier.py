"""A study with many trials, at once: copies, row by row, of some that were made the usual way.

For `benchmarks.scaling`. In Optuna's storage and in MLflow's database a copy has all that its
original has, under ids and a number of its own, but for the files of its model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy
from sqlalchemy import Column, Connection, Integer, MetaData, String, Table, case, func, select

ID_DIGITS = 6
"""Of an id, the last of which are another number in each copy."""

OF_A_TRIAL = (
    "trial_params",
    "trial_values",
    "trial_user_attributes",
    "trial_system_attributes",
    "trial_intermediate_values",
    "trial_heartbeats",
)

# Of MLflow's tables, the columns with ids of runs, models and links between them.
IDS = {
    "runs": ("run_uuid",),
    "tags": ("run_uuid",),
    "params": ("run_uuid",),
    "metrics": ("run_uuid",),
    "latest_metrics": ("run_uuid",),
    "inputs": ("input_uuid", "source_id", "destination_id"),
    "input_tags": ("input_uuid",),
    "logged_models": ("model_id", "source_run_id"),
    "logged_model_params": ("model_id",),
    "logged_model_metrics": ("model_id", "run_id"),
}

# What is copied, and into what: for each copy or, for what belongs to a trial, for each trial.
COPIES = Table(
    "copies",
    MetaData(),
    Column("shift", Integer),
    Column("suffix", String),
    Column("trial_id", Integer),
    Column("new_trial_id", Integer),
    prefixes=["TEMPORARY"],
)


def lengthen(storage: str, store: str, study: str, num_trials: int, *, num_originals: int) -> None:
    """Bring a study of finished trials to so many, in Optuna's storage and in MLflow's database.

    Args:
        storage: Optuna's database.
        store: MLflow's.
        study: its name.
        num_trials: how many it is to have; nothing is done if it has as many.
        num_originals: the first so many are copied, again and again.
    """
    optuna, mlflow = sqlalchemy.create_engine(storage), sqlalchemy.create_engine(store)
    with optuna.begin() as ours, mlflow.begin() as theirs:
        trials, runs = _Trials(ours, study), _Runs(theirs, study)
        missing = max(0, num_trials - trials.count())
        whole, part = divmod(missing, num_originals)
        for num_copies, num_copied in ((whole, num_originals), (1, part)):
            first = trials.count()
            shifts = range(first, first + num_copies * num_copied, num_copied or 1)
            trials.copy(num_copied, shifts)
            runs.copy(num_copied, shifts)
    for engine in (optuna, mlflow):
        engine.dispose()


class _Trials:
    """The trials of a study in Optuna's storage."""

    def __init__(self, connection: Connection, study: str) -> None:
        self.connection = connection
        self.tables = _tables(connection, "studies", "trials", *OF_A_TRIAL)
        name = self.tables["studies"].c.study_name
        query = select(self.tables["studies"].c.study_id).where(name == study)
        self.study_id = connection.execute(query).scalar_one()

    def count(self) -> int:
        trials = self.tables["trials"]
        query = select(func.count()).where(trials.c.study_id == self.study_id)
        return int(self.connection.execute(query).scalar_one())

    def copy(self, num_originals: int, shifts: Sequence[int]) -> None:
        trials = self.tables["trials"]
        ours = trials.c.study_id == self.study_id
        _write_copies(self.connection, shifts)
        changes = {"trial_id": None, "number": trials.c.number + COPIES.c.shift}
        _insert(self.connection, trials, changes, ours & (trials.c.number < num_originals))
        numbered = self.connection.execute(select(trials.c.number, trials.c.trial_id).where(ours))
        ids = dict(tuple(row) for row in numbered)
        pairs = [
            (ids[number], ids[number + s], s) for s in shifts for number in range(num_originals)
        ]
        _write_copies(self.connection, [s for *_, s in pairs], [pair[:2] for pair in pairs])
        for name in OF_A_TRIAL:
            table = self.tables[name]
            changes = {_key(table): None, "trial_id": COPIES.c.new_trial_id}
            if name == "trial_user_attributes":
                value = table.c.value_json
                renamed = _renamed(value, after=1)  # a quote, as it is JSON
                changes["value_json"] = case((table.c.key == "run_id", renamed), else_=value)
            _insert(self.connection, table, changes, table.c.trial_id == COPIES.c.trial_id)


class _Runs:
    """The runs of a study's trials in MLflow's database."""

    def __init__(self, connection: Connection, study: str) -> None:
        self.connection, self.tables = connection, _tables(connection, *IDS)
        tags = self.tables["tags"]
        number, of_study = tags.alias(), tags.alias()
        query = (
            select(number.c.value, number.c.run_uuid)
            .join(of_study, of_study.c.run_uuid == number.c.run_uuid)
            .where(number.c.key == "trial", of_study.c.key == "study", of_study.c.value == study)
        )
        self.runs = {int(value): run for value, run in connection.execute(query)}

    def copy(self, num_originals: int, shifts: Sequence[int]) -> None:
        _write_copies(self.connection, shifts)
        runs = [self.runs[number] for number in range(num_originals)]
        models, inputs = self.tables["logged_models"], self.tables["inputs"]
        linked = inputs.c.source_id.in_(runs) | inputs.c.destination_id.in_(runs)
        ids = {
            *runs,
            *self._column(models.c.model_id, models.c.source_run_id.in_(runs)),
            *self._column(inputs.c.input_uuid, linked),
        }
        for name, columns in IDS.items():
            table = self.tables[name]
            # A data set's id is not among them: it stays.
            changes = {
                column: case(
                    (table.c[column].in_(ids), _renamed(table.c[column])), else_=table.c[column]
                )
                for column in columns
            }
            if name == "tags":
                key, value = table.c.key, table.c.value
                number = sqlalchemy.cast(sqlalchemy.cast(value, Integer) + COPIES.c.shift, String)
                changes["value"] = case(
                    (key == "trial", number), (key == "key", _renamed(value)), else_=value
                )
            _insert(self.connection, table, changes, table.c[columns[0]].in_(ids))

    def _column(self, column: Column[Any], condition: Any) -> Sequence[Any]:
        return self.connection.execute(select(column).where(condition)).scalars().all()


def _tables(connection: Connection, *names: str) -> Mapping[str, Table]:
    metadata = MetaData()
    metadata.reflect(connection, only=names, resolve_fks=False)
    return metadata.tables


def _write_copies(
    connection: Connection, shifts: Sequence[int], trials: Sequence[tuple[int, int]] = ()
) -> None:
    """Say what is copied next: by how much numbers are larger, and ids of trials, old and new."""
    COPIES.create(connection, checkfirst=True)
    connection.execute(COPIES.delete())
    of: Sequence[tuple[int | None, int | None]] = trials or [(None, None)] * len(shifts)
    rows = [
        {"shift": shift, "suffix": f"{shift:0{ID_DIGITS}x}", "trial_id": old, "new_trial_id": new}
        for shift, (old, new) in zip(shifts, of, strict=True)
    ]
    if rows:
        connection.execute(COPIES.insert(), rows)


def _key(table: Table) -> str:
    (column,) = table.primary_key.columns
    return str(column.name)


def _renamed(identifier: Any, *, after: int = 0) -> Any:
    """Return an id as it is in the copy; after it come so many other characters."""
    length = func.length(identifier)
    begin = func.substr(identifier, 1, length - ID_DIGITS - after)
    return begin.concat(COPIES.c.suffix).concat(func.substr(identifier, length - after + 1))


def _insert(connection: Connection, table: Table, changes: Mapping[str, Any], where: Any) -> None:
    """Copy those rows of a table, with changes: an expression by column, None: one of its own."""
    names = [column.name for column in table.columns]
    taken = {name: changes.get(name, table.c[name]) for name in names}
    given = {name: value for name, value in taken.items() if value is not None}
    rows = select(*given.values()).join_from(table, COPIES, sqlalchemy.true()).where(where)
    connection.execute(table.insert().from_select(list(given), rows, include_defaults=False))
