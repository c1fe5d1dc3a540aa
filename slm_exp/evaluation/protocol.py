"""How numbers were measured, as a file with a hash: what two results must agree in before they are compared.

It holds what moves a number (harness and task versions, documents, limit, metric, few-shot examples, BOS, dtype,
maximum length, how texts are cut), and leaves out what does not (batch size, backend, device).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from slm_exp.core.errors import ProtocolError
from slm_exp.core.files import digest

Protocol = Mapping[str, Any] | None

FILE = "protocol.json"
"""Its name in a run's folder."""


def protocol(fields: dict[str, Any], sources: dict[str, str] | None = None) -> dict[str, Any]:
    """`{hash, fields, sources}`; where documents came from is told, but equal documents may come from anywhere."""
    return {"hash": digest(fields), "fields": fields, "sources": sources or {}}


def read_protocol(path: Path) -> dict[str, Any]:
    """A protocol file, as a run leaves it.

    Raises:
        ProtocolError: not there, not readable, or changed since it was written.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        fields, stated = found["fields"], found["hash"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ProtocolError(f"{path} is no protocol file ({type(error).__name__}: {error}); expected the {FILE} of a "
                            "finished run.") from error
    if digest(fields) != stated:
        raise ProtocolError(f"{path}: its hash {stated} is not that of its fields ({digest(fields)}); it was edited. "
                            f"Take the {FILE} of a finished run as it is.")
    return dict(found)


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Fields in which two protocols (or parts of them) differ, settings before their effects: `limit: 20 and 100`."""
    if "fields" in a and "fields" in b:
        a, b = a["fields"], b["fields"]
    apart = [(name, x, y) for name, x, y in _pairs(a, b, "") if x != y]
    return [f"{name}: {_shown(x)} and {_shown(y)}" for name, x, y in sorted(apart, key=lambda pair: pair[0].count("."))]


def require_same(protocols: Mapping[str, Mapping[str, Any] | None], remedy: str = "") -> None:
    """Refuse to compare results of different protocols.

    Args:
        protocols: whose result -> its `protocol`; None and {} (nothing measured) agree with everything.
        remedy: what to do, for the end of the message.

    Raises:
        ProtocolError: names two results and the fields in which they differ.
    """
    reason = mixed(protocols)
    if reason:
        raise ProtocolError(f"{reason}. Their numbers cannot be compared. {remedy}".rstrip())


def mixed(protocols: Mapping[str, Protocol] | Iterable[tuple[str, Protocol]]) -> str | None:
    """Which two results were measured by different protocols, and in what they differ; or None.

    Args:
        protocols: name -> protocol, or pairs of them where names repeat.
    """
    pairs = protocols.items() if isinstance(protocols, Mapping) else protocols
    measured = [(name, p) for name, p in pairs if p and p.get("hash") and _asks(p)]
    for name, other in measured[1:]:
        first, reference = measured[0]
        if other["hash"] != reference["hash"]:
            told = differences(reference, other) or [f"hash: {reference['hash']} and {other['hash']}"]
            more = f"; {len(told) - 3} more" if len(told) > 3 else ""
            return f"{first} and {name} were measured by different protocols ({'; '.join(told[:3])}{more})"
    return None


def _asks(protocol: Mapping[str, Any]) -> bool:
    """Whether anything was measured by it: `evaluation=none` has a protocol without tasks and texts."""
    fields = protocol.get("fields") or {}
    asked = [fields[part] for part in ("tasks", "perplexity") if part in fields]
    return not asked or any(asked)


def _pairs(a: Any, b: Any, where: str) -> list[tuple[str, Any, Any]]:
    """(dotted name, value here, value there) of every leaf of two nested dicts; a missing branch is one leaf."""
    if not (isinstance(a, Mapping) and isinstance(b, Mapping)):
        return [(where, a, b)]
    return [pair for key in dict.fromkeys([*a, *b])
            for pair in _pairs(a.get(key), b.get(key), f"{where}.{key}" if where else str(key))]


def _shown(value: Any) -> str:
    return "absent" if value is None else "present" if isinstance(value, Mapping) else str(value)
