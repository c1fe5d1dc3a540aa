"""What would make a table say something that no run showed."""

from __future__ import annotations

import csv
import io
import shlex
import shutil
from pathlib import Path

import pytest
from builders.records import change_record, make_run

from slm_exp.cli.main import main
from slm_exp.core.errors import ConfigError, ProtocolError
from slm_exp.runs.state import DIED
from slm_exp.tables.commands import commands
from slm_exp.tables.definition import cells, read_table
from slm_exp.tables.formats import csv_text, latex
from slm_exp.tables.grid import fill
from slm_exp.tables.records import find_runs
from slm_exp.tables.sweep import sweep_grid

TABLE = """
params: {model: smollm2_135m}
runs: [model=$model, evaluation=smoke, method=slm, method.target_layers=27]
over: {seed: [0, 1]}
blocks: [{each: {dtype: [float32, bfloat16]}, label: $dtype}]
rows:
  - {label: dense, which: dense}
  - {label: "[x] ä | y", runs: [model.dtype=$dtype, merge_rule=top_layer]}
  - {label: "*own*", runs: [model.dtype=$dtype, merge_rule=mean]}
columns: [average]
"""


def table(folder: Path, text: str = TABLE) -> str:
    (folder / "own.yaml").write_text(text)
    return str(folder / "own.yaml")


def runs_of(folder: Path, name: str, **changes: object) -> list[Path]:
    return [make_run(folder / "runs", overrides, 0.5 + 0.1 * ("merge_rule=mean" in overrides), luck=i, **changes)
            for i, overrides in enumerate(cells(name))]


def test_the_dense_row_is_of_its_own_blocks_model(tmp_path: Path) -> None:
    name = table(tmp_path)
    for overrides in cells(name):
        half = "model.dtype=bfloat16" in overrides
        made = make_run(tmp_path / "runs", overrides, model={"digest": str(half), "name": "m"})
        measured = find_runs([made])[0].record.raw["eval"]
        measured["dense"]["average"] = 0.1 if half else 0.9
        change_record(made, eval=measured)
    grid = fill(read_table(name), find_runs([tmp_path / "runs"]))
    assert [dict(rows)["dense"][0].text for _, rows in grid.blocks] == ["90.0", "10.0"]


def test_one_dense_row_of_two_models_is_refused(tmp_path: Path) -> None:
    name = table(tmp_path)
    for i, overrides in enumerate(cells(name)):
        make_run(tmp_path / "runs", overrides, model={"digest": str(i % 2), "name": "m"})
    with pytest.raises(ConfigError, match="began with different models"):
        fill(read_table(name), find_runs([tmp_path / "runs"]))
    without = table(tmp_path, TABLE.replace("  - {label: dense, which: dense}\n", ""))
    assert not fill(read_table(without), find_runs([tmp_path / "runs"])).gaps  # nobody asks which it was


def test_a_row_with_some_of_its_seeds_takes_the_marks_away_and_is_told_in_every_format(tmp_path: Path) -> None:
    name = table(tmp_path)
    runs_of(tmp_path, name)
    whole = fill(read_table(name), runs := find_runs([tmp_path / "runs"]))
    part = fill(read_table(name), [m for m in runs if not ("merge_rule=mean" in m.record.overrides
                                                           and m.record.setting("seed") == 1)])
    assert any(e.mark for e in whole.entries())
    assert not any(e.mark for e in part.entries())
    assert "only some of its runs" in " ".join(part.notes)
    rows = list(csv.DictReader(io.StringIO(csv_text(part))))
    assert [row["note"] for row in rows if row["row"] == "*own*"] == ["average: 1 of 2"] * 2


def test_latex_of_labels_that_would_be_arguments(tmp_path: Path) -> None:
    name = table(tmp_path)
    runs_of(tmp_path, name)
    text = latex(fill(read_table(name), find_runs([tmp_path / "runs"])))
    assert "\n{}[x] ä \\textbar{} y & " in text
    assert "\n{}*own* & " in text


