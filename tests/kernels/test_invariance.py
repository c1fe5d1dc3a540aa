"""What CKA ignores, kernel by kernel: exactly what slm_exp/kernels/base.py says, and no more."""

from __future__ import annotations

import pytest
import torch

from slm_exp.core.registry import available
from slm_exp.similarity.cka import cka

DIM = 12


def turned(x: torch.Tensor) -> torch.Tensor:
    return x @ torch.linalg.qr(torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(5)).double()).Q


CHANGES = {
    "rotation": turned,
    "scale": lambda x: 37 * x,
    "shift": lambda x: x + torch.arange(DIM) / 4,
    "lengths": lambda x: x * torch.linspace(0.2, 3, len(x))[:, None],
}
IGNORED = {
    "linear": ("rotation", "scale", "shift"),
    "rbf": ("rotation", "scale", "shift"),
    "laplacian": ("rotation", "scale", "shift"),
    "polynomial": ("rotation", "scale"),
    "cosine": ("rotation", "scale", "lengths"),
    "angular": ("rotation", "scale", "lengths"),
}


@pytest.fixture(scope="module")
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(90, DIM, generator=g).double() + 0.5
    return x, x + 0.7 * torch.randn(90, DIM, generator=g)


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", IGNORED)
def test_exactly_what_is_promised(pair, name, change, estimator):
    x, y = pair
    kernel = available("kernel")[name]()
    plain = cka(x, y, kernel, estimator, batch=32)
    changed = cka(CHANGES[change](x), y, kernel, estimator, batch=32)
    if change in IGNORED[name]:
        assert changed == pytest.approx(plain, abs=1e-9)
        assert cka(x, CHANGES[change](x), kernel, estimator, batch=32) == pytest.approx(1, abs=1e-9)
    else:
        assert abs(changed - plain) > 1e-4


def test_a_linear_map_that_is_no_rotation_is_noticed(pair):
    x, y = pair
    stretch = torch.diag(torch.linspace(0.1, 3, DIM).double())
    for kernel in available("kernel").values():
        assert abs(cka(x @ stretch, y, kernel()) - cka(x, y, kernel())) > 1e-3
