"""The cosine scores against their definitions, written out plainly here."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from slm_exp.core.errors import ConfigError
from slm_exp.kernels.linear import Linear
from slm_exp.similarity.angular import Angular
from slm_exp.similarity.cka import CKA
from slm_exp.similarity.flat_cosine import FlatCosine
from slm_exp.similarity.token_cosine import TokenCosine


@pytest.fixture(scope="module")
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    dense = torch.randn(5, 40, 24, generator=g)
    dense[:, 0] *= 50  # a first token of huge norm
    trial = dense + 0.6 * torch.randn(5, 40, 24, generator=g)
    return dense, trial


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def plain(pair: tuple[torch.Tensor, torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    return pair[0].double().numpy(), pair[1].double().numpy()


def test_flat_cosine_is_one_cosine_per_sample_first_token_included(pair):
    a, b = plain(pair)
    wanted = np.mean([cosine(x.ravel(), y.ravel()) for x, y in zip(a, b, strict=True)])
    assert FlatCosine().against(pair[0], Linear())(pair[1]) == pytest.approx(wanted, abs=1e-7)
    assert wanted > 0.99  # the huge token decides


def test_token_cosine_weighs_tokens_alike(pair):
    a, b = plain(pair)
    wanted = np.mean([[cosine(x, y) for x, y in zip(s, t, strict=True)] for s, t in zip(a, b, strict=True)])
    assert TokenCosine().against(pair[0], Linear())(pair[1]) == pytest.approx(wanted, abs=1e-7)
    assert wanted < 0.9


def test_angular_is_the_mean_angle(pair):
    a, b = plain(pair)
    angles = [[np.arccos(cosine(x, y)) for x, y in zip(s, t, strict=True)] for s, t in zip(a, b, strict=True)]
    assert Angular().against(pair[0], Linear())(pair[1]) == pytest.approx(1 - np.mean(angles) / np.pi, abs=1e-6)


@pytest.mark.parametrize(("angle", "tolerance"), [(1e-5, 1e-7), (1e-3, 1e-7), (1.0, 1e-6), (2.5, 1e-6), (np.pi, 2e-4)])
def test_angular_at_any_angle_in_float32(angle, tolerance):
    """arccos of a float32 cosine would be off by 1e-4 near 1."""
    dense = torch.zeros(1, 1, 64)
    dense[..., 0] = 1
    trial = 3 * torch.tensor([np.cos(angle), np.sin(angle), *[0.0] * 62], dtype=torch.float32)[None, None]
    turn = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).double()).Q
    score = Angular().against((dense.double() @ turn).float(), Linear())((trial.double() @ turn).float())
    assert score == pytest.approx(1 - angle / np.pi, abs=tolerance)


def test_one_state_of_zeros_is_a_right_angle():
    dense, trial = torch.ones(1, 2, 8), torch.ones(1, 2, 8)
    trial[0, 1] = 0
    assert TokenCosine().against(dense, Linear())(trial) == pytest.approx(0.5)
    assert Angular().against(dense, Linear())(trial) == pytest.approx(0.75)
    assert Angular().against(trial, Linear())(dense) == pytest.approx(0.75)
    assert TokenCosine().against(trial, Linear())(trial) == pytest.approx(1)


def test_only_cka_uses_the_kernel():
    assert CKA().uses_kernel()
    assert not any(cls().uses_kernel() for cls in (FlatCosine, TokenCosine, Angular))


def test_fields_are_checked():
    with pytest.raises(ConfigError, match=r"similarity.estimator = unbaised.*Did you mean unbiased"):
        CKA(estimator="unbaised")
    with pytest.raises(ConfigError, match=r"similarity.batch = 3"):
        FlatCosine(batch=3)
