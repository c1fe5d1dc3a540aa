"""The one reader of texts: plain text, JSON lines, JSON lists and parquet, each also packed by gzip.

UTF-8 with or without byte order mark. Lines end in LF, CRLF or CR; other separators (U+2028, form feed) are text.
Memory is bounded: a line, a list or a batch of rows of more than LIMIT bytes is refused by file and line, also where a
small packed file holds it; `slices` cuts long texts before they reach a tokenizer, which takes about 100 bytes of
memory a character.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from slm_exp.core.errors import DataError, did_you_mean
from slm_exp.core.files import plain_file

KINDS = (".txt", ".jsonl", ".json", ".parquet")
SUFFIXES = (*KINDS, *(f"{kind}.gz" for kind in KINDS))
LIMIT = 10**9
"""Bytes of a line, of a JSON list or of a value, unpacked."""
SLICE = 2**20
"""Characters that are tokenised at a time."""
SURROGATE = re.compile("[\ud800-\udfff]")
LIST = re.compile(rb"\s*\[")
BOM = b"\xef\xbb\xbf"


class Row(NamedTuple):
    """One value of a file, and its place: a line from 1, an entry of a list from 1, or a parquet row from 0."""

    value: Any
    at: int
    where: str
    """`FILE, line 3`."""


def kind_of(file: Path) -> str:
    """One of KINDS. Raises DataError: the name ends in none of SUFFIXES."""
    for kind in KINDS:
        if file.name.lower().endswith((kind, f"{kind}.gz")):
            return kind
    raise DataError(f"{file}: expected a file ending in {', '.join(SUFFIXES)}.")


def read_lines(file: Path) -> Iterator[str]:
    """The lines of a text file, each with one "\\n" at its end if it had a line end. Raises DataError: unreadable, not
    UTF-8, or a line of more than LIMIT bytes; names the line."""
    for n, line in enumerate(_raw_lines(file), 1):
        yield _decoded(line, f"{file}, line {n}")


def read_rows(file: Path, field: str | None = None, setting: str = "", lists: bool = False) -> Iterator[Row]:
    """The values of JSON lines (blank ones are skipped), of a .json list, or rows of a parquet file as dicts.

    Args:
        field: the only column read of a parquet file; None reads all.
        setting: the config field that names `field`, for messages.
        lists: a .jsonl file may be one list too.
    Raises DataError: unreadable, malformed, or beyond LIMIT; names the line or row.
    """
    kind = kind_of(file)
    if kind == ".parquet":
        yield from _parquet(file, field, setting)
        return
    lines, n = _raw_lines(file), 0
    for line in lines:
        n += 1  # noqa: SIM113 - enumerate would hold on to the line
        where = f"{file}, line {n}"
        if (lists or kind == ".json") and LIST.match(line):
            whole = bytearray(line)
            for more in lines:
                whole += more
                if len(whole) > LIMIT:
                    raise _too_long(where, "a list")
            for i, value in enumerate(_parsed([whole], where, "JSON lines or a JSON list"), 1):
                yield Row(value, i, f"{file}, entry {i}")
            return
        if not line.isspace():
            given: list[bytes | bytearray] = [line]
            del line  # nothing but `given` holds it while it is parsed
            yield Row(_parsed(given, where, "JSON lines"), n, where)


def read_field(file: Path, field: str, setting: str = "") -> Iterator[tuple[int, str]]:
    """(place, text) of every row's `field`; arguments and errors as `read_rows`, also where a row has no such text."""
    for value, at, where in read_rows(file, field, setting):
        if not isinstance(value, dict):
            raise DataError(f"{where}: a JSON {type(value).__name__}; expected an object with the field {field!r}.")
        if field not in value:
            raise _no_field(where, field, list(value), setting)
        if not isinstance(value[field], str):
            raise DataError(f"{where}: field {field!r} is a {type(value[field]).__name__}; expected text.")
        if not value[field].isascii() and SURROGATE.search(value[field]):
            raise DataError(f"{where}: field {field!r} holds half of a character (a lone surrogate); expected text.")
        yield at, value.pop(field)


