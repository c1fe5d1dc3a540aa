"""What a cache folder holds and how it is made smaller: entries of known stages; anything else is never touched.

A folder without a marker is taken over when everything in it has the form of a cache's files (older versions wrote
none), else refused. Links are not followed and not removed, except one in the place of a stale temporary file.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from filelock import Timeout

from slm_exp.core.cache import journal
from slm_exp.core.errors import ConfigError
from slm_exp.core.files import file_digest, write_text
from slm_exp.core.locks import Lock

STAGES = ("model", "calibrate", "similarity", "plan", "scores", "latency", "width", "recover", "evaluate")
"""The folders of a cache that hold entries."""
MEMORIES = ("digests", "speed")
"""The folders of a cache that hold small files `<16 hex digits>.json`."""
MARKER, MANIFEST = "CACHEDIR.TAG", "manifest.json"
OWN = "# This is the stage cache of slm_exp."
TAG = ("Signature: 8a477f597d28d172789f06886806bc55\n"  # of the Cache Directory Tagging Specification: backups skip it
       f"{OWN} `slm cache` shows and prunes it; what is removed is computed again.\n")
KEY = re.compile(r"[0-9a-f]{16}")
TEMPORARY = re.compile(r"\..+\.\d+(\.[0-9a-z]{1,6})?\.tmp")
LOCK = re.compile(r"\.[0-9a-f]{16}\.lock")
STALE_S = 86400
"""A temporary or lock file this old belongs to a process that is gone."""


def default_cache_dir() -> str:
    """`$SLM_EXP_CACHE`, else `$XDG_CACHE_HOME/slm_exp`, else `~/.cache/slm_exp`."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return os.environ.get("SLM_EXP_CACHE") or str(Path(home) / "slm_exp")


@dataclass(frozen=True)
class Entry:
    """One stored result."""

    path: Path
    bytes: int
    used: float
    """When it was written or last read, seconds since 1970."""

    @property
    def stage(self) -> str:
        return self.path.parent.name


@dataclass(frozen=True)
class Pruned:
    """What pruning removed, or would."""

    entries: int
    stale: int
    bytes: int
    left: int
    """Entries that stay, those in use among them."""
    in_use: int = 0
    """Entries that were to go and are being computed, or cannot be removed."""


def is_marked(folder: Path) -> bool:
    """Whether a folder has the marker that this package writes."""
    try:
        return _is(folder / MARKER, stat.S_ISREG) and OWN in (folder / MARKER).read_text(encoding="utf-8")[: len(TAG)]
    except (OSError, ValueError):
        return False


def mark(folder: Path) -> None:
    """Make a folder known as a cache, unless it holds anything else; raises OSError where it cannot be written."""
    if not is_marked(folder) and (not folder.exists() or foreign(folder) is None):
        write_text(folder / MARKER, TAG)


def require_cache(folder: Path, setting: str) -> None:
    """Refuse a folder that is not a cache: nothing in it is looked at as an entry, nothing is removed. Raises
    ConfigError: names `setting` and the first thing that has no place in a cache."""
    if not is_marked(folder) and (other := foreign(folder)) is not None:
        raise ConfigError(f"{setting} = {folder}; expected a cache folder of slm_exp. This one has no {MARKER} of it "
                          f"and holds {other.relative_to(folder)}, so nothing in it was touched. Name the folder that "
                          "cache.dir or $SLM_EXP_CACHE named in runs.")


def foreign(folder: Path) -> Path | None:
    """The first thing in an unmarked folder that a cache does not hold; None where there is none."""
    for top in sorted(folder.iterdir()):
        if top.name in (*STAGES, *MEMORIES) and _is(top, stat.S_ISDIR):
            for path in sorted(top.iterdir()):
                if top.name in STAGES and KEY.fullmatch(path.name) and _is(path, stat.S_ISDIR):
                    known = any((path / name).is_file() for name in (MANIFEST, journal.FILE))
                else:
                    known = bool(top.name in MEMORIES and path.suffix == ".json" and KEY.fullmatch(path.stem))
                if not known and not TEMPORARY.fullmatch(path.name) and not LOCK.fullmatch(path.name):
                    return path
        elif not TEMPORARY.fullmatch(top.name):
            return top
    return None


def find_entries(folder: Path) -> list[Entry]:
    """Every entry of a cache, least recently used first. Cost: one look at every file."""
    return sorted((Entry(path, size_of(path), status.st_mtime) for path, status in _within(folder, STAGES)
                   if KEY.fullmatch(path.name) and stat.S_ISDIR(status.st_mode)), key=lambda entry: entry.used)


