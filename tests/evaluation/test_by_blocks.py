"""Evaluation of a model whose layers stay in files: the same numbers, few passes over the files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from builders.streams import both, saved

from slm_exp.engine import calls
from slm_exp.evaluation.backends import fast
from slm_exp.evaluation.backends.fast import FastLM
from slm_exp.evaluation.perplexity import perplexity


@pytest.mark.parametrize(("at_once", "passes"), [(1 << 30, 1), (1, 5)])
def test_perplexity(tmp_path: Path, monkeypatch, at_once: int, passes: int) -> None:
    monkeypatch.setattr(calls, "STATES_BYTES", at_once)
    resident, streamed = both(saved(tmp_path, "gemma2", layers=4))
    ids_NT = np.random.default_rng(0).integers(0, 256, (9, 20))
    assert perplexity(streamed.model, ids_NT, 2) == perplexity(resident.model, ids_NT, 2)
    assert streamed.layers.residence.passes == passes  # type: ignore[attr-defined]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("at_once", [1 << 30, 1])
def test_loglikelihoods(tmp_path: Path, monkeypatch, family: str, at_once: int) -> None:
    monkeypatch.setattr(fast, "STATES_BYTES", at_once)
    monkeypatch.setitem(fast.TOKENS_PER_BATCH, "cpu", 64)
    resident, streamed = both(saved(tmp_path, family, layers=4))
    ids = np.random.default_rng(0).integers(0, 256, (12, 30)).tolist()
    requests = [(None, row[:12], row[12 : 15 + i]) for row in ids for i in range(3)]
    scores, before = [], 0.0
    for handle in (resident, streamed):
        lm = FastLM(handle.model, handle.tokenizer)
        scores.append(lm._loglikelihood_tokens(requests, disable_tqdm=True))
        assert lm._falls_back is None
        if handle is streamed and at_once > 1:
            before = handle.layers.residence.passes  # type: ignore[attr-defined]
            lm._loglikelihood_tokens(requests, disable_tqdm=True)
            assert handle.layers.residence.passes == before + 1  # type: ignore[attr-defined]
    assert scores[0] == scores[1]
