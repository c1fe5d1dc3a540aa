"""Read a W&B offline run back without a server.

A `.wandb` file is a LevelDB-style log: 7 bytes of header, then blocks of 32 KiB holding CRC-checked pieces of
protobuf records. Tried with wandb 0.31.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, 7
FULL, LAST = 1, 4


@dataclass
class OfflineRun:
    """What one offline run says about itself."""

    id: str = ""
    project: str = ""
    entity: str = ""
    group: str = ""
    name: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    exit_code: int | None = None
    """None: the process was killed."""


def records(path: Path) -> Iterator[Any]:
    """The whole records of a log; one cut off by a kill ends it."""
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    assert data[:4] == b":W&B", f"{path} is no .wandb file"
    position, piece = HEADER, b""
    while position + HEADER <= len(data):
        room = BLOCK - position % BLOCK
        if room < HEADER:
            position += room
            continue
        crc, length, kind = struct.unpack_from("<IHB", data, position)
        body = data[position + HEADER : position + HEADER + length]
        if len(body) < length or (length == 0 and kind == 0):
            return
        assert zlib.crc32(bytes([kind]) + body) == crc, f"{path}: damaged at byte {position}"
        position += HEADER + length
        piece += body
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(piece)
            piece = b""
            yield record


def read_run(folder: Path) -> OfflineRun:
    """Read `wandb/offline-run-*/` back."""
    (path,) = folder.glob("run-*.wandb")
    out = OfflineRun()
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            out.id, out.project, out.group, out.name = run.run_id, run.project, run.run_group, run.display_name
            out.tags, out.entity = list(run.tags), run.entity
            _put_all(out.config, run.config.update)
        elif kind == "config":
            _put_all(out.config, record.config.update)
        elif kind == "summary":
            _put_all(out.summary, record.summary.update)
        elif kind == "history":
            out.history.append(_put_all({}, record.history.item))
        elif kind == "files":
            out.files += [f.path for f in record.files.files]
        elif kind == "exit":
            out.exit_code = record.exit.exit_code
    return out


def offline_runs(folder: Path) -> list[OfflineRun]:
    """Every offline run of an experiment's folder, oldest first."""
    return [read_run(path) for path in sorted((folder / "wandb").glob("offline-run-*"))]


def _put_all(target: dict[str, Any], items: Any) -> dict[str, Any]:
    for item in items:
        *parents, last = list(item.nested_key) or [item.key]
        place = target
        for key in parents:
            place = place.setdefault(key, {})
        place[last] = json.loads(item.value_json)
    return target
