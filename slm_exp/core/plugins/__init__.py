"""Plug-ins: members of config groups in files and packages outside this one.

Named by entry points of the group `slm_exp`, by `--plugin FILE`, or by SLM_EXP_PLUGINS (several as in PATH), which
processes hand on to those they start; never by a config or a sweep's file. A file `mine.py` is imported as
`slm_exp.core.plugins.mine`, so that a job which is unpickled in another process finds its classes by their names.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Iterable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

from slm_exp.core.cache.code import tree_digest
from slm_exp.core.documents import Section
from slm_exp.core.errors import ConfigError, SlmError
from slm_exp.core.files import digest

VARIABLE = "SLM_EXP_PLUGINS"
OPTION = "--plugin"
GROUP = "slm_exp"
_loaded: dict[str, Plugin] = {}
"""By the name of their module."""
_ready = False
"""Whether the package's own members have loaded, so that a plug-in named from now on loads at once."""


class Plugin(Section):
    """One plug-in, as records and sweep.json name it."""

    name: str = ""
    file: str | None = None
    """Absolute; null for an installed package, which needs no naming on a command line."""
    digest: str = ""
    """Of the syntax trees of all its files, 16 hex digits; empty for code that has no file (a notebook's cell)."""
    version: str | None = None
    """The distribution's, or the module's `__version__`."""


def words(plugins: Iterable[Plugin]) -> list[str]:
    """What a command line needs to name them."""
    return [word for plugin in plugins if plugin.file for word in (OPTION, plugin.file)]


def take(argv: Sequence[str]) -> list[str]:
    """The words of a command line without `--plugin FILE` and `--plugin=FILE`, which are added to SLM_EXP_PLUGINS.
    Raises ConfigError: no FILE, or none that can be a plug-in."""
    rest, files, at = list[str](), list[str](), iter(argv)
    for word in at:
        if word == OPTION or word.startswith(f"{OPTION}="):
            files.append(next(at, "") if word == OPTION else word.partition("=")[2])
        else:
            rest.append(word)
    add(files)
    return rest


def add(files: Iterable[str | Path]) -> None:
    """Name files in SLM_EXP_PLUGINS; they load with the package's own members, or now where these have loaded. Raises
    ConfigError: a file is not there, has no name that Python could import, or cannot be loaded."""
    there = _named()
    for given in files:
        name, file = _checked(str(given))
        if there.setdefault(name, file) != file:
            raise ConfigError(f"{OPTION} {given}: {there[name]} has the same name. Rename one of them.")
    if there:
        os.environ[VARIABLE] = os.pathsep.join(map(str, there.values()))
    if _ready:
        load()


def load() -> None:
    """Import every plug-in that is named and not loaded yet, those of installed packages first. Raises ConfigError: one
    cannot be imported, or declares nothing; says which."""
    global _ready
    _ready = True
    for point in entry_points(group=GROUP):
        if point.module not in _loaded:
            what = f"the entry point {point.name} = {point.value}"
            code = _digest(_imported(point.module, what), what)
            _loaded[point.module] = Plugin(
                name=point.name, digest=code, version=point.dist.version if point.dist else None)
    for name, file in _named().items():
        if (module_name := f"{__name__}.{name}") not in _loaded:
            module = _imported(module_name, f"{OPTION} {file}")
            code, version = _digest(module, f"{OPTION} {file}"), getattr(module, "__version__", None)
            _loaded[module_name] = Plugin(
                name=name, file=str(file), digest=code, version=None if version is None else str(version))


def loaded() -> list[Plugin]:
    """Every plug-in of this process."""
    return [*_loaded.values()]


def plugin_of(kind: type) -> Plugin | None:
    """The plug-in that a class belongs to; None for a class of this package. Of a script or module that registers a
    member by itself, one made of its file; of a notebook's cell, one without file and digest."""
    if not _ready:  # a launcher's worker that unpickled a job has imported the class and nothing else
        load()
    module = kind.__module__
    for name, plugin in _loaded.items():
        if module == name or module.startswith(f"{name}."):
            return plugin
    if module.startswith("slm_exp."):
        return None
    try:
        file = Path(inspect.getfile(kind)).resolve()
    except (TypeError, OSError):  # a cell, or exec
        return Plugin(name=module)
    return Plugin(name=file.stem, file=str(file), digest=_tree(file)) if file.is_file() else Plugin(name=file.stem)


def _named() -> dict[str, Path]:
    """SLM_EXP_PLUGINS by the names to import them by."""
    return dict(map(_checked, filter(None, os.environ.get(VARIABLE, "").split(os.pathsep))))


def _checked(given: str) -> tuple[str, Path]:
    file = Path(given).expanduser().resolve()
    wanted = f"{OPTION} (or {VARIABLE}) {given or '(nothing)'}: expected a .py file, or a folder with __init__.py"
    if not given or not ((file.suffix == ".py" and file.is_file()) or (file / "__init__.py").is_file()):
        raise ConfigError(f"{wanted}; there is none.")
    name = re.sub(r"\W", "_", file.stem)
    if not name.isidentifier():
        raise ConfigError(f"{wanted}, named as Python can import it: letters, digits, underscores.")
    return name, file


def _imported(module: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except SlmError:
        raise
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(at.filename).name}, line {getattr(error, 'lineno', None) or at.lineno}"
        raise ConfigError(f"{what}: it cannot be loaded: {type(error).__name__}: {error} ({where}).") from error


def _digest(module: ModuleType, what: str) -> str:
    file = Path(module.__file__ or "")
    path = file.parent if file.name == "__init__.py" else file
    if not any("register(" in f.read_text(encoding="utf-8") for f in _files(path)):
        raise ConfigError(f"{what}: it declares nothing; expected classes under @register(GROUP, NAME), see "
                          "docs/plugins.md.")
    return _tree(path)


def _files(path: Path) -> list[Path]:
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


def _tree(path: Path) -> str:
    return digest({f.relative_to(path).as_posix(): tree_digest(f) for f in _files(path)})


class _Finder:
    """Finds `slm_exp.core.plugins.NAME` where SLM_EXP_PLUGINS says, and nothing beside it."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        package, _, last = name.rpartition(".")
        file = _named().get(last) if package == __name__ else None
        if file is None:
            return None
        inside = [str(file)] if file.is_dir() else None
        return importlib.util.spec_from_file_location(name, file / "__init__.py" if inside else file,
                                                      submodule_search_locations=inside)


sys.meta_path.append(_Finder)
