"""Reading texts from local files: JSON lines, parquet, plain text, or a folder of them."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from slm_exp.core.errors import ConfigError, DataError, did_you_mean

JSON_LINES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
SUFFIXES = (*JSON_LINES, ".parquet", ".txt")


class Document(NamedTuple):
    """One text and a short name for it, e.g. `c4:17`."""

    name: str
    text: str


def local_files(path: str, setting: str = "calibration.path") -> list[Path]:
    """The file, or the readable files of the folder in order of name.

    Raises:
        ConfigError: neither is there, or the folder holds nothing readable.
    """
    at = Path(path).expanduser()
    if at.is_file():
        return [at]
    if not at.is_dir():
        raise ConfigError(f"{setting} = {path}; expected an existing file or folder. There is no such file.")
    files = sorted(p for p in at.iterdir() if p.is_file() and p.name.endswith(SUFFIXES))
    if not files:
        raise ConfigError(f"{setting} = {path}; expected a folder with files ending in {', '.join(SUFFIXES)}.")
    return files


def read_documents(file: Path, field: str, name: str, piece_chars: int, rows: int | None = None) -> Iterator[Document]:
    """The texts of one file: a JSON line's or parquet row's `field`, or pieces of a plain text.

    Names count lines from 1 and rows and pieces from 0. At most the first `rows` rows are read.

    Raises:
        DataError: unreadable, not UTF-8, not JSON, or without the field; names the line.
    """
    if file.name.endswith(JSON_LINES):
        texts = _json_lines(file, field)
    elif file.suffix == ".parquet":
        texts = _parquet(file, field)
    elif file.suffix == ".txt":
        texts = enumerate(pieces(_plain(file), piece_chars))
    else:
        raise DataError(f"{file}: expected a file ending in {', '.join(SUFFIXES)}.")
    for at, text in itertools.islice(texts, rows):
        yield Document(f"{name}:{at}", text)


def pieces(text: str, chars: int) -> list[str]:
    """Cut a text at line ends into pieces of at least `chars` characters (a shorter rest joins the last)."""
    out: list[str] = []
    open_piece: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        open_piece.append(line)
        size += len(line)
        if size >= chars:
            out.append("".join(open_piece))
            open_piece, size = [], 0
    if open_piece:
        rest = "".join(open_piece)
        out = [*out[:-1], out[-1] + rest] if out else [rest]
    return out


def _plain(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as cause:
        raise DataError(f"{file}: not UTF-8 ({cause}).") from cause


def _json_lines(file: Path, field: str) -> Iterator[tuple[int, str]]:
    opened: Any = gzip.open(file, "rb") if file.name.endswith(".gz") else open(file, "rb")
    with opened as f:
        for n, line in enumerate(_lines(f, file), 1):
            if not line.strip():
                continue
            where = f"{file}, line {n}"
            try:
                row = json.loads(line)
            except ValueError as cause:
                raise DataError(f"{where}: not JSON ({cause}). Expected one object a line.") from cause
            if not isinstance(row, dict):
                raise DataError(f"{where}: a JSON {type(row).__name__}; expected an object with the field {field!r}.")
            yield n, _field(row, field, where)


def _lines(f: Iterable[bytes], file: Path) -> Iterator[bytes]:
    try:
        yield from f
    except (OSError, EOFError) as cause:
        raise DataError(f"{file}: cannot be read to its end ({cause}).") from cause


def _parquet(file: Path, field: str) -> Iterator[tuple[int, str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        names = table.schema_arrow.names
        if field not in names:
            raise DataError(
                f"{file}: no field {field!r}; it has {', '.join(names)}. {did_you_mean(field, names)} "
                "Set calibration.field."
            )
        n = 0
        for batch in table.iter_batches(columns=[field]):
            for value in batch.column(0).to_pylist():
                yield n, _field({field: value}, field, f"{file}, row {n}")
                n += 1
    except (pyarrow.ArrowException, OSError) as cause:
        raise DataError(f"{file}: not a readable parquet file ({cause}).") from cause


def _field(row: dict[str, Any], field: str, where: str) -> str:
    if field not in row:
        raise DataError(
            f"{where}: no field {field!r}; it has {', '.join(map(str, row)) or 'none'}. "
            f"{did_you_mean(field, map(str, row))} Set calibration.field."
        )
    if not isinstance(row[field], str):
        raise DataError(f"{where}: field {field!r} is a {type(row[field]).__name__}; expected text.")
    return row[field]
