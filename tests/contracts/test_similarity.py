"""What every acceptance score promises; a new file in slm_exp/similarity is covered on arrival."""

from __future__ import annotations

import pytest
import torch

from slm_exp.core.registry import available
from slm_exp.kernels.linear import Linear
from slm_exp.similarity.base import Similarity

pytestmark = pytest.mark.parametrize("name", available("similarity"))


@pytest.fixture
def similarity(name: str) -> Similarity:
    return available("similarity")[name]()


@pytest.fixture
def states() -> torch.Tensor:
    return torch.randn(3, 20, 16, generator=torch.Generator().manual_seed(0))


def noisy(states: torch.Tensor, amount: float) -> torch.Tensor:
    return states + amount * torch.randn(states.shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_identical_scores_one(similarity, states, dtype):
    score = similarity.against(states.to(dtype), Linear())(states.to(dtype))
    assert isinstance(score, float)
    assert score == pytest.approx(1, abs=1e-6)


def test_closer_scores_higher(similarity, states):
    score = similarity.against(states, Linear())
    scores = [score(noisy(states, amount)) for amount in (0, 0.01, 0.1, 0.3, 1)]
    assert scores == sorted(scores, reverse=True)
    assert scores[-1] < scores[0] - 0.05
    assert all(-1 <= s <= 1 + 1e-6 for s in scores)


def test_symmetric(similarity, states):
    other = noisy(states, 0.5)
    forth, back = similarity.against(states, Linear())(other), similarity.against(other, Linear())(states)
    assert forth == pytest.approx(back, abs=1e-6)


def test_blind_to_rotation_and_to_one_common_scale(similarity, states):
    other = noisy(states, 0.5)
    turn = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(2))).Q
    plain = similarity.against(states, Linear())(other)
    assert similarity.against(states @ turn, Linear())(other @ turn) == pytest.approx(plain, abs=1e-6)
    assert similarity.against(states, Linear())(7 * other) == pytest.approx(plain, abs=1e-6)


def test_half_precision_states_are_summed_in_float32_or_wider(similarity):
    """Squared norms of these states overflow float16, and their sums drown in bfloat16."""
    big = 200 * torch.randn(2, 30, 64, generator=torch.Generator().manual_seed(3))
    for dtype in (torch.float16, torch.bfloat16):
        dense, trial = big.to(dtype), noisy(big, 60).to(dtype)
        exact = similarity.against(dense.double(), Linear())(trial.double())
        assert similarity.against(dense, Linear())(trial) == pytest.approx(exact, abs=1e-6)


def test_states_of_zeros_give_a_number(similarity, states):
    zeros = torch.zeros_like(states)
    assert similarity.against(zeros, Linear())(zeros) == 1
    for score in (similarity.against(zeros, Linear())(states), similarity.against(states, Linear())(zeros)):
        assert score == pytest.approx(0, abs=1e-6) or score == pytest.approx(0.5, abs=1e-6)  # a right angle


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_trial_that_is_not_finite_scores_minus_one(similarity, states, bad):
    trial = states.clone()
    trial[1, 4, 2] = bad
    assert similarity.against(states, Linear())(trial) == -1


def test_the_order_of_samples_does_not_matter_beyond_the_shuffle(similarity, states):
    """One minibatch holds all 57 tokens here, so that CKA's fixed shuffle cannot matter either."""
    other = noisy(states, 0.5)
    plain = similarity.against(states, Linear())(other)
    assert similarity.against(states.flip(0), Linear())(other.flip(0)) == pytest.approx(plain, abs=1e-6)


def test_states_are_left_alone_and_scores_repeat(similarity, states):
    dense, trial = states.clone(), noisy(states, 0.5)
    before = trial.clone()
    score = similarity.against(dense, Linear())
    assert score(trial) == score(trial)
    assert torch.equal(dense, states)
    assert torch.equal(trial, before)
