"""Writing and hashing files so that a reader never meets half a file; reading JSON that others wrote."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import math
import os
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_BYTES = 1 << 28
MAX_DEPTH, MAX_WHOLE = 50, 10**100
"""Of JSON that is read. A hundred times such a whole number is still a float; of 10**308, which is one, it is none."""
JsonObject = dict[str, Any]
"""A JSON mapping whose keys are the business of whoever wrote it."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; on success fsync and rename it over `path`, else remove it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:6]}.tmp")
    try:
        yield tmp
        with open(tmp, "rb") as f:
            os.fsync(f.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


@contextlib.contextmanager
def probing(folder: Path) -> Iterator[Path]:
    """Make a folder and yield a file written in it; afterwards both are gone, unless the folder was there or is used.
    Raises OSError: it cannot be made or written."""
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    probe = folder / f".probe.{os.getpid()}"
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe.write_text("")
        except FileNotFoundError:  # another process that probed the same new folder removed it
            folder.mkdir(parents=True, exist_ok=True)
            probe.write_text("")
        yield probe
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, UTF-8."""
    with writing(path) as tmp:
        tmp.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON atomically: NaN and infinities are written as null."""
    write_text(path, json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """Reduce to what strict JSON holds: dicts, lists, str, int, float, bool, None."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int, bool)):
        return value
    if hasattr(value, "item"):
        return plain(value.item())
    return str(value)


def digest(value: Any) -> str:
    """sha256 of the canonical JSON of a value, 16 hex digits."""
    text = json.dumps(plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sha256(path: Path) -> str:
    """Of a file's bytes, 64 hex digits."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def file_digest(path: Path) -> str:
    """The first 16 hex digits of a file's sha256."""
    return sha256(path)[:16]


def installed(package: str, name: str) -> Path | None:
    """A file of an installed package, found without importing it; None where it is not there."""
    spec = importlib.util.find_spec(package)
    places = (Path(folder) / name for folder in ((spec.submodule_search_locations or []) if spec else []))
    return next((path for path in places if path.is_file()), None)


def honour_umask(folder: Path) -> None:
    """Give every file of a folder the rights a plain `open` would (safetensors writes files only their owner reads)."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)


def plain_file(path: Path) -> Path:
    """The path of a file, or of a folder, which refuses itself. Raises OSError: there is none; ValueError: a pipe or a
    device, where reading waits for ever or finds no end."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise ValueError("it is a pipe or a device; expected a file")
    return path


def no_file(path: Path) -> str | None:
    """Why there is no file to be read at a path, as a sentence; or None."""
    if path.is_file():
        return None
    return ("it is a folder." if path.is_dir() else "it is a pipe or a device." if path.exists()
            else "there is no such file.")


def read_text(path: Path) -> str:
    """UTF-8, with or without a byte order mark. Raises OSError / ValueError: as `plain_file`; not UTF-8, or over
    MAX_BYTES."""
    if plain_file(path).stat().st_size > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES >> 20} MiB")
    return path.read_text(encoding="utf-8-sig")


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: as `read_text`; no JSON, a key twice, NaN or an infinity, half a surrogate pair (no text that can
            be written), nested deeper than MAX_DEPTH.
    """
    text = read_text(path)
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_not_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check_values(value, MAX_DEPTH)
    if "\\ud" in text or "\\uD" in text:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:60]!r} stands twice in one object")
    return out


def _not_finite(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def _check_values(value: Any, left: int) -> None:
    if isinstance(value, (dict, list)):
        if left == 0:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        for part in value.values() if isinstance(value, dict) else value:
            _check_values(part, left - 1)
    elif (isinstance(value, float) and not math.isfinite(value)) or (isinstance(value, int) and abs(value) > MAX_WHOLE):
        raise ValueError("a number is too large")
