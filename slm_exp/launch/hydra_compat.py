"""Everything that touches Hydra's inside (1.3): another version of Hydra is a change of this file alone."""

from __future__ import annotations

import argparse
import itertools
import math
import re
import shlex
import string
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from typing import Any, NoReturn

from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.hydra import Hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.errors import ConfigCompositionException, HydraException
from hydra.plugins.config_source import ConfigSource
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from slm_exp.core.errors import ConfigError

HYDRA = ("hydra.", "hydra/")
"""What the overrides of Hydra's own settings start with; every other override is a job's."""


@contextmanager
def session(folder: str) -> Iterator[None]:
    """Hydra on a folder of configs, whether or not it is at work already."""
    instance = GlobalHydra.instance()
    before, instance.hydra = instance.hydra, None
    try:
        with initialize_config_dir(folder, version_base="1.3", job_name="slm_exp"):
            yield
    finally:
        GlobalHydra.instance().hydra = before


def set_values(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Apply overrides of values (not of groups) to a composed config, as composing does. Cost: below 1 ms each. Raises
    HydraException: as composing does."""
    try:
        ConfigLoaderImpl._apply_overrides_to_config([parse(o) for o in overrides], cfg)
    except OmegaConfBaseException as error:
        raise ConfigCompositionException from error


def without_hydra(cfg: DictConfig) -> DictConfig:
    """A copy of a composed config without Hydra's own node."""
    cfg = cfg.copy()
    with open_dict(cfg):
        cfg.pop("hydra", None)
    return cfg


@cache
def parse(override: str) -> Override:
    """One override. Raises HydraException where it is none."""
    return OverridesParser.create().parse_override(override)


def is_sweep(override: str) -> bool:
    """Whether an override names several values; False where it cannot be parsed."""
    try:
        return bool(parse(override).is_sweep_override())
    except HydraException:
        return False


def unreadable(overrides: Sequence[str]) -> str:
    """The first override that Hydra's grammar does not take; empty where it takes all."""
    for o in overrides:
        try:
            parse(o)
        except HydraException:
            return o
    return ""


def quoted(override: str) -> str:
    """`key=value` as a shell and Hydra both take it, whatever the value holds: 'key="value"'."""
    key, _, value = override.partition("=")
    value = value.replace("\\", r"\\").replace('"', r"\"")
    return shlex.quote(f'{key}="{value}"')


def axes(overrides: Sequence[str], intervals: bool = False) -> dict[str, Override]:
    """The overrides of a grid by key, the last of each key; `glob(...)` needs a `session`. `intervals`: whether they
    may stand among the values, as in a search."""
    loader = GlobalHydra.instance().config_loader() if GlobalHydra.instance().is_initialized() else None
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(list(overrides))
    for override in parsed:
        if override.is_sweep_override() and not (override.is_discrete_sweep() or intervals):
            raise HydraException(f"{override.input_line}: an interval is no grid; expected range(start,stop,step), or "
                                 f"a search in it: python -m slm_exp sweep=search '{override.input_line}'")
    return {o.get_key_element(): o for o in parsed}


def count(axis: Override) -> int:
    """How many values one override names, without listing a long range."""
    if not axis.is_sweep_override():
        return 1
    if isinstance(values := axis.value(), RangeSweep):
        start, stop, step = (Decimal(x) for x in (values.start or 0, values.stop or 0, values.step))
        if not step:
            raise HydraException(f"{axis.input_line}: a step of 0")
        n = max(0, math.ceil((stop - start) / step))
        if n > 10**5:  # fewer are listed below, with Hydra's own rounding
            return n
    return sum(1 for _ in axis.sweep_string_iterator())


def grid(axes: dict[str, Override]) -> list[list[str]]:
    """Every combination of values, the last axis fastest."""
    values = (axis.sweep_string_iterator() if axis.is_sweep_override() else [axis.get_value_element_as_str()]
              for axis in axes.values())
    words = ([f"{key}={value}" for value in of] for key, of in zip(axes, values, strict=True))
    return [list(job) for job in itertools.product(*words)]


@dataclass(frozen=True)
class Numbers:
    """A numeric axis of a search, both ends included."""

    low: float
    high: float
    step: float | None = None
    log: bool = False

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)


