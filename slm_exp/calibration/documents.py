"""Documents of local files: rows of JSON lines or parquet, pieces of plain text; long ones in slices."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from slm_exp.core.errors import ConfigError
from slm_exp.core.files import no_file
from slm_exp.core.text import SUFFIXES, kind_of, pieces, read_field, read_lines, slices


class Document(NamedTuple):
    """One text and a short name for it, e.g. `c4:17`."""

    name: str
    text: str


def local_files(path: str) -> list[Path]:
    """The file, or the readable files of the folder in order of name. Raises ConfigError: neither is there, or the
    folder holds nothing readable."""
    at = Path(path).expanduser()
    if at.is_file():
        return [at]
    if not at.is_dir():
        raise ConfigError(f"calibration.path = {path}: {no_file(at)} Expected a file or folder.")
    files = sorted(p for p in at.iterdir() if p.is_file() and p.name.endswith(SUFFIXES))
    if not files:
        raise ConfigError(f"calibration.path = {path}; expected a folder with files ending in "
                          f"{', '.join(SUFFIXES)}.")
    return files


def read_documents(file: Path, field: str, name: str, piece_chars: int, rows: int | None = None) -> Iterator[Document]:
    """The texts of one file: a JSON line's or parquet row's `field`, or pieces of a plain text.

    Names count lines from 1 and rows and pieces from 0. At most the first `rows` rows are read.
    Raises DataError: see `core.text`; names the line.
    """
    plain = kind_of(file) == ".txt"
    texts = enumerate(pieces(read_lines(file), piece_chars)) if plain else read_field(file, field, "calibration.field")
    return documents(itertools.islice(texts, rows), name)


def documents(texts: Iterable[tuple[int, str]], name: str) -> Iterator[Document]:
    """A document `NAME:AT` of each (at, text); a text too long to be tokenised at once becomes `NAME:AT/0` and on."""
    for at, text in texts:
        for i, part in enumerate(slices(text)):
            yield Document(f"{name}:{at}" if len(part) == len(text) else f"{name}:{at}/{i}", part)
