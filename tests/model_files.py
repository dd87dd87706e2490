"""A stored model's files, taken apart and put together again, for tests of models tampered with."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

PROGRAM = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"
EXAMPLE = "data/sample_inputs/model.pt"


def edit_description(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "MLmodel"
    content = yaml.safe_load(file.read_text())
    edit(content)
    file.write_text(yaml.safe_dump(content))


def edit_archive(folder: Path, edit: Callable[[dict[str, bytes]], object]) -> None:
    file = folder / "data" / "model.pt2"
    with zipfile.ZipFile(file) as archive:
        records = {entry.partition("/")[2]: archive.read(entry) for entry in archive.namelist()}
    edit(records)
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in records.items():
            archive.writestr(f"archive/{name}", content)


def edit_program(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    def edit_record(records: dict[str, bytes]) -> None:
        content = json.loads(records[PROGRAM])
        edit(content)
        records[PROGRAM] = json.dumps(content).encode()

    edit_archive(folder, edit_record)


def records_of(archive: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(archive)) as reader:
        return {entry.partition("/")[2]: reader.read(entry) for entry in reader.namelist()}


def zipped(records: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, record in records.items():
            archive.writestr(f"archive/{name}", record)
    return content.getvalue()