def axis_of(axis: Override) -> Numbers | list[str]:
    """What one override lets a search choose from: an interval or a range of numbers; else the values as words."""
    if not axis.is_sweep_override():
        return [axis.get_value_element_as_str()]
    value = axis.value()
    step: float | None = None
    if isinstance(value, IntervalSweep):
        low, high = value.start or 0, value.end or 0
    elif isinstance(value, RangeSweep) and value.step > 0:
        low, step = value.start or 0, value.step
        high = low + (count(axis) - 1) * value.step
    else:
        return list(axis.sweep_string_iterator())
    if not low < high:
        raise ConfigError(f"{axis.input_line}: expected a lower and a higher number.")
    if (log := "log" in value.tags) and low <= 0:
        raise ConfigError(f"{axis.input_line}: expected numbers > 0 for a logarithmic scale.")
    return Numbers(low, high, step, log)


def probes(axes: dict[str, Override]) -> list[list[str]]:
    """Jobs that show what a search may run: the first value of every axis, then each other one (of numbers the highest)
    in its place."""
    choices = {key: [f"{of.low:.6g}", f"{of.high:.6g}"] if isinstance(of := axis_of(axis), Numbers) else of
               for key, axis in axes.items()}
    first = {key: f"{key}={values[0]}" for key, values in choices.items()}
    others = (first | {key: f"{key}={value}"} for key, values in choices.items() for value in values[1:])
    return [list(job.values()) for job in (first, *others)]


def words(overrides: Any) -> list[str]:
    """A config's list of overrides (a ListConfig) as they were typed: `${oc.env:NAME}` stays a name."""
    return list(OmegaConf.to_container(overrides, resolve=False))  # type: ignore[arg-type]


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Hydra's own options of a command line, and its overrides. Raises ConfigError: an option lacks its value, or has
    a wrong one."""
    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign, assignment]
    args, unknown = parser.parse_known_args(list(argv))
    return args, [*args.overrides, *unknown]


def _refuse(message: str) -> NoReturn:
    raise ConfigError(f"{message.removeprefix('argument ')}. See --help.")


def help_text(template: str, groups: str) -> str:
    """A help template filled in as Hydra does, which takes 2.5 s over listing the groups itself."""
    flags = Hydra.format_args_help(get_args_parser()).replace("Show Hydra's version", "Show this package's version")
    return string.Template(template).safe_substitute(APP_CONFIG_GROUPS=groups, FLAGS_HELP=flags)


def store(group: str, name: str, node: type) -> None:
    """Make a member of a config group known to Hydra. Idempotent."""
    ConfigStore.instance().store(group=group, name=name, node=node, provider="slm_exp")


def register_plugin(name: str, plugin: type) -> None:
    """Make `_target_: NAME` mean a launcher or sweeper.

    Hydra instantiates plugins by names below hydra_plugins only, and pickles classes by their true module: so a class
    stays where it is and is entered under such a name.
    """
    Plugins.instance().class_name_to_class[name] = plugin


def _let_presets_open_with_their_command() -> None:
    """Hydra looks for `# @package` only above the first ordinary comment; let it look through the opening comments."""
    read = ConfigSource._get_header_dict
    if getattr(read, "through_comments", False):
        return

    def header(text: str) -> dict[str, str | None]:
        lines = text.splitlines()
        comments = itertools.takewhile(lambda line: not line.strip() or line.lstrip().startswith("#"), lines)
        return read("\n".join(line for line in comments if re.match(r"\s*#\s*@", line)))

    header.through_comments = True  # type: ignore[attr-defined]
    ConfigSource._get_header_dict = staticmethod(header)  # type: ignore[method-assign, assignment]


_let_presets_open_with_their_command()
