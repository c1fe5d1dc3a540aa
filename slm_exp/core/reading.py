"""Documents that others wrote as values of our types: strict, and refused in one line that names field and value."""

from __future__ import annotations

import json
from functools import cache
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")

WANTED = {"int_type": "a whole number", "int_from_float": "a whole number", "float_type": "a number",
          "finite_number": "a finite number", "string_type": "a text", "bool_type": "true or false",
          "list_type": "a list", "tuple_type": "a list", "dict_type": "an object", "dataclass_type": "an object"}


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
