"""What a run says first, and that terminal, page, table and `slm compare` say the same of one difference."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from builders.records import change_record, make_run

from slm_exp.cli.main import main
from slm_exp.evaluation.base import SEVEN
from slm_exp.reporting.page import write_report
from slm_exp.reporting.summary import SCREEN, fitted, summary
from slm_exp.runs.record import Run
from slm_exp.runs.statistics.runs import Measured, difference
from slm_exp.runs.statistics.verdict import judge_run, verdict_of


def said(folder: Path) -> list[str]:
    return summary(Run.read(folder).record.raw, folder).splitlines()


def test_perplexity_average_and_verdict_come_first(tmp_path: Path) -> None:
    lines = said(make_run(tmp_path, ["seed=1"], 0.6, ratio=2.0))
    assert re.fullmatch(r"run \w+ finished in \d+ s", lines[0])
    assert re.fullmatch(r"  perplexity news: 30.00 -> 60.00 \(2.00\d* ± 0.0\d+ times\)", lines[1])
    assert re.fullmatch(r"  average    \d+.* -> \d+.*: -\d+.* points, n = 420 in seven tasks", lines[2])
    assert lines[3].startswith("  verdict    clearly worse: perplexity is 2.00")
    assert lines[4].startswith("  model ")


def test_a_destroyed_model_says_so_in_its_first_line(tmp_path: Path) -> None:
    folder = make_run(tmp_path, ["seed=2"], 0.6, ratio=40.0)
    assert said(folder)[0].endswith("destroyed: perplexity is 40 times the dense model's")
    html = write_report(folder).read_text()
    assert '<p class="verdict destroyed">Destroyed: perplexity is 40 times' in html
    assert html.index('<p class="verdict') < html.index('<p class="lede"')


def test_random_weights_say_so_in_the_first_line(tmp_path: Path) -> None:
    folder = make_run(tmp_path, ["seed=3"], ratio=1.0, model={"name": "tiny", "digest": "d", "random": True})
    assert "random weights: no number of this run says anything about quality" in said(folder)[0]


def test_one_difference_has_one_estimate_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "runs", ["seed=4"], 0.6, ratio=1.5)
    run = Run.read(folder)
    found = difference([Measured(run, "dense")], [Measured(run)])
    assert found
    assert found.stderr
    points = f"{100 * found.value:.1f} ± {100 * found.stderr:.1f}"
    assert f": {points} points" in said(folder)[2]
    assert points.replace("-", "−").replace(" ± ", " <span class=err>± ") in write_report(folder).read_text()
    assert main(["compare", str(folder), "--json"]) == 0
    rows = {row["task"]: row for row in json.loads(capsys.readouterr().out)}
    assert (rows["average"]["difference"], rows["average"]["stderr"]) == (found.value, found.stderr)
    ratio = verdict_of(run).texts["news"]
    news = rows["perplexity news"]
    assert (news["metric"], news["difference"], news["stderr"], news["n"]) == ("times", ratio.value, ratio.stderr, 32)
    assert main(["compare", str(folder)]) == 0
    assert points in capsys.readouterr().out


def test_a_record_of_an_older_version_has_its_verdict_from_its_files(tmp_path: Path) -> None:
    folder = make_run(tmp_path, ["seed=5"], 0.6, ratio=1.5)
    assert "verdict" not in Run.read(folder).record.raw
    found = verdict_of(Run.read(folder))
    assert found.outcome == "clearly worse"
    change_record(folder, verdict=found.model_dump(exclude_none=True) | {"outcome": "from the record"})
    assert verdict_of(Run.read(folder)).outcome == "from the record"
    for path in (folder / "samples").rglob("perplexity-*"):
        path.unlink()
    assert judge_run(Run.read(folder)).perplexity_ratio == found.perplexity_ratio.model_copy(
        update=dict.fromkeys(("stderr", "low", "high", "p", "n"))) if found.perplexity_ratio else False


def test_runs_of_other_seeds_are_one_row_of_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rule in ("mean", "top_layer"):
        for seed in (0, 1, 2):
            make_run(tmp_path, [f"merge_rule={rule}", f"seed={seed}"], 0.6, luck=seed + 1, ratio=1.5 + seed / 10)
    make_run(tmp_path, ["merge_rule=keep_low"], 0.6, ratio=1.5)
    assert main(["tables", "sweep", str(tmp_path), "--format", "csv", "--columns",
                 "rule,seed,average,ppl ratio,kept,verdict"]) == 0
    table = [line.split(",") for line in capsys.readouterr().out.splitlines()]
    rows = {row[1]: row for row in table[2:]}
    assert set(rows) == {"mean", "top_layer", "keep_low"}
    assert (rows["mean"][2], rows["keep_low"][2]) == ("3 seeds", "0")
    assert rows["mean"][4] == "1.60"
    assert rows["mean"][6] == "clearly worse (3 of 3)"
    averages = [Run.read(f).record.eval.compressed.average or 0 for f in tmp_path.iterdir()
                if Run.read(f).record.setting("merge_rule.name") == "mean"]
    assert rows["mean"][3] == f"{100 * sum(averages) / 3:.2f}"
    assert main(["report", str(tmp_path)]) == 0
    html = (tmp_path / "report.html").read_text()
    assert html.count("<td data-value=\"3\">3</td>") == 2
    assert "Means over seeds" in html
    assert len(SEVEN) == 7


def test_the_summary_fits_on_a_screen() -> None:
    lines, warnings = [f"line {i}" for i in range(20)], [f"warning {i} " + "x" * 200 for i in range(9)]
    assert fitted(lines, []) == lines
    kept = fitted(lines, warnings)
    assert len(kept) + 1 == SCREEN[0]  # the report's path comes last
    assert max(map(len, kept)) <= SCREEN[1]
    assert kept[:20] == lines
    assert kept[-1] == "  (7 more lines on the page)"
    long = fitted(["  verdict    " + "word " * 40], [])
    assert max(map(len, long)) <= SCREEN[1]
    assert " ".join(long).split() == ["verdict", *["word"] * 40]
