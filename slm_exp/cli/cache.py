"""`slm cache`: what the stage cache holds, how to make it smaller, whether it is whole."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slm_exp.cli.parser import Parser
from slm_exp.core.cache.store import StageStore
from slm_exp.core.errors import ConfigError

UNITS = {"k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
AGES = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
ABANDONED_S = 86400
"""A half-written entry this old belongs to a process that is gone."""


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


def find_entries(folder: Path) -> list[Entry]:
    """Every entry of a cache folder, least recently used first. Cost: one look at every file."""
    found = (p for p in folder.glob("*/*") if p.is_dir() and not p.name.startswith("."))
    return sorted((Entry(p, size_of(p), p.stat().st_mtime) for p in found), key=lambda e: e.used)


def find_leavings(folder: Path) -> list[Path]:
    """Half-written entries and files that killed processes left, older than a day."""
    before = time.time() - ABANDONED_S
    return [p for p in folder.glob("*/.*.tmp") if p.stat().st_mtime < before]


def size_of(folder: Path) -> int:
    """Bytes of the files below a folder."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:  # removed while we look
            continue
    return total


def remove(entry: Entry) -> bool:
    """Remove an entry, unless a process is computing it; by one rename, so that no reader meets half of it."""
    from filelock import FileLock, Timeout

    lock = FileLock(entry.path.with_name(f".{entry.path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    try:
        grave = entry.path.with_name(f".{entry.path.name}.{os.getpid()}.tmp")
        entry.path.rename(grave)
        shutil.rmtree(grave, ignore_errors=True)
    finally:
        lock.release()
    return True


def show(folder: Path) -> int:
    """Print entries, bytes and last use by stage."""
    entries = find_entries(folder)
    print(f"{folder}: {len(entries)} entries, {human(sum(e.bytes for e in entries))}")
    by_stage: dict[str, list[Entry]] = {}
    for entry in entries:
        by_stage.setdefault(entry.stage, []).append(entry)
    for stage, mine in sorted(by_stage.items(), key=lambda kv: -sum(e.bytes for e in kv[1])):
        ages = f"used {age(mine[-1].used)} to {age(mine[0].used)} ago"
        print(f"  {stage:<12} {len(mine):>6} entries {human(sum(e.bytes for e in mine)):>10}   {ages}")
    if leavings := find_leavings(folder):
        print(f"  {len(leavings)} half-written entries of processes that are gone; slm cache prune removes them")
    return 0


def prune(folder: Path, older_than: float | None, max_size: float | None, dry_run: bool) -> int:
    """Remove what was last used more than `older_than` seconds ago, then the least recently used until
    `max_size` bytes hold; always what killed processes left behind."""
    entries = find_entries(folder)
    before = time.time() - older_than if older_than is not None else 0.0
    doomed = [e for e in entries if e.used < before]
    kept = [e for e in entries if e.used >= before]
    while max_size is not None and kept and sum(e.bytes for e in kept) > max_size:
        doomed.append(kept.pop(0))
    leavings = find_leavings(folder)
    freed = sum(e.bytes for e in doomed) + sum(size_of(p) for p in leavings)
    if dry_run:
        print(f"would remove {len(doomed)} entries and {len(leavings)} leavings, {human(freed)}")
        return 0
    in_use = [e for e in doomed if not remove(e)]
    for path in leavings:
        shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True)
    freed -= sum(e.bytes for e in in_use)
    print(
        f"removed {len(doomed) - len(in_use)} entries and {len(leavings)} leavings, {human(freed)}; "
        f"{len(kept) + len(in_use)} entries are left" + (f" ({len(in_use)} in use)" if in_use else "")
    )
    return 0


def verify(folder: Path, repair: bool) -> int:
    """Read every file and compare with what was written. Exit status 1 when an entry is damaged and stays."""
    entries = find_entries(folder)
    damaged = [(e, problem) for e in entries if (problem := StageStore.problem(e.path))]
    for entry, problem in damaged:
        print(f"damaged: {entry.path}: {problem}", file=sys.stderr)
        if repair:
            remove(entry)
    done = "removed" if repair else "a run that needs one computes it again; --repair removes them now"
    print(
        f"{len(entries)} entries, {human(sum(e.bytes for e in entries))} read, {len(damaged)} damaged"
        + (f" ({done})" if damaged else "")
    )
    return int(bool(damaged) and not repair)


def human(n: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} GB"


def age(when: float) -> str:
    """How long ago, in the largest unit that fits."""
    seconds = max(0.0, time.time() - when)
    unit = next((u for u in ("w", "d", "h", "m") if seconds >= AGES[u]), "s")
    return f"{seconds / AGES[unit]:.0f}{unit}"


def _quantity(text: str, units: dict[str, float], field: str, example: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z])?i?b?", text.strip().lower())
    if not found or (found.group(2) or "") not in {"", *units}:
        raise ConfigError(f"{field} = {text}; expected a number with a unit, like {example}.")
    return float(found.group(1)) * (units[found.group(2)] if found.group(2) else 1)


def parser() -> Parser:
    """The command line of `slm cache`."""
    p = Parser(
        "cache", __doc__,
        examples={
            "slm cache": "entries, size and last use by stage",
            "slm cache prune --older-than 30d --max-size 20GB": "by age, then the least recently used",
            "slm cache prune --max-size 20GB --dry-run": "say what would go",
            "slm cache verify --repair": "read everything, remove what is damaged",
        },
        exits={0: "done", 1: "verify found damage that stays", 2: "a wrong call"},
        notes="The folder is --dir, else $SLM_EXP_CACHE, else ~/.cache/slm_exp. A run computes what is not there.",
    )  # fmt: skip
    p.add_argument("--dir", help="cache folder (default: $SLM_EXP_CACHE or ~/.cache/slm_exp)")
    commands = p.add_subparsers(dest="command", metavar="show|prune|verify")
    commands.add_parser("show", help="entries, size and last use by stage (the default)")
    pruning = commands.add_parser("prune", help="remove by age, then by size, least recently used first")
    pruning.add_argument("--older-than", help="last used longer ago than this, e.g. 30d, 12h")
    pruning.add_argument("--max-size", help="keep at most this much, e.g. 20GB")
    pruning.add_argument("--dry-run", action="store_true", help="say what would go")
    checking = commands.add_parser("verify", help="read everything and compare digests")
    checking.add_argument("--repair", action="store_true", help="remove damaged entries")
    return p


def main(argv: Sequence[str]) -> int:
    """`slm cache [show | prune | verify]`. Exit status 1 when verify finds damage, 2 for a wrong call."""
    from slm_exp.core.cache.store import default_cache_dir

    args = parser().parse_args(list(argv))
    folder = Path(args.dir or default_cache_dir()).expanduser()
    if not folder.is_dir():
        if args.dir is None:
            print(f"{folder}: empty, no run has used it yet")
            return 0
        raise ConfigError(
            f"--dir = {folder}; expected the cache folder that cache.dir or $SLM_EXP_CACHE named in runs."
        )
    if args.command == "prune":
        older = _quantity(args.older_than, AGES, "--older-than", "30d") if args.older_than else None
        size = _quantity(args.max_size, UNITS, "--max-size", "20GB") if args.max_size else None
        if older is None and size is None and not find_leavings(folder):
            raise ConfigError("slm cache prune needs --older-than, --max-size or both.")
        return prune(folder, older, size, args.dry_run)
    if args.command == "verify":
        return verify(folder, args.repair)
    return show(folder)