def test_folders_given_twice_links_and_equal_names(tmp_path: Path) -> None:
    name = table(tmp_path)
    made = runs_of(tmp_path, name)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "there").symlink_to(tmp_path / "runs")
    assert len(find_runs([tmp_path / "runs", tmp_path / "linked", tmp_path])) == len(made)
    assert len(find_runs([tmp_path / "linked"])) == len(made)
    for where, limit in (("a", 20), ("b", 10)):
        shutil.copytree(made[0], tmp_path / where / "run")
        record = find_runs([tmp_path / where])[0].record.raw
        for side in record["eval"].values():
            side["protocol"] = {"hash": where, "fields": {"limit": limit, "tasks": {"boolq": {}}}}
        change_record(tmp_path / where / "run", eval=record["eval"])
    with pytest.raises(ProtocolError, match="limit: 20 and 10"):
        sweep_grid(find_runs([tmp_path / "a", tmp_path / "b"]))
    record["eval"] |= {"compressed": {"protocol": {"hash": "0", "fields": {"tasks": {}, "perplexity": {}}}}}
    change_record(tmp_path / "b" / "run", eval=record["eval"])
    rows = [name for name, _ in sweep_grid(find_runs([tmp_path / "a", tmp_path / "b"])).blocks[0][1]]
    assert [name for name in rows if name != "dense"] == [str(tmp_path / where / "run") for where in "ab"]


def test_a_run_that_no_process_holds_has_died(tmp_path: Path) -> None:
    [first, *_] = runs_of(tmp_path, table(tmp_path))
    change_record(first, status="running")
    assert any(e.note == DIED for e in sweep_grid(find_runs([first])).entries())


def test_settings_that_decide_nothing_do_not_hide_a_run(tmp_path: Path) -> None:
    name = table(tmp_path)
    runs_of(tmp_path, name)
    other = table(tmp_path, TABLE.replace("method=slm,", "method=slm, evaluation.batch_size=3, runtime.threads=1,"))
    assert not fill(read_table(other), find_runs([tmp_path / "runs"])).gaps


@pytest.mark.parametrize(("old", "new", "message"), [
    ("seed: [0, 1]", "seed: [0, 0]", "expected every value once"),
    ("seed: [0, 1]", "sed: [0, 1]", "there is no sed.*Did you mean seed"),
    ("evaluation=smoke", "evaluation=smok", "Did you mean smoke"),
    ("method.target_layers", "method.target_layer", "Did you mean method.target_layers|Did you mean target_layers"),
    ("which: dense}", "which: dense, runs: [seed=1]}", "dense model and has runs of its own"),
    ("columns: [average]", "columns: [{show: average, digits: -1}]", "digits = -1"),
])  # fmt: skip
def test_declarations_that_no_run_could_fill_are_refused(old: str, new: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        cells(table(tmp_path, TABLE.replace(old, new)))


def test_commands_of_a_table_with_any_name_survive_the_shell_and_hydra() -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    [line] = commands([["seed=1"]], "o'brien, v2 (fin al)")
    [word] = [w for w in shlex.split(line) if w.startswith("hydra")]
    assert OverridesParser.create().parse_override(word).value() == "outputs/multirun/o'brien, v2 (fin al)"


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path, capsys) -> None:
    [first, *_] = runs_of(tmp_path, table(tmp_path))
    (tmp_path / "file").write_text("")
    assert main(["tables", "sweep", str(first), "--out", str(tmp_path / "file")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_file_that_is_elsewhere_does_not_hide_its_runs(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "here" / "text.txt").write_text("words " * 2000)
    own = table(tmp_path, TABLE.replace("evaluation=smoke", "evaluation=perplexity, evaluation.corpora.mine=text.txt")
                .replace("columns: [average]", "columns: [layers]"))
    monkeypatch.chdir(tmp_path / "here")
    runs_of(tmp_path, own)
    at_home = fill(read_table(own), find_runs([tmp_path / "runs"]))
    monkeypatch.chdir(tmp_path / "there")
    assert csv_text(fill(read_table(own), find_runs([tmp_path / "runs"]))) == csv_text(at_home)
    assert not at_home.gaps
