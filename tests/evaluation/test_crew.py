"""`evaluation.processes`: several processes give what one gives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from slm_exp.core.errors import ConfigError, DataError
from slm_exp.core.registry import available
from slm_exp.core.types import Group, MergePlan
from slm_exp.evaluation.backends.crew import crew, shares
from slm_exp.evaluation.backends.harness import language_model
from slm_exp.evaluation.base import Evaluation
from slm_exp.evaluation.perplexity import chunk_losses
from slm_exp.launch.compose import compose_run
from slm_exp.merging.surgery import apply_plan


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Two processes of one thread each are compared with one of one: threads shape the rounding too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def both(handle: Any, settings: Evaluation) -> None:
    """Every number, answer and log-likelihood, bit by bit."""
    one, two = settings.run(handle), replace(settings, processes=2).run(handle)
    assert two == one


def test_two_processes_read_a_text_as_one_does(tiny_handle: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a text of some length that is read in chunks, again and again\n" * 9)
    handle = apply_plan(tiny_handle, MergePlan(tiny_handle.n_layers, (Group(2, 4),)), available("merge_rule")["mean"]())
    both(handle, Evaluation(corpora={"a": str(tmp_path / "a.txt")}, ppl_seq_len=32))


@pytest.mark.slow
def test_two_processes_on_real_weights(smol_handle: Any) -> None:
    both(smol_handle, Evaluation(tasks=["piqa", "boolq", "lambada_openai"], limit=10, corpora={"news": "heldout:news"}))
    both(smol_handle, Evaluation(tasks=["gsm8k_cot", "basic_skills_arithmetic_generated"], limit=3, batch_size=2))


def test_shares_are_whole_and_even() -> None:
    weights = [5, 8, 1, 1, 2, 7]
    parts = shares(weights, 2)
    assert sorted(i for part in parts for i in part) == [*range(6)]
    assert [sum(weights[i] for i in part) for part in parts] == [12, 12]
    assert shares([], 3) == [[], [], []]


def test_two_processes_answer_what_one_does(tiny_handle: Any) -> None:
    """Prompts of many lengths and stops, in batches of three. An error of either reaches the caller when both have
    answered, and they go on; on a CPU their weights are the same memory."""
    asked = {
        "generate_until": [(f"{i} " * (3 * i + 1), {"until": ["e", "1"][: i % 3], "max_gen_toks": 9})
                           for i in range(9)],
        "loglikelihood": [(f"Ann owns {i} kettles. ", ending) for i in range(9) for ending in ("Which?", "No.")]}
    model, tokens_NT, found = tiny_handle.model, torch.arange(40).reshape(4, 10).numpy(), []
    alone = chunk_losses(model, tokens_NT, 2, "a")
    for processes in (1, 2):
        with crew(model, tiny_handle.tokenizer, processes, (3, None, "fast")) as two:
            lm: Any = language_model(model, tiny_handle.tokenizer, 3)
            lm.gather = two and two.gather
            found.append([getattr(lm, kind)([Instance(kind, {}, args, i) for i, args in enumerate(requests)])
                          for kind, requests in asked.items()])
            if processes == 1:
                continue
            for row in (0, 3):  # read here, there
                wrong = tokens_NT.copy()
                wrong[row] = 10**6  # no such token
                with pytest.raises(IndexError):
                    two.chunk_losses(model, wrong, 2, "a")
                assert (two.chunk_losses(model, tokens_NT, 2, "a") == alone).all()
            model.get_input_embeddings().weight[31] = float("nan")
            with pytest.raises(DataError, match="NaN or infinite"):
                two.chunk_losses(model, tokens_NT, 2, "a")  # chunk 3 is the helper's
    assert found[0] == found[1]
    assert len(set(found[0][0])) > 2


def test_what_processes_do_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"evaluation.processes = 0; expected a whole number >= 1"):
        compose_run(["model=tiny", "evaluation=smoke", "evaluation.processes=0"])
    cfg = compose_run(["model=tiny", "evaluation=smoke", "evaluation.processes=2"])
    assert cfg.run_id == compose_run(["model=tiny", "evaluation=smoke"]).run_id
    assert "memory" in (cfg.evaluation.needs_resident() or "")
