"""`slm cache`: what the stage cache holds, how to make it smaller, whether it is whole."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import click

from slm_exp.cli.command import FOLDER, command
from slm_exp.core.cache import folder as cache_folder
from slm_exp.core.cache.folder import Entry, default_cache_dir, find_entries, find_stale
from slm_exp.core.errors import ConfigError
from slm_exp.core.format import human, printable

SIZES = {"b": 1.0} | {f"{letter}{form}": base**n for n, letter in enumerate("kmgt", 1)
                               for form, base in (("", 1e3), ("b", 1e3), ("ib", 2.0**10))}
"""20G and 20GB are 20 10^9 bytes, 20GiB is 20 2^30. A number alone is none: 20 for 20GB would remove everything."""
AGES = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


def age(when: float) -> str:
    """How long ago, in the largest unit that fits."""
    seconds = max(0.0, time.time() - when)
    unit = next((u for u in ("w", "d", "h", "m") if seconds >= AGES[u]), "s")
    return f"{seconds / AGES[unit]:.0f}{unit}"


def _quantity(text: str, units: dict[str, float], field: str, example: str) -> float:
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)", text.strip().lower())
    if not found or found[2] not in (units if float(found[1]) else {"", *units}):
        raise ConfigError(f"{field} = {printable(text)}; expected a number and one of "
                          f"{', '.join(filter(None, units))}, like {example}.")
    return float(found[1]) * units.get(found[2], 0.0)


def folder_of(where: Path | None) -> Path:
    """The cache's folder; the command ends here where it is the default one and no run has used it yet. Raises
    ConfigError: the folder that was named is not there, or is no cache."""
    folder = Path(where or default_cache_dir()).expanduser()
    if folder.is_dir():
        cache_folder.require_cache(folder, "--dir" if where else "$SLM_EXP_CACHE")
        return folder
    if where is not None:
        raise ConfigError(f"--dir = {where}; expected the cache folder that cache.dir or $SLM_EXP_CACHE named in runs.")
    print(f"{folder}: empty, no run has used it yet")
    raise click.exceptions.Exit(0)


def _remember(ctx: click.Context, param: click.Parameter, where: Path | None) -> None:
    ctx.obj = where or ctx.obj


FOLDER_OPTION = click.option("--dir", metavar="DIR", type=FOLDER, expose_value=False, callback=_remember,
                             help="cache folder (default: $SLM_EXP_CACHE or ~/.cache/slm_exp)")


@command(
    "cache", __doc__, group=True,
    examples={"slm cache": "entries, size and last use by stage",
              "slm cache prune --older-than 30d --max-size 20GB": "by age, then the least recently used",
              "slm cache prune --max-size 20GB --dry-run": "say what would go",
              "slm cache verify --repair": "read everything, remove what is damaged"},
    exits={0: "done", 1: "verify found damage that stays", 2: "a wrong call"},
    notes="The folder is --dir, else $SLM_EXP_CACHE, else ~/.cache/slm_exp. A run computes what is not there.")
@FOLDER_OPTION
@click.pass_context
def main(ctx: click.Context) -> int:
    return ctx.invoke(show) if ctx.invoked_subcommand is None else 0  # type: ignore[no-any-return]


@main.command("show", help="entries, size and last use by stage (the default)")
@FOLDER_OPTION
@click.pass_obj
def show(where: Path | None) -> int:
    folder = folder_of(where)
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


@main.command("prune", help="remove by age, then by size, least recently used first")
@click.option("--older-than", metavar="AGE", help="last used longer ago than this, e.g. 30d, 12h")
@click.option("--max-size", metavar="SIZE", help="keep at most this much, e.g. 20GB")
@click.option("--dry-run", is_flag=True, help="say what would go")
@FOLDER_OPTION
@click.pass_obj
def _prune(where: Path | None, older_than: str | None, max_size: str | None, dry_run: bool) -> int:
    folder = folder_of(where)
    older = _quantity(older_than, AGES, "--older-than", "30d") if older_than is not None else None
    size = _quantity(max_size, SIZES, "--max-size", "20GB") if max_size is not None else None
    if older is None and size is None and not find_stale(folder):
        raise ConfigError("slm cache prune needs --older-than, --max-size or both.")
    done = cache_folder.prune(folder, older, size, dry_run)
    what = f"{done.entries} entries and {done.stale} stale temporary files, {human(done.bytes)}"
    stay = f" ({done.in_use} in use, or the folder cannot be written)" if done.in_use else ""
    left = f"; {done.left} entries are left{stay}"
    print(f"would remove {what}" if dry_run else f"removed {what}{left}")
    return 0


@main.command("verify", help="read everything and compare digests")
@click.option("--repair", is_flag=True, help="remove damaged entries")
@FOLDER_OPTION
@click.pass_obj
def _verify(where: Path | None, repair: bool) -> int:
    """Exit status 1 when an entry is damaged and stays."""
    entries = find_entries(folder_of(where))
    damaged = [(entry, problem) for entry in entries if (problem := cache_folder.problem(entry.path))]
    stay = 0
    for entry, problem in damaged:
        print(f"damaged: {entry.path}: {problem}", file=sys.stderr)
        stay += not (repair and cache_folder.remove(entry.path))
    done = "removed" if not stay else "a run that needs one computes it again; --repair removes them now"
    print(f"{len(entries)} entries, {human(sum(e.bytes for e in entries))} read, {len(damaged)} damaged"
          + (f" ({done})" if damaged else ""))
    return int(stay > 0)
