"""Command line -> Hydra -> checked RunConfig. Nothing heavy loads here."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from slm_exp.core.errors import ConfigError, did_you_mean
from slm_exp.core.files import digest
from slm_exp.core.registry import GROUPS, available, load_all
from slm_exp.pipeline.config import RunConfig, register_schema, to_run_config

if TYPE_CHECKING:
    from omegaconf import DictConfig

log = logging.getLogger(__name__)


def conf_dir() -> Path:
    """The config tree: `conf/` of the checkout, or the copy inside the installed package."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise ConfigError(f"no conf/ beside or inside {package}; reinstall slm_exp.")


def prepare_hydra() -> None:
    """Register every component, the schema, the launcher and the resolvers. Idempotent."""
    from slm_exp.launch.plugins import register_plugins

    load_all()
    register_schema()
    register_plugins()
    register_resolvers()


def register_resolvers() -> None:
    """`${run_id:}` and `${sweep_name:}`, which name folders. Idempotent."""
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("run_id", _run_id, replace=True)
    OmegaConf.register_new_resolver("sweep_name", _sweep_name, replace=True)


def _let_presets_open_with_their_command() -> None:
    """Hydra looks for `# @package` only above the first ordinary comment; let it look through the opening comments."""
    from hydra.plugins.config_source import ConfigSource

    read = ConfigSource._get_header_dict
    if getattr(read, "through_comments", False):
        return

    def header(text: str) -> dict[str, str | None]:
        lines = text.splitlines()
        comments = itertools.takewhile(lambda line: not line.strip() or line.lstrip().startswith("#"), lines)
        return read("\n".join(line for line in comments if re.match(r"\s*#\s*@", line)))

    header.through_comments = True  # type: ignore[attr-defined]
    ConfigSource._get_header_dict = staticmethod(header)  # type: ignore[method-assign, assignment]


def _run_id(*, _root_: DictConfig) -> str:
    return to_run_config(science_only(_root_)).run_id


def _sweep_name(*, _root_: DictConfig) -> str:
    """The sweep preset's name, or a hash of the overrides: the same command finds its own folder again."""
    choice = _root_.hydra.runtime.choices.get("sweep")
    task = sorted(o for o in _root_.hydra.overrides.task if not o.startswith(("sweep=", "experiment=")))
    base = choice or _root_.hydra.runtime.choices.get("experiment") or "grid"
    return f"{base}-{digest(task)[:8]}" if task or base == "grid" else str(base)


def science_only(cfg: DictConfig) -> DictConfig:
    """A composed config without Hydra's own node."""
    from omegaconf import open_dict

    cfg = cfg.copy()
    with open_dict(cfg):
        cfg.pop("hydra", None)
    return cfg


def open_mappings(overrides: Sequence[str]) -> list[str]:
    """Let `evaluation.corpora.NAME=FILE` and `evaluation.corpora={NAME:FILE}` add names without Hydra's plus sign."""
    open_ended = ("evaluation.corpora", "evaluation.dense_range", "evaluation.fewshot")
    return [f"++{o}" if o.startswith(open_ended) else o for o in overrides]


def fields_of_swept_groups(overrides: Sequence[str]) -> list[str]:
    """Let `method=a,b method.merge=true` set a field of the members that are swept, not of the default member.

    Hydra composes a multirun's own config without what is swept, and would look for the field in the default member.
    A value written as a choice of one is swept too: it reaches every job and nothing else.
    """
    params: dict[str, str] = {}
    if preset := [o for o in overrides if o.startswith("sweep=")]:
        params = dict(compose_raw(preset, with_hydra=True).hydra.sweeper.get("params") or {})
    swept = {o.partition("=")[0] for o in overrides if is_sweep(o)} | set(params)
    out = []
    for o in overrides:
        key, equals, value = o.partition("=")
        field_of_one = key.partition(".")[0] in swept & set(GROUPS) and "." in key and equals and not is_sweep(o)
        out.append(f"{key}=choice({value})" if field_of_one else o)
    return out


@contextmanager
def _hydra_session() -> Iterator[None]:
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    prepare_hydra()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3", job_name="slm_exp"):
        yield


def compose_raw(overrides: Sequence[str], with_hydra: bool = False) -> DictConfig:
    """Compose conf/config.yaml with overrides; Hydra's errors become ConfigErrors that name field and remedy."""
    from hydra import compose
    from hydra.errors import HydraException

    with _hydra_session():
        try:
            return compose("config", overrides=open_mappings(overrides), return_hydra_config=with_hydra)
        except HydraException as error:
            raise ConfigError(explain(error, overrides)) from None


def compose_run(overrides: Sequence[str] = ()) -> RunConfig:
    """The typed, checked config of one run from Hydra overrides; for scripts, tests and the other commands."""
    return to_run_config(science_only(compose_raw(overrides)))


