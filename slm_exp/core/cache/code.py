"""The code and libraries that compute a stage, as part of its key: what an edit there makes stale, and nothing else."""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from slm_exp.core.cache.digests import recalled, remember
from slm_exp.core.files import digest

PACKAGE = Path(__file__).resolve().parents[2]
LOGGERS = ("log", "logger", "logging", "warnings")
LEVELS = ("debug", "info", "warning", "warn", "error", "exception", "critical")

KEPT = 4096
"""Syntax trees whose digests are remembered."""


@dataclass(frozen=True)
class Code:
    """What computes a stage."""

    files: tuple[str, ...]
    """Files of the package, relative to it; a folder stands for all of its files."""
    libraries: tuple[str, ...] = ("torch", "transformers")
    """Distributions whose version decides the result too."""


def code_digest(files: Sequence[str]) -> str:
    """Digest of the syntax trees of files of the package, 16 hex digits; an edit of code there changes it.

    Comments, docstrings and calls that only log do not count. A folder stands for all files below it.
    """
    known = len(_trees())
    out = {name: tree_digest(PACKAGE / name) for name in code_files(files)}
    if len(_trees()) > known:
        remember(_recipe(), dict(list(_trees().items())[-KEPT:]))
    return digest(out)


def tree_digest(path: Path) -> str:
    """Of one file's syntax tree, as `code_digest` sees it."""
    status = path.stat()
    return _tree_digest(path, status.st_mtime_ns, status.st_size)


def code_files(names: Sequence[str]) -> set[str]:
    """Every file that declared files and folders stand for, relative to the package."""
    paths: set[Path] = set()
    for name in names:
        path = PACKAGE / name
        paths |= set(path.rglob("*.py")) if path.is_dir() else {path}
    return {path.relative_to(PACKAGE).as_posix() for path in paths}


def package_digest() -> str:
    """Of every file of the package."""
    return code_digest(["."])


def library_versions(names: Sequence[str] = ("torch", "transformers")) -> dict[str, str | None]:
    """Installed versions, without importing anything."""
    return {name: _version(name) for name in names}


@cache
def _version(name: str) -> str | None:
    """Read once: a process goes on with what it has imported."""
    try:
        return version(name.replace("_", "-"))
    except PackageNotFoundError:
        return None


@lru_cache(maxsize=1024)
def _tree_digest(path: Path, mtime_ns: int, size: int) -> str:
    source, trees = path.read_bytes(), _trees()
    name = hashlib.sha256(source).hexdigest()
    if name not in trees:
        tree = _Computing().visit(ast.parse(source))
        trees[name] = hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]
    return trees[name]


@lru_cache(maxsize=1)
def _trees() -> dict[str, str]:
    """Digests of syntax trees by those of the sources, as far as this or an earlier process parsed them: parsing the
    package takes a second."""
    return recalled(_recipe())


@lru_cache(maxsize=1)
def _recipe() -> str:
    """Of what a tree's digest depends on beside the source."""
    return f"syntax trees, {sys.version}, {hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}"


class _Computing(ast.NodeTransformer):
    """Leaves of a syntax tree what computes: no docstrings, no statements that only log or warn."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        match node.value:
            case ast.Constant(value=str()):
                return None
            case ast.Call(func=ast.Attribute(value=ast.Name(id=logger), attr=level)):
                return None if logger in LOGGERS and level in LEVELS else node
        return node
