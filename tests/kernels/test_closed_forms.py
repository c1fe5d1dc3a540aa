"""Kernels against numbers worked out by hand."""

from __future__ import annotations

from math import exp, pi, sqrt

import numpy as np
import pytest
import torch

from slm_exp.core.errors import ConfigError
from slm_exp.kernels.angular import Angular
from slm_exp.kernels.base import relative_distances
from slm_exp.kernels.cosine import Cosine
from slm_exp.kernels.laplacian import Laplacian
from slm_exp.kernels.linear import Linear
from slm_exp.kernels.polynomial import Polynomial
from slm_exp.kernels.rbf import RBF


def rows(*values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(actual: torch.Tensor, wanted: list[list[float]]) -> None:
    torch.testing.assert_close(actual, torch.tensor(wanted, dtype=torch.float64), atol=1e-7, rtol=1e-7)


LINE = rows([0, 0], [3, 4], [6, 8])  # distances 5, 5, 10: median 5


def test_linear():
    close(Linear().gram(rows([1, 2], [3, -1])), [[5, 1], [1, 10]])


def test_rbf():
    near, far = exp(-1 / 2), exp(-4 / 2)
    close(RBF(bandwidth=1).gram(LINE), [[1, near, far], [near, 1, near], [far, near, 1]])
    near, far = exp(-4 / 2), exp(-16 / 2)
    close(RBF(bandwidth=0.5).gram(LINE), [[1, near, far], [near, 1, near], [far, near, 1]])


def test_laplacian_is_of_the_l2_distance():
    near, far = exp(-1), exp(-2)
    close(Laplacian(bandwidth=1).gram(LINE), [[1, near, far], [near, 1, near], [far, near, 1]])


def test_polynomial_divides_by_the_mean_squared_norm():
    x = rows([1, 0], [1, 2])  # squared norms 1 and 5: mean 3
    close(Polynomial(degree=2, gamma=1, coef=1).gram(x), [[(4 / 3) ** 2, (4 / 3) ** 2], [(4 / 3) ** 2, (8 / 3) ** 2]])
    close(Polynomial(degree=3, gamma=6, coef=0).gram(x), [[8, 8], [8, 1000]])
    close(Polynomial(degree=1, gamma=3, coef=0).gram(x), Linear().gram(x).tolist())
    close(Polynomial(degree=2, gamma=6, coef=0).over(x).gram(x[1:]), [[100]])  # the whole set's 3, not this row's 5


def test_cosine_and_angular():
    x = rows([2, 0], [3, 3], [-1, 0], [0, 0])
    half = sqrt(0.5)
    close(Cosine().gram(x), [[1, half, -1, 0], [half, 1, -half, 0], [-1, -half, 1, 0], [0, 0, 0, 0]])
    close(Angular().gram(x), [[1, 3 / 4, 0, 1 / 2], [3 / 4, 1, 1 / 4, 1 / 2], [0, 1 / 4, 1, 1 / 2], [1 / 2] * 4])


def test_angular_keeps_small_angles_in_float32():
    gram = Angular().gram(torch.tensor([[1.0, 0.0], [1.0, 1e-4]]))
    assert gram[0, 1].item() == pytest.approx(1 - 1e-4 / pi, abs=1e-7)


def test_the_unit_is_the_median_over_pairs_without_the_diagonal():
    x = rows([0], [1], [3], [7])  # distances 1, 2, 3, 4, 6, 7
    wanted = (x - x.mT).abs() / 3.5
    torch.testing.assert_close(relative_distances(x), wanted)
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).double()
    distances = np.linalg.norm(x[:, None].numpy() - x[None].numpy(), axis=-1)
    wanted = distances / np.median(distances[np.triu_indices(40, 1)])
    np.testing.assert_allclose(relative_distances(x).numpy(), wanted, atol=1e-6)


def test_every_minibatch_has_its_own_unit():
    x = torch.stack([LINE, 100 * LINE])
    relative = relative_distances(x)
    torch.testing.assert_close(relative[0], relative[1])


def test_where_the_median_is_zero_the_mean_takes_its_place():
    x = rows([1, 1], [1, 1], [1, 1], [1, 1], [4, 5])  # six pairs at 0, four at 5: mean 2
    assert relative_distances(x)[0].tolist() == pytest.approx([0, 0, 0, 0, 2.5])
    assert relative_distances(rows([1, 1], [1, 1], [1, 1])).tolist() == [[0.0] * 3] * 3


def test_equal_rows_are_at_distance_zero_far_from_the_origin():
    """|x|^2 + |y|^2 - 2 x.y leaves rounding there, which the unit would blow up."""
    x = torch.full((6, 500), 1234.567)
    assert (relative_distances(x) == 0).all()
    x[0] += 1
    assert (relative_distances(x)[1:, 1:] == 0).all()
    assert (relative_distances(x)[0, 1:] > 0.5).all()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: RBF(bandwidth=0), "kernel.bandwidth = 0"),
        (lambda: Laplacian(bandwidth=-1), "kernel.bandwidth = -1"),
        (lambda: Polynomial(degree=0), "kernel.degree = 0"),
        (lambda: Polynomial(gamma=0), "kernel.gamma = 0"),
        (lambda: Polynomial(coef=-0.5), "kernel.coef = -0.5"),
    ],
)
def test_fields_that_make_no_kernel_are_refused(make, named):
    with pytest.raises(ConfigError, match=named):
        make()
