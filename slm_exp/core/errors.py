"""The errors a user can cause or meet: each says where, what came, what was wanted, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from slm_exp.core.format import printable

NOT_FINITE = "Use model.dtype=float32 or bfloat16; if it is float32 already, the weights are damaged."
"""The remedy where weights or states of a model are not finite."""
LONGEST = 4000


class SlmError(Exception):
    """Base of every error this package raises on purpose; shown as one message, without a traceback.

    What a file holds may be quoted in it: control characters are written out, and a message of more than LONGEST
    characters is cut.
    """

    def __str__(self) -> str:
        text = printable(super().__str__())
        return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


class ConfigError(SlmError):
    """A setting is wrong. Raised before any weights load."""


class ArchitectureError(SlmError):
    """The model's architecture, or a feature of it, is not understood."""


class DataError(SlmError):
    """Calibration or evaluation data is missing, too short or malformed."""


class ProtocolError(SlmError):
    """Numbers were not measured as stated, so they must not be compared."""


class PlanError(SlmError):
    """A merge plan contradicts itself or the model it is applied to."""


class CheckpointError(SlmError):
    """A saved checkpoint does not reproduce the model in memory."""


class StageError(SlmError):
    """A stage of the pipeline failed; the failed record is already on disk."""

    def __init__(self, stage: str, cause: BaseException) -> None:
        super().__init__(f"stage {stage!r} failed: {type(cause).__name__}: {cause}")
        self.stage = stage

    @property
    def refused(self) -> bool:
        """Whether nothing was computed yet: the first stage found that model, data or settings cannot work."""
        return self.stage == "load" and isinstance(self.__cause__, SlmError)


def require(ok: bool, field: str, value: Any, wanted: str, remedy: str = "") -> None:
    """Raise ConfigError unless `ok`: `field = value; expected wanted. remedy`."""
    if not ok:
        raise ConfigError(f"{field} = {value}; expected {wanted}." + (f" {remedy}" if remedy else ""))


def require_one_of(field: str, value: str, choices: Iterable[str]) -> None:
    """Raise ConfigError unless `value` is one of `choices`, naming the closest."""
    choices = sorted(choices)
    require(value in choices, field, value, "one of " + ", ".join(choices), did_you_mean(value, choices))


def caused_by_config(error: BaseException | None) -> ConfigError | None:
    """The ConfigError that a library's error wraps, or None."""
    while error is not None and not isinstance(error, ConfigError):
        error = error.__cause__ or error.__context__
    return error


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """`Did you mean X?`, or an empty string when nothing is close."""
    close = difflib.get_close_matches(str(word), list(choices), n=1, cutoff=0.5)
    return f"Did you mean {close[0]}?" if close else ""


def no_field(name: str, known: Sequence[str]) -> str:
    """`there is no method.treshold. Did you mean threshold? Known here: ...`: the nearest first, for lists are long."""
    here = f"Known here: {', '.join(known)}." if known else ""
    return " ".join(filter(None, (f"there is no {name}.", did_you_mean(name.rpartition(".")[2], known), here)))
