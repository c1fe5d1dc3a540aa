"""Tokens to fit a regression on, of whatever source, disjoint from those that something is judged on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from slm_exp.calibration.base import Calibration
from slm_exp.calibration.jsonl import JsonLines
from slm_exp.calibration.mixture import Mixture
from slm_exp.calibration.text import TextCalibration
from slm_exp.calibration.tokens import Tokens
from slm_exp.core.errors import ConfigError, DataError, require
from slm_exp.core.registry import Component, Fields
from slm_exp.core.types import CalibrationTokens
from slm_exp.models.base import ModelHandle

RUN = 32  # tokens in a row that two texts do not share by chance


@dataclass(frozen=True)
class FitSource:
    """Where the tokens come from, and by which names a user knows the settings."""

    path: str | None
    """A .npy file [N, T], taken as it is; or texts as in calibration=jsonl; null is the bundled mixture."""
    n_samples: int
    seq_len: int
    field: str = "text"
    called: tuple[tuple[str, str], ...] = ()
    """(as a calibration source says it, as this setting is called) for its errors."""

    @classmethod
    def of(cls, component: Component, path: str | None, n_samples: int, seq_len: int) -> FitSource:
        """Of a component's settings fit_path, fit_samples and fit_seq_len."""
        names = {"path": "path", "n_samples": "samples", "seq_len": "seq_len"}
        return cls(path, n_samples, seq_len, called=tuple(
            (f"calibration.{theirs}", f"{component.config_group}.fit_{ours}") for theirs, ours in names.items()))

    @property
    def is_tokens(self) -> bool:
        return self.path is not None and self.path.endswith(".npy")

    def identity(self) -> Fields:
        with self._named():
            return self._source().identity()

    def check(self, dense: ModelHandle) -> None:
        """Raise ConfigError or DataError where it cannot be drawn from."""
        with self._named():
            self._source().draw(dense, 0)

    def lengths(self) -> dict[str, int]:
        """The longest sequence, by the setting that says so."""
        return {self._ours(name): n for name, n in self._source().lengths().items()}

    def draw(self, dense: ModelHandle, seed: int, avoid: CalibrationTokens) -> CalibrationTokens:
        """The tokens: none from a document of `avoid`, where documents are known. Raises DataError: too few or too
        short texts."""
        with self._named():
            source = self._source()
            if isinstance(source, TextCalibration):
                return source.draw(dense, seed + 1, {name.rpartition("@")[0] for name in avoid.sample_ids})
            return source.draw(dense, seed)

    def _source(self) -> Calibration:
        if self.is_tokens:
            return Tokens(path=self.path)
        if self.path is None:
            return Mixture(self.n_samples, self.seq_len)
        return JsonLines(self.n_samples, self.seq_len, path=self.path, field=self.field)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Errors of a calibration source, in the names of these settings."""
        try:
            yield
        except (ConfigError, DataError) as error:
            raise type(error)(self._ours(str(error))) from error

    def _ours(self, text: str) -> str:
        for theirs, ours in self.called:
            text = text.replace(theirs, ours)
        return text


@dataclass
class FitSettings(Component):
    """Fields of a component that is there to fit a regression."""

    path: str | None = None
    """Tokens to fit on: a .npy file [N, T], or texts as in calibration=jsonl; null is calibration=mixture."""
    field: str = "text"
    """Name of the text field."""
    n_samples: int = 64
    """Sequences; of a .npy file all are taken."""
    seq_len: int = 256
    """Tokens per sequence."""

    def check(self) -> None:
        self.at_least(2, "n_samples", remedy="One sequence at least is held out.")
        self.at_least(2, "seq_len")

    def identity(self) -> Fields:
        sizes = ("n_samples", "seq_len", "field", "path")  # of the source: a token file decides them itself
        out = {name: value for name, value in super().identity().items() if name not in sizes}
        return {**out, "tokens": self.fit_source().identity()}

    def lengths(self) -> dict[str, int]:
        return self.fit_source().lengths()

    def fit_source(self) -> FitSource:
        group = self.config_group
        return FitSource(self.path, self.n_samples, self.seq_len, self.field, (
            ("calibration.", f"{group}."), ("calibration=", f"{group}, as in calibration=")))


def check_ridges(field: str, ridges: Sequence[float]) -> None:
    """Raise ConfigError where there is none to choose from, or one that is no ridge."""
    require(bool(ridges) and all(r > 0 for r in ridges), field, ridges, "one or more numbers > 0",
            "For example [0.01].")


def shared_sequences(tokens: CalibrationTokens, other: CalibrationTokens) -> int:
    """How many sequences of `tokens` have a run of RUN tokens that `other` has too."""
    n = min(RUN, tokens.tokens_NT.shape[1], other.tokens_NT.shape[1])
    rows = [row.astype("int32") for row in other.tokens_NT]
    seen = {row[i : i + n].tobytes() for row in rows for i in range(len(row) - n + 1)}
    ours = (row.astype("int32") for row in tokens.tokens_NT)
    return sum(any(row[i : i + n].tobytes() in seen for i in range(0, len(row) - n + 1, n)) for row in ours)
