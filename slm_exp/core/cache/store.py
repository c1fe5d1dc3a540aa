"""A content-addressed store of stage results, shared by grid cells and safe with several processes.

An entry is a folder `<stage>/<key>/` of plain files (JSON, npy, npz, safetensors; never pickle) with a
`manifest.json` of their sizes and digests. It appears by one rename, so a reader sees a whole entry or none.
The key hashes the stage's inputs, the code that computes it and the library versions; never names or times.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

from slm_exp.core.cache.code import Code, code_digest, library_versions
from slm_exp.core.cache.digests import content_digest
from slm_exp.core.cache.folder import MANIFEST, STAGES, mark, problem
from slm_exp.core.cache.folder import default_cache_dir as default_cache_dir
from slm_exp.core.files import digest, file_digest, write_json
from slm_exp.core.locks import Lock

Inputs = dict[str, Any]
"""What a stage reads, by name: JSON-able, digests in place of what is large."""

log = logging.getLogger(__name__)

NO_CODE = Code((), ())
"""Of a value that no code of this package computes."""


class Storable(Protocol):
    """A value that writes itself into a folder and reads itself back."""

    def save(self, folder: Path) -> None: ...

    @classmethod
    def load(cls, folder: Path) -> Self: ...


S = TypeVar("S", bound=Storable)


class StageStore:
    """The cache folder. `StageStore(None)` stores nothing and always computes."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def key(self, stage: str, inputs: Inputs, code: Code = NO_CODE) -> str:
        """Digest of a stage's inputs, code and libraries."""
        return digest({"stage": stage, "inputs": inputs, "code": code_digest(code.files),
                       "libraries": library_versions(code.libraries)})

    def entry(self, stage: str, inputs: Inputs, code: Code = NO_CODE) -> Path:
        """The folder of an entry, there or not. Raises ValueError: no cache folder, or a stage that is none of STAGES:
        such entries would never be pruned."""
        if self.folder is None or stage not in STAGES:
            raise ValueError(f"cache folder {self.folder}, stage {stage}; expected a folder and one of {STAGES}")
        return self.folder / stage / self.key(stage, inputs, code)

    def cached(self, stage: str, inputs: Inputs, kind: type[S], compute: Callable[[], S],
               code: Code = NO_CODE) -> tuple[S, bool]:
        """The stored result for these inputs, or a computed one, stored. Returns (value, whether it was stored).

        Several processes asking for the same entry compute it once: the others wait for the first.
        A damaged entry is reported, removed and computed again. A cache that cannot be written only warns.
        """
        if self.folder is None:
            return compute(), False
        entry = self.entry(stage, inputs, code)
        if (stored := self._read(entry, kind)) is not None:
            return stored, True
        with self._locked(entry):
            if (stored := self._read(entry, kind)) is not None:
                return stored, True
            value = compute()
            try:
                self._build(entry, value.save, inputs)
            except OSError as error:
                log.warning("could not store %s in the cache: %s. The run goes on.", stage, error)
            return value, False

    def entry_folder(self, stage: str, inputs: Inputs, build: Callable[[Path], None], code: Code = NO_CODE) -> Path:
        """A stored folder used in place (e.g. converted weights): built once by `build(folder)`.

        Every file has the bytes that were written: its digest is compared, by memory where the file is unchanged
        since (see `digests`).
        Raises OSError: the cache cannot be written; a folder entry has nowhere else to live.
        """
        entry = self.entry(stage, inputs, code)
        if not self._whole(entry, content_digest):
            with self._locked(entry):
                if not self._whole(entry, content_digest):
                    self._build(entry, build, inputs)
        return entry

    def _read(self, entry: Path, kind: type[S]) -> S | None:
        if not self._whole(entry, file_digest):
            return None
        try:
            value = kind.load(entry)
        except Exception as error:  # a whole entry of another shape: recompute rather than die
            log.warning("cache entry %s cannot be read (%s); recomputing.", entry, error)
            shutil.rmtree(entry, ignore_errors=True)
            return None
        return value

    def _build(self, entry: Path, build: Callable[[Path], None], inputs: Inputs) -> None:
        tmp = entry.with_name(f".{entry.name}.{os.getpid()}.{uuid.uuid4().hex[:6]}.tmp")
        tmp.mkdir(parents=True)
        try:
            build(tmp)
            files = {str(f.relative_to(tmp)): {"bytes": f.stat().st_size, "digest": file_digest(f)}
                     for f in sorted(tmp.rglob("*")) if f.is_file()}
            write_json(tmp / MANIFEST, {"inputs": inputs, "files": files, "created": time.time()})
            if entry.exists():
                shutil.rmtree(entry)
            os.replace(tmp, entry)
        finally:
            shutil.rmtree(tmp, ignore_errors=True)

    def _whole(self, entry: Path, digest_of: Callable[[Path], str]) -> bool:
        if not entry.is_dir():
            return False
        if damage := problem(entry, digest_of):
            log.warning("cache entry %s is damaged (%s); recomputing.", entry, damage)
            shutil.rmtree(entry, ignore_errors=True)
            return False
        with contextlib.suppress(OSError):
            os.utime(entry)  # pruning goes by last use
        return True

    @contextlib.contextmanager
    def _locked(self, entry: Path) -> Iterator[None]:
        with contextlib.ExitStack() as held:
            try:
                mark(entry.parent.parent)
                entry.parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(Lock(entry.with_name(f".{entry.name}.lock")).held())
            except OSError as error:
                log.warning("cache %s cannot be written: %s", self.folder, error)
            yield
