"""Command line -> Hydra -> checked RunConfig. Nothing heavy loads here."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import yaml
from hydra import compose
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from slm_exp.core.conf import conf_dir as conf_dir
from slm_exp.core.errors import ConfigError, did_you_mean, no_field
from slm_exp.core.files import digest
from slm_exp.core.format import override
from slm_exp.core.registry import GROUPS, available, load_all
from slm_exp.core.secrets import register_env_resolver
from slm_exp.launch.hydra_compat import quoted, session, set_values, unreadable, without_hydra
from slm_exp.launch.settings import ProcessesConf, SlurmConf, register_settings
from slm_exp.pipeline.config import CacheConfig, RunConfig, register_schema, to_run_config

PLAIN_FIELDS = ("seed", "save_model")
"""Fields of RunConfig that are values, not groups."""
PRESETS = ("experiment", "sweep")
"""Groups whose members hold differences only."""


@cache
def prepare_hydra() -> None:
    """Register every component, the schema, and the settings of launcher and sweeper."""
    load_all()
    register_schema()
    register_settings()


def register_resolvers() -> None:
    """`${run_id:}` and `${sweep_name:}`, which name folders; `${oc.env:NAME}`, which knows secrets. Idempotent."""
    register_env_resolver()
    OmegaConf.register_new_resolver("run_id", _run_id, replace=True)
    OmegaConf.register_new_resolver("sweep_name", _sweep_name, replace=True)


def _run_id(*, _root_: DictConfig) -> str:
    return to_run_config(without_hydra(_root_)).run_id


def _sweep_name(*, _root_: DictConfig) -> str:
    """The sweep preset's name, or a hash of the overrides: the same command finds its own folder again."""
    choices = _root_.hydra.runtime.choices
    task = sorted(o for o in _root_.hydra.overrides.task if not o.startswith(("sweep=", "experiment=")))
    base = choices.get("sweep") or choices.get("experiment") or "grid"
    return f"{base}-{digest(task)[:8]}" if task or base == "grid" else str(base)


def open_mappings(overrides: Sequence[str]) -> list[str]:
    """Let `evaluation.corpora.NAME=FILE` and `evaluation.corpora={NAME:FILE}` add names without Hydra's plus sign, and
    `+experiment=NAME` (every group has a place in the defaults) choose with one."""
    open_ended = ("evaluation.corpora", "evaluation.dense_range", "evaluation.fewshot")
    groups = tuple(f"+{group}=" for group in (*GROUPS, *PRESETS))
    return [f"++{o}" if o.startswith(open_ended) else o[1:] if o.startswith(groups) else o for o in overrides]


