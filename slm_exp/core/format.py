"""Text for people: times, words of a command line, and text from files that must do nothing to whoever shows it."""

from __future__ import annotations

import math
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


def decimals(error: float) -> int:
    """How many an error is worth, and so what it belongs to: 0.0346 has 3 (0.035), 9.68 none (10), 412 minus 2 (400).

    Two significant digits of an error that begins below 3.55, else one; the Particle Data Group's rule (Review of
    Particle Physics, introduction, rounding). One that is none (a record may say -1) counts as its size.
    """
    error = max(abs(error), 1e-12) if math.isfinite(error) else 1.0
    exponent = math.floor(math.log10(error))
    return (1 if error / 10.0**exponent < 3.55 else 0) - exponent


def places(value: float, error: float | None, digits: int) -> int:
    """Decimals of a value and its error: `digits` where there is none, or none but what sums of equal numbers round."""
    return decimals(error) if error and error > 1e-9 * max(1.0, abs(value)) else digits


def rounded(value: float, digits: int) -> str:
    """With so many decimals, none where negative: the digits before the point are zeros then. No negative zero."""
    if abs(value) > 1e300:
        return f"{'-' if value < 0 else ''}more than 1e300"
    text = f"{round(value, digits):.{max(0, digits)}f}"
    return text.lstrip("-") if float(text) == 0 else text


def rounded_pair(value: float, error: float | None, digits: int = 1) -> tuple[str, str]:
    """Value and error, both as precise as the error is; see `places` for `digits`."""
    if error is None or not math.isfinite(error):
        return rounded(value, digits), ""
    digits = places(value, error, digits)
    return rounded(value, digits), rounded(error, digits)


def signed(number: str) -> str:
    """With a plus where it is above 0."""
    return f"+{number}" if number.strip("0.") and not number.startswith("-") else number


def with_error(value: float, error: float | None, digits: int = 1, sign: bool = False) -> str:
    """`40.7 ± 3.5`; `+5.7 ± 3.5` with a sign."""
    text, error_text = rounded_pair(value, error, digits)
    text = signed(text) if sign else text
    return f"{text} ± {error_text}" if error_text else text
