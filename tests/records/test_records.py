"""Records: those of older versions still load, what differs from what was written is named, damage costs one file."""

from __future__ import annotations

import gzip
import json
import logging
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from slm_exp.cli import compare, report, sync
from slm_exp.cli.main import main
from slm_exp.core.errors import ConfigError, SlmError
from slm_exp.core.format import printable
from slm_exp.core.types import MergePlan
from slm_exp.launch.compose import compose_run
from slm_exp.launch.hydra_compat import parse
from slm_exp.pipeline import run as pipeline
from slm_exp.runs import record as records
from slm_exp.runs.record import Run, finished_run, is_finished, record_digest
from slm_exp.runs.schema import Record
from slm_exp.runs.state import DAMAGED, FAILED, FINISHED, WAITING, remove_stale
from slm_exp.runs.statistics.scores import by_document
from slm_exp.runs.sweep import Job, SweepFolder, note_death, read_cell

OLD = Path(__file__).parent / "old"
"""Written by version 0.1.0 of November 2026, before records listed files; the paths in them are made up."""
QUICK = ["model=tiny", "tracking=none", "runtime=cpu", "calibration.n_samples=2", "calibration.seq_len=16",
         "method.threshold=0.6", "evaluation.tasks=[boolq,piqa]", "evaluation.limit=3"]


# ----------------------------------------------------------------------------------------- older versions


@pytest.mark.parametrize("kind", ["finished", "failed", "width", "recovery", "speed"])
def test_an_old_record_is_read_whole(kind: str) -> None:
    run = Run.read(OLD / kind)
    raw = json.loads((OLD / kind / "record.json").read_text())
    assert run.record.raw == raw
    assert run.record.run_id == raw["run_id"]
    assert run.problems == ()
    assert run.unverified == (kind != "failed")
    assert run.state == raw["status"]
    if kind == "failed":
        assert run.record.error.type == "ConfigError"
        assert run.plan is None
        return
    assert run.plan == MergePlan.load(OLD / kind)
    assert run.record.layers.after == raw["layers"]["after"] == run.plan.n_layers_out
    assert run.record.setting("method.name") == raw["config"]["method"]["name"]


def test_old_sections_have_their_types() -> None:
    assert Run.read(OLD / "width").record.plan.width.method == "magnitude"
    assert Run.read(OLD / "recovery").record.recovery.layers[0].errors
    cell, *_ = Run.read(OLD / "speed").record.speed.cells
    assert cell.compressed.latency_s
    assert cell.compressed.latency_s.n == 3
    finished = Run.read(OLD / "finished")
    assert finished.record.eval.dense.scores("boolq")["n"] == 4
    assert finished.similarity is not None
    assert SweepFolder.read(OLD).jobs[0].overrides


