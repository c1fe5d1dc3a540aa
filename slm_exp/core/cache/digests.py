"""Digests of files. Large ones are computed once: remembered by (path, size, mtime, ctime, inode) in the cache folder.

ctime, which no program can set, tells of an edit that keeps size and mtime (rsync -t --inplace, touch -r). A file that
changed a moment ago is not remembered, for a second change could fall on the same tick of the clock.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from slm_exp.core.cache.folder import default_cache_dir, mark
from slm_exp.core.files import digest, file_digest, write_json

SMALL = 64 * 2**20
"""Bytes; a file below is read once by every process."""
SETTLED_NS = 2 * 10**9
"""Nanoseconds since its last change after which a file's digest is remembered."""


class Status(NamedTuple):
    """What tells a file's contents from others it had or may have."""

    path: str
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int


_folder: Path | None = None
_seen: dict[Status, str] = {}


def remember_in(folder: Path | None) -> None:
    """From now on keep digests in this cache folder; None: in the default one. The latest call decides."""
    global _folder
    _folder = folder


def content_digest(path: Path) -> str:
    """sha256 of a file's bytes, 16 hex digits. A large file that is as remembered is not read. Raises OSError."""
    status = status_of(path)
    if (value := _remembered(status)) is not None:
        return value
    value = file_digest(path)
    if time.time_ns() - max(status.mtime_ns, status.ctime_ns) >= SETTLED_NS:
        _seen[status] = value
        if status.size >= SMALL:
            with contextlib.suppress(OSError):  # a cache that cannot be written only costs time
                mark(_memory(status).parent.parent)
                write_json(_memory(status), {**status._asdict(), "digest": value})
    return value


def must_be_read(path: Path) -> bool:
    """Whether `content_digest` would read a large file. Raises OSError: the file is not there."""
    status = status_of(path)
    return status.size >= SMALL and _remembered(status) is None


def files_digest(files: Iterable[Path], root: Path) -> str:
    """One digest over several files' names (relative to `root`) and contents, 16 hex digits; order does not matter."""
    return digest({f.relative_to(root).as_posix(): content_digest(f) for f in files})


def recalled(name: str) -> dict[str, str]:
    """What `remember` kept under a name; nothing where that is not whole."""
    try:
        kept = json.loads(_place(name).read_text(encoding="utf-8"))
        if kept["digest"] == digest(kept["values"]):
            return dict(kept["values"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return {}


def remember(name: str, values: dict[str, str]) -> None:
    """Keep values of a pure function in the cache folder. One that cannot be written only costs time."""
    with contextlib.suppress(OSError):
        mark(_place(name).parent.parent)
        write_json(_place(name), {"name": name, "values": values, "digest": digest(values)})


def _place(name: str) -> Path:
    return (_folder or Path(default_cache_dir())) / "digests" / f"{digest(name)}.json"


def status_of(path: Path) -> Status:
    """Of a file as it is now. Raises OSError."""
    path = path.resolve()
    stat = path.stat()
    return Status(str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


def _memory(status: Status) -> Path:
    return _place(status.path)


def _remembered(status: Status) -> str | None:
    if status in _seen or status.size < SMALL:
        return _seen.get(status)
    try:
        kept = json.loads(_memory(status).read_text(encoding="utf-8"))
        if all(kept[name] == value for name, value in status._asdict().items()):
            return str(kept["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None
