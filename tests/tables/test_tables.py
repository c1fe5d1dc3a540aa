"""From records to tables: what is marked, what is missing, what is refused, and the same bytes everywhere."""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from builders.records import make_run
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_exp.cli.main import main
from slm_exp.evaluation.base import SEVEN
from slm_exp.launch.jobs import split_sweep
from slm_exp.runs.record import Run
from slm_exp.runs.schema import Record
from slm_exp.runs.statistics.runs import Measured
from slm_exp.runs.statistics.spread import spread
from slm_exp.tables.commands import commands, products
from slm_exp.tables.definition import cells, read_table, table_names
from slm_exp.tables.formats import FORMATS
from slm_exp.tables.grid import BEST, SECOND, TIED, Entry, fill, marked, provenance, shown
from slm_exp.tables.quantities import quantity
from slm_exp.tables.records import find_runs
from slm_exp.tables.reference import published

SKILL = {"top_layer": 0.60, "keep_top": 0.59, "mean": 0.45, "sum_of_deltas": 0.2}
RULES = ["rules", "sizes=[27]"]


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of the rules table at one size; keep_low is missing."""
    root = tmp_path_factory.mktemp("runs")
    for i, overrides in enumerate(cells("rules", {"sizes": [27]})):
        rule = overrides[-1].partition("=")[2]
        if rule in SKILL:
            make_run(root, overrides, SKILL[rule], n=120, luck=i)
    return root


def drawn(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main(["tables", *map(str, words)]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main(["tables", *map(str, words)]) == 2
    return capsys.readouterr().err


def rows_of(text: str) -> dict[str, dict[str, str]]:
    return {row.get("row") or row["run"]: row for row in csv.DictReader(io.StringIO(text))}


# ------------------------------------------------------------------------------------------------ marks

P_VALUES = st.lists(st.floats(0, 1), min_size=21, max_size=21)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 100), min_size=0, max_size=7), P_VALUES)
def test_nothing_is_best_without_a_test_against_every_other(values: list[float], p_values: list[float]) -> None:
    told = dict(enumerate(values))
    pairs = {frozenset((a, b)): p_values[(a * 7 + b) % 21] for a in told for b in told if a < b}
    marks = marked(told, lambda a, b: pairs[frozenset((a, b))])
    assert marks is not None
    best = [j for j, mark in marks.items() if mark == BEST]
    for j in best:
        assert all(pairs[frozenset((j, other))] < 0.05 for other in told if other != j)
        assert told[j] == max(values)
    assert len(best) <= 1
    assert not (best and TIED in marks.values())
    if SECOND in marks.values():
        assert best
    if len(values) < 2:
        assert marks == {}


def test_marks_by_hand() -> None:
    values = {0: 50.0, 1: 60.0, 2: 40.0}
    assert marked(values, lambda a, b: 0.001) == {1: BEST, 0: SECOND}
    assert marked(values, lambda a, b: 0.5) == {0: TIED, 1: TIED, 2: TIED}
    assert marked(values, lambda a, b: 0.5 if {a, b} == {0, 2} else 0.001) == {1: BEST}
    assert marked(values, lambda a, b: 0.5 if {a, b} == {0, 1} else 0.001) == {0: TIED, 1: TIED}
    assert marked(values, lambda a, b: 0.03) == {0: TIED, 1: TIED, 2: TIED}  # three tests: 0.03 is not enough
    assert marked(values, lambda a, b: None) is None


def test_a_table_marks_what_the_documents_support(rules: Path, capsys) -> None:
    """Of 60 and 59 % no task of 120 documents tells the better, the average of all does; 45 and 20 % are behind."""
    rows = rows_of(drawn(capsys, *RULES, rules, "--format", "csv"))
    marks = {name: {column: row[f"{column} mark"] for column in (*SEVEN, "average")} for name, row in rows.items()}
    assert marks["slm (top_layer)"] == dict.fromkeys(SEVEN, TIED) | {"average": BEST}
    assert marks["keep_top"] == dict.fromkeys(SEVEN, TIED) | {"average": SECOND}
    for name in ("dense", "delete (keep_low)", "average (mean)", "sum (sum_of_deltas)"):
        assert marks[name] == dict.fromkeys((*SEVEN, "average"), ""), name
    assert float(rows["dense"]["average"]) > float(rows["slm (top_layer)"]["average"])
    text = drawn(capsys, *RULES, rules)
    assert "Exact McNemar test per task, paired bootstrap for the average, Holm's correction" in text


def test_a_clear_winner_is_best_in_every_column(rules: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(rules, tmp_path / "runs")
    job = next(c for c in cells("rules", {"sizes": [27]}) if "merge_rule=top_layer" in c)
    make_run(tmp_path / "runs", job, 0.75, n=120)
    rows = rows_of(drawn(capsys, *RULES, tmp_path / "runs", "--format", "csv"))
    for column in (*SEVEN, "average"):
        assert rows["slm (top_layer)"][f"{column} mark"] == BEST, column
        assert rows["keep_top"][f"{column} mark"] == SECOND, column


def test_no_samples_no_marks(rules: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(rules, tmp_path / "copy", ignore=shutil.ignore_patterns("samples"))
    text = drawn(capsys, *RULES, tmp_path / "copy")
    assert "**" not in text.split("Missing")[0].replace("**27 of", "").replace("removed**", "")
    assert "for want of results on the same documents" in text


# ------------------------------------------------------------------------------------------- same bytes


def test_the_same_records_give_the_same_bytes(rules: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """Whatever the folders are called and whichever come first; also on a machine that digests files otherwise."""
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    first = {name: drawn(capsys, *RULES, rules, "--format", name) for name in FORMATS}
    for i, folder in enumerate(sorted(rules.iterdir(), reverse=True)):
        there = tmp_path / f"part{i % 2}" / f"{i}"
        shutil.copytree(folder, there)
        record = json.loads((there / "record.json").read_text())
        (there / "record.json").write_text(json.dumps(record | {"run_id": f"{9 - i}" * 16}))
    assert {name: drawn(capsys, *RULES, tmp_path / "part1", tmp_path / "part0", "--format", name)
            for name in FORMATS} == first


@settings(deadline=None)
@given(st.floats(-1e6, 1e6), st.integers(0, 6))
def test_numbers_are_shown_without_exponent_or_minus_zero(value: float, digits: int) -> None:
    text = shown(value, digits)
    assert "e" not in text
    assert abs(float(text) - value) <= 0.51 * 10.0**-digits
    assert not (text.startswith("-") and float(text) == 0)


def test_a_number_of_thousands_without_an_error_is_whole() -> None:
    assert [Entry(value, digits=2).text for value in (26.754, 999.994, 1680.28, 225359443.64)] == [
        "26.75", "999.99", "1680", "225359444"]


# -------------------------------------------------------------------------------------------- what is missing


def jobs_of(command: str) -> list[frozenset[str]]:
    words = shlex.split(command)
    assert words[:4] == ["python", "-m", "slm_exp", "-m"]
    return [frozenset(re.sub(r"=(True|False)$", lambda found: found[0].lower(), o).replace(r"\:", ":")  # Hydra's way
                      for o in job if not o.startswith("hydra.")) for job in split_sweep(words[4:], {})]  # fmt: skip


COMMANDS = {"agreement": 6, "as_published": 6, "calibration": 1, "depth_width": 4, "main": 5, "main_lora": 5,
            "methods": 2, "recovery": 4, "rules": 1, "similarity": 2, "speed": 5, "thresholds": 1}  # fmt: skip
"""Multiruns that a table needs: its rows that take the same settings share one."""


def test_every_table_has_its_number_of_commands() -> None:
    assert set(COMMANDS) == set(table_names())


@pytest.mark.parametrize(("name", "n"), COMMANDS.items())
def test_missing_commands_are_few_and_run_exactly_the_jobs(name: str, n: int) -> None:
    jobs = cells(name)
    printed = commands(jobs, name)
    ran = [job for command in printed for job in jobs_of(command)]
    assert sorted(map(sorted, ran)) == sorted(map(sorted, jobs))
    assert len(products(jobs)) == len(printed) == n


def test_a_gap_shows_the_command_that_fills_it(rules: Path, capsys) -> None:
    text = drawn(capsys, *RULES, rules)
    assert "delete (keep_low) | – [1]" in text
    (line,) = [line for line in text.splitlines() if line.startswith("- [1]")]
    command = line.split("`")[1]
    assert command in drawn(capsys, *RULES, rules, "--missing").splitlines()
    (job,) = [c for c in cells("rules", {"sizes": [27]}) if "merge_rule=keep_low" in c]
    assert jobs_of(command) == [frozenset(job)]
    assert command in drawn(capsys, *RULES, rules, "--format", "tex")
    assert "hydra.sweep.dir=outputs/multirun/rules" in command


def test_the_records_say_which_model_and_its_sizes(tmp_path: Path, capsys) -> None:
    """A preset; and a folder that is not on this machine, whose sizes the records have."""
    (job,) = [c for c in cells("rules", {"model": "vicuna_7b", "sizes": [26]}) if "merge_rule=mean" in c]
    make_run(tmp_path / "a", job, n=5)
    assert "## Merge rules at equal size, Vicuna-7B" in drawn(capsys, "rules", "sizes=[26]", tmp_path / "a")
    gone = {"model": "hf", "extra": ["model.path=nobody/nothing"], "sizes": [25], "layers": 30}
    gone |= {"parameters": 134515008, "per_layer": 3540096}
    (job,) = [c for c in cells("rules", gone) if "merge_rule=mean" in c]
    make_run(tmp_path / "b", job, n=5)
    text = drawn(capsys, "rules", "sizes=[25]", tmp_path / "b")
    assert "25 of 30 layers, 13.2 % of the parameters removed" in text
    assert "the runs there are of 2 models; say which" in refused(capsys, "rules", tmp_path)


@pytest.mark.parametrize(("words", "reason"), [
    (["rules", "model=tiny"], "Other model: they are of model=smollm2_135m, the table of model=tiny."),
    (["rules", "evaluation.limit=7"], "Other protocol: evaluation.limit = 20, in the table 7."),
    (["rules", "sizes=[25]"], "Other sizes: they have method.target_layers=27, the table method.target_layers=25."),
    (["rules", "sizes=[27]", "calibration.n_samples=3"], "has calibration.n_samples = 10, in the table 3."),
])  # fmt: skip
def test_runs_of_which_none_fits_say_why_in_one_line(rules: Path, words: list[str], reason: str, capsys) -> None:
    said = refused(capsys, *words, rules)
    assert reason in said
    assert said.count("\n") == 1


def test_nothing_run_yet(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert drawn(capsys, "rules", "--missing").count("\n") == 1
    assert "no record.json" in refused(capsys, "rules", tmp_path)
    assert "expected a folder" in refused(capsys, "rules", tmp_path / "nowhere")
    assert "outputs" in refused(capsys, "rules")


def test_a_failed_run_is_a_gap_that_says_why(tmp_path: Path, capsys) -> None:
    jobs = cells("rules", {"sizes": [27]})
    error = {"type": "OutOfMemoryError", "message": "CUDA out of memory", "stage": "evaluate"}
    make_run(tmp_path, jobs[0], n=5, status="failed", error=error)
    text = drawn(capsys, *RULES, tmp_path)
    assert "failed in stage evaluate: CUDA out of memory" in text
    assert "slm (top_layer) | – [1]" in text
    sweep = drawn(capsys, "sweep", tmp_path)
    assert "OutOfMemoryError in stage evaluate" in sweep


# ------------------------------------------------------------------------------------------------ seeds


def test_seeds_give_a_mean_and_an_interval(tmp_path: Path, capsys) -> None:
    params = {"sizes": [27], "seeds": [0, 1, 2]}
    jobs = [c for c in cells("rules", params) if "merge_rule=top_layer" in c or "merge_rule=sum_of_deltas" in c]
    folders = [make_run(tmp_path, c, 0.6 if "merge_rule=top_layer" in c else 0.3, n=40, luck=i)
               for i, c in enumerate(jobs)]
    words = ["rules", "sizes=[27]", "seeds=[0,1,2]", tmp_path, "--columns", "plan,layers,average"]
    rows = rows_of(drawn(capsys, *words, "--format", "csv"))
    values = [100 * json.loads((f / "record.json").read_text())["eval"]["compressed"]["average"] for f in folders[:3]]
    assert rows["slm (top_layer)"]["average"] == f"{spread(values).mean:.2f}"
    assert rows["slm (top_layer)"]["average ±"] == f"{spread(values).half:.2f}"
    assert rows["slm (top_layer)"]["average mark"] == BEST
    assert rows["slm (top_layer)"]["plan"] == "14-17 (3 of 3)"
    assert (rows["slm (top_layer)"]["layers"], rows["slm (top_layer)"]["layers ±"]) == ("27.0", "0.0")
    shutil.rmtree(folders[0])
    text = drawn(capsys, *words)
    assert "95 % interval of the mean over 3 runs" in text
    assert "(2 of 3) [1]" in text
    assert "seed=0" in text
    assert "°" not in text  # an incomplete row takes no part, and one row alone earns no mark
    assert "<u>" not in text


# -------------------------------------------------------------------------------------------- refusals


def with_protocol(folder: Path, about: dict) -> None:
    record = json.loads((folder / "record.json").read_text())
    record["eval"]["compressed"]["protocol"] |= about
    (folder / "record.json").write_text(json.dumps(record))


def test_other_protocols_are_refused_by_name(rules: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(rules, tmp_path / "copy")
    with_protocol(min((tmp_path / "copy").iterdir()), {"hash": "0123", "fields": {"lm_eval": "0.3.0", "limit": 20}})
    for words in (RULES, ["sweep"]):
        message = refused(capsys, *words, tmp_path / "copy")
        assert "ProtocolError" in message
        assert "lm_eval" in message
        assert "different protocols" in drawn(capsys, *words, tmp_path / "copy", "--mixed-protocols")


def test_wrong_calls_name_what_was_wanted(rules: Path, capsys) -> None:
    assert "Did you mean rules?" in refused(capsys, "rulse", rules)
    assert "Did you mean sizes?" in refused(capsys, "rules", "sizse=[27]", rules)
    assert "Did you mean average?" in refused(capsys, *RULES, rules, "--columns", "avrage")
    assert "md, tex, csv, html" in refused(capsys, *RULES, rules, "--format", "pdf")
    assert "several formats need --out" in refused(capsys, *RULES, rules, "--format", "md,csv")
    assert "folders only" in refused(capsys, "sweep", "model=tiny", rules)
    assert "not YAML" in refused(capsys, "rules", "sizes=[27", rules)


# ------------------------------------------------------------------------------------- sweep, formats, files


def test_sweep_has_a_row_for_every_run(rules: Path, capsys) -> None:
    rows = rows_of(drawn(capsys, "sweep", rules, "--format", "csv"))
    dense = rows.pop("dense")
    assert (dense["rule"], dense["params"]) == ("", "134.5")
    assert set(rows) == {p.name for p in rules.iterdir()}
    wanted = ["threshold", "rule", "similarity", "kernel", "layers", "params", "average", "kept", "verdict", *SEVEN]
    (row, *_) = rows.values()
    assert [c for c in row if c in wanted] == wanted
    assert {row["rule"] for row in rows.values()} == set(SKILL)
    assert (row["target"], row["params"], row["removed"]) == ("27 layers", "123.9", "7.9")
    text = drawn(capsys, "sweep", rules)
    assert len(re.findall(r"\d+ runs(?! of an older)", text)) == 1
    assert "## Runs that differ in rule" in text
    narrow = drawn(capsys, "sweep", rules, "--format", "csv", "--columns", "rule,average")
    assert narrow.splitlines()[0].startswith("run,rule,average")


def test_sweep_names_the_front_of_size_and_perplexity(tmp_path: Path, capsys) -> None:
    runs = {(size, ratio): make_run(tmp_path, [f"method.target_layers={size}", f"seed={seed}"], ratio=ratio,
                                    params={"before": 1000, "after": size, "ratio_removed": 0.1}).name
            for seed, (size, ratio) in enumerate([(27, 1.5), (26, 1.9), (28, 1.6), (25, 1.8)])}  # fmt: skip
    (said,) = re.findall("No run beats (.*) in both", drawn(capsys, "sweep", tmp_path))
    assert sorted(said.split(", ")) == sorted([runs[27, 1.5], runs[25, 1.8]])


def test_several_formats_become_files(rules: Path, tmp_path: Path, capsys) -> None:
    out = drawn(capsys, *RULES, rules, "--format", "md,tex,csv,html", "--out", tmp_path)
    assert out.split() == [str(tmp_path / f"rules.{name}") for name in ("md", "tex", "csv", "html")]
    assert (tmp_path / "rules.md").read_text() == drawn(capsys, *RULES, rules)


def test_html_is_whole_and_needs_no_network(rules: Path, capsys) -> None:
    text = drawn(capsys, *RULES, rules, "--format", "html")
    opened: list[str] = []

    class Whole(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag != "meta":
                opened.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert opened.pop() == tag

    Whole().feed(text)
    assert opened == []
    assert "http" not in text.replace("https://", "http://") or "src=" not in text
    assert text.count('scope="row"') == 6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rules", "sweep"])
def test_latex_compiles_with_a_minimal_tex(rules: Path, tmp_path: Path, capsys, name: str) -> None:
    if shutil.which("pdflatex") is None:
        pytest.skip("no pdflatex (apt-get install texlive-latex-base texlive-latex-recommended)")
    words = [*RULES] if name == "rules" else [name]
    drawn(capsys, *words, rules, "--format", "tex", "--out", tmp_path)
    whole = f"\\documentclass{{article}}\\usepackage{{booktabs}}\\begin{{document}}\\input{{{name}}}\\end{{document}}"
    (tmp_path / "whole.tex").write_text(whole)
    done = subprocess.run(["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "whole.tex"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "whole.pdf").stat().st_size > 5000


def test_drawing_loads_nothing_heavy(rules: Path) -> None:
    script = ("import sys; from slm_exp.cli.tables import main; assert main(sys.argv[1:]) == 0; "
              "heavy = {'torch', 'transformers', 'datasets', 'lm_eval', 'wandb', 'scipy'} & set(sys.modules); "
              "assert not heavy, heavy")
    done = subprocess.run([sys.executable, "-c", script, *RULES, str(rules), "--format", "csv"], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------- quantities and references


@pytest.mark.parametrize("broken", [
    '{"status": "fin', "[]", '{"status": "finished", "eval": "x"}', '{"error": "boom"}', '{"stages": [1]}',
    '{"eval": {"dense": {"tasks": [1]}}}', '{"eval": {"compressed": {"protocol": "x"}}}',
])  # fmt: skip
def test_a_record_that_is_none_is_named_and_left_out(rules: Path, broken: str, tmp_path: Path, capsys) -> None:
    copied = Path(shutil.copytree(rules, tmp_path / "runs"))
    first, *others = find_runs([copied])
    (first.run.folder / "record.json").write_text(broken)
    assert [m.name for m in find_runs([copied])] == [m.name for m in others]
    assert f"left out: {first.run.folder / 'record.json'}" in capsys.readouterr().err


def changed(m: Measured, **sections: object) -> Measured:
    return Measured(Run(m.run.folder, Record.of(m.record.raw | sections)))


def test_quantities_of_a_record(rules: Path) -> None:
    run = find_runs([rules])[0]
    dense = Measured(run.run, "dense")
    assert (quantity("layers").value(run), quantity("layers").value(dense)) == (27, 30)
    assert quantity("removed").value(dense) == 0
    zeroed = changed(run, params=run.record.raw["params"] | {"zeroed": 3_540_096})
    assert quantity("removed_or_zeroed").value(zeroed) == pytest.approx(100 * 4 * 3_540_096 / 134_515_008)
    assert quantity("plan").value(run) == "14-17"
    assert quantity("config.method.target_layers").value(run) == 27
    assert quantity("perplexity.nothing").value(run) is None
    cell = {"median": 2.0, "q1": 1.9, "q3": 2.3}
    speed = {"protocol": {"runs": 30}, "cells": [{"name": "1x12x128", "dense": {"latency_s": cell, "peak_bytes": 2e9},
                                                   "compressed": {"latency_s": cell}, "speedup": cell}]}
    timed = changed(run, speed=speed)
    assert quantity("speed.latency_s").value(timed) == 2.0
    assert quantity("speed.latency_s").stderr(timed) == pytest.approx(0.2)
    assert quantity("speed.speedup").value(timed) == 2.0
    assert quantity("speed.peak_bytes").value(Measured(timed.run, "dense")) == 2.0
    assert quantity("speed.latency_s.8x12x128").value(timed) is None


def test_the_protocol_below_a_table_is_of_what_was_measured(rules: Path) -> None:
    run = find_runs([rules])[0]

    def last_note(asked: dict, **more: dict) -> str:
        measured = {"compressed": {"protocol": {"hash": "h", "fields": asked}}}
        return provenance([changed(run, **more, eval=measured)])[-2]  # the last one: nothing can be checked

    nothing = {"lm_eval": "1", "tasks": {}, "limit": None, "dtype": "float32", "perplexity": {}}
    speed = {"protocol": {"runs": 30, "discard": 10, "dtype": "float32", "device": "cpu", "threads": 2}}
    assert last_note(nothing, speed=speed) == ("Speed: 30 runs in turn with the dense model, the first 10 left out; "
                                               "float32, cpu, 2 threads.")
    assert last_note(nothing | {"perplexity": {"mine": {}}}) == "Protocol h: perplexity of mine, float32."
    assert last_note(nothing | {"tasks": {"boolq": {}}}) == "Protocol h: lm-eval 1, every document, float32."


def test_published_numbers_carry_their_source_and_add_up() -> None:
    entries = published()
    assert len(entries) > 10
    assert all(e.source and e.protocol and e.tolerance.points > 0 and e.tolerance.share > 0 for e in entries)
    for entry in entries:
        if set(SEVEN) < set(entry.values):
            mean = sum(entry.values[task] for task in SEVEN) / 7
            assert abs(mean - entry.values.get("average", mean)) < 0.011, entry


def test_ours_beside_theirs(tmp_path: Path, capsys) -> None:
    words = ["recovery", "model=vicuna_7b", "methods=[shortened_ppl]", "sizes=[26]"]
    job = next(c for c in cells("recovery", {"model": "vicuna_7b", "methods": ["shortened_ppl"], "sizes": [26]})
               if "recovery=lora" in c)
    make_run(tmp_path, job, 0.6081, n=400)
    rows = list(csv.DictReader(io.StringIO(drawn(capsys, *words, tmp_path, "--reference", "--format", "csv"))))
    assert [row["quantity"] for row in rows] == [*SEVEN, "average"]
    for row in rows:
        apart = float(row["ours"]) - float(row["published"])
        assert float(row["difference"]) == pytest.approx(apart, abs=0.011)
        assert (row["verdict"] == "agrees") == (abs(apart) <= 1.0)
    text = drawn(capsys, *words, tmp_path, "--reference")
    assert "4031a92" in text
    assert "3326c54" in text
    assert "1.654 average points" in text
    assert "There is: nothing" in refused(capsys, *RULES, "model=smollm2_135m", tmp_path, "--reference")


FILLED = {"dense": [77.74, 78.07, 75.97, 68.98, 76.30, 46.33, 44.20, 66.80],  # of Bolaco's table
          "SLM, path at the size": [62.17, 66.32, 58.36, 64.40, 50.76, 34.04, 33.4, 52.78],
          "FLAP, one threshold for all layers": [70.21, 75.24, 69.34, 66.30, 67.30, 39.42, 37.40, 60.74]}


@pytest.fixture
def filled(capsys) -> dict:
    """The form of `main`, filled as a person would with the numbers of one size."""
    text = yaml.safe_load(drawn(capsys, "main", "--form", "model=llama2_7b"))
    rows = {(e.get("block", "")[:2], e["what"]): e for e in text["entries"]}
    assert len(rows) == len(text["entries"]) == 1 + 2 * 19 + 1, "every row, the dense one once"
    for what, numbers in FILLED.items():
        rows["" if what == "dense" else "26", what]["values"].update(zip([*SEVEN, "average"], numbers, strict=True))
    rows["26", "FLAP, one threshold for all layers"]["marks"] = {"average": "best"}
    return text | {"source": "arXiv 2405.10616", "protocol": "zero-shot"}


def test_a_form_that_is_filled_stands_beside_ours_and_against_dense(filled: dict, tmp_path: Path, capsys) -> None:
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(filled))
    job = next(c for c in cells("main", {"model": "llama2_7b"}) if c[-2:] == ["method=slm", "method.target_layers=26"])
    folder = make_run(tmp_path / "runs", job, 0.5, n=400)
    record = json.loads((folder / "record.json").read_text())
    words = ["main", tmp_path / "runs", "--reference-file", tmp_path / "theirs.yaml", "--format", "csv"]
    rows = list(csv.DictReader(io.StringIO(drawn(capsys, *words))))
    assert [r["row"] for r in rows[:8]] == ["dense"] * 8
    (row,) = [r for r in rows if r["row"].startswith("SLM") and r["quantity"] == "average"]
    ours, dense = (100 * record["eval"][which]["average"] for which in ("compressed", "dense"))
    assert float(row["difference"]) == pytest.approx(ours - 52.78, abs=0.006)
    assert float(row["against dense"]) == pytest.approx((ours - dense) - (52.78 - 66.80), abs=0.006)
    assert row["published by"] == "theirs"
    assert {r["verdict"] for r in rows if r["row"].startswith("FLAP")} == {"not run"}


@pytest.mark.parametrize(("what", "change", "message"), [
    ("dense", {"values": {"piqa": 87.07}}, "dense: average = 66.8; the mean of the row's seven is 68.08"),
    ("dense", {"values": {"piqa": 0.7807}}, "dense: piqa = 0.7807; expected an accuracy in per cent"),
    ("dense", {"values": {"perplexity.ptb": 0.5}}, "perplexity.ptb = 0.5; expected a perplexity > 1"),
    ("dense", {"values": {"pika": 1}}, "pika.*Did you mean piqa"),
    ("SLM, path at the size", {"marks": {"average": "best"}}, "marks.average = best; the best there is 60.74"),
    ("SLM, path at the size", {"marks": {"average": "bold"}}, "expected best or second"),
])  # fmt: skip
def test_a_form_filled_wrongly_says_where(filled: dict, what: str, change: dict, message: str, tmp_path: Path, capsys
                                          ) -> None:
    entry = next(e for e in filled["entries"] if e["what"] == what)
    for key, values in change.items():
        entry[key] = {**entry[key], **values}
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(filled))
    said = refused(capsys, "main", "model=llama2_7b", "--reference-file", tmp_path / "theirs.yaml")
    assert re.search(message, said), said
    assert "theirs.yaml" in said


def test_an_empty_form_is_refused(tmp_path: Path, capsys) -> None:
    (tmp_path / "form.yaml").write_text(drawn(capsys, "main", "--form", "model=llama2_7b"))
    assert "source = " in refused(capsys, "main", "model=llama2_7b", "--reference-file", tmp_path / "form.yaml")
    assert "--form; expected folders only" in refused(capsys, "sweep", "--form")


def test_mixed_protocols_stand_beside_published_numbers_only_where_that_was_said(tmp_path: Path, capsys) -> None:
    words = ["recovery", "model=vicuna_7b", "methods=[shortened_ppl]", "sizes=[26]"]
    for job in cells("recovery", {"model": "vicuna_7b", "methods": ["shortened_ppl"], "sizes": [26]}):
        folder = make_run(tmp_path, job, 0.6081, n=400)
    with_protocol(folder, {"hash": "0123", "fields": {"lm_eval": "0.3.0", "limit": 20}})
    assert "different protocols" in refused(capsys, *words, tmp_path, "--reference")
    text = drawn(capsys, *words, tmp_path, "--reference", "--mixed-protocols")
    assert "different protocols" in text
    assert "4031a92" in text


def test_fill_orders_nothing_by_chance(rules: Path) -> None:
    table = read_table("rules", {"sizes": [27]})
    one, other = (fill(table, runs) for runs in (find_runs([rules]), find_runs([rules])[::-1]))
    assert all(a == b for a, b in pairwise([one, other]))
