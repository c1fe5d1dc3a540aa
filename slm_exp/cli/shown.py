"""The config of a run as `--cfg job` shows it: members by name, every field, and what is in force where one is open."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import yaml
from omegaconf import DictConfig, OmegaConf

from slm_exp.core.errors import ConfigError
from slm_exp.core.registry import GROUPS
from slm_exp.core.secrets import masked
from slm_exp.launch.compose import compose_raw
from slm_exp.launch.hydra_compat import without_hydra
from slm_exp.pipeline.config import to_run_config


def config_text(overrides: Sequence[str], resolve: bool = False) -> str:
    """YAML, with comments. A config that a run would refuse is shown all the same, and ends with the reason. Raises
    ConfigError: it cannot be composed."""
    whole = compose_raw(overrides, with_hydra=True)
    cfg, chosen, lines = without_hydra(whole), whole.hydra.runtime.choices, list[str]()
    for key, node in cfg.items():
        value = OmegaConf.to_container(node, resolve=resolve) if isinstance(node, DictConfig) else node
        if key in GROUPS and isinstance(value, dict):
            value = {"name": OmegaConf.get_type(cfg, key).name, **value}  # type: ignore[union-attr, arg-type]
            preset = chosen.get(key)
            lines.append(f"{key}:" + (f"  # {key}={preset}" if preset != value["name"] else ""))
            lines.append(textwrap.indent(_yaml(value), "  "))
        else:
            lines.append(_yaml({key: value}))
    try:
        notes = to_run_config(cfg).in_force()
    except ConfigError as error:
        notes = [f"A run is refused: {error}"]
    heading = ["# In force where nothing is set:"] if notes and not notes[0].startswith("A run") else []
    return str(masked("\n".join([*lines, *heading, *(f"# {note}" for note in notes)]))) + "\n"


def _yaml(value: object) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=112).rstrip()
