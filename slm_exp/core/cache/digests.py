"""Digests of big files, computed once: remembered by (path, size, mtime, inode) in the default cache folder."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from slm_exp.core.files import digest, file_digest, write_json


def content_digest(path: Path) -> str:
    """sha256 of a file's bytes, 16 hex digits. A file whose size, mtime and inode are as remembered is not read.

    The memory is one small JSON file a path under `digests/` of the default cache folder; one that cannot be
    written only costs time.

    Raises:
        OSError: the file is not there or cannot be read.
    """
    path = path.resolve()
    known_by, memory = _memory(path)
    if (value := remembered(path)) is not None:
        return value
    value = file_digest(path)
    with contextlib.suppress(OSError):
        write_json(memory, {**known_by, "digest": value})
    return value


def remembered(path: Path) -> str | None:
    """The digest of a file that was read before and is as it was; None where it would have to be read.

    Raises:
        OSError: the file is not there.
    """
    known_by, memory = _memory(path.resolve())
    try:
        kept = json.loads(memory.read_text(encoding="utf-8"))
        if {k: kept[k] for k in known_by} == known_by:
            return str(kept["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _memory(path: Path) -> tuple[dict[str, Any], Path]:
    """What a resolved path is known by, and the file that remembers its digest."""
    from slm_exp.core.cache.store import default_cache_dir

    stat = path.stat()
    known_by = {"path": str(path), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "inode": stat.st_ino}
    return known_by, Path(default_cache_dir()) / "digests" / f"{digest(str(path))}.json"


def files_digest(files: Iterable[Path], root: Path) -> str:
    """One digest over several files' names (relative to `root`) and contents, 16 hex digits; order does not matter."""
    return digest({f.relative_to(root).as_posix(): content_digest(f) for f in files})
