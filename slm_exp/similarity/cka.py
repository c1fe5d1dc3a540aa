"""Centred kernel alignment of two sets of token states: the estimator, and CKA as an acceptance score.

HSIC of two Gram matrices is the inner product of their centred forms, for the unbiased estimator as for the biased
one (the zero-diagonal formula of Song et al. is the inner product of U-centred matrices, Szekely & Rizzo 2014). A
minibatch average of HSIC is one inner product as well, of all centred Grams of a side laid end to end. So a side
becomes one vector (`fingerprint`), CKA is the cosine of two of them, self-terms cannot be negative, and CKA lies in
[-1, 1] with nothing clamped: independent states score near 0, a little below it as often as above.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slm_exp.core.errors import DataError
from slm_exp.core.registry import register
from slm_exp.kernels.base import Kernel
from slm_exp.similarity.base import Scorer, Similarity, as_score, cosines

if TYPE_CHECKING:
    from torch import Tensor


MIN_ROWS = 4
"""The unbiased estimator divides by n(n-3)."""
SHUFFLE_SEED = 0
"""One shuffle for all runs, whatever their seed; it spreads the tokens of a sequence over the minibatches."""


def minibatches(n_rows: int, batch: int) -> list[Tensor]:
    """Row numbers 0..n_rows-1 in the fixed shuffle, cut into minibatches of at most `batch` rows.

    No row is left out, and sizes differ by at most one, because a minibatch counts the same whatever its size. Where
    cutting would leave fewer than 4 rows in one, there is one minibatch less and `batch` is exceeded.
    Raises DataError: fewer than 4 rows.
    """
    import torch

    if n_rows < MIN_ROWS:
        raise DataError(f"CKA has {n_rows} tokens to look at; it needs at least {MIN_ROWS}. Raise "
                        "calibration.n_samples or calibration.seq_len (similarity.skip_first_token leaves one token of "
                        "each sequence out).")
    order = torch.randperm(n_rows, generator=torch.Generator().manual_seed(SHUFFLE_SEED))
    return list(order.tensor_split(min(math.ceil(n_rows / batch), n_rows // MIN_ROWS)))


def token_rows(h_NTD: Tensor, skip_first_token: bool) -> Tensor:
    """States as rows, one per token: [N, T, D] -> [N T, D], or [N (T-1), D] without the first tokens."""
    return h_NTD[:, int(skip_first_token) :].flatten(0, 1)


def centred(gram_NN: Tensor, estimator: str) -> Tensor:
    """A Gram matrix centred and scaled so that HSIC(K, L) = sum(centred(K) * centred(L)).

    unbiased: U-centred (zero diagonal; off it, row and column sums over n-2 taken away and the total over
    (n-1)(n-2) added), over sqrt(n(n-3)): HSIC_1 of Song et al. 2012, as in Nguyen et al. 2020, arXiv:2010.15327.
    biased: H K H with H = I - 11'/n, over n-1: Gretton et al. 2005. >= 0, and near 1 as CKA for independent states
    when D >> N.
    A Gram matrix that is constant up to rounding (states that do not vary) gives zeros.
    """
    n, size, unbiased = gram_NN.shape[-1], gram_NN.norm(), estimator == "unbiased"
    if unbiased:
        gram_NN = gram_NN.clone().fill_diagonal_(0)
        per_row, per_pair, norm = n - 2, (n - 1) * (n - 2), math.sqrt(n * (n - 3))
    else:
        per_row, per_pair, norm = n, n * n, n - 1
    row_N = gram_NN.sum(-1)
    out = gram_NN - (row_N[:, None] + row_N[None, :]) / per_row + row_N.sum() / per_pair
    if unbiased:
        out.fill_diagonal_(0)
    return out.zero_() if out.norm() <= 1e-12 * size else out.div_(norm)


def fingerprint(rows_ND: Tensor, kernel: Kernel, parts: Sequence[Tensor], estimator: str) -> Tensor:
    """The centred Grams of all minibatches end to end: [N, D] of any float dtype -> [sum of n_b^2] float64. The inner
    product of two fingerprints is HSIC summed over minibatches; their cosine is CKA. Cost: O(N b D) time for
    minibatches of b rows; one minibatch at a time is cast to float64."""
    import torch

    kernel = kernel.over(rows_ND)
    grams = (kernel.gram(rows_ND[part.to(rows_ND.device)].double()) for part in parts)
    return torch.cat([centred(gram_BB, estimator).flatten() for gram_BB in grams])


def normalised(hsic_LL: Tensor) -> Tensor:
    """CKA of every pair from HSIC of every pair; the one division. [L, L] float64 -> [L, L], 1 on the diagonal. States
    that do not vary have HSIC 0 with themselves: they score 0 against any other, 1 against themselves."""
    root = hsic_LL.diagonal().sqrt()
    root = root.where(root > 0, 1)
    out = hsic_LL / root[:, None] / root[None, :]
    return ((out + out.mT) / 2).fill_diagonal_(1)


def cka(x_ND: Tensor, y_ND: Tensor, kernel: Kernel, estimator: str = "unbiased", batch: int = 256) -> float:
    """The similarity of two sets of states, up to what the kernel ignores. Row i of both belongs to token i.

    Args:
        x_ND, y_ND: [N, D] and [N, E] states of any float dtype; computed in float64.
        estimator, batch: see `centred` and `minibatches`.
    Returns: a score in [-1, 1]; 1 is identical. 1 as well when neither side varies, 0 when one does not.
    Raises DataError: fewer than 4 rows.
    """
    parts = minibatches(len(x_ND), batch)
    return alignment(fingerprint(x_ND, kernel, parts, estimator), fingerprint(y_ND, kernel, parts, estimator))


def alignment(x_F: Tensor, y_F: Tensor) -> float:
    """The cosine of two fingerprints: 1 when both are zeros, 0 when one is."""
    return as_score(cosines(x_F @ y_F, x_F @ x_F, y_F @ y_F))


@register("similarity", "cka")
@dataclass
class CKA(Similarity):
    """CKA of the last hidden states by the chosen kernel, in minibatches of shuffled tokens.

    Sees how tokens lie relative to each other, not where: a trial that rotates or scales all states scores 1.
    The dense side is computed once; a trial costs N T b D multiplications for minibatches of b tokens.
    """

    def uses_kernel(self) -> bool:
        return True

    def against(self, dense_NTD: Tensor, kernel: Kernel) -> Scorer:
        rows = token_rows(dense_NTD, self.skip_first_token)
        parts = [part.to(rows.device) for part in minibatches(len(rows), self.batch)]
        dense_F = fingerprint(rows, kernel, parts, self.estimator)

        def score(trial_NTD: Tensor) -> float:
            trial = token_rows(trial_NTD, self.skip_first_token)
            if not trial.isfinite().all():  # a kernel may hide it: exp(-inf) is 0
                return -1.0
            return alignment(dense_F, fingerprint(trial, kernel, parts, self.estimator))

        return score
