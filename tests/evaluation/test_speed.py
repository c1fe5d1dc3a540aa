"""Speed: what is counted, in which order, and what the numbers are not."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.runs import tiny_run

from slm_exp.core.errors import ConfigError, DataError
from slm_exp.core.types import MergePlan, Sublayer
from slm_exp.evaluation import settings
from slm_exp.evaluation.backends import speed
from slm_exp.evaluation.backends.speed import generation_flops, measure_speed
from slm_exp.evaluation.base import Evaluation
from slm_exp.evaluation.report import SpeedCase, Spread, Timing
from slm_exp.evaluation.settings import Case
from slm_exp.launch.compose import compose_run
from slm_exp.merging.surgery import apply_plan
from slm_exp.models.base import ModelHandle

SMALL = {"speed_runs": 3, "speed_discard": 1, "speed_batches": [2], "speed_prompts": [5], "speed_new": [2],
         "speed_grid_runs": 2}  # fmt: skip


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "PAPERS", Case(1, 12, 3))


@pytest.fixture
def shorter(tiny_handle: ModelHandle) -> ModelHandle:
    return apply_plan(tiny_handle, MergePlan(8, dropped=(2, 3, 4, 5)))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A machine that slows down all the time, and a model of half the layers twice as fast. Returns who had a turn."""
    turns: list[int] = []
    now = itertools.count(1)

    def generate(model: Any, ids_BT: Any, new: int, seed: int) -> tuple[float, float]:
        layers = model.config.num_hidden_layers
        turns.append(layers)
        return layers * 1.1 ** ((next(now) + 1) // 2), 0.1

    monkeypatch.setattr(speed, "generate", generate)
    return turns


def test_every_case_is_generated_and_counted(tiny_handle: ModelHandle, shorter: ModelHandle) -> None:
    _ = tiny_handle.model, shorter.model
    before = torch.get_rng_state()
    found = measure_speed(Evaluation(**SMALL), tiny_handle, shorter)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), before)
    assert [cell["name"] for cell in found["cells"]] == ["1x12x3", "2x5x2"]
    for cell in found["cells"]:
        assert cell["speedup"]["n"] == 2
        for which, handle in (("dense", tiny_handle), ("compressed", shorter)):
            about = cell[which]
            assert about["latency_s"]["n"] == 2
            assert 0 < about["first_token_s"]["median"] < about["latency_s"]["median"]
            assert about["latency_s"]["q1"] <= about["latency_s"]["median"] <= about["latency_s"]["q3"]
            assert about["peak_bytes"] is None or about["peak_bytes"] >= speed.weight_bytes(handle.model)
            assert found["models"][which]["params"] == handle.n_params
    assert found["protocol"]["device"] == "cpu"
    assert json.dumps(found)
    assert any("random" in note for note in found["notes"])


def test_models_take_turns_and_the_speedup_is_paired(
    tiny_handle: ModelHandle, shorter: ModelHandle, clock: list[int]
) -> None:
    found = measure_speed(Evaluation(speed_runs=6, speed_discard=2), tiny_handle, shorter)
    cell = found["cells"][0]
    assert clock[2:14] == [8, 4, 4, 8] * 3  # after one of each for memory
    assert cell["speedup"] == pytest.approx({"median": 2, "q1": 2, "q3": 2, "mean": 2, "std": 0, "n": 4})
    assert cell["dense"]["latency_s"]["q3"] > 1.1 * cell["dense"]["latency_s"]["q1"]


def test_exactly_so_many_tokens(tiny_handle: ModelHandle) -> None:
    ids_BT = speed.prompt_ids(tiny_handle, Case(2, 50, 1))
    assert ids_BT.shape == (2, 50)
    assert tiny_handle.tokenizer.decode(ids_BT[0]).startswith(speed.PROMPT)  # type: ignore[union-attr]
    tiny_handle.model.generation_config.eos_token_id = list(range(250))  # nearly anything would end it
    speed.generate(tiny_handle.model, ids_BT[:, :4], 3, seed=0)


def test_operations(tiny_handle: ModelHandle, shorter: ModelHandle) -> None:
    projections = 32 * 32 * 2 + 32 * 16 * 2
    mlp = sum(p.numel() for name, p in tiny_handle.layers[0].named_parameters() if "mlp" in name)
    one = 8 * (2 * (projections + mlp) + 4 * 32) + 2 * 258 * 32
    assert generation_flops(tiny_handle, Case(1, 1, 1)) == one
    assert generation_flops(tiny_handle, Case(3, 1, 1)) == 3 * one
    head = 2 * 258 * 32 * 4
    whole, half = (generation_flops(h, Case(1, 9, 4)) - head for h in (tiny_handle, shorter))
    assert whole == 2 * half == 8 * (12 * 2 * (projections + mlp) + 4 * 32 * 78)


def test_spread() -> None:
    assert speed.spread([4.0, 1.0, 2.0, 3.0]).model_dump() == pytest.approx(
        {"median": 2.5, "q1": 1.75, "q3": 3.25, "mean": 2.5, "std": math.sqrt(1.25), "n": 4})
    assert speed.spread([7.0]).q3 == 7


