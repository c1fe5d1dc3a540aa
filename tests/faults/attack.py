"""Damaged inputs, the guard that readers are held to, and the count of what refused them."""

from __future__ import annotations

import copy
import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from pydantic import ValidationError

import slm_exp
from slm_exp.core.errors import SlmError

FULL = os.environ.get("SLM_EXP_FAULTS", "") not in ("", "small")
"""`make test-faults`: the sizes of docs/reliability.md instead of those of the default suite."""
SHARE = float(os.environ["SLM_EXP_FAULTS"].removeprefix("full") or 1) if FULL else 0.0
"""`SLM_EXP_FAULTS=full0.1` runs a tenth of it."""
EVALUATION = ("evaluation.tasks=[piqa]", "evaluation.limit=2") if FULL else ("evaluation=none",)
"""Of runs that are attacked."""
LIMIT_S = 5.0
PACKAGE = Path(slm_exp.__file__).parent

tally: dict[str, Counter[str]] = defaultdict(Counter)
"""reader -> outcome -> how often: `accepted`, or the place in the package that refused."""
parsed: dict[str, Counter[bool]] = defaultdict(Counter)
"""reader -> whether an input passed the parser of its format."""
rows: list[tuple[str, str, str]] = []
"""(what was done, how often, what came of it), for the table."""


def size(small: int, full: int) -> int:
    """How many attacks of a kind."""
    return max(1, round(full * SHARE)) if FULL else small


def some(values: Sequence[Any]) -> Sequence[Any]:
    """All of them in a full run, a third in the default suite."""
    return values if FULL else values[::3]


class HoleError(AssertionError):
    """A reader did not keep its promise."""


def held(reader: str, read: Callable[[], Any], parses: bool = True, also: tuple[type[Exception], ...] = ()) -> Any:
    """What a reader gives; None where it refuses with an error of this package, in one line and within LIMIT_S.

    Args:
        parses: whether the input passes the parser of its format.
        also: other errors that this reader declares.
    Raises:
        HoleError: anything else.
    """
    started, cpu = time.monotonic(), time.process_time()
    value = None
    parsed[reader][parses] += 1
    try:
        value = read()
        tally[reader]["accepted"] += 1
    except (SlmError, *also) as error:
        tally[reader][validator(error)] += 1
        if len(str(error)) > 4010 or "Traceback" in str(error) or any(c in str(error) for c in "\x1b\x07"):
            raise HoleError(f"{reader}: not a refusal to read: {str(error)[:300]!r}") from error
    except Exception as error:
        raise HoleError(f"{reader}: {type(error).__name__}: {str(error)[:300]}") from error
    took, cpu = time.monotonic() - started, time.process_time() - cpu
    if cpu > LIMIT_S or took > 12 * LIMIT_S:  # others may use the machine too
        raise HoleError(f"{reader}: {took:.1f} s, {cpu:.1f} s of them computing")
    return value


def validator(error: BaseException) -> str:
    """The function of the package in which a refusal began, and pydantic's name of the fault where it is one."""
    place = ""
    seen: BaseException | None = error
    while seen is not None:
        tb = seen.__traceback__
        while tb is not None:
            path = Path(tb.tb_frame.f_code.co_filename)
            if PACKAGE in path.parents:
                place = f"{path.relative_to(PACKAGE).as_posix()} {tb.tb_frame.f_code.co_name}"
            tb = tb.tb_next
        if isinstance(seen, ValidationError):
            kind = seen.errors(include_url=False, include_context=False, include_input=False)[0]["type"]
            return f"{place} ({kind})"
        seen = seen.__cause__ or seen.__context__
    return place or type(error).__name__


# ------------------------------------------------------------------------------------------------ damaged documents

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2.9, -0.0, 10**9, 10**24, 10**400, -(10**30), 1e308, -1e308, 5e-324, float("nan"),
    float("inf"), float("-inf"), "", "x", "2", "NaN", "../../etc/passwd", "/etc/passwd", "a\nb", "\x1b[2J\x07",
    "=1+1", "<img src=x onerror=1>", "\\input{x}", "\ud800", "\u202e", "é" * 300, "A" * 100_000, "${oc.env:HOME}", [],
    {}, [[]], [None], [0], [True], ["x"], [0, 1, 2, 3], [[0, 10**9]], {"": 1}, {"a": {"b": 1}}, {"__class__": "x"},
    [[0, 2], [1, 3]], [[5, 2]], [[0, 2, 4]],
)
"""Values that stand where others were meant."""
KINDS = ("replace",) * 6 + ("remove", "add", "rename", "swap", "grow", "number")
RAW = ("flip", "cut", "twice", "deep", "mark", "empty")


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a document but the whole."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*at, key)
        yield from paths(child, (*at, key))


