"""`slm cache`: what the stage cache holds, how to make it smaller, whether it is whole."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import click
from filelock import Timeout

from slm_exp.cli.command import FOLDER, command
from slm_exp.core.cache.store import StageStore, default_cache_dir
from slm_exp.core.errors import ConfigError
from slm_exp.core.locks import Lock

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


def find_stale(folder: Path) -> list[Path]:
    """Stale temporary files: half-written entries of killed processes, older than a day."""
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
    lock = Lock(entry.path.with_name(f".{entry.path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    try:
        aside = entry.path.with_name(f".{entry.path.name}.{os.getpid()}.tmp")
        entry.path.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
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
    if stale := find_stale(folder):
        print(f"  {len(stale)} half-written entries of processes that are gone; slm cache prune removes them")
    return 0


def prune(folder: Path, older_than: float | None, max_size: float | None, dry_run: bool) -> int:
    """Remove what was last used more than `older_than` seconds ago, then the least recently used until
    `max_size` bytes hold; always what killed processes left behind."""
    entries = find_entries(folder)
    before = time.time() - older_than if older_than is not None else 0.0
    to_delete = [e for e in entries if e.used < before]
    kept = [e for e in entries if e.used >= before]
    while max_size is not None and kept and sum(e.bytes for e in kept) > max_size:
        to_delete.append(kept.pop(0))
    stale = find_stale(folder)
    freed = sum(e.bytes for e in to_delete) + sum(size_of(p) for p in stale)
    if dry_run:
        print(f"would remove {len(to_delete)} entries and {len(stale)} stale temporary files, {human(freed)}")
        return 0
    in_use = [e for e in to_delete if not remove(e)]
    for path in stale:
        shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True)
    freed -= sum(e.bytes for e in in_use)
    print(
        f"removed {len(to_delete) - len(in_use)} entries and {len(stale)} stale temporary files, {human(freed)}; "
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


FOLDER_OPTION = click.option("--dir", "where", metavar="DIR", type=FOLDER,
                             help="cache folder (default: $SLM_EXP_CACHE or ~/.cache/slm_exp)")


@command(
    "cache", __doc__, group=True,
    examples={
        "slm cache": "entries, size and last use by stage",
        "slm cache prune --older-than 30d --max-size 20GB": "by age, then the least recently used",
        "slm cache prune --max-size 20GB --dry-run": "say what would go",
        "slm cache verify --repair": "read everything, remove what is damaged",
    },
    exits={0: "done", 1: "verify found damage that stays", 2: "a wrong call"},
    notes="The folder is --dir, else $SLM_EXP_CACHE, else ~/.cache/slm_exp. A run computes what is not there.",
)  # fmt: skip
@FOLDER_OPTION
@click.pass_context
def main(ctx: click.Context, where: Path | None) -> int:
    """See `slm cache --help`."""
    ctx.obj = where
    return _show(where) if ctx.invoked_subcommand is None else 0


@main.command("show", help="entries, size and last use by stage (the default)")
@FOLDER_OPTION
@click.pass_obj
def _show_command(above: Path | None, where: Path | None) -> int:
    return _show(where or above)


def _show(where: Path | None) -> int:
    folder = cache_folder(where)
    if folder is None:
        print(f"{default_cache_dir()}: empty, no run has used it yet")
        return 0
    return show(folder)


@main.command("prune", help="remove by age, then by size, least recently used first")
@click.option("--older-than", metavar="AGE", help="last used longer ago than this, e.g. 30d, 12h")
@click.option("--max-size", metavar="SIZE", help="keep at most this much, e.g. 20GB")
@click.option("--dry-run", is_flag=True, help="say what would go")
@FOLDER_OPTION
@click.pass_obj
def _prune_command(
    above: Path | None, where: Path | None, older_than: str | None, max_size: str | None, dry_run: bool
) -> int:
    folder = cache_folder(where or above)
    if folder is None:
        return _show(None)
    older = _quantity(older_than, AGES, "--older-than", "30d") if older_than else None
    size = _quantity(max_size, UNITS, "--max-size", "20GB") if max_size else None
    if older is None and size is None and not find_stale(folder):
        raise ConfigError("slm cache prune needs --older-than, --max-size or both.")
    return prune(folder, older, size, dry_run)


@main.command("verify", help="read everything and compare digests")
@click.option("--repair", is_flag=True, help="remove damaged entries")
@FOLDER_OPTION
@click.pass_obj
def _verify_command(above: Path | None, where: Path | None, repair: bool) -> int:
    folder = cache_folder(where or above)
    return _show(None) if folder is None else verify(folder, repair)


def cache_folder(where: Path | None) -> Path | None:
    """The cache's folder; None where it is the default one and no run has used it yet.

    Raises:
        ConfigError: the folder that was named is not there.
    """
    folder = Path(where or default_cache_dir()).expanduser()
    if folder.is_dir():
        return folder
    if where is None:
        return None
    raise ConfigError(f"--dir = {folder}; expected the cache folder that cache.dir or $SLM_EXP_CACHE named in runs.")