class TestNotes:
    def notes(self, dense: ModelHandle, compressed: ModelHandle, **latency: float) -> str:
        spread = Spread(**{"median": 1.0, "q1": 0.99, "q3": 1.01, "mean": 1.0, "std": 0.0, "n": 3} | latency)  # type: ignore[arg-type]
        timing = Timing(latency_s=spread, flops=1.0)
        return " ".join(speed.notes(dense, compressed, [SpeedCase(name="1x2x3", dense=timing, compressed=timing)]))

    def test_a_sound_measurement_needs_none(self, tiny_handle: ModelHandle, shorter: ModelHandle) -> None:
        tiny_handle.random = False
        assert self.notes(tiny_handle, shorter) == ""

    def test_zeroed_sublayers_are_not_skipped(self, tiny_handle: ModelHandle) -> None:
        plan = MergePlan(8, sublayers=(Sublayer(2, "attention"), Sublayer(3, "mlp")))
        assert "2 removed sublayers are zeros" in self.notes(tiny_handle, apply_plan(tiny_handle, plan))

    def test_nothing_is_gone(self, tiny_handle: ModelHandle) -> None:
        assert "as large as the dense one" in self.notes(tiny_handle, apply_plan(tiny_handle, MergePlan(8)))

    def test_a_busy_machine(self, tiny_handle: ModelHandle, shorter: ModelHandle) -> None:
        assert "up to 51% apart (1x2x3" in self.notes(tiny_handle, shorter, q3=1.5)


def test_a_broken_model_has_no_speed(tiny_handle: ModelHandle) -> None:
    tiny_handle.model.model.norm.weight[0] = math.nan
    with pytest.raises(DataError, match="NaN or infinite logits"):
        measure_speed(Evaluation(**SMALL), tiny_handle, tiny_handle)  # type: ignore[arg-type]


def test_a_case_that_does_not_fit_costs_only_itself(
    tiny_handle: ModelHandle, shorter: ModelHandle, clock: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = speed.generate

    def limited(model: Any, ids_BT: Any, new: int, seed: int) -> Any:
        if len(ids_BT) > 1:
            raise torch.OutOfMemoryError("no more")
        return generate(model, ids_BT, new, seed)

    monkeypatch.setattr(speed, "generate", limited)
    first, second = measure_speed(Evaluation(**SMALL), tiny_handle, shorter)["cells"]  # type: ignore[arg-type]
    assert "error" not in first
    assert second["error"] == "out of memory"


class TestSettings:
    def test_the_papers_case_comes_first_and_once(self) -> None:
        assert Evaluation(speed_runs=1, speed_discard=0, speed_new=[3, 5]).cases() == [(1, 12, 3), (1, 12, 5)]

    def test_none_changes_nothing(self) -> None:
        off, on = Evaluation(tasks=["piqa"]), Evaluation(tasks=["piqa"], speed_runs=30)
        assert not any(name.startswith(("speed", "corpora_at")) for name in off.identity())
        assert on.identity() != off.identity()
        assert on.measured_by() == off.measured_by()

    @pytest.mark.parametrize(("field", "value"), [
        ("speed_runs", -1), ("speed_discard", 30), ("speed_grid_runs", 0), ("speed_batches", []), ("speed_new", [0]),
    ])
    def test_bad_ones_are_refused(self, field: str, value: Any) -> None:
        with pytest.raises(ConfigError, match=f"evaluation.{field}"):
            Evaluation(**{"speed_runs": 30, field: value})

    def test_longer_than_the_model(self, tiny_handle: ModelHandle) -> None:
        assert Evaluation(speed_prompts=[10**6]).lengths() == {}
        assert Evaluation(speed_runs=30, speed_prompts=[10**6]).lengths() == {
            "evaluation.speed_prompts + speed_new": 10**6 + 128}  # fmt: skip

    def test_presets(self) -> None:
        fast = compose_run(["model=tiny", "evaluation=speed"]).evaluation
        assert (fast.speed_runs, fast.speed_discard, fast.tasks) == (30, 10, [])
        paper = compose_run(["model=tiny", "evaluation=paper", "evaluation.corpora.wikitext2=wikitext2"]).evaluation
        assert (len(paper.tasks), paper.limit, paper.ppl_bos, paper.speed_runs) == (7, None, "both", 30)


def test_in_a_run(tmp_path: Path, clock: list[int]) -> None:
    """In record, warnings, summary and page; measured again where everything else comes from the cache."""
    from slm_exp.reporting.summary import summary

    def run(folder: str) -> dict[str, Any]:
        return tiny_run(tmp_path / folder, "evaluation=speed", "method.threshold=0.5")

    record = run("one")
    assert record == json.loads((tmp_path / "one" / "record.json").read_text())
    assert [cell["name"] for cell in record["speed"]["cells"]] == ["1x12x3", "1x12x128", "1x128x128", "8x12x128",
                                                                  "8x128x128"]
    assert set(record["speed"]["notes"]) <= set(record["warnings"])
    page = (tmp_path / "one" / "report.html").read_text()
    assert "Speed of generation" in page
    assert "8 × 128, 128" in page
    assert "batch 8, 128 tokens in, 128 out: " in summary(record, tmp_path)
    timed = len(clock)
    again = run("two")
    assert len(clock) == 2 * timed
    assert {stage["name"]: stage["cached"] for stage in again["stages"]}["plan"]
    assert not {stage["name"]: stage["cached"] for stage in again["stages"]}["evaluate"]
    assert run("two") == again  # a finished run is returned as it is
    assert len(clock) == 2 * timed
