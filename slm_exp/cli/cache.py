"""`slm cache`: what the stage cache holds, how to make it smaller, whether it is whole."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from slm_exp.cli.parser import Parser
from slm_exp.core.cache import folder as cache_folder
from slm_exp.core.cache.folder import Entry, default_cache_dir, find_entries, find_stale
from slm_exp.core.errors import ConfigError

UNITS = {"k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
AGES = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


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
    """Remove entries by age, then by size, and what killed processes left behind."""
    done = cache_folder.prune(folder, older_than, max_size, dry_run)
    what = f"{done.entries} entries and {done.stale} stale temporary files, {human(done.bytes)}"
    if dry_run:
        print(f"would remove {what}")
    else:
        print(f"removed {what}; {done.left} entries are left" + (f" ({done.in_use} in use)" if done.in_use else ""))
    return 0


def verify(folder: Path, repair: bool) -> int:
    """Read every file and compare with what was written. Exit status 1 when an entry is damaged and stays."""
    entries = find_entries(folder)
    damaged = [(entry, problem) for entry in entries if (problem := cache_folder.problem(entry.path))]
    stay = 0
    for entry, problem in damaged:
        print(f"damaged: {entry.path}: {problem}", file=sys.stderr)
        stay += not (repair and cache_folder.remove(entry.path))
    done = "removed" if not stay else "a run that needs one computes it again; --repair removes them now"
    print(
        f"{len(entries)} entries, {human(sum(e.bytes for e in entries))} read, {len(damaged)} damaged"
        + (f" ({done})" if damaged else "")
    )
    return int(stay > 0)


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
    args = parser().parse_args(list(argv))
    folder = Path(args.dir or default_cache_dir()).expanduser()
    if not folder.is_dir():
        if args.dir is None:
            print(f"{folder}: empty, no run has used it yet")
            return 0
        raise ConfigError(
            f"--dir = {folder}; expected the cache folder that cache.dir or $SLM_EXP_CACHE named in runs."
        )
    cache_folder.require_cache(folder, "--dir" if args.dir else "$SLM_EXP_CACHE")
    if args.command == "prune":
        older = _quantity(args.older_than, AGES, "--older-than", "30d") if args.older_than else None
        size = _quantity(args.max_size, UNITS, "--max-size", "20GB") if args.max_size else None
        if older is None and size is None and not find_stale(folder):
            raise ConfigError("slm cache prune needs --older-than, --max-size or both.")
        return prune(folder, older, size, args.dry_run)
    if args.command == "verify":
        return verify(folder, args.repair)
    return show(folder)
