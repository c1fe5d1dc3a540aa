"""Text for people: times, words of a command line, and text from files that must do nothing to whoever shows it."""

from __future__ import annotations

import re

_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but tab and newline (terminals obey them), changes of the direction of writing, and what no
encoding has: bytes of a file name that are not UTF-8."""


def printable(text: object) -> str:
    """Text with control characters written out, `\\x1b` for escape."""
    return _UNSEEN.sub(lambda found: f"\\x{ord(found[0]):02x}", str(text))


def override(key: str, value: object) -> str:
    """`key=value` for Hydra, quoted unless the value is a plain path."""
    from hydra.core.override_parser.types import Quote, QuotedString  # 0.1 s

    text = str(value)
    plain = "/" in text and re.fullmatch(r"[\w./-]+", text, re.ASCII)
    return f"{key}={text if plain else QuotedString(text=text, quote=Quote.single).with_quotes()}"


def duration(seconds: float | None) -> str:
    """158.52 -> 2 min 39 s; a dash for None."""
    if seconds is None:
        return "–"
    if seconds < 10:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def human(n: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} GB"