def test_old_runs_are_shown_and_said_to_be_unverified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(OLD, tmp_path / "old")
    assert main(["tables", "sweep", str(tmp_path / "old"), "--mixed-protocols"]) == 0
    assert "Unverified: 4 runs of an older version" in capsys.readouterr().out
    assert report.main([str(tmp_path / "old" / "finished")]) == 0
    assert "Unverified: 1 run" in (tmp_path / "old" / "finished" / "report.html").read_text()
    assert compare.main([str(tmp_path / "old" / "finished")]) == 0
    assert "Unverified: 1 run" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------- finished means whole


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its checkpoint."""
    root = tmp_path_factory.mktemp("made")
    carry_out(root / "run", root / "cache")
    return root / "run"


def carry_out(folder: Path, cache: Path, *overrides: str) -> dict[str, Any]:
    cfg = compose_run([*QUICK, "save_model=true", f"cache.dir={cache}", *overrides])
    return pipeline.run(cfg, folder, [*QUICK, *overrides])


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    record = json.loads((folder / "record.json").read_text())
    change(record)
    (folder / "record.json").write_text(json.dumps(record))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_the_record_lists_what_is_the_result_and_nothing_derived(made: Path) -> None:
    record = json.loads((made / "record.json").read_text())
    assert {"plan.json", "similarity.npz", "calibration_tokens.npy", "config.yaml", "model/model.safetensors",
            "samples/dense/piqa.jsonl.gz", "samples/compressed/boolq.jsonl.gz"} <= set(record["files"])
    assert not {"report.html", "similarity.png", "run.log", "record.json", ".lock"} & set(record["files"])
    assert record["files"]["plan.json"]["bytes"] == (made / "plan.json").stat().st_size
    assert len(record["files"]["plan.json"]["sha256"]) == 64
    assert record["digest"] == record_digest(record)
    assert record["code"]
    assert Run.read(made).state == FINISHED
    assert not Run.read(made).unverified


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=12))
@example("R&D").via("a plain word to the old rule")
@example("é\"!;~<^`").via("likewise")
@example("back\\slash\\")
@example("o'brien, v2 (fin al)")
@example("a\\'b")
def test_the_command_that_computes_again_means_its_folder(name: str) -> None:
    run = Run(Path("/outputs") / name, Record.of({"overrides": ["seed=1"]}))
    if printable(run.again) == run.again:
        assert parse(shlex.split(run.again)[-1]).value() == str(run.folder)


DAMAGE = {
    "model/model.safetensors has 100 bytes": lambda f: os.truncate(f / "model" / "model.safetensors", 100),
    "model/model.safetensors is missing": lambda f: (f / "model" / "model.safetensors").unlink(),
    "plan.json is missing": lambda f: (f / "plan.json").unlink(),
    "similarity.npz is missing": lambda f: (f / "similarity.npz").unlink(),
    "similarity.npz has 300 bytes": lambda f: os.truncate(f / "similarity.npz", 300),
    "similarity.npz has other contents": lambda f: flip(f / "similarity.npz"),
    "calibration_tokens.npy has other contents": lambda f: flip(f / "calibration_tokens.npy"),
    "config.yaml has other contents": lambda f: flip(f / "config.yaml"),
    "samples/compressed/piqa.jsonl.gz has other contents": lambda f: flip(f / "samples/compressed/piqa.jsonl.gz"),
    "record.json was changed": lambda f: edit(f, lambda r: r["eval"]["compressed"]["tasks"]["piqa"].update(acc=0.99)),
    "record.json lists files and has no digest": lambda f: edit(f, lambda r: r.pop("digest")),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_what_differs_is_named_everywhere_and_does_not_count(
    what: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_id = Run.read(run).record.run_id
    DAMAGE[what](run)
    read = Run.read(run)
    assert read.state == DAMAGED
    assert what in str(read.problems[0])
    assert not is_finished(run, run_id)
    assert f"hydra.run.dir={run}" in read.damage
    assert main(["tables", "sweep", str(run)]) == 0
    assert what in capsys.readouterr().out
    assert report.main([str(run)]) == 1
    assert what in capsys.readouterr().err
    assert what in (run / "report.html").read_text()
    with pytest.raises(ConfigError, match=what.split()[0]):
        compare.main([str(run)])
    cell = read_cell(Job(run_id, (), run, save_model=True))
    assert cell.state == DAMAGED
    assert what in (cell.error or "")


def test_a_large_file_is_digested_where_it_is_requested(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slm_exp.runs.files.SMALL", 10_000)
    flip(run / "model" / "model.safetensors")
    assert Run.read(run).state == FINISHED
    assert Run.read(run, verify=True).state == DAMAGED


def test_a_listed_name_outside_the_folder_is_refused(run: Path) -> None:
    def outside(record: dict[str, Any]) -> None:
        record["files"] = {"../../etc/passwd": {"bytes": 1, "sha256": ""}}
        record["digest"] = record_digest(record)

    edit(run, outside)
    assert "no file of the run's folder" in str(Run.read(run).problems[0])


def test_a_removed_checkpoint_costs_nothing_but_itself(run: Path) -> None:
    run_id = Run.read(run).record.run_id
    shutil.rmtree(run / "model")
    assert Run.read(run).state == FINISHED
    assert is_finished(run, run_id)
    assert not is_finished(run, run_id, with_model=True)
    assert read_cell(Job(run_id, (), run, save_model=True)).error == "its checkpoint is missing"


def test_a_damaged_run_is_computed_again(run: Path, made: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = json.loads((run / "record.json").read_text())
    DAMAGE["similarity.npz has 300 bytes"](run)
    with caplog.at_level(logging.WARNING):
        again = carry_out(run, made.parent / "cache")
    assert "similarity.npz has 300 bytes" in caplog.text
    assert again["plan"] == before["plan"]
    assert Run.read(run).state == FINISHED
    assert json.loads((run / "record.before.json").read_text()) == before


def test_damaged_runs_are_not_sent(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = run / "wandb" / "offline-run-20260101_120000-a" / "run-a.wandb"
    log.parent.mkdir(parents=True)
    log.write_bytes(b":W&B")
    assert sync.main([str(run), "--dry-run"]) == 0
    (run / "plan.json").unlink()
    assert sync.main([str(run), "--dry-run"]) == 1
    captured = capsys.readouterr()
    assert "plan.json is missing" in captured.err
    assert captured.out.count("would send") == 1


# --------------------------------------------------------------------------------------- same version, other code


def test_other_versions_are_said_and_exact_computes_again(
    run: Path, made: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = json.loads((run / "record.json").read_text())
    other = records.versions() | {"torch": "99.0"}
    monkeypatch.setattr(records, "versions", lambda: other)
    with caplog.at_level(logging.WARNING):
        assert carry_out(run, made.parent / "cache") == first
    (line,) = [r.getMessage() for r in caplog.records if "other code" in r.getMessage()]
    assert f"torch {first['versions']['torch']} (here 99.0)" in line
    assert "cache.accept=exact" in line
    job = Job(first["run_id"], (), run)
    assert read_cell(job).state == FINISHED
    assert "99.0" in read_cell(job).made_otherwise
    assert read_cell(Job(first["run_id"], (), run, exact=True)).state == WAITING
    SweepFolder(run.parent, jobs=[Job(first["run_id"], (), run, exact=True)]).write()
    assert [cell.state for cell in SweepFolder.read(run.parent).cells()] == [WAITING]
    assert not any(stored.exact for stored in SweepFolder.read(OLD).jobs)
    again = carry_out(run, made.parent / "cache", "cache.accept=exact")
    assert again["created"] >= first["created"]
    assert json.loads((run / "record.before.json").read_text()) == first


def test_other_source_is_said(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = Run.read(run).record.run_id
    assert finished_run(run, run_id, exact=True)
    monkeypatch.setattr(records, "package_digest", lambda: "0" * 16)
    assert "source" in Run.read(run).made_otherwise()
    assert finished_run(run, run_id)
    assert finished_run(run, run_id, exact=True) is None


def test_a_wrong_choice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cache\.accept = any; expected one of exact, version"):
        compose_run([*QUICK, "cache.accept=any"])


# -------------------------------------------------------------------------------- damage costs one file, leftovers


def test_an_altered_record_of_an_old_version_is_no_crash(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(OLD / "finished", tmp_path / "run"))
    text = (folder / "record.json").read_text()
    (folder / "record.json").write_text(text.replace('"average"', '"averaga"'))
    assert Run.read(folder).record.eval.compressed.average is None
    edit(folder, lambda record: record["plan"].update(surprise=1))
    os.truncate(folder / "similarity.npz", 200)
    assert report.main([str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert "similarity.npz cannot be read" in page
    assert "has the key &#39;surprise&#39;" in page


def test_a_truncated_matrix_costs_the_picture_not_the_sweeps_page(tmp_path: Path) -> None:
    for kind in ("finished", "width"):
        shutil.copytree(OLD / kind, tmp_path / kind)
    os.truncate(tmp_path / "finished" / "similarity.npz", 300)
    (tmp_path / "width" / "record.json").write_text('{"status": "finished", "eval": {"dense": {"average": "much"}}}')
    assert report.main([str(tmp_path)]) == 0
    assert "eval.dense.average = &#39;much&#39;; expected a number" in (tmp_path / "report.html").read_text()


def test_temporary_files_of_killed_processes_go_with_the_next_run(run: Path, made: Path) -> None:
    stale = [run / f".record.json.{pid}.abc123.tmp" for pid in (os.getpid(), 2**22 + 1)]
    for path in stale:
        path.write_text("{")
    carry_out(run, made.parent / "cache")
    assert not any(path.exists() for path in stale)
    (run / f".plan.json.{os.getpid()}.abc123.tmp").write_text("{")
    remove_stale(run / "plan.json")
    assert (run / f".plan.json.{os.getpid()}.abc123.tmp").exists()  # a file this process may be writing


def test_a_log_is_not_written_through_a_link(tmp_path: Path) -> None:
    from slm_exp.core.logs import LogFile

    target = tmp_path / "precious"
    target.write_text("mine")
    (tmp_path / "run.log").symlink_to(target)
    with pytest.raises(OSError, match=r"run\.log"):
        LogFile(str(tmp_path / "run.log"))
    assert target.read_text() == "mine"


def test_a_death_is_noted_in_a_record_that_still_checks(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text(json.dumps({"run_id": "a", "status": "running", "stage": "plan"}))
    note_death(Job("a", (), tmp_path), "killed by SIGKILL")
    assert Run.read(tmp_path).record.error.line == "ProcessDied: killed by SIGKILL"
    assert Run.read(tmp_path).problems == ()


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
                    max_leaves=8)
GOOD = json.loads((OLD / "finished" / "record.json").read_text())
PATHS = [(a,) for a in GOOD] + [(a, b) for a in GOOD if isinstance(GOOD[a], dict) for b in GOOD[a]]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(PATHS), JSON)
def test_any_value_anywhere_is_read_or_refused_in_one_line(path: tuple[str, ...], value: Any) -> None:
    record = json.loads(json.dumps(GOOD))
    inner = record
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    refused = ""
    try:
        read = Record.of(record)
    except ValueError as error:
        refused = str(error)
    assert "\n" not in refused
    assert path[0] in refused if refused else read.raw is not None


def test_a_byte_order_mark_is_not_part_of_a_record(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text('\ufeff{"run_id": "a", "status": "failed"}')
    assert Run.read(tmp_path).state == FAILED


@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 100_000, '{"a": ' * 100_000, '{"run_id": 1e999}', "{}",
                                  '{"a": 1}', '{"run_id": "a"}', '{"status": "finished"}',
                                  '{"run_id": "a", "status": "done"}', '{"run_id": "", "status": "finished"}'])
def test_what_is_no_record_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(SlmError, match="cannot be read") as error:
        Run.read(tmp_path)
    assert "\n" not in str(error.value)


def test_samples_that_unpack_to_too_much_are_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "task.jsonl.gz"
    row = json.dumps({"doc_id": 1, "doc_hash": "a", "acc": 1.0}) + "\n"
    path.write_bytes(gzip.compress(row.encode()))
    assert by_document(path, "acc") == {(1, "a"): 1.0}
    monkeypatch.setattr("slm_exp.runs.statistics.scores.MOST", 100)
    path.write_bytes(gzip.compress(row.encode() * 101))
    assert by_document(path, "acc") == {}
    monkeypatch.setattr("slm_exp.core.text.LIMIT", 1000)
    path.write_bytes(gzip.compress(b'{"acc": "' + b"0" * 10_000))
    assert by_document(path, "acc") == {}
