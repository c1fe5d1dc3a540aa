"""How numbers were measured, as a file with a hash: what two results must agree in before they are compared.

It holds what moves a number (harness and task versions, documents, limit, metric, few-shot examples, BOS, dtype,
maximum length, how texts are cut), and leaves out what does not (batch size, backend, device).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slm_exp.core.errors import ProtocolError
from slm_exp.core.files import digest, read_json

Stored = Mapping[str, Any] | None
"""A protocol as it stands in a record: `{hash, fields, sources}`, of any version; None where nothing was measured."""

FILE = "protocol.json"
"""Its name in a run's folder."""


@dataclass(frozen=True)
class TaskProtocol:
    """How one task was measured."""

    version: Any
    metric: str | None
    """The one that enters the seven-task average."""
    n: int | None
    num_fewshot: int | None
    documents: str
    """Digest of the documents' contents, in order."""
    document_ids: str
    differs: str | None = None
    """From which stock task and in what; null for stock tasks, and then left out of the protocol."""


@dataclass(frozen=True)
class Protocol:
    """What must be equal for two numbers to be comparable."""

    hash: str
    fields: Mapping[str, Any]
    sources: Mapping[str, str] = field(default_factory=dict)
    """task -> where its documents came from; equal documents may come from anywhere, so the hash leaves it out."""

    @classmethod
    def of(cls, fields: Mapping[str, Any], sources: Mapping[str, str] | None = None) -> Protocol:
        return cls(digest(fields), fields, sources or {})

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Protocol:
        return cls(stored.get("hash", ""), stored.get("fields", {}), stored.get("sources", {}))

    def to_json(self) -> dict[str, Any]:
        return {"hash": self.hash, "fields": self.fields, "sources": self.sources}


def read_protocol(path: Path) -> Protocol:
    """A protocol file, as a run leaves it. Raises ProtocolError: not there, not readable, or changed since it was
    written."""
    try:
        stored = read_json(path)
        fields, stated = dict(stored["fields"]), str(stored["hash"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ProtocolError(f"{path} is no protocol file ({type(error).__name__}: {error}); expected the {FILE} of a "
                            "finished run.") from error
    if digest(fields) != stated:
        raise ProtocolError(f"{path}: its hash {stated} is not that of its fields ({digest(fields)}); it was edited. "
                            f"Take the {FILE} of a finished run as it is.")
    return Protocol.from_json(stored)


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Fields in which two protocols (or parts of them) differ, settings before their effects: `limit: 20 and 100`."""
    if "fields" in a and "fields" in b:
        a, b = a["fields"], b["fields"]
    apart = [(name, x, y) for name, x, y in _pairs(a, b, "") if x != y]
    return [f"{name}: {_shown(x)} and {_shown(y)}" for name, x, y in sorted(apart, key=lambda pair: pair[0].count("."))]


def require_same(protocols: Mapping[str, Stored], remedy: str = "") -> None:
    """Refuse to compare results of different protocols (see `mixed`). Raises ProtocolError: names two results, the
    fields in which they differ, and the remedy."""
    if reason := mixed(protocols):
        raise ProtocolError(f"{reason}. Their numbers cannot be compared. {remedy}".rstrip())


def mixed(protocols: Mapping[str, Stored] | Iterable[tuple[str, Stored]]) -> str | None:
    """Which two results were measured by different protocols, and in what they differ; or None. `protocols`: whose
    result -> its protocol, or pairs of them where names repeat; None and {} (nothing measured) agree with everything.
    """
    pairs = protocols.items() if isinstance(protocols, Mapping) else protocols
    measured = [(name, p) for name, p in pairs if p and p.get("hash") and _measures(p)]
    for name, other in measured[1:]:
        first, reference = measured[0]
        if other["hash"] != reference["hash"]:
            apart = differences(reference, other) or [f"hash: {reference['hash']} and {other['hash']}"]
            more = f"; {len(apart) - 3} more" if len(apart) > 3 else ""
            return f"{first} and {name} were measured by different protocols ({'; '.join(apart[:3])}{more})"
    return None


def _measures(protocol: Mapping[str, Any]) -> bool:
    """Whether anything was measured by it: `evaluation=none` has a protocol without tasks and texts."""
    fields = protocol.get("fields") or {}
    parts = [fields[part] for part in ("tasks", "perplexity", "text") if part in fields]
    return not parts or any(parts)


def _pairs(a: Any, b: Any, where: str) -> list[tuple[str, Any, Any]]:
    """(dotted name, value here, value there) of every leaf of two nested dicts; a missing branch is one leaf."""
    if not (isinstance(a, Mapping) and isinstance(b, Mapping)):
        return [(where, a, b)]
    return [pair for key in dict.fromkeys([*a, *b])
            for pair in _pairs(a.get(key), b.get(key), f"{where}.{key}" if where else str(key))]


def _shown(value: Any) -> str:
    return "absent" if value is None else "present" if isinstance(value, Mapping) else str(value)
