"""The CKA estimator against the papers' formulas, written out plainly here."""

from __future__ import annotations

from statistics import mean

import numpy as np
import pytest
import torch

from slm_exp.core.errors import DataError
from slm_exp.kernels.cosine import Cosine
from slm_exp.kernels.linear import Linear
from slm_exp.kernels.rbf import RBF
from slm_exp.similarity.cka import CKA, centred, cka, minibatches, normalised


def gaussian(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def hsic_unbiased(k: np.ndarray, m: np.ndarray) -> float:
    """Song et al. 2012, as in Nguyen et al. 2020, eq. 3."""
    n = len(k)
    k, m, one = k - np.diag(np.diag(k)), m - np.diag(np.diag(m)), np.ones(n)
    cross = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return (np.trace(k @ m) + cross - 2 / (n - 2) * one @ k @ m @ one) / (n * (n - 3))


def hsic_biased(k: np.ndarray, m: np.ndarray) -> float:
    """Gretton et al. 2005."""
    n = len(k)
    h = np.eye(n) - 1 / n
    return np.trace(k @ h @ m @ h) / (n - 1) ** 2


HSIC = {"unbiased": hsic_unbiased, "biased": hsic_biased}


@pytest.mark.parametrize("estimator", HSIC)
@pytest.mark.parametrize("n", [4, 5, 17, 64])
def test_hsic_is_the_inner_product_of_centred_grams(n, estimator):
    a, b = gaussian(1, n, n), gaussian(2, n, n)
    k, m = a + a.mT, b + b.mT  # any symmetric matrices, diagonals included
    ours = (centred(k, estimator) * centred(m, estimator)).sum().item()
    assert ours == pytest.approx(HSIC[estimator](k.numpy(), m.numpy()), rel=1e-10)


def test_hsic_of_four_rows_by_hand():
    """One pair alike: tr KK = 2, 1'K1 = 2, 1'KK1 = 2, so (2 + 4/6 - 2) / 4 = 1/6, whatever the diagonal."""
    k = torch.zeros(4, 4, dtype=torch.float64)
    k[0, 1] = k[1, 0] = 1
    k.fill_diagonal_(123.0)
    assert centred(k, "unbiased").square().sum().item() == pytest.approx(1 / 6)
    assert k[0, 0] == 123  # not in place


def test_linear_biased_cka_in_the_feature_form():
    """Kornblith et al. 2019: |Y'X|^2 / (|X'X| |Y'Y|) of centred features."""
    x, y = gaussian(1, 40, 5), gaussian(2, 40, 8)
    y[:, :5] += x
    x0, y0 = x - x.mean(0), y - y.mean(0)
    wanted = ((y0.mT @ x0).norm() ** 2 / ((x0.mT @ x0).norm() * (y0.mT @ y0).norm())).item()
    assert cka(x, y, Linear(), "biased", batch=40) == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize("estimator", HSIC)
def test_hsic_is_summed_over_minibatches_before_one_division(estimator):
    x, y = gaussian(1, 70, 6), gaussian(2, 70, 6)
    y += 0.5 * x
    sums, ratios = np.zeros(3), []
    for part in minibatches(70, 16):
        k, m = (x[part] @ x[part].mT).numpy(), (y[part] @ y[part].mT).numpy()
        terms = np.array([HSIC[estimator](k, m), HSIC[estimator](k, k), HSIC[estimator](m, m)])
        ratios.append(terms[0] / np.sqrt(terms[1] * terms[2]))
        sums += terms
    ours = cka(x, y, Linear(), estimator, batch=16)
    assert ours == pytest.approx(sums[0] / np.sqrt(sums[1] * sums[2]), rel=1e-10)
    assert abs(ours - mean(ratios)) > 1e-4


@pytest.mark.parametrize(("n", "dim", "biased"), [(16, 64, 0.7825), (16, 4096, 0.9961), (128, 4096, 0.9698)])
def test_independent_states_score_zero_without_bias_and_near_one_with_it(n, dim, biased):
    pairs = [(gaussian(2 * seed, n, dim), gaussian(2 * seed + 1, n, dim)) for seed in range(30 if n == 16 else 8)]
    unbiased = [cka(x, y, Linear(), "unbiased") for x, y in pairs]
    assert abs(mean(unbiased)) < 0.05
    assert min(unbiased) < 0 < max(unbiased)  # below zero is kept, not clamped
    assert mean(cka(x, y, Linear(), "biased") for x, y in pairs) == pytest.approx(biased, abs=0.02)


def test_identity_symmetry_and_range():
    x, y = gaussian(1, 300, 8), gaussian(2, 300, 8) + gaussian(1, 300, 8)
    for kernel in (Linear(), RBF(), Cosine()):
        for estimator in HSIC:
            assert cka(x, x, kernel, estimator) == pytest.approx(1, abs=1e-12)
            assert cka(x, y, kernel, estimator) == pytest.approx(cka(y, x, kernel, estimator), abs=1e-12)
            assert 0 < cka(x, y, kernel, estimator) < 1


def test_the_order_of_rows_does_not_matter_within_one_minibatch():
    x, y, order = gaussian(1, 60, 8), gaussian(2, 60, 8) + gaussian(1, 60, 8), torch.randperm(60)
    assert cka(x[order], y[order], RBF()) == pytest.approx(cka(x, y, RBF()), abs=1e-12)
    assert abs(cka(x[order], y, RBF()) - cka(x, y, RBF())) > 0.05  # but the rows belong together


def test_sides_of_unlike_width():
    x = gaussian(1, 50, 8)
    assert cka(x, torch.cat([x, torch.zeros(50, 3)], 1), Linear()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("estimator", HSIC)
def test_states_that_do_not_vary(estimator):
    x, constant = gaussian(1, 50, 8), torch.full((50, 8), 3.3)
    for kernel in (Linear(), RBF(), Cosine()):
        assert cka(x, constant, kernel, estimator) == 0
        assert cka(constant, 2 * constant, kernel, estimator) == 1
    hsic = torch.tensor([[4.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 1.0]], dtype=torch.float64)
    assert normalised(hsic).tolist() == [[1, 0, 0.5], [0, 1, 0], [0.5, 0, 1]]


def test_computed_in_float64_whatever_comes():
    """Gram entries of these states overflow float16; a common offset would eat float32's digits."""
    x = (100 * gaussian(1, 80, 64) + 1000).half()
    y = (x + 30 * gaussian(2, 80, 64)).half()
    assert cka(x, y, Linear()) == cka(x.double(), y.double(), Linear())


def test_every_row_is_in_one_minibatch_and_none_is_a_stump():
    for batch in (4, 5, 7, 64, 256):
        for n in [*range(4, 140), 1270, 2559]:
            parts = minibatches(n, batch)
            sizes = [len(p) for p in parts]
            assert sorted(torch.cat(parts).tolist()) == list(range(n))
            assert min(sizes) >= 4
            assert max(sizes) - min(sizes) <= 1
            assert max(sizes) <= batch or max(sizes) < 8  # a few rows more only where a stump would be left
    assert [len(p) for p in minibatches(1270, 256)] == [254] * 5
    assert [len(p) for p in minibatches(512, 256)] == [256, 256]
    assert [len(p) for p in minibatches(5, 4)] == [5]


def test_the_shuffle_is_fixed_and_touches_no_other_randomness():
    torch.manual_seed(1)
    first, drawn = minibatches(100, 20), torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(3))
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, minibatches(100, 20), strict=True))
    assert len(set(torch.div(first[0], 20, rounding_mode="floor").tolist())) > 2  # neighbours are spread


