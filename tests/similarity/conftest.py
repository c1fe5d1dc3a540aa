"""Real states: SmolLM2's block outputs on the trial tokens."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def trial_tokens(shared_data):
    import numpy as np

    from slm_exp.core.types import CalibrationTokens

    return CalibrationTokens(np.load(shared_data / "trial" / "wt2valid_10x128.npy"), "trial")


@pytest.fixture(scope="session")
def smol_states(smol_handle, trial_tokens):
    """{layer: [10, 128, 576]}: five layers of the embedded model, those whose similarity is hardest to estimate too."""
    from slm_exp.engine.runner import BlockRunner, Slot

    runner = BlockRunner(smol_handle, trial_tokens.tokens_NT)
    h, kept = runner.embed(), {}
    for i in range(30):
        h = runner.block(Slot(i), h)
        if i in (1, 2, 5, 20, 29):
            kept[i] = h
    return kept