def inside(value: Any, at: Sequence[Any]) -> Any:
    for key in at:
        value = value[key]
    return value


def change(document: Any, at: tuple[Any, ...], kind: str, odd: Any, other: tuple[Any, ...]) -> Any:
    """A copy of a document with one place changed."""
    out = copy.deepcopy(document)
    holder, key = inside(out, at[:-1]), at[-1]
    before = holder[key]
    match kind:
        case "remove":
            del holder[key]
        case "add":
            target = before if isinstance(before, dict | list) else holder
            target.append(odd) if isinstance(target, list) else target.update(surprise=odd)
        case "rename" if isinstance(holder, dict):
            holder[f"{key}s"] = holder.pop(key)
        case "swap":
            holder[key] = copy.deepcopy(inside(document, other))
        case "grow" if isinstance(before, list | str) and before:
            holder[key] = before * 50
        case "number" if isinstance(before, int | float) and not isinstance(before, bool):
            holder[key] = before + 1 if isinstance(odd, str | None) else -before
        case _:
            holder[key] = copy.deepcopy(odd)
    return out


def damage(text: bytes, kind: str, at: float) -> bytes:
    """Damage to the bytes themselves."""
    i = int(at * max(0, len(text) - 1))
    match kind:
        case "flip":
            return text[:i] + bytes([text[i] ^ (1 << int(at * 997) % 8)]) + text[i + 1 :]
        case "cut":
            return text[:i]
        case "twice":
            return text.replace(b"{", b'{"n_layers": 3, "run_id": "a", "argv": [], "plans": [], "title": "a", ', 1)
        case "deep":
            n = int(10 ** (1 + 4 * at))
            return text.replace(b":", b": " + b"[" * n + b"]" * n + b', "x":', 1)
        case "mark":
            return b"\xef\xbb\xbf" + text
    return (b"", b"[]", b"null", b"3", b'"x"', b"\x00" * 100, b"\xff\xfe{}")[int(at * 6.99)]


def wrong(documents: Sequence[Any], dump: Callable[[Any], str] = json.dumps) -> st.SearchStrategy[bytes]:
    """Files with a document that has one field wrong; one in eight with its bytes damaged instead."""
    ways = [(document, list(paths(document))) for document in documents]

    @st.composite
    def file(draw: st.DrawFn) -> bytes:
        document, places = draw(st.sampled_from(ways))
        at, other = draw(st.sampled_from(places)), draw(st.sampled_from(places))
        if draw(st.integers(0, 7)):
            made = change(document, at, draw(st.sampled_from(KINDS)), draw(st.sampled_from(ODD)), other)
            if not draw(st.integers(0, 15)):  # two faults in one file
                left = list(paths(made))
                made = change(made, draw(st.sampled_from(left)), "replace", draw(st.sampled_from(ODD)), left[0]) \
                    if left else made
            return dump(made).encode("utf-8", "surrogatepass")
        return damage(dump(document).encode(), draw(st.sampled_from(RAW)), draw(st.floats(0, 1)))

    return file()


def is_json(text: bytes) -> bool:
    """Whether a plain parser takes it."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def report() -> Iterator[str]:
    """The lines that a run prints: what was done, then which validator refused how many inputs."""
    if rows:
        yield "| attack | how many | what came of it |"
        yield "|---|---:|---|"
        yield from (f"| {what} | {count} | {outcome} |" for what, count, outcome in rows)
        yield ""
    if tally:
        yield "| reader | inputs | pass the parser | accepted | refused by |"
        yield "|---|---:|---:|---:|---|"
    for reader, counts in tally.items():
        total = counts.total()
        share = parsed[reader][True] / max(1, parsed[reader].total())
        refused = [(name, n) for name, n in counts.most_common() if name != "accepted"]
        most = "; ".join(f"{name} {n}" for name, n in refused[:12])
        more = f"; {len(refused) - 12} more {sum(n for _, n in refused[12:])}" if len(refused) > 12 else ""
        yield f"| {reader} | {total:,} | {share:.0%} | {counts['accepted']:,} | {most}{more} |"
