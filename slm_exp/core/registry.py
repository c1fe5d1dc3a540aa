"""One decorated file adds a component: `@register("kernel", "rbf")` on a dataclass is schema, default and code.

It is stored in Hydra's ConfigStore. Nothing in a config can name code: only registered classes exist. Files outside the
package add members in the same way, as plug-ins (core/plugins).
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from slm_exp.core import plugins
from slm_exp.core.errors import ConfigError, require

GROUPS = {  # config group -> package whose modules hold its members
    "model": "models", "calibration": "calibration", "kernel": "kernels", "similarity": "similarity",
    "method": "methods", "merge_rule": "merging.rules", "width": "width", "recovery": "recovery",
    "evaluation": "evaluation", "tracking": "runs.tracking", "runtime": "core.runtime",
}  # fmt: skip

Fields = dict[str, Any]
"""Named values that JSON can hold: what distinguishes a component's results, or a config's fields."""

_members: dict[str, dict[str, type[Component]]] = {group: {} for group in GROUPS}


@dataclasses.dataclass
class Component:
    """Base of every member of a config group: a dataclass whose fields are its settings.

    `check()` refuses bad values and runs when the config becomes an object, before anything loads.
    A field with `metadata={"science": False}` (see `knob`) changes no result and stays out of the run_id.
    """

    config_group: ClassVar[str] = ""
    name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise ConfigError on a bad field. Cheap: no files of weights, no heavy imports."""

    def at_least(self, least: float, *names: str, remedy: str = "") -> None:
        """Refuse numbers below `least`; a field that may be null may be. Raises ConfigError: the first, by name."""
        self._in_range(names, lambda value: value >= least, f">= {least:g}", remedy)

    def positive(self, *names: str, remedy: str = "") -> None:
        """Likewise, numbers that are not above 0."""
        self._in_range(names, lambda value: value > 0, "> 0", remedy)

    def _in_range(self, names: Iterable[str], ok: Callable[[Any], bool], wanted: str, remedy: str) -> None:
        kinds = {f.name: str(f.type) for f in dataclasses.fields(self)}
        for name in names:
            value, kind = getattr(self, name), kinds[name]
            number = f"{'null or ' * ('None' in kind)}a {'whole ' * ('int' in kind)}number"
            require(value is None or ok(value), f"{self.config_group}.{name}", value, f"{number} {wanted}", remedy)

    def in_force(self) -> list[str]:
        """What holds where its settings leave a choice open, a line each; for `--cfg job`."""
        return []

    def needs_resident(self) -> str | None:
        """Why this cannot work on a model whose layers stay in their files (runtime.memory=stream), or None. Known from
        the config alone."""
        return None

    def identity(self) -> Fields:
        """What distinguishes this component's results: its name and scientific fields; a path as a digest; and the
        digest of its code, where that lies outside this package."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata.get("science", True)}
        plugin = plugins.plugin_of(type(self))
        return {"name": self.name, **fields, **({"code": plugin.digest} if plugin else {})}


def knob(default: Any = dataclasses.MISSING, **kwargs: Any) -> Any:
    """A field that changes how a result is reached, never the result: left out of the run_id."""
    return dataclasses.field(default=default, metadata={"science": False}, **kwargs)


C = TypeVar("C", bound=Component)


def register(group: str, name: str) -> Callable[[type[C]], type[C]]:
    """Class decorator: make a dataclass the member `name` of a config group. Put it above `@dataclass`. Raises
    ConfigError: there is no such group, or another file has a member of that name."""

    def add(cls: type[C]) -> type[C]:
        from hydra.core.config_store import ConfigStore

        if group not in GROUPS:
            raise ConfigError(f"@register({group!r}, {name!r}): expected one of the groups {', '.join(GROUPS)}.")
        first = _members[group].get(name)
        if first is not None and first.__module__ != cls.__module__:
            raise ConfigError(f"@register({group!r}, {name!r}) in {cls.__module__}: {first.__module__} has a member of "
                              "that name. Choose another.")
        cls.config_group, cls.name = group, name
        _members[group][name] = cls
        ConfigStore.instance().store(group=group, name=name, node=cls)
        return cls

    return add


@cache
def load_all() -> None:
    """Import every module of every group's package that declares members, and the plug-ins. Idempotent, cheap: what
    only members need to work (and may import torch) stays unloaded."""
    for package_name in GROUPS.values():
        package = importlib.import_module(f"slm_exp.{package_name}")
        for folder in getattr(package, "__path__", []):
            for file in sorted(Path(folder).glob("*.py")):
                if "@register(" in file.read_text(encoding="utf-8"):
                    importlib.import_module(f"{package.__name__}.{file.stem}")
    plugins.load()


def foreign(members: Iterable[Component]) -> list[plugins.Plugin]:
    """The plug-ins that these members come from, each once."""
    return list(dict.fromkeys(plugin for member in members if (plugin := plugins.plugin_of(type(member)))))


def available(group: str) -> dict[str, type[Component]]:
    """Members of a group by name, as registered in code (presets in conf/ come on top)."""
    load_all()
    return dict(sorted(_members[group].items()))