def test_too_few_tokens_are_refused_with_the_remedy():
    with pytest.raises(DataError, match=r"3 tokens.*at least 4.*calibration.seq_len.*skip_first_token"):
        minibatches(3, 256)
    with pytest.raises(DataError, match="0 tokens"):
        CKA().against(torch.randn(9, 1, 4), Linear())


class CountingLinear(Linear):
    grams = 0

    def gram(self, x):
        type(self).grams += 1
        return super().gram(x)


def test_the_score_computes_the_dense_side_once_and_equals_cka():
    dense, trial = gaussian(1, 4, 21, 6), gaussian(2, 4, 21, 6) + gaussian(1, 4, 21, 6)
    kernel = CountingLinear()
    score = CKA(batch=20).against(dense, kernel)
    assert CountingLinear.grams == 4
    ours = score(trial)
    assert CountingLinear.grams == 8
    plain = cka(dense[:, 1:].reshape(-1, 6), trial[:, 1:].reshape(-1, 6), Linear(), batch=20)
    assert ours == pytest.approx(plain, abs=1e-12)
    kept = CKA(batch=20, skip_first_token=False).against(dense, Linear())(trial)
    assert kept == pytest.approx(cka(dense.reshape(-1, 6), trial.reshape(-1, 6), Linear(), batch=20), abs=1e-12)
    assert kept != pytest.approx(ours, abs=1e-4)
    assert CKA(batch=20, estimator="biased").against(dense, Linear())(trial) > ours