def explain(error: Exception, overrides: Sequence[str]) -> str:
    """Turn Hydra's composition errors into one message: field, value, what is allowed, what to do."""
    parts = []
    seen: BaseException | None = error
    while seen is not None:
        parts.append(str(seen))
        seen = seen.__cause__
    text = "\n".join(parts)
    if found := re.search(r"(?:Could not find|Could not load|In '[^']*': Could not find) '([\w/]+)/([\w.-]+)'", text):
        group, name = found.groups()
        extra = next((e for e in ("joblib", "submitit") if e in name), None)
        if group == "hydra/launcher" and extra:
            return f"{group} = {name}; that launcher is not installed. pip install 'slm-exp[{extra}]'."
        options = sorted(set(re.findall(r"^\t(\S+)$", text, re.M)) or choices(group))
        return no_member(group, name, options)
    if found := re.search(r"(?:override|Error merging override) '?([\w.@/+~]+)", text):
        key = found.group(1).lstrip("+~")
        given = next((o for o in overrides if o.lstrip("+~").startswith(key)), key)
        if "not in '" in text or "Key '" in text or "Could not override" in text:
            fields = _fields_beside(key)
            word = key.rsplit(".", 1)[-1]
            return f"{given}: there is no {key}. Known here: {', '.join(fields)}. {did_you_mean(word, fields)}".strip()
        known = r"(Value '.*?' of type .*? could not be converted to \w+|Invalid value .*|Cannot convert .*)"
        reason = re.search(known, text)
        return f"{given}: {reason.group(1) if reason else text.splitlines()[0]}."
    return " ".join(line.strip() for line in text.splitlines()[:3] if line.strip())


def no_member(group: str, name: str, there: Sequence[str]) -> str:
    return f"{group} = {name}; expected one of {', '.join(there)}. {did_you_mean(name, there)}".strip()


def choices(group: str) -> list[str]:
    """What GROUP=NAME takes: members registered in code, and presets of conf/."""
    presets = [p.stem for p in (conf_dir() / group).glob("*.yaml")]
    return sorted({*presets, *(available(group) if group in GROUPS else ())})


def _fields_beside(key: str) -> list[str]:
    import dataclasses

    from slm_exp.pipeline.config import CacheConfig

    head, _, tail = key.partition(".")
    if not tail:
        return sorted([*(f.name for f in dataclasses.fields(RunConfig)), "experiment", "sweep"])
    if head in GROUPS:
        return sorted({f.name for cls in available(head).values() for f in dataclasses.fields(cls)})
    return sorted(f.name for f in dataclasses.fields(CacheConfig)) if head == "cache" else []


def check_key(override: str) -> None:
    """Refuse an override of a field or a member that no group has, without composing (0.1 s).

    Raises:
        ConfigError: with what there is, and the nearest name.
    """
    key, _, value = override.partition("=")
    group, _, tail = key.lstrip("+~").partition(".")
    name = f"{group}.{tail.partition('.')[0]}" if tail else group
    known = _fields_beside(name)
    if name.partition(".")[2] not in known and (tail or name not in known):
        raise ConfigError(f"{override}: there is no {name}. Known here: {', '.join(known)}. "
                          f"{did_you_mean(name.rpartition('.')[2], known)}".rstrip())
    if not tail and group in GROUPS and value not in (there := choices(group)):
        raise ConfigError(no_member(group, value, there))


def split_sweep(overrides: Sequence[str], params: dict[str, str]) -> list[list[str]]:
    """The jobs of a grid: every combination of swept values, preset parameters first, as Hydra's sweeper makes them."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    given = {o.partition("=")[0] for o in overrides}
    swept = [f"{k}={v}" for k, v in params.items() if k not in given] + list(overrides)
    parsed = OverridesParser.create().parse_overrides(swept)
    return [list(job) for batch in BasicSweeper.split_arguments(parsed, max_batch_size=None) for job in batch]


checked: dict[tuple[str, ...], RunConfig] = {}
"""The jobs that `check_all` composed, by their overrides: the sweeper need not compose them again (0.1 s each)."""


def check_all(overrides: Sequence[str], multirun: bool) -> None:
    """Compose and check every job of the command before the first one starts.

    Raises:
        ConfigError: names the first bad field; in a multirun, the job too.
    """
    from slm_exp.runs.record import check_writable

    overrides = fields_of_swept_groups(overrides)
    plain = [o for o in overrides if o.startswith("hydra.") or not is_sweep(o)]
    whole = compose_raw(plain, with_hydra=True)
    multirun = multirun or str(whole.hydra.mode).endswith("MULTIRUN")
    if not multirun:
        run_cfg = to_run_config(science_only(whole))
        _ = run_cfg.run_id
        check_writable(Path(str(whole.hydra.run.dir)))
        return
    params = dict(whole.hydra.sweeper.get("params") or {})
    for job in split_sweep(overrides, params):
        try:
            checked[tuple(job)] = cfg = compose_run([o for o in job if not o.startswith("hydra")])
            _ = cfg.run_id
        except ConfigError as error:
            raise ConfigError(f"job {' '.join(job)}: {error}") from None
    check_writable(Path(str(whole.hydra.sweep.dir)))


def is_sweep(override: str) -> bool:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return bool(OverridesParser.create().parse_override(override).is_sweep_override())
    except HydraException:
        return False


register_resolvers()
_let_presets_open_with_their_command()
