"""The estimator on real states: SmolLM2-135M on the trial tokens (10 x 128)."""

from __future__ import annotations

import pytest
import torch

from slm_exp.core.registry import available
from slm_exp.kernels.linear import Linear
from slm_exp.similarity.cka import cka, fingerprint, minibatches, normalised, token_rows

EVERYTHING = 10**6


def matrix(rows: list[torch.Tensor], kernel, batch: int) -> torch.Tensor:
    parts = minibatches(len(rows[0]), batch)
    sides = torch.stack([fingerprint(r, kernel, parts, "unbiased") for r in rows])
    return normalised(sides @ sides.mT)


@pytest.mark.parametrize("name", available("kernel"))
def test_minibatches_come_near_the_full_batch(smol_states, name):
    rows = [token_rows(h, skip_first_token=True) for h in smol_states.values()]
    kernel = available("kernel")[name]()
    off = (matrix(rows, kernel, 256) - matrix(rows, kernel, EVERYTHING)).abs()
    assert off.max() < 0.03
    assert off.mean() < 0.01


def test_first_tokens_draw_the_picture(smol_states):
    """Ten tokens of 1280, kept or left out, more than double the similarity of layers 5 and 20."""
    without, kept = (
        cka(token_rows(smol_states[5], skip), token_rows(smol_states[20], skip), Linear()) for skip in (True, False)
    )
    assert without == pytest.approx(0.116, abs=0.01)
    assert kept == pytest.approx(0.262, abs=0.01)
    norms = smol_states[5].norm(dim=-1)
    assert norms[:, 0].min() > 5 * norms[:, 1:].median()


def test_bias_shows_on_real_states(smol_states):
    """Minibatches of 254 tokens of 576 numbers: the biased estimator reads too high."""
    x, y = (token_rows(smol_states[i], skip_first_token=True) for i in (5, 20))
    assert cka(x, y, Linear(), "biased") > cka(x, y, Linear(), "unbiased") + 0.01
