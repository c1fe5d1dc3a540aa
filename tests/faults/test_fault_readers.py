"""Plans, records, sweep.json, path.json, tables and references with one field wrong: read, or refused in a line.

A reader raises nothing but errors of this package, and takes no longer than 5 s. `make test-faults` gives them 10,000.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attack
import pytest
import yaml
from attack import held, is_json, size, wrong
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slm_exp.cli.sweep import taken_from
from slm_exp.core.files import write_json
from slm_exp.methods.from_plan import FromPlan
from slm_exp.reporting.measures import read_paths
from slm_exp.reporting.page import write_report
from slm_exp.runs.record import Run
from slm_exp.runs.sweep import SweepFolder, complaints, differing, table
from slm_exp.tables import reference
from slm_exp.tables.definition import read_table
from slm_exp.tables.formats import csv_text, html, latex, markdown
from slm_exp.tables.records import find_runs
from slm_exp.tables.sweep import sweep_grid

OLD = Path(__file__).parents[1] / "records" / "old"
CONF = Path(__file__).parents[2] / "conf"


def loaded(path: Path) -> Any:
    return json.loads(path.read_text())


PLANS = [loaded(OLD / "finished" / "plan.json"), loaded(OLD / "width" / "plan.json"), {
    "n_layers": 8, "groups": [[4, 6]], "dropped": [2], "rule": "mean", "sublayers": [{"layer": 0, "kind": "mlp"}],
    "compensation": {"kind": "magnitude", "cuts": [{"start": 2, "stop": 3, "alpha": 1.5}]},
    "target": {"asked": 6, "complete": True, "layers": 6, "threshold": [0.5, 0.6],
               "neighbours": [{"threshold": 0.7, "n_layers": 7, "final_score": 0.9}],
               "sizes": [{"n_layers": 6, "params": 10, "ratio_removed": 0.1, "flops_per_token": 1.0, "latency_s": 0.1,
                          "best_final_score": 0.8, "threshold": [0.5, 0.6]}]},
    "trace": [{"low": 6, "high": 7, "score": 0.9, "accepted": True}]}]
RECORDS = [loaded(OLD / kind / "record.json") for kind in ("finished", "width", "failed", "recovery", "speed")]
SWEEPS = [loaded(OLD / "sweep.json")]
PATH = {
    "range": [0.5, 1.0], "evaluations": 3, "block_forwards": 20, "unknown": [[0.5, 0.6]], "seq_len": 16,
    "plans": [{"threshold_low": 0.6, "threshold_high": 0.8, "n_layers": 6, "groups": [[3, 6]], "final_score": 0.8},
              {"threshold_low": 0.8, "threshold_high": 1.0, "n_layers": 8, "groups": [], "final_score": 1.0}],
    "sizes": [{"n_layers": n, "params": 1e4 * n, "ratio_removed": 0.1, "flops_per_token": 1e5 * n, "bytes": 4e4 * n,
               "latency_s": 1e-3 * n, "best_final_score": 0.9, "threshold": [0.6, 0.8]} for n in (6, 8)],
    "recovery": {"name": "family", "report": {}, "dense": 2.0, "sizes": {
        "6": {"before": 3.0, "after": 2.5, "kept": True}, "8": {"before": 2.0, "after": None, "kept": False}}},
    "model": {"name": "tiny", "note": "", "digest": "a", "n_layers": 8},
    "calibration": RECORDS[0]["calibration"], "config": RECORDS[0]["config"], "device": RECORDS[0]["device"]}
TABLES = [yaml.safe_load((CONF / "table" / f"{name}.yaml").read_text()) for name in ("main", "thresholds", "speed")]
REFERENCES = [yaml.safe_load((CONF / "reference" / f"{name}.yaml").read_text()) for name in ("slm", "sleb")]


def attacks(small: int, full: int) -> Callable[[Any], Any]:
    """`n` inputs a function; the same ones at every run of the default suite."""
    return settings(max_examples=size(small, full), deadline=None, derandomize=not attack.FULL, database=None,
                    suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readers")


@attacks(120, 4000)
@given(text=wrong(PLANS))
def test_plans(at: Path, text: bytes) -> None:
    path = at / "plan.json"
    path.write_bytes(text)
    made = held("plan.json", lambda: FromPlan(path=str(path)).given, is_json(text))
    if made is not None:  # what was accepted can be carried out, written and read again
        assert 0 < made.n_layers_out <= made.n_layers
        made.runs, made.cuts, made.scales  # noqa: B018
        write_json(path, made.to_json())
        assert held("plan.json written again", lambda: FromPlan(path=str(path)).given.effect()) == made.effect()


def look_at(run: Run, at: Path) -> None:
    """Everything that pages and tables ask of a run."""
    run.problems, run.state, run.damage, run.plan, run.similarity, run.unverified  # noqa: B018
    run.made_otherwise()
    runs = find_runs([at])
    if runs:
        grid = sweep_grid(runs, mixed_protocols=True)
        for form in (markdown, latex, html, csv_text):
            form(grid).encode()


@attacks(60, 3000)
@given(text=wrong(RECORDS))
def test_records(at: Path, text: bytes) -> None:
    folder = at / "records" / "run"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "record.json").write_bytes(text)
    shutil.copy(OLD / "finished" / "similarity.npz", folder)
    if run := held("record.json", lambda: Run.read(folder), is_json(text)):
        held("record.json in a table", lambda: look_at(run, folder.parent))


@attacks(15, 500)
@given(text=wrong(RECORDS))
def test_pages(at: Path, text: bytes) -> None:
    folder = at / "pages"
    folder.mkdir(exist_ok=True)
    (folder / "record.json").write_bytes(text)
    shutil.copy(OLD / "finished" / "similarity.npz", folder)
    held("record.json on a page", lambda: write_report(folder), is_json(text))


@attacks(100, 1500)
@given(text=wrong(SWEEPS))
def test_sweeps(at: Path, text: bytes) -> None:
    folder = at / "sweep"
    folder.mkdir(exist_ok=True)
    (folder / "sweep.json").write_bytes(text)

    def look() -> None:
        sweep = SweepFolder.read(folder)
        cells = sweep.cells()
        (table(cells) + complaints(cells) + str(differing(sweep.jobs))).encode()
        taken_from(sweep, [])

    held("sweep.json", look, is_json(text))


@attacks(80, 700)
@given(text=wrong([PATH]))
def test_threshold_paths(at: Path, text: bytes) -> None:
    folder = at / "paths"
    folder.mkdir(exist_ok=True)
    (folder / "path.json").write_bytes(text)
    held("path.json", lambda: read_paths(folder, [folder / "path.json"]), is_json(text))


def is_yaml(text: bytes) -> bool:
    try:
        yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return False
    return True


@attacks(30, 200)
@given(text=wrong(TABLES))
def test_tables(at: Path, text: bytes) -> None:
    path = at / "mine.yaml"
    path.write_bytes(text)
    held("table", lambda: read_table(str(path)), is_yaml(text))


@attacks(20, 100)
@given(text=wrong(REFERENCES))
def test_references(at: Path, text: bytes) -> None:
    path = at / "mine.yaml"
    path.write_bytes(text)
    held("reference", lambda: reference.read_document(reference.ReferenceText, path), is_yaml(text))


def test_at_least_half_of_the_inputs_pass_the_parser() -> None:
    """Else the attacks look at parsers, not at this package."""
    assert attack.parsed
    for reader, counts in attack.parsed.items():
        assert counts[True] >= counts.total() / 2, reader


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.sampled_from(PLANS), st.sampled_from(attack.KINDS), st.sampled_from(attack.ODD))
def test_a_change_leaves_the_document_it_began_with(document: Any, kind: str, odd: Any) -> None:
    before = json.dumps(document)
    first, *_, last = list(attack.paths(document))
    attack.change(document, last, kind, odd, first)
    assert json.dumps(document) == before
