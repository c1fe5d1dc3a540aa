"""What every kernel promises; a new file in slm_exp/kernels is covered on arrival."""

from __future__ import annotations

import pytest
import torch

from slm_exp.core.registry import available
from slm_exp.kernels.base import Kernel

pytestmark = pytest.mark.parametrize("name", available("kernel"))

HARD = {  # name -> rows that break careless arithmetic
    "a row of zeros": lambda x: torch.cat([x[:5], torch.zeros(1, x.shape[1])]),
    "all rows zero": lambda x: torch.zeros_like(x),
    "equal rows": lambda x: x[:1].expand(6, -1),
    "nearly equal rows": lambda x: x[:1] + 1e-6 * x[:6],
    "mostly equal rows": lambda x: torch.cat([x[:1].expand(6, -1), x[:2]]),
    "opposite rows": lambda x: torch.cat([x[:3], -x[:3]]),
    "one huge row": lambda x: torch.cat([x[:7], 3e4 * x[7:8]]),
    "tiny rows": lambda x: 1e-12 * x,
    "huge rows": lambda x: 1e9 * x,
    "a far mean": lambda x: x + 1e4,
    "two rows": lambda x: x[:2],
}


@pytest.fixture
def kernel(name: str) -> Kernel:
    return available("kernel")[name]()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(24, 7, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_number_for_every_pair_in_the_dtype_given(kernel, x, dtype):
    gram = kernel.gram(x.to(dtype))
    assert gram.shape == (24, 24)
    assert gram.dtype == dtype
    torch.testing.assert_close(gram, gram.mT)


def test_leading_axes_are_batches(kernel, x):
    batches = torch.stack([x[:12], 5 * x[12:]])
    torch.testing.assert_close(kernel.gram(batches), torch.stack([kernel.gram(b) for b in batches]))


def test_the_order_of_rows_does_not_matter(kernel, x):
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(kernel.gram(x[order]), kernel.gram(x)[order][:, order])


def test_positive_semi_definite(kernel, x):
    eigenvalues = torch.linalg.eigvalsh(kernel.gram(x.double()))
    assert eigenvalues.min() > -1e-12 * eigenvalues.max()
    assert eigenvalues.max() > 0


@pytest.mark.parametrize("case", HARD)
def test_finite_symmetric_and_semi_definite_on_hard_rows(kernel, x, case):
    gram = kernel.gram(HARD[case](x).double())
    assert gram.isfinite().all()
    torch.testing.assert_close(gram, gram.mT)
    eigenvalues = torch.linalg.eigvalsh(gram)
    assert eigenvalues.min() >= -1e-8 * eigenvalues.max()  # distances of near-equal rows carry sqrt(eps)
    assert kernel.gram(HARD[case](x)).isfinite().all()


def test_blind_to_rotation(kernel, x):
    turn = torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(2)).double()).Q
    torch.testing.assert_close(kernel.gram(x.double() @ turn), kernel.gram(x.double()), atol=1e-7, rtol=1e-7)


def test_what_the_whole_set_fixes_leaves_the_whole_set_as_it_was(kernel, x):
    fixed = kernel.over(x)
    torch.testing.assert_close(fixed.gram(x), kernel.gram(x))
    assert fixed.gram(3 * x).isfinite().all()
    # the kernel itself did not change
    torch.testing.assert_close(kernel.gram(x), available("kernel")[kernel.name]().gram(x))


def test_leaves_its_input_alone(kernel, x):
    before = x.clone()
    kernel.gram(x)
    assert torch.equal(x, before)
