"""`evaluation.processes`: several processes give what one gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from slm_exp.core.errors import ConfigError, DataError
from slm_exp.core.registry import available
from slm_exp.core.types import Group, MergePlan
from slm_exp.evaluation.backends.crew import crew, shares
from slm_exp.evaluation.base import Evaluation
from slm_exp.launch.compose import compose_run
from slm_exp.merging.surgery import apply_plan


def both(handle: Any, settings: Evaluation) -> None:
    one, two = settings.run(handle), replace(settings, processes=2).run(handle)
    assert two.protocol == one.protocol
    for name, task in one.tasks.items():  # a mean of log-likelihoods may differ in its rounding
        assert two.tasks[name].metrics == pytest.approx(task.metrics, rel=1e-4), name
    assert two.perplexity == pytest.approx(one.perplexity, rel=1e-6)
    assert two.samples.keys() == one.samples.keys()
    for name, rows in one.samples.items():
        for a, b in zip(rows, two.samples[name], strict=True):
            assert (a["doc_id"], a["doc_hash"]) == (b["doc_id"], b["doc_hash"])
            assert b.get("loglikelihoods", []) == pytest.approx(a.get("loglikelihoods", []), abs=1e-4)


def test_two_processes_read_a_text_as_one_does(tiny_handle: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a text of some length that is read in chunks, again and again\n" * 9)
    handle = apply_plan(tiny_handle, MergePlan(tiny_handle.n_layers, (Group(2, 4),)), available("merge_rule")["mean"]())
    both(handle, Evaluation(corpora={"a": str(tmp_path / "a.txt")}, ppl_seq_len=32))
    tokens_NT, model = torch.arange(40).reshape(4, 10).numpy(), handle.model
    with crew(model, None, 2, ()) as two:
        assert two is not None
        with torch.no_grad():
            model.get_input_embeddings().weight[11] = float("nan")  # type: ignore[index, operator]
        with pytest.raises(DataError, match="NaN or infinite"):
            two.chunk_losses(model, tokens_NT, None, "a")  # chunk 1 is the helper's, whose weights are ours


@pytest.mark.slow
def test_two_processes_on_real_weights(smol_handle: Any) -> None:
    both(smol_handle, Evaluation(tasks=["piqa", "boolq", "arc_easy"], limit=10, corpora={"news": "heldout:news"}))


def test_shares_are_whole_and_even() -> None:
    keys, weights = [0, 0, 1, 1, 2, 3, 3, 3], [5, 5, 1, 1, 8, 2, 2, 2]
    parts = shares(keys, weights, 2)
    assert sorted(i for part in parts for i in part) == [*range(8)]
    assert all(len({k for k in keys if any(keys[i] == k for i in part)} & {keys[i] for i in other}) == 0
               for part in parts for other in parts if part is not other)  # fmt: skip
    assert sorted(sum(weights[i] for i in part) for part in parts) == [12, 14]
    assert shares([], [], 3) == [[], [], []]


def test_what_processes_do_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"evaluation.processes = 0; expected a number >= 1"):
        compose_run(["model=tiny", "evaluation=smoke", "evaluation.processes=0"])
    cfg = compose_run(["model=tiny", "evaluation=smoke", "evaluation.processes=2"])
    assert cfg.run_id == compose_run(["model=tiny", "evaluation=smoke"]).run_id
    assert "memory" in (cfg.evaluation.needs_resident() or "")
