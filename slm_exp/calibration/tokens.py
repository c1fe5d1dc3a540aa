"""`calibration=tokens`: a token file as it is, to repeat a calibration exactly."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np

from slm_exp.calibration.base import Calibration
from slm_exp.calibration.text import check_ids, paths_digest
from slm_exp.core.cache.digests import Status, status_of
from slm_exp.core.cost import Tokens as Shape
from slm_exp.core.errors import ConfigError, require
from slm_exp.core.files import no_file
from slm_exp.core.registry import Fields, register
from slm_exp.core.types import CalibrationTokens
from slm_exp.models.base import ModelHandle

BLOCK = 2**22
"""Ids that are looked at together."""


@register("calibration", "tokens")
@dataclass
class Tokens(Calibration):
    """An int array [N, T] of token ids in a .npy file, e.g. another run's calibration_tokens.npy.

    The file decides everything: n_samples, seq_len, seed and field are not looked at.
    """

    reads_ids: ClassVar[bool] = True

    def check(self) -> None:
        super().check()
        require(bool(self.path), "calibration.path", self.path, "a .npy file of token ids [N, T]",
                "For example calibration.path=calibration_tokens.npy.")
        require(not self.add_bos, "calibration.add_bos", self.add_bos, "false: a token file is taken as it is")

    def identity(self) -> Fields:
        assert self.path is not None
        load_ids(Path(self.path).expanduser(), f"calibration.path = {self.path}")
        return {"name": self.name, "path": paths_digest(self.path)}

    def shape(self) -> Shape:
        """By the file's header."""
        return Shape(*load_ids(Path(self.path or "").expanduser(), f"calibration.path = {self.path}").shape)

    def check_data(self, dense: ModelHandle) -> None:
        require_ids(Path(self.path or "").expanduser(), dense, f"calibration.path = {self.path}")

    def draw(self, handle: ModelHandle, seed: int) -> CalibrationTokens:
        assert self.path is not None
        file = Path(self.path).expanduser()
        ids = require_ids(file, handle, f"calibration.path = {file}")
        return CalibrationTokens(ids.astype(np.int32), self.path, tuple(f"{file.name}:{i}" for i in range(len(ids))))


def load_ids(file: Path, where: str) -> np.ndarray:
    """The [N, T] token ids of a .npy file, N >= 1, T >= 2, none below 0, as they are.

    Raises:
        ConfigError: anything else; names `where`.
    Cost: the first time that a process looks at it, the file is read once.
    """
    wanted = "expected a .npy file with an int array [N, T]"
    if reason := no_file(file):
        raise ConfigError(f"{where}: {reason} Expected a .npy file.")
    try:
        ids: np.ndarray = np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as cause:  # numpy and zipfile raise a dozen kinds
        about = "it holds no numbers that numpy wrote" if "pickle" in str(cause) else cause
        raise ConfigError(f"{where}: cannot be read ({about}); {wanted}.") from cause
    if not isinstance(ids, np.ndarray):
        raise ConfigError(f"{where}: an archive of {len(ids.files)} arrays; {wanted}.")
    if ids.dtype.kind not in "iu":
        raise ConfigError(f"{where}: an array of {ids.dtype}; {wanted} (whole numbers).")
    if ids.ndim != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise ConfigError(f"{where}: shape {list(ids.shape)}; {wanted}, N >= 1, T >= 2.")
    status = status_of(file)
    if isinstance(ids, np.memmap) and status.size != ids.offset + ids.nbytes:
        raise ConfigError(f"{where}: {status.size} bytes, and an array of {list(ids.shape)} {ids.dtype} takes "
                          f"{ids.offset + ids.nbytes}; {wanted}, whole and alone.")
    if (lowest := _range(status)[0]) < 0:
        raise ConfigError(f"{where}: holds {lowest}; {wanted} (ids >= 0).")
    return ids


@lru_cache(maxsize=256)
def _range(status: Status) -> tuple[int, int]:
    """The lowest and the highest id of a token file."""
    ids = np.load(status.path, mmap_mode="r", allow_pickle=False)
    rows = max(1, BLOCK // ids.shape[1])
    ends = [(int(part.min()), int(part.max())) for part in (ids[i : i + rows] for i in range(0, len(ids), rows))]
    return min(low for low, _ in ends), max(high for _, high in ends)


def require_ids(file: Path, handle: ModelHandle, where: str) -> np.ndarray:
    """As `load_ids`, for a model. Raises DataError besides: an id outside its vocabulary. Only the config is looked at.
    """
    ids = load_ids(file, where)
    if _range(status_of(file))[1] >= int(handle.config.vocab_size):
        check_ids(ids, handle, where)
    return ids