def find_stale(folder: Path) -> list[Path]:
    """Temporary files and folders that killed processes left, and locks of entries that are gone; older than a day."""
    before = time.time() - STALE_S
    return [path for path, status in _within(folder, (*STAGES, *MEMORIES))
            if status.st_mtime < before and (TEMPORARY.fullmatch(path.name)
            or (LOCK.fullmatch(path.name) and not path.with_name(path.name[1:17]).exists()))]


def size_of(path: Path) -> int:
    """Bytes of a file, or of the files below a folder. Follows no links."""
    total = 0
    for at in [path, *(Path(folder, name) for folder, _, names in os.walk(path) for name in names)]:
        with contextlib.suppress(OSError):  # removed while we look
            total += at.lstat().st_size if _is(at, stat.S_ISREG) else 0
    return total


def remove(entry: Path) -> bool:
    """Remove an entry by one rename, so that no reader meets half of it. False: it is in use or cannot be removed."""
    if entry.parent.name not in STAGES or not KEY.fullmatch(entry.name) or not _is(entry, stat.S_ISDIR):
        return False
    lock = Lock(entry.with_name(f".{entry.name}.lock"))
    try:
        with lock.held(timeout=0):
            trash = entry.with_name(f".{entry.name}.{os.getpid()}.tmp")
            entry.rename(trash)
            shutil.rmtree(trash, ignore_errors=True)
            # a process that has opened it and not yet locked it computes the same result beside another: harmless
            lock.path.unlink(missing_ok=True)
    except (Timeout, OSError):
        return False
    return True


def prune(folder: Path, older_than: float | None, max_size: float | None, dry_run: bool = False) -> Pruned:
    """Remove what was last used more than `older_than` seconds ago, then the least recently used entries until
    `max_size` bytes hold; always what killed processes left behind."""
    kept = find_entries(folder)
    before = time.time() - older_than if older_than is not None else 0.0
    going = [entry for entry in kept if entry.used < before]
    kept = kept[len(going) :]
    while max_size is not None and kept and sum(entry.bytes for entry in kept) > max_size:
        going.append(kept.pop(0))
    stale = find_stale(folder)
    freed = sum(entry.bytes for entry in going) + sum(map(size_of, stale))
    if dry_run:
        return Pruned(len(going), len(stale), freed, len(kept))
    if going or kept:
        with contextlib.suppress(OSError):
            mark(folder)  # a cache of an older version: known from now on
    in_use = [entry for entry in going if not remove(entry.path)]
    for path in stale:
        shutil.rmtree(path, ignore_errors=True) if _is(path, stat.S_ISDIR) else path.unlink(missing_ok=True)
    return Pruned(len(going) - len(in_use), len(stale), freed - sum(entry.bytes for entry in in_use),
                  len(kept) + len(in_use), len(in_use))


def problem(entry: Path, digest_of: Callable[[Path], str] | None = file_digest) -> str | None:
    """What is wrong with an entry on disk, or None. `digest_of`: how files are read for their digest; None compares
    sizes alone."""
    if (entry / journal.FILE).is_file():
        damaged = journal.read(entry)[1]
        return f"{damaged} lines of {journal.FILE} are damaged" if damaged else None
    try:
        files = stored_files(entry)
    except (OSError, ValueError) as error:
        return f"manifest unreadable ({type(error).__name__})"
    for name, (size, digest) in files.items():
        path = entry / name
        if not path.is_file():
            return f"{name} is missing"
        try:
            if (has := path.stat().st_size) != size:
                return f"{name} has {has} bytes, not {size}"
            if digest_of is not None and digest_of(path) != digest:
                return f"{name} has other contents than written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def stored_files(entry: Path) -> dict[str, tuple[int, str]]:
    """Name -> (bytes, digest) of an entry's files, as its manifest says. Raises OSError / ValueError: the manifest is
    not there, or is not one."""
    try:
        about = json.loads((entry / MANIFEST).read_text(encoding="utf-8"))["files"]
        files = {str(name): (int(f["bytes"]), str(f["digest"])) for name, f in about.items()}
    except (KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(f"{entry}: not a manifest ({type(error).__name__}: {error})") from error
    if any(PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts for name in files):
        raise ValueError(f"{entry}: names files outside")
    return files


def _within(folder: Path, tops: tuple[str, ...]) -> Iterator[tuple[Path, os.stat_result]]:
    """What lies in the named folders that are no links, with its own status (a link's, not its target's)."""
    for top in (folder / name for name in tops):
        for path in top.iterdir() if _is(top, stat.S_ISDIR) else ():
            try:
                yield path, path.lstat()
            except OSError:  # removed while we look
                continue


def _is(path: Path, kind: Callable[[int], bool]) -> bool:
    """Whether a path itself, not what it may link to, is of a kind."""
    try:
        return kind(path.lstat().st_mode)
    except OSError:
        return False
