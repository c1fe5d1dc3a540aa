"""Readers of files as pydantic models: a complaint says where, what came, what was wanted."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from slm_exp.core.errors import ConfigError, did_you_mean
from slm_exp.core.files import JsonObject
from slm_exp.core.format import printable


class Document(BaseModel):
    """A mapping in a file written by hand: an unknown key is refused by name."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


class Section(BaseModel):
    """A mapping in a file that this package wrote, in this version or another.

    What is missing or null has the field's default; keys that this version does not know are kept. False where the
    file has nothing.
    """

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _null_is_missing(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[info.field_name or ""]
        return value if value is not None or field.is_required() else field.get_default(call_default_factory=True)

    def __bool__(self) -> bool:
        return bool(self.model_fields_set)


D = TypeVar("D", bound=BaseModel)


def parse(kind: type[D], data: Any) -> D:
    """Data as a document.

    Raises:
        ValueError: `eval.dense.average = 'x'; expected a number.`
    """
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise ValueError(complaint(error, kind)) from None
    except RecursionError:
        raise ValueError("it is nested too deeply.") from None


def read_yaml(path: Path) -> JsonObject:
    """A mapping from a YAML file.

    Raises:
        ConfigError: not YAML, or no mapping.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, RecursionError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {printable(' '.join(str(error).split()))}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds {type(found).__name__}; expected a mapping.")
    return found


def read_document(kind: type[D], path: Path) -> D:
    """A document from a YAML file.

    Raises:
        ConfigError: the file, where in it, what came, what was wanted.
    """
    try:
        return parse(kind, read_yaml(path))
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


WANTED = {"model_type": "a mapping", "dict_type": "a mapping", "list_type": "a list", "string_type": "text",
          "int_type": "a whole number", "float_type": "a number", "bool_type": "true or false",
          "greater_than_equal": "a number >= {ge}", "too_short": "a list of at least one",
          "literal_error": "{expected}"}


def complaint(error: ValidationError, kind: type[BaseModel]) -> str:
    """The first thing wrong, in one line."""
    found = error.errors(include_url=False)  # a misspelt key explains one that is missing
    first = next((each for each in found if each["type"] == "extra_forbidden"), found[0])
    where = ""
    for part in first["loc"]:
        where += f"[{part}]" if isinstance(part, int) else f".{part}" if where else str(part)
    if first["type"] == "extra_forbidden":
        inside, _, key = where.rpartition(".")
        known = _fields(kind, first["loc"][:-1])
        return (f"{inside or 'it'} has the key {key!r}; expected {', '.join(known)}. "
                f"{did_you_mean(key, known)}").rstrip()
    if first["type"] == "missing":
        inside, _, key = where.rpartition(".")
        return f"{inside or 'it'} has no {key}."
    if first["type"] == "value_error":
        return f"{where or 'it'}: {first['ctx']['error']}"
    wanted = WANTED.get(first["type"]) or first["msg"].removeprefix("Input should be ")
    wanted = wanted.format(**first.get("ctx", {})).replace("'", "") if "{" in wanted else wanted
    came = printable(repr(first["input"]))
    return f"{where or 'it'} = {came[:120]}{'...' if len(came) > 120 else ''}; expected {wanted}."


def _fields(kind: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """The keys of the document at a place, as far as field types lead there."""
    here: type[BaseModel] = kind
    for part in loc:
        if isinstance(part, str) and part in here.model_fields:
            inner = [here.model_fields[part].annotation]
            while inner:
                kind_of = inner.pop()
                if isinstance(kind_of, type) and issubclass(kind_of, BaseModel):
                    here = kind_of
                inner += getattr(kind_of, "__args__", ())
    return list(here.model_fields)
