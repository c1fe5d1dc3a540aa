"""A dictionary on disk that only grows: one line per entry, appended as soon as it is known, whole or not at all.

A killed search resumes with every score it had. Several processes may append to one journal. Every line carries a
checksum; a torn or damaged one is skipped.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import zlib
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

Entries = dict[str, Any]
FILE = "journal.jsonl"


class Journal:
    """`folder`/journal.jsonl; None keeps entries in memory only."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.entries: Entries = {}
        if folder is not None:
            self.entries, damaged = read(folder)
            if damaged:
                log.warning("%s: %d damaged lines are left out; what they held is computed again.", folder, damaged)
            with contextlib.suppress(OSError):
                os.utime(folder)  # used now: `slm cache prune` goes by it

    def append(self, key: str, value: Any) -> None:
        """Keep an entry, in memory and on disk. A cache that cannot be written only warns, once."""
        self.entries[key] = value
        if self.folder is None:
            return
        text = json.dumps([key, value], allow_nan=False)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # one write call on a file opened for appending: lines of several processes do not mix. The line break
            # comes first, so that a line torn by a kill or a full disk does not spoil this one.
            fd = os.open(self.folder / FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                os.write(fd, f"\n{_checksum(text)} {text}".encode())
            finally:
                os.close(fd)
        except OSError as error:
            log.warning("could not store scores in %s: %s. The run goes on without.", self.folder, error)
            self.folder = None


def read(folder: Path) -> tuple[Entries, int]:
    """The whole entries of a journal, and how many lines are not whole. Nothing there: no entries."""
    entries: Entries = {}
    damaged = 0
    try:
        lines = (folder / FILE).read_bytes().splitlines()
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            log.warning("%s cannot be read: %s", folder, error)
        lines = []
    for line in filter(None, lines):
        try:
            checksum, text = line.decode().split(" ", 1)
            if checksum != _checksum(text):
                raise ValueError("checksum")
            key, value = json.loads(text)
            entries[key] = value
        except (ValueError, TypeError, RecursionError):
            damaged += 1
    return entries, damaged


def _checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"
