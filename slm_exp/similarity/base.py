"""The `similarity` group: the score a candidate must pass, against the dense model's last hidden state."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar

from slm_exp.calibration.fit import FitSource
from slm_exp.core.cost import Tokens, Work, normal_equations
from slm_exp.core.errors import require, require_one_of
from slm_exp.core.registry import Component, Fields
from slm_exp.kernels.base import Kernel
from slm_exp.models.base import ModelHandle
from slm_exp.models.sizes import Sizes

if TYPE_CHECKING:
    from torch import Tensor

AFTER = ("reconstruct",)
FIT = ("fit_path", "fit_samples", "fit_seq_len")

GRAM_BYTES = 2**29
"""Of Gram matrices of all layers at once. Beyond it (30 layers: 8,700 tokens) the model runs again for the rest."""

KEPT_BYTES = 1 << 30
"""Of refitted weights at most: all that a search of a small model needs, a few of a large one (fitted again then)."""

Scorer = Callable[["Tensor"], float]


@dataclass
class Similarity(Component, ABC):
    """An acceptance score; the fields also set the CKA estimator of the layer similarity matrix."""

    by_sample: ClassVar[bool] = False
    """Whether the score is the mean of one of every sample, so that some samples bound it (see `MeanSimilarity`)."""
    saturates: ClassVar[bool] = False
    """Whether a few tokens of huge norm decide it, so that a refit takes every candidate to 1."""

    estimator: str = "unbiased"
    """HSIC estimator of CKA: unbiased (Song et al. 2012) or biased."""
    batch: int = 256
    """Tokens per minibatch of CKA, at most."""
    skip_first_token: bool = True
    """Leave every sequence's first token out of CKA: its norm is huge and draws the picture."""

    after: str | None = None
    """reconstruct: candidates are scored after the layer beside each cut is refitted (search/refit.py)."""
    fit_path: str | None = None
    """What they are refitted on: a .npy file [N, T], or texts as in calibration=jsonl; null is calibration=mixture
    without the documents that the calibration has drawn from."""
    fit_samples: int = 24
    """Sequences; of a .npy file all are taken."""
    fit_seq_len: int = 256
    """Tokens per sequence."""

    def check(self) -> None:
        require_one_of("similarity.estimator", self.estimator, ("unbiased", "biased"))
        self.at_least(4, "batch")
        self.at_least(2, "fit_samples", "fit_seq_len")
        if self.after is None:
            require(self.fit_path is None, "similarity.fit_path", self.fit_path, "null without similarity.after")
            return
        require_one_of("similarity.after", self.after, AFTER)
        require(self.saturates is False, "similarity.after", self.after, f"null with similarity={self.name}",
                "After a refit it is .999 for every candidate: a few tokens of huge norm are matched first. "
                "Use similarity=token_cosine.")

    def identity(self) -> Fields:
        """An option that is off leaves no trace."""
        out = {k: v for k, v in super().identity().items() if k not in (*FIT, "after")}
        return {**out, **self.after_identity()}

    def score_identity(self) -> Fields:
        """What decides a score besides kernel and refit: its name, and what is its own, not the CKA estimator's."""
        shared = {f.name for f in fields(Similarity)}
        return {k: v for k, v in self.identity().items() if k not in shared and k != "after"}

    def after_identity(self) -> Fields:
        """What decides a score besides the score itself."""
        return {} if self.after is None else {"after": {"refit": self.after, "tokens": self.fit_source().identity()}}

    def fit_source(self) -> FitSource:
        """Where the tokens of the refit come from."""
        return FitSource.of(self, self.fit_path, self.fit_samples, self.fit_seq_len)

    def lengths(self) -> dict[str, int]:
        """The longest sequence that each setting makes the model read, beside the calibration."""
        return {} if self.after is None else self.fit_source().lengths()

    def check_data(self, dense: ModelHandle) -> None:
        """Raise ConfigError or DataError where the tokens of the refit cannot be had. Loads no weights."""
        if self.after is not None:
            self.fit_source().check(dense)

    def uses_kernel(self) -> bool:
        """Whether the acceptance score depends on the `kernel` group."""
        return False

    def minibatches(self, tokens: Tokens) -> tuple[int, int, float]:
        """Rows of CKA over a calibration set, minibatches, and rows of each."""
        rows = tokens.n * max(1, tokens.t - int(self.skip_first_token))
        parts = max(1, min(math.ceil(rows / self.batch), rows // 4))
        return rows, parts, rows / parts

    def matrix_cost(self, sizes: Sizes, tokens: Tokens) -> Work:
        """The layer similarity matrix: every layer once (more where the Gram matrices do not fit), and their Grams."""
        rows, parts, b = self.minibatches(tokens)
        n = sizes.n_layers
        passes = math.ceil(parts / max(1, GRAM_BYTES // int(n * b * b * 8)))
        wide = n * (2 * rows * b * sizes.hidden + 12 * rows * b) + 2 * n**2 * rows * b
        return Work(blocks=passes * n * sizes.block_flops(tokens.total, tokens.t), wide=wide)

    def matrix_bytes(self, sizes: Sizes, tokens: Tokens) -> float:
        """Memory of the matrix: Grams and the copies made while they are centred."""
        return 1.2 * min(GRAM_BYTES, sizes.n_layers * tokens.total * min(self.batch, tokens.total) * 8)

    def memory(self, sizes: Sizes) -> float:
        """Bytes that refitting candidates takes beside the model, about: the dense states of all layers, the weights
        that are kept, and a regression."""
        if self.after is None:
            return 0
        total, refit = self.fit_samples * self.fit_seq_len, 4 * sizes.hidden * sizes.mlp
        return (4 * total * (sizes.n_layers + 1) * sizes.hidden + min(KEPT_BYTES, sizes.n_layers**2 * refit)
                + normal_equations(sizes.mlp, sizes.hidden, total / 5))

    def score_cost(self, sizes: Sizes, tokens: Tokens, scores: float) -> Work:
        """So many acceptance scores; what is linear in the states is left out."""
        if not self.uses_kernel():
            return Work()
        rows, _, b = self.minibatches(tokens)
        return Work(wide=(scores + 1) * rows * b * (2 * sizes.hidden + 12))

    @abstractmethod
    def against(self, dense_NTD: Tensor, kernel: Kernel) -> Scorer:
        """A function scoring a trial's last hidden state (after the final norm, [N, T, D]) against the dense one.

        Work on the dense side is done once, here. Sums are float32 or wider whatever the states' dtype.
        1 is identical, two states of zeros included; a state of zeros against another counts as a right angle.
        A trial with a NaN or an infinity in it scores -1: nothing is less similar, and no threshold accepts it.
        """


EachSample = Callable[["Tensor", "Tensor | slice"], "Tensor"]
"""Trial states [B, T, D] of some samples, and which ones they are -> their scores [B], float64, each at most 1."""


@dataclass(frozen=True)
class MeanScorer:
    """A `Scorer`: the mean of what every sample scores."""

    each: EachSample

    def __call__(self, trial_NTD: Tensor) -> float:
        return as_score(self.each(trial_NTD, slice(None)).mean())


@dataclass
class MeanSimilarity(Similarity):
    """A score that is the mean of one of every sample."""

    by_sample: ClassVar[bool] = True

    def against(self, dense_NTD: Tensor, kernel: Kernel) -> Scorer:
        return MeanScorer(self.each(dense_NTD))

    @abstractmethod
    def each(self, dense_NTD: Tensor) -> EachSample:
        """Scores some samples' last hidden states against the dense ones; as `against`, not finite as it comes."""


def wide(x: Tensor) -> Tensor:
    """float32 or wider: half-precision tensors are cast, others come back as they are."""
    return x if x.itemsize >= 4 else x.float()


def token_dots(x_NTD: Tensor, y_NTD: Tensor) -> Tensor:
    """Inner product of every token's two states: float32 over D, [N, T] float64 for the sums to come."""
    return (x_NTD * y_NTD).sum(-1).double()


def cosines(xy: Tensor, xx: Tensor, yy: Tensor) -> Tensor:
    """x.y / (|x| |y|) from float64 inner products, elementwise. Two zero vectors: 1 (they are identical). One: 0."""
    size = (xx * yy).sqrt()
    return (xy / size.where(size != 0, 1)).where(size != 0, (xx == yy).to(xy.dtype))


def as_score(value: Tensor) -> float:
    """A one-element tensor as a float; what is not finite becomes -1 (see `Similarity.against`)."""
    score = float(value)
    return score if math.isfinite(score) else -1.0


def token_cosine(x_NTD: Tensor, y_NTD: Tensor) -> float:
    """Mean over tokens of the cosine of two states; two zero states count as identical, one as a right angle."""
    x, y = wide(x_NTD), wide(y_NTD.to(x_NTD.device))
    return as_score(cosines(token_dots(x, y), token_dots(x, x), token_dots(y, y)).mean())
