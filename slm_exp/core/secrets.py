"""What must not be shown or recorded: credentials in addresses, and secrets that a config took from the environment."""

from __future__ import annotations

import os
import re
from typing import Any

from omegaconf import OmegaConf
from omegaconf.resolvers import oc

MASK = "***"
SECRET_NAME = re.compile(
    r"PASSWORD|PASSWD|SECRET|CREDENTIAL|TOKENS?(_|\d|$)|(^|_)(API|ACCESS|PRIVATE|AUTH)?KEYS?(_|\d|$)", re.IGNORECASE
)
"""Names of environment variables that hold secrets: HF_TOKEN, WANDB_API_KEY, PGPASSWORD; not TOKENIZERS_PARALLELISM."""
_CREDENTIALS = re.compile(r"(?<=://)[^/\s@'\"]+(?=@)")
_taken: dict[str, None] = {}
"""Values of such variables that reached a config of this process."""


def masked(value: Any) -> Any:
    """The same text, or nested lists and dicts of them, without secrets; everything else as it is."""
    if isinstance(value, str):
        text = _CREDENTIALS.sub(MASK, value) if "://" in value else value
        for secret in _taken:
            # a short one may be part of an ordinary word
            text = text.replace(secret, MASK) if len(secret) > 5 else MASK if text == secret else text
        return text
    if isinstance(value, dict):
        return {key: masked(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [masked(child) for child in value]
    return value


def register_env_resolver() -> None:
    """`${oc.env:NAME}` as OmegaConf has it, remembering the values of secret variables. Idempotent."""
    OmegaConf.register_new_resolver("oc.env", _env, replace=True)


def _env(name: str, *default: str | None) -> str | None:
    value = oc.env(name, *default)
    if value and name in os.environ and SECRET_NAME.search(name):
        _taken[value] = None
    return value