def slices(text: str, chars: int = SLICE) -> Iterator[str]:
    """A text in slices of at most `chars` characters, cut at a blank where there is one in a slice's last quarter."""
    start = 0
    while len(text) - start > chars:
        blank = text.rfind(" ", start + 3 * chars // 4, start + chars)
        stop = blank if blank > start else start + chars  # the blank begins the next: most tokenizers join it so
        yield text[start:stop]
        start = stop
    yield text[start:] if start else text


def pieces(lines: Iterable[str], chars: int) -> Iterator[str]:
    """Lines joined into pieces of at least `chars` characters (a shorter rest joins the last piece)."""
    open_piece: list[str] = []
    size, last = 0, ""
    for line in lines:
        open_piece.append(line)
        size += len(line)
        if size >= chars:
            if last:
                yield last
            last, open_piece, size = "".join(open_piece), [], 0
    if whole := last + "".join(open_piece):
        yield whole


def _raw_lines(file: Path) -> Iterator[bytes]:
    """Lines as bytes, "\n" for every line end, the byte order mark taken off."""
    n = 0
    try:
        with _opened(file) as f:
            if f.read(len(BOM)) != BOM:
                f.seek(0)
            while raw := f.readline(LIMIT + 1):
                if len(raw) > LIMIT:
                    raise _too_long(f"{file}, line {n + 1}", "a line")
                lines = raw.splitlines(keepends=True)[::-1]  # at CR too
                del raw
                while lines:
                    n += 1
                    if lines[-1].endswith((b"\r", b"\r\n")):
                        lines[-1] = lines[-1].rstrip(b"\r\n") + b"\n"
                    yield lines.pop()  # this frame must not hold on to it
    except (OSError, EOFError, ValueError, zlib.error) as cause:
        raise DataError(f"{file}: cannot be read to its end ({cause}).") from cause


def _opened(file: Path) -> IO[bytes]:
    plain_file(file)
    return gzip.open(file, "rb") if file.name.lower().endswith(".gz") else open(file, "rb")  # type: ignore[return-value]


def _decoded(line: bytes | bytearray, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as cause:
        raise DataError(f"{where}: not UTF-8 ({cause}).") from cause


def _parsed(given: list[bytes | bytearray], where: str, wanted: str) -> Any:
    """The JSON value of the one line that is given, and given up: a long one is in memory twice at most."""
    text = _decoded(given.pop(), where)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as cause:
        raise DataError(f"{where}: not JSON ({cause}), so the file is not readable as {wanted}.") from cause


def _parquet(file: Path, field: str | None, setting: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    source: Any = file
    try:
        if file.name.lower().endswith(".gz"):
            with _opened(file) as f:
                source = pyarrow.BufferReader(f.read(LIMIT + 1))
            if source.size() > LIMIT:
                raise _too_long(str(file), "a packed parquet file")
        table = pyarrow.parquet.ParquetFile(source)
        names = table.schema_arrow.names
        if field is not None and field not in names:
            raise _no_field(str(file), field, names, setting)
        n = 0
        for batch in table.iter_batches(batch_size=256, columns=None if field is None else [field]):
            if batch.nbytes > LIMIT:
                raise _too_long(f"{file}, rows {n} to {n + len(batch) - 1}", "a batch of rows")
            for value in batch.to_pylist():
                yield Row(value, n, f"{file}, row {n}")
                n += 1
    except (pyarrow.ArrowException, OSError, EOFError, zlib.error) as cause:
        raise DataError(f"{file}: not a readable parquet file ({cause}).") from cause


def _no_field(where: str, field: str, names: Iterable[Any], setting: str) -> DataError:
    names = list(map(str, names))
    return DataError(f"{where}: no field {field!r}; it has {', '.join(names) or 'none'}. {did_you_mean(field, names)}"
                     + (f" Set {setting}." if setting else ""))


def _too_long(where: str, what: str) -> DataError:
    return DataError(f"{where}: {what} of more than {LIMIT / 1e9:g} GB. Split it into documents of a line each.")
