"""From texts to tokens: documents long enough, in random order, one random crop each."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from slm_exp.calibration.base import Calibration
from slm_exp.calibration.documents import Document, local_files, read_documents
from slm_exp.core.cache.digests import content_digest, files_digest
from slm_exp.core.errors import DataError
from slm_exp.core.hub import Repo
from slm_exp.core.registry import Fields
from slm_exp.core.types import CalibrationTokens
from slm_exp.models.base import ModelHandle

CHECKED_BYTES = 4_000_000
"""Texts up to this size are drawn, or cut into chunks, before weights load, to see that there are enough."""


@dataclass
class TextCalibration(Calibration):
    """Calibration from documents.

    Documents of at least `seq_len` tokens are taken in an order drawn from the seed, one crop at a random offset
    from each. The tokenizer's own special tokens are left out; `add_bos` puts BOS first and shortens the crop by one.
    """

    @abstractmethod
    def documents(self, handle: ModelHandle) -> tuple[str, Iterable[Document]]:
        """Where the texts come from, in words for the record, and the texts. Raises DataError / ConfigError: they
        cannot be had; names the remedy."""

    def identity(self) -> Fields:
        fields = super().identity()
        if self.path is not None:
            fields["path"] = paths_digest(self.path)
        return fields

    def check_data(self, dense: ModelHandle) -> None:
        """Cost: texts are read until enough are found that may be long enough; of a file of the hub none."""
        if not self.reads_local:
            return
        source, documents = self.documents(dense)
        need = self.seq_len - self.add_bos
        found = sum(1 for _ in itertools.islice(filter(partial(_may_have, need), documents), self.n_samples))
        self._require_texts(found, f"may have {need} tokens", source)

    def check_model(self, dense: ModelHandle) -> None:
        """Cost: files up to CHECKED_BYTES are read, and as many of their texts tokenised as are wanted."""
        if self.path is not None and sum(file.stat().st_size for file in local_files(self.path)) <= CHECKED_BYTES:
            self.draw(dense, 0)

    @property
    def reads_local(self) -> bool:
        """Whether the texts lie here."""
        return True

    def _require_texts(self, found: int, which: str, source: str) -> None:
        if found < self.n_samples:
            raise DataError(f"calibration={self.name} ({source}): {found} texts {which}; {self.n_samples} are "
                            "wanted. Lower calibration.n_samples or calibration.seq_len, or give longer texts.")

    def draw(self, handle: ModelHandle, seed: int, without: Collection[str] = ()) -> CalibrationTokens:
        """As in `Calibration`, of no document named in `without`; the others and their crops stay the same."""
        start, need = self.beginning(handle)
        tokenizer: Any = handle.tokenizer
        source, documents = self.documents(handle)
        long_enough = [d for d in documents if _may_have(need, d)]  # a cheap look before tokenising
        rng = np.random.default_rng(self.seed if self.seed is not None else seed)
        rows: list[list[int]] = []
        names: list[str] = []
        for i in rng.permutation(len(long_enough)):
            document = long_enough[i]
            ids = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
            if len(ids) < need:
                continue
            offset = int(rng.integers(0, len(ids) - need + 1))
            if document.name in without:
                continue
            rows.append(start + ids[offset : offset + need])
            names.append(f"{document.name}@{offset}")
            if len(rows) == self.n_samples:
                break
        free = " and are not calibrated on" if without else ""
        self._require_texts(len(rows), f"have at least {need} tokens{free}", source)
        tokens_NT = np.asarray(rows, dtype=np.int32)
        check_ids(tokens_NT, handle, f"the tokenizer of {handle.name}")
        return CalibrationTokens(tokens_NT, source, tuple(names))

    def beginning(self, handle: ModelHandle) -> tuple[list[int], int]:
        """What every sequence begins with, and how many tokens of text it has. Raises DataError: no such token, or no
        tokenizer."""
        tokenizer = handle.tokenizer
        if tokenizer is None:
            raise DataError(f"calibration={self.name} needs a tokenizer, and the model {handle.name} has none. "
                            "Use calibration=tokens calibration.path=FILE.npy.")
        if self.add_bos and tokenizer.bos_token_id is None:
            raise DataError(f"calibration.add_bos = true, but the tokenizer of {handle.name} has no BOS token. "
                            "Set calibration.add_bos=false.")
        start = [tokenizer.bos_token_id] if self.add_bos else []
        return start, self.seq_len - len(start)

    def read_local(self, path: str) -> Iterator[Document]:
        """The texts of a local file or folder; plain text comes in pieces of about 16 characters a wanted token."""
        for file in local_files(path):
            yield from read_documents(file, self.field, file.name.split(".")[0] or file.name, 16 * self.seq_len)


@dataclass
class HubText(TextCalibration):
    """A data set on the Hugging Face hub, read from one of its files; `path` names a local copy instead."""

    repo: ClassVar[str]
    file: ClassVar[str]
    revision: ClassVar[str | None] = None
    rows: ClassVar[int | None] = None
    """Read at most so many rows of the file."""

    @property
    def reads_local(self) -> bool:
        return self.path is not None

    def documents(self, handle: ModelHandle) -> tuple[str, Iterable[Document]]:
        if self.path is not None:
            return self.path, self.read_local(self.path)
        return f"{self.repo}/{self.file}", self.read_hub()

    def check_source(self) -> None:
        if self.path is None:
            self._on_hub().require(self.file)

    def read_hub(self) -> Iterator[Document]:
        """The rows of the hub's file, fetched unless it is in the local Hugging Face cache."""
        return read_documents(self.fetch(), self.field, self.name, 16 * self.seq_len, self.rows)

    def fetch(self) -> Path:
        """The file's place in the local Hugging Face cache."""
        return self._on_hub().file(self.file)

    def _on_hub(self) -> Repo:
        return Repo(self.repo, self.revision, "dataset", "calibration.path", DataError)


def _may_have(need: int, document: Document) -> bool:
    """Whether a text can have so many tokens: no more than bytes, and a leading blank."""
    return len(document.text) * 4 + 1 >= need and len(document.text.encode("utf-8", "replace")) + 1 >= need


def paths_digest(path: str) -> str:
    """Digest of a file's contents, or of the names and contents of a folder's readable files. Raises ConfigError: there
    is no such file."""
    files = local_files(path)
    return content_digest(files[0]) if Path(path).expanduser().is_file() else files_digest(files, files[0].parent)


def check_ids(tokens_NT: np.ndarray, handle: ModelHandle, where: str) -> None:
    """Refuse ids that the model has no embedding for. Raises DataError: names the first such id and its place."""
    vocab = int(handle.config.vocab_size)
    bad = np.argwhere((tokens_NT < 0) | (tokens_NT >= vocab))
    if len(bad):
        row, column = (int(i) for i in bad[0])
        raise DataError(f"{where}: token id {int(tokens_NT[row, column])} at row {row}, column {column} lies outside "
                        f"the vocabulary of {handle.name} (0 to {vocab - 1}).")