def compose_raw(overrides: Sequence[str], with_hydra: bool = False) -> DictConfig:
    """conf/config.yaml with overrides; Hydra's errors become ConfigErrors that name field and remedy. Cost: 0.1 s."""
    prepare_hydra()
    try:
        with session(str(conf_dir())):
            return compose("config", overrides=open_mappings(overrides), return_hydra_config=with_hydra)
    except (HydraException, yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a group that is null
        raise ConfigError(explain(error, overrides)) from None


def compose_run(overrides: Sequence[str] = ()) -> RunConfig:
    """The typed, checked config of one run from Hydra overrides; for scripts, tests and the other commands."""
    return to_run_config(without_hydra(compose_raw(overrides)))


class Composer:
    """Composes the jobs of one command, whose overrides differ in few places: 5 ms a job, where Hydra takes 100.

    Every choice of a group is composed once, in place of the default's; values are set on a copy. A choice that changes
    more than its own group (a preset of the user's may) is composed with the other choices, as Hydra does.
    `always`: overrides that every job has (`hydra.searchpath`).
    """

    def __init__(self, always: Sequence[str] = ()) -> None:
        self._composed = cache(lambda overrides: without_hydra(compose_raw([*always, *overrides])))
        self._node = cache(self._alone)

    def run_config(self, overrides: Sequence[str]) -> RunConfig:
        """As `compose_run` for a job's overrides."""
        shape, chosen, values = list[str](), list[str](), list[str]()
        for o in open_mappings(overrides):
            key = o.partition("=")[0]
            is_value = key.lstrip("+") in PLAIN_FIELDS or ("." in key and not key.startswith("~") and "@" not in key)
            (chosen if key in GROUPS else values if is_value else shape).append(o)
        cfg = self._with_groups(tuple(shape), chosen)
        try:
            set_values(cfg, values)
        except HydraException as error:
            raise ConfigError(explain(error, overrides)) from None
        return to_run_config(cfg)

    def _with_groups(self, shape: tuple[str, ...], chosen: Sequence[str]) -> DictConfig:
        """A config of its own with these choices of groups."""
        nodes = {o.partition("=")[0]: self._node(shape, o) for o in chosen}
        if None in nodes.values() or len(nodes) < len(chosen):
            return self._composed((*shape, *chosen)).copy()
        cfg = self._composed(shape).copy()
        for group, node in nodes.items():
            cfg[group] = node
        return cfg

    def _alone(self, shape: tuple[str, ...], choice: str) -> DictConfig | None:
        """A group's node with this choice; None where the choice changes other groups too."""
        group = choice.partition("=")[0]
        base, other = self._composed(shape), self._composed((*shape, choice))
        alone = base.keys() == other.keys() and all(base[k] == other[k] for k in base if k != group)
        return other[group] if alone else None


def explain(error: Exception, overrides: Sequence[str]) -> str:
    """Turn Hydra's composition errors into one message: field, value, what is allowed, what to do."""
    text, cause = str(error), error.__cause__
    while cause is not None:
        text, cause = f"{text}\n{cause}", cause.__cause__
    missing = [o for o in overrides if not o.startswith("model=") or f"Could not find '{o.replace('=', '/')}'" in text]
    if better := next(((o, words) for o in missing if (words := meant(o))), None):
        return f"{better[0]}: there is no such setting or member. Meant, perhaps: {' '.join(better[1])}"
    if isinstance(error, (yaml.YAMLError, UnicodeDecodeError, RecursionError)):
        why = "nested too deeply" if isinstance(error, RecursionError) else " ".join(text.split())
        return f"a config file among {' '.join(overrides)}: {why}; expected plain YAML in UTF-8."
    if isinstance(error, ValueError) and (null := next((o for o in overrides if o.endswith("=null")), "")):
        group = null.lstrip("+").removesuffix("=null")
        return no_member(group, "null", choices(group))
    if (unread := unreadable(overrides)) and "=" not in unread:
        return f"{unread}: a setting is GROUP=MEMBER or GROUP.FIELD=VALUE.{_of_a_word(unread)}"
    if "=" in unread:
        return (f"{unread}: Hydra's grammar does not take it. Text with =, commas, brackets or quotes in it is written "
                f" {quoted(unread)}")
    if found := re.search(r"(?:Could not find|Could not load|In '[^']*': Could not find) '([\w/]+)/([\w.-]*)'", text):
        group, name = found.groups()
        extra = next((e for e in ("joblib", "submitit") if e in name), None)
        if group == "hydra/launcher" and extra:
            return f"{group} = {name}; that launcher is not installed. pip install 'slm-exp[{extra}]'."
        return no_member(group, name, sorted(set(re.findall(r"^\t(\S+)$", text, re.M)) or choices(group)))
    preset = re.search(r"In '(experiment|sweep)/([\w.-]+)'.*?Key '\w+' not in .*?full_key: ([\w.]+)", text, re.S)
    if preset:
        kind, name, field = preset.groups()
        member = next((o for o in overrides if o.startswith(f"{field.partition('.')[0]}=")), "the default member")
        return f"{kind}={name} sets {field}, which {member} has not. Leave one of them out."
    if found := re.search(r"(?:override|Error merging override) '?([\w.@/+~]+)", text):
        key = found.group(1).lstrip("+~")
        given = next((o for o in overrides if o.lstrip("+~").startswith(key)), key)
        if "not in '" in text or "Key '" in text or "Could not override" in text:
            return f"{given}: {_no_field(key)}"
        known = (r"(Value '.*?' of type .*? could not be converted to \w+|Value '.*?' is not a valid bool"
                 r"|Invalid value .*|Cannot convert .*)")
        reason = re.search(known, text)
        return f"{given}: {reason.group(1) if reason else text.splitlines()[0]}."
    return " ".join(line.strip() for line in text.splitlines()[:3] if line.strip())


def _no_field(key: str) -> str:
    """Why a group, or the member that is chosen, has no such field, and what has."""
    group, _, field = key.partition(".")
    members = available(group).items() if group in GROUPS else ()
    if owners := [name for name, cls in members if any(f.name == field for f in dataclasses.fields(cls))]:
        return f"the {group} that is chosen has no {field}; it is a field of {group}={f' and {group}='.join(owners)}."
    if field and group not in (*GROUPS, "cache", "hydra"):
        nearest = did_you_mean(group, GROUPS)
        return f"there is no group {group}. {nearest}{' ' if nearest else ''}Groups: {', '.join(GROUPS)}."
    return no_field(key, _fields_beside(key))


def no_member(group: str, name: str, there: Sequence[str]) -> str:
    return f"{group} = {name}; expected one of {', '.join(there)}. {did_you_mean(name, there)}".strip()


def choices(group: str) -> list[str]:
    """What GROUP=NAME takes: members registered in code, and presets of conf/."""
    presets = [p.stem for p in (conf_dir() / group).glob("*.yaml")]
    return sorted({*presets, *(available(group) if group in GROUPS else ())})


def meant(word: str) -> list[str]:
    """What an override that cannot be composed was meant to say, where there is one answer: a field without its group
    (`threshold=0.8`, `tasks=mmlu`), a folder or repo id for a member (`model=meta-llama/Llama-2-7b-hf`)."""
    key, equals, value = word.lstrip("+").partition("=")
    if key == "model" and value and value not in choices("model") and ("/" in value or Path(value).is_dir()):
        return model_words(value)
    if not equals or "." in key or key in (*GROUPS, *PRESETS, *PLAIN_FIELDS, "cache", "hydra"):
        return []
    groups = [group for group in GROUPS if key in _fields_beside(f"{group}.{key}")]
    if len(groups) != 1:
        return []
    return [f"{groups[0]}.{key}={f'[{value}]' if _is_list(groups[0], key) and value[:1] != '[' else value}"]


def _of_a_word(word: str) -> str:
    """What a word without an equals sign may be meant as: a group, a member, or a model's folder or repo id."""
    if word in (*GROUPS, *PRESETS):
        return f" Members of {word}: {', '.join(choices(word))}."
    words = [[f"{group}={word}"] for group in (*GROUPS, *PRESETS) if word in choices(group)]
    if not words and ("/" in word or Path(word).is_dir()):
        words = [model_words(word)]
    return " Meant, perhaps: " + " or ".join(map(" ".join, words)) if words else ""


def one_list(given: str) -> str:
    """Where an override that names several values may mean one list: how to say that."""
    key, _, value = given.partition("=")
    return f" (one run with the list: {key}=[{value}])" if _is_list(*key.rpartition(".")[::2]) else ""


def _is_list(group: str, field: str) -> bool:
    members = available(group).values() if group in GROUPS else ()
    return any(f.name == field and (f.default_factory is list or str(f.type).startswith("list"))
               for cls in members for f in dataclasses.fields(cls))


def model_words(name: str) -> list[str]:
    """The overrides for a member of the `model` group, or for a folder or repo id. Raises ConfigError: it is neither a
    member nor a folder, and nearly the name of a member."""
    there = choices("model")
    if name.startswith("model="):
        raise ConfigError(f"{name}: MODEL is a name alone, without model=: {name.partition('=')[2]}")
    if name not in there and did_you_mean(name, there) and "/" not in name and not Path(name).is_dir():
        raise ConfigError(f"{no_member('model', name, there)} Or a folder, or a repo id: OWNER/NAME.")
    return [f"model={name}"] if name in choices("model") else ["model=hf", override("model.path", name)]


def _fields_beside(key: str) -> list[str]:
    head, _, tail = key.partition(".")
    if not tail:
        return sorted([*(f.name for f in dataclasses.fields(RunConfig)), *PRESETS])
    if tail.startswith("launcher."):
        return sorted({f.name for cls in (ProcessesConf, SlurmConf) for f in dataclasses.fields(cls)} - {"_target_"})
    if head in GROUPS:
        return sorted({f.name for cls in available(head).values() for f in dataclasses.fields(cls)})
    return sorted(f.name for f in dataclasses.fields(CacheConfig)) if head == "cache" else []


def check_key(given: str) -> None:
    """Refuse an override of a field or a member that no group has, without composing (0.1 s). Raises ConfigError: with
    what there is, and the nearest name."""
    key, _, value = given.partition("=")
    group, _, tail = key.lstrip("+~").partition(".")
    name = f"{group}.{tail.partition('.')[0]}" if tail else group
    known = _fields_beside(name)
    if name.partition(".")[2] not in known and (tail or name not in known):
        raise ConfigError(f"{given}: {_no_field(name)}")
    if not tail and group in GROUPS and value not in (there := choices(group)):
        raise ConfigError(no_member(group, value, there))


register_resolvers()  # also where a job is unpickled
