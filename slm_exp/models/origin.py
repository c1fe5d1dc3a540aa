"""What the hub knows of a model's source: repo, licence, languages; for the card of what is made of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from slm_exp.core.files import read_text

REPO = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Origin:
    """As the header of a model card has it; empty where nothing is known."""

    base_model: str = ""
    """A repo id on the hub."""
    license: str = ""
    """The hub's identifier, e.g. apache-2.0, gemma, other."""
    license_name: str = ""
    license_link: str = ""
    language: tuple[str, ...] = ()


def read_origin(folder: Path, repo: str = "") -> Origin:
    """From the header of a folder's README.md, as the hub and this package write them; anything malformed is left out.
    `repo`: where the folder came from; else the card's own `base_model` is taken, which compressed models have."""
    try:
        text = read_text(folder / "README.md")
        about: Any = yaml.safe_load(text.split("---\n", 2)[1]) if text.startswith("---\n") else {}
    except (OSError, ValueError, IndexError, RecursionError, yaml.YAMLError):
        about = {}
    about = about if isinstance(about, dict) else {}
    words = {name: str(about[name]) for name in ("license", "license_name", "license_link")
             if isinstance(about.get(name), str)}
    languages = about.get("language") or []
    languages = [languages] if isinstance(languages, str) else languages
    base = repo if REPO.fullmatch(repo) else str(about.get("base_model") or "")
    return Origin(base if REPO.fullmatch(base) else "", **words,
                  language=tuple(map(str, languages)) if isinstance(languages, list) else ())
