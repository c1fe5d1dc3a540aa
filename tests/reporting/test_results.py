"""Differences and their standard errors."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slm_exp.evaluation.report import metric_of
from slm_exp.reporting import results
from slm_exp.reporting.page import write_report
from slm_exp.reporting.results import Comparison
from slm_exp.runs.record import Run
from slm_exp.runs.schema import Record
from slm_exp.runs.statistics.paired import mcnemar


def compare(evaluation: dict[str, Any], folder: Path) -> list[Comparison]:
    return results.compare(Run(folder, Record.of({"eval": evaluation})))


def average(evaluation: dict[str, Any], rows: list[Comparison], folder: Path = Path("nowhere")) -> Comparison | None:
    return results.average(Run(folder, Record.of({"eval": evaluation})), rows)


def write(folder: Path, which: str, task: str, rows: list[dict[str, Any]]) -> None:
    (folder / "samples" / which).mkdir(exist_ok=True, parents=True)
    with gzip.open(folder / "samples" / which / f"{task}.jsonl.gz", "wt") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def side(values: np.ndarray, metric: str = "acc") -> dict[str, Any]:
    n = len(values)
    stderr = float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else None
    return {metric: float(values.mean()), f"{metric}_stderr": stderr, "n": n}


def one(tmp_path: Path, dense: np.ndarray, compressed: np.ndarray, hashes: str = "same") -> Comparison:
    for which, values in (("dense", dense), ("compressed", compressed)):
        suffix = "" if hashes == "same" else which
        rows = [{"doc_id": i, "doc_hash": f"h{i}{suffix}", "acc": v} for i, v in enumerate(values)]
        write(tmp_path, which, "piqa", rows)
    evaluation = {"dense": {"tasks": {"piqa": side(dense)}}, "compressed": {"tasks": {"piqa": side(compressed)}}}
    (row,) = compare(evaluation, tmp_path)
    return row


def test_paired_error_is_that_of_the_differences(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    dense = (rng.random(200) < 0.6).astype(float)
    compressed = np.where(rng.random(200) < 0.9, dense, 1 - dense)
    row = one(tmp_path, dense, compressed)
    assert row.paired
    assert row.difference
    differences = compressed - dense
    assert row.difference.value == pytest.approx(differences.mean())
    assert row.difference.stderr == pytest.approx(differences.std(ddof=1) / math.sqrt(200), rel=0.03)  # a bootstrap
    assert row.difference.p == mcnemar(int((differences > 0).sum()), int((differences < 0).sum()))
    unpaired = one(tmp_path, dense, compressed, hashes="other")
    assert not unpaired.paired
    assert unpaired.difference
    spread = math.hypot(dense.std(ddof=1), compressed.std(ddof=1))
    assert unpaired.difference.stderr == pytest.approx(spread / math.sqrt(200))
    assert row.difference.stderr < unpaired.difference.stderr


def test_equal_answers_differ_by_nothing(tmp_path: Path) -> None:
    row = one(tmp_path, np.array([1.0, 0, 1]), np.array([1.0, 0, 1]))
    assert row.difference
    assert (row.difference.value, row.difference.stderr) == (0, 0)


def test_one_document_has_no_error(tmp_path: Path) -> None:
    row = one(tmp_path, np.array([1.0]), np.array([0.0]))
    assert row.difference
    assert (row.difference.value, row.difference.stderr) == (-1, None)
    assert row.dense
    assert row.dense.stderr is None


def test_damaged_missing_or_other_samples_are_not_paired(tmp_path: Path) -> None:
    dense, compressed = np.array([1.0, 0, 1, 1]), np.array([1.0, 0, 0, 1])
    evaluation = {"dense": {"tasks": {"piqa": side(dense)}}, "compressed": {"tasks": {"piqa": side(compressed)}}}
    one(tmp_path, dense, compressed)
    path = tmp_path / "samples" / "dense" / "piqa.jsonl.gz"
    whole = path.read_bytes()
    for content in (whole[:20], b"not gzip", None, whole):
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        (row,) = compare(evaluation, tmp_path)
        assert row.paired == (content == whole)
        assert row.difference
        assert row.difference.value == pytest.approx(-0.25)


def test_samples_that_disagree_with_the_record_are_not_believed(tmp_path: Path) -> None:
    one(tmp_path, np.array([1.0, 0, 1, 1]), np.array([1.0, 0, 0, 1]))
    stale = {"dense": {"tasks": {"piqa": side(np.array([1.0, 1, 1, 1]))}},
             "compressed": {"tasks": {"piqa": side(np.array([1.0, 1, 0, 0]))}}}
    (row,) = compare(stale, tmp_path)
    assert not row.paired
    assert row.difference
    assert row.difference.value == pytest.approx(-0.5)


def test_each_task_by_the_metric_of_the_average() -> None:
    both = {"acc": 0.5, "acc_norm": 0.6, "n": 10}
    assert [metric_of(task, both) for task in ("hellaswag", "piqa", "arc_easy", "openbookqa", "custom")] == [
        "acc_norm", "acc", "acc", "acc_norm", "acc"]
    assert metric_of("custom", {"f1": 0.5, "f1_stderr": 0.1, "n": 3}) == "f1"
    assert metric_of("custom", {}) is None


def test_average_needs_all_seven_and_adds_errors_of_independent_tasks(tmp_path: Path) -> None:
    tasks = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
    scores = {t: {"acc": 0.5, "acc_stderr": 0.07, "acc_norm": 0.5, "acc_norm_stderr": 0.07, "n": 50} for t in tasks}
    evaluation = {"dense": {"tasks": scores, "average": 0.5}, "compressed": {"tasks": scores, "average": 0.5}}
    row = average(evaluation, compare(evaluation, tmp_path))
    assert row
    assert row.dense
    assert row.dense.stderr == pytest.approx(0.07 / math.sqrt(7))
    assert row.difference
    assert row.difference.stderr == pytest.approx(math.sqrt(2) * 0.07 / math.sqrt(7))
    del evaluation["compressed"]["tasks"], evaluation["compressed"]["average"]
    assert average(evaluation, compare(evaluation, tmp_path)) is None


def test_a_model_not_yet_measured_leaves_its_column_empty(tmp_path: Path) -> None:
    (row,) = compare({"dense": {"tasks": {"piqa": side(np.array([1.0, 0.0]))}}, "compressed": None}, tmp_path)
    assert (row.compressed, row.difference, row.n) == (None, None, 2)


def test_models_measured_by_different_protocols_have_no_difference(tmp_path: Path) -> None:
    values = np.array([1.0, 0, 1])
    evaluation = {which: {"tasks": {"piqa": side(values)}, "average": 0.5,
                          "protocol": {"hash": str(limit), "fields": {"limit": limit}}}
                  for which, limit in (("dense", 3), ("compressed", 4))}
    (row,) = compare(evaluation, tmp_path)
    assert row.difference is None
    assert row.dense
    assert average(evaluation, [row] * 7) is None


def test_other_metrics_are_those_besides_accuracy() -> None:
    gsm8k = {"exact_match(strict-match)": 0.1, "exact_match_stderr(strict-match)": 0.03,
             "exact_match(flexible-extract)": 0.2, "n": 10}  # fmt: skip
    lambada = {"acc": 0.3, "perplexity": 60.0}
    sides = {"tasks": {"gsm8k_cot": gsm8k, "piqa": side(np.ones(4)), "lambada_openai": lambada}}
    got = results.other_metrics(Record.of({"eval": {"dense": sides, "compressed": {}}}).eval)
    assert [(row.task, row.metric, row.dense.value, row.compressed) for row in got if row.dense] == [
        ("gsm8k_cot", "exact_match(strict-match)", 0.1, None),
        ("gsm8k_cot", "exact_match(flexible-extract)", 0.2, None), ("lambada_openai", "perplexity", 60.0, None),
    ]


def test_free_texts_stand_side_by_side(tmp_path: Path) -> None:
    for which, texts in (("dense", "ab"), ("compressed", "b")):
        write(tmp_path, which, "free_text", [{"prompt": p, "text": f"{which} after <{p}>"} for p in texts])
    about = {"n": 2, "ended": 0.5, "length": 9.0, "distinct_1": 0.4, "distinct_3": 0.25, "loop": 3.0, "looping": 0.0}
    run = Run(tmp_path, Record.of({"eval": {"dense": {"text": about}, "compressed": {"text": about}}}))
    a, b = results.free_texts(run)
    assert (a.dense, a.compressed, b.compressed) == ("dense after <a>", "", "compressed after <b>")
    page = write_report(tmp_path, run=run).read_text()
    assert page.count("<td>50.0</td><td>9</td><td>40.0</td><td>25.0</td><td>3</td><td>0.0</td>") == 2
    assert "compressed after &lt;b&gt;" in page
    (tmp_path / "samples" / "dense" / "free_text.jsonl.gz").write_bytes(b"damaged")
    assert [text.prompt for text in results.free_texts(run)] == ["b"]
