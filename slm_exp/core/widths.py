"""What a width pruner decides: `width` of plan.json, with types, and read strictly.

Letters: L layers of the model that is narrowed, bottom to top.
"""

from __future__ import annotations

import base64
import binascii
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from slm_exp.core.documents import Document, parse
from slm_exp.core.errors import PlanError
from slm_exp.core.files import write_json

FILE = "width.json"


class WidthSizes(Document, allow_inf_nan=False):
    """How many units every layer keeps, each [L]."""

    heads: list[int]
    kv_heads: list[int]
    channels: list[int]
    hidden: int
    """Channels of the residual stream."""


class KeptUnits(Document, allow_inf_nan=False):
    """Which units every layer keeps, each [L]."""

    query_heads: list[list[int]]
    kv_heads: list[list[int]]
    channels: list[str]
    """See `pack_indices`."""


class InputMeans(Document, allow_inf_nan=False):
    """Mean of every input channel that goes, each [L] base64 of float32."""

    attention: list[str]
    """Of the attention's output projection."""
    mlp: list[str]
    """Of the MLP's last projection."""


class NMask(Document, allow_inf_nan=False):
    """Weights that are zero: of every `m` neighbouring inputs of an output, all but the `n` of largest |w| x norm."""

    n: int = Field(ge=1)
    m: int = Field(ge=2)
    norms: list[dict[str, str]]
    """[L], of the inputs of every projection (of those that share one, the first's): base64 of float32."""


class WidthDecision(Document, allow_inf_nan=False):
    """Which units of every layer stay, and how that was decided. `sizes` and `kept` suffice to carry it out."""

    method: str = ""
    ratio: float | None = Field(None, ge=0, lt=1)
    """Share of the decoder layers' parameters requested to be removed."""
    order: Literal["after", "before"] = "after"
    reached: float | None = Field(None, ge=0, lt=1)
    """The share that is removed."""
    uniform: bool | None = None
    """Whether an ordinary config of the family describes the result."""
    sizes: WidthSizes
    kept: KeptUnits
    tokens: str = ""
    """Digest of the calibration tokens."""
    notes: list[str] = Field([])
    means: InputMeans | None = None
    """Where biases make up for what goes."""
    hidden: str | None = None
    """Channels of the residual stream that stay (see `pack_indices`), where some go."""
    mask: NMask | None = None
    """Where single weights become zero; then every unit stays."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        sizes, kept, means = self.sizes, self.kept, self.means
        n = len(sizes.heads)
        for part, lists in (("sizes", sizes), ("kept", kept), ("means", means or ())):
            for name, values in lists:
                if name != "hidden":
                    _require(len(values) == n, f"{part}.{name}", f"{len(values)} layers", f"{n}, as in sizes.heads")
        for i in range(n):
            for name, units, size in (("query_heads", kept.query_heads[i], sizes.heads[i]),
                                      ("kv_heads", kept.kv_heads[i], sizes.kv_heads[i]),
                                      ("channels", self.channels(i), sizes.channels[i])):
                where = f"kept.{name}[{i}]"
                _require(units == sorted({*units}) and bool(units) and units[0] >= 0, where, units,
                         "numbers from 0 up, ascending, one at least")
                _require(len(units) == size, where, f"{len(units)} units", f"{size}, as in sizes")
            for name in ("attention", "mlp") if means else ():
                values = unpack_floats(getattr(means, name)[i], f"width.means.{name}[{i}]")
                _require(all(map(math.isfinite, values)), f"means.{name}[{i}]", values, "finite numbers")
        if self.mask is not None:
            found = f"{len(self.mask.norms)} layers"
            _require(len(self.mask.norms) == n, "mask.norms", found, f"{n}, as in sizes.heads")
            _require(self.mask.n < self.mask.m, "mask.n", self.mask.n, f"less than mask.m = {self.mask.m}")
        if self.hidden is not None:
            stay = len(unpack_indices(self.hidden, "width.hidden"))
            _require(stay == sizes.hidden, "hidden", f"{stay} channels", f"{sizes.hidden}, as in sizes.hidden")
        return self

    def channels(self, layer: int) -> list[int]:
        """MLP channels of a layer that stay, ascending."""
        return unpack_indices(self.kept.channels[layer], f"width.kept.channels[{layer}]")

    @classmethod
    def from_json(cls, data: object) -> WidthDecision:
        """Read `width` of a plan. Raises PlanError: which field, what it holds and what was expected, in one line."""
        try:
            return parse(cls, data, "width")
        except ValueError as error:
            raise PlanError(str(error)) from None

    def to_json(self) -> dict[str, Any]:
        """`width` of plan.json: the fields that were set."""
        return self.model_dump(exclude_unset=True)

    def save(self, folder: Path) -> None:
        write_json(folder / FILE, self.to_json())

    @classmethod
    def load(cls, folder: Path) -> WidthDecision:
        return cls.model_validate_json((folder / FILE).read_bytes())


def pack_indices(indices: Sequence[int], n: int) -> str:
    """A subset of range(n) as base64 of its bits, lowest first: 1536 channels take 256 characters."""
    bits = bytearray((n + 7) // 8)
    for i in indices:
        bits[i // 8] |= 1 << i % 8
    return base64.b64encode(bytes(bits)).decode()


def unpack_indices(text: str, where: str = "indices") -> list[int]:
    """The subset again, ascending. Raises PlanError: it is not base64; names `where`."""
    return [8 * at + bit for at, byte in enumerate(_bytes(text, where)) for bit in range(8) if byte >> bit & 1]


def pack_floats(values: Sequence[float]) -> str:
    """Float32 values as base64."""
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()


def unpack_floats(text: str, where: str = "values") -> tuple[float, ...]:
    """The values again. Raises PlanError: it is no base64 of float32; names `where`."""
    held = _bytes(text, where)
    if len(held) % 4:
        raise PlanError(f"{where} holds {len(held)} bytes; expected 4 for each number.")
    return struct.unpack(f"<{len(held) // 4}f", held)


def _bytes(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise PlanError(f"{where} = {text[:40]!r}; expected base64.") from None


def _require(ok: bool, field: str, value: object, wanted: str) -> None:
    if not ok:
        raise PlanError(f"width.{field} = {value}; expected {wanted}.")
