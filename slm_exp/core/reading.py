"""Reading JSON that others wrote: strict, bounded, and refused in one line that names file, field, value and wish."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")

MAX_BYTES = 1 << 28
MAX_DEPTH = 50
WANTED = {"int_type": "a whole number", "int_from_float": "a whole number", "float_type": "a number",
          "finite_number": "a finite number", "string_type": "a text", "bool_type": "true or false",
          "list_type": "a list", "tuple_type": "a list", "dict_type": "an object", "dataclass_type": "an object"}


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: no JSON, a key twice, NaN or an infinity, nested deeper than MAX_DEPTH, or over MAX_BYTES.
    """
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES >> 20} MiB")
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique, parse_constant=_not_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check_depth(value, MAX_DEPTH)
    return value


def parsed(kind: type[T], data: Any) -> T:
    """A document as a value of a frozen dataclass whose `__pydantic_config__` is STRICT.

    A boolean is no number, a number no text; a missing or an unknown field is an error.

    Raises:
        ValueError: the first fault in one line: `field = value; expected ...`.
    """
    reader: TypeAdapter[T] = _adapter(kind)  # type: ignore[arg-type]
    try:
        return reader.validate_json(json.dumps(data))
    except ValidationError as error:
        raise ValueError(_refusal(error, data)) from None


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _refusal(error: ValidationError, data: Any) -> str:
    faults = error.errors(include_url=False)
    if unknown := [str(fault["loc"][-1]) for fault in faults if fault["type"] == "unexpected_keyword_argument"]:
        return f"unknown fields {', '.join(unknown)}"
    first = faults[0]
    path: list[str] = []
    for part in first["loc"]:  # it also names alternatives of a union, which are no part of the document
        try:
            data = data[part]
        except (TypeError, KeyError, IndexError):
            continue
        path.append(str(part))
    field = ".".join(path)
    if first["type"].startswith("missing"):
        return f"{field or 'it'} has no {first['loc'][-1]}"
    shown = repr(first["input"])
    wanted = WANTED.get(first["type"]) or first["msg"].lower().removeprefix("input should be ")
    return f"{field or 'it'} = {shown if len(shown) <= 60 else shown[:57] + '...'}; expected {wanted}"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:60]!r} stands twice in one object")
    return out


def _not_finite(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def _check_depth(value: Any, left: int) -> None:
    if isinstance(value, (dict, list)):
        if left == 0:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        for part in value.values() if isinstance(value, dict) else value:
            _check_depth(part, left - 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a number is too large")
