"""`slm compare`: from two runs' samples to a verdict."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from builders.records import answers, make_run

from slm_exp.cli.main import main
from slm_exp.core.errors import SlmError
from slm_exp.evaluation.base import SEVEN
from slm_exp.runs.statistics.compare import open_run
from slm_exp.runs.statistics.paired import mcnemar


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    told = {"poor": ("method.threshold=0.8", 0.40), "good": ("method.threshold=0.9", 0.62),
            "twin": ("method.threshold=0.95", 0.62)}
    return {name: make_run(root, [override], skill, luck=i) for i, (name, (override, skill)) in enumerate(told.items())}


def rows(capsys: pytest.CaptureFixture[str], *words: object) -> list[dict]:
    assert main(["compare", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_clear_difference_counts_and_a_chance_one_does_not(runs, capsys) -> None:
    found = {row["task"]: row for row in rows(capsys, runs["poor"], runs["good"])}
    assert list(found) == [*SEVEN, "average"]
    a, b = answers(0.40, 60, "piqa", 0), answers(0.62, 60, "piqa", 1)
    assert found["piqa"]["p"] == mcnemar(int((b > a).sum()), int((b < a).sum()))
    assert found["piqa"]["difference"] == pytest.approx(b.mean() - a.mean())
    assert found["average"]["counts"]
    assert all(row["corrected"] >= row["p"] for row in found.values())
    assert not any(row["counts"] for row in rows(capsys, runs["good"], runs["twin"]))


def test_more_runs_share_one_correction(runs, capsys) -> None:
    both = rows(capsys, runs["poor"], runs["good"], runs["twin"])
    alone = rows(capsys, runs["poor"], runs["good"])
    assert len(both) == 16
    assert both[0]["p"] == alone[0]["p"]
    assert max(a["corrected"] / b["corrected"] for a, b in zip(both, alone, strict=False)) > 1


@pytest.mark.parametrize("which", ["", ":dense", ":compressed"])
def test_one_run_is_compared_with_its_dense_model(which, runs, capsys) -> None:
    assert main(["compare", f"{runs['poor']}{which}"]) == 0
    out = capsys.readouterr().out
    assert f"first   {runs['poor']}:dense" in out
    assert "Holm's correction over 8 tests" in out


def test_what_cannot_be_compared_is_refused(runs, tmp_path, capsys) -> None:
    assert main(["compare", f"{runs['good']}:sparse"]) == 2
    assert f"expected {runs['good']}:dense or" in capsys.readouterr().err
    other = make_run(tmp_path, ["evaluation.limit=7"], n=7)
    assert main(["compare", str(runs["good"]), str(other)]) == 2
    assert "limit: 20 and 7" in capsys.readouterr().err
    assert main(["compare", str(tmp_path), str(other)]) == 2
    assert f"give one: {other}" in capsys.readouterr().err
    moved = make_run(tmp_path, ["method.threshold=0.7"])
    (moved / "samples" / "compressed" / "piqa.jsonl.gz").unlink()
    assert main(["compare", str(runs["good"]), str(moved)]) == 2
    err = capsys.readouterr().err
    assert "piqa" in err
    assert "samples/" in err
    empty = make_run(tmp_path, ["method.threshold=0.6"], eval={"dense": None, "compressed": None})
    with pytest.raises(SlmError, match="measured tasks"):
        open_run(str(empty))


def test_runs_that_measured_texts_alone_are_compared_by_them(tmp_path, capsys) -> None:
    """evaluation=none with corpora: perplexity is all there is."""
    folders = [make_run(tmp_path, [f"method.threshold={t}"], ratio=r) for t, r in ((0.9, 2.0), (0.8, 1.5))]
    for folder in folders:
        record = json.loads((folder / "record.json").read_text())
        for side in record["eval"].values():
            side |= {"tasks": {}, "average": None}
        (folder / "record.json").write_text(json.dumps(record))
    assert main(["compare", *map(str, folders), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["task"] == "perplexity news"
    assert (row["first_score"], row["second_score"]) == pytest.approx((60, 45))
    assert row["difference"] == pytest.approx(0.75)
