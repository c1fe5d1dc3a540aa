"""What a measurement costs, from the settings alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from slm_exp.core.cost import Work
from slm_exp.evaluation.base import SEVEN, Evaluation
from slm_exp.launch.compose import compose_run
from slm_exp.models.sizes import SMOLLM2, sizes_of

SIZES = sizes_of(SMOLLM2)


def test_the_seven_tasks() -> None:
    """Fewer documents cost less, lm-eval's own class more, a removed layer exactly its share."""
    whole, notes = Evaluation(tasks=list(SEVEN)).cost(SIZES, 30, random=False)
    assert notes == []
    assert whole.blocks == pytest.approx(5.0703e14, rel=1e-4)
    assert whole.head == pytest.approx(7.2767e13, rel=1e-4)
    some, _ = Evaluation(tasks=list(SEVEN), limit=20).cost(SIZES, 30, random=False)
    plain, _ = Evaluation(tasks=list(SEVEN), limit=20, backend="hflm").cost(SIZES, 30, random=False)
    assert some.flops < plain.flops < whole.flops
    assert some.harness == 1
    fewer, _ = Evaluation(tasks=list(SEVEN), limit=20).cost(SIZES, 15, random=False)
    assert fewer.blocks == pytest.approx(some.blocks / 2)
    assert fewer.head == some.head


def test_corpora_by_their_length(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.zeros((6, 10), dtype=int))
    (tmp_path / "text.txt").write_text("word " * 900)  # 4.5 characters a token: 1,000 tokens
    tokens, _ = Evaluation(corpora={"t": str(tmp_path / "ids.npy")}).cost(SIZES, 30, random=False)
    assert tokens == Work(blocks=30 * SIZES.block_flops(60, 10), head=1.3 * SIZES.head_flops(60))
    text = {"t": str(tmp_path / "text.txt")}
    once, _ = Evaluation(corpora=text).cost(SIZES, 30, random=False)
    assert once.blocks == 30 * SIZES.block_flops(1000, 128)
    both, _ = Evaluation(corpora=text, ppl_bos="both").cost(SIZES, 30, random=False)
    assert both == once * 2
    by_bytes, _ = Evaluation(corpora=text).cost(SIZES, 30, random=True)
    assert by_bytes.head == pytest.approx(4.5 * once.head)


@pytest.mark.parametrize("preset", ["generation", "mmlu", "nine_b"])
def test_presets_are_known(preset: str) -> None:
    """Every task of a preset is counted; answers that are written read every weight again and again."""
    evaluation = compose_run([f"evaluation={preset}"]).evaluation
    work, notes = evaluation.cost(SIZES, 30, random=False)
    assert notes == []
    assert (work.read > 0) == (preset == "generation")
    assert work.blocks > evaluation.cost(SIZES, 20, random=False)[0].blocks > 0


def test_examples_that_are_shared_cost_once_a_subject() -> None:
    settings = {"tasks": ["mmlu"], "fewshot": {"mmlu": 5}, "limit": 10}
    fast, plain = (Evaluation(**settings, backend=b).cost(SIZES, 30, random=False)[0] for b in ("fast", "hflm"))  # type: ignore[arg-type]
    assert plain.blocks > 5 * fast.blocks
    assert Evaluation(tasks=["mmlu"], fewshot={"mmlu": 3}).cost(SIZES, 30, random=False)[1] == [
        "evaluation.tasks: how long mmlu takes is not known"]  # fmt: skip


def test_long_windows_attend_further(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("word " * 9000)
    short, long = (Evaluation(corpora={name: str(tmp_path / "text.txt")}).cost(SIZES, 30, random=False)[0]
                   for name in ("mine", "mine_2048"))  # fmt: skip
    assert long.blocks == 30 * SIZES.block_flops(10_000, 2048) > short.blocks


def test_what_is_not_known_is_said() -> None:
    work, notes = Evaluation(tasks=["sciq"], corpora={"gone": "gone.txt"}).cost(SIZES, 30, random=False)
    assert [note.partition(":")[0] for note in notes] == ["evaluation.tasks", "evaluation.corpora.gone"]
    assert work.flops == 0
    assert Evaluation().cost(SIZES, 30, random=False) == (Work(), [])


def test_timed_generation_reads_every_weight_for_every_token() -> None:
    settings = Evaluation(speed_runs=30, speed_batches=[1, 8])
    tokens = 128 * 30 + 128 * 5
    assert settings.generation_cost(SIZES, 15, 1e9).read == pytest.approx(tokens * 1.5e9)
