"""What stands in files as values of our types: a complaint says where, what came, what was wanted."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, ValidationInfo, field_validator

from slm_exp.core.errors import ConfigError, did_you_mean
from slm_exp.core.files import JsonObject, read_text
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


class StrictValue:
    """Base of dataclasses that `parse` reads: a boolean is no number, a number no text, an unknown field an error."""

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


T = TypeVar("T")
D = TypeVar("D", bound=BaseModel)


def parse(kind: type[T], data: Any, at: str = "") -> T:
    """Data as a pydantic model or a `StrictValue`.

    Args:
        at: where the data stands, for messages.
    Raises:
        ValueError: `eval.dense.average = 'x'; expected a number.`
    """
    reader: TypeAdapter[T] = _reader(kind)  # type: ignore[arg-type]
    try:
        # from JSON a list is a tuple too
        return reader.validate_python(data) if issubclass(kind, BaseModel) else reader.validate_json(json.dumps(data))
    except ValidationError as error:
        raise ValueError(complaint(error, kind, data, at)) from None
    except RecursionError:
        raise ValueError("it is nested too deeply.") from None


@cache
def _reader(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def read_yaml(path: Path) -> JsonObject:
    """A mapping from a YAML file. Raises ConfigError: not YAML, or no mapping."""
    try:
        found = yaml.safe_load(read_text(path))
    except (OSError, UnicodeDecodeError, RecursionError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {printable(' '.join(str(error).split()))}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds {type(found).__name__}; expected a mapping.")
    return found


def read_document(kind: type[D], path: Path) -> D:
    """A document from a YAML file. Raises ConfigError: the file, where in it, what came, what was wanted."""
    try:
        return parse(kind, read_yaml(path))
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


WANTED = {"model_type": "a mapping", "dict_type": "a mapping", "dataclass_type": "a mapping", "list_type": "a list",
          "tuple_type": "a list", "string_type": "text", "int_type": "a whole number", "float_type": "a number",
          "int_from_float": "a whole number", "bool_type": "true or false", "finite_number": "a finite number",
          "greater_than_equal": "a number >= {ge}", "too_short": "a list of at least one",
          "literal_error": "{expected}"}
UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")


def complaint(error: ValidationError, kind: type, data: Any, at: str = "") -> str:
    """The first thing wrong with data that stand at `at`, in one line."""
    faults = error.errors(include_url=False)  # a misspelt key explains one that is missing
    first = next((fault for fault in faults if fault["type"] in UNKNOWN), faults[0])
    *outer, last = ("", *first["loc"])
    where, inside, key = at, at, ""
    for part in first["loc"]:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):  # an alternative of a union, which is no part of the data
            continue
        inside, key = where or "it", str(part)
        where += f"[{part}]" if isinstance(part, int) else f".{part}" if where else key
    if first["type"] in UNKNOWN:
        known = _keys(kind, tuple(outer[1:]))
        return f"{inside} has the key {key!r}; expected {', '.join(known)}. {did_you_mean(key, known)}".rstrip()
    if first["type"].startswith("missing"):
        return f"{where or 'it'} has no {last}; it has {', '.join(map(str, data)) or 'nothing'}."
    if first["type"] == "value_error":
        return f"{where or 'it'}: {first['ctx']['error']}"
    wanted = WANTED.get(first["type"]) or first["msg"].removeprefix("Input should be ")
    wanted = wanted.format(**first.get("ctx", {})).replace("'", "") if "{" in wanted else wanted
    came = printable(repr(first["input"]))
    return f"{where or 'it'} = {came[:120]}{'...' if len(came) > 120 else ''}; expected {wanted}."


def _keys(kind: Any, loc: tuple[int | str, ...]) -> list[str]:
    """The keys of the mapping at a place, as far as field types lead there."""
    known = kind.model_fields if issubclass(kind, BaseModel) else [f.name for f in dataclasses.fields(kind)]
    for i, part in enumerate(loc):
        inner = [get_type_hints(kind)[str(part)]] if part in known else []
        while inner:
            each = inner.pop()
            if isinstance(each, type) and (issubclass(each, BaseModel) or dataclasses.is_dataclass(each)):
                return _keys(each, loc[i + 1 :])
            inner += getattr(each, "__args__", ())
    return list(known)
