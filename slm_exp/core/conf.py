"""The config tree, and the layer sets in it that papers published."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from slm_exp.core.errors import ConfigError, did_you_mean

PUBLISHED = "published:"
"""What a `method.path` begins with that names a set of conf/published: published:SOURCE/MODEL/NAME."""


def conf_dir() -> Path:
    """The config tree: `conf/` of the checkout, or the copy inside the installed package."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise ConfigError(f"no conf/ beside or inside {package}; reinstall slm_exp.")


@cache
def published_sets() -> dict[str, Path]:
    """SOURCE/MODEL/NAME -> the plan's file."""
    root = conf_dir() / "published"
    return {str(path.relative_to(root).with_suffix("")): path for path in sorted(root.glob("*/*/*.json"))}


def published_file(name: str) -> Path:
    """The file of a published set. Raises ConfigError: there is none of that name; names the nearest."""
    sets = published_sets()
    if name not in sets:
        model = name.split("/")[1] if name.count("/") == 2 else ""
        there = [s for s in sets if f"/{model}/" in s] or sorted({"/".join((*s.split("/")[:2], "NAME")) for s in sets})
        raise ConfigError(f"method.path = {PUBLISHED}{name}; expected one of {', '.join(there)}. "
                          f"{did_you_mean(name, sets)}".rstrip())
    return sets[name]
